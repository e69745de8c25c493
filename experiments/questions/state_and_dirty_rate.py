# SPDX-License-Identifier: GPL-2.0-or-later
"""Which devices converge, and with which downtime: by the size of their state and the guest's rate of dirtying it.

Pre-copy converges if the device's data is carried faster than it is dirtied, or if the data that is always dirty fits
the downtime limit. The map has v2 and v3 on one machine, whose link carries more than one connection does. Around the
boundary that theory gives (sim.theory.rates), other machines show what moves it: one firmware engine, a link that one
connection fills, a guest with much RAM, writes to few blocks.

C2 and C3 are decided by how far N = 4 moves the boundary of N = 1: with eight engines, as theory says; with one engine,
not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, Line2D, Patch, Rectangle
from experiments.runs.frame import COMPLETED, completed_text, ms, number
from experiments.study.claims import Finding, judge
from experiments.study.effects import compared_text, effect_row, places, sentence, table
from experiments.study.experiment import Answer, Experiment, Factor, Point, under
from experiments.study.statistics import effect, interval, share
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import KIB, MIB
from sim.theory.rates import MIB_PER_S_PER_GBIT, convergence_mib_per_s, precopy_mib_per_s

BASE = "vgpu-32g"
LINK_GBIT_PER_S = 40.0
"""The map's link: less than eight engines save, more than one connection carries (15 Gbit/s)."""
LINK_MIB_PER_S = LINK_GBIT_PER_S * MIB_PER_S_PER_GBIT
SMALL_RAM = under("ram", size_gib=1, nonzero_gib=0.125, dirty_mib_per_s=0.01, working_set_mib=16)
"""The question is not about RAM."""
SYNC = under("ram", sync_ms=0.1, final_sync_ms=0.1)
"""The published 20.7 ms for 200 GiB, scaled to 1 GiB."""
PIECES_MIB = {64: (8, 1), 256: (8, 1), 1024: (8, 1), 4096: (16, 4), 16384: (64, 16), 65536: (64, 16)}
"""The sizes of a chunk and of a read, by state. Larger ones keep runs of large states cheap: at most 4096 reads a copy.
Dirty data is counted in bytes, so they leave the boundary where it is; the downtime grows by the time that a chunk
takes to be saved and loaded, 10 to 50 ms for 4 GiB in chunks of 32 MiB instead of 8."""
BUFFER_OF_CHUNK = 1.25
"""The size of the sockets' buffers, in chunks: as the base's."""
STOP_ONLY = 1 / 128
"""The part of the state that only a stopped device gives: as the base's."""
BLOCKS = 16384
"""The most blocks of a device."""
COPIES = 3.0
"""A migration is given up after the time of this number of copies of the state over one connection."""
STATE_OF_MACHINES_MIB = 4096
MAP, ENGINES, ONE_ENGINE, NARROW = "map", "8 engines", "1 engine", "narrow link"
MUCH_RAM, HOTSPOT = "64 GiB of RAM", "hotspot"
FAST_CONNECTION = f"link.per_connection_gbit_per_s={LINK_GBIT_PER_S:g}"
ENDS = ("v2", "v3-n1", "v3-n4")
MACHINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "connections": ((), ENDS),
    ENGINES: ((FAST_CONNECTION,), ENDS),
    ONE_ENGINE: ((FAST_CONNECTION, "firmware.engines=1"), ENDS),
    NARROW: (("link.gbit_per_s=15",), ENDS),
    MUCH_RAM: (
        ("ram.sync_ms=7", "ram.final_sync_ms=7", "driver.chunk_mib=8", "vmm.read_mib=1", "link.socket_buffer_mib=10"),
        ("v2", "v3-n1"),
    ),
}
"""The settings of each that differ from the map's, and its protocols: connections limit N here (as in the map), engines
do, one engine does, the link does; and a guest whose RAM takes as long to look through as the base's 64 GiB. There the
size of a read counts, for v2's thread may look between any two reads: it is QEMU's."""

STATES_MIB = (64, 256, 1024, 4096, 16384, 65536)
QUICK_STATES_MIB = (64, 4096)
RATES = (0.0, 0.15, 0.3, 0.4, 0.6, 0.9, 1.2, 2.0)
"""Dirty rates of the map, over the link's rate."""
QUICK_RATES = (0.15, 0.9)
IDLE_MIB_PER_S = 1e-3
"""A rate has to be more than 0; this is at most one block in a minute."""
PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4", "v3-blocks")
BLOCKS_UP_TO_MIB = 4096
"""A run of v3-blocks that does not converge takes 15 s of processor time for 16 GiB."""
REPEATS = {64: 10, 256: 4, 1024: 4, 4096: 3, 16384: 2, 65536: 1}
"""Whether a run converges is nearly settled by the rates: large states, which cost seconds, are repeated less."""
REPEATS_OF_MACHINES = 2
COMPARED_AT = 0.15
"""The dirty rate, over the link's, at which downtimes of these protocols are compared, with all repeats."""
COMPARED = ("v2", "v3-n4")
NEAR = (0.85, 0.94, 0.99, 1.01, 1.04, 1.1, 1.2)
"""Dirty rates of the machines, over the boundary that theory gives for each protocol."""
QUICK_NEAR = (0.75, 1.3)
QUICK_MACHINES = (ONE_ENGINE,)
HOTSPOT_RATES = (0.4, 2.0)
KEYS = ("machine", "state_mib", "dirty_mib_per_s")
MARGIN = 0.008
"""Nearer than this part to theory's boundary, theory does not say what a run does."""
NOTHING = 0.1
"""If N moves a boundary by less than this part, it does not move it."""
CLOSE = 0.15
"""A boundary is moved as theory says if all that the tried rates allow is within this part of it."""
HATCH = "xxx"
"""Of what does not converge."""


def settings(machine: str, state_mib: int) -> tuple[str, ...]:
    """KEY=VALUE of a machine with a device of this size, all but the writes."""
    chunk_mib, read_mib = PIECES_MIB[state_mib]
    return (
        *SMALL_RAM,
        *SYNC,
        f"link.gbit_per_s={LINK_GBIT_PER_S:g}",
        *under("device.0", state_mib=state_mib, stop_only_mib=state_mib * STOP_ONLY),
        f"device.0.block_kib={max(64, state_mib * KIB // BLOCKS)}",
        f"driver.chunk_mib={chunk_mib}",
        f"vmm.read_mib={read_mib}",
        f"link.socket_buffer_mib={chunk_mib * BUFFER_OF_CHUNK:g}",
        f"v3.critical_credit_mib={max(4, read_mib)}",
        f"vmm.give_up_s={2 + COPIES * state_mib / connection_mib_per_s():.4g}",
        *(MACHINES[machine][0] if machine in MACHINES else ()),
    )


@lru_cache
def connection_mib_per_s() -> float:
    """The rate of one connection, except on machines that set a higher one."""
    return load(BASE).link.per_connection_gbit_per_s * MIB_PER_S_PER_GBIT


@lru_cache
def applied(machine: str, state_mib: int, protocol: str) -> tuple[Scenario, int]:
    """The scenario as the protocol changes it, and the streams that carry a device's data in pre-copy: v2 has one, with
    multifd too, which carries only what comes after the stop."""
    scenario = load(BASE, settings(machine, state_mib))
    scenario = Protocol.parse(protocol, scenario).applied(scenario).scenario
    return scenario, scenario.v3.dirty_streams if protocol.startswith("v3") else 1


def boundary_mib_per_s(machine: str, state_mib: int, protocol: str) -> float:
    """Theory's dirty rate from which pre-copy does not converge; infinity if it always does."""
    return convergence_mib_per_s(*applied(machine, state_mib, protocol))


def points(quick: bool) -> list[Point]:
    """The map, the surroundings of the other machines' boundaries, and the hotspot."""
    grid = [
        _point(MAP, state, rate * LINK_MIB_PER_S, protocol)
        for state in (QUICK_STATES_MIB if quick else STATES_MIB)
        for rate in (QUICK_RATES if quick else RATES)
        for protocol in PROTOCOLS
        if protocol != "v3-blocks" or state <= BLOCKS_UP_TO_MIB
    ]
    state = STATE_OF_MACHINES_MIB
    for machine in QUICK_MACHINES if quick else MACHINES:
        for protocol in MACHINES[machine][1]:
            boundary = boundary_mib_per_s(machine, state, protocol)
            grid += [_point(machine, state, part * boundary, protocol) for part in (QUICK_NEAR if quick else NEAR)]
    return grid + [
        _point(HOTSPOT, state, rate * LINK_MIB_PER_S, protocol) for rate in HOTSPOT_RATES for protocol in COMPARED
    ]


def _point(machine: str, state_mib: int, dirty_mib_per_s: float, protocol: str) -> Point:
    rate = max(IDLE_MIB_PER_S, dirty_mib_per_s)
    if machine == HOTSPOT:
        writes = f"device.0.writes.mib_per_s={rate:.6g}"  # the base's pattern
    else:
        writes = f'device.0.writes={{pattern = "uniform", mib_per_s = {rate:.6g}}}'
    of_link = round(dirty_mib_per_s / LINK_MIB_PER_S, 3)
    place: tuple[Factor, ...] = (machine, state_mib, round(dirty_mib_per_s, 1), of_link)
    repeats: int | None = REPEATS[state_mib] if machine == MAP else REPEATS_OF_MACHINES
    if machine == MAP and protocol in COMPARED and of_link == COMPARED_AT:
        repeats = None
    factors = dict(zip((*KEYS, "dirty_of_link"), place, strict=True))
    return Point(BASE, protocol, (*settings(machine, state_mib), writes), factors, repeats)


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """Where does v2 stop converging, where does v3, and what moves that boundary?"""
    runs = frame.filter(machine=MAP)
    largest = max(runs["state_mib"])
    of_largest = runs.filter(state_mib=largest)
    fewest = min(some.height for _, some in places(of_largest, ["protocol", "dirty_of_link"]))
    ends = "; ".join(f"{protocol} {_bracket_text(of_largest, protocol, MAP)}" for protocol in ENDS)
    return Answer(
        f"With {largest / 1024:g} GiB of state, dirtied all over, pre-copy stops converging: {ends} (theory in "
        f"brackets; the link carries {LINK_MIB_PER_S:.0f}, a connection {connection_mib_per_s():.0f}); "
        f"{_agreement(frame)}.",
        f"Writes go to all blocks alike, the worst case ({_hotspot(frame)}); boundaries are between two rates that "
        f"were tried; large states move in larger pieces, with few seeds ({fewest} at {largest / 1024:g} GiB, except "
        "where downtimes are compared), enough for whether they converge and not for their downtime to the "
        f"millisecond; v3-blocks was run up to {BLOCKS_UP_TO_MIB / 1024:g} GiB only.",
        [*_machines(frame), _carried(frame), *_downtimes(runs)],
        [_moved(frame), _not_moved(frame)],
        table(_rows(frame)),
    )


def bracket(runs: pl.DataFrame, protocol: str) -> tuple[float | None, float | None]:
    """MiB/s: the largest rate up to which all runs complete, and the next one; None if there is none."""
    low: float | None = None
    by_rate = runs.filter(protocol=protocol).group_by("dirty_mib_per_s").agg(COMPLETED.all().alias("all"))
    for rate, all_completed in by_rate.sort("dirty_mib_per_s").iter_rows():
        if not all_completed:
            return low, rate
        low = rate
    return low, None


def _bracket_text(runs: pl.DataFrame, protocol: str, machine: str) -> str:
    if not runs.filter(protocol=protocol).height:
        return "was not run"
    match bracket(runs, protocol):
        case low, None:
            text = f"nowhere up to {low:.0f}"
        case None, high:
            text = f"below {high:.0f}"
        case low, high:
            text = f"between {low:.0f} and {high:.0f}"
    boundary = boundary_mib_per_s(machine, runs["state_mib"][0], protocol)
    return f"{text} MiB/s [{f'{boundary:.0f}' if np.isfinite(boundary) else 'never'}]"


def _agreement(frame: pl.DataFrame) -> str:
    """How many runs complete below theory's boundary, and how many above it."""
    completed: dict[str, list[bool]] = {"below": [], "above": []}
    for at, runs in places(frame.filter(~pl.col("machine").is_in([HOTSPOT, MUCH_RAM])), [*KEYS, "protocol"]):
        of_boundary = at["dirty_mib_per_s"] / boundary_mib_per_s(at["machine"], at["state_mib"], at["protocol"])
        if abs(of_boundary - 1) > MARGIN:
            completed["below" if of_boundary < 1 else "above"] += runs.select(COMPLETED).to_series().to_list()
    parts = []
    for side, ends in completed.items():
        if ends:
            part = share(sum(ends), len(ends)).percent
            parts.append(
                f"{side} theory's boundary {part.mean:.1f} % of {len(ends)} runs complete (95 % interval "
                f"{part.low:.1f} to {part.high:.1f})"
            )
    return ", ".join([*parts, f"not counted: a hotspot, and {MUCH_RAM}, where RAM decides when the VMM asks"])


def _hotspot(frame: pl.DataFrame) -> str:
    runs = frame.filter(machine=HOTSPOT)
    if not runs.height:
        return "a hotspot was not run"
    parts = [f"{at['protocol']} {completed_text(some)}" for at, some in places(runs, ["protocol"])]
    return f"with the base's hotspot, at up to {max(runs['dirty_mib_per_s']):.0f} MiB/s, complete: {', '.join(parts)}"


def _machines(frame: pl.DataFrame) -> Iterator[str]:
    """Where each protocol stops converging on each machine."""
    for machine, (_, protocols) in MACHINES.items():
        runs = frame.filter(machine=machine)
        if runs.height:
            parts = "; ".join(f"{protocol} {_bracket_text(runs, protocol, machine)}" for protocol in protocols)
            yield f"{machine} ({STATE_OF_MACHINES_MIB / 1024:g} GiB): {parts}."


def _carried(frame: pl.DataFrame) -> str:
    """What pre-copy carried where it never ended, over what theory lets it carry."""
    parts = []
    for at, runs in places(frame.filter(outcome="DID_NOT_CONVERGE", machine=MAP), ["protocol"]):
        could = precopy_mib_per_s(*applied(MAP, STATES_MIB[0], at["protocol"]))
        rate = runs["wire_bytes"] / MIB / (runs["total_ns"] / 1e9)
        parts.append(f"{at['protocol']} {interval(100 * rate.to_numpy() / could).text('%', 0)}")
    if not parts:
        return "Every run of the map converged."
    return f"Pre-copy that never ended carried this part of what theory allows: {'; '.join(parts)}."


def _downtimes(runs: pl.DataFrame) -> list[str]:
    """v3-n4 against v2, where both converge."""
    at = runs.filter(dirty_of_link=COMPARED_AT)
    parts = [
        f"{state} MiB: {compared_text(at.filter(state_mib=state), *COMPARED, digits=0)}"
        for state in sorted(set(at["state_mib"]))
    ]
    return sentence(f"Downtime of v3-n4 against v2 at {COMPARED_AT:g} of the link's rate, ", parts)


def _shift(frame: pl.DataFrame, machine: str) -> tuple[float, float, str]:
    """The factor by which N = 4 moves the boundary of N = 1, at the least and at the most by the rates that were tried,
    and in words. Both are nan if the runs do not show both boundaries."""
    runs = frame.filter(machine=machine)
    (one_low, one_high), (four_low, four_high) = (bracket(runs, protocol) for protocol in ("v3-n1", "v3-n4"))
    if not (one_low and one_high and four_low and four_high):
        return np.nan, np.nan, f"{machine}: the runs do not show both boundaries."
    one, four = (one_low + one_high) / 2, (four_low + four_high) / 2
    low, high = four_low / one_high, four_high / one_low
    factor = f"v3-n4's boundary is at {four / one:.2f} times v3-n1's ({four:.0f} and {one:.0f} MiB/s"
    return low, high, f"{machine}: {factor}; by the rates that were tried, {low:.2f} to {high:.2f} times)"


def _moved(frame: pl.DataFrame) -> Finding:
    """Several engines move the boundary as theory says."""
    low, high, text = _shift(frame, ENGINES)
    if np.isnan(low):
        return Finding("C2", "under conditions", text)
    one, four = (boundary_mib_per_s(ENGINES, STATE_OF_MACHINES_MIB, protocol) for protocol in ("v3-n1", "v3-n4"))
    near = four / one * (1 - CLOSE) <= low and high <= four / one * (1 + CLOSE)
    judged = judge(supported=near, refuted=not near and high <= 1 + NOTHING)
    return Finding("C2", judged, f"{text}; theory: {four / one:.2f}. This is about pre-copy, not stop-copy.")


def _not_moved(frame: pl.DataFrame) -> Finding:
    """One engine does not."""
    low, high, text = _shift(frame, ONE_ENGINE)
    if np.isnan(low):
        return Finding("C3", "under conditions", text)
    judged = judge(supported=high <= 1 + NOTHING, refuted=low > 1 + NOTHING)
    return Finding("C3", judged, f"{text}. This is about pre-copy.")


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, object]]:
    """Place by place: what each protocol does to v2's downtime, how many runs complete, and what theory says."""
    for at, runs in places(frame, [*KEYS, "dirty_of_link"]):
        for protocol in runs["protocol"].unique(maintain_order=True):
            some = runs.filter(protocol=protocol)
            boundary = boundary_mib_per_s(at["machine"], at["state_mib"], protocol)
            known = at["machine"] != HOTSPOT and np.isfinite(boundary)
            found = effect(runs, "downtime_ns", "v2", protocol) if protocol != "v2" else None
            yield (
                at
                | effect_row(found, "v2", protocol)
                | {"runs": some.height, "completed": some.filter(COMPLETED).height}
                | {"theory_boundary_mib_per_s": boundary if known else None}
            )


# --- the figures ------------------------------------------------------------------------------------------------------


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """The maps, and the boundaries of the machines."""
    return {"convergence_map": _maps(frame.filter(machine=MAP), command), "boundary": _edges(frame, command)}


def _maps(runs: pl.DataFrame, command: str) -> Figure:
    note = (
        f"{BASE} at {LINK_GBIT_PER_S:g} Gbit/s, writes to all blocks alike; numbers: mean downtime, ms (limit "
        f"{load(BASE).vmm.downtime_limit_ms:g}, of bytes only); X, hatched: does not converge; -: not run; bar: "
        "theory's boundary, rows without one always converge there"
    )
    figure, axes = panels.sheet("Which devices converge, and with which downtime?", note, command, (2, 3), (14, 8))
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
        boundary = boundary_mib_per_s(MAP, state, protocol) / LINK_MIB_PER_S
        if boundary <= rates[-1] and any(text != "-" for _, text in squares[row]):
            x = float(np.interp(boundary, rates, range(len(rates))))
            axis.plot([x, x], [row - 0.5, row + 0.5], color="white", linewidth=4.5)
            axis.plot([x, x], [row - 0.5, row + 0.5], color="black", linewidth=2)
    panels.dress(axis, protocol, f"dirty rate / link's rate ({LINK_MIB_PER_S:.0f} MiB/s)", "device state")
    axis.grid(visible=False)


def _square(runs: pl.DataFrame) -> tuple[float, str]:
    """Mean downtime, ms, and the text of the square."""
    done = runs.filter(COMPLETED)
    if not done.height:
        return np.nan, "X" if runs.height else "-"
    downtime_ms = ms(done["downtime_ns"].mean())
    part = f"\n{completed_text(runs)}" if done.height < runs.height else ""
    return downtime_ms, f"{downtime_ms:.0f}{part}"


def _edges(frame: pl.DataFrame, command: str) -> Figure:
    """A bar from the last rate that converges to the first that does not, for each machine and protocol."""
    title = "What moves the dirty rate at which pre-copy stops converging?"
    note = (
        f"{STATE_OF_MACHINES_MIB / 1024:g} GiB of state; bar: from the last rate at which all runs complete to the "
        f"first at which not all do; {REPEATS_OF_MACHINES} seeds at most; black line: theory"
    )
    figure, (axis,) = panels.sheet(title, note, command, (1, 1), (9, 5.5))
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


EXPERIMENT = Experiment(
    name="state_and_dirty_rate",
    question="Up to which dirty rate does a device of 64 MiB to 64 GiB converge, and with which downtime?",
    points=points,
    answer=answer,
    figures=figures,
    quick_repeats=2,
)
