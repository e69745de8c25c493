# SPDX-License-Identifier: GPL-2.0-or-later
"""The panels of the experiments' figures: curves and maps, each with its spread, in one style.

Curves show means with 95 % intervals (experiments.study.statistics). A place without a completed run has no point; a
place where some runs were not completed has a hollow one.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from experiments import __version__
from experiments.draw import style
from experiments.draw.canvas import Artist, Axes, AxesImage, ConstrainedLayoutEngine, Figure, Line2D
from experiments.runs.frame import COMPLETED
from experiments.runs.manifest import git_revision
from experiments.study.effects import Measure
from experiments.study.statistics import Interval, interval, share
from proto_v3.text import clean

MADE_BY = "experiments.api"
"""What a figure says at its foot if the caller names no command."""
MOST_CHARS = 1500
"""Of the command: a dozen lines."""
SMALL_PRINT: dict[str, Any] = {"fontsize": 6.5, "color": "#555555", "family": "monospace", "parse_math": False}
Curve = tuple[pl.DataFrame, style.Style]
"""The runs that a curve shows, and its look."""
Spot = tuple[float, Interval, bool]
"""A point of a curve: x, y with its interval, and whether some runs there were not completed."""


def sheet(
    question: str, note: str, command: str, panels: tuple[int, int], size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels under its question; `note` says in small print how to read them."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{question}\n\n", fontsize=12)
    figure.text(0.5, 1 - 0.46 / size[1], note, ha="center", va="center", fontsize=7.5, color="#333333")
    figure.text(0.5, 0.08 / size[1], how_made(command), ha="center", **SMALL_PRINT)
    return figure, list(figure.subplots(*panels, squeeze=False).flat)


def say_how_made(figure: Figure, command: str) -> None:
    """The command and the version, at the bottom."""
    figure.supxlabel(how_made(command), **SMALL_PRINT)


def how_made(command: str) -> str:
    """The command, the version and the git revision, wrapped."""
    made = f"{clean(command, MOST_CHARS)}  |  proto-v3 {__version__}, {git_revision()[:12]}"
    return textwrap.fill(re.sub(r",(?=\S)", ", ", made), 150, break_on_hyphens=False)  # lists of protocols are long


def heading(axis: Axes, title: str) -> None:
    """A panel's title."""
    axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")


def beside(axis: Axes, text: str, x: float, y: float, away: float = 4, fontsize: float = 8, **more: Any) -> None:
    """Text at a point's right, `away` points from it; at its left if that is negative."""
    side = "left" if away > 0 else "right"
    axis.annotate(text, (x, y), (away, 0), textcoords="offset points", fontsize=fontsize, ha=side, va="center", **more)


def seeds(runs: pl.DataFrame) -> str:
    """How many seeds the places of a table of runs have: `30`, or `5 to 30`."""
    by = [name for name in ("base", "settings", "protocol") if name in runs.columns]
    counts = runs.group_by(by).agg(pl.col("seed").n_unique())["seed"].unique().sort().to_list()
    return " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]])) or "no"


def dress(axis: Axes, title: str, x: str, y: str) -> None:
    """A panel's title and axes, with their units."""
    heading(axis, title)
    axis.set_xlabel(x, fontsize=8.5)
    axis.set_ylabel(y, fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def bars(axis: Axes, hidden: Sequence[str] = ("top", "right")) -> None:
    """The frame and the grid of a panel of horizontal bars."""
    axis.spines[list(hidden)].set_visible(False)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def waterfall(axis: Axes, phases_ms: Mapping[str, float], look: style.Style) -> None:
    """The phases of a downtime, ms, a bar each, from above; each begins where the one before it ends."""
    begin = 0.0
    for at, (phase, took_ms) in enumerate(phases_ms.items()):
        style.bar(axis, at, took_ms, look, left=begin, height=0.8)
        if at:
            axis.plot([begin, begin], [at - 1.4, at + 0.4], color="#888888", linewidth=0.7)
        begin += took_ms
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        beside(axis, f"{phase} {took_ms:.1f}", begin, at, bbox=box)
    axis.set_ylim(len(phases_ms) - 0.4, -0.6)
    axis.set_yticks([])
    bars(axis, ("top", "right", "left"))


def log2_axis(axis: Axes, ticks: Sequence[float]) -> None:
    """The x axis of a quantity that is doubled from tick to tick."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def say(axis: Axes, text: str) -> None:
    """Text in the middle of a panel that has nothing else to show."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center")


def by_protocol(frame: pl.DataFrame, protocols: Sequence[str]) -> list[Curve]:
    """A curve for each protocol, in its own look."""
    return [(frame.filter(protocol=name), style.protocol(name)) for name in protocols]


def panel(axis: Axes, curves: Iterable[Curve], measure: Measure, x: str, x_label: str) -> None:
    """Curves of the mean of a measure against column `x`; the measure's label is the title, its unit the y axis."""
    for runs, look in curves:
        curve(axis, runs, x, measure.column, look, scale=measure.scale)
    dress(axis, measure.label, x_label, measure.unit)


def curve(
    axis: Axes, runs: pl.DataFrame, x: str, y: str, look: style.Style, *, scale: float = 1.0, width: float = 1.5
) -> None:
    """The mean of column `y`, divided by `scale`, against column `x`."""
    spots = []
    for (at,), some in runs.group_by(x, maintain_order=True):
        values = some.filter(COMPLETED)[y].drop_nulls()
        if len(values):
            spots.append((float(at), interval(values.to_numpy() / scale), len(values) < some.height))
    draw_curve(axis, spots, look, width)


def completed(axis: Axes, frame: pl.DataFrame, x: str, protocols: Sequence[str]) -> None:
    """A curve for each protocol: the part of its runs that complete, %, with Wilson's interval."""
    for name in protocols:
        of_protocol = frame.filter(protocol=name).group_by(x, maintain_order=True)
        spots = [
            (float(at), share(some.filter(COMPLETED).height, some.height).percent, False) for (at,), some in of_protocol
        ]
        draw_curve(axis, spots, style.protocol(name))


def draw_curve(axis: Axes, spots: Sequence[Spot], look: style.Style, width: float = 1.5) -> None:
    """A line through the means, with a marker and the interval at each."""
    if not spots:
        return
    spots = sorted(spots, key=lambda spot: spot[0])
    at, means = [spot[0] for spot in spots], [spot[1].mean for spot in spots]
    axis.plot(at, means, color=look.colour, linestyle=look.line, linewidth=width, label=look.label, zorder=3)
    for x, y, hollow in spots:
        face = "white" if hollow else look.colour
        axis.plot([x], [y.mean], look.marker, color=look.colour, markerfacecolor=face, markersize=5, zorder=4)
        axis.plot([x, x], [y.low, y.high], color=look.colour, linewidth=3, alpha=0.35, zorder=2)


def legend(figure: Figure, protocols: Sequence[str], columns: int = 5) -> None:
    """The look of each protocol, below all panels."""
    handles_below(figure, [handle(style.protocol(name)) for name in protocols], columns)


def handle(look: style.Style) -> Line2D:
    """A curve's entry in a legend."""
    return Line2D([], [], color=look.colour, linestyle=look.line, marker=look.marker, markersize=5, label=look.label)


def handles_below(figure: Figure, handles: Sequence[Artist], columns: int = 5) -> None:
    """A legend between the panels and the command."""
    rows, height = -(-len(handles) // columns), figure.get_figheight()
    foot = 0.2 + 0.11 * max((text.get_text().count("\n") for text in figure.texts[1:]), default=0)  # the command
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, foot / height),
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    below = (0.1 + foot + 0.2 * rows) / height
    engine.set(rect=(0, below, 1, 1 - below))


def stack(axis: Axes, at: float, parts: Iterable[tuple[float, style.Style]], width: float, **edge: Any) -> None:
    """One bar of parts, from the bottom to the top; `edge` is passed to matplotlib."""
    bottom = 0.0
    for height, look in parts:
        axis.bar(at, height, width, bottom, color=look.colour, hatch=look.hatch, **edge)
        bottom += height


def heat(
    axis: Axes,
    squares: Sequence[Sequence[tuple[float, str]]],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    least: float,
    most: float,
) -> AxesImage:
    """A map with its rows from bottom to top: each square has a value (NaN is left white) and a text."""
    values = np.array([[value for value, _ in row] for row in squares], float).reshape(len(rows), len(columns))
    image = axis.imshow(values, origin="lower", aspect="auto", cmap="cividis", vmin=least, vmax=most)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(values):
        dark = np.isfinite(value) and (value - least) / max(most - least, 1e-12) < 0.55
        ink = "white" if dark else "black"
        axis.text(column, row, squares[row][column][1], ha="center", va="center", fontsize=7, color=ink)
    return image
