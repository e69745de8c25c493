# SPDX-License-Identifier: GPL-2.0-or-later
"""The critical path of single runs, step by step."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Figure, own_settings
from experiments.draw.panels import MADE_BY
from experiments.trace.traced_run import TracedRun, stretches
from proto_v3.errors import UserError
from proto_v3.timeline import Resource
from sim.scenario.units import NS_PER_MS

LEAST_DRAWN_MS = 0.5
"""A shorter stretch of a critical path is not drawn."""


@own_settings()
def draw_path(
    runs: Mapping[str, TracedRun], made_by: str = MADE_BY, question: str = "What did the downtime wait for?"
) -> Figure:
    """The critical path of single runs as a staircase, ms: a step down is another track or resource.

    `runs` has each run under the name that its panel shows. UserError if there is none, or if one was not completed.
    """
    if not runs:
        raise UserError("runs: must have at least one run")
    paths = {name: stretches(run).filter(pl.col("takes_ms") >= LEAST_DRAWN_MS) for name, run in runs.items()}
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
    downtimes_ms = {name: run.timeline.downtime_ns / NS_PER_MS for name, run in runs.items()}
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        for at, (from_ms, takes_ms, resource, what, track, _) in enumerate(path.iter_rows()):
            style.bar(axis, at, takes_ms, style.RESOURCES[Resource[resource]], left=from_ms, height=0.9)
            axis.text(from_ms + takes_ms, at, f" {takes_ms:.1f} {what} ({track})", fontsize=7, va="center")
        panels.dress(axis, f"{name}: {downtimes_ms[name]:.1f} ms", "ms since the order to stop", "")
        axis.set_ylim(path.height, -1)
        axis.set_yticks([])
        axis.set_xlim(0, 1.3 * max(downtimes_ms.values()))
    panels.handles_below(figure, [style.patch(look) for look in style.RESOURCES.values()], 4)
    return figure
