# SPDX-License-Identifier: GPL-2.0-or-later
"""The API: what scripts and notebooks call, in a plain script, from standard input, and where an event loop runs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from experiments import api
from experiments.api.document import document
from experiments.report import answers
from proto_v3.errors import UserError
from tests.build.scenario import small_scenario, small_text

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = ["v2", "v3-n2"]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_the_same_seeds_under_each_protocol() -> None:
    runs = api.compare(small_scenario(), "v2, v3-n2", seeds=[3, 1])
    assert runs.select("protocol", "seed").rows() == [("v2", 3), ("v3-n2", 3), ("v2", 1), ("v3-n2", 1)]
    assert api.downtimes(runs)["completed"].to_list() == [2, 2]


def test_a_scenario_is_loaded_with_changes(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(small_text())
    scenario = api.load(tmp_path / "mine.toml", {"link.round_trip_us": 7, "driver.lock": "device"})
    assert api.parameters(scenario, ["link.round_trip_us", "driver.lock"])["value"].to_list() == ["7", "device"]
    assert "mlx5-2vf" in api.scenarios()["name"]


def test_ranges_and_samples_of_a_file(tmp_path: Path) -> None:
    ranges = {
        "firmware.engines": {"low": 1.0, "high": 4.0, "why": "one to four were seen"},
        "driver.lock": {"any": ["none", "per_fd"], "why": "either"},
    }
    path = tmp_path / "small.toml"
    path.write_text(small_text({"ranges": ranges}))
    told = api.ranges(str(path))
    assert told.rows() == [
        ("firmware.engines", "2", 1.0, 4.0, False, None, None, "one to four were seen"),
        ("driver.lock", "per_fd", None, None, False, None, ["none", "per_fd"], "either"),
    ]
    drawn = api.samples(str(path), 8, seed=3)
    assert {each.scenario.driver.lock for each in drawn} == {"none", "per_fd"}
    assert [each.scenario.firmware.engines for each in drawn] == [each.values["firmware.engines"] for each in drawn]
    runs = api.compare(drawn[0].scenario, "v2,v3-n2", 1)
    assert runs["outcome"].to_list() == 2 * ["COMPLETED"]
    assert api.ranges(small_scenario()).is_empty()
    assert len(api.samples(small_scenario(), 8)) == 1


def test_a_sweep_has_its_factors_as_columns() -> None:
    grid: dict[str, list[api.Setting]] = {"link.round_trip_us": [10, 12.5], "driver.lock": ["none", "global"]}
    runs = api.sweep(small_scenario(), PROTOCOLS, grid, seeds=iter([1]))
    places = runs.select("link.round_trip_us", "driver.lock", "protocol").rows()
    assert places == [(us, lock, name) for us in (10, 12.5) for lock in ("none", "global") for name in PROTOCOLS]
    alone = api.compare(api.load("mlx5-2vf", {"link.round_trip_us": 12.5}), "v2", seeds=1)
    swept = api.sweep("mlx5-2vf", "v2", {"link.round_trip_us": [12.5]}, seeds=1)
    assert_frame_equal(swept.drop("link.round_trip_us"), alone)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.load("mlx5-2fv"), "no scenario 'mlx5-2fv'.*did you mean"),
        (lambda: api.load("mlx5-2vf", {"link.gbit": 1}), "link.gbit"),
        (lambda: api.compare("mlx5-2vf", "v4"), "v4"),
        (lambda: api.compare("mlx5-2vf", []), "must be at least one"),
        (lambda: api.compare("mlx5-2vf", "v2,v2"), "only once"),
        (lambda: api.compare("mlx5-2vf", "v2", seeds=0), "seeds 0: must be"),
        (lambda: api.compare("mlx5-2vf", "v2", seeds=[-1]), "must be"),
        (lambda: api.compare("mlx5-2vf", "v2", jobs=0), "jobs 0: must be"),
        (lambda: api.sweep("mlx5-2vf", "v2", {}), "grid: must have"),
        (lambda: api.sweep("mlx5-2vf", "v2", {"driver.lock": "none"}), "driver.lock = 'none': must be a list"),
        (lambda: api.sweep("mlx5-2vf", "v2", {"driver.lock": []}), "must be a list of at least one value"),
        (lambda: api.sweep("mlx5-2vf", "v2", {"link.round_trip_us": [1, -1]}), "link.round_trip_us = -1"),
        (lambda: api.draw_path({}), "at least one run"),
        (lambda: api.write_trace(api.run(small_scenario(), "v2"), "."), "must be the name of a file"),
        (lambda: api.steps(api.run(small_scenario({"vmm.give_up_s": 0.001}), "v2")), "there is no downtime"),
    ],
)
def test_a_mistake_is_a_user_error(call: Any, message: str) -> None:
    with pytest.raises(api.UserError, match=message):
        call()


@pytest.mark.slow
def test_it_works_beside_a_running_event_loop() -> None:
    async def cell() -> pl.DataFrame:
        assert api.run(small_scenario(), "v2").outcome.downtime_ns
        alone = api.compare(small_scenario(), PROTOCOLS, 2)
        assert_frame_equal(alone, api.compare(small_scenario(), PROTOCOLS, 2, jobs=2))
        return alone

    assert_frame_equal(asyncio.run(cell()), api.compare(small_scenario(), PROTOCOLS, 2))


def test_progress_is_called_after_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []
    api.compare(small_scenario(), "v2", 3, progress=lambda done, whole: calls.append((done, whole)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert capsys.readouterr() == ("", "")
    api.compare(small_scenario(), "v2", 2, progress=True)
    assert capsys.readouterr().err.endswith("runs: 2 of 2\n")


# --- processes --------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
from experiments import api
print("main", flush=True)
runs = api.compare("ufimtseva-small", ["v2", "v3-n2"], seeds={seeds}, jobs=2)
print(runs.height, sum(runs["downtime_ns"]))
"""


def python(*arguments: str, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, text=True, **pipes, **more)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "stdin"])
def test_processes_need_no_guard_in_the_main_module(how: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(seeds=2))
    arguments = {"script": ["script.py"], "stdin": ["-"]}[how]
    out, err = python(*arguments, cwd=tmp_path).communicate(SCRIPT.format(seeds=2), timeout=120)
    runs = api.compare("ufimtseva-small", PROTOCOLS, seeds=2)
    assert (out, err) == (f"main\n4 {sum(runs['downtime_ns'])}\n", "")


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    process = python("-c", SCRIPT.format(seeds=5000), cwd=tmp_path, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "main\n"
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert re.findall(r"^KeyboardInterrupt", err, re.MULTILINE) == ["KeyboardInterrupt"]
    assert "Process Spawn" not in err
    for _ in range(50):  # the last one to end is the one that cleans up after the others
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


# --- one run ----------------------------------------------------------------------------------------------------------


def test_one_run_with_its_files(tmp_path: Path) -> None:
    run = api.run(small_scenario(), "v3-n2", seed=4)
    assert api.write_trace(run, tmp_path / "new" / "a.perfetto-trace").stat().st_size > 1000
    spans = pl.read_parquet(api.write_spans(run, tmp_path / "spans.parquet"))
    assert_frame_equal(spans, api.spans(run))
    assert spans.height == len(run.timeline)
    assert api.draw_path({"v3-n2": run}).get_suptitle().startswith("What did the downtime wait for?")


@pytest.mark.slow
def test_all_figures_are_drawn() -> None:
    scenario = small_scenario()
    runs = api.compare(scenario, PROTOCOLS, 2)
    changes = api.verdicts(runs, [("v2", "v3-n2")])
    for figure in (
        api.draw_downtime(scenario, runs),
        api.draw_critical(scenario, runs),
        api.draw_seeds(runs),
        api.draw_changes(changes),
        api.draw_changes(changes.with_columns(place=pl.lit("here")), ["place"]),
    ):
        assert api.shown(figure)._repr_png_()


# --- documents --------------------------------------------------------------------------------------------------------


def test_the_document_is_up_to_date() -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == document(), "run `make docs`"


def test_all_that_is_public_is_in_the_document() -> None:
    members = {member.__name__ for section in api.SECTIONS.values() for member in section}
    assert set(api.__all__) - members == {"Progress", "Scenario", "Seeds", "Setting"}
    assert members < set(api.__all__)


def test_pandas_frames_come_of_it() -> None:
    frame = api.compare(small_scenario(), "v2", 1).to_pandas()
    assert frame["protocol"].tolist() == ["v2"]


# --- tables and sentences ---------------------------------------------------------------------------------------------


def frame(downtimes_ms: Mapping[str, Sequence[float | None]]) -> pl.DataFrame:
    """Runs of so long a downtime; None is one that was not completed."""
    return pl.DataFrame(
        [
            {"protocol": name, "seed": seed, "outcome": "FAILED" if ms is None else "COMPLETED", "reason": "EIO"}
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
    told = api.verdicts(frame({"v2": base, "v3-n4": other}), [("v2", "v3-n4"), ("v2", "v3-n8")])
    assert told["verdict"].to_list() == [word]


def test_the_advice_follows_the_effects() -> None:
    names = {"today": "v2", "best": "v2-multifd", "one": "v3-n1", "many": "v3-n4"}
    runs = frame({"v2": [200, 202], "v2-multifd": [100, 101], "v3-n1": [100, 101], "v3-n4": [100, 101]})
    told = "\n".join(api.advice(runs, **names))
    assert "Take v2-multifd before anything else" in told
    assert "Do not build v3 for this device: v3-n4 brings next to nothing over v2-multifd." in told
    assert "2 seeds are enough to look" in told
    runs = frame({"v2": [200, 202], "v2-multifd": [100, None], "v3-n1": [60, 61], "v3-n4": [60, 61]})
    told = "\n".join(api.advice(runs, **names))
    assert "v3 is worth a look" in told
    assert "One dirty stream is enough" in told
    assert "But v2-multifd does not complete 1 of 2 runs" in told
    assert "The first of them: EIO." in told


def test_a_device_that_nothing_moves_is_told_as_such() -> None:
    scenario = small_scenario({"vmm.give_up_s": 0.001})
    names = ["v2", "v2-multifd", "v3-n1", "v3-n4"]
    runs = api.compare(scenario, names, 2)
    assert runs["outcome"].unique().to_list() == ["DID_NOT_CONVERGE"]
    assert api.downtimes(runs)["completed"].to_list() == [0] * 4
    assert api.above_bound(runs).is_empty()
    assert api.resource_shares(runs).is_empty()
    told = api.verdicts(runs, [("v2", "v3-n4")])
    assert api.readable(told)["verdict"].to_list() == ["neither completes"]
    assert api.count_verdicts({"all": (told.with_columns(place=pl.lit("x")), ["place"])})["from_percent"].to_list() == [
        None
    ]
    assert api.shown(api.draw_downtime(scenario, runs, "a command"))._repr_png_()
    advice = api.advice(runs, today="v2", best="v2-multifd", one="v3-n1", many="v3-n4")
    assert "Neither v2-multifd nor v3-n4 completes: nothing can be said." in advice
    assert advice[-2].startswith("But v3-n4 does not complete 2 of 2 runs")
    assert "The first of them: given up after 0.001 s of pre-copy: " in advice[-2]


def test_the_advice_names_downtimes_far_over_the_limit() -> None:
    scenario = small_scenario({"vmm.vcpu_stop_ms": 50.0})
    runs = api.compare(scenario, ["v2", "v2-multifd", "v3-n1", "v3-n4"], 2)
    told = api.advice(runs, today="v2", best="v2-multifd", one="v3-n1", many="v3-n4")
    (line,) = [each for each in told if each.startswith("Of v3-n4, ")]
    assert line.startswith("Of v3-n4, 2 of 2 completed runs are far over their downtime limit, in the mean ")
    assert "it does not count stop 5" in line
    assert "is fixed costs" in line


def test_protocols_that_were_not_run_are_named() -> None:
    runs = frame({"v2": [100, 101], "v3-n4": [50, 51]})
    with pytest.raises(UserError, match="v3-n2 against v2: the runs have no such pair, only v2, v3-n4"):
        api.verdicts(runs, [("v2", "v3-n2")])
    with pytest.raises(UserError, match="v2-multifd, v3-n1: not among the runs"):
        api.advice(runs, today="v2", best="v2-multifd", one="v3-n1", many="v3-n4")


def test_places_are_counted_by_verdict() -> None:
    runs = pl.concat(
        [
            frame({"v2": [100, 101], "v3-n4": values}).with_columns(rate=pl.lit(rate))
            for rate, values in ((1.0, [50, 51]), (2.0, [60, 61]), (3.0, [100, 101]))
        ]
    )
    told = api.count_verdicts({"x": (api.verdicts(runs, [("v2", "v3-n4")], ["rate"]), ["rate"])})
    assert told.select("of", "verdict", "places", "where").rows() == [
        ("x", "shorter", 2, "1; 2"),
        ("x", "next to nothing", 1, "3"),
    ]


def test_the_steps_of_a_critical_path_tile_the_downtime() -> None:
    run = api.run(small_scenario(), "v2", seed=1)
    for table in (api.steps(run), api.stretches(run)):
        assert table["takes_ms"].sum() == pytest.approx(run.timeline.downtime_ns / 1e6, abs=0.01 * table.height)
        assert table["from_ms"].is_sorted()
    assert api.stretches(run)["steps"].sum() == api.steps(run).height


def test_the_command_makes_the_same_runs() -> None:
    told = api.compare_command(
        "mlx5-2vf", ["v2", "v3-n2"], 3, {"driver.lock": "none", "device.0.features": ["STOP_COPY"]}
    )
    assert told == (
        "proto-v3 compare mlx5-2vf --protocols v2,v3-n2 --seeds 3 --set driver.lock=none "
        "--set 'device.0.features=[\"STOP_COPY\"]'"
    )


def test_results_that_are_missing_or_damaged_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(answers.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"no results of ablation in .*; make them with: proto-v3 run ablation"):
        api.kept_runs("ablation")
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "runs.parquet").write_text("no table")
    with pytest.raises(UserError, match="ablation: cannot be read"):
        api.kept_runs("ablation")
    with pytest.raises(UserError, match="did you mean"):
        api.kept_answer("ablatoin")


def test_the_folder_of_results_is_the_clones_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(answers.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert api.results_folder() == ROOT / "results"
    monkeypatch.setenv(answers.FOLDER_VARIABLE, "results/validate")
    assert api.results_folder() == ROOT / "results" / "validate"
    monkeypatch.setenv(answers.FOLDER_VARIABLE, str(tmp_path))
    assert api.results_folder() == tmp_path
