# SPDX-License-Identifier: GPL-2.0-or-later
"""ablation: its grid, and an answer that follows the runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from experiments.questions.ablation import EXPERIMENT
from experiments.questions.ablation.figures import figures
from experiments.questions.ablation.question import (
    ACKED,
    BUSY,
    CASE,
    CASES,
    FAIR,
    IDLE,
    N_FDS,
    RECONFIGURED,
    STEPS,
    TWO_FDS,
    V2,
    answer,
    by_reconfiguring,
    effects,
    interaction,
)
from experiments.study.experiment import Planned
from tests.build.grids import table_of

SEEDS = range(1, 13)
MS = 1_000_000
SETUP_MS = {V2: 1000, "v2-reinit-flush": 1000, ACKED: 0, FAIR: 0, TWO_FDS: 0, N_FDS: 0, "v3-n4-pool": 0}
DOWNTIME_MS = {V2: 1600, "v2-reinit-flush": 1600, ACKED: 600, FAIR: 590, TWO_FDS: 580, N_FDS: 330, "v3-n4-pool": 330}
"""As v3's friends and REINIT's would have it."""

Of = Callable[[str, str, int], float]
"""Of case, protocol and seed, in milliseconds."""


def made_up(downtime_ms: Of | None = None, setup_ms: Of | None = None, **columns: Any) -> pl.DataFrame:
    """All cases and protocols, some seeds, alike unless it is said otherwise."""
    rows = []
    for name, case in CASES.items():
        for protocol in (*STEPS, *case.others):
            for seed in SEEDS:
                down = downtime_ms(name, protocol, seed) if downtime_ms else DOWNTIME_MS.get(protocol, 500)
                setup = setup_ms(name, protocol, seed) if setup_ms else SETUP_MS.get(protocol, 0)
                row: dict[str, Any] = {
                    CASE: name,
                    "protocol": protocol,
                    "seed": seed,
                    "outcome": "COMPLETED",
                    "reason": "",
                    "downtime_ns": round(down * MS),
                    "setup_in_downtime_ns": round(setup * MS),
                    "critical_lag_max_ns": 1000 * MS,
                    "phase_drain_ns": 100 * MS,
                    "total_ns": 3000 * MS,
                    "wakeups": 100,
                    "reads": 10,
                }
                rows.append(row | columns)
    return pl.DataFrame(rows, infer_schema_length=None)


def verdicts(frame: pl.DataFrame) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in answer(frame).findings}


@pytest.fixture(scope="module")
def quick() -> pl.DataFrame:
    """A real run of a part of the quick grid."""
    told = {RECONFIGURED: (V2, "v2-reinit-flush", ACKED), IDLE: (TWO_FDS, N_FDS)}
    planned = [
        Planned.of(point, seed)
        for seed in (1, 2)
        for point in EXPERIMENT.points(True)
        if point.protocol in told.get(str(point.factors[CASE]), ())
    ]
    return table_of(planned)


def test_a_real_run_of_the_quick_grid(quick: pl.DataFrame) -> None:
    told = answer(quick)
    assert f"{RECONFIGURED}: '+ reusable ack'" in told.answer
    assert "95 % interval" in told.answer
    assert set(figures(quick, "test")) == {"ablation", "ablation_critical", "ablation_crossed"}
    step = told.table.filter((pl.col("step") == "+ N = 4") & (pl.col("measure") == "downtime") & (pl.col(CASE) == IDLE))
    assert step["difference_mean_ms"].item() < -100, "four engines save half of the state"


def test_the_step_that_brings_most_is_told_with_its_number() -> None:
    told = answer(made_up())
    assert f"{BUSY}: '+ reusable ack' -1000.0 ms" in told.answer
    assert any(line.startswith(f"{BUSY}, downtime") and "'+ REINIT'" in line for line in told.details)


def test_where_no_step_brings_anything_that_is_said() -> None:
    told = answer(made_up(downtime_ms=lambda case, protocol, seed: 600))
    assert f"{BUSY}: none (the best" in told.answer


def test_a_step_that_costs_is_told_as_one() -> None:
    told = answer(made_up(downtime_ms=lambda case, protocol, seed: 800 if protocol == N_FDS else 600))
    assert any("cost: '+ N = 4' +200.0 ms" in line for line in told.details)


@pytest.mark.slow
def test_c1_hangs_on_whether_the_ack_does_it_as_well() -> None:
    assert verdicts(made_up())["C1"] == "under conditions"
    acked = made_up(setup_ms=lambda case, protocol, seed: 0 if protocol.startswith("v3") else 1000)
    assert verdicts(acked)["C1"] == "supported"
    assert verdicts(made_up(setup_ms=lambda case, protocol, seed: 1000))["C1"] == "refuted"
    assert verdicts(made_up(setup_ms=lambda case, protocol, seed: 0))["C1"] == "refuted"


@pytest.mark.slow
def test_c4_hangs_on_all_its_parts() -> None:
    def without_ack(case: str, protocol: str, seed: int) -> float:
        return 0 if protocol.startswith("v3") else 1000

    assert verdicts(made_up())["C4"] == "under conditions", "one fd with an ack does it as well"
    assert verdicts(made_up(setup_ms=without_ack))["C4"] == "supported"

    def one_is_not_enough(case: str, protocol: str, seed: int) -> float:
        return 500 if protocol == TWO_FDS else without_ack(case, protocol, seed)

    def n_gains_nothing(case: str, protocol: str, seed: int) -> float:
        return 580 if protocol in (TWO_FDS, N_FDS) else 1600

    def n_gains_only_where_idle(case: str, protocol: str, seed: int) -> float:
        return 560 if (case, protocol) == (BUSY, N_FDS) else DOWNTIME_MS.get(protocol, 500)

    assert verdicts(made_up(setup_ms=one_is_not_enough))["C4"] == "refuted"
    assert verdicts(made_up(n_gains_nothing, without_ack))["C4"] == "refuted"
    assert verdicts(made_up(n_gains_only_where_idle, without_ack))["C4"] == "refuted"


def test_an_interaction_is_paired_by_seed() -> None:
    frame = made_up(downtime_ms=lambda case, protocol, seed: 100 * seed + (-50 if protocol == N_FDS else 0))
    busy = frame.filter(pl.col(CASE) == BUSY)
    told = interaction((busy, TWO_FDS, N_FDS), (busy, TWO_FDS, N_FDS), "downtime_ns")
    assert told is not None
    here, there, between = told
    assert (here.mean, here.low, here.high) == (-50 * MS,) * 3
    assert there.mean == here.mean
    assert between.mean == 0


@pytest.mark.slow
def test_a_seed_that_was_lost_in_one_of_four_is_left_out() -> None:
    frame = made_up().with_columns(
        outcome=pl.when((pl.col("seed") < 5) & (pl.col(CASE) == IDLE) & (pl.col("protocol") == N_FDS))
        .then(pl.lit("FAILED"))
        .otherwise("outcome")
    )
    told = by_reconfiguring(frame, "downtime_ns")
    assert told is not None
    assert told[2].count == len(SEEDS) - 4
    assert any(f"{IDLE}, {N_FDS}: 4 FAILED." in line for line in answer(frame).details)


@pytest.mark.slow
def test_nothing_completed() -> None:
    columns = ("downtime_ns", "setup_in_downtime_ns", "critical_lag_max_ns", "phase_drain_ns", "total_ns")
    frame = made_up().with_columns(
        pl.lit("DID_NOT_CONVERGE").alias("outcome"), *(pl.lit(None, pl.Int64).alias(name) for name in columns)
    )
    told = answer(frame)
    assert "unknown" in told.answer
    assert "supported" not in {finding.verdict for finding in told.findings}
    assert effects(frame)["pairs"].sum() == 0
    figures(frame, "test")


def test_one_case_alone() -> None:
    frame = made_up().filter(pl.col(CASE) == RECONFIGURED)
    assert verdicts(frame)["C4"] == "under conditions"
    figures(frame, "test")
