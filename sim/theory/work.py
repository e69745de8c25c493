# SPDX-License-Identifier: GPL-2.0-or-later
"""The data that is certain to be moved after the stop, as one job for each device, and what its steps cost at least.

The data is the blocks that only a stopped device can save; or the whole device, if it has no pre-copy, only checks
before the stop, or rereads everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from proto_v3.vfio.uapi import MigrationFlags
from proto_v3.vmm.multifd import Multifd
from proto_v3.vmm.v3 import V3Options
from sim.device import record_format
from sim.device.blocks import VERSION_BYTES
from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES
from sim.scenario.device import Device
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.times import DeviceTimes, device_times
from sim.scenario.units import NS_PER_S

ROUNDED_NS = 2
"""Subtracted from each command and each read: the clock rounds their times to the nanosecond, perhaps down."""


@dataclass(frozen=True, slots=True)
class Route:
    """How a protocol moves the devices' data: by v3, by v2's multifd, or (both None) by v2's single channel."""

    v3: V3Options | None
    multifd: Multifd | None
    early: bool = False
    """With multifd, each device is saved when it is stopped, not when all are."""

    @classmethod
    def of(cls, scenario: Scenario, protocol: Protocol) -> Route:
        """A v3 source that falls back to v2 takes the route of v2."""
        if protocol.version == 3 and scenario.v3.target_knows == "v3":
            return cls(scenario.v3_options(), None)
        v2 = scenario.v2_options()
        return cls(None, v2.devices_by_multifd, v2.early_save)

    @property
    def single(self) -> bool:
        """Whether all data takes one channel and one thread at each side."""
        return self.v3 is None and self.multifd is None

    @property
    def blocks(self) -> bool:
        """Whether addressable blocks replace the dirty streams."""
        return self.v3 is not None and self.v3.blocks

    @property
    def header_bytes(self) -> int:
        """Bytes before the payload of a record."""
        return V3_HEADER_BYTES if self.v3 else HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    """Data that is moved: its bytes with the records' headers, the SAVE and LOAD commands, the read() calls."""

    size_bytes: int = 0
    commands: int = 0
    reads: int = 0


@dataclass(frozen=True, slots=True)
class DeviceJob:
    """The data of one device. Times are ns from the order to stop."""

    device: Device
    times: DeviceTimes
    saved_from_ns: int  # when the first SAVE can start
    read_from_ns: int  # when the first read() can start
    whole: Part
    chain: Part
    """What moves one after the other: in v2 everything; in v3 the largest stream; with blocks everything, by `readers`
    threads."""
    late: Part
    """The part of the chain that cannot be saved before somebody reads, because the driver's chunks are full."""
    readers: int
    setup_ns: int  # set-up of critical objects, before the last blocks are loaded


def stops_ns(scenario: Scenario) -> list[int]:
    """When each device is stopped, in ns: the vCPUs stop, then all devices go to P2P in turn, then each to STOP; the
    last device first. Turns are taken over all devices, or, in a parallel stop, over those of a PF or not at all."""
    parallel, serial = scenario.vmm.parallel_stop, scenario.firmware.state_commands == "serial"
    of_all = list(enumerate(zip(scenario.devices, device_times(scenario), strict=True)))
    queue = [device.pf if parallel and serial else at if parallel else 0 for at, (device, _) in of_all]
    p2p_ns = dict.fromkeys(queue, scenario.vmm.vcpu_stop_ns)
    for at, (device, times) in of_all:
        p2p_ns[queue[at]] += times.suspend_ns if "P2P" in device.features else 0
    at_ns = dict.fromkeys(queue, max(p2p_ns.values()))
    stops = []
    for at, (device, times) in reversed(of_all):
        at_ns[queue[at]] += times.quiesce_ns + (0 if "P2P" in device.features else times.suspend_ns)
        stops.append(at_ns[queue[at]])
    return stops[::-1]


class WorkAfterStop:
    """The jobs of a scenario on a route."""

    def __init__(self, scenario: Scenario, route: Route) -> None:
        self._scenario = scenario
        self._route = route
        self._read_bytes = scenario.switchover_settings().read_bytes
        stops = stops_ns(scenario)
        all_stopped_ns = max(stops)
        self.ram_saved_ns = all_stopped_ns + scenario.ram.final_sync_ns + scenario.ram.final_scan_ns
        """The earliest end of the last pass over RAM, in ns from the order to stop."""
        devices = zip(scenario.devices, device_times(scenario), stops, strict=True)
        self.jobs = [self._job(*device, all_stopped_ns) for device in devices]

    def _job(self, device: Device, times: DeviceTimes, stopped_ns: int, all_stopped_ns: int) -> DeviceJob:
        v3, single, by_blocks = self._route.v3, self._route.single, self._route.blocks
        precopy = MigrationFlags.PRE_COPY in device.flags
        kind = self._scenario.driver.precopy
        everything = not precopy or kind in ("check", "reread")
        blocks = device.blocks if everything else device.stop_only_blocks
        objects = device.critical.objects if everything else 0
        # A device without a session goes to STOP_COPY when all are stopped; stopped blocks are asked for only then.
        early = self._route.early
        saved_from_ns = stopped_ns if (precopy and not by_blocks) or early else all_stopped_ns
        read_from_ns = saved_from_ns if v3 or early else self.ram_saved_ns if single else all_stopped_ns
        streams = 1 if v3 is None or by_blocks else v3.wire_streams
        whole = self._part(device, blocks, objects, streams)
        chain = late = whole if v3 is None else self._part(device, -(-blocks // streams), 0)
        if v3 is None and precopy:
            late = self._beyond_chunks(device, blocks, objects)
        setup_ns = objects * device.critical.setup_ns
        if precopy and kind == "reread":  # the target may have prepared itself
            # v3: the objects come again, but the epoch is loaded: the blocks do not wait for them.
            setup_ns = 0 if v3 is not None else objects * min(device.critical.setup_ns, device.critical.setup_again_ns)
            finish_ns = self._scenario.driver.finish_again_ns
            times = replace(times, load_finish_ns=finish_ns)
        readers = v3.wire_streams if v3 and by_blocks else 1
        return DeviceJob(device, times, saved_from_ns, read_from_ns, whole, chain, late, readers, setup_ns)

    def _part(self, device: Device, blocks: int, objects: int, streams: int = 1) -> Part:
        """These objects and blocks as records, with the blocks dealt out to `streams` streams."""
        object_bytes = device.critical.object_bytes
        object_commands = -(-objects // self._objects_per_chunk(device))
        size = objects * object_bytes + object_commands * self._route.header_bytes
        if self._route.blocks:
            commands = -(-blocks // max(1, self._read_bytes // device.block_bytes))
            size += blocks * (VERSION_BYTES + device.block_bytes)
            size += commands * (V3_HEADER_BYTES + record_format.RecordBlocks.SIZE)
            object_reads = -(-(objects * object_bytes) // self._read_bytes)  # one may return several records
            return Part(size, object_commands + commands, object_reads + commands)
        each, longer = divmod(blocks, streams)
        per_chunk = self._blocks_per_chunk(device)
        commands = longer * -(-(each + 1) // per_chunk) + (streams - longer) * -(-each // per_chunk)
        size += blocks * device.block_bytes + commands * self._route.header_bytes
        return Part(size, object_commands + commands, -(-size // self._read_bytes))

    def _beyond_chunks(self, device: Device, blocks: int, objects: int) -> Part:
        """The rest when all of the driver's chunks are full, whichever records fill them."""
        chunks = self._scenario.driver.chunks + self._scenario.driver.has_priority
        object_chunks = min(chunks, -(-objects // self._objects_per_chunk(device)))
        rest_objects = max(0, objects - chunks * self._objects_per_chunk(device))
        rest_blocks = max(0, blocks - (chunks - object_chunks) * self._blocks_per_chunk(device))
        return self._part(device, rest_blocks, rest_objects)

    def _objects_per_chunk(self, device: Device) -> int:
        return max(1, self._scenario.driver.chunk_bytes // device.critical.object_bytes)

    def _blocks_per_chunk(self, device: Device) -> int:
        return self._scenario.driver.chunk_bytes // device.block_bytes


class Costs:
    """The time of each step for a scenario and a route. All methods return ns."""

    def __init__(self, scenario: Scenario, route: Route) -> None:
        self._scenario = scenario
        self._route = route
        self._times = device_times(scenario)
        self._write_bytes = scenario.switchover_settings().write_bytes
        self._call_ns = scenario.driver.call_ns
        self.latency_ns = scenario.link.latency_ns  # half a round trip

    # --- data ---------------------------------------------------------------------------------------------------------

    def save_ns(self, part: Part) -> float:
        """SAVE commands, one after the other."""
        firmware = self._scenario.firmware
        return _commands_ns(part, firmware.save_command_ns, firmware.save_bytes_per_s)

    def load_ns(self, part: Part) -> float:
        """LOAD commands, one after the other."""
        firmware = self._scenario.firmware
        return _commands_ns(part, firmware.load_command_ns, firmware.load_bytes_per_s)

    def moved_ns(self, part: Part, bytes_per_s: float, call_ns: int = 0) -> float:
        """The bytes at a rate, read by read, with `call_ns` for each read."""
        rounded_ns = (part.reads + part.commands) * ROUNDED_NS
        return max(0.0, part.reads * call_ns + part.size_bytes * NS_PER_S / bytes_per_s - rounded_ns)

    def read_ns(self, part: Part) -> float:
        """read() on one thread; with the single channel also the copy through its buffers."""
        copy_ns = self.moved_ns(part, self._scenario.host.copy_bytes_per_s, self._call_ns)
        return copy_ns + self._buffer_ns(part)

    def write_ns(self, part: Part) -> float:
        """write() on one thread, without the LOAD in it; with the single channel also the copy through its buffers."""
        calls = -(-part.size_bytes // self._write_bytes) if self._route.single else part.reads
        copy_ns = self.moved_ns(part, self._scenario.host.copy_bytes_per_s)
        return calls * self._call_ns + copy_ns + self._buffer_ns(part)

    def _buffer_ns(self, part: Part) -> float:
        rate = self._scenario.vmm.device_buffer_bytes_per_s
        return self.moved_ns(part, rate) if self._route.single and rate is not None else 0.0

    # --- what follows, to the end of the downtime ---------------------------------------------------------------------

    def resume_ns(self) -> int:
        """After the last config: channels close, devices and vCPUs start. v3 asks the source first: a round trip."""
        vmm, resume_ns = self._scenario.vmm, sum(times.resume_ns for times in self._times)
        if vmm.multifd:
            resume_ns += vmm.multifd_channels * vmm.multifd_close_ns_per_channel
        return resume_ns + vmm.vcpu_start_ns + (2 * self.latency_ns if self._route.v3 else 0)

    def after_load_ns(self, job: DeviceJob) -> int:
        """After the end of a device's load. With the single channel all configs follow, else perhaps only its own."""
        vmm = self._scenario.vmm
        if self._route.single:
            together = max if vmm.parallel_config else sum
            configs_ns = vmm.other_load_ns + together(times.config_load_ns for times in self._times)
        else:
            configs_ns = job.times.config_load_ns
        return configs_ns + self.resume_ns()

    def after_read_ns(self, job: DeviceJob) -> float:
        """After a device's last byte is read: its way, its LOAD, the end of the load, and after_load_ns()."""
        return self.latency_ns + self.last_load_ns(job.device) + job.times.load_finish_ns + self.after_load_ns(job)

    def last_load_ns(self, device: Device) -> float:
        """LOAD of the last record, which has at least one block."""
        return self.load_ns(Part(device.block_bytes, 1))


def _commands_ns(part: Part, command_ns: int, bytes_per_s: float) -> float:
    return max(0.0, part.commands * (command_ns - ROUNDED_NS) + part.size_bytes * NS_PER_S / bytes_per_s)
