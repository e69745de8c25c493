# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of channels: downtime and critical lag under each way over the wire, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, Line2D, NullLocator
from experiments.questions.channels import question
from experiments.questions.channels.question import LINK_GBIT_PER_S, MANY, NARROW_GBIT_PER_S, SHARES
from experiments.runs.frame import COMPLETED, number
from experiments.study.effects import Measure, mean

BUFFER_WIDTHS = ((question.BUFFERS_MIB[0], 2.2), (question.BUFFERS_MIB[1], 0.8))
"""Sockets' buffer, MiB, and the width of its line."""
HEIGHTS_MS = tuple(100 << power for power in range(10))
LOOKS = {
    "dedicated": style.wire("", "v3, a connection a stream"),
    "pool": style.wire("-pool", f"v3, pool, credit {question.CREDIT_MIB:g} MiB"),
    "ample": replace(style.wire("-pool", f"v3, pool, credit {question.AMPLE_CREDIT_MIB:g} MiB"), marker="x"),
    "one": style.wire("-one", "v3, one connection"),
    "v2": style.protocol("v2"),
    "v2-multifd": style.protocol("v2-multifd"),
}


def _of(frame: pl.DataFrame, part: str, kind: str) -> panels.Curve:
    """The runs of a part that the curve of a kind shows, and its look."""
    ends = {"dedicated": r"^v3-n\d+$", "pool": "-pool$", "ample": "-pool$", "one": "-one$"}
    runs = frame.filter(pl.col("protocol").str.contains(ends.get(kind, f"^{kind}$")), part=part)
    if kind in ("pool", "ample"):
        runs = runs.filter(dirty_credit_mib=question.CREDIT_MIB if kind == "pool" else question.AMPLE_CREDIT_MIB)
    return runs, LOOKS[kind]


def _by_width(frame: pl.DataFrame, gbit: float) -> list[panels.Curve]:
    """Each way, where a connection has this rate."""
    runs = frame.filter(per_connection_gbit_per_s=gbit)
    return [*(_of(runs, "width", kind) for kind in LOOKS), _of(runs, "credit", "ample")]


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime and lag under each way over the wire; what each costs."""
    return {"channels": _times(frame, command), "channels_cost": _cost(frame, command)}


def _times(frame: pl.DataFrame, command: str) -> Figure:
    title = "Does a pool of connections do as well as a connection for each stream?"
    note = (
        f"link of {LINK_GBIT_PER_S:g} Gbit/s, {panels.seeds(frame)} seeds, means with 95 % intervals; pool and "
        "dedicated with equal numbers of connections; hollow: not all runs of that place completed, none: no point"
    )
    figure, axes = panels.sheet(title, note, command, (2, 3), (13.5, 8.5))
    for axis, share in zip(axes, SHARES, strict=False):
        gbit = LINK_GBIT_PER_S * share
        measure = Measure(f"downtime, {gbit:g} Gbit/s a connection", "downtime_ns")
        panels.panel(axis, _by_width(frame, gbit), measure, "connections", "connections")
        _log(axis, frame)
    _lag_panel(axes[3], frame)
    _pool_panel(axes[4], frame)
    measure = Measure(f"downtime, uneven streams (N = {MANY}, {NARROW_GBIT_PER_S:g} Gbit/s)", "downtime_ns")
    uneven = [_of(frame, "uneven", kind) for kind in ("dedicated", "pool")]
    panels.panel(axes[5], uneven, measure, "busy_streams", f"streams that have the data, of {MANY}")
    axes[5].set_xticks(question.BUSY_STREAMS)
    axes[5].set_ylim(bottom=0)
    panels.handles_below(figure, [panels.handle(look) for look in LOOKS.values()], 6)
    return figure


def _lag_panel(axis: Axes, frame: pl.DataFrame) -> None:
    """The width of a line shows the sockets' buffer."""
    quick = frame.filter(setup_us=question.QUICK_SETUP["setup_us"])
    for buffer_mib, width in BUFFER_WIDTHS:
        for kind in ("dedicated", "pool", "one"):
            runs, look = _of(quick.filter(socket_buffer_mib=buffer_mib), "lag", kind)
            x, y = "per_connection_gbit_per_s", "critical_lag_mean_ns"
            panels.curve(axis, runs, x, y, look, scale=1e6, width=width)
    panels.dress(axis, f"mean critical lag, quick set-up, N = {MANY}", "Gbit/s a connection", "ms")
    panels.log2_axis(axis, [LINK_GBIT_PER_S * share for share in SHARES])
    axis.set_ylim(bottom=0)
    lines = [
        Line2D([], [], color="black", linewidth=width, label=f"sockets of {buffer_mib:g} MiB")
        for buffer_mib, width in BUFFER_WIDTHS
    ]
    axis.legend(handles=lines, fontsize=7.5, frameon=False)


def _pool_panel(axis: Axes, frame: pl.DataFrame) -> None:
    title = Measure(f"downtime by the pool's size (N = {MANY}, {NARROW_GBIT_PER_S:g} Gbit/s)", "downtime_ns")
    panels.panel(axis, [_of(frame, "pool", kind) for kind in ("pool", "ample")], title, "connections", "connections")
    runs, look = _of(frame.filter(question.NARROW, streams=MANY), "width", "dedicated")
    if level := mean(runs, "downtime_ns"):
        axis.axhline(level.mean, color=look.colour, linewidth=1.2)
        axis.axhspan(level.low, level.high, color=look.colour, alpha=0.25, linewidth=0)
    _log(axis, frame)


def _log(axis: Axes, frame: pl.DataFrame) -> None:
    """Connections double, downtimes too: the same scale wherever downtime stands against connections."""
    panels.log2_axis(axis, [1, 2, 4, 8, 16, 32])
    axis.set_xlim(0.9, 36)
    axis.set_yscale("log", base=2)
    shown = frame.filter(COMPLETED, pl.col("part").is_in(["width", "credit", "pool"]))["downtime_ns"] / 1e6
    if len(shown):
        least, most = 0.85 * number(shown.min()), 1.2 * number(shown.max())
        axis.set_ylim(least, most)
        heights = [height for height in HEIGHTS_MS if least <= height <= most]
        axis.set_yticks(heights, [str(height) for height in heights])
        axis.yaxis.set_minor_locator(NullLocator())
    if not axis.has_data():
        axis.text(0.5, 0.5, "no completed run", transform=axis.transAxes, ha="center", fontsize=9)


def _cost(frame: pl.DataFrame, command: str) -> Figure:
    note = (
        f"link of {LINK_GBIT_PER_S:g} Gbit/s, {question.STATE_MIB} MiB move in the downtime, "
        f"{panels.seeds(frame)} seeds, means with 95 % intervals"
    )
    figure, axes = panels.sheet("What do connections cost, dedicated or shared?", note, command, (2, 2), (11, 8))
    shown = (
        (Measure("messages without payload", "messages", 1.0, "messages"), LINK_GBIT_PER_S),
        (Measure("wake-ups of both VMMs", "wakeups", 1.0, "wake-ups"), LINK_GBIT_PER_S),
        (Measure("peak in the target VMM", "peak_reorder_bytes", float(1 << 20), "MiB"), NARROW_GBIT_PER_S),
        (Measure("sends held up in the downtime", "send_blocked_ns", 1e9, "s"), NARROW_GBIT_PER_S),
    )
    for axis, (measure, gbit) in zip(axes, shown, strict=True):
        title = measure._replace(label=f"{measure.label} ({gbit:g} Gbit/s a connection)")
        panels.panel(axis, _by_width(frame, gbit), title, "connections", "connections")
        panels.log2_axis(axis, [1, 2, 4, 8, 16, 32])
        axis.set_ylim(bottom=0)
    panels.handles_below(figure, [panels.handle(look) for look in LOOKS.values()], 6)
    return figure
