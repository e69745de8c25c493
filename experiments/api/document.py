"""docs/api.md, written from the docstrings: `python -m experiments.api.document > docs/api.md`."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator

from experiments import api

HEAD = """# The API

<!-- Written by `make docs` from the docstrings of experiments/api; do not edit. -->
"""


def document() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD, _text(api)]
    for title, members in api.SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts += [_member(member) for member in members]
    return "\n".join(parts)


def _member(member: Callable[..., object] | type) -> str:
    source = textwrap.dedent(inspect.getsource(member))
    (tree,) = ast.parse(source).body
    if isinstance(tree, ast.ClassDef):
        fields = [f"- `{field}`: {text}" for field, text in _fields(tree)]
        return "\n".join([f"### {tree.name}\n", _text(member), *fields, *[""] * bool(fields)])
    assert isinstance(tree, ast.FunctionDef)
    signature = "".join(source.splitlines(keepends=True)[: tree.body[0].lineno - 1])
    return f"### {tree.name}\n\n```python\n{signature}```\n\n{_text(member)}"


def _text(member: object) -> str:
    """The docstring; what is indented in it stays code."""
    return inspect.cleandoc(inspect.getdoc(member) or "") + "\n"


def _fields(tree: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Each documented field of a dataclass, with the text below it."""
    for field, text in itertools.pairwise(tree.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                yield name, " ".join(words.split())


if __name__ == "__main__":
    print(document(), end="")
