# SPDX-License-Identifier: GPL-2.0-or-later
"""The grid of reorder_memory with the bound of each run; does it hold, how tight is it, and what does it cost?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import polars as pl

from experiments.runs.frame import COMPLETED, number
from experiments.study.claims import Finding
from experiments.study.effects import NOT_BOTH, effect_row, incomplete, places, sentence, table
from experiments.study.experiment import Answer, Point, under
from experiments.study.statistics import effect, interval
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.units import MIB
from sim.theory.memory_bound import MemoryBound, memory_bound

SLOW_LOAD = (
    *under("link", gbit_per_s=25, per_connection_gbit_per_s=25),
    *under("vmm", bandwidth_gbit_per_s=100, multifd_channels=5),
    "driver.lock=per_fd",
    "firmware.engines=4",
    *under("ram", size_gib=0.25, nonzero_gib=0.03),
    "device.0.max_dirty_streams=16",
)
"""favours-v2 on a faster link and with a slower LOAD, so that data comes faster than it is loaded. The bandwidth that
the VMM is given lets all of them stop at once, with the whole state still to be moved."""
LOAD_MIB_PER_S = 100
"""The rate of one command; four run at full speed."""
STATE_MIB = 128
STREAMS = (1, 2, 4, 8, 16)
STREAMS_STATE_MIB = 256
"""With 16 streams two records each: the driver would take a single one at once, and nothing would wait in the VMM."""
MANY = 4
"""The N of all sweeps that do not sweep N."""
STATES_MIB = (64, 128, 256, 512)
LOADS_MIB_PER_S = (100, 400, 1600, 6400)
BUSY_STREAMS = (1, 2, 4)
"""Streams that have something to send, or nearly all of it. The model has no parameter for uneven streams: blocks go to
streams by their number modulo N, so a hotspot of many blocks comes out even. One of fewer blocks than streams does not,
and neither does a state of fewer blocks than streams."""
SETUPS_US = (0, 1000, 4000, 8000)
"""The set-up of each critical object: dirty records of an epoch wait for its 32 objects. With the last value the target
cannot set up all between two reconfigurations."""
DIRTY_CREDITS_MIB = (1, 4, 16, 64, 256)
CRITICAL_CREDITS_MIB = (1, 4, 16)
DEFAULT_CREDIT_MIB = 64
LATE = (
    *under("ram", size_gib=0.5, nonzero_gib=0.0625, dirty_mib_per_s=5, working_set_mib=16),
    *under("device.0", state_mib=128, block_kib=1024),
    "device.0.critical.objects=128",
    "driver.initial=critical",
    "link.gbit_per_s=25",
    "vmm.give_up_s=4",
)
"""nic-reconfig with little RAM and a smaller device: more runs in the same time."""
CHUNKS = "driver.precopy_image=chunks"
LARGE_OBJECTS = ("device.0.critical.object_kib=256", "v3.dirty_credit_mib=16")
"""8 MiB of critical data a reconfiguration: only so does the critical stream need its credit."""
HOT = ("device.0.block_kib=8192", "device.0.writes.mib_per_s=300", "device.0.writes.hot_share=0.99")
HOT_SETUP_US = 2000
HOT_OF_BLOCKS = 12
"""What can be written of 128 MiB in blocks of 8, less nic-reconfig's 32 MiB that only a stopped device gives."""
WIRES = ("", "-pool", "-one")
WIRE_NAMES = {"": "a connection a stream", "-pool": "pool", "-one": "one connection"}
UNBOUNDED = "v2-multifd"
SHARED = f"v3-n{MANY}-pool"
ONE_READER = "v3-n1-pool"
"""One stream and one load at a time, as multifd has for a device: what they differ in is the bound."""
PEAKS = {"vmm": "peak_reorder_bytes", "driver": "peak_held_bytes"}
"""The peak that each of the two bounds is for."""


@lru_cache(maxsize=1024)
def bound_of(base: str, settings: tuple[str, ...], protocol: str) -> MemoryBound | None:
    """The bound of a run; None under v2, which has none."""
    scenario = load(base, settings)
    parsed = Protocol.parse(protocol, scenario)
    return memory_bound(parsed.applied(scenario)) if parsed.version == 3 else None


def with_bounds(frame: pl.DataFrame) -> pl.DataFrame:
    """The runs, each with its bounds and the parts of them that it took. Runs that broke are left out: what they took
    does not count."""
    frame = frame.filter(pl.col("digest") != "")
    runs = frame.select("base", "settings", "protocol").iter_rows()
    bounds = [bound_of(base, tuple(settings), protocol) for base, settings, protocol in runs]
    columns = [
        pl.Series(f"{name}_bytes", [each and getattr(each, f"{of}_bytes") for each in bounds], pl.Int64)
        for name, of in (("vmm_bound", "vmm"), ("driver_bound", "driver"), ("sockets", "sockets"))
    ]
    ratios = [(pl.col(peak) / pl.col(f"{name}_bound_bytes")).alias(f"{name}_of_bound") for name, peak in PEAKS.items()]
    return frame.with_columns(columns).with_columns(ratios)


def of_kind(frame: pl.DataFrame, kind: str) -> pl.DataFrame:
    """The runs that a curve shows."""
    names = {"blocks": "-blocks", UNBOUNDED: f"^{UNBOUNDED}$"}
    return frame.filter(pl.col("protocol").str.contains(names.get(kind, rf"^v3-n\d+{kind}$")))


# --- the grid ---------------------------------------------------------------------------------------------------------


class MemoryPlace(NamedTuple):
    """The swept values, and what they are where they are not swept."""

    part: str
    streams: int = MANY
    state_mib: int = STATE_MIB
    load_mib_per_s: int = LOAD_MIB_PER_S
    busy_streams: int = MANY
    setup_us: int = 0
    dirty_credit_mib: int = DEFAULT_CREDIT_MIB
    critical_credit_mib: int = 4
    image: str = "chunks"


PLACE = MemoryPlace._fields


def _slow(protocol: str, at: MemoryPlace) -> Point:
    """All of the state moves after the stop, to a target that loads it more slowly than it comes."""
    block_mib = at.state_mib // at.busy_streams if at.part == "uneven" else 1
    settings = (
        *SLOW_LOAD,
        *under("device.0", state_mib=at.state_mib, stop_only_mib=at.state_mib, block_kib=block_mib * 1024),
        f"driver.chunk_mib={max(8, block_mib)}",
        f"firmware.load_mib_per_s={at.load_mib_per_s}",
        f"v3.dirty_credit_mib={at.dirty_credit_mib}",
    )
    return Point("favours-v2", protocol, settings, at._asdict())


def _held_back(
    part: str, protocol: str, setup_us: int, *settings: str, critical_mib: int = 4, busy: int = MANY
) -> Point:
    """A guest that reconfigures: dirty records wait for their epoch's set-up."""
    credit_mib = 16 if LARGE_OBJECTS[0] in settings else DEFAULT_CREDIT_MIB
    image = "chunks" if CHUNKS in settings else "whole"
    at = MemoryPlace(part, MANY, STATE_MIB, 6000, busy, setup_us, credit_mib, critical_mib, image)
    settings = (f"device.0.critical.setup_us={setup_us}", f"v3.critical_credit_mib={critical_mib}", *settings)
    return Point("nic-reconfig", protocol, (*LATE, *settings), at._asdict())


def points(quick: bool) -> list[Point]:
    """The number of streams, uneven streams, epochs that hold data back, credits, the state's size, LOAD's rate."""
    streams = (1, MANY, STREAMS[-1]) if quick else STREAMS
    states = (STATES_MIB[0], STATES_MIB[-2]) if quick else STATES_MIB
    loads = (LOADS_MIB_PER_S[0], LOADS_MIB_PER_S[-1]) if quick else LOADS_MIB_PER_S
    setups = (SETUPS_US[0], SETUPS_US[2]) if quick else SETUPS_US
    credits = (DIRTY_CREDITS_MIB[0], DEFAULT_CREDIT_MIB) if quick else DIRTY_CREDITS_MIB
    criticals = CRITICAL_CREDITS_MIB[:1] if quick else CRITICAL_CREDITS_MIB
    busy = BUSY_STREAMS[:1] if quick else BUSY_STREAMS

    def protocols(n: int) -> list[str]:
        return [*(f"v3-n{n}{wire}" for wire in WIRES), f"v3-blocks-n{n}"]

    at = MemoryPlace
    *many, many_blocks = protocols(MANY)
    images = [f"driver.precopy_image={image}" for image in ("chunks", "whole")]
    return [
        *(_slow(name, at("streams", n, STREAMS_STATE_MIB, busy_streams=n)) for n in streams for name in protocols(n)),
        *(_slow(name, at("uneven", busy_streams=few)) for few in busy for name in many),
        *(_hot(name, few) for few in busy for name in many),
        *(_held_back("late", name, us, CHUNKS) for us in setups for name in [*many, many_blocks]),
        *(_held_back("image", name, setups[1], image) for image in images for name in many[:2]),
        *(_slow(name, at("credits", dirty_credit_mib=credit)) for credit in credits for name in many[1:]),
        *(
            _held_back("critical credit", SHARED, SETUPS_US[2], CHUNKS, *LARGE_OBJECTS, critical_mib=credit)
            for credit in criticals
        ),
        *(_slow(name, at("state", state_mib=mib)) for mib in states for name in (UNBOUNDED, ONE_READER, *many[:2])),
        *(_slow(name, at("load rate", load_mib_per_s=rate)) for rate in loads for name in (UNBOUNDED, ONE_READER)),
    ]


def _hot(protocol: str, busy: int) -> Point:
    """Nearly all writes go to `busy` blocks, each of another stream, while dirty records are held back."""
    fraction = f"device.0.writes.hot_fraction={busy / HOT_OF_BLOCKS:.6f}"
    return _held_back("hot", protocol, HOT_SETUP_US, CHUNKS, *HOT, fraction, busy=busy)


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(frame: pl.DataFrame) -> Answer:
    """Does the bound hold, how tight is it, and what does multifd take instead?"""
    bounded = with_bounds(frame)
    return Answer(
        _in_short(bounded),
        "The numbers count what VMM and driver hold, without frames' headers: not what sockets' buffers hold, which "
        "dedicated connections depend on (the table's column sockets_mib), nor allocators' overhead. One device; its "
        "streams are uneven only by few blocks or few hot ones, for the model has no parameter for it. Multifd's peak "
        "is without the packet that is being written, v3's is with it; QEMU can set a limit by size, here none is set.",
        [
            *_growth(bounded),
            *_tightness(bounded),
            *_price(bounded),
            *_uneven(bounded),
            *_sockets(bounded),
            *_images(bounded),
            *(
                f"{at['protocol']}, {at['part']}, set-up of {at['setup_us']} us: {ends}."
                for at, ends in incomplete(frame, ["part", "setup_us", "protocol"])
            ),
        ],
        [_c6(bounded)],
        table(_rows(bounded)),
    )


def _in_short(frame: pl.DataFrame) -> str:
    state, runs = frame.filter(part="state"), _v3(frame)
    largest = number(state["state_mib"].max() or 0)
    found = effect(state.filter(state_mib=largest), "peak_reorder_bytes", UNBOUNDED, SHARED)
    most = f"at most {max(_most(runs).values()):.3f} of its bound" if runs.height else "unknown"
    in_any = f" in any of {runs.height} v3 runs, completed or not" if runs.height else ""
    return (
        f"What waits at the target is {most}{in_any}; with {largest:.0f} MiB of state and a slow LOAD, {SHARED}'s VMM "
        f"holds against multifd's {found.text('MiB', MIB) if found else NOT_BOTH}."
    )


def _v3(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("vmm_bound_bytes").is_not_null())


def _most(runs: pl.DataFrame) -> dict[str, float]:
    """The largest peak over its bound, by bound."""
    return {name: number(runs[f"{name}_of_bound"].max()) for name in PEAKS}


def _c6(frame: pl.DataFrame) -> Finding:
    """Supported if no v3 run, however it ended, held more than its bound."""
    runs = _v3(frame)
    if not runs.height:
        return Finding("C6", "under conditions", "no v3 run was made: nothing shows a bound.")
    over, most = runs.filter((pl.col("vmm_of_bound") > 1) | (pl.col("driver_of_bound") > 1)), _most(runs)
    why = (
        f"the largest measured peak over its bound is {most['vmm']:.3f} for the target VMM and {most['driver']:.3f} "
        f"for the driver, over {runs.height} v3 runs, completed or not; {over.height} were beyond it"
    )
    if over.height:
        row = over.row(0, named=True)
        why += f", the first {row['protocol']} in {row['part']}, seed {row['seed']}"
    why += ". The VMM's bound is of frames and credits alone"  # the state's size is in the driver's only
    whole = runs.filter(image="whole")
    if whole.height:
        part = max(whole["driver_bound_bytes"] / (whole["state_mib"] * MIB))
        why += (
            f"; the driver's is {part:.2f} of the state, all that comes before the stop, where images are saved whole"
        )
    return Finding("C6", "refuted" if over.height else "supported", f"{why}.")


def _peak(runs: pl.DataFrame, name: str = "vmm") -> str:
    return interval((runs[PEAKS[name]] / MIB).to_numpy()).text("MiB")


def _most_mib(runs: pl.DataFrame, column: str) -> float | None:
    """The largest value of a column of bytes, in MiB; None if it has none."""
    most = runs[column].max()
    return None if most is None else number(most) / MIB


def _growth(frame: pl.DataFrame) -> Iterator[str]:
    """Peak by size of state, of multifd and of v3."""
    for protocol in (UNBOUNDED, ONE_READER, f"v3-n{MANY}"):
        runs = frame.filter(COMPLETED, part="state", protocol=protocol)
        sizes = sorted(runs["state_mib"].unique())
        if len(sizes) > 1:
            least, most = (_peak(runs.filter(state_mib=size)) for size in (sizes[0], sizes[-1]))
            yield (
                f"{protocol}, LOAD of {LOAD_MIB_PER_S} MiB/s: the VMM's peak is {least} at {sizes[0]} MiB of state and "
                f"{most} at {sizes[-1]} MiB."
            )
    for at, runs in places(frame.filter(COMPLETED, part="load rate"), ["load_mib_per_s", "protocol"]):
        yield f"{at['protocol']}, LOAD of {at['load_mib_per_s']} MiB/s: {_peak(runs)}."


def _tightness(frame: pl.DataFrame) -> Iterator[str]:
    """How near to their bounds runs come, by way over the wire."""
    for wire, name in (*WIRE_NAMES.items(), ("blocks", "addressable blocks")):
        runs = of_kind(_v3(frame), wire)
        parts = [
            f"{of} {number(part.max()):.2f} at most, {number(part.median()):.2f} in the median"
            for of in PEAKS
            if len(part := runs[f"{of}_of_bound"])
        ]
        yield from sentence(f"Of the bound, {name}: ", parts)


def _price(frame: pl.DataFrame) -> Iterator[str]:
    """What less memory costs in downtime."""
    pool = frame.filter(part="credits", protocol=SHARED).sort("dirty_credit_mib", maintain_order=True)
    credits = pool.with_columns(protocol=pl.format("{} MiB", "dirty_credit_mib"))  # paired as protocols are
    *smaller, largest_credit = credits["protocol"].unique(maintain_order=True).to_list() or [""]
    for credit in smaller:
        if cost := effect(credits, "downtime_ns", largest_credit, credit):
            yield f"Dirty credit of {credit} against {largest_credit} (pool): {cost.text('ms', 1e6)}."
    state = frame.filter(part="state")
    largest = state.filter(pl.col("state_mib") == state["state_mib"].max())
    if same := effect(largest, "downtime_ns", UNBOUNDED, ONE_READER):
        yield f"Downtime of {ONE_READER}, bounded, against {UNBOUNDED}, not bounded: {same.text('ms', 1e6)}."


def _uneven(frame: pl.DataFrame) -> Iterator[str]:
    """Do uneven streams need more than even ones? In the VMM by the writes, in the driver by the blocks."""
    for part, name, what in (("hot", "vmm", "hot writes to"), ("uneven", "driver", "all blocks in")):
        of_part = frame.filter(part=part, protocol=SHARED)
        peaks = [f"{_peak(runs, name)} with {at['busy_streams']}" for at, runs in places(of_part, ["busy_streams"])]
        by_seed = of_part.group_by("seed").agg(pl.col(PEAKS[name]).n_unique() == 1)
        equal = part == "hot" and len(peaks) > 1 and by_seed[PEAKS[name]].all()
        why = " (equal seed by seed: it is the first image's, which all streams share)" if equal else ""
        start = f"{SHARED}, {what} this number of streams of {MANY}, the {name}'s peak: "
        yield from sentence(start, peaks, f"{why}.", ", ")


def _sockets(frame: pl.DataFrame) -> Iterator[str]:
    """What the connections' buffers may hold besides: of both hosts, so at the target no more than that."""
    for wire, name in WIRE_NAMES.items():
        runs = of_kind(_v3(frame.filter(part="streams")), wire)
        if runs.height:
            least, most = (each / MIB for each in (min(runs["sockets_bytes"]), max(runs["sockets_bytes"])))
            yield (
                f"Besides, sockets of both hosts may hold {least:.0f} MiB with N = {min(runs['streams'])} and "
                f"{most:.0f} MiB with N = {max(runs['streams'])} ({name})."
            )


def _images(frame: pl.DataFrame) -> Iterator[str]:
    """What the driver holds of a whole image before the stop, and of chunks."""
    for at, runs in places(frame.filter(part="image"), ["image", "protocol"]):
        bound, held = _most_mib(runs, "driver_bound_bytes") or 0.0, _peak(runs, "driver")
        yield f"{at['protocol']}, image {at['image']}: the driver holds {held}, bound {bound:.1f} MiB."


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, object]]:
    """Each place and protocol: peaks with intervals, over all runs however they ended, beside their bounds; and the
    downtime against a connection a stream, where the place has it."""
    for at, runs in places(frame, [*PLACE, "protocol"]):
        row = at | {"runs": runs.height, "completed": runs.filter(COMPLETED).height}
        for name in PEAKS:
            peak = interval((runs[PEAKS[name]] / MIB).to_numpy())
            row |= {f"{name}_peak_{part}_mib": getattr(peak, part) for part in ("mean", "low", "high")}
            row[f"{name}_peak_most_mib"] = _most_mib(runs, PEAKS[name])
            row[f"{name}_bound_mib"] = _most_mib(runs, f"{name}_bound_bytes")
            row[f"{name}_of_bound_most"] = runs[f"{name}_of_bound"].max()
        row["sockets_mib"] = _most_mib(runs, "sockets_bytes")
        base, other = f"v3-n{at['streams']}", at["protocol"]
        here = frame.filter(**{name: at[name] for name in PLACE})
        found = effect(here, "downtime_ns", base, other) if other != base else None
        yield row | effect_row(found, base, other)
