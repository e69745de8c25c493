# SPDX-License-Identifier: GPL-2.0-or-later
"""The first experiment: its grid, its answer on real runs, and verdicts that depend on the data."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from experiments.questions import reconfiguration
from experiments.questions.reconfiguration import ACKED, EXPERIMENT, FACTOR, PROTOCOLS, outrun_per_s
from experiments.study.claims import ACK_COMES_TOO_LATE
from experiments.study.experiment import Planned
from tests.build.grids import table_of


def test_every_protocol_is_run_at_every_rate() -> None:
    assert len(EXPERIMENT.points(False)) == 9 * len(PROTOCOLS)


def test_the_target_sets_up_as_many_as_the_scenario_says() -> None:
    device = EXPERIMENT.planned(True)[0].cell.scenario.device[0]
    assert device.reconfigurations is not None
    each_s = device.reconfigurations.objects_each * device.critical.setup_us / 1e6
    assert pytest.approx(1 / each_s) == outrun_per_s()


@pytest.mark.slow
def test_real_runs_are_answered_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconfiguration, "QUICK_RATES_PER_S", (0.0, 8.0))
    monkeypatch.setattr(reconfiguration, "PROTOCOLS", ("v2", ACKED, "v3-n1", "v3-n4"))
    planned = [Planned.of(point, seed) for seed in (1, 2) for point in EXPERIMENT.points(True)]
    frame = table_of(planned)
    answer = EXPERIMENT.answer(frame)
    assert "At 8 reconfigurations a second" in answer.answer
    assert "95 % interval" in answer.answer
    assert {finding.claim for finding in answer.findings} == {"C1", "C4"}
    assert answer.table.height == 2 * 3
    figure = EXPERIMENT.figures(frame, "a command")["reconfiguration"]
    assert len(figure.axes) == 4


def made_up(setup_ms: dict[str, float], *, done: bool = True) -> pl.DataFrame:
    """Three seeds at one rate below what the target can set up and one above; set-up as given, else none."""
    rows: list[dict[str, Any]] = []
    for rate in (5.0, 40.0):
        for seed in (1, 2, 3):
            for protocol in PROTOCOLS:
                ns = round(setup_ms.get(protocol, 0.0) * 1e6)
                rows.append(
                    {
                        FACTOR: rate,
                        "protocol": protocol,
                        "seed": seed,
                        "outcome": "COMPLETED" if done else "DID_NOT_CONVERGE",
                        "reason": "",
                        "downtime_ns": 300_000_000 + ns + seed if done else None,
                        "setup_in_downtime_ns": ns if done else None,
                        "critical_lag_max_ns": 1_000_000_000 if done else None,
                    }
                )
    return pl.DataFrame(rows, infer_schema_length=None)


@pytest.mark.parametrize(
    ("setup_ms", "c1", "c4"),
    [
        ({"v2": 1000.0, ACKED: 900.0, "v3-n4": 1.0, "v3-n1": 5.0}, "supported", "supported"),
        ({"v2": 1000.0, ACKED: 0.0, "v3-n4": 1.0, "v3-n1": 5.0}, "under conditions", "supported"),
        ({"v2": 1000.0, ACKED: 900.0, "v3-n4": 400.0, "v3-n1": 400.0}, "refuted", "supported"),
        ({"v2": 1000.0, ACKED: 900.0, "v3-n4": 1.0, "v3-n1": 500.0}, "supported", "refuted"),
        ({"v2": 10.0, ACKED: 10.0, "v3-n4": 10.0, "v3-n1": 10.0}, "refuted", "refuted"),
    ],
)
def test_the_verdicts_are_those_of_the_runs(setup_ms: dict[str, float], c1: str, c4: str) -> None:
    findings = {each.claim: each.verdict for each in EXPERIMENT.answer(made_up(setup_ms)).findings}
    assert findings == {"C1": c1, "C4": c4}


def test_where_nothing_completed_it_says_so() -> None:
    frame = made_up({}, done=False)
    answer = EXPERIMENT.answer(frame)
    assert "no run completed" in answer.answer
    assert [finding.verdict for finding in answer.findings] == ["under conditions", "under conditions"]
    assert any("from 5 a second on, not all runs complete" in detail for detail in answer.details)
    assert EXPERIMENT.figures(frame, "a command")["reconfiguration"].axes


@pytest.mark.parametrize(("reason", "c1"), [(f"REINIT: {ACK_COMES_TOO_LATE}", "under conditions"), ("", "supported")])
def test_a_v2_that_fails_over_late_data_can_tell_of_it(reason: str, c1: str) -> None:
    frame = made_up({"v2": 1000.0})
    of_acked = pl.col("protocol") == ACKED
    failed = frame.with_columns(
        outcome=pl.when(of_acked).then(pl.lit("FAILED")).otherwise("outcome"),
        reason=pl.when(of_acked).then(pl.lit(reason)).otherwise("reason"),
        setup_in_downtime_ns=pl.when(of_acked).then(None).otherwise("setup_in_downtime_ns"),
    )
    assert EXPERIMENT.answer(failed).findings[0].verdict == c1
