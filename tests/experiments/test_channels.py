# SPDX-License-Identifier: GPL-2.0-or-later
"""experiments.questions.channels.question: the grid can be run, and what is said of the pool depends on the runs."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from experiments.questions.channels import EXPERIMENT
from experiments.questions.channels import question as channels_grid
from experiments.questions.channels.question import LINK_GBIT_PER_S, MANY, MOST_DOWNTIME, MOST_LAG, dedicated
from experiments.study.claims import CLAIMS
from experiments.study.experiment import Answer, Planned, Point
from tests.build.grids import table_of

TINY = (
    "device.0.state_mib=8",
    "device.0.stop_only_mib=8",
    "device.0.block_kib=1024",
    "device.0.max_dirty_streams=32",
    "driver.lock=per_fd",
    "firmware.engines=32",
    "ram.size_gib=0.0625",
    "ram.nonzero_gib=0.001",
)


def made(points: Any, seeds: int = 2) -> pl.DataFrame:
    planned = [Planned.of(point, seed) for seed in range(1, seeds + 1) for point in points]
    return table_of(planned)


def made_up(ratio: float, lag_ratio: float, *, outcome: str = "COMPLETED") -> pl.DataFrame:
    """Runs of the quick grid: the pool takes so many times what dedicated connections do."""
    done = outcome == "COMPLETED"
    rows = []
    for seed in (1, 2, 3):
        for point in EXPERIMENT.points(True):
            pool = point.protocol.endswith("-pool")
            downtime, lag = (
                (400_000_000 + seed * 1000) * (ratio if pool else 1),
                20_000_000 * (lag_ratio if pool else 1),
            )
            rows.append(
                {
                    "protocol": point.protocol,
                    "seed": seed,
                    "outcome": outcome,
                    "downtime_ns": int(downtime) if done else None,
                    "critical_lag_mean_ns": int(lag) if done else None,
                    "critical_lag_max_ns": int(2 * lag) if done else None,
                    "connections": 6,
                    "messages": 400 if pool else 20,
                    "wakeups": 1000,
                    "peak_reorder_bytes": 1 << 20,
                    "send_blocked_ns": 5,
                    "base": point.base,
                    "settings": list(point.settings),
                    **point.factors,
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def verdicts(answer: Answer) -> list[str]:
    assert all(finding.claim in CLAIMS for finding in answer.findings)
    return [finding.verdict for finding in answer.findings]


def test_the_quick_grid_has_the_same_parts_and_kinds() -> None:
    quick, full = (EXPERIMENT.points(quick) for quick in (True, False))
    assert len(quick) < len(full) / 2
    for factor in ("part", "setup_us"):
        assert {point.factors[factor] for point in quick} == {point.factors[factor] for point in full}
    assert all(point.factors.keys() == full[0].factors.keys() for point in quick)


def test_pool_and_dedicated_have_as_many_connections_where_they_are_compared() -> None:
    for n in channels_grid.STREAMS:
        of_n = [point for point in EXPERIMENT.points(False) if point.factors["streams"] == n]
        for point in of_n:
            if point.factors["part"] in ("width", "credit", "buffer", "uneven", "lag"):
                scenario = Planned.of(point, 1).cell.scenario
                assert scenario.v3.pool_connections == n + 1


@pytest.mark.parametrize(
    ("ratio", "lag_ratio", "expected"),
    [
        (1.0, 1.0, ["supported", "supported"]),
        (MOST_DOWNTIME + 0.01, 1.0, ["refuted", "supported"]),
        (0.8, MOST_LAG + 0.01, ["supported", "refuted"]),
    ],
)
def test_the_verdicts_are_of_the_runs(ratio: float, lag_ratio: float, expected: list[str]) -> None:
    answer = EXPERIMENT.answer(made_up(ratio, lag_ratio))
    assert verdicts(answer) == expected
    assert f"{ratio:.2f} (95 % interval" in answer.answer


def test_a_pool_that_is_far_at_some_places_only_is_close_under_conditions() -> None:
    frame = made_up(1.0, 1.0)
    far = (pl.col("per_connection_gbit_per_s") < LINK_GBIT_PER_S) & pl.col("protocol").str.ends_with("-pool")
    frame = frame.with_columns(
        downtime_ns=pl.when(far).then(pl.col("downtime_ns") * 2).otherwise(pl.col("downtime_ns"))
    )
    answer = EXPERIMENT.answer(frame)
    assert verdicts(answer) == ["under conditions", "supported"]
    assert "at most 2.00 (95 % interval" in answer.findings[0].why


def test_a_frame_without_a_completed_run_is_told_and_drawn() -> None:
    frame = made_up(1.0, 1.0, outcome="DID_NOT_CONVERGE")
    answer = EXPERIMENT.answer(frame)
    assert "unknown" in answer.answer
    assert verdicts(answer) == ["under conditions", "under conditions"]
    assert any("DID_NOT_CONVERGE of" in each for each in answer.details)
    assert answer.table["pairs"].sum() == 0
    assert EXPERIMENT.figures(frame, "a test").keys() == {"channels", "channels_cost"}


@pytest.mark.slow
def test_answer_and_figures_of_real_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_grid, "WIRE_BOUND", TINY)
    monkeypatch.setattr(channels_grid, "STATE_MIB", 8)
    monkeypatch.setattr(channels_grid, "LAG_DEVICE", (*channels_grid.LAG_DEVICE[:4], *TINY[:1], "vmm.give_up_s=1"))
    monkeypatch.setattr(channels_grid, "STREAMS", (1, MANY, 7, 9))
    monkeypatch.setattr(channels_grid, "QUICK_SETUP", channels_grid.QUICK_SETUP | {"objects": 32})
    monkeypatch.setattr(channels_grid, "SHIPPED_SETUP", channels_grid.QUICK_SETUP | {"setup_us": 2000.0})
    points = [
        point
        for point in EXPERIMENT.points(True)
        if not (point.factors["part"] == "lag" and float(point.factors["per_connection_gbit_per_s"]) < 1)
    ]
    points = [_small_stop_only(point) for point in points]
    frame = made(points)
    assert "" not in frame["digest"], frame.filter(pl.col("digest") == "")["reason"].to_list()[:1]
    answer = EXPERIMENT.answer(frame)
    assert "95 % interval" in answer.answer
    assert answer.limit
    assert {"difference_mean_ms", "ratio_low", "messages_base", "peak_reorder_mib_other"} <= set(answer.table.columns)
    width = answer.table.filter((pl.col("part") == "width") & (pl.col("other") == f"{dedicated(MANY)}-pool"))
    assert width["connections_base"].to_list() == width["connections_other"].to_list()
    assert EXPERIMENT.figures(frame, "a test").keys() == {"channels", "channels_cost"}


def _small_stop_only(point: Any) -> Any:
    """nic-reconfig's device has more that only a stopped one gives than this one has in all."""
    if point.factors["part"] != "lag":
        return point
    return Point(point.base, point.protocol, (*point.settings, "device.0.stop_only_mib=1"), point.factors)
