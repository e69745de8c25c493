# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of switchover_hazard: how often critical data comes too late, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, Line2D, Patch
from experiments.questions.switchover_hazard import question
from experiments.questions.switchover_hazard.question import BLIND, FOR_SURE, LATE, POLICIES, POLLS, RATE, REUSABLE
from experiments.runs.frame import COMPLETED, completed_text, number
from experiments.study.effects import mean, outcome_counts, places
from experiments.study.statistics import Interval, share

FAMILIES = (
    ("v2 without a final check: paid in the downtime", BLIND, ("", POLLS), question.PAID),
    ("v2 with the reusable ack: FAILED", (REUSABLE, question.REUSABLE_INVALIDATE), ("", POLLS), question.GAVE_UP),
    ("v3: paid in the downtime (proceed), or stop taken back (retry)", POLICIES, ("",), question.TOO_LATE),
)
"""Title, modes, users, and the column whose runs are counted."""
COST_OF = (*BLIND, REUSABLE, *POLICIES)
APART_PER_S = 0.11
"""Curves lie over one another: each is drawn this far beside the next."""


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """How often, against the rate; and what one reconfiguration costs, by policy."""
    return {
        "switchover_hazard": _how_often(question.at_random(frame), command),
        "switchover_hazard_cost": _what_it_costs(question.for_sure(frame), command),
    }


def _how_often(random: pl.DataFrame, command: str) -> Figure:
    """The share of runs in which it is too late, by family; and the set-up that this puts into the downtime."""
    title = "How often does critical data come too late for the stop?"
    note = (
        f"{panels.seeds(random)} seeds a point, put apart sideways; Wilson's 95 % intervals, in the last panel of "
        "the mean"
    )
    figure, axes = panels.sheet(title, note, command, (2, 2), (12, 9.2))
    for axis, (title, modes, users, column) in zip(axes, FAMILIES, strict=False):
        names = [mode + user for mode in modes for user in users]
        for at, name in enumerate(names):
            of = places(random.filter(protocol=name), [RATE])
            shares = {place[RATE]: share(int(runs[column].sum()), runs.height).percent for place, runs in of}
            _curve(axis, shares, name, APART_PER_S * (at - (len(names) - 1) / 2))
        if random.height:
            rates = np.linspace(0, 1.05 * number(random[RATE].max()), 100)
            axis.plot(rates, 100 * question.expected(rates), color="black", linestyle=":", linewidth=1.3)
        panels.dress(axis, title, "reconfigurations a second", "% of runs")
    for at, name in enumerate(COST_OF):
        done = places(random.filter(COMPLETED, protocol=name), [RATE])
        setups = {place[RATE]: setup for place, runs in done if (setup := mean(runs, "setup_in_downtime_ns"))}
        _curve(axes[3], setups, name, APART_PER_S * (at - (len(COST_OF) - 1) / 2))
    panels.dress(axes[3], "set-up in the downtime, of runs that complete", "reconfigurations a second", "ms")
    axes[0].set_ylim(0, 150)
    axes[0].set_yticks(range(0, 101, 20))
    top = max(axis.get_ylim()[1] for axis in axes[1:3])
    for axis in axes[1:3]:
        axis.set_ylim(0, 1.3 * top)
    axes[3].set_yscale("symlog", linthresh=1)
    axes[3].set_ylim(0, 1e5)
    axes[3].set_yticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1000"])
    for axis in axes:
        axis.set_xlim(left=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False, ncols=2 if axis in (axes[0], axes[3]) else 1, loc="upper left")
    window = f"chance of a reconfiguration in the {question.window_ms():g} ms in which the vCPUs stop"
    panels.handles_below(figure, [Line2D([], [], color="black", linestyle=":", label=window)])
    return figure


def _curve(axis: Axes, found: Mapping[float, Interval], protocol: str, aside: float) -> None:
    """By rate."""
    if not found:
        return
    rates, look = sorted(found), style.protocol(protocol)
    axis.plot(
        [rate + aside for rate in rates],
        [found[rate].mean for rate in rates],
        color=look.colour,
        linestyle=look.line,
        linewidth=1.3,
        marker=look.marker,
        markersize=5.5,
        label=look.label,
        zorder=3,
    )
    for rate in rates:
        y = [found[rate].low, found[rate].high]
        axis.plot([rate + aside] * 2, y, color=look.colour, linewidth=2.5, alpha=0.45, zorder=2)


def _what_it_costs(sure: pl.DataFrame, command: str) -> Figure:
    """How long the guest stands still where one reconfiguration of a given size came too late."""
    sizes = [(at[LATE], runs) for at, runs in places(sure, [LATE])]
    title = "What does a reconfiguration cost that comes while the vCPUs are stopped?"
    note = (
        f"{panels.seeds(sure)} seeds, one reconfiguration each, 10 ms after the first order to stop; means of "
        "downtime and pauses, black: their 95 % interval; set-up: what of it fell into the downtime"
    )
    figure, axes = panels.sheet(title, note, command, (1, max(1, len(sizes))), (12, 4.6))
    for axis, (size, runs) in zip(axes, sizes, strict=False):
        _bars(axis, runs)
        panels.dress(axis, f"{size} objects made new", "ms that the guest stands still", "")
        labels = FOR_SURE if axis is axes[0] else [""] * len(FOR_SURE)
        axis.set_yticks(range(len(FOR_SURE)), labels, fontsize=8)
        axis.invert_yaxis()
    widest = max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.set_xlim(0, widest * 1.35)
    pause = Patch(facecolor="white", edgecolor="black", hatch="////", label="pauses of retries, before it")
    panels.handles_below(figure, [Patch(facecolor="#888888", edgecolor="black", label="downtime"), pause])
    return figure


def _bars(axis: Axes, runs: pl.DataFrame) -> None:
    for at, name in enumerate(FOR_SURE):
        of = runs.filter(protocol=name)
        down, still, setup = (
            mean(of, column) for column in ("downtime_ns", question.STOOD_STILL, "setup_in_downtime_ns")
        )
        if down is None or still is None or setup is None:
            axis.text(10, at, outcome_counts(of) or "no run", va="center", fontsize=7.5)
            continue
        edge: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.6}
        axis.barh(at, down.mean, color=style.protocol(name).colour, **edge)
        if still.mean > down.mean:
            axis.barh(at, still.mean - down.mean, left=down.mean, color="white", hatch="////", **edge)
        axis.plot([still.low, still.high], [at, at], color="black", linewidth=2)
        cut = f"; {completed_text(of)} runs" if of.filter(~COMPLETED).height else ""
        axis.text(still.high, at, f"  {still.mean:.0f}; set-up {setup.mean:.0f}{cut}", va="center", fontsize=7)
