"""What reorder_memory shows: peaks at the target with their bounds, and multifd's growth against v3's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.questions.reorder_memory.grid import (
    BUSY_STREAMS,
    DIRTY_CREDITS_MIB,
    LOAD_MIB_PER_S,
    LOADS_MIB_PER_S,
    MANY,
    ONE_READER,
    PEAKS,
    STATE_MIB,
    STREAMS,
    UNBOUNDED,
    WIRES,
    of_kind,
    with_bounds,
)
from experiments.runs.frame import number
from sim.scenario.units import MIB

LOOKS = {
    "": style.wire("", "v3, a connection a stream"),
    "-pool": style.wire("-pool", "v3, pool of connections"),
    "-one": style.wire("-one", "v3, one connection"),
    "blocks": style.wire("-blocks", "v3-blocks"),
    UNBOUNDED: style.protocol(UNBOUNDED),
}


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Peaks with their bounds; multifd's growth against v3."""
    told = with_bounds(frame).with_columns(outcome=pl.lit("COMPLETED"))  # memory is memory, however a run ended
    return {"reorder_memory": _bounds(told, command), "reorder_memory_growth": _grows(told, command)}


def _bounds(frame: pl.DataFrame, command: str) -> Figure:
    seeds = frame["seed"].n_unique()
    figure, axes = charts.sheet(
        "How much memory does the target need, and does the bound hold?",
        f"{seeds} seeds, means with 95 % intervals over all runs, completed or not; grey lines without markers: the "
        "bound of the curve in the same dashes",
        command,
        (2, 3),
        (13.5, 8.5),
    )
    wires = (*WIRES, "blocks")
    for axis, name, title in ((axes[0], "vmm", "target VMM"), (axes[1], "driver", "target driver")):
        _panel(axis, frame.filter(pl.col("part") == "streams"), "streams", name, wires)
        charts.dress(axis, f"{title}, slow LOAD", "dirty streams N", "MiB")
        axis.set_xscale("log", base=2)
        axis.set_xticks(STREAMS, [str(n) for n in STREAMS])
    _panel(axes[2], frame.filter(pl.col("part") == "hot"), "busy_streams", "vmm", WIRES)
    charts.dress(
        axes[2], f"target VMM, uneven writes, N = {MANY}", f"streams with 99 % of the writes, of {MANY}", "MiB"
    )
    axes[2].set_xticks(BUSY_STREAMS)
    for axis, name, title in ((axes[3], "vmm", "target VMM"), (axes[4], "driver", "target driver")):
        _panel(axis, frame.filter(pl.col("part") == "late"), "setup_us", name, wires)
        charts.dress(axis, f"{title}, dirty data held back, N = {MANY}", "set-up of a critical object, us", "MiB")
    _panel(axes[5], frame.filter(pl.col("part") == "credits"), "dirty_credit_mib", "vmm", WIRES[1:])
    charts.dress(axes[5], f"target VMM by credit, N = {MANY}", "dirty credit, MiB", "MiB")
    axes[5].set_xscale("log", base=2)
    axes[5].set_xticks(DIRTY_CREDITS_MIB, [str(credit) for credit in DIRTY_CREDITS_MIB])
    for axis in axes:
        _mib_axis(axis)
    bound = Line2D([], [], color="#777777", linewidth=1.2, label="bound")
    charts.handles_below(figure, [*(charts.handle(LOOKS[kind]) for kind in wires), bound])
    return figure


def _panel(axis: Axes, frame: pl.DataFrame, x: str, name: str, kinds: Sequence[str]) -> None:
    """A curve for each kind, with its bound."""
    for kind in kinds:
        runs, look = of_kind(frame, kind), LOOKS[kind]
        charts.curve(axis, runs, x, PEAKS[name], look, scale=MIB)
        limit = runs.group_by(x).agg(pl.col(f"{name}_bound_bytes").max()).sort(x)
        if limit.height:
            heights = (limit[f"{name}_bound_bytes"] / MIB).to_list()
            axis.plot(limit[x].to_list(), heights, color="#777777", linestyle=look.line, linewidth=1.2, zorder=1)
    if not frame.height:
        axis.text(0.5, 0.5, "no runs", transform=axis.transAxes, ha="center")


def _mib_axis(axis: Axes) -> None:
    """Peaks are from 1 MiB to hundreds."""
    axis.set_yscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    axis.set_ylim(0.7, 400)
    axis.set_yticks(ticks[:-1], [str(tick) for tick in ticks[:-1]])


def _grows(frame: pl.DataFrame, command: str) -> Figure:
    seeds = frame["seed"].n_unique()
    figure, axes = charts.sheet(
        "Does what waits at the target grow with the device?",
        f"{seeds} seeds, means with 95 % intervals; {LOAD_MIB_PER_S} MiB/s a LOAD unless swept, on a link of 25 Gbit/s "
        "(2980 MiB/s); grey: v3's bound",
        command,
        (1, 3),
        (13.5, 5),
    )
    state = frame.filter(pl.col("part") == "state")
    shown = (UNBOUNDED, ONE_READER, f"v3-n{MANY}")
    for protocol in shown:
        look = style.protocol(protocol)
        runs = state.filter(pl.col("protocol") == protocol)
        charts.curve(axes[0], runs, "state_mib", "peak_reorder_bytes", look, scale=MIB)
        charts.curve(
            axes[1],
            runs.filter(pl.col("downtime_ns").is_not_null()),
            "state_mib",
            "downtime_ns",
            look,
            scale=1e6,
        )
        if protocol != UNBOUNDED and runs.height:
            limit = number(runs["vmm_bound_bytes"].max()) / MIB
            axes[0].axhline(limit, color="#777777", linestyle=look.line, linewidth=1.2)
    charts.dress(axes[0], "target VMM", "state of the device, MiB", "MiB")
    charts.dress(axes[1], "downtime", "state of the device, MiB", "ms")
    rates = frame.filter(pl.col("part") == "load rate")
    for protocol in shown[:2]:
        runs = rates.filter(pl.col("protocol") == protocol)
        charts.curve(axes[2], runs, "load_mib_per_s", "peak_reorder_bytes", style.protocol(protocol), scale=MIB)
    charts.dress(axes[2], f"target VMM, {STATE_MIB} MiB of state", "LOAD, MiB/s a command", "MiB")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(LOADS_MIB_PER_S, [str(rate) for rate in LOADS_MIB_PER_S])
    for axis in axes:
        axis.set_ylim(bottom=0)
    charts.legend(figure, shown)
    return figure
