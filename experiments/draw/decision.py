# SPDX-License-Identifier: GPL-2.0-or-later
"""The figure of the decision table: the downtime with each change, and how probably the change is worth making."""

from __future__ import annotations

import math

from experiments.decision.bands import Brought
from experiments.decision.decision import Decision
from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, own_settings
from experiments.draw.panels import MADE_BY
from experiments.study.claims import WORTH

BAR = style.Style("#6BAED6", "", "")
GREY = "#888888"


@own_settings()
def draw_decision(decision: Decision, made_by: str = MADE_BY) -> Figure:
    """One row a change, each on top of those above it. Left: the downtime, ms, median and band over the samples. Right:
    in how many % of the samples the change takes more than 5 % off the row above, and the parameter that decides most.

    The foot of the figure shows `made_by` and the project's version.
    """
    rows = decision.rows
    figure, (downtimes, worth) = panels.sheet(
        f"What to change first? {decision.scenario.name}",
        f"each change on top of those above it; {decision.samples} plausible machines: medians, and 5 to 95 %",
        made_by,
        (1, 2),
        (11, 0.36 * len(rows) + 1.9),
    )
    for at, row in enumerate(rows):
        if row.made:
            _downtime(downtimes, at, row)
            _worth(worth, at, row, decision)
        else:
            panels.beside(downtimes, f"not run: {row.rung.nothing}"[:60], 0, at, fontsize=7, color=GREY)
    downtimes.set_yticks(range(len(rows)), [row.rung.name for row in rows])
    worth.set_yticks(range(len(rows)), [""] * len(rows))
    worth.set_xlim(0, 100)
    downtimes.set_xlim(left=0)
    downtimes.margins(x=0.15)
    for axis, title in (
        (downtimes, "downtime, ms"),
        (worth, f"% of the machines in which it brings more than {100 * WORTH:.0f} %"),
    ):
        axis.set_ylim(len(rows) - 0.5, -0.5)
        panels.heading(axis, title)
        panels.bars(axis)
        axis.set_xlabel(" ")  # room for the foot
    return figure


def _downtime(axis: Axes, at: int, row: Brought) -> None:
    band = row.levels["downtime_ms"]
    assert band is not None
    if math.isinf(band.median):
        panels.beside(axis, "more than half do not complete", 0, at)
        return
    style.bar(axis, at, band.median, style.protocol(row.rung.protocol))
    high = band.high if math.isfinite(band.high) else band.median
    axis.plot([band.low, high], [at, at], color="black", linewidth=1.4)
    fails = f", {row.failed} of {row.samples} fail" if row.failed else ""
    panels.beside(axis, f"{band.median:.0f}{fails}", high, at)


def _worth(axis: Axes, at: int, row: Brought, decision: Decision) -> None:
    if row.probability is None:
        return
    percent = 100 * row.probability
    style.bar(axis, at, percent, BAR)
    top = next((each for each in decision.indices.get(row.rung.name, ()) if each.told), None)
    text = f"{percent:.0f} %" + (f", by {top.key}" if top else "")
    if percent > 50:
        panels.beside(axis, text, percent, at, -4, fontsize=7.5)
    else:
        panels.beside(axis, text, percent, at, fontsize=7.5)
