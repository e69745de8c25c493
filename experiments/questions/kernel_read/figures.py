# SPDX-License-Identifier: GPL-2.0-or-later
"""The figure of kernel_read: measured points, simulated lines, and each ratio against its simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure
from experiments.questions.kernel_read import grid
from experiments.questions.kernel_read.grid import ReadCase
from experiments.questions.kernel_read.question import AIM, compared, firmware_binds, of_case, simulated_rates

BY_ENGINES = ("#A6CBE3", "#6BAED6", "#2171B5", "#084594")
MARKERS = "osD^"
LOCKS = {
    ("fd", "copy"): style.Style("#332288", "", "a lock an fd", "s"),
    ("device", "copy"): style.Style("#E69F00", "", "one lock, over the copy", "^"),
    ("device", "command"): style.Style("#000000", "", "one lock, over the command", "D"),
}
SEVERAL = {
    "fd": style.Style("#332288", "", "a lock an fd", "s"),
    "device": style.Style("#E69F00", "", "a lock a device", "^"),
    "global": style.Style("#000000", "", "one lock for all", "D"),
}
PARTS = (
    ("lock_wait_ns", style.Style("#000000", "", "waits for the lock")),
    ("copy_ns", style.Style("#CC79A7", "xx", "copies")),
)
X = "dirty streams N"
RATIO = "times one stream"


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """By file name."""
    measurement, simulated = grid.measured(), simulated_rates(frame)
    table = simulated if measurement is None else compared(measurement.runs, simulated)
    return {"kernel_read": _sheet(table, command, measured_too=measurement is not None)}


def _sheet(table: pl.DataFrame, command: str, *, measured_too: bool) -> Figure:
    note = (
        f"Medians over the rounds; a command is a delay, {grid.SAVE_MIB_PER_S} MiB/s an engine; reads of 1 MiB unless "
        "the axis says otherwise"
        if measured_too
        else "No measurement is kept here: all is simulated"
    )
    figure, axes = panels.sheet(
        "read() of a driver, measured in a real kernel and simulated", note, command, (2, 3), (13, 8.2)
    )
    engines = {
        f"{many} engine{'' if many == 1 else 's'}": (ReadCase(engines=many), look)
        for many, look in zip(grid.ENGINES, _shades(grid.ENGINES), strict=True)
    }
    _curves(axes[0], table, engines, relative=True)
    panels.dress(axes[0], "firmware binds, a lock an fd", X, RATIO)
    locks = {look.label: (ReadCase(lock=lock, lock_over=over), look) for (lock, over), look in LOCKS.items()}
    _curves(axes[1], table, locks, relative=True)
    panels.dress(axes[1], "firmware binds, 8 engines, by lock", X, RATIO)
    _agreement(axes[2], table, measured_too)
    copies = {
        look.label: (ReadCase(lock=lock, save_mib_s=0), look) for (lock, over), look in LOCKS.items() if over == "copy"
    }
    _curves(axes[3], table, copies, relative=False)
    panels.dress(axes[3], "copies bind: all is saved before", X, "MiB/s")
    _sizes(axes[4], table)
    _waits(axes[5], table, measured_too)
    ways = [
        style.Style("#555555", "", "measured: median, least to most", "o", ""),
        style.Style("#555555", "", "simulated", ""),
    ]
    panels.handles_below(figure, [panels.handle(look) for look in ways])
    return figure


def _shades(values: Sequence[int]) -> list[style.Style]:
    return [
        style.Style(colour, "", str(value), marker)
        for value, colour, marker in zip(values, BY_ENGINES, MARKERS, strict=True)
    ]


def _curves(
    axis: Axes, table: pl.DataFrame, shown: Mapping[str, tuple[ReadCase, style.Style]], *, relative: bool
) -> None:
    """Over N: what was measured as points, what was simulated as lines."""
    for label, (case, look) in shown.items():
        rows = [row for n in grid.STREAMS if (row := of_case(table, replace(case, streams=n)))]
        simulated = [(row["streams"], row["sim_ratio" if relative else "sim_mib_per_s"]) for row in rows]
        axis.plot(*zip(*simulated, strict=True), color=look.colour, linewidth=1.2) if simulated else None
        for row in rows:
            _measured(axis, row, row["streams"], "ratio" if relative else "mib_per_s", look)
        axis.plot([], [], look.marker, color=look.colour, label=label)
    panels.log2_axis(axis, list(grid.STREAMS))
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.legend(fontsize=7.5, frameon=False)


def _measured(axis: Axes, row: Mapping[str, Any], x: float, column: str, look: style.Style) -> None:
    """The median of what was measured, and the least and the greatest; nothing, if it was only simulated."""
    if row.get(column) is not None:
        axis.plot([x, x], [row[f"least_{column}"], row[f"most_{column}"]], color=look.colour, linewidth=3, alpha=0.35)
        axis.plot([x], [row[column]], look.marker, color=look.colour, markersize=5, zorder=4)


def _sizes(axis: Axes, table: pl.DataFrame) -> None:
    """Over the size of a read(), where copies bind: under v2, and the most streams."""
    shown = {
        "v2": (ReadCase(kind="v2", save_mib_s=0), style.protocol("v2")),
        "v3, N = 2": (ReadCase(streams=2, save_mib_s=0), style.protocol("v3-n2")),
        "v3, N = 8": (ReadCase(streams=8, save_mib_s=0), style.protocol("v3-n8")),
    }
    for label, (case, look) in shown.items():
        rows = [row for size in grid.READ_KIB if (row := of_case(table, replace(case, read_kib=size)))]
        simulated = [(row["read_kib"], row["sim_mib_per_s"]) for row in rows]
        axis.plot(*zip(*simulated, strict=True), color=look.colour, linewidth=1.2) if simulated else None
        for row in rows:
            _measured(axis, row, row["read_kib"], "mib_per_s", look)
        axis.plot([], [], look.marker, color=look.colour, label=label)
    panels.log2_axis(axis, list(grid.READ_KIB))
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.legend(fontsize=7.5, frameon=False)
    panels.dress(axis, "copies bind, a lock an fd, by size of a read()", "KiB a read()", "MiB/s")


def _agreement(axis: Axes, table: pl.DataFrame, measured_too: bool) -> None:
    """Each measured ratio over the simulated one."""
    panels.dress(axis, f"each ratio; grey: within {100 * AIM:.0f} %", "simulated, times one stream", "measured")
    if not measured_too:
        panels.say(axis, "nothing was measured here")
        return
    most = 1.1 * max(grid.STREAMS)
    axis.fill_between([0, most], [0, most * (1 - AIM)], [0, most * (1 + AIM)], color="#E4E4E4", linewidth=0)
    axis.plot([0, most], [0, most], color="#666666", linewidth=0.8)
    for binds, look in (
        (firmware_binds(), style.Style("#2171B5", "", "firmware binds", "o")),
        (~firmware_binds(), style.Style("#CC79A7", "", "copies bind", "x")),
    ):
        rows = table.filter(binds, pl.col("kind") == "v3", pl.col("off").is_not_null())
        at = rows["sim_ratio"].to_list(), rows["ratio"].to_list()
        axis.plot(*at, look.marker, color=look.colour, markersize=5, linestyle="", label=look.label)
    axis.legend(fontsize=7.5, frameon=False)


def _waits(axis: Axes, table: pl.DataFrame, measured_too: bool) -> None:
    """Of a read(), one lock over the copy, copies bind."""
    panels.dress(axis, "copies bind, one lock: where a read() is", X, "us a read()")
    rows = [row for n in grid.STREAMS if (row := of_case(table, ReadCase(streams=n, lock="device", save_mib_s=0)))]
    if not measured_too or not rows:
        panels.say(axis, "nothing was measured here")
        return
    for at, row in enumerate(rows):
        parts = [(row[name] / row["reads"] / 1e3, look) for name, look in PARTS]
        panels.stack(axis, at, parts, 0.6, edgecolor="white")
        simulated = row["sim_lock_ns"] / row["sim_reads"] / 1e3
        axis.plot([at - 0.35, at + 0.35], [simulated] * 2, color="#D55E00", linewidth=1.5)
    axis.set_xticks(range(len(rows)), [str(row["streams"]) for row in rows])
    axis.legend(
        handles=[
            *(style.patch(look) for _, look in PARTS),
            panels.handle(style.Style("#D55E00", "", "waits, simulated", "")),
        ],
        fontsize=7.5,
        frameon=False,
    )
