# SPDX-License-Identifier: GPL-2.0-or-later
"""The notebooks: each runs from beginning to end on small data, and is committed with what it gave and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from experiments import notebook
from experiments.report import answers
from experiments.study.experiment import Point, find
from tests.build.grids import write_quick

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_500_000
MOST_STATEMENTS = 8
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try)
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|mnt|Users)/|[A-Z]:\\\\")

Keep = Callable[[Mapping[str, Any]], bool]
KEPT: dict[str, Keep] = {
    "read_scaling": lambda at: at["copy_gib_per_s"] == 8 and at["link_gbit_per_s"] == 400,
    "reconfiguration": lambda at: at["reconfigurations_per_s"] == 5,
    "ablation": lambda at: at["case"] in ("nic-reconfig", "favours-v2"),
    "sensitivity": lambda at: at["part"] == "base" or at["parameter"] == "firmware engines" or _in_corner(at),
}
"""Of each experiment's quick grid, by a point's factors: so little that it takes seconds."""
FEW = {"SEEDS = 5": "SEEDS = 2"}
CASES: dict[str, tuple[Sequence[str], Mapping[str, str], int, int]] = {
    "01-downtime": ((), FEW, 2, 7),
    "02-read-bottleneck": (("read_scaling",), {}, 3, 4),
    "03-v2-vs-v3": (("reconfiguration", "ablation", "sensitivity"), {}, 5, 7),
    "04-your-device": ((), FEW | {'"device.0.count": 2': '"device.0.count": 1', "SAMPLES = 16": "SAMPLES = 2"}, 2, 9),
}
"""Of each notebook: the experiments that it reads, what is made smaller in it, how many figures and tables it shows."""


def _in_corner(at: Mapping[str, Any]) -> bool:
    """Of the maps: what is enough for two rows and two columns."""
    return at["part"] == "map" and at["map_engines"] in (1.0, 8.0) and at.get("map_state_mib", 12.0) in (12.0, 50.0)


def make_small(name: str, folder: Path) -> None:
    """What `proto-v3 run` leaves of two repeats of a small part of a quick grid, but for the figures."""
    whole = find(name)

    def points(quick: bool) -> list[Point]:
        return [point for point in whole.points(quick) if KEPT[name](point.factors)]

    small = replace(whole, points=points, figures=lambda frame, command: {}, quick_repeats=2)
    write_quick(small, small.planned(quick=True), folder / name)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def of_type(notebook: Any, kind: str) -> int:
    return sum(kind in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_small_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiments, changes, figures, tables = CASES[name]
    for each in experiments:
        make_small(each, tmp_path)
    monkeypatch.setenv(answers.FOLDER_VARIABLE, str(tmp_path))
    done = notebook.execute(FOLDER / f"{name}.ipynb", changes)
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
    assert [output for output in outputs(done) if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert of_type(done, "image/png") == figures
    assert of_type(done, "text/html") == tables


def test_all_are_tried() -> None:
    assert {path.stem for path in NOTEBOOKS} == CASES.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, 1 + len(code)))
    assert [cell.source for cell in code if not cell.outputs] == []
    assert {output.get("name", output.output_type) for output in outputs(notebook)} <= {"stdout", "execute_result"}
    assert ABSOLUTE.search(path.read_text(encoding="utf-8")) is None
    assert path.stat().st_size < MOST_BYTES


def imported(source: str) -> list[str]:
    """What a cell imports, by its whole name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{each.name}" for each in node.names]
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_no_logic_of_its_own_and_says_what_it_does_not_say(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            assert [type(node).__name__ for node in ast.walk(tree) if isinstance(node, LOGIC)] == []
            assert sum(not isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body) <= MOST_STATEMENTS
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert notebook.cells[0].source.startswith("# ")
    imports = [node for cell in notebook.cells if cell.cell_type == "code" for node in imported(cell.source)]
    assert set(imports) <= {"polars", "matplotlib", "experiments.api"}
    assert "**What you see:**" in text
    assert "**What it does not say:**" in text
