# SPDX-License-Identifier: GPL-2.0-or-later
"""The figure of `proto-v3 fit`: a real downtime beside the simulated one, and what changes would bring."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.decision.bands import Brought
from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, own_settings
from experiments.draw.downtime import PHASES_NOTE
from experiments.draw.panels import MADE_BY
from experiments.logs.machine import AS_IT_WAS, FittedMachine
from sim.scenario.units import NS_PER_MS

REAL = style.Style("#555555", "", "the real migration")


@own_settings()
def draw_fit(machine: FittedMachine, brought: Sequence[Brought] = (), made_by: str = MADE_BY) -> Figure:
    """The phases of the real downtime and of the simulated one, ms, and below them what each change of `brought` gives.

    The foot of the figure shows `made_by` and the project's version.
    """
    rows = 3 if brought else 2
    heights = [1.5, 1.5, 0.42 * len(brought) + 0.5][:rows]
    figure = Figure(figsize=(9.5, 1.15 * sum(heights) + 1.6), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    real_ms = machine.waterfall.downtime_ms
    _phases(axes[0], "real", machine.waterfall.phases_ms, real_ms, REAL)
    simulated = {name: took / NS_PER_MS for name, took in machine.simulated.phases_ns.items()}
    own = machine.simulated.downtime_ns
    _phases(axes[1], "simulated", simulated, own and own / NS_PER_MS, style.protocol(AS_IT_WAS))
    if brought:
        _changes(axes[2], brought, real_ms)
    axes[-1].tick_params(labelbottom=True)
    axes[-1].set_xlabel("ms since the order to stop the vCPUs")
    axes[-1].set_xlim(left=0)
    axes[-1].margins(x=0.17)
    figure.suptitle(f"Where did the downtime go? {machine.scenario.name}\n\n", fontsize=12)
    above = 1 - 0.48 / figure.get_figheight()
    figure.text(0.5, above, PHASES_NOTE, ha="center", va="center", fontsize=7.5, color="#333333")
    panels.say_how_made(figure, made_by)
    return figure


def _phases(axis: Axes, title: str, phases_ms: dict[str, float], downtime_ms: float | None, look: style.Style) -> None:
    panels.waterfall(axis, phases_ms, look)
    panels.heading(axis, f"{title}: {'not told' if downtime_ms is None else f'{downtime_ms:.1f} ms'}")


def _changes(axis: Axes, brought: Sequence[Brought], real_ms: float | None) -> None:
    """Bars: medians; lines: from the 5th to the 95th percentile of the samples."""
    for at, each in enumerate(brought):
        band = each.levels.get("downtime_ms")
        if band is None or math.isinf(band.high):
            panels.beside(axis, each.rung.nothing or "some do not complete", 0, at)
            continue
        style.bar(axis, at, band.median, style.protocol(each.rung.protocol))
        axis.plot([band.low, band.high], [at, at], color="black", linewidth=1.4)
        panels.beside(axis, f"{band.median:.0f}", max(band.high, band.median), at)
    if real_ms is not None:
        axis.axvline(real_ms, color="black", linestyle=":", linewidth=1.2)
    axis.set_yticks(range(len(brought)), [each.rung.name for each in brought])
    axis.set_ylim(len(brought) - 0.5, -0.5)
    panels.heading(axis, "each change on top of those above it: medians, 5 to 95 % of the plausible machines")
    panels.bars(axis)
