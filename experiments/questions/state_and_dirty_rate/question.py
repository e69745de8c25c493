"""The machines, states and dirty rates of state_and_dirty_rate, and where the runs stop converging."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import polars as pl

from experiments.runs.frame import COMPLETED
from experiments.study.claims import Finding, judge
from experiments.study.effects import compared_text, effect_row, places, sentence, table
from experiments.study.experiment import Answer, Factor, Point
from experiments.study.statistics import effect, interval, share
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import KIB, MIB
from sim.theory.rates import MIB_PER_S_PER_GBIT, convergence_mib_per_s, precopy_mib_per_s

BASE = "vgpu-32g"
LINK_GBIT_PER_S = 40.0
"""Less than eight engines save, more than one connection carries (15 Gbit/s)."""
SMALL_RAM = ("ram.size_gib=1", "ram.nonzero_gib=0.125", "ram.dirty_mib_per_s=0.01", "ram.working_set_mib=16")
"""The question is not about RAM."""
SYNC = ("ram.sync_ms=0.1", "ram.final_sync_ms=0.1")
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


def settings(machine: str, state_mib: int) -> tuple[str, ...]:
    """KEY=VALUE of a machine with a device of this size, all but the writes."""
    chunk_mib, read_mib = PIECES_MIB[state_mib]
    return (
        *SMALL_RAM,
        *SYNC,
        f"link.gbit_per_s={LINK_GBIT_PER_S:g}",
        f"device.0.state_mib={state_mib}",
        f"device.0.stop_only_mib={state_mib * STOP_ONLY:g}",
        f"device.0.block_kib={max(64, state_mib * KIB // BLOCKS)}",
        f"driver.chunk_mib={chunk_mib}",
        f"vmm.read_mib={read_mib}",
        f"link.socket_buffer_mib={chunk_mib * BUFFER_OF_CHUNK:g}",
        f"v3.critical_credit_mib={max(4, read_mib)}",
        f"vmm.give_up_s={2 + COPIES * state_mib / connection_mib_per_s():.4g}",
        *(MACHINES[machine][0] if machine in MACHINES else ()),
    )


def link_mib_per_s() -> float:
    """The rate of the map's link."""
    return LINK_GBIT_PER_S * MIB_PER_S_PER_GBIT


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
        _point(MAP, state, rate * link_mib_per_s(), protocol)
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
        _point(HOTSPOT, state, rate * link_mib_per_s(), protocol) for rate in HOTSPOT_RATES for protocol in COMPARED
    ]


def _point(machine: str, state_mib: int, dirty_mib_per_s: float, protocol: str) -> Point:
    rate = max(IDLE_MIB_PER_S, dirty_mib_per_s)
    if machine == HOTSPOT:
        writes = f"device.0.writes.mib_per_s={rate:.6g}"  # the base's pattern
    else:
        writes = f'device.0.writes={{pattern = "uniform", mib_per_s = {rate:.6g}}}'
    of_link = round(dirty_mib_per_s / link_mib_per_s(), 3)
    place: tuple[Factor, ...] = (machine, state_mib, round(dirty_mib_per_s, 1), of_link)
    if machine != MAP:
        repeats: int | None = REPEATS_OF_MACHINES
    else:
        repeats = None if protocol in COMPARED and of_link == COMPARED_AT else REPEATS[state_mib]
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
        f"brackets; the link carries {link_mib_per_s():.0f}, a connection {connection_mib_per_s():.0f}); "
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
    for at, some in places(runs.filter(protocol=protocol).sort("dirty_mib_per_s"), ["dirty_mib_per_s"]):
        rate = float(at["dirty_mib_per_s"])
        if some.filter(COMPLETED).height < some.height:
            return low, rate
        low = rate
    return low, None


def _bracket_text(runs: pl.DataFrame, protocol: str, machine: str) -> str:
    if not runs.filter(protocol=protocol).height:
        return "was not run"
    low, high = bracket(runs, protocol)
    if high is None:
        text = f"nowhere up to {low:.0f} MiB/s"
    elif low is None:
        text = f"below {high:.0f} MiB/s"
    else:
        text = f"between {low:.0f} and {high:.0f} MiB/s"
    boundary = boundary_mib_per_s(machine, runs["state_mib"][0], protocol)
    return f"{text} [{boundary:.0f}]" if np.isfinite(boundary) else f"{text} [never]"


def _agreement(frame: pl.DataFrame) -> str:
    """How many runs complete below theory's boundary, and how many above it."""
    counts = {"below": [0, 0], "above": [0, 0]}
    for at, runs in places(frame.filter(~pl.col("machine").is_in([HOTSPOT, MUCH_RAM])), [*KEYS, "protocol"]):
        boundary = boundary_mib_per_s(at["machine"], at["state_mib"], at["protocol"])
        if at["dirty_mib_per_s"] < boundary * (1 - MARGIN):
            side = "below"
        elif at["dirty_mib_per_s"] > boundary * (1 + MARGIN):
            side = "above"
        else:
            continue
        counts[side][0] += runs.filter(COMPLETED).height
        counts[side][1] += runs.height
    parts = []
    for side, (done, count) in counts.items():
        if count:
            part = share(done, count).percent
            parts.append(
                f"{side} theory's boundary {part.mean:.1f} % of {count} runs complete (95 % interval {part.low:.1f} to "
                f"{part.high:.1f})"
            )
    return ", ".join([*parts, f"not counted: a hotspot, and {MUCH_RAM}, where RAM decides when the VMM asks"])


def _hotspot(frame: pl.DataFrame) -> str:
    runs = frame.filter(machine=HOTSPOT)
    if not runs.height:
        return "a hotspot was not run"
    parts = [
        f"{at['protocol']} {some.filter(COMPLETED).height} of {some.height}" for at, some in places(runs, ["protocol"])
    ]
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
    if one_low is None or one_high is None or four_low is None or four_high is None:
        return np.nan, np.nan, f"{machine}: the runs do not show both boundaries."
    one, four = (one_low + one_high) / 2, (four_low + four_high) / 2
    low, high = four_low / one_high, four_high / one_low
    text = (
        f"{machine}: v3-n4's boundary is at {four / one:.2f} times v3-n1's ({four:.0f} and {one:.0f} MiB/s; by the "
        f"rates that were tried, {low:.2f} to {high:.2f} times)"
    )
    return low, high, text


def _moved(frame: pl.DataFrame) -> Finding:
    """Several engines move the boundary as theory says."""
    low, high, text = _shift(frame, ENGINES)
    if np.isnan(low):
        return Finding("C2", "under conditions", text)
    one, four = (boundary_mib_per_s(ENGINES, STATE_OF_MACHINES_MIB, protocol) for protocol in ("v3-n1", "v3-n4"))
    near = four / one * (1 - CLOSE) <= low and high <= four / one * (1 + CLOSE)
    judged = "supported" if near else judge(supported=False, refuted=high <= 1 + NOTHING)
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
