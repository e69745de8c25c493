"""Which devices converge, and with which downtime: by size of their state and by the guest's rate of dirtying it.

Pre-copy converges as long as the device's data is carried faster than it is dirtied, or where what is dirty all the
time fits the downtime limit. The map has v2 and v3 on one machine, whose link carries more than one connection does.
Around the boundary that theory gives, other machines tell what moves it: one firmware engine, a link that one
connection fills, a guest with much RAM, writes to few blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.questions.state_and_dirty_rate.convergence import (
    BASE,
    ENGINES,
    HOTSPOT,
    LINK_GBIT_PER_S,
    MACHINES,
    MAP,
    MUCH_RAM,
    ONE_ENGINE,
    STATE_OF_MACHINES_MIB,
    boundary_mib_per_s,
    bracket,
    carried_mib_per_s,
    connection_mib_per_s,
    link_mib_per_s,
    settings,
)
from experiments.runs.frame import COMPLETED
from experiments.study.experiment import NOT_BOTH, Answer, Experiment, Finding, Point, Verdict, effect_row, places
from experiments.study.statistics import Effect, effect, interval, share
from sim.scenario.file import load
from sim.scenario.units import MIB

STATES_MIB = (64, 256, 1024, 4096, 16384, 65536)
QUICK_STATES_MIB = (64, 4096)
RATES = (0.0, 0.15, 0.3, 0.4, 0.6, 0.9, 1.2, 2.0)
"""Dirty rates, as parts of the link's rate."""
QUICK_RATES = (0.15, 0.9)
IDLE_MIB_PER_S = 1e-3
"""A rate has to be more than 0; that is one block in a minute at most."""
PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4", "v3-blocks")
BLOCKS_UP_TO_MIB = 4096
"""A run of v3-blocks that does not converge takes 15 s of processor time for 16 GiB."""
REPEATS = {64: 10, 256: 4, 1024: 4, 4096: 3, 16384: 2, 65536: 1}
"""Whether a run converges is all but settled by the rates: large states, which cost seconds, are repeated less."""
REPEATS_OF_MACHINES = 2
COMPARED_AT = 0.15
"""Of the link's rate: there downtimes are compared, of these, and all repeats are made."""
COMPARED = ("v2", "v3-n4")
NEAR = (0.85, 0.94, 0.99, 1.01, 1.04, 1.1, 1.2)
"""Dirty rates of the machines, as parts of the boundary that theory gives for each protocol."""
QUICK_NEAR = (0.75, 1.3)
QUICK_MACHINES = (ONE_ENGINE,)
HOTSPOT_PROTOCOLS = ("v2", "v3-n4")
HOTSPOT_RATES = (0.4, 2.0)
KEYS = ("machine", "state_mib", "dirty_mib_per_s")
MARGIN = 0.008
"""Nearer than that to the theory's boundary it does not say what a run does."""
NOTHING = 0.1
"""A boundary that N moves by less than that part is not moved."""
CLOSE = 0.15
"""A boundary is moved as theory says if all that the tried rates allow is within that part of it."""
HATCH = "xxx"


def points(quick: bool) -> list[Point]:
    """The map, and what is around the boundaries of the other machines."""
    states, rates = (QUICK_STATES_MIB, QUICK_RATES) if quick else (STATES_MIB, RATES)
    near = QUICK_NEAR if quick else NEAR
    grid = [
        _point(MAP, state, rate * link_mib_per_s(), protocol)
        for state in states
        for rate in rates
        for protocol in PROTOCOLS
        if protocol != "v3-blocks" or state <= BLOCKS_UP_TO_MIB
    ]
    for machine in QUICK_MACHINES if quick else tuple(MACHINES):
        for protocol in MACHINES[machine][1]:
            boundary = boundary_mib_per_s(machine, STATE_OF_MACHINES_MIB, protocol)
            grid += [_point(machine, STATE_OF_MACHINES_MIB, part * boundary, protocol) for part in near]
    rates_of_hotspot = [rate * link_mib_per_s() for rate in HOTSPOT_RATES]
    grid += [
        _point(HOTSPOT, STATE_OF_MACHINES_MIB, rate, protocol)
        for rate in rates_of_hotspot
        for protocol in HOTSPOT_PROTOCOLS
    ]
    return grid


def _point(machine: str, state_mib: int, dirty_mib_per_s: float, protocol: str) -> Point:
    rate = max(IDLE_MIB_PER_S, dirty_mib_per_s)
    if machine == HOTSPOT:
        writes = f"device.0.writes.mib_per_s={rate:.6g}"  # the base's pattern
    else:
        writes = f'device.0.writes={{pattern = "uniform", mib_per_s = {rate:.6g}}}'
    told = round(dirty_mib_per_s, 1)
    factors: dict[str, str | int | float | bool] = {
        "machine": machine,
        "state_mib": state_mib,
        "dirty_mib_per_s": told,
        "dirty_of_link": round(dirty_mib_per_s / link_mib_per_s(), 3),
    }
    if machine != MAP:
        repeats: int | None = REPEATS_OF_MACHINES
    else:
        compared = protocol in COMPARED and factors["dirty_of_link"] == COMPARED_AT
        repeats = None if compared else REPEATS[state_mib]
    return Point(BASE, protocol, (*settings(machine, state_mib), writes), factors, repeats)


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """Where does v2 stop converging, where does v3, and what moves that?"""
    runs = frame.filter(pl.col("machine") == MAP)
    largest = max(runs["state_mib"])
    of_largest = runs.filter(pl.col("state_mib") == largest)
    fewest = min(some.height for _, some in places(of_largest, ["protocol", "dirty_of_link"]))
    ends = "; ".join(
        f"{protocol} {_bracket_told(runs.filter(pl.col('state_mib') == largest), protocol, MAP)}"
        for protocol in ("v2", "v3-n1", "v3-n4")
    )
    return Answer(
        f"With {largest / 1024:g} GiB of state, dirtied all over, pre-copy stops converging: {ends} (theory in "
        f"brackets; the link carries {link_mib_per_s():.0f}, a connection {connection_mib_per_s():.0f}); "
        f"{_held(frame)}.",
        f"Writes go to all blocks alike, the worst case ({_hotspot(frame)}); boundaries are between two rates that "
        f"were tried; large states move in larger pieces, with few seeds ({fewest} at {largest / 1024:g} GiB, but for "
        "where downtimes are compared), enough for whether they converge and not for their downtime to the "
        f"millisecond; v3-blocks was run up to {BLOCKS_UP_TO_MIB / 1024:g} GiB only.",
        [*_machines(frame), _carried(frame), *_downtimes(runs)],
        [_moved(frame, "C2", ENGINES), _not_moved(frame, "C3", ONE_ENGINE)],
        effects(frame),
    )


def _bracket_told(runs: pl.DataFrame, protocol: str, machine: str) -> str:
    if not runs.filter(pl.col("protocol") == protocol).height:
        return "was not run"
    low, high = bracket(runs, protocol)
    if high is None:
        told = f"nowhere up to {low:.0f} MiB/s"
    elif low is None:
        told = f"below {high:.0f} MiB/s"
    else:
        told = f"between {low:.0f} and {high:.0f} MiB/s"
    boundary = boundary_mib_per_s(machine, runs["state_mib"][0], protocol)
    return f"{told} [{boundary:.0f}]" if np.isfinite(boundary) else f"{told} [never]"


def _held(frame: pl.DataFrame) -> str:
    """How often theory is right, below its boundary and above."""
    below, above = [0, 0], [0, 0]
    uniform = frame.filter(~pl.col("machine").is_in([HOTSPOT, MUCH_RAM]))
    for at, runs in places(uniform, [*KEYS, "protocol"]):
        boundary = boundary_mib_per_s(at["machine"], at["state_mib"], at["protocol"])
        done = runs.filter(COMPLETED).height
        if at["dirty_mib_per_s"] < boundary * (1 - MARGIN):
            below[0], below[1] = below[0] + done, below[1] + runs.height
        elif at["dirty_mib_per_s"] > boundary * (1 + MARGIN):
            above[0], above[1] = above[0] + done, above[1] + runs.height
    told = []
    for side, (done, count) in (("below", below), ("above", above)):
        if count:
            part = share(done, count)
            told.append(
                f"{side} theory's boundary {100 * part.mean:.1f} % of {count} runs complete (95 % interval "
                f"{100 * part.low:.1f} to {100 * part.high:.1f})"
            )
    told.append(f"not counted: a hotspot, and {MUCH_RAM}, where RAM decides when the VMM asks")
    return ", ".join(told)


def _hotspot(frame: pl.DataFrame) -> str:
    runs = frame.filter(pl.col("machine") == HOTSPOT)
    if not runs.height:
        return "a hotspot was not run"
    done = {at["protocol"]: some.filter(COMPLETED).height for at, some in places(runs, ["protocol"])}
    counts = {at["protocol"]: some.height for at, some in places(runs, ["protocol"])}
    told = ", ".join(f"{protocol} {done[protocol]} of {counts[protocol]}" for protocol in counts)
    return f"with the base's hotspot, at up to {max(runs['dirty_mib_per_s']):.0f} MiB/s, complete: {told}"


def _machines(frame: pl.DataFrame) -> list[str]:
    """Where each protocol stops converging on each machine."""
    told = []
    for machine, (_, protocols) in MACHINES.items():
        runs = frame.filter(pl.col("machine") == machine)
        if runs.height:
            parts = "; ".join(f"{protocol} {_bracket_told(runs, protocol, machine)}" for protocol in protocols)
            told.append(f"{machine} ({STATE_OF_MACHINES_MIB / 1024:g} GiB): {parts}.")
    return told


def _rate_mib_per_s(runs: pl.DataFrame) -> pl.Series:
    return runs["wire_bytes"] / MIB / (runs["total_ns"] / 1e9)


def _carried(frame: pl.DataFrame) -> str:
    """What pre-copy really carried where it never ended, against what it could."""
    told = []
    endless = frame.filter((pl.col("outcome") == "DID_NOT_CONVERGE") & (pl.col("machine") == MAP))
    for at, runs in places(endless, ["protocol"]):
        could = carried_mib_per_s(load(BASE, settings(MAP, STATES_MIB[0])), at["protocol"])
        part = interval(100 * _rate_mib_per_s(runs).to_numpy() / could)
        told.append(f"{at['protocol']} {part.told('%', 0)}")
    if not told:
        return "Every run of the map converged."
    return f"Of what theory lets it carry, pre-copy that never ended carried: {'; '.join(told)}."


def _downtimes(runs: pl.DataFrame) -> list[str]:
    """v3-n4 against v2, where both converge."""
    told = []
    at = runs.filter(pl.col("dirty_of_link") == COMPARED_AT)
    for state in sorted(set(at["state_mib"])):
        one = effect(at.filter(pl.col("state_mib") == state), "downtime_ns", *COMPARED)
        told.append(f"{state} MiB: {_effect_told(one)}")
    return [f"Downtime of v3-n4 against v2 at {COMPARED_AT:g} of the link's rate, {'; '.join(told)}."] if told else []


def _effect_told(one: Effect | None) -> str:
    """In ms; of one pair there is no interval."""
    return one.told("ms", 1e6, 0) if one else NOT_BOTH


def _middle(frame: pl.DataFrame, machine: str, protocol: str) -> float | None:
    low, high = bracket(frame.filter(pl.col("machine") == machine), protocol)
    return None if low is None or high is None else (low + high) / 2


def _range(frame: pl.DataFrame, machine: str) -> tuple[float, float]:
    """The least and the most that the boundary can have moved by, as factors."""
    runs = frame.filter(pl.col("machine") == machine)
    one, four = (bracket(runs, protocol) for protocol in ("v3-n1", "v3-n4"))
    return (four[0] or 0.0) / (one[1] or 1.0), (four[1] or 0.0) / (one[0] or 1.0)


def _shift(frame: pl.DataFrame, machine: str) -> tuple[float | None, str]:
    """By how much N = 4 moves the boundary of N = 1, as a factor, and that in words."""
    one, four = (_middle(frame, machine, protocol) for protocol in ("v3-n1", "v3-n4"))
    if one is None or four is None:
        return None, f"{machine}: the runs do not show both boundaries."
    low, high = _range(frame, machine)
    told = (
        f"{machine}: v3-n4's boundary is at {four / one:.2f} times v3-n1's ({four:.0f} and {one:.0f} MiB/s; by the "
        f"rates that were tried, {low:.2f} to {high:.2f} times)"
    )
    return four / one, told


def _moved(frame: pl.DataFrame, claim: str, machine: str) -> Finding:
    """Several engines move it as theory says."""
    factor, told = _shift(frame, machine)
    if factor is None:
        return Finding(claim, "under conditions", told)
    theory = [boundary_mib_per_s(machine, STATE_OF_MACHINES_MIB, protocol) for protocol in ("v3-n1", "v3-n4")]
    expected = theory[1] / theory[0]
    low, high = _range(frame, machine)
    near = expected * (1 - CLOSE) <= low and high <= expected * (1 + CLOSE)
    return Finding(
        claim,
        "supported" if near else "refuted" if high <= 1 + NOTHING else "under conditions",
        f"{told}; theory: {expected:.2f}. That is of pre-copy, not of stop-copy.",
    )


def _not_moved(frame: pl.DataFrame, claim: str, machine: str) -> Finding:
    factor, told = _shift(frame, machine)
    if factor is None:
        return Finding(claim, "under conditions", told)
    low, high = _range(frame, machine)
    verdict: Verdict = "supported" if high <= 1 + NOTHING else "refuted" if low > 1 + NOTHING else "under conditions"
    return Finding(claim, verdict, f"{told}. That is of pre-copy.")


def effects(frame: pl.DataFrame) -> pl.DataFrame:
    """Place by place: what each protocol does to v2's downtime, how many runs complete, and what theory says."""
    rows = []
    for at, runs in places(frame, [*KEYS, "dirty_of_link"]):
        for protocol in runs["protocol"].unique(maintain_order=True):
            some = runs.filter(pl.col("protocol") == protocol)
            boundary = boundary_mib_per_s(at["machine"], at["state_mib"], protocol)
            counted: dict[str, Any] = {
                "runs": some.height,
                "completed": some.filter(COMPLETED).height,
                "theory_boundary_mib_per_s": boundary if at["machine"] != HOTSPOT and np.isfinite(boundary) else None,
            }
            told = effect(runs, "downtime_ns", "v2", protocol) if protocol != "v2" else None
            rows.append(at | effect_row(told, "v2", protocol, 1e6, "ms") | counted)
    return pl.DataFrame(rows, infer_schema_length=None)


# --- the figures ------------------------------------------------------------------------------------------------------


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """The maps, and the boundaries of the machines."""
    return {
        "convergence_map": _maps(frame.filter(pl.col("machine") == MAP), command),
        "boundary": _edges(frame, command),
    }


def _maps(runs: pl.DataFrame, command: str) -> Figure:
    figure, axes = charts.sheet(
        "Which devices converge, and with which downtime?",
        f"{BASE} at {LINK_GBIT_PER_S:g} Gbit/s, writes to all blocks alike; numbers: mean downtime, ms (limit "
        f"{load(BASE).vmm.downtime_limit_ms:g}, of bytes only); X, hatched: does not converge; -: not run; bar: "
        "theory's boundary, rows without one always converge there",
        command,
        (2, 3),
        (14, 8),
    )
    states, rates = (sorted(set(runs[column])) for column in ("state_mib", "dirty_of_link"))
    most = 1.05 * max([float(value) / 1e6 for value in runs.filter(COMPLETED)["downtime_ns"]], default=1.0)
    for axis, protocol in zip(axes, PROTOCOLS, strict=False):
        _map(axis, runs.filter(pl.col("protocol") == protocol), protocol, states, rates, most)
    axes[len(PROTOCOLS)].set_axis_off()
    never = Patch(facecolor="white", edgecolor="#999999", hatch=HATCH, label="does not converge")
    theory = Line2D([], [], color="black", linewidth=2, label="theory's boundary: what is carried / (1 - what fits)")
    charts.handles_below(figure, [never, theory])
    return figure


def _map(
    axis: Axes, runs: pl.DataFrame, protocol: str, states: Sequence[int], rates: Sequence[float], most: float
) -> None:
    values = np.full((len(states), len(rates)), np.nan)
    text = [["-"] * len(rates) for _ in states]
    for at, some in places(runs, ["state_mib", "dirty_of_link"]):
        row, column = states.index(at["state_mib"]), rates.index(at["dirty_of_link"])
        done = some.filter(COMPLETED)
        if done.height:
            values[row, column] = float(np.mean(done["downtime_ns"].to_numpy())) / 1e6
            part = f"\n{done.height} of {some.height}" if done.height < some.height else ""
            text[row][column] = f"{values[row, column]:.0f}{part}"
        else:
            text[row][column] = "X"
            square = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", hatch=HATCH, edgecolor="#999999")
            axis.add_patch(square)
    names = [f"{state} MiB" if state < 1024 else f"{state // 1024} GiB" for state in states]
    charts.heat(axis, values, [f"{rate:g}" for rate in rates], names, least=0, most=most, text=text)
    for row, column in np.ndindex(*values.shape):
        if text[row][column] == "X":  # on a patch of its own, that the hatch does not hide it
            axis.texts[row * len(rates) + column].set(
                fontsize=9, fontweight="bold", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}
            )
    for row, state in enumerate(states):
        boundary = boundary_mib_per_s(MAP, state, protocol) / link_mib_per_s()
        if boundary <= rates[-1] and set(text[row]) != {"-"}:
            x = float(np.interp(boundary, rates, range(len(rates))))
            axis.plot([x, x], [row - 0.5, row + 0.5], color="white", linewidth=4.5)
            axis.plot([x, x], [row - 0.5, row + 0.5], color="black", linewidth=2)
    charts.dress(axis, protocol, f"dirty rate / link's rate ({link_mib_per_s():.0f} MiB/s)", "device state")
    axis.grid(visible=False)


def _edges(frame: pl.DataFrame, command: str) -> Figure:
    """A bar from the last rate that converges to the first that does not, for each machine and protocol."""
    figure, axes = charts.sheet(
        "What moves the dirty rate at which pre-copy stops converging?",
        f"{STATE_OF_MACHINES_MIB / 1024:g} GiB of state; bar: from the last rate at which all runs complete to the "
        f"first at which not all do; {REPEATS_OF_MACHINES} seeds at most; black line: theory",
        command,
        (1, 1),
        (9, 5.5),
    )
    names: list[str] = []
    axis = axes[0]
    for machine, (_, protocols) in reversed(MACHINES.items()):
        runs = frame.filter(pl.col("machine") == machine)
        for protocol in reversed(protocols):
            y, look = len(names), style.protocol(protocol)
            names.append(f"{machine}: {protocol}")
            low, high = bracket(runs, protocol)
            if low is None and high is None:
                continue
            open_end = "" if low and high else "below" if high else "above"
            left, right = low or 0.95 * (high or 1.0), high or 1.05 * (low or 1.0)
            if open_end:
                axis.text(1.02 * right, y, f"somewhere {open_end}", va="center", fontsize=7)
            axis.barh(y, max(right - left, 1.0), 0.6, left, color=look.colour, edgecolor="black", hatch=look.hatch)
            boundary = boundary_mib_per_s(machine, STATE_OF_MACHINES_MIB, protocol)
            axis.plot([boundary, boundary], [y - 0.42, y + 0.42], color="black", linewidth=2.5)
    charts.dress(axis, "boundary of convergence", "dirty rate, MiB/s", "")
    axis.set_yticks(range(len(names)), names)
    axis.set_xscale("log")
    ticks = [1000, 2000, 3000, 5000, 10000]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(left=ticks[0])
    charts.legend(figure, ("v2", "v3-n1", "v3-n4"))
    return figure


EXPERIMENT = Experiment(
    name="state_and_dirty_rate",
    question="Up to which dirty rate does a device of 64 MiB to 64 GiB converge, and with which downtime?",
    claims=("C2", "C3"),
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
