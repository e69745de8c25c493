"""Who may import whom: the protocols know nothing of the simulator, the simulator nothing of the experiments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for room in ("proto_v3", "sim", "experiments") for path in (ROOT / room).rglob("*.py"))

FORBIDDEN = {
    "proto_v3": {"sim", "experiments", "polars", "pydantic", "matplotlib", "rich", "click"},
    "sim": {"experiments", "polars", "matplotlib", "rich", "click"},
    "experiments": set(),
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports anywhere in it; a relative import is of its own package."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported(path) & FORBIDDEN[room] == set()
    assert imported(path) & {"tests", "helpers", "benchmarks"} == set()


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import a.b\nfrom c.d import e\nfrom . import own\ndef f():\n    import late as g\n")
    assert imported(module) == {"a", "c", "late"}


def test_every_room_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == FORBIDDEN.keys()
