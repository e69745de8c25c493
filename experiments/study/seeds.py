# SPDX-License-Identifier: GPL-2.0-or-later
"""How many seeds a setting of a grid gets: as many as the intervals of its values need, in fixed batches.

A setting is a scenario with its settings, under all protocols that are run there. These are compared seed by seed, so
all of them get the same seeds. After each batch the setting stops if, for each protocol, the half width of the 95 %
interval of each value (Student's) is at most a given part of its mean. The rule looks at no difference between
protocols, so it favours none. It looks at whole batches only, so neither the number of workers nor an interruption
changes it.

An interval of a mean says nothing about a rare event. Where a point says that such events are counted, as failures or
late data are, and where a run does not complete, the setting gets all seeds: that the first ones all fail does not say
that the others do.

The interval of a setting that stopped at 5 seeds covers less than 95 %, as the rule looks at the values that it keeps:
87 % of those that stopped at 5, 94 % over all, by a simulation of the rule with normal values and a spread of 1 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import polars as pl

from experiments.runs.plan import HALF_WIDTH
from experiments.study.experiment import Planned
from experiments.study.statistics import students_half_width
from proto_v3.vmm.migration import OutcomeKind

BATCHES = (5, 10, 20, 30)
"""How many seeds a setting has after each batch, if it may have as many."""
NARROW, EVENTS, ALL = "narrow intervals", "events are counted", "no more are planned"
"""Why a setting gets no more seeds."""
Row = Mapping[str, Any]
"""Of the table of runs: `outcome`, and the columns of the values."""


class Seeds(NamedTuple):
    """How many a point gets."""

    number: int
    because: str
    """Why it gets no more; empty as long as not all of these runs are made."""


@dataclass(frozen=True, slots=True)
class SeedRule:
    """When a setting gets no more seeds."""

    values: Sequence[Sequence[str]]
    """What the question tells of a run, each as the columns whose sum it is."""
    half_width: float = HALF_WIDTH
    """0: every setting gets all seeds."""

    def of_setting(self, points: Sequence[Sequence[Planned]], done: Mapping[str, Row]) -> Seeds:
        """The seeds of a setting. `points`: the runs that each point can get, by seed; `done`: by key, those made."""
        most = max(map(len, points))
        counted = any(of_point[0].point.every_seed for of_point in points)
        for count in (*(each for each in BATCHES if each < most and self.half_width), most):
            asked = [of_point[: most if counted else count] for of_point in points]
            if any(each.key not in done for of_point in asked for each in of_point):
                return Seeds(max(map(len, asked)), "")
            runs = [
                [done[each.key] for each in of_point[:count]]
                for of_point in points
                if len(of_point) > count or count == most  # others can get no more
            ]
            counted = counted or not all(map(_completed, chain.from_iterable(runs)))
            if not counted and all(map(self.is_narrow, runs)):
                return Seeds(count, NARROW)
        return Seeds(most, EVENTS if counted else ALL)

    def is_narrow(self, runs: Sequence[Row]) -> bool:
        """Whether the intervals of the values of a protocol's runs, which are completed, are narrow enough."""
        if len(runs) < 2:
            return False
        values = [[sum(run[column] or 0 for column in columns) for run in runs] for columns in self.values]
        return all(students_half_width(each) <= self.half_width * abs(fmean(each)) for each in values)

    def of_grid(self, planned: Sequence[Planned], done: Mapping[str, Row]) -> dict[str, Seeds]:
        """The seeds of the point of each run that is asked for if those of `done` are made; by key, in the order of
        `planned`, which has all runs that the grid can ask for, repeat by repeat.

        To be called again until all that it asks for are made.
        """
        settings: dict[Any, dict[Any, list[Planned]]] = {}
        for each in planned:
            point = each.point
            of_setting = settings.setdefault((point.base, point.settings), {})
            of_setting.setdefault((point.protocol, *point.factors.items()), []).append(each)
        asked: dict[str, Seeds] = {}
        for points in settings.values():
            count, because = self.of_setting(list(points.values()), done)
            for of_point in points.values():
                own = len(of_point)
                seeds = Seeds(own, because and ALL) if own < count else Seeds(count, because)
                asked |= dict.fromkeys((each.key for each in of_point[:count]), seeds)
        return {each.key: asked[each.key] for each in planned if each.key in asked}

    def told(self, most_runs: int) -> dict[str, Any]:
        """For a manifest: the rule, and how many runs the grid could have asked for."""
        rule = {"half_width_percent": 100 * self.half_width, "batches": BATCHES if self.half_width else []}
        return {"seeds_rule": rule, "runs_most": most_runs}


def seeds_text(frame: pl.DataFrame) -> str:
    """How many settings of a table of runs have how many seeds, and why, in words."""
    settings = frame.group_by("base", "settings").agg(pl.col("seeds").max(), pl.col("seeds_because").first())
    counts = settings.group_by("seeds", "seeds_because").len().sort("seeds", "seeds_because")
    parts = [f"{seeds} at {count} ({because})" for seeds, because, count in counts.iter_rows()]
    return f"Seeds, by setting: {', '.join(parts)}"


def _completed(run: Row) -> bool:
    return bool(run["outcome"] == OutcomeKind.COMPLETED.value)
