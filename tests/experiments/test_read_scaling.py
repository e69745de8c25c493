# SPDX-License-Identifier: GPL-2.0-or-later
"""read_scaling: its grid, and what it makes of runs, real ones and made-up ones."""

from __future__ import annotations

from collections.abc import Callable

import polars as pl
import pytest

from experiments.questions.read_scaling import EXPERIMENT
from experiments.questions.read_scaling import grid as read_scaling_grid
from experiments.questions.read_scaling.grid import LOOKS, Place, points, shares, v3_places, with_parts
from experiments.study.experiment import Answer, Planned
from tests.build.grids import table_of

StopCopy = Callable[[Place, int], float]
ENGINE_GIB_PER_S = 0.75
"""About what one engine saves."""


def made_up(stop_copy: StopCopy, outcome: str = "COMPLETED", seeds: int = 3) -> pl.DataFrame:
    """A table of the whole grid, whose stop-copy times are told, in ms; seeds differ by 0.1 %."""
    rows = []
    for seed in range(1, seeds + 1):
        for point in points(quick=False):
            factors = point.factors
            place = Place(**{name: factors[name] for name in read_scaling_grid.PLACE})  # type: ignore[arg-type]
            time_ns = round(stop_copy(place, int(factors["streams"])) * 1e6 * (1 + seed / 1000))
            done = outcome == "COMPLETED"
            binds = place.bound(int(factors["streams"]))
            row = {"protocol": point.protocol, "seed": seed, "outcome": outcome, **factors}
            row |= {"downtime_ns": time_ns + 200_000_000, "phase_drain_ns": time_ns, "phase_transfer_ns": 0}
            row |= {"path_fixed_ns": 78_000_000, "path_load_ns": 122_000_000, "path_lock_ns": 0}
            row |= {"path_copy_ns": time_ns * (binds == "read"), "path_firmware_ns": time_ns * (binds == "SAVE")}
            row |= {"path_link_ns": time_ns * (binds == "link")}
            row |= {"reads": 512, "read_firmware_ns": time_ns, "read_lock_ns": 0, "read_copy_ns": 63_000_000}
            rows.append(row if done else row | {name: None for name in row if name.endswith("_ns")})
    return pl.DataFrame(rows, infer_schema_length=None)


def as_claimed(place: Place, n: int) -> float:
    """C2 and C3 to the letter, whatever the rates."""
    return 640 if place.lock in ("device", "global") else 640 / min(n, place.engines)


def as_by_the_rates(place: Place, n: int) -> float:
    return 500 / min(place.bounds_gib_per_s(n).values())


def nothing_helps(place: Place, n: int) -> float:
    return 640


def everything_helps(place: Place, n: int) -> float:
    return 640 / n


def verdicts(told: Answer) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in told.findings}


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_quick_grid_has_every_lock() -> None:
    assert {point.factors["lock"] for point in points(quick=True)} == set(LOOKS)


def test_the_grid_has_a_base_and_one_stream_wherever_there_are_more() -> None:
    frame = pl.DataFrame([dict(point.factors) for point in points(quick=False)], infer_schema_length=None)
    for place in {place for place, _, _ in v3_places(frame)}:
        assert 1 in place.of(frame)["streams"]
    assert not Place().of(frame, "v2").is_empty()
    assert not Place().of(frame, "v2-multifd").is_empty()


def test_the_rates_say_what_binds() -> None:
    assert Place().bound(1) == Place().bound(16) == "SAVE"
    assert Place("global").bound(1) == "SAVE"
    assert Place("global").bound(16) == "read"
    assert Place(link_gbit_per_s=10).bound(16) == "link"
    assert Place(copy_gib_per_s=0.5).bound(1) == "read"
    assert Place().bounds_gib_per_s(4)["SAVE"] == pytest.approx(4 * ENGINE_GIB_PER_S, rel=0.02)


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> pl.DataFrame:
    """Two seeds of a part of the quick grid."""
    base = {"per_fd", "global"}
    few = [point for point in points(quick=True) if point.factors["lock"] in base and point.factors["streams"] != 4]
    few = [point for point in few if point.factors["copy_gib_per_s"] == Place().copy_gib_per_s]
    planned = [Planned.of(point, seed) for seed in (1, 2) for point in few]
    return table_of(planned)


@pytest.mark.slow
def test_real_runs_are_answered_and_drawn(real: pl.DataFrame) -> None:
    told = EXPERIMENT.answer(real)
    assert real["outcome"].unique().to_list() == ["COMPLETED"]
    assert "95 % interval" in told.answer
    assert told.table.height > 0
    assert verdicts(told)["C2"] == "supported"
    assert verdicts(told)["C3"] == "under conditions"
    assert set(EXPERIMENT.figures(real, "command")) == {"scaling", "read_latency", "bottleneck"}


@pytest.mark.slow
def test_real_runs_move_as_the_rates_say(real: pl.DataFrame) -> None:
    runs = with_parts(real)
    for place, n in ((Place(), 16), (Place("global"), 16), (Place(engines=1.0), 16), (Place(link_gbit_per_s=10.0), 16)):
        shared = shares(place.of(runs).filter(pl.col("streams") == n))
        assert max(shared, key=lambda name: shared[name]) == place.bound(n)


# --- made-up runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_copy", "c2", "c3"),
    [
        (as_claimed, "supported", "supported"),
        (as_by_the_rates, "supported", "under conditions"),
        (nothing_helps, "refuted", "supported"),
        (everything_helps, "under conditions", "refuted"),
    ],
)
def test_verdicts_follow_the_runs(stop_copy: StopCopy, c2: str, c3: str) -> None:
    told = EXPERIMENT.answer(made_up(stop_copy))
    assert verdicts(told) == {"C2": c2, "C3": c3}


def test_where_read_binds_is_said() -> None:
    frame = made_up(as_by_the_rates, seeds=2)
    binds = [place.bound(n) == "read" for place, n, _ in v3_places(frame)]
    told = EXPERIMENT.answer(frame).answer
    assert f"largest part of what moves the state in {sum(binds)} of {len(binds)} places" in told
    assert 0 < sum(binds) < len(binds) / 2
    assert "one lock for all and 16 engines, N = 16, 32" in told


def test_parts_leave_out_what_finishes_the_load() -> None:
    frame = with_parts(made_up(as_by_the_rates))
    assert frame["LOAD_ns"].sum() == 0
    assert sum(shares(Place().of(frame)).values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["FAILED", "DID_NOT_CONVERGE", "UNSUPPORTED"])
def test_without_a_completed_run_it_says_so(outcome: str) -> None:
    frame = made_up(as_claimed, outcome).with_columns(pl.selectors.ends_with("_ns").cast(pl.Int64))
    told = EXPERIMENT.answer(frame)
    assert "No run was completed" in told.answer
    assert "supported" not in verdicts(told).values()
    assert len(EXPERIMENT.figures(frame, "command")) == 3


def test_a_place_that_is_not_completed_is_counted() -> None:
    frame = made_up(as_by_the_rates)
    gone = (pl.col("engines") == 8) & (pl.col("streams") == 8)
    frame = frame.with_columns(outcome=pl.when(gone).then(pl.lit("FAILED")).otherwise("outcome"))
    c2 = next(finding for finding in EXPERIMENT.answer(frame).findings if finding.claim == "C2")
    assert c2.verdict == "under conditions"
    assert "1 place(s) were not completed" in c2.why
