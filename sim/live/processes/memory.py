# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory that a target needs for a migration, computed before any of it is taken, and held against its limit.

All that an offer can ask for is in it: the devices' state, what is kept of each block and object, frames of all
connections, data that waits for a driver, and what a connection and a data fd cost. Beside it a target needs what its
two processes take to start, some 150 MiB, and their timelines (merge_timelines.MAX_SPANS).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from proto_v3.errors import UserError
from proto_v3.wire.streams import Wire
from sim.host.vmms import connections, target_device
from sim.live.processes.settings import frame_bytes
from sim.scenario.device import Device
from sim.scenario.protocol import AppliedScenario
from sim.scenario.units import MIB

ITEM_BYTES = 64
"""Of a block or a critical object: versions, epoch, and its digest on the way to the source."""
ITEM_OF_A_RECORD_BYTES = 72
"""Of each that a record names, while the record is taken in (sim.live.fd.codec). Each stream may name them all."""
DATA_FD_BYTES = 64 << 10
CONNECTION_BYTES = 64 << 10
"""Threads, sockets and objects of both processes; measured: some 35 and 45 KiB."""
TLS_BYTES = 1 << 20
"""Of a connection beside that: the most that TLS and its stream reader keep (sim.live.tcp.tls, CHUNK_BYTES)."""
WAITING = 2
"""Bytes of memory for a byte that waits: a small frame costs its object, too, and a buffer may be half full."""


KEYS = {
    "state": "device.state_mib, device.critical",
    "records": "device.block_kib, device.critical.objects, driver.check_bytes",
    "frames": "vmm.read_mib, ram.frame_mib, the number of connections",
    "waiting": "v3.critical_credit_mib, v3.dirty_credit_mib, vmm.multifd_channels",
    "connections": "the number of connections and data fds",
}
"""What each part of the memory follows from."""


@dataclass(frozen=True, slots=True)
class TargetMemory:
    """Bytes that a target needs, by what for. The names are for the user, who reads them in an error."""

    state: int
    """Blocks and critical objects."""
    records: int
    """What is kept of each block and object, and messages between v2's drivers."""
    frames: int
    """One for each connection; with addressable blocks also one for each thread."""
    waiting: int
    """What has come and no driver has taken: all credit; with multifd, a packet for each connection."""
    connections: int
    """Connections and data fds."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


def target_memory(applied: AppliedScenario, tls: bool = False) -> TargetMemory:
    """What a run needs at the target, at the most. `tls`: on its connections."""
    scenario, largest, count = applied.scenario, frame_bytes(applied.scenario), connections(applied)
    devices = [target_device(scenario, device) for device in scenario.devices]
    v3 = scenario.v3_options() if applied.protocol.version == 3 else None
    fds = 1 + (v3.dirty_streams if v3 else 0)
    frames, waiting = count * largest, 0
    if scenario.vmm.multifd:  # a source may fall back to it from v3
        waiting = _least_early_bytes(applied)
    if v3 is not None and v3.blocks:
        frames += len(devices) * v3.wire_streams * largest
    if v3 is not None and v3.wire is not Wire.STREAMS:
        credits = max(v3.credits.critical_bytes, largest) + max(v3.credits.dirty_bytes, largest)
        waiting = max(waiting, credits)
    return TargetMemory(
        state=sum(device.whole_bytes for device in devices),
        records=sum(_items(device) * (ITEM_BYTES + fds * ITEM_OF_A_RECORD_BYTES) for device in devices)
        + len(devices) * fds * scenario.driver.check_bytes,
        frames=frames,
        waiting=WAITING * len(devices) * waiting,
        connections=count * (CONNECTION_BYTES + tls * TLS_BYTES) + len(devices) * fds * DATA_FD_BYTES,
    )


def check_memory(applied: AppliedScenario, max_bytes: int, tls: bool = False) -> None:
    """UserError if a run needs more than `max_bytes` at the target."""
    needed = target_memory(applied, tls)
    if needed.total_bytes > max_bytes:
        parts = {each.name: getattr(needed, each.name) for each in fields(needed)}
        most = max(parts, key=parts.__getitem__)
        shown = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items())
        raise UserError(
            f"{KEYS[most]}: a live run needs {_mib(needed.total_bytes)} MiB at the target, and that takes at most "
            f"{max_bytes // MIB} MiB (--max-state-mib). In MiB: {shown}"
        )


def within(applied: AppliedScenario, max_bytes: int, tls: bool = False) -> AppliedScenario:
    """The same run with what a target may still give to packets that come early, which QEMU does not bound."""
    scenario = applied.scenario
    if not scenario.vmm.multifd:
        return applied
    left = max_bytes - target_memory(applied, tls).total_bytes
    most = _least_early_bytes(applied) + left // (WAITING * len(scenario.devices))
    asked_mib = scenario.vmm.multifd_max_queued_mib
    vmm = scenario.vmm.model_copy(update={"multifd_max_queued_mib": min(most / MIB, asked_mib or most / MIB)})
    return replace(applied, scenario=scenario.model_copy(update={"vmm": vmm}))


def _least_early_bytes(applied: AppliedScenario) -> int:
    """A packet for each connection, of each device."""
    return connections(applied) * applied.scenario.vmm.read_bytes


def _items(device: Device) -> int:
    return device.blocks + device.critical.objects


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}" if size_bytes >= 10 * MIB else f"{size_bytes / MIB:.1f}"
