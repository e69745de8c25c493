# SPDX-License-Identifier: GPL-2.0-or-later
"""How many seeds a setting gets: as many as its intervals need, in fixed batches, however the runs are made."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.runs.pool import outcome_as, run_cell
from experiments.study.experiment import NAMES, Planned, Point, find
from experiments.study.seeds import ALL, BATCHES, EVENTS, NARROW, SeedRule, Seeds
from sim.same_run import same_run

BASE = "mlx5-2vf"
WIDE, NARROW_CV = 0.2, 1e-4
RULE = SeedRule((("downtime_ns",),))


def planned(*points: Point, repeats: int = 30) -> list[Planned]:
    """As a question plans them."""
    return [
        Planned.of(point, seed)
        for seed in range(1, 1 + repeats)
        for point in points
        if seed <= (point.repeats or repeats)
    ]


def made(runs: Sequence[Planned], cv: Mapping[str, float], failed: Sequence[tuple[str, int]] = ()) -> dict[str, Any]:
    """Rows of these runs, by key: a downtime of 1 s with this spread, by protocol."""
    rows = {}
    for run in runs:
        name, seed = run.point.protocol, run.cell.seed
        noise = np.random.default_rng([seed, len(name)]).normal()
        ended = "FAILED" if (name, seed) in failed else "COMPLETED"
        rows[run.key] = {
            "outcome": ended,
            "downtime_ns": round(1e9 * (1 + cv[name] * noise)) if ended[0] == "C" else None,
        }
    return rows


def seeds(rule: SeedRule, runs: Sequence[Planned], rows: Mapping[str, Any]) -> dict[str, Seeds]:
    """What each protocol gets in the end."""
    told = rule.of_grid(runs, rows)
    return {run.point.protocol: told[run.key] for run in runs if run.key in told}


def half_width(rows: Mapping[str, Any], runs: Sequence[Planned], protocol: str, count: int) -> float:
    """Of the mean's interval, as a part of it."""
    values = [rows[run.key]["downtime_ns"] for run in runs if run.point.protocol == protocol and run.cell.seed <= count]
    low, high = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
    return float((high - low) / 2 / np.mean(values))


@pytest.mark.parametrize("percent", [0.5, 1, 2, 4, 8])
def test_a_setting_stops_at_the_first_batch_whose_intervals_are_narrow_enough(percent: float) -> None:
    runs = planned(Point(BASE, "v2"), Point(BASE, "v3-n2"))
    rows = made(runs, {"v2": 0.01, "v3-n2": 0.03})
    enough = [
        count
        for count in BATCHES
        if max(half_width(rows, runs, name, count) for name in ("v2", "v3-n2")) <= percent / 100
    ]
    told = seeds(SeedRule(RULE.values, percent / 100), runs, rows)
    expected = Seeds(enough[0], NARROW) if enough else Seeds(30, ALL)
    assert told == {"v2": expected, "v3-n2": expected}


def test_all_protocols_of_a_setting_get_what_the_widest_needs_and_other_settings_do_not() -> None:
    other = ("driver.chunks=3",)
    runs = planned(*(Point(BASE, name, settings) for settings in ((), other) for name in ("v2", "v3-n2")))
    rows = made(runs, {"v2": NARROW_CV, "v3-n2": NARROW_CV})
    wide = made([run for run in runs if run.point.settings == other], {"v2": WIDE, "v3-n2": NARROW_CV})
    told = RULE.of_grid(runs, rows | wide)
    assert {told[run.key] for run in runs if run.point.settings == () and run.key in told} == {Seeds(5, NARROW)}
    assert {told[run.key] for run in runs if run.point.settings == other} == {Seeds(30, ALL)}


def test_every_value_that_is_told_counts_and_so_does_a_sum() -> None:
    runs = planned(Point(BASE, "v2"))
    rows = made(runs, {"v2": NARROW_CV})
    wide = made(runs, {"v2": WIDE})
    rows = {
        key: row | {"lag_ns": wide[key]["downtime_ns"], "rest_ns": -wide[key]["downtime_ns"]}
        for key, row in rows.items()
    }
    assert seeds(RULE, runs, rows)["v2"].number == 5
    assert seeds(SeedRule((("downtime_ns",), ("lag_ns",))), runs, rows)["v2"] == Seeds(30, ALL)
    assert seeds(SeedRule((("downtime_ns", "lag_ns", "rest_ns"),)), runs, rows)["v2"].number == 5


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ([], Seeds(5, NARROW)),
        ([("v2", 3)], Seeds(30, EVENTS)),
        ([("v2", 7)], Seeds(5, NARROW)),
        ([("v2", seed) for seed in range(1, 6)], Seeds(30, EVENTS)),
        ([("v2", seed) for seed in range(1, 31)], Seeds(30, EVENTS)),
        ([(name, seed) for name in ("v2", "v3-n2") for seed in range(1, 31)], Seeds(30, EVENTS)),
    ],
    ids=["none", "one of the first batch", "one of a later batch", "all of the first batch", "all", "all of both"],
)
def test_where_a_run_fails_all_seeds_are_made(failed: Sequence[tuple[str, int]], expected: Seeds) -> None:
    runs = planned(Point(BASE, "v2"), Point(BASE, "v3-n2"))
    assert seeds(RULE, runs, made(runs, {"v2": NARROW_CV, "v3-n2": NARROW_CV}, failed))["v3-n2"] == expected


def test_a_point_that_counts_events_gets_all_seeds_at_once() -> None:
    runs = planned(Point(BASE, "v2", every_seed=True), Point(BASE, "v3-n2"))
    assert set(RULE.of_grid(runs, {}).values()) == {Seeds(30, "")}
    told = seeds(RULE, runs, made(runs, {"v2": NARROW_CV, "v3-n2": NARROW_CV}))
    assert told == dict.fromkeys(("v2", "v3-n2"), Seeds(30, EVENTS))


def test_a_point_with_repeats_of_its_own_gets_no_more_and_keeps_nobody_waiting() -> None:
    runs = planned(Point(BASE, "v2", repeats=4), Point(BASE, "v3-n2"))
    told = seeds(RULE, runs, made(runs, {"v2": WIDE, "v3-n2": NARROW_CV}))
    assert told == {"v2": Seeds(4, ALL), "v3-n2": Seeds(5, NARROW)}


def test_with_a_half_width_of_0_all_seeds_are_made() -> None:
    runs = planned(Point(BASE, "v2"))
    rule = SeedRule(RULE.values, 0)
    assert set(rule.of_grid(runs, {}).values()) == {Seeds(30, "")}
    assert seeds(rule, runs, made(runs, {"v2": 0.0}))["v2"].number == 30


@pytest.mark.parametrize("seed", range(8))
def test_what_was_made_before_changes_nothing(seed: int) -> None:
    """As after an interruption, or of a sweep with more seeds: the runs are the same in the end, in the same order."""
    settings = [("driver.chunks=3",), ("driver.chunks=4",), ("driver.chunks=5",)]
    runs = planned(*(Point(BASE, name, each) for each in settings for name in ("v2", "v3-n2")))
    rows = made(runs, {"v2": 0.012, "v3-n2": 0.02})
    rows |= made([run for run in runs if run.point.settings == settings[0]], {"v2": NARROW_CV, "v3-n2": NARROW_CV})
    expected = RULE.of_grid(runs, rows)
    assert len({told.number for told in expected.values()}) > 1
    draw = random.Random(seed)
    done = {run.key: rows[run.key] for run in runs if draw.random() < seed / 10}
    while missing := [key for key in RULE.of_grid(runs, done) if key not in done]:
        for key in draw.sample(missing, draw.randint(1, len(missing))):
            done[key] = rows[key]
    assert list(RULE.of_grid(runs, done).items()) == list(expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_values_of_each_question_are_columns_of_its_table(name: str) -> None:
    experiment = find(name)
    rule = SeedRule(experiment.values)
    runs = [run for run in experiment.planned(True) if run.cell.seed == 1]
    row = dict.fromkeys((column for value in experiment.values for column in value), 1) | {"outcome": "COMPLETED"}
    assert rule.of_grid(runs, {run.key: row for run in runs}).keys() == {run.key for run in runs}


# --- no run twice -----------------------------------------------------------------------------------------------------

GROUPS = 2
"""Of equal runs, tried of each question."""


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_a_question_that_are_called_the_same_are(name: str) -> None:
    equal: dict[str, list[Planned]] = {}
    for run in find(name).planned(True):
        if run.cell.seed == 1:
            equal.setdefault(same_run(run.cell.scenario, run.cell.protocol), []).append(run)
    for runs in [runs for runs in equal.values() if len(runs) > 1][:GROUPS]:
        made, same = runs[0].cell, runs[-1].cell
        assert outcome_as(run_cell(made), same) == run_cell(same)
