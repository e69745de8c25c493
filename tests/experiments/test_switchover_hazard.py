# SPDX-License-Identifier: GPL-2.0-or-later
"""switchover_hazard: its grid, and an answer that follows the runs."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from experiments.questions.switchover_hazard import EXPERIMENT
from experiments.questions.switchover_hazard.figures import figures
from experiments.questions.switchover_hazard.question import (
    AT_RANDOM,
    FOR_SURE,
    GAVE_UP,
    LATE,
    ONE_SHOT_REINIT,
    PAID,
    PROCEED,
    RATE,
    RETRY,
    REUSABLE,
    STOOD_STILL,
    TOO_LATE,
    TOOK_BACK,
    answer,
    expected,
    for_sure,
    marked,
    window_ms,
)
from experiments.study.experiment import Planned
from experiments.study.statistics import share
from tests.build.grids import table_of

TOO_LATE_REASON = "nic reported REINIT after it was decided to stop: its ack comes too late"


def made_up(protocol: str, seed: int, rate: float = 8.0, objects: int = 0, **columns: Any) -> dict[str, Any]:
    """A row with what the answer looks at; completed, nothing late, unless it is said otherwise."""
    row: dict[str, Any] = {
        "protocol": protocol,
        "seed": seed,
        RATE: rate,
        LATE: objects,
        "outcome": "COMPLETED",
        "reason": "",
        "downtime_ns": 300_000_000 + 1_000_000 * (seed % 5),
        "setup_in_downtime_ns": 0,
        "late_critical_objects": 0,
        "late_reconfigured_objects": 0,
        "retries": 0,
        "retries_stopped_ns": 0,
    }
    nothing = ("downtime_ns", "setup_in_downtime_ns", "late_critical_objects", "late_reconfigured_objects")
    if columns.get("outcome", "COMPLETED") != "COMPLETED":
        row |= dict.fromkeys(nothing)
    return row | columns


def runs(**late: dict[str, Any]) -> pl.DataFrame:
    """Ten seeds of each protocol at random; every fifth of one that is named (`_` for `-`) has these columns."""
    rows = []
    for protocol in AT_RANDOM:
        columns = late.get(protocol.replace("-", "_"), {})
        rows += [made_up(protocol, seed, **(columns if seed % 5 == 0 else {})) for seed in range(10)]
    return pl.DataFrame(rows, infer_schema_length=None)


FAILED = {"outcome": "FAILED", "reason": TOO_LATE_REASON}
LATE_32 = {"late_reconfigured_objects": 32, "late_critical_objects": 32, "setup_in_downtime_ns": 64_000_000}


@pytest.fixture(scope="module")
def quick() -> pl.DataFrame:
    """A real run of a part of the quick grid."""
    told = (REUSABLE, PROCEED, RETRY)
    planned = [
        Planned.of(point, seed) for seed in (1, 2) for point in EXPERIMENT.points(True) if point.protocol in told
    ]
    return table_of(planned)


def test_a_real_run_of_the_quick_grid(quick: pl.DataFrame) -> None:
    sure = for_sure(quick)
    by = {name: sure.filter(pl.col("protocol") == name) for name in (REUSABLE, PROCEED, RETRY)}
    assert by[REUSABLE][GAVE_UP].all(), "one reconfiguration during the stop: QEMU 11.1 gives up"
    assert by[PROCEED][PAID].all()
    assert by[RETRY][TOOK_BACK].all()
    assert not by[RETRY][PAID].any()
    told = answer(quick)
    assert "95 % interval" in told.answer
    assert set(figures(quick, "test")) == {"switchover_hazard", "switchover_hazard_cost"}
    shares = told.table.filter(pl.col("what") == "share of runs: too late")
    assert shares.height == 6, "three protocols, at one rate and with one size"


def test_what_became_of_late_data() -> None:
    frame = pl.DataFrame(
        [
            made_up(PROCEED, 1, **LATE_32),
            made_up(RETRY, 1, retries=1, retries_stopped_ns=70_000_000),
            made_up(REUSABLE, 1, **FAILED),
            made_up(REUSABLE, 2, outcome="FAILED", reason="something else"),
            made_up(REUSABLE, 3, outcome="DID_NOT_CONVERGE"),
        ],
        infer_schema_length=None,
    )
    told = marked(frame)
    assert told[PAID].to_list() == [True, False, False, False, False]
    assert told[TOOK_BACK].to_list() == [False, True, False, False, False]
    assert told[GAVE_UP].to_list() == [False, False, True, False, False]
    assert told[TOO_LATE].to_list() == [True, True, True, False, False]
    assert told[STOOD_STILL].to_list() == [301_000_000, 371_000_000, None, None, None]


def test_c1_is_under_conditions_where_v2_can_tell() -> None:
    frame = runs(v2=LATE_32, v2_reinit_flush_ack_reusable=FAILED, v3_n4_retry={"retries": 1})
    (finding,) = answer(frame).findings
    assert (finding.claim, finding.verdict) == ("C1", "under conditions")
    assert "2 FAILED" in finding.why


def test_c1_is_supported_where_v2_pays_without_seeing_it() -> None:
    assert answer(runs(v2_reinit_flush_ack_reusable=LATE_32)).findings[0].verdict == "supported"


def test_c1_is_refuted_where_a_retry_pays() -> None:
    assert answer(runs(v3_n4_retry=LATE_32)).findings[0].verdict == "refuted"


def test_a_retry_that_does_not_end_is_no_support() -> None:
    frame = runs(v3_n4_retry={"outcome": "DID_NOT_CONVERGE"}, v2_reinit_flush_ack_reusable=LATE_32)
    told = answer(frame)
    assert told.findings[0].verdict == "under conditions"
    assert any(f"{RETRY}: 2 DID_NOT_CONVERGE" in line for line in told.details)


def test_who_has_the_guest_stand_still_for_less_follows_the_runs() -> None:
    def sure(pause_ms: int) -> pl.DataFrame:
        rows = []
        for seed in range(10):
            rows.append(made_up(PROCEED, seed, 0.0, 32, downtime_ns=400_000_000 + seed, **LATE_32))
            rows.append(made_up(RETRY, seed, 0.0, 32, retries=1, retries_stopped_ns=pause_ms * 1_000_000))
        return pl.concat([runs(), pl.DataFrame(rows, infer_schema_length=None)], how="diagonal_relaxed")

    assert any(f"the guest stands still for less time under {RETRY}" in line for line in answer(sure(20)).details)
    assert any(f"the guest stands still for less time under {PROCEED}" in line for line in answer(sure(300)).details)


def test_how_often_is_held_against_the_window() -> None:
    assert any("as expected" in line and "NOT" not in line for line in answer(runs(v3_n4=LATE_32)).details)
    always = runs().with_columns(late_reconfigured_objects=pl.lit(32))
    assert sum("NOT as expected" in line for line in answer(always).details) == 2


def test_the_table_has_wilsons_intervals() -> None:
    frame = runs(v2_reinit_flush_ack=LATE_32)
    told = answer(frame).table
    row = told.filter((pl.col("other") == ONE_SHOT_REINIT) & (pl.col("what") == "share of runs: too late")).to_dicts()[
        0
    ]
    wilson = share(2, 10)
    assert (row["share"], row["share_low"], row["share_high"]) == (wilson.mean, wilson.low, wilson.high)


def test_nothing_completed() -> None:
    rows = [made_up(name, seed, outcome="DID_NOT_CONVERGE") for name in AT_RANDOM for seed in (1, 2)]
    rows += [made_up(name, seed, 0.0, 32, outcome="FAILED", reason="x") for name in FOR_SURE for seed in (1, 2)]
    frame = pl.DataFrame(rows, infer_schema_length=None).cast(
        {"downtime_ns": pl.Int64, "setup_in_downtime_ns": pl.Int64}
    )
    told = answer(frame)
    assert told.findings[0].verdict != "supported"
    assert sum("not for late data" in line for line in told.details) == len(AT_RANDOM) + len(FOR_SURE)
    figures(frame, "test")


@pytest.mark.slow
def test_one_kind_of_runs_is_missing() -> None:
    random = runs()
    answer(random)
    figures(random, "test")
    sure = random.with_columns(pl.lit(32).alias(LATE), pl.lit(0.0).alias(RATE))
    answer(sure)
    figures(sure, "test")


def test_the_chance_of_the_window() -> None:
    assert float(expected(0.0)) == 0.0
    ms = window_ms()
    assert float(expected(1000 / ms)) == pytest.approx(0.632, abs=1e-3)
