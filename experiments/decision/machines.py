# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the plausible machines may be the one that was seen: those with about its downtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from experiments.decision.bands import Brought, brought, cells
from experiments.decision.ladder import rungs
from experiments.runs.frame import table
from experiments.runs.pool import Cell
from sim.outcome import Outcome
from sim.scenario.sample import draw
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS

NEAR = 0.15
"""A sample whose downtime differs by less than this from the fitted machine's may be the machine. Ours."""
ENOUGH = 8
"""With fewer such samples, the nearest ones are used. Ours."""
DRAWN = 4
"""So many times as many samples are drawn as are used: those are left out that cannot be the machine. Ours."""
SHORT = ("multifd", "chunks4", "v3-n1", "v3-n4")
"""The changes that `fit` tries; `decide` tries all."""
Run = Callable[[Sequence[Cell]], Sequence[Outcome]]
"""Makes runs, and returns their outcomes in the order of the cells."""


def what_brings(scenario: Scenario, count: int, downtime_ms: float | None, run: Run) -> list[Brought]:
    """What the changes of SHORT bring to a fitted machine, over `count` samples, or fewer.

    Samples are drawn from the ranges, and migrated as it was. Those whose downtime is near `downtime_ms`, what the
    fitted machine takes, are kept: the others are no machine that left these logs. On these, the changes are tried.
    """
    rows = rungs(scenario, SHORT)
    drawn = (
        [scenario, *(sample.scenario for sample in draw(scenario, DRAWN * count))] if scenario.ranges else [scenario]
    )
    first = cells(rows[:1], drawn)
    own = run(first)
    chosen = near(own, downtime_ms, count)
    others = [cell for at in chosen for cell in cells(rows[1:], [drawn[at]], first[at].seed)]
    return brought(rows, pl.concat([table([own[at] for at in chosen]), table(run(others))], how="diagonal_relaxed"))


def near(own: Sequence[Outcome], downtime_ms: float | None, count: int) -> list[int]:
    """Of which samples the downtime may be that of the machine; the nearest ones, if there are few."""
    done = {at: each.downtime_ns / NS_PER_MS for at, each in enumerate(own) if each.downtime_ns is not None}
    if downtime_ms is None:
        return list(done)[:count]
    off = {at: abs(took_ms - downtime_ms) for at, took_ms in done.items()}
    close = [at for at in done if off[at] <= NEAR * downtime_ms]
    return (close if len(close) >= min(ENOUGH, count) else sorted(done, key=off.__getitem__)[:ENOUGH])[:count]
