# SPDX-License-Identifier: GPL-2.0-or-later
"""The figure of `proto-v3 validate`: published against simulated figures, and the error of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from experiments.draw import panels
from experiments.draw.canvas import Axes, Figure, Line2D, own_settings
from experiments.runs.frame import number
from experiments.study.published import words

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
"""A scenario has a colour (Okabe and Ito's) and a marker: 42 different pairs."""
MARGIN_COLOURS = ("#D5D5D5", "#EBEBEB")
FACES: Mapping[str, Mapping[str, Any]] = {
    "predicted": {"fillstyle": "full"},
    "sum": {"fillstyle": "left", "markerfacecoloralt": "white"},
    "fitted": {"markerfacecolor": "white"},
}
"""How the marker of a figure is filled."""
BAR: Mapping[str, Any] = {"linewidth": 3, "alpha": 0.35}
FARTHEST = 0.4
"""Larger errors are drawn at this distance, each with its number beside it."""

Looks = Mapping[str, tuple[str, str]]


@own_settings()
def published_against_simulated(frame: pl.DataFrame, margins: Sequence[float], seeds: int, command: str) -> Figure:
    """Published against simulated figures on log axes, and their errors one by one.

    `frame` has one row a figure (experiments.commands.validate.tidy), at least one of them simulated; `margins` are
    two errors, the smaller one first. Figures that parameters were fitted to are hollow, sums of these half filled,
    predictions filled. The band of a figure is a bar.
    """
    scenarios = frame["scenario"].unique(maintain_order=True)
    looks = {name: (COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]) for at, name in enumerate(scenarios)}
    figure = Figure(figsize=(12.5, max(6.8, 0.19 * frame.height + 1.6)), layout="constrained")
    against, errors = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 0.8]})
    _against(against, frame.filter(pl.col("simulated_ms").is_not_null()), margins, looks)
    _errors(errors, frame, margins, looks)
    figure.suptitle(f"Does the simulation give what was published? Means over {seeds} seed(s)", fontsize=12)
    panels.say_how_made(figure, command)
    return figure


def _against(axis: Axes, simulated: pl.DataFrame, margins: Sequence[float], looks: Looks) -> None:
    both = pl.concat([simulated["published_ms"], simulated["simulated_ms"]])
    ends = [number(both.min()) / 1.5, number(both.max()) * 1.5]
    for margin, colour in zip(reversed(margins), reversed(MARGIN_COLOURS), strict=True):
        low, high = ([share * end for end in ends] for share in (1 - margin, 1 + margin))
        axis.fill_between(ends, low, high, color=colour)
    axis.plot(ends, ends, color="#666666", linewidth=0.8)
    for row in simulated.iter_rows(named=True):
        if row["samples"]:
            _bar(axis.vlines, row["published_ms"], row["simulated_low_ms"], row["simulated_high_ms"], row, looks)
        _point(axis, row["published_ms"], row["simulated_ms"], row, looks)
        if abs(row["error"]) > margins[-1]:
            name = f"{row['scenario']}: {words(row['figure'])}"
            panels.beside(axis, name, row["published_ms"], row["simulated_ms"], -7 if row["error"] > 0 else 7, 7.5)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published, ms", ylabel="simulated, ms")
    axis.set_box_aspect(1)
    axis.set_anchor("N")
    within = " and ".join(f"{100 * margin:.0f} %" for margin in margins)
    axis.set_title(f"grey: within {within}; named: what is outside", loc="left", fontsize=9.5)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in looks.items()
    ]
    handles += [
        Line2D([], [], color="#444444", marker="o", linestyle="", label=label, **FACES[kind])
        for kind, label in {"predicted": "predicted", "sum": "sum of fitted ones", "fitted": "used to fit"}.items()
    ]
    if simulated["samples"].sum():
        handles.append(Line2D([], [], color="#444444", label="bar: 5th to 95th percentile over the ranges", **BAR))
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, fontsize=8.5, frameon=False)


def _errors(axis: Axes, frame: pl.DataFrame, margins: Sequence[float], looks: Looks) -> None:
    for margin, colour in zip(reversed(margins), reversed(MARGIN_COLOURS), strict=True):
        axis.axvspan(-100 * margin, 100 * margin, color=colour, linewidth=0)
    axis.axvline(0, color="#666666", linewidth=0.8)
    labels = []
    for at, row in enumerate(frame.iter_rows(named=True)):
        labels.append(f"{row['scenario']}, {row['protocol']}: {words(row['figure'])}")
        error = "not simulated"
        if row["samples"]:
            low, high = (_percent(row[f"simulated_{end}_ms"] / row["published_ms"] - 1) for end in ("low", "high"))
            _bar(axis.hlines, at, low, high, row, looks)
        if row["error"] is not None:
            _point(axis, _percent(row["error"]), at, row, looks)
            error = f"{100 * row['error']:+.1f} %"
        axis.annotate(error, (1, at), xycoords=("axes fraction", "data"), fontsize=7.5, ha="right", va="center")
    axis.set_yticks(range(frame.height), labels, fontsize=7.5)
    axis.set_ylim(frame.height - 0.4, -0.6)
    axis.set_xlim(-100 * FARTHEST - 3, 100 * FARTHEST + 18)
    axis.set_xlabel("error, % of the published figure")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _point(axis: Axes, x: float, y: float, row: Mapping[str, Any], looks: Looks) -> None:
    colour, marker = looks[row["scenario"]]
    axis.plot([x], [y], color=colour, marker=marker, markersize=5.5, clip_on=False, **FACES[row["kind"]])


def _bar(lines: Callable[..., Any], at: float, low: float, high: float, row: Mapping[str, Any], looks: Looks) -> None:
    """`lines` is the axis' hlines or vlines."""
    lines(at, low, high, color=looks[row["scenario"]][0], zorder=1.5, **BAR)


def _percent(error: float) -> float:
    """Where an error is drawn."""
    return 100 * max(-FARTHEST, min(error, FARTHEST))
