# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison's parts: cells and processes, tables, files, and sentences whose numbers come from the runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from experiments.commands import compare
from experiments.draw.distribution import draw_distribution
from experiments.report import comparison, findings
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs import pool as runs
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import path_shares, protocols
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, run_cell, run_cells
from experiments.study.published import held_against
from proto_v3.errors import UserError
from proto_v3.timeline import PHASES, Resource
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import FAR_OVER, Outcome, over_limit
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Published
from tests.build.scenario import small_scenario, small_text

SCENARIO = small_scenario({"firmware.service_cv": 0.2})


@cache
def outcomes() -> tuple[Outcome, ...]:
    names = ("v2", "v3-n1", "v3-n4")
    return tuple(simulate(SCENARIO, Protocol.parse(n, SCENARIO), seed) for seed in (1, 2, 3) for n in names)


def given_up(outcome: Outcome) -> Outcome:
    """As if it had not converged."""
    return replace(
        outcome, kind=OutcomeKind.DID_NOT_CONVERGE, downtime_ns=None, phases_ns={}, critical_path_ns={}, stages=()
    )


def printed(scenario: Scenario, runs: Sequence[Outcome], width: int = 120) -> str:
    """What is shown on a terminal of this width."""
    console = Console(width=width, file=io.StringIO())
    for section in comparison.sections(scenario, results.table(runs)):
        section.print(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- cells -----------------------------------------------------------------------------------------------------------


def test_a_run_that_breaks_is_recorded_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_at_2(scenario: Scenario, protocol: Protocol, seed: int) -> Outcome:
        if seed == 2:
            raise RuntimeError("a bug")
        return simulate(scenario, protocol, seed)

    monkeypatch.setattr(runs, "simulate", breaks_at_2)
    done, interrupted = run_cells([Cell(SCENARIO, Protocol("v2", 2, {}), seed) for seed in (1, 2, 3)], jobs=1)
    assert not interrupted
    assert [outcome.kind.value for outcome in done] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert "a bug" in done[1].reason
    assert (done[1].scenario, done[1].protocol, done[1].seed) == ("small", "v2", 2)


@pytest.mark.parametrize("before", [0, 2])
def test_ctrl_c_gives_what_was_done(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    cells = [Cell(SCENARIO, Protocol("v2", 2, {}), seed) for seed in range(4)]

    def interrupted_after(cells: Sequence[Cell], jobs: int | None) -> Iterator[tuple[int, Outcome]]:
        yield from ((at, run_cell(cells[at])) for at in reversed(range(before)))
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "in_processes", interrupted_after)
    done, interrupted = run_cells(cells, jobs=None)
    assert interrupted
    assert [outcome.seed for outcome in done] == list(range(before)), "in the order of the cells"


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_row_tells_all_of_an_outcome_and_nothing_else() -> None:
    outcome = outcomes()[0]
    row = results.row(outcome)
    assert {row[f"phase_{name}_ns"] for name in PHASES} == set(outcome.phases_ns.values())
    assert sum(row[f"path_{resource.name.lower()}_ns"] for resource in Resource) == outcome.downtime_ns
    assert row["path_unexplained_ns"] == 0
    assert row["stage_device_save_0_ns"] > 0
    for name in ("protocol", "seed", "downtime_ns", "total_ns", "digest"):
        assert row[name] == getattr(outcome, name)
    for name in ("wire_bytes", "device_bytes", "reads"):
        assert row[name] == getattr(outcome.counters, name) > 0
    assert not any("ms" in name.split("_") for name in row), "times are whole nanoseconds"


def test_a_table_survives_parquet_and_csv(tmp_path: Path) -> None:
    frame = results.table([*outcomes(), given_up(outcomes()[0])])
    with ResultFolder(tmp_path, Plan([], [], 0)) as folder:
        folder.write_table(frame, "runs", "parquet")
        folder.write_table(frame, "runs", "csv")
        folder.write_manifest({"schema_version": 1, "complete": True})
        folder.commit()
    assert pl.read_parquet(tmp_path / "runs.parquet").equals(frame, null_equal=True)
    assert pl.read_csv(tmp_path / "runs.csv", schema=frame.schema).equals(frame, null_equal=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "runs.csv", "runs.parquet"]


def test_a_manifest_makes_the_scenario_again() -> None:
    told = json.loads(
        json.dumps(manifest.of_scenario(SCENARIO, "small.toml", ["proto-v3"], results.table(outcomes()), 9))
    )
    assert Scenario.model_validate(told["scenario"]) == SCENARIO
    assert told["complete"] is True
    assert manifest.of_scenario(SCENARIO, "small.toml", [], results.table(outcomes()[:4]), 9)["complete"] is False


# --- what is told ----------------------------------------------------------------------------------------------------


def test_path_shares_are_the_whole_downtime() -> None:
    shares = path_shares(results.table(outcomes()), "v3-n1")
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[Resource.FIXED] > 0.2


def test_means_are_over_the_completed_runs_only() -> None:
    alone = printed(SCENARIO, outcomes())
    mixed = printed(SCENARIO, [*outcomes(), *(replace(given_up(o), seed=o.seed + 10) for o in outcomes()[:3])])
    of_v3 = [[line.split() for line in text.splitlines() if line.startswith("v3-n4")] for text in (alone, mixed)]
    _, one, *means = of_v3[0]
    assert of_v3[1][-len(means) :] == means
    assert one[1:3] == ["3", "3"]
    assert [line[1:] for line in of_v3[1] if line[1:3] == ["4", "3"]] == [["4", "3", *one[3:]]]
    assert "DID_NOT_CONVERGE" in mixed
    assert "nan" not in mixed.lower()


def test_no_completed_run_leaves_only_the_outcomes() -> None:
    text = printed(SCENARIO, [given_up(outcome) for outcome in outcomes()])
    assert text.count("DID_NOT_CONVERGE") == 3
    assert "Downtime" not in text


def test_findings_compare_protocols_seed_by_seed() -> None:
    completed = results.table(outcomes())
    v2 = completed.filter(protocol="v2")["downtime_ns"]
    v3 = completed.filter(protocol="v3-n1")["downtime_ns"]
    (sentence,) = (s for s in findings.findings(completed) if s.startswith("v3-n1 against v2"))
    difference = (v3 - v2).mean()
    assert isinstance(difference, float)
    assert f"downtime {abs(difference) / 1e6:.1f} ms {'shorter' if difference < 0 else 'longer'}" in sentence
    assert "over 3 seed(s)" in sentence


def test_a_difference_has_an_interval_that_the_seeds_allow_for() -> None:
    assert findings._interval(np.full(9, 1.0)) == "", "too few seeds"
    assert findings._interval(np.full(10, -2.0)) == "; 95 % interval of the mean -2.0 to -2.0 ms"
    drawn = np.random.default_rng(1).normal(0.0, 100.0, 400)
    least, most = map(float, re.findall(r"[+-]\d+\.\d", findings._interval(drawn)))
    assert -30 < least < 0 < most < 30
    assert "no difference is shown" in findings._interval(drawn)
    assert "no difference is shown" not in findings._interval(drawn + 100.0)


def test_the_pauses_of_a_retry_are_told_beside_its_downtime() -> None:
    late = {"objects_each": 4, "during_stop_ms": [0.5]}
    scenario = small_scenario({"device.0.reconfigurations": late, "device.0.critical.setup_us": 2000.0})
    runs = [simulate(scenario, Protocol.parse(name, scenario), 1) for name in ("v3-n1-retry", "v3-n1-proceed")]
    assert [run.counters.retries for run in runs] == [1, 0]
    shown = findings.findings(results.table(runs))
    retry, proceed = (
        next(line for line in shown if line.startswith(f"v3-n1-{how}: down")) for how in ("retry", "proceed")
    )
    assert f"the guest stood still for {runs[0].counters.retries_stopped_ns / 1e6:.1f} ms" in retry
    assert "stood still" not in proceed


@pytest.mark.slow
def test_what_late_critical_data_costs_is_drawn_where_the_guest_reconfigures_a_device(tmp_path: Path) -> None:
    reconfigured = {"device.0.reconfigurations": {"poisson_per_s": 200.0, "objects_each": 2}}
    file = tmp_path / "s.toml"
    for changes, drawn in ((reconfigured, True), ({}, False)):
        file.write_text(small_text(changes))
        names = ["v2", "v3-n2", "v3-n2-invalidate", "v3-blocks-n2-pool"]
        assert compare.run_compare(str(file), names, [1, 2], str(tmp_path / "out"), "csv", 1, ["proto-v3"]) == 0
        for kind in ("png", "svg"):
            assert (tmp_path / "out" / f"critical.{kind}").exists() == drawn
            assert (tmp_path / "out" / f"compare.{kind}").exists()
    table = pl.read_csv(tmp_path / "out" / "runs.csv")
    assert {"device_bytes_wasted", "retries", "connections", "messages", "wakeups", "late_final_checks"} <= set(
        table.columns
    )


def test_findings_say_so_where_no_seed_completed_under_both() -> None:
    runs = [outcome for outcome in outcomes() if (outcome.protocol, outcome.seed) in {("v2", 1), ("v3-n1", 2)}]
    assert "v3-n1 against v2: no seed completed under both." in findings.findings(results.table(runs))


@pytest.mark.parametrize(
    "published",
    [{"device_save_ms": [1.0, 2.0, 3.0]}, {"stop_ms": 0.0}, {}],  # there is one device; nothing relates to zero
    ids=["too-many", "zero", "nothing"],
)
def test_odd_published_figures_are_refused_or_shown_but_do_not_cost_the_runs(published: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        text = printed(small_scenario({"published": [{"citation": "nobody", **published}]}), outcomes())
        assert "Phases of the downtime" in text
        assert "nan" not in text.lower()


def test_published_figures_are_held_against_the_means() -> None:
    published = Published(citation="somebody", fitted=["stop_ms"], stop_ms=8.0, downtime_ms=10.0)
    stop, downtime = held_against(published, results.table(outcomes()))
    assert (stop.what, stop.published_ms, stop.simulated_ms, stop.fitted) == ("stop", 8.0, 4.0, True)
    assert stop.error == pytest.approx(-0.5)
    mean = sum(o.downtime_ns or 0 for o in outcomes() if o.protocol == "v2") / 3e6
    assert downtime.simulated_ms == pytest.approx(mean)
    assert not downtime.fitted


def test_protocols_keep_the_order_in_which_they_were_asked_for() -> None:
    runs = sorted(outcomes(), key=lambda outcome: outcome.protocol, reverse=True)
    assert protocols(results.table(runs)) == ["v3-n4", "v3-n1", "v2"]


def test_reasons_are_shown_as_they_are() -> None:
    """A traceback has brackets, which are no markup."""
    reason = "[Errno 5] no [bold] end [/red]"
    failed = replace(given_up(outcomes()[0]), kind=OutcomeKind.FAILED, reason=reason)
    assert reason in printed(SCENARIO, [failed])


def test_numbers_are_whole_on_a_terminal_of_80_columns() -> None:
    text = printed(SCENARIO, outcomes(), width=80)
    assert "…" not in text


def test_each_run_has_a_mark_and_a_curve_ends_at_the_part_that_completed() -> None:
    runs = results.table([given_up(outcomes()[0]), *outcomes()[1:]])
    whole, spread = draw_distribution(SCENARIO, runs).axes
    steps, marks = whole.lines[0], whole.lines[1]
    of_v2 = sorted(o.downtime_ns / 1e6 for o in outcomes()[1:] if o.protocol == "v2" and o.downtime_ns)
    assert list(marks.get_xdata()) == pytest.approx(of_v2)
    assert max(steps.get_ydata()) == pytest.approx(100 * 2 / 3)
    assert sum(len(line.get_xdata()) for line in spread.lines if line.get_marker() != "None") == len(outcomes()) - 1
    assert [label.get_text().split("\n")[0] for label in spread.get_yticklabels()] == ["v2", "v3-n1", "v3-n4"]


# --- words, JSON, quiet ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("scenario") / "small.toml"
    path.write_text(small_text({"firmware.service_cv": 0.2}), encoding="utf-8")
    return str(path)


def run_small(file: str, out: Path, **how: bool) -> int:
    return compare.run_compare(file, ["v2", "v3-n1"], [1, 2, 3], str(out), "parquet", 1, ["proto-v3"], **how)


def test_json_has_all_that_is_printed_and_nothing_else_is_on_stdout(
    small_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "_draw", lambda *_: [])
    assert run_small(small_file, tmp_path, as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert run_small(small_file, tmp_path) == 0
    words = capsys.readouterr().out
    assert document["conclusion"] == findings.conclusion(pl.read_parquet(tmp_path / "runs.parquet"))
    assert " ".join(f"- {sentence}" for sentence in document["conclusion"]) in " ".join(words.split())
    tables = document["tables"]
    assert [words.index(table["title"]) for table in tables.values()] == sorted(
        words.index(table["title"]) for table in tables.values()
    )
    of_v2, of_v3 = ({row["protocol"]: row for row in tables["downtime"]["rows"]}[name] for name in ("v2", "v3-n1"))
    (effect,) = tables["effects"]["rows"]
    assert effect["difference_mean_ms"] == pytest.approx(of_v3["mean_ms"] - of_v2["mean_ms"], abs=0.002)
    assert effect["difference_low_ms"] < effect["difference_mean_ms"] < effect["difference_high_ms"]
    assert [row["seed"] for row in tables["seeds"]["rows"]] == [1, 2, 3]
    assert sum(row["v2_ms"] for row in tables["seeds"]["rows"]) / 3 == pytest.approx(of_v2["mean_ms"], abs=0.001)


def test_quiet_prints_the_conclusion_only_and_writes_everything(
    small_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_small(small_file, tmp_path, quiet=True) == 0
    printed_lines = capsys.readouterr().out
    assert printed_lines.startswith("- Mean downtime, shortest first: v3-n1 ")
    assert "protocol  runs" not in printed_lines
    assert str(tmp_path) not in printed_lines
    assert {"compare.png", "distribution.svg", "manifest.json", "runs.parquet"} <= {p.name for p in tmp_path.iterdir()}


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(
    small_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_font(*_: Any, **__: Any) -> None:
        raise RuntimeError("no font\x1b[2J")

    monkeypatch.setattr("experiments.draw.downtime.draw_downtime", no_font)
    assert run_small(small_file, tmp_path) == 1
    captured = capsys.readouterr()
    assert "Downtime of each seed, ms" in captured.out
    assert captured.err == "proto-v3: error: no figure: RuntimeError: no font\\x1b[2J\n"
    assert {path.name for path in tmp_path.iterdir()} >= {"manifest.json", "runs.parquet"}


def test_the_results_are_printed_if_the_disk_is_full(
    small_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise UserError("runs.parquet: cannot be written: No space left on device")

    monkeypatch.setattr(ResultFolder, "write_table", full)
    with pytest.raises(UserError, match="No space left"):
        run_small(small_file, tmp_path)
    assert "Downtime of each seed, ms" in capsys.readouterr().out


def test_what_did_not_complete_is_in_the_conclusion() -> None:
    runs = [*outcomes()[1:], replace(given_up(outcomes()[0]), reason="too much\nto send")]
    assert "v2: 1 of 3 run(s) DID_NOT_CONVERGE: to send" in findings.conclusion(results.table(runs))


def far_over(seed: int) -> Outcome:
    """A run whose drain alone is five times the limit of 20 ms."""
    made = outcomes()[0]
    phases = {**made.phases_ns, "drain": 100_000_000 + seed, "transfer": 0}
    downtime_ns = sum(phases.values())
    path = {**dict.fromkeys(made.critical_path_ns, 0), "firmware": downtime_ns}
    limit_ns = made.downtime_limit_ns
    assert limit_ns == 20_000_000
    return replace(
        made,
        seed=seed,
        downtime_ns=downtime_ns,
        phases_ns=phases,
        critical_path_ns=path,
        over_limit_ratio=downtime_ns / limit_ns,
        note=over_limit(downtime_ns, limit_ns, phases, path),
    )


def test_a_downtime_far_over_its_limit_is_told_with_what_took_it() -> None:
    runs = [far_over(seed) for seed in range(10_000_000, 13_000_000, 1_000_000)]
    (sentence,) = [each for each in findings.conclusion(results.table(runs)) if "far over" in each]
    assert sentence.startswith("v2: 3 of 3 completed runs are far over their downtime limit, in the mean ")
    assert "times the downtime limit of 20 ms: drain and transfer, which the decision to stop estimates" in sentence
    assert "took 111 ms; it does not count stop " in sentence
    assert sentence.endswith("the largest part of the critical path is firmware SAVE, " + sentence.split()[-2] + " ms.")
    text = " ".join(printed(SCENARIO, runs, width=400).split())
    assert text.count("times the downtime limit") == 1, "runs that differ in numbers only are one row"
    assert "v2 3 COMPLETED" in text


def test_a_downtime_up_to_twice_its_limit_is_not_told() -> None:
    made = outcomes()[0]
    assert made.over_limit_ratio == pytest.approx(made.downtime_ns / 20e6)
    assert made.over_limit_ratio < FAR_OVER
    assert made.note == ""
    assert not any("far over" in each for each in findings.conclusion(results.table(outcomes())))
    twice = {"downtime_ns": 40e6, "limit_ns": 20e6, "phases_ns": made.phases_ns, "path_ns": made.critical_path_ns}
    assert over_limit(**twice) == ""
    assert over_limit(**twice | {"downtime_ns": 40e6 + 1}).startswith("2.0 times the downtime limit of 20 ms: ")


def test_without_v2_protocols_are_compared_with_the_first() -> None:
    assert findings.pairs(["v2-ack", "v3-n1", "v3-n4"]) == [
        ("v2-ack", "v3-n1"),
        ("v2-ack", "v3-n4"),
        ("v3-n1", "v3-n4"),
    ]
    assert findings.pairs(["v3-n4"]) == findings.pairs([]) == []
