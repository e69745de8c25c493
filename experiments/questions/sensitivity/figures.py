# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of sensitivity: a tornado for each conclusion, and the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from experiments.draw import panels
from experiments.draw.canvas import Axes, Figure, Line2D, Patch
from experiments.questions.sensitivity.grid import CONCLUSIONS, V3
from experiments.questions.sensitivity.question import FEWEST, Bar, bars, base, maps_run, sides, square
from experiments.study.claims import WORTH
from experiments.study.effects import NOT_BOTH
from experiments.study.statistics import Effect

BARS = 15
"""In a tornado; the others are in effects.parquet."""
LOW_COLOUR, HIGH_COLOUR = "#9ECAE1", "#08519C"


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """The tornados, and the maps if they were run."""
    drawn = {"sensitivity": _tornados(frame, command)}
    return drawn | ({"sensitivity_region": _region(frame, command)} if maps_run(frame) else {})


def _tornados(frame: pl.DataFrame, command: str) -> Figure:
    note = (
        f"ratio of downtimes; bars from the base's ratio (line) to that at the parameter's ends, "
        f"{panels.seeds(frame)} paired seeds, with 95 % intervals; the {BARS} longest. Dashed: a gain of "
        f"{100 * WORTH:.0f} %. x: less than {FEWEST} seeds completed by both"
    )
    figure, axes = panels.sheet("Which parameters does v3's gain hang on?", note, command, (2, 2), (13, 11))
    for axis, conclusion in zip(axes, CONCLUSIONS, strict=True):
        _tornado(axis, bars(frame, conclusion), base(frame, conclusion))
        title = f"({conclusion.mark}) against {conclusion.against},\n{conclusion.base}"
        panels.dress(axis, title, f"downtime of {V3} / of {conclusion.against} (ratio)", "")
        axis.tick_params(axis="y", labelsize=7)
    handles = [
        Patch(facecolor=LOW_COLOUR, edgecolor="black", hatch="//", linewidth=0.5, label="parameter at its low end"),
        Patch(facecolor=HIGH_COLOUR, edgecolor="black", linewidth=0.5, label="parameter at its high end"),
        Line2D([], [], color="black", linewidth=1, label="base, with its interval"),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"gain of {100 * WORTH:.0f} %"),
    ]
    panels.handles_below(figure, handles, 4)
    return figure


def _tornado(axis: Axes, found: Sequence[Bar], at_base: Effect | None) -> None:
    """The longest bars, and below them those that have no ratio at an end."""
    shown = [*found[:BARS], *(bar for bar in found[BARS:] if not (bar.low.found and bar.high.found))]
    labels = [f"{bar.parameter}: {bar.low.at} to {bar.high.at}" for bar in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=7.5)
    axis.axvline(1 - WORTH, color="black", linestyle="--", linewidth=1)
    if at_base is None:
        panels.say(axis, f"at the base {NOT_BOTH}")
        return
    middle = at_base.ratio.mean
    axis.axvspan(at_base.ratio.low, at_base.ratio.high, color="#BBBBBB", alpha=0.5, linewidth=0)
    axis.axvline(middle, color="black", linewidth=1)
    for place, bar in enumerate(shown):
        ends = ((bar.low, LOW_COLOUR, "//", place - 0.16), (bar.high, HIGH_COLOUR, "", place + 0.16))
        for end, colour, hatch, y in ends:
            if end.found is None:
                text = f"  x {'low' if end is bar.low else 'high'} end: too few"
                axis.text(middle, y, text, fontsize=6.5, va="center", ha="left").set_in_layout(False)
                continue
            look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.4}
            ratio = end.found.ratio
            axis.barh(y, ratio.mean - middle, 0.32, middle, zorder=3, **look)
            axis.plot([ratio.low, ratio.high], [y, y], color="#D55E00", linewidth=2, zorder=4)
    axis.invert_yaxis()


def _region(frame: pl.DataFrame, command: str) -> Figure:
    shown = maps_run(frame)
    title = f"For which device does v3 bring less than {100 * WORTH:.0f} %?"
    note = (
        f"gain of {V3} in downtime, %, with its 95 % interval; white: not completed by both; "
        f"at the orange line it passes {100 * WORTH:.0f} %, in the mean"
    )
    figure, axes = panels.sheet(title, note, command, (1, len(shown)), (5 * len(shown), 5))
    for axis, (of, against) in zip(axes, shown, strict=True):
        engines, values = sides(frame, of)
        squares = [[_square(square(frame, of, each, value, against)) for value in values] for each in engines]
        gains = np.array([[gain for gain, _ in row] for row in squares])
        most = max(40.0, float(np.nanmax(gains))) if np.isfinite(gains).any() else 40.0
        columns, rows = ([f"{each:g}" for each in side] for side in (values, engines))
        panels.heat(axis, squares, columns, rows, least=0, most=most)
        _border(axis, gains < 100 * WORTH)
        panels.dress(axis, f"against {against}, {of.base}", of.label, "firmware engines")
        axis.grid(visible=False)
    text = f"between less than {100 * WORTH:.0f} % and more, in the mean"
    panels.handles_below(figure, [Line2D([], [], color="#D55E00", linewidth=3, label=text)])
    return figure


def _square(found: Effect | None) -> tuple[float, str]:
    """The gain in per cent, and the text of the square."""
    if found is None:
        return np.nan, "-"
    gain = found.gain
    return gain.mean, f"{gain.mean:.1f}\n{gain.low:.1f} to {gain.high:.1f}"


def _border(axis: Axes, under: np.ndarray) -> None:
    """A line around the squares in which the gain is too small."""
    rows, columns = under.shape
    for row, column in np.ndindex(rows, columns):
        for other, x, y in (
            ((row + 1, column), [column - 0.5, column + 0.5], [row + 0.5] * 2),
            ((row, column + 1), [column + 0.5] * 2, [row - 0.5, row + 0.5]),
        ):
            if other[0] < rows and other[1] < columns and under[row, column] != under[other]:
                axis.plot(x, y, color="white", linewidth=5, zorder=3, solid_capstyle="projecting")
                axis.plot(x, y, color="#D55E00", linewidth=3, zorder=4, solid_capstyle="projecting")
