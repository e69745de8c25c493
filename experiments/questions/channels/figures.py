"""What channels shows: downtime and critical lag under each way over the wire, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.questions.channels.grid import (
    AMPLE_CREDIT_MIB,
    BUFFERS_MIB,
    BUSY_STREAMS,
    CREDIT_MIB,
    LINK_GBIT_PER_S,
    MANY,
    QUICK_SETUP,
    SHARES,
    STATE_MIB,
)
from experiments.runs.frame import COMPLETED, number
from experiments.study.statistics import interval

BUFFER_WIDTHS = ((BUFFERS_MIB[0], 2.2), (BUFFERS_MIB[1], 0.8))
HEIGHTS_MS = tuple(100 << power for power in range(10))
LOOKS = {
    "dedicated": style.wire("", "v3, a connection a stream"),
    "pool": style.wire("-pool", f"v3, pool, credit {CREDIT_MIB:g} MiB"),
    "ample": replace(style.wire("-pool", f"v3, pool, credit {AMPLE_CREDIT_MIB:g} MiB"), marker="x"),
    "one": style.wire("-one", "v3, one connection"),
    "v2": style.protocol("v2"),
    "v2-multifd": style.protocol("v2-multifd"),
}


def _of(frame: pl.DataFrame, part: str, kind: str) -> pl.DataFrame:
    """The runs of a part that a curve shows."""
    ends = {"dedicated": r"^v3-n\d+$", "pool": "-pool$", "ample": "-pool$", "one": "-one$"}
    runs = frame.filter((pl.col("part") == part) & pl.col("protocol").str.contains(ends.get(kind, f"^{kind}$")))
    if kind in ("pool", "ample"):
        runs = runs.filter(pl.col("dirty_credit_mib") == (CREDIT_MIB if kind == "pool" else AMPLE_CREDIT_MIB))
    return runs


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime and lag under each way over the wire; what each costs."""
    return {"channels": _times(frame, command), "channels_cost": _cost(frame, command)}


def _times(frame: pl.DataFrame, command: str) -> Figure:
    seeds = frame["seed"].n_unique()
    figure, axes = charts.sheet(
        "Does a pool of connections do as well as a connection for each stream?",
        f"link of {LINK_GBIT_PER_S:g} Gbit/s, {seeds} seeds, means with 95 % intervals; pool and dedicated with equal "
        "numbers of connections; hollow: not all runs of that place completed, none: no point",
        command,
        (2, 3),
        (13.5, 8.5),
    )
    for axis, share in zip(axes, SHARES, strict=False):
        at = frame.filter(pl.col("per_connection_gbit_per_s") == LINK_GBIT_PER_S * share)
        for kind, look in LOOKS.items():
            charts.curve(axis, _of(at, "width", kind), "connections", "downtime_ns", look, scale=1e6)
        charts.curve(axis, _of(at, "credit", "ample"), "connections", "downtime_ns", LOOKS["ample"], scale=1e6)
        charts.dress(axis, f"downtime, {LINK_GBIT_PER_S * share:g} Gbit/s a connection", "connections", "ms")
        _log(axis, frame)
    _lag_panel(axes[3], frame)
    _pool_panel(axes[4], frame)
    for kind in ("dedicated", "pool"):
        charts.curve(axes[5], _of(frame, "uneven", kind), "busy_streams", "downtime_ns", LOOKS[kind], scale=1e6)
    charts.dress(
        axes[5],
        f"downtime, uneven streams (N = {MANY}, {LINK_GBIT_PER_S * SHARES[0]:g} Gbit/s)",
        f"streams that have the data, of {MANY}",
        "ms",
    )
    axes[5].set_xticks(BUSY_STREAMS)
    axes[5].set_ylim(bottom=0)
    charts.handles_below(figure, [charts.handle(look) for look in LOOKS.values()], 6)
    return figure


def _lag_panel(axis: Axes, frame: pl.DataFrame) -> None:
    """The line's width tells the buffer."""
    quick = frame.filter(pl.col("setup_us") == QUICK_SETUP["setup_us"])
    for buffer_mib, width in BUFFER_WIDTHS:
        runs = quick.filter(pl.col("socket_buffer_mib") == buffer_mib)
        for kind in ("dedicated", "pool", "one"):
            x, y = "per_connection_gbit_per_s", "critical_lag_mean_ns"
            charts.curve(axis, _of(runs, "lag", kind), x, y, LOOKS[kind], scale=1e6, width=width)
    charts.dress(axis, f"mean critical lag, quick set-up, N = {MANY}", "Gbit/s a connection", "ms")
    axis.set_xscale("log", base=2)
    ticks = [LINK_GBIT_PER_S * share for share in SHARES]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(bottom=0)
    lines = [
        Line2D([], [], color="black", linewidth=width, label=f"sockets of {buffer_mib:g} MiB")
        for buffer_mib, width in BUFFER_WIDTHS
    ]
    axis.legend(handles=lines, fontsize=7.5, frameon=False)


def _pool_panel(axis: Axes, frame: pl.DataFrame) -> None:
    for kind in ("pool", "ample"):
        charts.curve(axis, _of(frame, "pool", kind), "connections", "downtime_ns", LOOKS[kind], scale=1e6)
    gbit = LINK_GBIT_PER_S * SHARES[0]
    narrow = frame.filter((pl.col("streams") == MANY) & (pl.col("per_connection_gbit_per_s") == gbit) & COMPLETED)
    runs = _of(narrow, "width", "dedicated")
    if runs.height:
        told = interval(runs["downtime_ns"].to_numpy() / 1e6)
        axis.axhline(told.mean, color=LOOKS["dedicated"].colour, linewidth=1.2)
        axis.axhspan(told.low, told.high, color=LOOKS["dedicated"].colour, alpha=0.25, linewidth=0)
    charts.dress(axis, f"downtime by the pool's size (N = {MANY}, {gbit:g} Gbit/s)", "connections", "ms")
    _log(axis, frame)


def _log(axis: Axes, frame: pl.DataFrame) -> None:
    """Connections double, downtimes too: the same scale wherever downtime stands against connections."""
    _connections(axis)
    axis.set_xlim(0.9, 36)
    of_both = frame.filter(COMPLETED & pl.col("part").is_in(["width", "credit", "pool"]))["downtime_ns"] / 1e6
    axis.set_yscale("log", base=2)
    if len(of_both):
        least, most = number(of_both.min()), number(of_both.max())
        axis.set_ylim(0.85 * least, 1.2 * most)
        heights = [height for height in HEIGHTS_MS if 0.85 * least <= height <= 1.2 * most]
        axis.set_yticks(heights, [str(height) for height in heights])
        axis.yaxis.set_minor_locator(NullLocator())
    if not axis.has_data():
        axis.text(0.5, 0.5, "no completed run", transform=axis.transAxes, ha="center", fontsize=9)


def _connections(axis: Axes) -> None:
    axis.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def _cost(frame: pl.DataFrame, command: str) -> Figure:
    seeds = frame["seed"].n_unique()
    figure, axes = charts.sheet(
        "What do connections cost, dedicated or shared?",
        f"link of {LINK_GBIT_PER_S:g} Gbit/s, {STATE_MIB} MiB move in the downtime, {seeds} seeds, means with 95 % "
        "intervals",
        command,
        (2, 2),
        (11, 8),
    )
    panels = (
        ("messages without payload", "messages", 1.0, "messages", SHARES[-1]),
        ("wake-ups of both VMMs", "wakeups", 1.0, "wake-ups", SHARES[-1]),
        ("peak in the target VMM", "peak_reorder_bytes", float(1 << 20), "MiB", SHARES[0]),
        ("sends held up in the downtime", "send_blocked_ns", 1e9, "s", SHARES[0]),
    )
    for axis, (title, column, scale, unit, share) in zip(axes, panels, strict=True):
        gbit = LINK_GBIT_PER_S * share
        at = frame.filter(pl.col("per_connection_gbit_per_s") == gbit)
        for kind, look in LOOKS.items():
            charts.curve(axis, _of(at, "width", kind), "connections", column, look, scale=scale)
        charts.curve(axis, _of(at, "credit", "ample"), "connections", column, LOOKS["ample"], scale=scale)
        charts.dress(axis, f"{title} ({gbit:g} Gbit/s a connection)", "connections", unit)
        _connections(axis)
        axis.set_ylim(bottom=0)
    charts.handles_below(figure, [charts.handle(look) for look in LOOKS.values()], 6)
    return figure
