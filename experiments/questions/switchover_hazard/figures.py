"""The figures of switchover_hazard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.questions.switchover_hazard.grid import (
    FOR_SURE,
    GAVE_UP,
    LATE,
    NO_ACK,
    ONE_SHOT,
    ONE_SHOT_REINIT,
    PAID,
    POLICIES,
    POLLS,
    RATE,
    REUSABLE,
    REUSABLE_INVALIDATE,
    STOOD_STILL,
    TOO_LATE,
    expected,
    window_ms,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.experiment import kinds_told, places
from experiments.study.statistics import Interval, interval, share

Curves = Sequence[tuple[str, str]]
"""Protocol, and which of its runs are counted."""
FAMILIES: Sequence[tuple[str, Curves]] = (
    (
        "v2 without a last look: paid in the downtime",
        [(mode + user, PAID) for mode in (NO_ACK, ONE_SHOT, ONE_SHOT_REINIT) for user in ("", POLLS)],
    ),
    (
        "v2 with the reusable ack: FAILED",
        [(mode + user, GAVE_UP) for mode in (REUSABLE, REUSABLE_INVALIDATE) for user in ("", POLLS)],
    ),
    (
        "v3: paid in the downtime (proceed), or stop taken back (retry)",
        [(name, TOO_LATE) for name in POLICIES],
    ),
)
COST_OF = (NO_ACK, ONE_SHOT, ONE_SHOT_REINIT, REUSABLE, *POLICIES)
APART_PER_S = 0.11
"""Curves lie over one another: each is drawn so much beside the next."""


def figures(random: pl.DataFrame, sure: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """How often, against the rate; and what one costs, by policy."""
    return {"switchover_hazard": how_often(random, command), "switchover_hazard_cost": what_it_costs(sure, command)}


def how_often(random: pl.DataFrame, command: str) -> Figure:
    """The share of runs in which it is too late, by family; and the set-up that this puts into the downtime."""
    figure, axes = charts.sheet(
        "How often does critical data come too late for the stop?",
        f"{random['seed'].n_unique()} seeds a point, put apart sideways; Wilson's 95 % intervals, in the last panel of "
        "the mean",
        command,
        (2, 2),
        (12, 9.2),
    )
    for axis, (title, curves) in zip(axes, FAMILIES, strict=False):
        for at, (name, column) in enumerate(curves):
            told = _shares(random.filter(pl.col("protocol") == name), column)
            _curve(axis, told, name, APART_PER_S * (at - (len(curves) - 1) / 2))
        _expected(axis, random)
        charts.dress(axis, title, "reconfigurations a second", "% of runs")
    for at, name in enumerate(COST_OF):
        told = _setups(random.filter(pl.col("protocol") == name))
        _curve(axes[3], told, name, APART_PER_S * (at - (len(COST_OF) - 1) / 2))
    charts.dress(axes[3], "set-up in the downtime, of runs that complete", "reconfigurations a second", "ms")
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
    window = f"chance of a reconfiguration in the {window_ms():g} ms in which the vCPUs stop"
    charts.handles_below(figure, [Line2D([], [], color="black", linestyle=":", label=window)])
    return figure


Told = list[tuple[float, Interval]]
"""Rate, and what was found there."""


def _shares(runs: pl.DataFrame, column: str) -> Told:
    """Per cent."""
    told = [(at[RATE], share(int(of[column].sum()), of.height)) for at, of in places(runs, [RATE])]
    return [(rate, Interval(100 * of.mean, 100 * of.low, 100 * of.high, of.count)) for rate, of in told]


def _setups(runs: pl.DataFrame) -> Told:
    """Milliseconds."""
    done = places(runs.filter(COMPLETED), [RATE])
    return [(at[RATE], interval(of["setup_in_downtime_ns"].to_numpy() / 1e6)) for at, of in done]


def _curve(axis: Axes, told: Told, name: str, aside: float) -> None:
    if not told:
        return
    told, known = sorted(told, key=lambda place: place[0]), style.protocol(name)
    axis.plot(
        [rate + aside for rate, _ in told],
        [of.mean for _, of in told],
        color=known.colour,
        linestyle=known.line,
        linewidth=1.3,
        marker=known.marker,
        markersize=5.5,
        label=known.label,
        zorder=3,
    )
    for rate, of in told:
        axis.plot([rate + aside] * 2, [of.low, of.high], color=known.colour, linewidth=2.5, alpha=0.45, zorder=2)


def _expected(axis: Axes, random: pl.DataFrame) -> None:
    if random.height:
        rates = np.linspace(0, 1.05 * number(random[RATE].max()), 100)
        axis.plot(rates, 100 * expected(rates), color="black", linestyle=":", linewidth=1.3)


def what_it_costs(sure: pl.DataFrame, command: str) -> Figure:
    """How long the guest stands still where one reconfiguration of a given size came too late."""
    sizes = [(at[LATE], runs) for at, runs in places(sure, [LATE])]
    figure, axes = charts.sheet(
        "What does a reconfiguration cost that comes while the vCPUs are stopped?",
        f"{sure['seed'].n_unique()} seeds, one reconfiguration each, 10 ms after the first order to stop; means of "
        "downtime and pauses, black: their 95 % interval; set-up: what of it fell into the downtime",
        command,
        (1, max(1, len(sizes))),
        (12, 4.6),
    )
    for axis, (size, runs) in zip(axes, sizes, strict=False):
        _bars(axis, runs)
        charts.dress(axis, f"{size} objects made new", "ms that the guest stands still", "")
        if axis is axes[0]:
            axis.set_yticks(range(len(FOR_SURE)), FOR_SURE, fontsize=8)
        else:
            axis.set_yticks(range(len(FOR_SURE)), [""] * len(FOR_SURE))
        axis.invert_yaxis()
    widest = max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.set_xlim(0, widest * 1.35)
    pause = Patch(facecolor="white", edgecolor="black", hatch="////", label="pauses of retries, before it")
    charts.handles_below(figure, [Patch(facecolor="#888888", edgecolor="black", label="downtime"), pause])
    return figure


def _bars(axis: Axes, runs: pl.DataFrame) -> None:
    for at, name in enumerate(FOR_SURE):
        of = runs.filter(pl.col("protocol") == name)
        done = of.filter(COMPLETED)
        if done.is_empty():
            kinds = kinds_told(of)
            axis.text(10, at, kinds or "no run", va="center", fontsize=7.5)
            continue
        known = style.protocol(name)
        down = float(done["downtime_ns"].to_numpy().mean()) / 1e6
        still = interval(done[STOOD_STILL].to_numpy() / 1e6)
        setup = float(done["setup_in_downtime_ns"].to_numpy().mean()) / 1e6
        axis.barh(at, down, color=known.colour, edgecolor="black", linewidth=0.6)
        if still.mean > down:
            axis.barh(at, still.mean - down, left=down, color="white", edgecolor="black", hatch="////", linewidth=0.6)
        axis.plot([still.low, still.high], [at, at], color="black", linewidth=2)
        cut = f"; {done.height} of {of.height} runs" if done.height < of.height else ""
        axis.text(still.high, at, f"  {still.mean:.0f}; set-up {setup:.0f}{cut}", va="center", fontsize=7)
