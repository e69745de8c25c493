# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of reorder_memory: peaks at the target with their bounds, and multifd's growth against v3's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, Line2D
from experiments.questions.reorder_memory import question
from experiments.questions.reorder_memory.question import MANY, STATE_MIB, STREAMS, WIRES
from experiments.runs.frame import number
from experiments.study.effects import Measure
from sim.scenario.units import MIB

LOOKS = {
    "": style.wire("", "v3, a connection a stream"),
    "-pool": style.wire("-pool", "v3, pool of connections"),
    "-one": style.wire("-one", "v3, one connection"),
    "blocks": style.wire("-blocks", "v3-blocks"),
}
PEAK = Measure("target VMM", "peak_reorder_bytes", MIB, "MiB")


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Peaks with their bounds; multifd's growth against v3's."""
    runs = question.with_bounds(frame).with_columns(
        outcome=pl.lit("COMPLETED")
    )  # memory is memory, however a run ended
    return {"reorder_memory": _bounds(runs, command), "reorder_memory_growth": _growth(runs, command)}


def _bounds(frame: pl.DataFrame, command: str) -> Figure:
    title = "How much memory does the target need, and does the bound hold?"
    note = (
        f"{panels.seeds(frame)} seeds, means with 95 % intervals over all runs, completed or not; grey lines "
        "without markers: the bound of the curve in the same dashes"
    )
    figure, axes = panels.sheet(title, note, command, (2, 3), (13.5, 8.5))
    n, setup, hot = "dirty streams N", "set-up of a critical object, us", f"streams with 99 % of the writes, of {MANY}"
    held = f"dirty data held back, N = {MANY}"
    shown: Sequence[tuple[str, str, str, Sequence[str], str, str]] = (
        ("streams", "streams", "vmm", list(LOOKS), "target VMM, slow LOAD", n),
        ("streams", "streams", "driver", list(LOOKS), "target driver, slow LOAD", n),
        ("hot", "busy_streams", "vmm", WIRES, f"target VMM, uneven writes, N = {MANY}", hot),
        ("late", "setup_us", "vmm", list(LOOKS), f"target VMM, {held}", setup),
        ("late", "setup_us", "driver", list(LOOKS), f"target driver, {held}", setup),
        ("credits", "dirty_credit_mib", "vmm", WIRES[1:], f"target VMM by credit, N = {MANY}", "dirty credit, MiB"),
    )
    for axis, (part, x, name, kinds, title, x_label) in zip(axes, shown, strict=True):
        _panel(axis, frame.filter(part=part), x, name, kinds)
        panels.dress(axis, title, x_label, "MiB")
    panels.log2_axis(axes[0], STREAMS)
    panels.log2_axis(axes[1], STREAMS)
    axes[2].set_xticks(question.BUSY_STREAMS)
    panels.log2_axis(axes[5], question.DIRTY_CREDITS_MIB)
    for axis in axes:  # peaks are from 1 MiB to hundreds
        axis.set_yscale("log", base=2)
        axis.set_ylim(0.7, 400)
        ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
    bound = Line2D([], [], color="#777777", linewidth=1.2, label="bound")
    panels.handles_below(figure, [*map(panels.handle, LOOKS.values()), bound])
    return figure


def _panel(axis: Axes, frame: pl.DataFrame, x: str, name: str, kinds: Sequence[str]) -> None:
    """A curve for each kind, with its bound."""
    for kind in kinds:
        runs, look = question.of_kind(frame, kind), LOOKS[kind]
        panels.curve(axis, runs, x, question.PEAKS[name], look, scale=MIB)
        limit = runs.group_by(x).agg(pl.col(f"{name}_bound_bytes").max() / MIB).sort(x)
        if limit.height:
            at, bounds = limit.get_columns()
            axis.plot(at, bounds, color="#777777", linestyle=look.line, linewidth=1.2, zorder=1)
    if not frame.height:
        panels.say(axis, "no runs")


def _growth(frame: pl.DataFrame, command: str) -> Figure:
    note = (
        f"{panels.seeds(frame)} seeds, means with 95 % intervals; {question.LOAD_MIB_PER_S} MiB/s a LOAD unless "
        "swept, on a link of 25 Gbit/s (2980 MiB/s); grey: v3's bound"
    )
    figure, axes = panels.sheet("Does what waits at the target grow with the device?", note, command, (1, 3), (13.5, 5))
    shown = (question.UNBOUNDED, question.ONE_READER, f"v3-n{MANY}")
    state, size = frame.filter(part="state"), "state of the device, MiB"
    panels.panel(axes[0], panels.by_protocol(state, shown), PEAK, "state_mib", size)
    for name in shown[1:]:
        runs = state.filter(protocol=name)
        if runs.height:
            limit = number(runs["vmm_bound_bytes"].max()) / MIB
            axes[0].axhline(limit, color="#777777", linestyle=style.protocol(name).line, linewidth=1.2)
    known = state.filter(pl.col("downtime_ns").is_not_null())
    panels.panel(axes[1], panels.by_protocol(known, shown), Measure("downtime", "downtime_ns"), "state_mib", size)
    title, rates = PEAK._replace(label=f"target VMM, {STATE_MIB} MiB of state"), frame.filter(part="load rate")
    panels.panel(axes[2], panels.by_protocol(rates, shown[:2]), title, "load_mib_per_s", "LOAD, MiB/s a command")
    panels.log2_axis(axes[2], question.LOADS_MIB_PER_S)
    for axis in axes:
        axis.set_ylim(bottom=0)
    panels.legend(figure, shown)
    return figure
