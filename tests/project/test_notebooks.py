"""The notebooks: each runs from beginning to end on small data, and is committed with what it gave and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import polars as pl
import pytest

from experiments import analysis, notebook
from experiments.commands import run as sweep
from experiments.draw import notebook as figures_analysis
from experiments.runs.folder import ResultFolder
from experiments.runs.pool import run_cell
from experiments.runs.table import row
from experiments.study import advice as verdicts
from experiments.study.experiment import Point, find
from proto_v3.errors import UserError
from tests.build.scenario import small_scenario

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
    "04-your-device": ((), FEW | {'"device.0.count": 2': '"device.0.count": 1'}, 1, 6),
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
    rows = [row(run_cell(one.cell)) | one.columns() for one in small.planned(quick=True)]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    sweep.write(small, frame, ResultFolder(folder / name), quick=True)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def of_type(notebook: Any, kind: str) -> int:
    return sum(kind in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_small_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiments, changes, figures, tables = CASES[name]
    for each in experiments:
        make_small(each, tmp_path)
    monkeypatch.setenv(analysis.FOLDER_VARIABLE, str(tmp_path))
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
    assert "**What you see:**" in text
    assert "**What it does not say:**" in text


# --- what they call ---------------------------------------------------------------------------------------------------


def frame(downtimes_ms: Mapping[str, Sequence[float | None]]) -> pl.DataFrame:
    """Runs of so long a downtime; None is one that was not completed."""
    return pl.DataFrame(
        [
            {"protocol": name, "seed": seed, "outcome": "FAILED" if ms is None else "COMPLETED"}
            | {"downtime_ns": None if ms is None else round(ms * 1e6)}
            for name, values in downtimes_ms.items()
            for seed, ms in enumerate(values, 1)
        ]
    )


@pytest.mark.parametrize(
    ("base", "other", "word"),
    [
        ([100, 101, 102], [80, 81, 82], "shorter"),
        ([100, 101, 102], [120, 121, 122], "longer"),
        ([100, 101, 102], [99, 100, 101], "next to nothing"),
        ([100, 101, 102], [98, 93, 96], "uncertain"),
        ([None, None], [1, 2], "only other completes"),
        ([1, 2], [None, None], "only base completes"),
        ([None, None], [None, None], "neither completes"),
        ([1, None], [None, 2], "uncertain"),
    ],
)
def test_a_verdict_is_a_word_for_an_interval(base: list[float | None], other: list[float | None], word: str) -> None:
    told = verdicts.verdicts(frame({"v2": base, "v3-n4": other}), [("v2", "v3-n4"), ("v2", "v3-n8")])
    assert told["verdict"].to_list() == [word]


def test_the_advice_follows_the_effects() -> None:
    names = {"today": "v2", "best": "v2-multifd", "one": "v3-n1", "many": "v3-n4"}
    runs = frame({"v2": [200, 202], "v2-multifd": [100, 101], "v3-n1": [100, 101], "v3-n4": [100, 101]})
    told = "\n".join(verdicts.advice(runs, **names))
    assert "Take v2-multifd before anything else" in told
    assert "Do not build v3 for this device: v3-n4 brings next to nothing over v2-multifd." in told
    assert "2 seeds are enough to look" in told
    runs = frame({"v2": [200, 202], "v2-multifd": [100, None], "v3-n1": [60, 61], "v3-n4": [60, 60]})
    told = "\n".join(verdicts.advice(runs, **names))
    assert "v3 is worth a look" in told
    assert "One dirty stream is enough" in told
    assert "But v2-multifd does not complete 1 of 2 runs" in told


def test_a_device_that_nothing_moves_is_told_as_such() -> None:
    scenario = small_scenario({"vmm.give_up_s": 0.001})
    names = ["v2", "v2-multifd", "v3-n1", "v3-n4"]
    runs = analysis.compared(scenario, names, 2)
    assert runs["outcome"].unique().to_list() == ["DID_NOT_CONVERGE"]
    assert analysis.downtimes(runs)["completed"].to_list() == [0] * 4
    assert analysis.above_bound(runs).is_empty()
    assert analysis.where_it_goes(runs).is_empty()
    told = verdicts.verdicts(runs, [("v2", "v3-n4")])
    assert verdicts.readable(told)["verdict"].to_list() == ["neither completes"]
    assert verdicts.where(told.with_columns(place=pl.lit("x")), ["place"])["from_percent"].to_list() == [None]
    assert notebook.shown(figures_analysis.waterfall(scenario, runs, "a command"))._repr_png_()
    advice = verdicts.advice(runs, today="v2", best="v2-multifd", one="v3-n1", many="v3-n4")
    assert "Neither v2-multifd nor v3-n4 completes: nothing can be said." in advice


def test_protocols_that_were_not_run_are_named() -> None:
    runs = frame({"v2": [100, 101], "v3-n4": [50, 51]})
    with pytest.raises(UserError, match="v3-n2 against v2: the runs have no such pair, only v2, v3-n4"):
        verdicts.verdicts(runs, [("v2", "v3-n2")])
    with pytest.raises(UserError, match="v2-multifd, v3-n1: not among the runs"):
        verdicts.advice(runs, today="v2", best="v2-multifd", one="v3-n1", many="v3-n4")


def test_places_are_counted_by_verdict() -> None:
    runs = pl.concat(
        [
            frame({"v2": [100, 101], "v3-n4": values}).with_columns(rate=pl.lit(rate))
            for rate, values in ((1.0, [50, 51]), (2.0, [60, 61]), (3.0, [100, 101]))
        ]
    )
    told = verdicts.together({"x": (verdicts.verdicts(runs, [("v2", "v3-n4")], ["rate"]), ["rate"])})
    assert told.select("of", "verdict", "places", "where").rows() == [
        ("x", "shorter", 2, "1; 2"),
        ("x", "next to nothing", 1, "3"),
    ]


def test_the_steps_of_a_critical_path_tile_the_downtime() -> None:
    timeline = analysis.traced(small_scenario(), "v2", seed=1)
    for table in (analysis.steps(timeline), analysis.stretches(timeline)):
        assert table["takes_ms"].sum() == pytest.approx(timeline.downtime_ns / 1e6, abs=0.01 * table.height)
        assert table["from_ms"].is_sorted()
    assert analysis.stretches(timeline)["steps"].sum() == analysis.steps(timeline).height


def test_the_command_makes_the_same_runs() -> None:
    told = analysis.command("mlx5-2vf", ["v2", "v3-n2"], 3, {"driver.lock": "none", "device.0.features": ["STOP_COPY"]})
    assert told == (
        "proto-v3 compare mlx5-2vf --protocols v2,v3-n2 --seeds 3 --set driver.lock=none "
        "--set 'device.0.features=[\"STOP_COPY\"]'"
    )


def test_results_that_are_missing_or_damaged_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(analysis.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"no results of ablation in .*; make them with: proto-v3 run ablation"):
        analysis.runs("ablation")
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "runs.parquet").write_text("no table")
    with pytest.raises(UserError, match="ablation: cannot be read"):
        analysis.runs("ablation")
    with pytest.raises(UserError, match="did you mean"):
        analysis.answer("ablatoin")


def test_the_folder_of_results_is_the_clones_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(analysis.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert analysis.results_folder() == ROOT / "results"
    monkeypatch.setenv(analysis.FOLDER_VARIABLE, "results/validate")
    assert analysis.results_folder() == ROOT / "results" / "validate"
    monkeypatch.setenv(analysis.FOLDER_VARIABLE, str(tmp_path))
    assert analysis.results_folder() == tmp_path
