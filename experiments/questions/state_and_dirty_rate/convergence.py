"""Where pre-copy of a device stops converging, in theory: the machines that are compared, what each carries,
and the dirty rate from which that is not enough. experiments.questions.state_and_dirty_rate.question holds runs
against it.
"""

from __future__ import annotations

from functools import lru_cache

import polars as pl

from experiments.runs.frame import COMPLETED
from experiments.study.experiment import places
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import BYTES_PER_S_PER_GBIT, KIB, MIB

BASE = "vgpu-32g"
LINK_GBIT_PER_S = 40.0
"""Less than eight engines save, more than one connection carries (15 Gbit/s)."""
SMALL_RAM = ("ram.size_gib=1", "ram.nonzero_gib=0.125", "ram.dirty_mib_per_s=0.01", "ram.working_set_mib=16")
"""RAM is not the question."""
SYNC = ("ram.sync_ms=0.1", "ram.final_sync_ms=0.1")
"""As of the published 20.7 ms for 200 GiB, for 1 GiB."""
PIECES_MIB = {64: (8, 1), 256: (8, 1), 1024: (8, 1), 4096: (16, 4), 16384: (64, 16), 65536: (64, 16)}
"""By state: a chunk and a read. Larger ones keep large states cheap: at most 4096 reads a copy. What is dirtied is
counted in bytes, so they leave the boundary where it is; the downtime grows by what a chunk takes to be saved and
loaded, 10 to 50 ms for 4 GiB in chunks of 32 MiB instead of 8."""
BUFFER_OF_CHUNK = 1.25
"""The sockets' buffers, as the base's are to its chunk."""
STOP_ONLY = 1 / 128
"""Of the state: as the base's."""
BLOCKS = 16384
"""At most, of a device."""
COPIES = 3.0
"""So many copies of the state over one connection fit into the time after which a migration is given up."""
STATE_OF_MACHINES_MIB = 4096
MAP, ENGINES, ONE_ENGINE, NARROW = "map", "8 engines", "1 engine", "narrow link"
MUCH_RAM, HOTSPOT = "64 GiB of RAM", "hotspot"
FAST_CONNECTION = f"link.per_connection_gbit_per_s={LINK_GBIT_PER_S:g}"
MACHINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "connections": ((), ("v2", "v3-n1", "v3-n4")),
    ENGINES: ((FAST_CONNECTION,), ("v2", "v3-n1", "v3-n4")),
    ONE_ENGINE: ((FAST_CONNECTION, "firmware.engines=1"), ("v2", "v3-n1", "v3-n4")),
    NARROW: (("link.gbit_per_s=15",), ("v2", "v3-n1", "v3-n4")),
    MUCH_RAM: (
        ("ram.sync_ms=7", "ram.final_sync_ms=7", "driver.chunk_mib=8", "vmm.read_mib=1", "link.socket_buffer_mib=10"),
        ("v2", "v3-n1"),
    ),
}
"""What each sets otherwise than the map, and for whom: connections bound N here (as in the map), engines do, one engine
does, the link does; and a guest whose RAM takes as long to look through as the base's 64 GiB. There the size of a read
counts, for v2's thread may look between any two of them: it is QEMU's."""


def settings(machine: str, state_mib: int) -> tuple[str, ...]:
    """KEY=VALUE of a machine with a device of this size; all but the writes."""
    chunk_mib, read_mib = PIECES_MIB[state_mib]
    block_kib = max(64, state_mib * KIB // BLOCKS)
    return (
        *SMALL_RAM,
        *SYNC,
        f"link.gbit_per_s={LINK_GBIT_PER_S:g}",
        f"device.0.state_mib={state_mib}",
        f"device.0.stop_only_mib={state_mib * STOP_ONLY:g}",
        f"device.0.block_kib={block_kib}",
        f"driver.chunk_mib={chunk_mib}",
        f"vmm.read_mib={read_mib}",
        f"link.socket_buffer_mib={chunk_mib * BUFFER_OF_CHUNK:g}",
        f"v3.critical_credit_mib={max(4, read_mib)}",
        f"vmm.give_up_s={2 + COPIES * state_mib / connection_mib_per_s():.4g}",
        *(MACHINES[machine][0] if machine in MACHINES else ()),
    )


def link_mib_per_s() -> float:
    """What the map's link carries."""
    return LINK_GBIT_PER_S * BYTES_PER_S_PER_GBIT / MIB


def connection_mib_per_s() -> float:
    """What one connection carries, but for those that are set to be faster."""
    return load(BASE).link.per_connection_gbit_per_s * BYTES_PER_S_PER_GBIT / MIB


def carried_mib_per_s(scenario: Scenario, protocol: str) -> float:
    """At which a device's data moves in pre-copy at the most: by N streams at once, and by what they share.

    v2 has one stream, with multifd too, which carries what comes after the stop only.
    """
    v3 = Protocol.parse(protocol, scenario).applied(scenario).v3
    streams = v3.dirty_streams if protocol.startswith("v3") else 1
    firmware, link = scenario.firmware, scenario.link
    copy = scenario.host.copy_gib_per_s * KIB
    of_a_stream = min(
        link.per_connection_gbit_per_s * BYTES_PER_S_PER_GBIT / MIB,
        firmware.save_mib_per_s,
        1 / (1 / copy + 1 / firmware.load_mib_per_s),  # one thread writes, and waits for LOAD in it
    )
    return min(
        streams * of_a_stream,
        firmware.engines * firmware.save_mib_per_s,
        firmware.engines * firmware.load_mib_per_s,
        link.gbit_per_s * BYTES_PER_S_PER_GBIT / MIB,
    )


@lru_cache
def boundary_mib_per_s(machine: str, state_mib: int, protocol: str) -> float:
    """The dirty rate from which pre-copy does not converge, for writes to all blocks alike; infinity if it always does.

    Of writes at a rate w, those to clean blocks make new work: w (1 - x), x being the part of the state that is dirty.
    It settles where that is what is carried, at x = 1 - carried / w. Pre-copy converges if so much fits the downtime
    limit.
    """
    scenario = load(BASE, settings(machine, state_mib))
    carried = carried_mib_per_s(scenario, protocol)
    stop_only_mib = scenario.device[0].stop_only_mib
    fits_mib = carried * scenario.vmm.downtime_limit_ms / 1e3 - stop_only_mib
    part = fits_mib / (state_mib - stop_only_mib)
    return float("inf") if part >= 1 else carried / (1 - part)


def bracket(runs: pl.DataFrame, protocol: str) -> tuple[float | None, float | None]:
    """MiB/s: the largest rate up to which all runs complete, and the next one; None if there is none."""
    low: float | None = None
    for at, some in places(runs.filter(pl.col("protocol") == protocol).sort("dirty_mib_per_s"), ["dirty_mib_per_s"]):
        rate = float(at["dirty_mib_per_s"])
        if some.filter(COMPLETED).height < some.height:
            return low, rate
        low = rate
    return low, None
