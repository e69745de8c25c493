# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may import whom: the contracts of pyproject.toml hold, and each room says what lives there."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("proto_v3", "sim", "experiments", "kernel")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_a_module_imports_only_what_its_room_may() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_a_room_says_what_lives_there(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


def test_no_two_classes_have_the_same_name() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


SPDX = "SPDX-License-Identifier: GPL-2.0-or-later"
SPDX_KERNEL = "SPDX-License-Identifier: GPL-2.0\n"  # of the kernel module: the kernel's own licence


def _names_its_licence(path: Path) -> bool:
    lines = "".join(path.read_text("utf-8").splitlines(True)[:2]).replace(" */", "")
    return (SPDX_KERNEL if path.is_relative_to(ROOT / "kernel" / "driver") else SPDX) in lines


def test_each_source_file_names_its_licence_and_the_licence_is_there() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = [name for name in done.stdout.splitlines() if not name.startswith(("results/", "notebooks/"))]
    assert done.returncode or len(tracked) > len(MODULES), "or this is no clone"
    kinds = (".py", ".toml", ".sh", ".c", ".h", ".j2", ".cff", "Makefile", "Kbuild")
    sources = [ROOT / name for name in tracked if name.endswith(kinds)]
    without = [path for path in sources or MODULES if not _names_its_licence(path)]
    assert without == []
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 2" in (ROOT / "LICENSE").read_text("utf-8")
    assert 'license = "GPL-2.0-or-later"' in (ROOT / "pyproject.toml").read_text("utf-8")
