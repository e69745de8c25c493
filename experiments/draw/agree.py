# SPDX-License-Identifier: GPL-2.0-or-later
"""The figure of `proto-v3 agree`: phases in virtual time and live, and the ratio of every figure."""

from __future__ import annotations

from typing import Any

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, own_settings
from experiments.runs.frame import COMPLETED, ms, protocols

PHASE_LOOKS = [
    style.Style("#BBBBBB", "", "stop"),
    style.Style("#E69F00", "//", "drain"),
    style.Style("#56B4E9", "..", "transfer"),
    style.Style("#D55E00", "xx", "load"),
    style.Style("#777777", "", "config"),
    style.Style("#DDDDDD", "\\\\", "resume"),
]
FARTHEST = 0.5
"""Ratios further from 1 are drawn at this distance, each with its number beside it."""
HOLLOW = {("live", "ratio"): False, ("real", "real_ratio"): True}
"""How runs were made, and the column of their ratios (experiments.commands.agree): whether their markers are hollow."""


@own_settings()
def agreement(scenario: str, frame: pl.DataFrame, compared: pl.DataFrame, aim: float, command: str) -> Figure:
    """`frame` has one row a run, under both clocks; `compared` has one row a protocol and figure
    (experiments.commands.agree). A ratio within `aim` of 1 is within the grey band."""
    named = protocols(compared)
    shown = compared.filter(pl.col("ratio").is_not_null())
    figures = list(shown["figure"].unique(maintain_order=True))
    figure = Figure(figsize=(12, max(4.2, 0.27 * len(figures) + 0.4 * len(named) + 2)), layout="constrained")
    bars, ratios = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1]})
    _bars(bars, frame.filter(COMPLETED), named)
    _ratios(ratios, shown, figures, named, aim)
    runs = frame.filter(clock="live")["seed"].n_unique()
    what = "live and a real run take" if "real" in frame["clock"] else "live run take"
    figure.suptitle(f"Does a {what} what the simulation says? {scenario}, medians of {runs} run(s)", fontsize=12)
    panels.say_how_made(figure, command)
    return figure


def _bars(axis: Axes, completed: pl.DataFrame, named: list[str]) -> None:
    labels = []
    clocks = completed["clock"].unique(maintain_order=True)
    for at, (name, clock) in enumerate((name, clock) for name in named for clock in clocks):
        runs = completed.filter(protocol=name, clock=clock)
        labels.append(f"{name}, {clock}")
        begin = 0.0
        for look in PHASE_LOOKS:
            median = ms(runs[f"phase_{look.label}_ns"].median())
            style.bar(axis, at, median, look, left=begin)
            begin += median
        downtime = runs["downtime_ns"]
        least, middle, most = ms(downtime.min()), ms(downtime.median()), ms(downtime.max())
        axis.plot([least, most], [at, at], color="black", linewidth=1.4)
        panels.beside(axis, f"{middle:.0f}", max(begin, most), at)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlim(0, ms(completed["downtime_ns"].max()) * 1.1)
    axis.set_xlabel("ms; number: median downtime; black line: least to most")
    panels.heading(axis, "phases of the downtime")
    _finish(axis, handles=[style.patch(look) for look in PHASE_LOOKS], ncols=6)


def _ratios(axis: Axes, shown: pl.DataFrame, figures: list[str], named: list[str], aim: float) -> None:
    axis.axvspan(1 - aim, 1 + aim, color="#E4E4E4", linewidth=0)
    axis.axvline(1, color="#666666", linewidth=0.8)
    columns = [(clock, column) for clock, column in HOLLOW if column in shown.columns]
    for order, name in enumerate(named):
        look = style.protocol(name)
        for row in shown.filter(protocol=name).iter_rows(named=True):
            for clock, column in columns:
                at = figures.index(row["figure"]) + 0.24 * (order - (len(named) - 1) / 2)
                _ratio(axis, row[column], at, look, hollow=HOLLOW[clock, column])
        for clock, column in columns:
            face = "white" if HOLLOW[clock, column] else look.colour
            label = name if len(columns) == 1 else f"{name}, {clock}"
            axis.plot([], [], look.marker, color=look.colour, markerfacecolor=face, label=label)
    axis.set_yticks(range(len(figures)), figures, fontsize=8)
    axis.set_ylim(len(figures) - 0.4, -0.6)
    axis.set_xlim(1 - FARTHEST - 0.04, 1 + FARTHEST + 0.04)
    axis.set_xlabel(" or ".join(f"{clock} / virtual" for clock, _ in columns))
    panels.heading(axis, f"ratio of every figure; grey: within {100 * aim:.0f} %")
    axis.grid(axis="y", color="#EEEEEE", linewidth=0.6)
    _finish(axis, ncols=4)


def _ratio(axis: Axes, ratio: float | None, at: float, look: style.Style, *, hollow: bool) -> None:
    """A ratio in the line `at`."""
    if ratio is None:
        return
    x = 1 + max(-FARTHEST, min(ratio - 1, FARTHEST))
    face = "white" if hollow else look.colour
    axis.plot([x], [at], look.marker, color=look.colour, markerfacecolor=face, markersize=6)
    if x != ratio:
        panels.beside(axis, f"{ratio:.2f}", x, at, -7 if ratio > 1 else 7, 7.5)


def _finish(axis: Axes, **legend: Any) -> None:
    """The frame of a panel, and its legend below it."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, frameon=False, **legend)
