# SPDX-License-Identifier: GPL-2.0-or-later
"""The sensitivity experiment: its grid, and that what it says is what the runs say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments.questions.sensitivity import EXPERIMENT
from experiments.questions.sensitivity import grid as sensitivity_grid
from experiments.questions.sensitivity.figures import figures
from experiments.questions.sensitivity.grid import (
    BASES,
    CONCLUSIONS,
    ENGINES,
    IDLE,
    MAPS,
    NIC,
    PARAMETERS,
    V3,
    Parameter,
    points,
)
from experiments.questions.sensitivity.question import MULTIFD, WORTH, answer, bars, base
from experiments.runs import frame as results
from experiments.runs.frame import PATH_COLUMNS
from experiments.runs.pool import run_cell
from experiments.study.effects import NOT_BOTH
from experiments.study.experiment import Planned, Point, find
from sim.scenario.file import load
from sim.scenario.ranges import without_range
from sim.scenario.scenario import parameters as scenario_parameters

SEEDS = 4
BASE_RATIOS = {"v2": 0.6, "v2-multifd": 0.9, "v2-reinit-flush-ack-reusable": 0.85}
V2_NS = 1e9


# --- the grid --------------------------------------------------------------------------------------------------------


def test_the_quick_grid_has_each_part_and_is_in_the_whole_one() -> None:
    quick, whole = points(True), points(False)
    assert {point.factors["part"] for point in quick} == {"base", "tornado", "map"}
    assert all(point in whole for point in quick)
    assert len(quick) < len(whole) / 3


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda parameter: parameter.name)
def test_what_a_conclusion_hangs_on_has_a_range_where_it_is_not_known(parameter: Parameter) -> None:
    for name in parameter.bases:
        scenario = load(name)
        assert parameter.key not in without_range(scenario.ranges, scenario.sources, scenario_parameters(scenario)), (
            name
        )


def test_each_parameter_is_moved_to_both_ends_on_each_of_its_bases() -> None:
    moved = {
        (p.base, p.factors["parameter"], p.factors["side"]) for p in points(False) if p.factors["part"] == "tornado"
    }
    assert moved == {
        (base, parameter.name, side) for parameter in PARAMETERS for base in parameter.bases for side in ("low", "high")
    }


def test_each_end_differs_from_the_base_and_the_base_lies_between() -> None:
    for base_name, settings in BASES.items():
        scenario = load(base_name, settings)
        for parameter in PARAMETERS:
            if base_name in parameter.bases and parameter.name != "driver's lock":
                low, high = (float(parameter.at(scenario, side)) for side in ("low", "high"))
                value = sensitivity_grid.parameters(scenario)[parameter.key] if parameter.key != "device.0.count" else 2
                assert low <= value <= high, parameter.name
                assert low < high


def test_it_is_found_by_its_name() -> None:
    assert find("sensitivity") is EXPERIMENT


# --- made-up runs ----------------------------------------------------------------------------------------------------


def made_up(
    ratios: dict[tuple[str, str], float], *, state: float = 0.9, broken: Collection[tuple[str, str]] = ()
) -> pl.DataFrame:
    """All places of the quick grid: v3's downtime over the other's is as of the base, but for these ends (parameter,
    side), whatever the base and the other; in the maps it is `state`. Of `broken` ends v3 completes none."""
    rng = np.random.default_rng(1)
    noise = rng.normal(1, 0.001, (SEEDS, 2))
    rows = []
    for seed in range(1, SEEDS + 1):
        for point in points(True):
            where = (str(point.factors["parameter"]), str(point.factors["side"]))
            rows.append(row(point, seed, where, ratios, state, noise[seed - 1], where in broken))
    return pl.DataFrame(rows, infer_schema_length=None)


def row(
    point: Point,
    seed: int,
    where: tuple[str, str],
    ratios: dict[tuple[str, str], float],
    in_map: float,
    noise: np.ndarray,
    broken: bool,
) -> dict[str, Any]:
    """v3 takes V2_NS; the others so much that the ratio is what it should be."""
    ratio = BASE_RATIOS.get(point.protocol, 0.9)
    if point.factors["part"] == "map":
        ratio = in_map
    ratio = ratios.get(where, ratio)
    v3 = point.protocol == V3
    downtime = V2_NS * (noise[0] if v3 else noise[1] / ratio)
    gone = broken and v3
    return {
        "protocol": point.protocol,
        "seed": seed,
        "base": point.base,
        "outcome": "DID_NOT_CONVERGE" if gone else "COMPLETED",
        "downtime_ns": None if gone else round(downtime),
        **dict.fromkeys(PATH_COLUMNS, None if gone else 0),
        "path_copy_ns": None if gone else round(downtime * 0.02),
        **point.factors,
    }


ENGINES_LOW, LOCK_HIGH = ("firmware engines", "low"), ("driver's lock", "high")


def test_the_ratio_of_the_base_is_told() -> None:
    told = base(made_up({}), MULTIFD)
    assert told is not None
    assert told.ratio.mean == pytest.approx(0.9, rel=2e-3)


def test_the_longest_bar_comes_first() -> None:
    frame = made_up({("SAVE rate, MiB/s", "high"): 0.5, ENGINES_LOW: 1.0})
    assert [bar.parameter for bar in bars(frame, MULTIFD)] == ["SAVE rate, MiB/s", "firmware engines", "driver's lock"]
    assert bars(frame, MULTIFD)[0].swing == pytest.approx(0.4, abs=0.01)


def test_what_brings_too_little_is_named_with_its_gain() -> None:
    told = answer(made_up({ENGINES_LOW: 0.98, LOCK_HIGH: 0.94})).answer
    assert "0.900 (0." in told
    assert "do not build it for such a device, with any one of firmware engines = 1: 2.0 % (" in told
    assert "driver's lock = global: " not in told


def test_where_nothing_brings_too_little_that_is_said() -> None:
    told = answer(made_up({})).answer
    assert "No single parameter is shown to bring the gain under 5 %" in told


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ({ENGINES_LOW: 0.99, LOCK_HIGH: 1.0}, "supported"),
        ({ENGINES_LOW: 0.99}, "under conditions"),
        ({LOCK_HIGH: 0.99}, "under conditions"),
        ({}, "refuted"),
    ],
)
def test_c3_depends_on_the_runs(ratios: dict[tuple[str, str], float], verdict: str) -> None:
    (finding,) = answer(made_up(ratios)).findings
    assert (finding.claim, finding.verdict) == ("C3", verdict)
    assert "are 2.0 % of v3-n4's critical path" in finding.why


@pytest.mark.slow
def test_the_regions_are_told_engines_by_engines() -> None:
    nowhere = [line for line in answer(made_up({})).details if line.startswith(f"{V3} is shown to bring less than 5 %")]
    assert len(nowhere) == 3
    assert all("1 engine(s): nowhere" in line for line in nowhere)
    everywhere = [
        line
        for line in answer(made_up({}, state=0.97)).details
        if line.startswith(f"{V3} is shown to bring less than 5 %")
    ]
    assert all("2.5 engine(s): everywhere" in line for line in everywhere)


def test_an_end_that_is_not_completed_is_told_and_drawn() -> None:
    frame = made_up({}, broken={ENGINES_LOW})
    told = answer(frame)
    assert any("no ratio" in line and f"{V3} {SEEDS} DID_NOT_CONVERGE" in line for line in told.details)
    assert told.findings[0].verdict == "under conditions"
    assert (told.table.filter(pl.col("pairs") == 0)["not_completed"] != "").all()
    assert set(figures(frame, "proto-v3 run sensitivity")) == {"sensitivity", "sensitivity_region"}


def test_effects_have_a_row_a_base_an_end_and_a_square() -> None:
    table = answer(made_up({})).table
    squares = len(ENGINES[::2]) * (2 * len(MAPS[0].values[::2]) + len(MAPS[1].values[::2]))
    ends = 2 * len(sensitivity_grid.QUICK_PARAMETERS) * len(CONCLUSIONS)
    assert table.group_by("part").len().sort("part").rows() == [("base", 4), ("map", squares), ("tornado", ends)]
    assert table["ratio_low"].null_count() == 0


def test_runs_none_of_which_was_completed_are_told_and_drawn() -> None:
    frame = made_up({}).with_columns(outcome=pl.lit("FAILED"), downtime_ns=pl.lit(None, pl.Int64))
    told = answer(frame)
    assert "no known part" in told.answer
    assert told.findings[0].verdict == "under conditions"
    assert figures(frame, "proto-v3 run sensitivity").keys() == {"sensitivity", "sensitivity_region"}


# --- real runs -------------------------------------------------------------------------------------------------------


def test_without_maps_there_is_no_map() -> None:
    frame = made_up({}).filter(pl.col("part") != "map").drop(each.column for each in MAPS)
    assert not any("is shown to bring less" in line for line in answer(frame).details)
    assert figures(frame, "proto-v3 run sensitivity").keys() == {"sensitivity"}


@pytest.mark.slow
def test_real_runs_of_a_part_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one firmware engine N has nothing to share: the gain over v2-multifd is next to nothing."""
    monkeypatch.setattr(sensitivity_grid, "QUICK_PARAMETERS", ("firmware engines",))
    monkeypatch.setattr(sensitivity_grid, "QUICK_STEP", 4)
    chosen = [point for point in points(True) if point.base == IDLE]
    planned = [Planned.of(point, seed) for seed in (1, 2) for point in chosen]
    rows = [results.row(run_cell(each.cell)) | each.columns() for each in planned]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    assert set(frame["outcome"]) == {"COMPLETED"}
    (bar,) = bars(frame, MULTIFD)
    assert bar.low.found is not None
    assert bar.high.found is not None
    assert bar.base is not None
    assert bar.high.found.ratio.mean < bar.base.ratio.mean < bar.low.found.ratio.mean
    assert bar.low.found.ratio.mean > 1 - WORTH
    assert bars(frame, CONCLUSIONS[-1]) == []
    told = answer(frame)
    assert any(NIC in line and NOT_BOTH in line for line in told.details)
    assert figures(frame, "proto-v3 run sensitivity").keys() == {"sensitivity", "sensitivity_region"}
