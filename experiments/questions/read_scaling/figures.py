# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of read_scaling: throughput against N, what a read() waits for, and what binds where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, AxesImage, Figure, Patch
from experiments.questions.read_scaling import grid
from experiments.questions.read_scaling.grid import LOOKS, PARTS, V2, Place, engines
from experiments.runs.frame import COMPLETED, number
from experiments.study.effects import mean
from experiments.study.statistics import interval
from proto_v3.timeline import Resource

OF_A_READ = (
    ("read_firmware_ns", style.RESOURCES[Resource.FIRMWARE], "waits for SAVE"),
    ("read_lock_ns", style.RESOURCES[Resource.LOCK], "waits for the lock"),
    ("read_copy_ns", style.RESOURCES[Resource.COPY], "copies"),
)
MARKERS = "osD^v"


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """By file name."""
    frame = grid.with_parts(frame)
    return {
        "bottleneck": _bottleneck(frame, command),
        "scaling": _scaling(frame, command),
        "read_latency": _latency(frame, command),
    }


# --- throughput -------------------------------------------------------------------------------------------------------


def _scaling(frame: pl.DataFrame, command: str) -> Figure:
    title = "Does a stopped device move faster with N streams? Its state over the stop-copy time"
    note = (
        f"{panels.seeds(frame)} seeds, 95 % intervals. Else 16 engines, a lock a fd, copy 8 GiB/s, link 400 "
        "Gbit/s. Dotted: least of the rates of SAVE, read(), link; thin: scaling law. A curve that is not seen lies "
        "under another"
    )
    figure, axes = panels.sheet(title, note, command, (2, 3), (13, 8.2))
    all_engines, copies, links = (
        sorted(frame[column].unique()) for column in ("engines", "copy_gib_per_s", "link_gbit_per_s")
    )
    last = all_engines[-1]
    for axis, many in zip(axes, (all_engines[0], 4.0 if 4.0 in all_engines else last, last), strict=False):
        for lock, look in LOOKS.items():
            _curve(axis, Place(lock, many), frame, look, law=many == last, expected=lock in ("per_fd", "global"))
        panels.dress(axis, f"{engines(many)}, by lock", "dirty streams N", "GiB/s")
    for name in V2:  # one stream, whatever N
        look = style.protocol(name)
        if level := mean(Place(engines=1.0).of(frame, name), "gib_per_s", 1):
            axes[0].axhline(level.mean, color=look.colour, linestyle=look.line, lw=1)
    for lock in ("none", "per_fd"):
        _curve(axes[3], Place(lock), frame, LOOKS[lock], kind="v3-blocks")
    panels.dress(axes[3], "one fd of blocks, N readers", "reading threads N", "GiB/s")
    _family(axes[4], frame, {f"{copy:g}": Place("global", copy_gib_per_s=copy) for copy in copies})
    panels.dress(axes[4], "one lock for all; copy GiB/s a thread", "dirty streams N", "GiB/s")
    _family(axes[5], frame, {f"{link:g}": Place(link_gbit_per_s=link) for link in links})
    panels.dress(axes[5], "a lock a fd; link Gbit/s", "dirty streams N", "GiB/s")
    for axis in axes:
        panels.log2_axis(axis, sorted(frame["streams"].unique()))
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    looks = [*LOOKS.values(), *(style.protocol(name) for name in V2)]
    panels.handles_below(figure, [panels.handle(look) for look in looks], 6)
    return figure


def _curve(
    axis: Axes,
    place: Place,
    frame: pl.DataFrame,
    look: style.Style,
    *,
    kind: str = "v3",
    law: bool = False,
    expected: bool = False,
) -> None:
    runs = place.of(frame, kind)
    panels.curve(axis, runs, "streams", "gib_per_s", look)
    if runs.filter(COMPLETED).is_empty():
        return
    ns = np.geomspace(number(runs["streams"].min()), number(runs["streams"].max()), 50)
    if expected:
        least = [min(place.bounds_gib_per_s(n).values()) for n in ns]
        axis.plot(ns, least, color=look.colour, linestyle=":", linewidth=1)
    if law and (curve := grid.fitted(runs)) is not None:
        axis.plot(ns, curve.at(ns), color=look.colour, linewidth=0.6)


def _family(axis: Axes, frame: pl.DataFrame, shown: Mapping[str, Place]) -> None:
    """Curves from light to dark, by their labels."""
    looks = []
    for at, (label, place) in enumerate(shown.items()):
        shade = str(0.75 - 0.75 * at / max(1, len(shown) - 1))
        look = style.Style(shade, "", label, MARKERS[at % len(MARKERS)])
        _curve(axis, place, frame, look, expected=True)
        looks.append(look)
    axis.legend(handles=[panels.handle(look) for look in looks], fontsize=7.5, frameon=False, loc="upper left")


# --- where a read() is ------------------------------------------------------------------------------------------------


def _latency(frame: pl.DataFrame, command: str) -> Figure:
    note = (
        f"Means over all reads that gave data, {panels.seeds(frame)} seeds; intervals (95 %) of the sum; copy 8 "
        "GiB/s a thread, link 400 Gbit/s; each panel has a scale of its own"
    )
    figure, axes = panels.sheet("What does a read() of 1 MiB wait for?", note, command, (2, 3), (13, 8.2))
    shown = [
        (Place("per_fd", 1.0), "v3", "1 engine, a lock a fd"),
        (Place("per_fd"), "v3", "16 engines, a lock a fd"),
        (Place("none"), "v3-blocks", "16 engines, blocks, no lock"),
        (Place("global", 1.0), "v3", "1 engine, one lock for all"),
        (Place("global"), "v3", "16 engines, one lock for all"),
        (Place("per_fd"), "v3-blocks", "16 engines, blocks, a lock a fd"),
    ]
    for axis, (place, kind, title) in zip(axes, shown, strict=True):
        _bars(axis, place.of(frame, kind).filter(COMPLETED))
        x = "reading threads N" if kind == "v3-blocks" else "dirty streams N"
        panels.dress(axis, title, x, "ms a read()")
    handles = [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=label) for _, look, label in OF_A_READ
    ]
    panels.handles_below(figure, handles, 3)
    return figure


def _bars(axis: Axes, runs: pl.DataFrame) -> None:
    if runs.is_empty():
        panels.say(axis, "no run was completed")
        return
    ns = sorted(runs["streams"].unique())
    for at, n in enumerate(ns):
        some = runs.filter(streams=n)
        parts = [((some[column] / some["reads"]).to_numpy() / 1e6, look) for column, look, _ in OF_A_READ]
        panels.stack(axis, at, [(part.mean(), look) for part, look in parts], 0.7, edgecolor="white")
        whole = interval(np.sum([part for part, _ in parts], axis=0))
        axis.plot([at, at], [whole.low, whole.high], color="#555555", linewidth=1.5)
        axis.text(at, whole.high, f"{whole.mean:.2g}", ha="center", va="bottom", fontsize=7.5)
    axis.set_xticks(range(len(ns)), [str(n) for n in ns])
    axis.margins(y=0.12)


# --- what binds -------------------------------------------------------------------------------------------------------


def _bottleneck(frame: pl.DataFrame, command: str) -> Figure:
    note = (
        "Colour and number: copy and lock, % of the critical path of moving the state; word: its largest part. "
        f"{panels.seeds(frame)} seeds, completed runs; white: not looked at, or none completed. Fixed costs and "
        "the end of the load are left out"
    )
    figure, axes = panels.sheet("Is read() the bottleneck?", note, command, (2, 3), (13, 8.2))
    streams = frame.filter(kind="v3")
    ns = sorted(streams["streams"].unique())
    all_engines, copies = sorted(frame["engines"].unique()), sorted(frame["copy_gib_per_s"].unique())
    few = sorted(streams.filter(pl.col("copy_gib_per_s") != Place().copy_gib_per_s)["streams"].unique()) or ns
    for row, lock in enumerate(("per_fd", "global")):
        label = LOOKS[lock].label
        by_engines = {f"{many:g}": Place(lock, many) for many in all_engines}
        by_engines = {many: place for many, place in by_engines.items() if not place.of(frame).is_empty()}
        _map(axes[3 * row], frame, by_engines, ns, f"{label}, copy 8 GiB/s", "firmware engines")
        for at, many in enumerate((all_engines[0], all_engines[-1]), 1):
            by_copy = {f"{copy:g}": Place(lock, many, copy) for copy in copies}
            title = f"{label}, {engines(many)}"
            image = _map(axes[3 * row + at], frame, by_copy, few, title, "copy GiB/s a thread")
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01)
    bar.set_label("copy and lock, %", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    panels.handles_below(figure, [Patch(visible=False, label=f"{name}: {text}") for name, text in PARTS.items()], 4)
    return figure


def _map(
    axis: Axes, frame: pl.DataFrame, rows: Mapping[str, Place], ns: Sequence[int], title: str, y: str
) -> AxesImage:
    squares = [[_square(place.of(frame, streams=n)) for n in ns] for place in rows.values()]
    image = panels.heat(axis, squares, [str(n) for n in ns], list(rows), least=0, most=100)
    panels.dress(axis, title, "dirty streams N", y)
    axis.grid(visible=False)
    return image


def _square(runs: pl.DataFrame) -> tuple[float, str]:
    """The part of copy and lock, %, and the text of the square."""
    parts = grid.shares(runs)
    return (100 * parts["read"], f"{grid.largest(parts)}\n{100 * parts['read']:.0f}") if parts else (np.nan, "")
