"""The critical path of single runs, step by step."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.draw import panels, style
from experiments.trace.path import LEAST_DRAWN_MS, stretches
from proto_v3.timeline import Resource, Timeline
from sim.scenario.units import NS_PER_MS


def staircase(question: str, timelines: Mapping[str, Timeline], made_by: str) -> Figure:
    """The critical path of one run of each protocol as a staircase: a step down is another track or resource."""
    paths = {name: stretches(each).filter(pl.col("takes_ms") >= LEAST_DRAWN_MS) for name, each in timelines.items()}
    rows = [path.height for path in paths.values()]
    figure, axes = panels.sheet(
        question,
        f"one run each; what takes less than {LEAST_DRAWN_MS:g} ms is left out, and what happens beside it is not on "
        "the path",
        made_by,
        (len(paths), 1),
        (10, 0.19 * sum(rows) + 0.8 * len(paths) + 1.3),
    )
    if grid := axes[0].get_gridspec():
        grid.set_height_ratios(rows)
    most_ms = max(timeline.downtime_ns for timeline in timelines.values()) / NS_PER_MS
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        for at, (from_ms, takes_ms, resource, what, track, _) in enumerate(path.iter_rows()):
            look = style.RESOURCES[Resource[resource]]
            axis.barh(
                at, takes_ms, left=from_ms, height=0.9, color=look.colour, hatch=look.hatch, edgecolor="white", lw=0
            )
            axis.text(from_ms + takes_ms, at, f" {takes_ms:.1f} {what} ({track})", fontsize=7, va="center")
        downtime_ms = timelines[name].downtime_ns / NS_PER_MS
        panels.dress(axis, f"{name}: {downtime_ms:.1f} ms", "ms since the order to stop", "")
        axis.set_ylim(path.height, -1)
        axis.set_yticks([])
        axis.set_xlim(0, 1.3 * most_ms)
    looks = style.RESOURCES.values()
    handles = [Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=look.label) for look in looks]
    panels.handles_below(figure, handles, 4)
    return figure
