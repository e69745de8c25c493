"""The figures of experiments/questions/sensitivity/question.py: a tornado for each conclusion, and the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.draw import panels as charts
from experiments.questions.sensitivity.bars import FEWEST, Bar, bars, base, maps_run, ratio_of, sides, square
from experiments.questions.sensitivity.grid import CONCLUSIONS, V3
from experiments.study.experiment import NOT_BOTH, WORTH
from experiments.study.statistics import Effect, Interval

BARS = 15
"""In a tornado; the others are in effects.parquet."""
LOW_COLOUR, HIGH_COLOUR = "#9ECAE1", "#08519C"


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """The tornados, and the maps."""
    told = {"sensitivity": _tornados(frame, command)}
    return told | ({"sensitivity_region": _region(frame, command)} if maps_run(frame) else {})


def _tornados(frame: pl.DataFrame, command: str) -> Figure:
    seeds = frame["seed"].n_unique()
    figure, axes = charts.sheet(
        "Which parameters does v3's gain hang on?",
        f"ratio of downtimes; bars from the base's ratio (line) to that at the parameter's ends, {seeds} paired seeds, "
        f"with 95 % intervals; the {BARS} longest. Dashed: a gain of {100 * WORTH:.0f} %. x: less than {FEWEST} seeds "
        "completed by both",
        command,
        (2, 2),
        (13, 11),
    )
    for axis, conclusion in zip(axes, CONCLUSIONS, strict=True):
        _tornado(axis, bars(frame, conclusion), base(frame, conclusion))
        title = f"({conclusion.mark}) against {conclusion.against},\n{conclusion.base}"
        charts.dress(axis, title, f"downtime of {V3} / of {conclusion.against} (ratio)", "")
        axis.tick_params(axis="y", labelsize=7)
    handles = [
        Patch(facecolor=LOW_COLOUR, edgecolor="black", hatch="//", linewidth=0.5, label="parameter at its low end"),
        Patch(facecolor=HIGH_COLOUR, edgecolor="black", linewidth=0.5, label="parameter at its high end"),
        Line2D([], [], color="black", linewidth=1, label="base, with its interval"),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label=f"gain of {100 * WORTH:.0f} %"),
    ]
    charts.handles_below(figure, handles, 4)
    return figure


def _tornado(axis: Axes, told: Sequence[Bar], at_base: Effect | None) -> None:
    gone = [bar for bar in told if not (bar.low.told and bar.high.told)]
    shown = told[:BARS]
    shown = [*shown, *(bar for bar in gone if bar not in shown)]
    axis.set_yticks(
        range(len(shown)), [f"{bar.parameter}: {bar.low.at} to {bar.high.at}" for bar in shown], fontsize=7.5
    )
    axis.axvline(1 - WORTH, color="black", linestyle="--", linewidth=1)
    if at_base is None:
        axis.text(0.5, 0.5, f"at the base {NOT_BOTH}", transform=axis.transAxes, ha="center")
        return
    middle = at_base.ratio.mean
    axis.axvspan(at_base.ratio.low, at_base.ratio.high, color="#BBBBBB", alpha=0.5, linewidth=0)
    axis.axvline(middle, color="black", linewidth=1)
    for place, bar in enumerate(shown):
        for end, colour, hatch, up in ((bar.low, LOW_COLOUR, "//", -0.16), (bar.high, HIGH_COLOUR, "", 0.16)):
            if end.ratio is None:
                words = f"  x {'low' if end is bar.low else 'high'} end: too few"
                axis.text(middle, place + up, words, fontsize=6.5, va="center", ha="left").set_in_layout(False)
                continue
            mean = end.ratio.mean
            axis.barh(
                place + up,
                mean - middle,
                0.32,
                middle,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.4,
                zorder=3,
            )
            axis.plot([end.ratio.low, end.ratio.high], [place + up] * 2, color="#D55E00", linewidth=2, zorder=4)
    axis.invert_yaxis()


def _region(frame: pl.DataFrame, command: str) -> Figure:
    panels = maps_run(frame)
    figure, axes = charts.sheet(
        f"For which device does v3 bring less than {100 * WORTH:.0f} %?",
        f"gain of {V3} in downtime, %, with its 95 % interval; white: not completed by both; "
        f"at the orange line it passes {100 * WORTH:.0f} %, in the mean",
        command,
        (1, len(panels)),
        (5 * len(panels), 5),
    )
    for axis, (of, against) in zip(axes, panels, strict=True):
        engines, values = sides(frame, of)
        found = [[ratio_of(square(frame, of, each, value, against)) for value in values] for each in engines]
        gains = np.array([[100 * (1 - one.mean) if one else np.nan for one in row] for row in found])
        text = [[_in_square(one) for one in row] for row in found]
        most = max(40.0, float(np.nanmax(gains))) if np.isfinite(gains).any() else 40.0
        charts.heat(
            axis,
            gains,
            [f"{value:g}" for value in values],
            [f"{each:g}" for each in engines],
            least=0,
            most=most,
            text=text,
        )
        _border(axis, gains < 100 * WORTH)
        charts.dress(axis, f"against {against}, {of.base}", of.words, "firmware engines")
        axis.grid(visible=False)
    line = Line2D(
        [], [], color="#D55E00", linewidth=3, label=f"between less than {100 * WORTH:.0f} % and more, in the mean"
    )
    charts.handles_below(figure, [line])
    return figure


def _border(axis: Axes, under: np.ndarray) -> None:
    """A line around the squares in which the gain is too small."""
    rows, columns = under.shape
    for row, column in np.ndindex(rows, columns):
        for down, right in ((1, 0), (0, 1)):
            if (
                row + down < rows
                and column + right < columns
                and under[row, column] != under[row + down, column + right]
            ):
                x = [column + 0.5] * 2 if right else [column - 0.5, column + 0.5]
                y = [row + 0.5] * 2 if down else [row - 0.5, row + 0.5]
                axis.plot(x, y, color="white", linewidth=5, zorder=3, solid_capstyle="projecting")
                axis.plot(x, y, color="#D55E00", linewidth=3, zorder=4, solid_capstyle="projecting")


def _in_square(of: Interval | None) -> str:
    if of is None:
        return "-"
    return f"{100 * (1 - of.mean):.1f}\n{100 * (1 - of.high):.1f} to {100 * (1 - of.low):.1f}"
