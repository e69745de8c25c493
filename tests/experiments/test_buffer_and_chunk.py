# SPDX-License-Identifier: GPL-2.0-or-later
"""buffer_and_chunk: its grid, and what it makes of runs, real ones and made-up ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import polars as pl
import pytest

from experiments.questions.buffer_and_chunk import (
    EXPERIMENT,
    LARGE_KIB,
    LARGEST_KIB,
    MOVED,
    PROTOCOLS,
    QEMU_KIB,
    REGIMES,
    SMALL_KIB,
    knee_kib,
    points,
    steps_up,
)
from experiments.study.experiment import Planned
from tests.build.grids import table_of


def made_up(moved_ms: Callable[[int], float], outcome: str = "COMPLETED", seeds: int = 3) -> pl.DataFrame:
    """A table of the whole grid, whose times to move are told by the size of a read in KiB."""
    rows = []
    for seed in range(1, seeds + 1):
        for point in points(quick=False):
            moved_ns = round(moved_ms(int(point.factors["read_kib"])) * 1e6 * (1 + seed / 1000))
            row = {"protocol": point.protocol, "seed": seed, "outcome": outcome, **point.factors}
            row |= {"phase_drain_ns": moved_ns, "phase_transfer_ns": 0, "phase_load_ns": 0, "read_copy_ns": moved_ns}
            row |= {"reads": 512, "wakeups": 10, "messages": 8, "device_bytes": 2**29, "setup_in_downtime_ns": 0}
            rows.append(row)
    frame = pl.DataFrame(rows, infer_schema_length=None)
    gone = pl.selectors.starts_with("phase_")
    return frame if outcome == "COMPLETED" else frame.with_columns(pl.when(False).then(gone).name.keep())


def flat_from(kib: int) -> Callable[[int], float]:
    """Each doubling below a size takes off a tenth."""

    def moved_ms(size: int) -> float:
        steps = 0
        while size < kib:
            size, steps = 2 * size, steps + 1
        return 100 / 0.9**steps

    return moved_ms


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_sizes_double_and_the_two_states_meet() -> None:
    for sizes in (SMALL_KIB, LARGE_KIB):
        assert all(2 * small == large for small, large in itertools.pairwise(sizes))
    assert QEMU_KIB in LARGE_KIB
    assert (SMALL_KIB[0], SMALL_KIB[-1], LARGE_KIB[-1]) == (4, LARGE_KIB[0], LARGEST_KIB)


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> pl.DataFrame:
    """Two seeds of a part of the quick grid."""
    few = [point for point in points(quick=True) if point.protocol in ("v2-multifd", "v3-n4")]
    few = [point for point in few if point.factors["regime"] == "read" and point.factors["chunk_mib"] in (1, 8)]
    planned = [Planned.of(point, seed) for seed in (1, 2) for point in few]
    return table_of(planned)


@pytest.mark.slow
def test_real_runs_are_answered_and_drawn(real: pl.DataFrame) -> None:
    told = EXPERIMENT.answer(real)
    assert real["outcome"].unique().to_list() == ["COMPLETED"]
    assert "95 % interval" in told.answer
    assert told.findings == []
    assert told.table.height > 0
    assert set(EXPERIMENT.figures(real, "command")) == {"read_size", "cost_of_reads", "chunks"}


@pytest.mark.slow
def test_smaller_reads_are_more_calls(real: pl.DataFrame) -> None:
    reads = real.filter(pl.col("sweep") == "read", pl.col("state") == "small").sort("read_kib")
    counts = reads.group_by("read_kib", maintain_order=True).agg(pl.col("reads").mean())["reads"].to_list()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3 * counts[1]


# --- made-up runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kib", "comes_out"), [(256, True), (1024, True), (2048, False), (LARGEST_KIB, False)])
def test_whether_qemus_finding_comes_out_follows_the_runs(kib: int, comes_out: bool) -> None:
    told = EXPERIMENT.answer(made_up(flat_from(kib))).answer
    assert told.count("it comes out") == (len(REGIMES) if comes_out else 0)
    assert told.count("it does not come out") == (0 if comes_out else len(REGIMES))


@pytest.mark.parametrize("kib", [4, 64, 1024, 8192])
def test_the_knee_is_found(kib: int) -> None:
    steps = list(steps_up(made_up(flat_from(kib)).with_columns(MOVED)))
    for protocol in PROTOCOLS:
        assert knee_kib([step for step in steps if (step.protocol, step.regime) == (protocol, "SAVE")]) == kib


@pytest.mark.slow
def test_steps_up_that_cost_are_told() -> None:
    told = EXPERIMENT.answer(made_up(lambda kib: 100.0 + kib / 100)).details
    assert any("steps up cost 1 % or more" in detail and "No step up" not in detail for detail in told)
    assert any("No step up costs" in d for d in EXPERIMENT.answer(made_up(lambda kib: 100.0)).details)


@pytest.mark.slow
def test_set_up_that_small_reads_leave_for_the_downtime_is_told() -> None:
    frame = made_up(lambda kib: 100.0)
    small = (pl.col("read_kib") == 4) & (pl.col("protocol") == "v2")
    late = frame.with_columns(setup_in_downtime_ns=pl.when(small).then(1_600_000).otherwise(0))
    assert any("by v2 with reads of 4 KiB, 1.6 ms" in detail for detail in EXPERIMENT.answer(late).details)
    assert any("No size leaves set-up" in detail for detail in EXPERIMENT.answer(frame).details)


@pytest.mark.parametrize("outcome", ["FAILED", "DID_NOT_CONVERGE"])
def test_without_a_completed_run_it_says_so(outcome: str) -> None:
    frame = made_up(lambda kib: 100.0, outcome)
    told = EXPERIMENT.answer(frame)
    assert told.answer.count("not seen") == len(REGIMES)
    assert "No size was completed." in told.answer
    assert len(EXPERIMENT.figures(frame, "command")) == 3
