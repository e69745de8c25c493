# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 run`: the same table however the runs are made, and nothing lost whatever ends them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import polars as pl
import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

from experiments.cli import main
from experiments.commands import run as sweep
from experiments.runs import cluster, manifest, resume
from experiments.runs import pool as runs
from experiments.runs.pool import Cell, Done
from experiments.runs.resume import RunStore
from experiments.study import experiment
from experiments.study.claims import Finding
from experiments.study.effects import effect_row
from experiments.study.experiment import NAMES, Answer, Experiment, Planned, Point, find
from experiments.study.statistics import effect
from experiments.study.sweep import KEPT
from proto_v3.errors import UserError
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.scenario import Scenario

CERTIFICATES = Path(__file__).parents[1] / "data" / "tls"
NAME = "tiny"
BASE = "mlx5-2vf"
SMALL = (
    *("ram.size_gib=1", "ram.nonzero_gib=0.25", "ram.frame_mib=16", "device.0.block_kib=1024", "vmm.setup_ms=50"),
    *("device.0.state_mib=8", "device.0.stop_only_mib=8", "vmm.give_up_s=5"),
)
COUNTS = (1, 2)
PROTOCOLS = ("v2", "v3-n2")
SEEDS = 3
RUNS = len(COUNTS) * len(PROTOCOLS) * SEEDS
WAITS_S = 60


def points(quick: bool) -> list[Point]:
    return [
        Point(BASE, protocol, (*SMALL, f"device.0.count={count}"), {"devices": count})
        for count in COUNTS
        for protocol in PROTOCOLS
    ]


def answer(frame: pl.DataFrame) -> Answer:
    told = effect(frame.filter(pl.col("devices") == COUNTS[0]), "downtime_ns", *PROTOCOLS)
    table = pl.DataFrame([effect_row(told, *PROTOCOLS, 1e6, "ms")])
    return Answer(f"{frame.height} runs.", "Nothing.", ["A detail."], [Finding("C3", "refuted", "why")], table)


def figures(frame: pl.DataFrame, command: str) -> dict[str, Figure]:
    figure = Figure()
    figure.subplots().plot(frame["seed"].to_numpy(), frame["devices"].to_numpy())
    return {NAME: figure}


TINY = Experiment(NAME, "Is it small?", points, answer, figures, repeats=SEEDS, quick_repeats=1)


def register(monkeypatch: pytest.MonkeyPatch, told: Experiment = TINY) -> None:
    module = ModuleType(f"experiments.questions.{told.name}")
    module.EXPERIMENT = told  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(experiment, "NAMES", (*experiment.NAMES, told.name))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment of 12 small runs; and a revision that stays, whatever is edited meanwhile."""
    register(monkeypatch)
    monkeypatch.setattr(manifest, "git_revision", lambda: "abc123")


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", NAME, "--out", str(folder), *arguments])


def table(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / NAME / "runs.parquet")


def kept(folder: Path) -> int:
    """Rows that wait for --resume."""
    return len(resume.read(folder / NAME / KEPT, "abc123").rows)


class Counted:
    """simulate(), with the seeds that it was called for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, scenario: Scenario, protocol: Any, seed: int) -> Outcome:
        self.calls.append((protocol.name, seed))
        return simulate(scenario, protocol, seed)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    told = Counted()
    monkeypatch.setattr(runs, "simulate", told)
    return told


def cut_after(count: int) -> Any:
    """in_processes() that Ctrl-C ends after so many runs."""

    def in_processes(cells: Sequence[Cell], jobs: int | None, method: str = "") -> Done:
        for at, told in enumerate(runs.in_processes(cells, 1)):
            if at == count:
                raise KeyboardInterrupt
            yield told

    return in_processes


def interrupt(folder: Path, count: int, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "in_processes", cut_after(count))
        return run(folder, *arguments)


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in this process."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        patch.setattr(manifest, "git_revision", lambda: "abc123")
        done = run(folder, "--jobs", "1")
    assert done.exit_code == 0, done.output
    (folder / "printed").write_text(done.output)
    return folder


def test_everything_is_written_and_nothing_is_left_over(made: Path) -> None:
    assert sorted(path.name for path in (made / NAME).iterdir()) == [
        *("answer.json", "effects.parquet", "manifest.json", "runs.parquet", f"{NAME}.png", f"{NAME}.svg"),
    ]
    told = json.loads((made / NAME / "answer.json").read_text())
    assert told == {
        "experiment": NAME,
        "question": "Is it small?",
        "quick": False,
        "answer": f"{RUNS} runs.",
        "limit": "Nothing.",
        "details": ["A detail."],
        "findings": [{"claim": "C3", "verdict": "refuted", "why": "why"}],
        "figures": ["tiny"],
    }
    assert pl.read_parquet(made / NAME / "effects.parquet")["pairs"].item() == SEEDS


def test_what_was_found_is_printed(made: Path) -> None:
    printed = (made / "printed").read_text()
    for words in (f"{RUNS} runs: {RUNS} COMPLETED", "- Limit: Nothing.", "- C3 refuted: why", f"{NAME}.png"):
        assert words in printed
    *_, title, headings, row = printed.splitlines()
    assert title == "What was asked"
    assert headings.split() == ["question", "runs", "broken", "verdict", "where"]
    assert row.split()[:5] == [NAME, str(RUNS), "0", "C3", "refuted"]
    assert printed.replace("\n", "").endswith(str(made / NAME))


def test_json_is_all_that_is_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, replace(TINY, figures=lambda *_: {}))
    done = run(tmp_path, "--jobs", "1", "--json")
    assert done.exit_code == 0
    (told,) = json.loads(done.stdout)["questions"]
    assert (told["answer"], told["runs"], told["effects"][0]["pairs"]) == (f"{RUNS} runs.", RUNS, SEEDS)


def test_the_rows_are_in_the_grids_order_with_their_factors_and_paired_seeds(made: Path) -> None:
    told = table(made).select("seed", "devices", "protocol").rows()
    assert told == [
        (seed, count, protocol) for seed in range(1, SEEDS + 1) for count in COUNTS for protocol in PROTOCOLS
    ]
    assert table(made)["cell"].n_unique() == RUNS


def test_each_row_can_be_made_again_from_the_row_and_the_manifest(made: Path) -> None:
    told = json.loads((made / NAME / "manifest.json").read_text())
    assert told["git_revision"] == "abc123"
    assert told["complete"]
    assert told["runs"] == told["runs_planned"] == RUNS
    assert told["seeds"] == list(range(1, SEEDS + 1))
    assert told["outcomes"] == {protocol: {"COMPLETED": RUNS // 2} for protocol in PROTOCOLS}
    assert told["bases"].keys() == {BASE}
    assert Scenario.model_validate(told["bases"][BASE]) == load(BASE)
    for row in table(made).sample(4, seed=1).iter_rows(named=True):
        again = Planned.of(
            Point(row["base"], row["protocol"], tuple(row["settings"]), {"devices": row["devices"]}), row["seed"]
        )
        assert again.key == row["cell"]
        cell = again.cell
        assert simulate(cell.scenario, cell.protocol, cell.seed).digest == row["digest"]


def test_the_table_is_the_same_for_any_number_of_processes(made: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--jobs", "2").exit_code == 0
    for name in ("runs.parquet", "effects.parquet", "answer.json"):
        assert (tmp_path / NAME / name).read_bytes() == (made / NAME / name).read_bytes(), name


def test_a_quick_run_has_fewer_repeats(tmp_path: Path) -> None:
    assert run(tmp_path, "--quick", "--jobs", "1").exit_code == 0
    assert table(tmp_path)["seed"].unique().to_list() == [1]
    assert json.loads((tmp_path / NAME / "manifest.json").read_text())["quick"] is True


def test_a_place_may_have_fewer_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(quick: bool) -> list[Point]:
        return [Point(BASE, "v2", SMALL, {}, 2), Point(BASE, "v3-n2", SMALL)]

    planned = Experiment(NAME, "?", some, answer, figures, repeats=4).planned(False)
    assert [(each.point.protocol, each.cell.seed) for each in planned] == [
        *(("v2", 1), ("v3-n2", 1), ("v2", 2), ("v3-n2", 2), ("v3-n2", 3), ("v3-n2", 4)),
    ]


def test_a_run_that_two_places_share_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    twice = Experiment(NAME, "?", lambda quick: points(quick) * 2, answer, figures, repeats=1)
    monkeypatch.setattr(sys.modules[f"experiments.questions.{NAME}"], "EXPERIMENT", twice)
    assert run(tmp_path, "--jobs", "1").exit_code == 0
    assert table(tmp_path).height == len(points(True))


# --- as many seeds as are needed -------------------------------------------------------------------------------------

MOST = 12


def uneven(quick: bool) -> list[Point]:
    """One device that is always the same, and two whose commands vary much."""
    spread = {1: 0, 2: 1}
    return [
        replace(point, settings=(*point.settings, f"firmware.service_cv={spread[int(point.factors['devices'])]}"))
        for point in points(quick)
    ]


def test_a_place_gets_as_many_seeds_as_it_needs_however_its_runs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    register(monkeypatch, replace(TINY, points=uneven, repeats=MOST))
    assert run(tmp_path / "one", "--jobs", "1").exit_code == 0
    told = table(tmp_path / "one").group_by("devices", "seeds", "seeds_because").len().sort("devices").rows()
    assert told == [(1, 5, "narrow intervals", 10), (2, MOST, "no more are planned", 2 * MOST)]
    assert len(counted.calls) == 10 + 2 * MOST
    manifest_of = json.loads((tmp_path / "one" / NAME / "manifest.json").read_text())
    assert manifest_of["seeds_rule"] == {"half_width_percent": 1.0, "batches": [5, 10, 20, 30]}
    assert (manifest_of["runs"], manifest_of["runs_most"], manifest_of["complete"]) == (10 + 2 * MOST, 4 * MOST, True)
    assert run(tmp_path / "two", "--jobs", "2").exit_code == 0
    interrupt(tmp_path / "cut", 7)
    interrupt(tmp_path / "cut", 16, "--resume")
    assert run(tmp_path / "cut", "--jobs", "1", "--resume").exit_code == 0
    for other in ("two", "cut"):
        same = (tmp_path / other / NAME / "runs.parquet").read_bytes()
        assert same == (tmp_path / "one" / NAME / "runs.parquet").read_bytes(), other


def test_the_half_width_can_be_set_and_a_wider_one_replaces_no_narrower_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, replace(TINY, points=uneven, repeats=MOST))
    assert run(tmp_path, "--jobs", "1").exit_code == 0
    wide = ("--jobs", "1", "--half-width", "60")
    done = run(tmp_path, *wide)
    assert done.exit_code == 2
    assert "or has more runs; --force replaces it" in done.stderr
    assert run(tmp_path, *wide, "--force", "--resume").exit_code == 0
    assert table(tmp_path).height == 4 * 5
    assert json.loads((tmp_path / NAME / "manifest.json").read_text())["command"].endswith("--half-width 60")
    assert run(tmp_path, "--jobs", "1", "--half-width", "0").exit_code == 0
    assert table(tmp_path).height == 4 * MOST


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_half_width_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    done = run(tmp_path / "a", "--half-width", value)
    assert done.exit_code == 2
    told = " ".join(done.stderr.split())
    assert "'--half-width'" in told
    assert f"{float(value):g}" in told
    assert "the range 0<=x<=100." in told
    assert not (tmp_path / "a").exists()


def test_a_half_width_of_minus_0_is_0(tmp_path: Path) -> None:
    assert run(tmp_path, "--jobs", "1", "--half-width", "-0").exit_code == 0
    told = (tmp_path / NAME / "manifest.json").read_text()
    assert json.loads(told)["command"].endswith("--half-width 0")
    assert "-0.0" not in told


# --- cut short, and gone on with -------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_done_and_resume_makes_the_rest(made: Path, tmp_path: Path, counted: Counted) -> None:
    done = interrupt(tmp_path, 5)
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert kept(tmp_path) == len(counted.calls) - 1 == 5  # the run that Ctrl-C came after was not taken
    assert not (tmp_path / NAME / "runs.parquet").exists()
    counted.calls.clear()
    assert run(tmp_path, "--jobs", "1", "--resume").exit_code == 0
    assert len(counted.calls) == RUNS - 5
    assert table(tmp_path).equals(table(made))
    assert (tmp_path / NAME / "runs.parquet").read_bytes() == (made / NAME / "runs.parquet").read_bytes()
    assert not (tmp_path / NAME / KEPT).exists()


def test_interrupted_twice_both_parts_are_kept(tmp_path: Path, counted: Counted) -> None:
    interrupt(tmp_path, 3)
    assert interrupt(tmp_path, 4, "--resume").exit_code == 130
    assert kept(tmp_path) == 7


def test_kept_runs_are_made_anew_only_with_force(tmp_path: Path, counted: Counted) -> None:
    interrupt(tmp_path, 5)
    counted.calls.clear()
    refused = run(tmp_path, "--jobs", "1")
    assert (refused.exit_code, counted.calls, kept(tmp_path)) == (2, [], 5)
    assert "keeps 5 runs of an interrupted sweep; --resume goes on with them" in refused.stderr
    assert run(tmp_path, "--jobs", "1", "--force").exit_code == 0
    assert len(counted.calls) == RUNS


def test_resume_of_a_whole_sweep_makes_nothing(made: Path, tmp_path: Path, counted: Counted) -> None:
    assert run(tmp_path, "--jobs", "1").exit_code == 0
    before = (tmp_path / NAME / "runs.parquet").read_bytes()
    counted.calls.clear()
    assert run(tmp_path, "--jobs", "1", "--resume").exit_code == 0
    assert counted.calls == []
    assert (tmp_path / NAME / "runs.parquet").read_bytes() == before


def test_resume_goes_on_from_a_whole_sweep_of_fewer_repeats(tmp_path: Path, counted: Counted) -> None:
    assert run(tmp_path, "--quick", "--jobs", "1").exit_code == 0
    counted.calls.clear()
    assert run(tmp_path, "--jobs", "1", "--resume").exit_code == 0
    assert len(counted.calls) == RUNS - len(points(True))
    assert table(tmp_path).height == RUNS


def test_set_changes_the_scenarios_and_resume_makes_no_run_of_another_setting(tmp_path: Path, counted: Counted) -> None:
    three, four = (("--set", f"driver.chunks={chunks}") for chunks in (3, 4))
    assert interrupt(tmp_path, 5, *three).exit_code == 130
    counted.calls.clear()
    done = run(tmp_path, "--jobs", "1", "--resume", *three)
    assert done.exit_code == 0, done.stderr
    assert len(counted.calls) == RUNS - 5
    assert "All runs were made with --set driver.chunks=3: this is not the question" in done.stdout
    assert {settings[0] for settings in table(tmp_path)["settings"]} == {"driver.chunks=3"}
    manifest_of = json.loads((tmp_path / NAME / "manifest.json").read_text())
    assert manifest_of["settings"] == ["driver.chunks=3"]
    assert manifest_of["command"] == f"proto-v3 run {NAME} --set driver.chunks=3"
    counted.calls.clear()
    assert run(tmp_path, "--jobs", "1", "--resume", "--force", *four).exit_code == 0
    assert len(counted.calls) == RUNS


@pytest.mark.parametrize(
    ("setting", "swept"),
    [
        ("device.0.count=3", "device.0.count"),
        ("device.0={count=3}", "device.0.block_kib"),
        ("ram.size_gib.x=3", "ram.size_gib"),
        ("v3.dirty_streams=3", "v3.dirty_streams"),
    ],
)
def test_a_key_that_the_question_sets_is_refused(tmp_path: Path, setting: str, swept: str) -> None:
    told = refused(NAME, "--out", str(tmp_path / "none"), "--set", setting)
    assert f"--set {setting}: tiny sets {swept} itself" in told


def raises(*_: Any) -> Any:
    raise ZeroDivisionError("nothing \x1b[2J to compare")


def test_a_figure_costs_no_answer_and_settings_that_leave_no_answer_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, replace(TINY, figures=raises))
    done = run(tmp_path, "--jobs", "1", "--quick")
    assert done.exit_code == 1
    assert "proto-v3: error: no figure: ZeroDivisionError: nothing" in done.stderr
    assert json.loads((tmp_path / NAME / "answer.json").read_text())["figures"] == []
    register(monkeypatch, replace(TINY, answer=raises))
    told = refused(NAME, "--quick", "--jobs", "1", "--out", str(tmp_path / "other"), "--set", "driver.chunks=3")
    assert "--set driver.chunks=3: tiny cannot be answered from such runs: 4 COMPLETED; ZeroDivisionError" in told
    assert "\x1b" not in told


def test_resume_of_runs_of_another_revision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path, 5)
    monkeypatch.setattr(manifest, "git_revision", lambda: "def456")
    done = run(tmp_path, "--jobs", "1", "--resume")
    assert done.exit_code == 2
    assert "another version (abc123 schema" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    monkeypatch.setattr(manifest, "git_revision", lambda: "abc123")
    assert kept(tmp_path) == 5


def test_a_whole_sweep_of_another_revision_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    assert run(tmp_path, "--jobs", "1").exit_code == 0
    monkeypatch.setattr(manifest, "git_revision", lambda: "def456")
    counted.calls.clear()
    assert run(tmp_path, "--jobs", "1", "--resume").exit_code == 0
    assert len(counted.calls) == RUNS


def test_what_was_kept_of_nothing_belongs_to_who_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first run; another revision goes on, is cut too, and can be gone on with by that one alone."""
    interrupt(tmp_path, 0)
    monkeypatch.setattr(manifest, "git_revision", lambda: "def456")
    assert interrupt(tmp_path, 3, "--resume").exit_code == 130
    assert run(tmp_path, "--jobs", "1", "--resume").exit_code == 0


FLIPS = 150


def test_a_flipped_bit_changes_no_value(made: Path, tmp_path: Path) -> None:
    """All over the file: what is read is as it was written, or is told as damaged, or is not there."""
    interrupt(tmp_path, RUNS - 1)
    file = tmp_path / NAME / KEPT
    good, whole = file.read_bytes(), resume.read(file, "abc123").rows
    assert len(whole) == RUNS - 1
    damaged = 0
    for at in random.Random(1).sample(range(8 * len(good)), FLIPS):
        file.write_bytes(good[: at // 8] + bytes([good[at // 8] ^ 1 << at % 8]) + good[at // 8 + 1 :])
        kept = resume.read(file, "abc123")
        assert kept.rows.items() <= whole.items(), at
        assert kept.others == {}, at
        damaged += bool(kept.problem)
    assert damaged > FLIPS // 4, "most of the file is rows"


@pytest.mark.parametrize(
    ("statement", "told", "again"),
    [
        ("update finished set row = 'no row' where rowid = 2", "1 runs in it do not match their digests", RUNS - 2),
        ("drop table finished; create table finished (x)", "SQLite cannot read all of it", RUNS),
        ("", "SQLite cannot read all of it", RUNS),
    ],
    ids=["row", "table", "file"],
)
def test_kept_runs_that_are_damaged_are_made_again(
    made: Path, tmp_path: Path, counted: Counted, statement: str, told: str, again: int
) -> None:
    interrupt(tmp_path, 3)
    file = tmp_path / NAME / KEPT
    if statement:
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.executescript(statement)
    else:
        file.write_text("not a database, but long enough to be taken for one " * 20)
    bad = file.read_bytes()
    counted.calls.clear()
    done = run(tmp_path, "--jobs", "1", "--resume")
    assert done.exit_code == 0, done.output
    assert len(counted.calls) == again
    assert table(tmp_path).equals(table(made))
    words = " ".join(done.stderr.split())
    assert told in words
    assert f"{NAME}: {again} runs are made" in words
    assert Path(f"{file}.damaged").read_bytes() == bad
    assert not file.exists()


def test_a_link_in_the_place_of_the_kept_runs_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / KEPT).symlink_to("../mine")
    done = run(tmp_path, "--jobs", "1")
    assert done.exit_code == 2
    assert "runs.sqlite: is no regular file" in done.stderr
    assert not (tmp_path / "mine").exists()


def test_kept_runs_of_a_larger_sweep_are_not_removed(tmp_path: Path) -> None:
    interrupt(tmp_path, 9)
    for arguments in (["--quick"], ["--quick", "--resume"]):
        done = run(tmp_path, "--jobs", "1", *arguments)
        assert done.exit_code == 2
        assert (
            "runs.sqlite: keeps 5 runs of an interrupted sweep that this command does not make; --force" in done.stderr
        )
    assert kept(tmp_path) == 9
    assert run(tmp_path, "--jobs", "1", "--quick", "--force").exit_code == 0


def test_a_second_command_in_the_same_folder_says_that_one_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def in_processes(cells: Sequence[Cell], jobs: int | None, method: str = "") -> Done:
        for each in runs.in_processes(cells, 1):
            told.extend([run(tmp_path)] if not told else [])
            yield each

    monkeypatch.setattr(sweep, "in_processes", in_processes)
    assert run(tmp_path).exit_code == 0
    (second,) = told
    assert second.exit_code == 2
    assert f"`proto-v3 run {NAME}` (process {os.getpid()}, since 20" in second.stderr
    assert "is at work in it; wait for it, or name another folder" in second.stderr


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["manifest", "table", "bit"])
def test_a_whole_sweep_that_is_damaged_is_made_anew(tmp_path: Path, counted: Counted, damage: str) -> None:
    assert run(tmp_path, "--jobs", "1").exit_code == 0
    file = tmp_path / NAME / ("manifest.json" if damage == "manifest" else "runs.parquet")
    good = file.read_bytes()
    if damage == "manifest":
        file.write_text("[]")
        assert run(tmp_path, "--jobs", "1", "--resume").exit_code == 2
    elif damage == "table":
        table(tmp_path).drop("cell").write_parquet(file)
    else:
        file.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    counted.calls.clear()
    done = run(tmp_path, "--jobs", "1", "--resume", *(["--force"] if damage == "manifest" else []))
    assert done.exit_code == 0
    assert len(counted.calls) == RUNS
    assert (
        damage == "manifest" or "runs.parquet is not as it was written: all of its runs are made again" in done.stderr
    )


# --- runs that break -------------------------------------------------------------------------------------------------


def is_victim(scenario: Scenario, protocol: Any, seed: int) -> bool:
    return (len(scenario.devices), protocol.name, seed) == (2, "v3-n2", 2)


def breaks(scenario: Scenario, protocol: Any, seed: int) -> Outcome:
    if is_victim(scenario, protocol, seed):
        raise RuntimeError("a bug of ours")
    return simulate(scenario, protocol, seed)


def dies(scenario: Scenario, protocol: Any, seed: int) -> Outcome:
    if is_victim(scenario, protocol, seed):
        os.kill(os.getpid(), signal.SIGKILL)
    return simulate(scenario, protocol, seed)


def others(frame: pl.DataFrame) -> pl.DataFrame:
    """Those that did not break. Where some runs fail and some do not, that is why the others are made."""
    return frame.drop("seeds_because").filter(
        ~((pl.col("devices") == 2) & (pl.col("protocol") == "v3-n2") & (pl.col("seed") == 2))
    )


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_raises_is_told_with_its_traceback_and_costs_no_other(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    monkeypatch.setattr(runs, "simulate", breaks)  # worker processes are forked
    done = run(tmp_path, "--jobs", jobs)
    assert done.exit_code == 1
    (row,) = table(tmp_path).filter(pl.col("digest") == "").iter_rows(named=True)
    assert (row["devices"], row["protocol"], row["seed"], row["outcome"]) == (2, "v3-n2", 2, "FAILED")
    assert row["reason"].startswith("Traceback")
    assert "a bug of ours" in row["reason"]
    assert f"a run broke (cell {row['cell']}): RuntimeError: a bug of ours" in done.output
    same = [name for name in others(table(made)).columns if name in table(tmp_path).columns]
    assert others(table(tmp_path)).select(same).equals(others(table(made)).select(same))


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_only_its_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "simulate", dies)
    assert run(tmp_path, "--jobs", "2").exit_code == 1
    (row,) = table(tmp_path).filter(pl.col("digest") == "").iter_rows(named=True)
    assert (row["devices"], row["protocol"], row["seed"], row["outcome"]) == (2, "v3-n2", 2, "FAILED")
    assert "the process that made this died" in row["reason"]
    same = [name for name in others(table(made)).columns if name in table(tmp_path).columns]
    assert others(table(tmp_path)).select(same).equals(others(table(made)).select(same))


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["run", *arguments])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    return done.stderr


def test_an_unknown_name_is_refused_in_one_line_before_anything_is_made(tmp_path: Path) -> None:
    told = refused(NAME, "tinny", "--out", str(tmp_path / "none"))
    assert len(told.strip().splitlines()) == 1
    assert "no experiment 'tinny'" in told
    assert "tiny" in told
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("arguments", [("--jobs", "0"), ("--jobs", "many"), ("--no-such-option",)])
def test_a_bad_option_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    told = refused(NAME, "--out", str(tmp_path / "none"), *arguments)
    assert "Error:" in told.strip().splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_a_name_is_needed() -> None:
    assert "Missing argument" in refused()


def test_a_grid_that_cannot_be_run_is_refused_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: Counted
) -> None:
    wrong = [*points(True), Point(BASE, "v2", ("firmware.engines=many",))]
    told = Experiment(NAME, "?", lambda quick: wrong, answer, figures)
    monkeypatch.setattr(sys.modules[f"experiments.questions.{NAME}"], "EXPERIMENT", told)
    assert "firmware.engines" in refused(NAME, "--out", str(tmp_path))
    assert counted.calls == []


OWN_QUICK_GRID = ("state_and_dirty_rate", "reorder_memory", "many_devices")
"""Experiments whose quick grid has sizes of its own."""


@pytest.mark.parametrize("name", NAMES)
def test_every_place_of_a_grid_can_be_run_and_is_there_once(name: str) -> None:
    quick, whole = ([Planned.of(point, 1).key for point in find(name).points(quick)] for quick in (True, False))
    for keys in (quick, whole):
        assert len(set(keys)) == len(keys) > 0
    assert len(quick) < len(whole)
    assert set(quick) <= set(whole) or name in OWN_QUICK_GRID


@pytest.mark.parametrize("name", NAMES)
def test_protocols_are_compared_over_thirty_paired_seeds(name: str) -> None:
    experiment = find(name)
    if name == "kernel_read":
        assert experiment.repeats == 1, "nothing in its runs is drawn by chance"
        return
    assert experiment.repeats >= 30
    fewer = [point for point in experiment.points(False) if point.repeats is not None]
    assert not fewer or name == "state_and_dirty_rate", "whether a run converges is all but settled by the rates there"


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[Any]:
    import distributed

    make: Any = distributed.LocalCluster
    with make(n_workers=3, processes=True, threads_per_worker=1, dashboard_address=None) as running:
        yield running


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_gives_the_same_table(
    made: Path, tmp_path: Path, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim: int = next(iter(local_cluster.workers.values())).pid
    add, rows = RunStore.add, []

    def kill_on_the_way(self: RunStore, cell: str, row: dict[str, Any]) -> None:
        add(self, cell, row)
        rows.append(cell)
        if len(rows) == 2:
            os.kill(victim, signal.SIGKILL)

    monkeypatch.setattr(RunStore, "add", kill_on_the_way)
    done = run(tmp_path, "--scheduler", local_cluster.scheduler_address)
    assert done.exit_code == 0, done.output
    assert len(rows) == RUNS
    assert (tmp_path / NAME / "runs.parquet").read_bytes() == (made / NAME / "runs.parquet").read_bytes()


def test_an_error_of_the_cluster_itself_is_one_line(
    tmp_path: Path, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_there(cell: Cell) -> Outcome:
        raise ModuleNotFoundError("No module named 'experiments'")

    monkeypatch.setattr(cluster, "run_cell", not_there)
    done = run(tmp_path, "--scheduler", local_cluster.scheduler_address)
    assert done.exit_code == 2
    assert "No module named 'experiments'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("workers", "told"),
    [
        ([{"a": 1}, {}, {}], "it has no workers any more"),
        ([{"a": 1}, OSError("gone")], "it does not answer any more: gone"),
    ],
)
def test_a_cluster_that_loses_all_workers_is_told(
    monkeypatch: pytest.MonkeyPatch, workers: list[Any], told: str
) -> None:
    monkeypatch.setattr(cluster, "WITHOUT_WORKERS_S", 1e-6)
    monkeypatch.setattr(cluster, "COUNT_S", 0.0)
    running, client = mock.Mock(), mock.Mock()
    running.has_ready.return_value = False
    client.nthreads.side_effect = workers
    with pytest.raises(UserError, match=told):
        cluster._wait_for_one(running, client, "tcp://there:1")


def one_worker(**options: Any) -> Any:
    """A cluster in this process."""
    import distributed

    make: Any = distributed.LocalCluster
    return make(n_workers=1, processes=False, threads_per_worker=1, dashboard_address=None, **options)


@pytest.mark.slow
def test_a_cluster_is_reached_with_tls(made: Path, tmp_path: Path) -> None:
    import dask
    from distributed import Security

    role = {"cert": str(CERTIFICATES / "target.pem"), "key": str(CERTIFICATES / "target.key")}
    parts = ("client", "scheduler", "worker")
    ours = {f"distributed.comm.tls.{part}.{what}": file for part in parts for what, file in role.items()}
    ours["distributed.comm.tls.ca-file"] = str(CERTIFICATES / "ca.pem")
    with dask.config.set(ours), one_worker(protocol="tls://", security=Security()) as running:
        assert running.scheduler_address.startswith("tls://")
        done = run(tmp_path, "--scheduler", running.scheduler_address)
        assert done.exit_code == 0, done.output
        with dask.config.set(dict.fromkeys(ours)):
            refused = run(tmp_path / "other", "--scheduler", running.scheduler_address)
    assert (tmp_path / NAME / "runs.parquet").read_bytes() == (made / NAME / "runs.parquet").read_bytes()
    assert refused.exit_code == 2
    assert "certificates come from Dask's configuration" in refused.stderr.splitlines()[-1]


def test_a_scheduler_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 1)
    done = run(tmp_path, "--scheduler", "tcp://127.0.0.1:9")
    assert done.exit_code == 2
    assert "no Dask scheduler answers there" in done.stderr


@pytest.mark.slow
def test_a_cluster_without_dask_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"install proto-v3\[distributed\]"):
        next(cluster.on_cluster([], "tcp://127.0.0.1:9"))
