"""Panels that the experiments' figures are made of: curves and maps, each with its spread, in the one style.

Curves are means with 95 % intervals drawn (experiments.study.statistics); a place without a completed run is no
point, and a place where some were not completed is drawn hollow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from experiments.draw import style
from experiments.draw.downtime import how_made
from experiments.runs.frame import COMPLETED
from experiments.study.statistics import Interval, interval, share


def sheet(
    question: str, told: str, command: str, panels: tuple[int, int], size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels under its question; `told` is what the reader has to know, in small print."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{question}\n\n", fontsize=12)
    figure.text(0.5, 1 - 0.46 / size[1], told, ha="center", va="center", fontsize=7.5, color="#333333")
    figure.text(0.5, 0.08 / size[1], how_made(command), ha="center", fontsize=6.5, color="#555555", family="monospace")
    return figure, list(figure.subplots(*panels, squeeze=False).flat)


def dress(axis: Axes, title: str, x: str, y: str) -> None:
    """A panel's title and axes, with their units."""
    axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    axis.set_xlabel(x, fontsize=8.5)
    axis.set_ylabel(y, fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def curves(
    axis: Axes, frame: pl.DataFrame, x: str, y: str, *, scale: float = 1.0, protocols: Sequence[str] | None = None
) -> None:
    """A curve for each protocol: the mean of column `y`, divided by `scale`, against column `x`."""
    for name in protocols or frame["protocol"].unique(maintain_order=True):
        curve(axis, frame.filter(pl.col("protocol") == name), x, y, style.protocol(name), scale=scale)


def curve(
    axis: Axes, runs: pl.DataFrame, x: str, y: str, look: style.Style, *, scale: float = 1.0, width: float = 1.5
) -> None:
    """One curve, in a look of its own."""
    places = []
    for (at,), some in runs.group_by(x, maintain_order=True):
        values = some.filter(COMPLETED)[y].drop_nulls()
        if len(values):
            places.append((float(at), interval(values.to_numpy() / scale), len(values) < some.height))
    _drawn(axis, places, look, width)


def completed(axis: Axes, frame: pl.DataFrame, x: str, protocols: Sequence[str]) -> None:
    """A curve for each protocol: which part of its runs completes, %, with Wilson's interval."""
    for name in protocols:
        places = []
        for (at,), some in frame.filter(pl.col("protocol") == name).group_by(x, maintain_order=True):
            told = share(some.filter(COMPLETED).height, some.height)
            places.append((float(at), Interval(100 * told.mean, 100 * told.low, 100 * told.high, told.count), False))
        _drawn(axis, places, style.protocol(name), 1.5)


def _drawn(axis: Axes, places: list[tuple[float, Interval, bool]], look: style.Style, width: float) -> None:
    """Where, what was found there, and whether some runs of it were not completed."""
    places.sort(key=lambda place: place[0])
    if not places:
        return
    at, means = [place[0] for place in places], [place[1].mean for place in places]
    axis.plot(at, means, color=look.colour, linestyle=look.line, linewidth=width, label=look.label, zorder=3)
    for place, told, cut in places:
        face = "white" if cut else look.colour
        axis.plot([place], [told.mean], look.marker, color=look.colour, markerfacecolor=face, markersize=5, zorder=4)
        axis.plot([place, place], [told.low, told.high], color=look.colour, linewidth=3, alpha=0.35, zorder=2)


def legend(figure: Figure, protocols: Sequence[str], columns: int = 5) -> None:
    """What each protocol looks like, below all panels."""
    handles_below(figure, [handle(style.protocol(name)) for name in protocols], columns)


def handle(look: style.Style) -> Line2D:
    """A curve in a legend."""
    return Line2D([], [], color=look.colour, linestyle=look.line, marker=look.marker, markersize=5, label=look.label)


def handles_below(figure: Figure, handles: Sequence[Artist], columns: int = 5) -> None:
    """A legend between the panels and the command."""
    rows, height = -(-len(handles) // columns), figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.2 / height),
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    below = (0.3 + 0.2 * rows) / height
    engine.set(rect=(0, below, 1, 1 - below))


def heat(
    axis: Axes,
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    least: float,
    most: float,
    colours: str = "cividis",
    text: Sequence[Sequence[str]] | None = None,
) -> AxesImage:
    """A map, rows from below to above; NaN is left white, `text` stands in the squares."""
    image = axis.imshow(values, origin="lower", aspect="auto", cmap=colours, vmin=least, vmax=most)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(values):
        if text is not None:
            dark = np.isfinite(value) and (value - least) / max(most - least, 1e-12) < 0.55
            ink = "white" if dark else "black"
            axis.text(column, row, text[row][column], ha="center", va="center", fontsize=7, color=ink)
    return image
