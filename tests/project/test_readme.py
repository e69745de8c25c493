# SPDX-License-Identifier: GPL-2.0-or-later
"""README.md: its Python lines run. All documents: what they name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernel/**/*.md"), ROOT / "results" / "README.md"]
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
PATH = re.compile(r"`([a-z_0-9./-]+\.(?:py|toml|j2|ipynb)|(?:proto_v3|sim|experiments|tests|docs)/(?:[a-z_0-9/]+/)?)`")
CODE = ("proto_v3", "sim", "experiments", "tests", "benchmarks", "scenarios", "kernel")


@pytest.mark.slow
def test_the_python_lines_compare_two_protocols_and_plot_it(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len([line for line in code.splitlines() if line]) == 5
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert "v2-multifd" in done.stdout
    assert (tmp_path / "downtime.png").stat().st_size > 10_000


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_links_to_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path, anchor in LINK.findall(text):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_path_in_a_document_exists(document: Path) -> None:
    known = code_files()
    for path in PATH.findall(document.read_text(encoding="utf-8")):
        found = any((folder / path).exists() for folder in (ROOT, document.parent)) or any(
            each.endswith(f"/{path}") for each in known
        )
        assert found, f"{path}: there is no such file"


@cache
def code_files() -> frozenset[str]:
    """All files and folders (with / at the end) that hold code, from the project's root."""
    found = [path for room in CODE for path in (ROOT / room).rglob("*") if "__pycache__" not in path.parts]
    return frozenset(f"/{path.relative_to(ROOT).as_posix()}{'/' * path.is_dir()}" for path in found)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
