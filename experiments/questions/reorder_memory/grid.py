"""The grid of reorder_memory, and the bound of each of its runs."""

from __future__ import annotations

from functools import lru_cache

import polars as pl

from experiments.study.experiment import Point
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.theory.memory_bound import MemoryBound, memory_bound

SLOW_LOAD = (
    "link.gbit_per_s=25",
    "link.per_connection_gbit_per_s=25",
    "vmm.bandwidth_gbit_per_s=100",
    "vmm.multifd_channels=5",
    "driver.lock=per_fd",
    "firmware.engines=4",
    "ram.size_gib=0.25",
    "ram.nonzero_gib=0.03",
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
    "ram.size_gib=0.5",
    "ram.nonzero_gib=0.0625",
    "ram.dirty_mib_per_s=5",
    "ram.working_set_mib=16",
    "device.0.state_mib=128",
    "device.0.block_kib=1024",
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
PLACE = (
    "part",
    "streams",
    "state_mib",
    "load_mib_per_s",
    "busy_streams",
    "setup_us",
    "dirty_credit_mib",
    "critical_credit_mib",
    "image",
)
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
    bounds = [
        bound_of(base, tuple(settings), protocol)
        for base, settings, protocol in frame.select("base", "settings", "protocol").iter_rows()
    ]
    columns = [
        pl.Series(f"{name}_bytes", [getattr(each, f"{of}_bytes") if each else None for each in bounds], pl.Int64)
        for name, of in (("vmm_bound", "vmm"), ("driver_bound", "driver"), ("sockets", "sockets"))
    ]
    ratios = [(pl.col(peak) / pl.col(f"{name}_bound_bytes")).alias(f"{name}_of_bound") for name, peak in PEAKS.items()]
    return frame.with_columns(columns).with_columns(ratios)


def of_kind(frame: pl.DataFrame, kind: str) -> pl.DataFrame:
    """The runs that a curve shows."""
    names = {"blocks": "-blocks", UNBOUNDED: f"^{UNBOUNDED}$"}
    return frame.filter(pl.col("protocol").str.contains(names.get(kind, rf"^v3-n\d+{kind}$")))


# --- the grid ---------------------------------------------------------------------------------------------------------


def _slow(
    part: str,
    protocol: str,
    *,
    streams: int = MANY,
    state_mib: int = STATE_MIB,
    load_mib_per_s: int = LOAD_MIB_PER_S,
    busy: int = 0,
    credit_mib: int = DEFAULT_CREDIT_MIB,
) -> Point:
    """All of the state moves after the stop, to a target that loads it more slowly than it comes."""
    block_mib = state_mib // busy if busy else 1
    settings = (
        *SLOW_LOAD,
        f"device.0.state_mib={state_mib}",
        f"device.0.stop_only_mib={state_mib}",
        f"device.0.block_kib={block_mib * 1024}",
        f"driver.chunk_mib={max(8, block_mib)}",
        f"firmware.load_mib_per_s={load_mib_per_s}",
        f"v3.dirty_credit_mib={credit_mib}",
    )
    place = (part, streams, state_mib, load_mib_per_s, busy or streams, 0, credit_mib, 4, "chunks")
    return Point("favours-v2", protocol, settings, dict(zip(PLACE, place, strict=True)))


def _held_back(
    part: str, protocol: str, setup_us: int, *settings: str, critical_mib: int = 4, busy: int = MANY
) -> Point:
    """A guest that reconfigures: dirty records wait for their epoch's set-up."""
    credit_mib = 16 if LARGE_OBJECTS[0] in settings else DEFAULT_CREDIT_MIB
    image = "chunks" if CHUNKS in settings else "whole"
    place = (part, MANY, STATE_MIB, 6000, busy, setup_us, credit_mib, critical_mib, image)
    settings = (f"device.0.critical.setup_us={setup_us}", f"v3.critical_credit_mib={critical_mib}", *settings)
    return Point("nic-reconfig", protocol, (*LATE, *settings), dict(zip(PLACE, place, strict=True)))


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

    *many, many_blocks = protocols(MANY)
    images = [f"driver.precopy_image={image}" for image in ("chunks", "whole")]
    return [
        *(_slow("streams", name, streams=n, state_mib=STREAMS_STATE_MIB) for n in streams for name in protocols(n)),
        *(_slow("uneven", name, busy=few) for few in busy for name in many),
        *(_hot(name, few) for few in busy for name in many),
        *(_held_back("late", name, us, CHUNKS) for us in setups for name in [*many, many_blocks]),
        *(_held_back("image", name, setups[1], image) for image in images for name in many[:2]),
        *(_slow("credits", name, credit_mib=credit) for credit in credits for name in many[1:]),
        *(
            _held_back("critical credit", SHARED, SETUPS_US[2], CHUNKS, *LARGE_OBJECTS, critical_mib=credit)
            for credit in criticals
        ),
        *(_slow("state", name, state_mib=mib) for mib in states for name in (UNBOUNDED, ONE_READER, many[0], many[1])),
        *(_slow("load rate", name, load_mib_per_s=rate) for rate in loads for name in (UNBOUNDED, ONE_READER)),
    ]


def _hot(protocol: str, busy: int) -> Point:
    """Nearly all writes go to `busy` blocks, each of another stream, while dirty records are held back."""
    fraction = f"device.0.writes.hot_fraction={busy / HOT_OF_BLOCKS:.6f}"
    return _held_back("hot", protocol, HOT_SETUP_US, CHUNKS, *HOT, fraction, busy=busy)
