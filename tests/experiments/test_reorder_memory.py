# SPDX-License-Identifier: GPL-2.0-or-later
"""experiments.questions.reorder_memory.question: the grid can be run, the bound is the protocol's, and the verdict
depends on the runs."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from experiments.questions.reorder_memory import EXPERIMENT
from experiments.questions.reorder_memory import question as reorder_memory_grid
from experiments.questions.reorder_memory.question import with_bounds
from experiments.study.claims import CLAIMS
from experiments.study.experiment import Planned
from sim.scenario.units import MIB
from sim.theory.memory_bound import memory_bound
from tests.build.grids import table_of
from tests.build.memory_bounds import bounds


def made(points: Any, seeds: int = 2) -> pl.DataFrame:
    planned = [Planned.of(point, seed) for seed in range(1, seeds + 1) for point in points]
    return table_of(planned)


def made_up(of_bound: float, *, outcome: str = "COMPLETED") -> pl.DataFrame:
    """Runs of the quick grid: v3 takes so much of its bound in the VMM, multifd all of the state."""
    done = outcome == "COMPLETED"
    rows = []
    for seed in (1, 2, 3):
        for point in EXPERIMENT.points(True):
            limit = reorder_memory_grid.bound_of(point.base, point.settings, point.protocol)
            peak = int(of_bound * limit.vmm_bytes) if limit else int(point.factors["state_mib"]) * MIB
            rows.append(
                {
                    "protocol": point.protocol,
                    "seed": seed,
                    "outcome": outcome,
                    "downtime_ns": 400_000_000 + seed if done else None,
                    "peak_reorder_bytes": peak,
                    "peak_held_bytes": 1 << 20,
                    "digest": "there is one",
                    "base": point.base,
                    "settings": list(point.settings),
                    **point.factors,
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_quick_grid_has_the_same_parts_and_kinds() -> None:
    quick, full = (EXPERIMENT.points(quick) for quick in (True, False))
    assert len(quick) < len(full)
    assert {point.factors["part"] for point in quick} == {point.factors["part"] for point in full}
    assert all(point.factors.keys() == full[0].factors.keys() for point in quick)


def test_factors_are_what_the_scenarios_have() -> None:
    for point in EXPERIMENT.points(False):
        scenario, of = Planned.of(point, 1).cell.scenario, point.factors
        device = scenario.device[0]
        assert (device.state_mib, device.critical.setup_us if of["setup_us"] else 0) == (
            of["state_mib"],
            of["setup_us"],
        )
        assert (scenario.v3.dirty_credit_mib, scenario.v3.critical_credit_mib) == (
            of["dirty_credit_mib"],
            of["critical_credit_mib"],
        )
        assert scenario.firmware.load_mib_per_s == of["load_mib_per_s"]
        assert (scenario.driver.precopy_image == of["image"]) or device.stop_only_mib == device.state_mib


def test_the_bound_is_no_larger_than_the_one_that_random_runs_are_held_against() -> None:
    for point in EXPERIMENT.points(False):
        cell = Planned.of(point, 1).cell
        if cell.protocol.version == 3:
            applied = cell.protocol.applied(cell.scenario)
            ours, theirs = memory_bound(applied), bounds(applied.scenario, 0)
            assert ours.vmm_bytes == theirs.reorder_bytes
            assert 0 < ours.driver_bytes <= theirs.held_bytes


@pytest.mark.parametrize(("of_bound", "verdict"), [(0.9, "supported"), (1.0, "supported"), (1.01, "refuted")])
def test_the_verdict_is_of_the_runs(of_bound: float, verdict: str) -> None:
    answer = EXPERIMENT.answer(made_up(of_bound))
    (finding,) = answer.findings
    assert (finding.claim, finding.verdict) == ("C6", verdict)
    assert finding.claim in CLAIMS
    assert f"{of_bound:.3f} for the target VMM" in finding.why
    assert "95 % interval" in answer.answer


def test_runs_that_did_not_complete_are_held_against_the_bound_too() -> None:
    frame = made_up(1.2, outcome="DID_NOT_CONVERGE")
    answer = EXPERIMENT.answer(frame)
    assert answer.findings[0].verdict == "refuted"
    assert any("DID_NOT_CONVERGE of" in each for each in answer.details)
    assert "no seed was completed" in answer.answer
    assert answer.table["completed"].sum() == 0
    assert EXPERIMENT.figures(frame, "a test").keys() == {"reorder_memory", "reorder_memory_growth"}


def test_without_v3_runs_nothing_shows_a_bound() -> None:
    frame = made_up(0.5).filter(pl.col("protocol") == "v2-multifd")
    assert EXPERIMENT.answer(frame).findings[0].verdict == "under conditions"
    assert EXPERIMENT.figures(frame, "a test").keys() == {"reorder_memory", "reorder_memory_growth"}


@pytest.mark.slow
def test_answer_and_figures_of_real_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reorder_memory_grid, "STATE_MIB", 16)
    monkeypatch.setattr(reorder_memory_grid, "STREAMS_STATE_MIB", 32)
    monkeypatch.setattr(reorder_memory_grid, "STATES_MIB", (8, 16, 96, 96))
    late = [one for one in reorder_memory_grid.LATE if "state_mib" not in one]
    monkeypatch.setattr(
        reorder_memory_grid,
        "LATE",
        (*late, "device.0.state_mib=16", "device.0.stop_only_mib=4", "device.0.critical.objects=32"),
    )
    frame = made(EXPERIMENT.points(True))
    assert "" not in frame["digest"], frame.filter(pl.col("digest") == "")["reason"].to_list()[:1]
    told = with_bounds(frame)
    v2 = pl.col("protocol") == "v2-multifd"
    assert told.filter(v2)["vmm_bound_bytes"].null_count() == told.filter(v2).height
    assert told.filter(~v2)["vmm_of_bound"].null_count() == 0
    answer = EXPERIMENT.answer(frame)
    assert answer.findings[0].verdict == "supported"
    assert answer.limit
    grown = answer.table.filter((pl.col("part") == "state") & v2).sort("state_mib")["vmm_peak_mean_mib"]
    assert grown[-1] > 5 * grown[0]
    assert {"vmm_bound_mib", "driver_of_bound_most", "sockets_mib", "difference_mean_ms"} <= set(answer.table.columns)
    assert EXPERIMENT.figures(frame, "a test").keys() == {"reorder_memory", "reorder_memory_growth"}
