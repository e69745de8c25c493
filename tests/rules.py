# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tests hold each rule of docs/v2.md and docs/protocol-v3.md.

A rule is a table row that begins with its number, such as `v2.driver.3`. A test that holds it is marked
`@pytest.mark.rule("v2.driver.3")`. `python -m tests.rules` writes the last column of these rows anew. The rules of v2's
VMM have a column before it: what was seen of QEMU, by the facts that stand for a rule (tests/real/qemu/facts.py) and
the kept records that show them.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.real.qemu.facts import FACTS, Seen, shown_by
from tests.real.qemu.kept import records

ROOT = Path(__file__).resolve().parents[1]
FACTS_FILE = "tests/real/qemu/facts.py"
OF_QEMU = "v2.vmm."
"""Rules with this number have the column of what was seen."""
DOCS = (ROOT / "docs" / "v2.md", ROOT / "docs" / "protocol-v3.md")
ROW = re.compile(r"^\| (?P<rule>v[23](?:\.\w+){2}) \|(?P<text>.*) \|(?P<tests>[^|\n]*)\|$", re.MULTILINE)

Tests = dict[str, dict[Path, list[str]]]
"""Of each rule the files, and the names of the test functions there."""


def rules() -> list[str]:
    """All rules, in the order of the documents."""
    return [row["rule"] for doc in DOCS for row in ROW.finditer(doc.read_text(encoding="utf-8"))]


def marked(path: Path) -> Iterator[tuple[str, str]]:
    """The rule and the test of each mark in this file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.rule":
                    for argument in mark.args:
                        yield ast.literal_eval(argument), node.name


@functools.cache
def names_by_rule() -> Tests:
    """What the marks of all test files say."""
    found: Tests = defaultdict(lambda: defaultdict(list))
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for rule, test in marked(path):
            found[rule][path].append(test)
    return found


@functools.cache
def seen_by_rule() -> dict[str, str]:
    """Of each rule what was seen: the facts, and the versions of the QEMUs and kernels that showed them."""
    shown: dict[str, set[Seen]] = defaultdict(set)
    for seen in records().values():
        for fact in shown_by(seen):
            shown[fact.name].add(seen)
    cells: dict[str, list[str]] = defaultdict(list)
    for fact in FACTS:
        if fact.name in shown:
            versions = sorted({seen.version for seen in shown[fact.name]})
            qemus = ", ".join(".".join(map(str, version)) for version in versions)
            for rule in fact.rules:
                cells[rule].append(f"{fact.name.replace('_', ' ')} ({qemus})")
    kernels = sorted({seen.record.kernel for seen in records().values()})
    where = f"[Linux {', '.join(kernels)}](../{FACTS_FILE})"
    return {rule: f"{'; '.join(facts)}; {where}" for rule, facts in cells.items()}


def with_tests(text: str, found: Tests) -> str:
    """The document's text, with the tests that the marks name in each rule's last column, and what was seen before."""

    def row(match: re.Match[str]) -> str:
        files = found.get(match["rule"], {})
        cell = "; ".join(
            f"[{path.stem}](../{path.relative_to(ROOT).as_posix()}): {', '.join(f'`{name}`' for name in names)}"
            for path, names in files.items()
        )
        left = match["text"]
        if match["rule"].startswith(OF_QEMU):
            left = f"{left.rpartition(' |')[0]} | {seen_by_rule().get(match['rule'], '')}"
        return f"| {match['rule']} |{left} | {cell} |"

    return ROW.sub(row, text)


def main() -> None:
    """Write the column of tests into both documents."""
    found = names_by_rule()
    for doc in DOCS:
        doc.write_text(with_tests(doc.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
