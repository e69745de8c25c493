"""The figures of state_and_dirty_rate: maps of what converges, and the boundaries of the machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from experiments.draw import panels, style
from experiments.questions.state_and_dirty_rate.question import (
    BASE,
    ENDS,
    LINK_GBIT_PER_S,
    MACHINES,
    MAP,
    PROTOCOLS,
    REPEATS_OF_MACHINES,
    STATE_OF_MACHINES_MIB,
    boundary_mib_per_s,
    bracket,
    link_mib_per_s,
)
from experiments.runs.frame import COMPLETED, number
from sim.scenario.file import load

HATCH = "xxx"


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """The maps, and the boundaries of the machines."""
    return {"convergence_map": _maps(frame.filter(machine=MAP), command), "boundary": _edges(frame, command)}


def _maps(runs: pl.DataFrame, command: str) -> Figure:
    figure, axes = panels.sheet(
        "Which devices converge, and with which downtime?",
        f"{BASE} at {LINK_GBIT_PER_S:g} Gbit/s, writes to all blocks alike; numbers: mean downtime, ms (limit "
        f"{load(BASE).vmm.downtime_limit_ms:g}, of bytes only); X, hatched: does not converge; -: not run; bar: "
        "theory's boundary, rows without one always converge there",
        command,
        (2, 3),
        (14, 8),
    )
    states, rates = (sorted(set(runs[column])) for column in ("state_mib", "dirty_of_link"))
    most = 1.05 * number(runs.filter(COMPLETED)["downtime_ns"].max() or 1e6) / 1e6
    for axis, protocol in zip(axes, PROTOCOLS, strict=False):
        _map(axis, runs.filter(protocol=protocol), protocol, states, rates, most)
    axes[len(PROTOCOLS)].set_axis_off()
    never = Patch(facecolor="white", edgecolor="#999999", hatch=HATCH, label="does not converge")
    theory = Line2D([], [], color="black", linewidth=2, label="theory's boundary: what is carried / (1 - what fits)")
    panels.handles_below(figure, [never, theory])
    return figure


def _map(
    axis: Axes, runs: pl.DataFrame, protocol: str, states: Sequence[int], rates: Sequence[float], most: float
) -> None:
    squares = [[_square(runs.filter(state_mib=state, dirty_of_link=rate)) for rate in rates] for state in states]
    never = [(row, column) for row, line in enumerate(squares) for column, (_, text) in enumerate(line) if text == "X"]
    for row, column in never:
        corner = (column - 0.5, row - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, facecolor="white", hatch=HATCH, edgecolor="#999999"))
    names = [f"{state} MiB" if state < 1024 else f"{state // 1024} GiB" for state in states]
    panels.heat(axis, squares, [f"{rate:g}" for rate in rates], names, least=0, most=most)
    for row, column in never:  # on a patch of its own, so that the hatch does not hide it
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.texts[row * len(rates) + column].set(fontsize=9, fontweight="bold", bbox=box)
    for row, state in enumerate(states):
        boundary = boundary_mib_per_s(MAP, state, protocol) / link_mib_per_s()
        if boundary <= rates[-1] and any(text != "-" for _, text in squares[row]):
            x = float(np.interp(boundary, rates, range(len(rates))))
            axis.plot([x, x], [row - 0.5, row + 0.5], color="white", linewidth=4.5)
            axis.plot([x, x], [row - 0.5, row + 0.5], color="black", linewidth=2)
    panels.dress(axis, protocol, f"dirty rate / link's rate ({link_mib_per_s():.0f} MiB/s)", "device state")
    axis.grid(visible=False)


def _square(runs: pl.DataFrame) -> tuple[float, str]:
    """Mean downtime, ms, and the text of the square."""
    done = runs.filter(COMPLETED)
    if not done.height:
        return np.nan, "X" if runs.height else "-"
    downtime_ms = float(np.mean(done["downtime_ns"].to_numpy())) / 1e6
    part = f"\n{done.height} of {runs.height}" if done.height < runs.height else ""
    return downtime_ms, f"{downtime_ms:.0f}{part}"


def _edges(frame: pl.DataFrame, command: str) -> Figure:
    """A bar from the last rate that converges to the first that does not, for each machine and protocol."""
    figure, (axis,) = panels.sheet(
        "What moves the dirty rate at which pre-copy stops converging?",
        f"{STATE_OF_MACHINES_MIB / 1024:g} GiB of state; bar: from the last rate at which all runs complete to the "
        f"first at which not all do; {REPEATS_OF_MACHINES} seeds at most; black line: theory",
        command,
        (1, 1),
        (9, 5.5),
    )
    shown = [(machine, protocol) for machine, (_, protocols) in MACHINES.items() for protocol in protocols][::-1]
    for y, (machine, protocol) in enumerate(shown):
        look = style.protocol(protocol)
        low, high = bracket(frame.filter(machine=machine), protocol)
        if low is None and high is None:
            continue
        left, right = low or 0.95 * (high or 1.0), high or 1.05 * (low or 1.0)
        if not (low and high):
            axis.text(1.02 * right, y, f"somewhere {'below' if high else 'above'}", va="center", fontsize=7)
        axis.barh(y, max(right - left, 1.0), 0.6, left, color=look.colour, edgecolor="black", hatch=look.hatch)
        boundary = boundary_mib_per_s(machine, STATE_OF_MACHINES_MIB, protocol)
        axis.plot([boundary, boundary], [y - 0.42, y + 0.42], color="black", linewidth=2.5)
    panels.dress(axis, "boundary of convergence", "dirty rate, MiB/s", "")
    axis.set_yticks(range(len(shown)), [f"{machine}: {protocol}" for machine, protocol in shown])
    axis.set_xscale("log")
    ticks = [1000, 2000, 3000, 5000, 10000]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(left=ticks[0])
    panels.legend(figure, ENDS)
    return figure
