# SPDX-License-Identifier: GPL-2.0-or-later
"""The experiment of many devices: its grid, and that what it says depends on the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import polars as pl
import pytest

from experiments.questions import many_devices
from experiments.questions.many_devices import AGAINST, EXPERIMENT, FITTED, TOGETHER
from experiments.runs.frame import PATH_COLUMNS
from experiments.study.experiment import Answer, Planned
from tests.build.grids import table_of


def test_every_place_of_the_grid_can_be_run() -> None:
    for quick in (True, False):
        for point in EXPERIMENT.points(quick):
            planned = Planned.of(point, 1)
            devices = planned.cell.scenario.devices
            assert len(devices) == point.factors["vfs"]
            assert len({device.pf for device in devices}) == point.factors["pfs"]


def test_the_quick_grid_is_a_part_of_the_full_one() -> None:
    quick, full = (
        {p.settings for p in EXPERIMENT.points(quick) if not p.factors["load_threads"]} for quick in (True, False)
    )
    assert quick < full


def test_either_stop_takes_as_long() -> None:
    fitted, together = (
        Planned.of(many_devices._point("given", 4, stop, 8, "v2"), 1).cell.scenario.devices[7]
        for stop in (FITTED, TOGETHER)
    )
    assert fitted.quiesce_ms > together.quiesce_ms == 0
    assert fitted.suspend_ms + fitted.quiesce_ms == together.suspend_ms + together.quiesce_ms


def test_answer_and_figures_of_real_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_devices, "QUICK_VFS", (1, 2))
    monkeypatch.setattr(many_devices, "MEASURED_VFS", 1)
    planned = [each for each in EXPERIMENT.planned(True) if each.cell.seed <= 2]
    frame = table_of(planned)
    answer = EXPERIMENT.answer(frame)
    assert "95 % interval" in answer.answer
    assert answer.table.height > 0
    assert set(EXPERIMENT.figures(frame, "a command")) == {"many_devices", "critical_path"}


def _frame(downtime_ms: Callable[[str, int], float], outcome: str = "COMPLETED") -> pl.DataFrame:
    rows = [
        {
            **point.factors,
            "protocol": point.protocol,
            "seed": seed,
            "outcome": outcome,
            "downtime_ns": round(1e6 * downtime_ms(point.protocol, int(point.factors["vfs"]))) + seed
            if outcome == "COMPLETED"
            else None,
            "connections": 1,
            "messages": 2,
        }
        | dict.fromkeys(PATH_COLUMNS, 1000 if outcome == "COMPLETED" else None)
        for point in EXPERIMENT.points(True)
        for seed in (1, 2, 3)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _verdict(answer: Answer) -> str:
    return answer.findings[0].verdict


@pytest.mark.parametrize(
    ("four_by_vfs", "verdict"),
    [
        ({1: 80, 4: 99, 8: 100}, "supported"),
        ({1: 80, 4: 80, 8: 80}, "refuted"),
        ({1: 99, 4: 99, 8: 101}, "refuted"),
        ({1: 80, 4: 99, 8: 120}, "under conditions"),
    ],
)
def test_the_verdict_is_the_runs(four_by_vfs: Mapping[int, float], verdict: str) -> None:
    answer = EXPERIMENT.answer(_frame(lambda protocol, vfs: four_by_vfs[vfs] if protocol == "v3-n4" else 100.0))
    assert _verdict(answer) == verdict


def test_small_gains_are_told_with_their_place() -> None:
    told = many_devices._small(_frame(lambda protocol, _: 50.0 if protocol == "v3-n4" else 100.0))
    assert f"v3-n1 on 1 PF, stopped {FITTED}: 1 VF +0.0 %, 4 VF" in told
    assert "v3-n4" not in told
    assert AGAINST in told


def test_nothing_completed_is_said() -> None:
    frame = _frame(lambda *_: 1.0, "DID_NOT_CONVERGE")
    answer = EXPERIMENT.answer(frame)
    assert "no seed was completed under both" in answer.answer
    assert _verdict(answer) == "under conditions"
    assert EXPERIMENT.figures(frame, "a command")
