# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/api.md, written from the docstrings: `python -m experiments.api.document > docs/api.md`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator

from experiments import api
from proto_v3.vmm.migration import VmmCounters
from sim.outcome import Outcome
from sim.report import Counters

HEAD = """# The API

<!-- Written by `make docs` from the docstrings of experiments/api; do not edit. -->
"""

COLUMNS = """One row a run. The end of a name is its unit; in virtual time, times are whole nanoseconds. Times are null
where the migration was not completed. A sweep has its factors too; the tables of `proto-v3 run` have the cell, the base
and the settings of each run."""
SPREAD = {
    "kind": "outcome",
    "phases_ns": "phase_NAME_ns",
    "critical_path_ns": "path_RESOURCE_ns",
    "stages": "stage_NAME_INDEX_ns",
}
"""Fields of Outcome whose columns are called otherwise (experiments.runs.frame)."""


def document() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD, _text(api)]
    for title, members in api.SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts += [_member(member) for member in members]
    parts.append(f"\n## The columns of a table of runs\n\n{COLUMNS}\n")
    parts += [f"- `{column}`{': ' * bool(text)}{text}" for column, text in _columns(Outcome)]
    return "\n".join([*parts, ""])


def _member(member: Callable[..., object] | type) -> str:
    source = textwrap.dedent(inspect.getsource(member))
    (tree,) = ast.parse(source).body
    if isinstance(tree, ast.ClassDef):
        fields = [f"- `{field}`: {text}" for field, text in _fields(tree)]
        return "\n".join([f"### {tree.name}\n", _text(member), *fields, *[""] * bool(fields)])
    assert isinstance(tree, ast.FunctionDef)
    signature = "".join(source.splitlines(keepends=True)[tree.lineno - 1 : tree.body[0].lineno - 1])
    return f"### {tree.name}\n\n```python\n{signature}```\n\n{_text(member)}"


def _text(member: object) -> str:
    """The docstring; what is indented in it stays code."""
    return inspect.cleandoc(inspect.getdoc(member) or "") + "\n"


def _columns(record: type) -> Iterator[tuple[str, str]]:
    """Each column that a field of Outcome or of its counters gives, with the field's text."""
    texts: dict[str, str] = {}
    for cls in (VmmCounters, Counters, Outcome):
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        texts |= dict(_fields(tree))
    columns: dict[str, list[str]] = {}  # some are the sum of several counters
    for field in dataclasses.fields(record):
        if field.name == "counters":
            columns |= {column: [text] for column, text in _columns(Counters)}
        else:
            column = SPREAD.get(field.name, field.metadata.get("column", field.name))
            columns.setdefault(column, []).append(texts.get(field.name, ""))
    for column, parts in columns.items():
        yield column, " And ".join(parts)


def _fields(tree: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Each documented field of a dataclass, with the text below it."""
    for field, text in itertools.pairwise(tree.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                yield name, " ".join(words.split())


if __name__ == "__main__":
    print(document(), end="")
