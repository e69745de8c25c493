"""The figure of the downtimes' distribution: each seed's, and the spread around each protocol's own median."""

from __future__ import annotations

import numpy as np
import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, own_settings
from experiments.draw.panels import MADE_BY
from experiments.runs.frame import COMPLETED, completed_runs, protocols
from experiments.study.statistics import Floats, percentile
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS


@own_settings()
def draw_distribution(scenario: Scenario, runs: pl.DataFrame, made_by: str = MADE_BY) -> Figure:
    """The distribution of the downtime under each protocol, ms: the part of the runs that take at most so long.

    A mark is one seed. At the right the same curves, as distances from each protocol's own median. Runs that were not
    completed have no mark, and their part of the curve is missing at the top. Arguments as for `draw_downtime`.
    """
    named = protocols(completed_runs(runs))
    figure, (whole, spread) = panels.sheet(
        f"How are the downtimes distributed? {scenario.name}, {runs['seed'].n_unique()} seed(s)",
        "a mark is one run; large marks: 95th and 99th percentile, of at least 20 and 100 runs; if a curve ends below "
        "100 %, the other runs did not complete",
        made_by,
        (1, 2),
        (11, 4.6 + 0.2 * -(-len(named) // 5)),
    )
    for name in named:
        of_protocol = runs.filter(protocol=name)
        values = np.sort(of_protocol.filter(COMPLETED)["downtime_ns"].to_numpy() / NS_PER_MS)
        for axis, away in ((whole, 0.0), (spread, float(np.median(values)))):
            _curve(axis, values - away, of_protocol.height, style.protocol(name))
    panels.dress(whole, "downtime of each run", "downtime, ms", "% of the runs take at most so long")
    panels.dress(spread, "spread around the protocol's median", "downtime - median, ms", "")
    for axis in (whole, spread):
        axis.set_ylim(0, 104)
        axis.set_yticks([0, 25, 50, 75, 95, 100])
    if not named:
        panels.say(whole, "no run was completed: there is no downtime")
    panels.legend(figure, named)
    return figure


def _curve(axis: Axes, values: Floats, runs: int, look: style.Style) -> None:
    """The empirical distribution of sorted values, as a part of all runs."""
    percent = 100 * np.arange(1, len(values) + 1) / runs
    steps = {"color": look.colour, "linestyle": look.line, "linewidth": 1.3}
    axis.step([values[0], *values], [0, *percent], where="post", **steps)
    size = 5 if len(values) <= 30 else 2.5
    axis.plot(values, percent, look.marker, color=look.colour, markersize=size)
    for each in (95, 99):
        if (value := percentile(values, each)) is not None:
            at = percent[np.searchsorted(values, value, side="right") - 1]
            axis.plot([value], [at], look.marker, color=look.colour, markersize=9, markeredgecolor="black")
