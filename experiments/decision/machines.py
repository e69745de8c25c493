# SPDX-License-Identifier: GPL-2.0-or-later
"""The machines that a decision is made on: samples of a scenario's ranges; of a machine that was seen, those that have
about its downtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from experiments.decision.bands import cells
from experiments.decision.ladder import Rung
from experiments.runs.pool import Cell
from proto_v3.errors import UserError
from sim.scenario.sample import MAX_SAMPLES, Sample, draw
from sim.scenario.scenario import Scenario
from sim.scenario.screening import screened

SAMPLE_SEED = 0
FIRST_SEED = 1
"""Of the runs: each sample has one of its own, which all protocols share."""
NEAR = 0.15
"""A sample whose downtime differs by less than this from the machine's may be the machine. Ours."""
ENOUGH = 8
"""With fewer such samples, the nearest ones are used. Ours."""
DRAWN = 4
"""So many times as many samples are drawn as are used: those are left out that cannot be the machine. Ours."""
Downtimes = Callable[[Sequence[Cell]], Sequence[float | None]]
"""Makes runs, and returns the downtime of each, ms; None: it did not complete."""
Machines = dict[int, Sample]
"""By the seed of its runs."""


def machines(
    scenario: Scenario,
    count: int,
    first: Rung,
    near_ms: float | None = None,
    downtimes: Downtimes | None = None,
    *,
    screening: bool = True,
) -> Machines:
    """`count` samples of a scenario's ranges; one, the scenario itself, if it has none. With `screening` they run in
    larger pieces (sim.scenario.screening).

    With `near_ms`, the downtime of a machine that was seen, DRAWN times as many are drawn, and run as `first` says.
    Those whose downtime is near it are taken, `count` at the most: the others cannot be this machine.
    """
    check_count(scenario, count, near_ms)
    if near_ms is None or downtimes is None or not scenario.ranges:
        return _drawn(scenario, count, screening)
    drawn = _drawn(scenario, DRAWN * count, screening)
    own = downtimes(cells([first], drawn))
    seeds = list(drawn)
    return {seeds[at]: drawn[seeds[at]] for at in near(own, near_ms, count)}


def check_count(scenario: Scenario, count: int, near_ms: float | None) -> None:
    """UserError if `near_ms` is no downtime, or if more samples are asked for than can be searched for."""
    if near_ms is None:
        return
    if not (math.isfinite(near_ms) and near_ms > 0):
        raise UserError(f"near_ms = {near_ms}: must be a finite number above 0")
    most = MAX_SAMPLES // DRAWN
    if scenario.ranges and not 1 <= count <= most:
        raise UserError(
            f"samples = {count}: must be from 1 to {most} for machines of a given downtime, for {DRAWN} times as many "
            f"are drawn, {MAX_SAMPLES} at the most"
        )


def machine(scenario: Scenario, seed: int, *, screening: bool) -> Scenario:
    """The machine whose runs have this seed, to make one of them again. UserError for a seed that no sample has."""
    count = seed - FIRST_SEED + 1 if scenario.ranges else 1  # the first ones of many are those of few
    return list(_drawn(scenario, count, screening).values())[-1].scenario


def _drawn(scenario: Scenario, count: int, screening: bool) -> Machines:
    samples = draw(scenario, count, SAMPLE_SEED)
    if screening:
        samples = [replace(each, scenario=screened(each.scenario)) for each in samples]
    return dict(enumerate(samples, FIRST_SEED))


def near(own_ms: Sequence[float | None], near_ms: float, count: int) -> list[int]:
    """Where the downtimes are that may be the machine's, `count` at the most; the nearest ones, if there are few."""
    off = {at: abs(each - near_ms) for at, each in enumerate(own_ms) if each is not None}
    close = [at for at, each in off.items() if each <= NEAR * near_ms]
    least = min(ENOUGH, count)
    return close[:count] if len(close) >= least else sorted(sorted(off, key=off.__getitem__)[:least])
