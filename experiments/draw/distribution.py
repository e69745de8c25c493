# SPDX-License-Identifier: GPL-2.0-or-later
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

MANY = 30
"""More runs than this get smaller marks."""
ROWS = 7
"""The marks of a protocol's runs are spread over these rows, so that few of them hide others."""


@own_settings()
def draw_distribution(scenario: Scenario, runs: pl.DataFrame, made_by: str = MADE_BY) -> Figure:
    """The distribution of the downtime under each protocol, ms: the part of the runs that take at most this time.

    At the right each run by itself, as distance from its protocol's median, with the percentiles. Runs that were not
    completed have no mark, and their part of the curve is missing at the top. Arguments as for `draw_downtime`.
    """
    named = protocols(completed_runs(runs))
    figure, (whole, spread) = panels.sheet(
        f"How are the downtimes distributed? {scenario.name}, {runs['seed'].n_unique()} seed(s)",
        "a mark is one run; if a curve ends below 100 %, the other runs did not complete; lines: median, p95 "
        "(dashed) and p99 (dotted), which need 20 and 100 runs",
        made_by,
        (1, 2),
        (11, max(4.6, 0.5 * len(named) + 2) + 0.2 * -(-len(named) // 5)),
    )
    labels = []
    for at, name in enumerate(named):
        of_protocol = runs.filter(protocol=name)
        values = np.sort(of_protocol.filter(COMPLETED)["downtime_ns"].to_numpy() / NS_PER_MS)
        _curve(whole, values, of_protocol.height, style.protocol(name))
        _strip(spread, at, values, style.protocol(name))
        labels.append(_label(name, values))
    panels.dress(whole, "downtime of all runs", "downtime, ms", "% of the runs take at most this time")
    panels.dress(spread, "each run, from its protocol's median", "downtime - median, ms", "")
    whole.set_ylim(0, 104)
    whole.set_yticks([0, 25, 50, 75, 95, 100])
    spread.set_yticks(range(len(named)), labels)
    spread.set_ylim(max(len(named), 1) - 0.5, -0.6)
    if not named:
        panels.say(whole, "no run was completed: there is no downtime")
    panels.legend(figure, named)
    return figure


def _curve(axis: Axes, values: Floats, runs: int, look: style.Style) -> None:
    """The empirical distribution of sorted values, as a part of all runs."""
    percent = 100 * np.arange(1, len(values) + 1) / runs
    axis.step([values[0], *values], [0, *percent], where="post", color=look.colour, linestyle=look.line, linewidth=1.3)
    axis.plot(values, percent, look.marker, color=look.colour, markersize=5 if len(values) <= MANY else 2.5)


def _strip(axis: Axes, at: float, values: Floats, look: style.Style) -> None:
    """A mark for each of the sorted values, beside a line for the median and a line for each percentile."""
    median = float(np.median(values))
    rows = at + 0.5 * ((3 * np.arange(len(values))) % ROWS / (ROWS - 1) - 0.5)
    size = 5 if len(values) <= MANY else 3
    axis.plot(values - median, rows, look.marker, color=look.colour, markersize=size, alpha=0.6, markeredgewidth=0)
    for value, line in zip(_percentiles(values).values(), ("-", "--", ":"), strict=False):
        axis.plot([value - median] * 2, [at - 0.38, at + 0.38], color="black", linestyle=line, linewidth=1.2)


def _percentiles(values: Floats) -> dict[str, float]:
    """The median, and the percentiles that there are enough values for, by name."""
    known = {f"p{percent}": percentile(values, percent) for percent in (95, 99)}
    return {"median": float(np.median(values))} | {name: value for name, value in known.items() if value is not None}


def _label(name: str, values: Floats) -> str:
    return f"{name}\n{', '.join(f'{what} {value:.1f}' for what, value in _percentiles(values).items())}"
