"""What a migration's downtime is at the least, reckoned from scenario and protocol alone.

After the stop some data is certain to be moved: the blocks that only a stopped device gives, or all of a device that
has no pre-copy, checks only, or rereads. Each resource needs a time for it, work over capacity; before it comes the
part of the stop that it cannot overlap with, behind it what only follows it: half a round trip, the end of the load,
the config, the resume. The longest of these sums is the bound. Everything else is taken as free: what the guest
dirtied, waiting for one another, the first and the last chunk on their way.

It is a lower bound of every completed run where firmware.service_cv is 0, and of the mean over many seeds where it is
not, for the factors have mean 1: a single run may be shorter then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import MigrationFlags
from proto_v3.wire.streams import Wire
from sim.device.blocks import VERSION_BYTES
from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Device
from sim.scenario.units import BYTES_PER_S_PER_GBIT, GIB, KIB, MIB, NS_PER_S, ns

ROUNDED_NS = 2
"""Taken off a command and a read: their times are rounded to the clock's nanosecond, and may be rounded down."""


@dataclass(frozen=True, slots=True)
class DowntimeBound:
    """The least downtime, and the resource that sets it."""

    total_ns: int
    resource: str
    by_resource_ns: dict[str, int]
    """What each resource would allow: firmware, copy, lock, link, load, ram, config."""


def lower_bound(scenario: Scenario, protocol: Protocol) -> DowntimeBound:
    """The least downtime of a run that completes. `scenario` is as the protocol changes it (Protocol.applied)."""
    by_resource_ns = _Reckoning(scenario, protocol).by_resource_ns()
    resource = max(by_resource_ns, key=by_resource_ns.__getitem__)
    return DowntimeBound(by_resource_ns[resource], resource, by_resource_ns)


def stops_ns(devices: Sequence[Device], vcpu_stop_ns: int) -> list[int]:
    """When each device is stopped, from the order to stop: vCPUs, all devices to P2P in turn, then each to STOP."""
    at_ns = vcpu_stop_ns + sum(ns(device.suspend_ms) for device in devices if "P2P" in device.features)
    stops = []
    for device in devices:
        at_ns += ns(device.quiesce_ms) + (0 if "P2P" in device.features else ns(device.suspend_ms))
        stops.append(at_ns)
    return stops


@dataclass(frozen=True, slots=True)
class _Part:
    """Data that is moved: its bytes with the records' headers, the SAVE and LOAD commands, the calls of read()."""

    size_bytes: int = 0
    commands: int = 0
    reads: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """What is certain to be moved of a device once it is stopped."""

    device: Device
    saved_from_ns: int
    read_from_ns: int
    whole: _Part
    chain: _Part
    """What goes one after the other: v2 all of it, v3 the largest stream, blocks all of it, by `readers` threads."""
    late: _Part
    """Of the chain, what cannot be saved before somebody reads: the driver's chunks are full."""
    readers: int
    setup_ns: int
    """Of critical objects, before the last blocks are loaded."""


class _Reckoning:
    """The scenario's costs, and the jobs."""

    def __init__(self, scenario: Scenario, protocol: Protocol) -> None:
        self._scenario = scenario
        self._v3 = scenario.v3_options() if protocol.version == 3 and scenario.v3.target_knows == "v3" else None
        multifd = scenario.v2_options().devices_by_multifd
        self._multifd = None if self._v3 else multifd
        self._single = self._v3 is None and multifd is None
        self._blocks = self._v3 is not None and self._v3.blocks
        self._settings = scenario.switchover_settings()
        self._latency_ns = round(scenario.link.round_trip_us * 500)
        self._header_bytes = V3_HEADER_BYTES if self._v3 else HEADER_BYTES
        stops = stops_ns(scenario.devices, ns(scenario.vmm.vcpu_stop_ms))
        self._ram_saved_ns = stops[-1] + ns(scenario.ram.final_sync_ms) + ns(scenario.ram.final_scan_ms)
        self._jobs = [self._job(device, at, stops[-1]) for device, at in zip(scenario.devices, stops, strict=True)]

    def by_resource_ns(self) -> dict[str, int]:
        """The bound of each resource; the binding one is the first of those that are largest."""
        writers_ns = self._writers()
        by_copy = self._writers_copy()
        bounds = {
            "firmware": self._firmware(),
            "copy": max(self._copy(), writers_ns if by_copy else 0.0),
            "lock": self._lock(),
            "link": self._link(),
            "load": max(self._load(), 0.0 if by_copy else writers_ns),
            "ram": self._ram_saved_ns + self._latency_ns + ns(self._scenario.vmm.other_load_ms) + self._resume_ns(),
            "config": self._config(),
        }
        return {resource: math.floor(bound) for resource, bound in bounds.items()}

    # --- what has to be moved -----------------------------------------------------------------------------------------

    def _job(self, device: Device, stopped_ns: int, all_stopped_ns: int) -> _Job:
        precopy = MigrationFlags.PRE_COPY in device.flags
        kind = self._scenario.driver.precopy
        everything = not precopy or kind in ("check", "reread")
        blocks = device.blocks if everything else device.stop_only_blocks
        objects = device.critical.objects if everything else 0
        # One without a session goes to STOP_COPY when all are stopped; stopped blocks are asked for only then.
        saved_from_ns = stopped_ns if precopy and not self._blocks else all_stopped_ns
        read_from_ns = saved_from_ns if self._v3 else self._ram_saved_ns if self._single else all_stopped_ns
        streams = 1 if self._v3 is None or self._blocks else self._v3.wire_streams
        whole = self._part(device, blocks, objects, streams)
        chain = late = whole if self._v3 is None else self._part(device, -(-blocks // streams), 0)
        if self._v3 is None and precopy:
            late = self._beyond_chunks(device, blocks, objects)
        # v3: a driver that rereads sends the objects again, but the epoch is loaded: the blocks do not wait for them.
        again = self._v3 is not None and precopy and kind == "reread"
        setup_ns = 0 if again else objects * round(device.critical.setup_us * 1_000)
        readers = self._v3.wire_streams if self._v3 and self._blocks else 1
        return _Job(device, saved_from_ns, read_from_ns, whole, chain, late, readers, setup_ns)

    def _part(self, device: Device, blocks: int, objects: int, streams: int = 1) -> _Part:
        """So many objects and blocks as records, the blocks dealt out to so many streams."""
        object_bytes = round(device.critical.object_kib * KIB)
        object_commands = -(-objects // self._objects_each(device))
        size = objects * object_bytes + object_commands * self._header_bytes
        if self._blocks:
            commands = -(-blocks // max(1, self._settings.read_bytes // device.block_bytes))
            size += blocks * (VERSION_BYTES + device.block_bytes)
            size += commands * (V3_HEADER_BYTES + uapi.RecordBlocks.SIZE)
            object_reads = -(-(objects * object_bytes) // self._settings.read_bytes)  # one may take several records
            return _Part(size, object_commands + commands, object_reads + commands)
        each, longer = divmod(blocks, streams)
        in_chunk = self._blocks_each(device)
        commands = longer * -(-(each + 1) // in_chunk) + (streams - longer) * -(-each // in_chunk)
        size += blocks * device.block_bytes + commands * self._header_bytes
        return _Part(size, object_commands + commands, -(-size // self._settings.read_bytes))

    def _beyond_chunks(self, device: Device, blocks: int, objects: int) -> _Part:
        """What is left when all of the driver's chunks are full, whichever records those are."""
        chunks = self._scenario.driver.chunks
        in_chunks = min(chunks, -(-objects // self._objects_each(device)))
        left_objects = max(0, objects - chunks * self._objects_each(device))
        return self._part(device, max(0, blocks - (chunks - in_chunks) * self._blocks_each(device)), left_objects)

    def _objects_each(self, device: Device) -> int:
        return max(1, self._scenario.driver.chunk_bytes // round(device.critical.object_kib * KIB))

    def _blocks_each(self, device: Device) -> int:
        return self._scenario.driver.chunk_bytes // device.block_bytes

    # --- how long it takes at the least -------------------------------------------------------------------------------

    def _save_ns(self, part: _Part) -> float:
        firmware = self._scenario.firmware
        command_ns = round(firmware.save_command_us * 1_000) - ROUNDED_NS
        return _at_least(part.commands * command_ns + part.size_bytes * NS_PER_S / (firmware.save_mib_per_s * MIB))

    def _load_ns(self, part: _Part) -> float:
        firmware = self._scenario.firmware
        command_ns = round(firmware.load_command_us * 1_000) - ROUNDED_NS
        return _at_least(part.commands * command_ns + part.size_bytes * NS_PER_S / (firmware.load_mib_per_s * MIB))

    def _moved_ns(self, part: _Part, bytes_per_s: float, call_ns: int = 0) -> float:
        """Read by read, at a rate, with a fixed cost each."""
        rounded_ns = (part.reads + part.commands) * ROUNDED_NS
        return _at_least(part.reads * call_ns + part.size_bytes * NS_PER_S / bytes_per_s - rounded_ns)

    def _read_ns(self, part: _Part) -> float:
        """The copy, on one thread; with the single channel also through its buffers."""
        copy_ns = self._moved_ns(part, self._scenario.host.copy_gib_per_s * GIB, self._call_ns())
        return copy_ns + self._buffer_ns(part)

    def _write_ns(self, part: _Part) -> float:
        """The same at the target."""
        calls = -(-part.size_bytes // self._settings.write_bytes) if self._single else part.reads
        copy_ns = self._moved_ns(part, self._scenario.host.copy_gib_per_s * GIB)
        return calls * self._call_ns() + copy_ns + self._buffer_ns(part)

    def _buffer_ns(self, part: _Part) -> float:
        rate = self._scenario.vmm.device_buffer_gib_per_s
        return self._moved_ns(part, rate * GIB) if self._single and rate is not None else 0.0

    def _call_ns(self) -> int:
        return round(self._scenario.driver.call_us * 1_000)

    def _finish_ns(self) -> int:
        return ns(self._scenario.firmware.load_finish_ms)

    def _resume_ns(self) -> int:
        """From the last config on; v3 asks the source once more."""
        resume_ns = sum(ns(device.resume_ms) for device in self._scenario.devices)
        return resume_ns + ns(self._scenario.vmm.vcpu_start_ms) + (2 * self._latency_ns if self._v3 else 0)

    def _after_load_ns(self, device: Device) -> int:
        """With the single channel all configs come last; else this device's own may."""
        vmm = self._scenario.vmm
        if self._single:
            configs_ns = ns(vmm.other_load_ms) + sum(ns(each.config_load_ms) for each in self._scenario.devices)
        else:
            configs_ns = ns(device.config_load_ms)
        return configs_ns + self._resume_ns()

    def _after_read_ns(self, device: Device) -> float:
        """From a device's last byte at the source on: its way, its LOAD, the end of the load, and what follows."""
        return self._latency_ns + self._last_load_ns(device) + self._finish_ns() + self._after_load_ns(device)

    def _last_load_ns(self, device: Device) -> float:
        """LOAD of the last record, which has a block at the least."""
        return self._load_ns(_Part(device.block_bytes, 1))

    # --- resources ----------------------------------------------------------------------------------------------------

    def _threads(self) -> list[list[_Job]]:
        """Jobs that one thread a side does one after the other."""
        return [self._jobs] if self._single else [[job] for job in self._jobs]

    def _threads_ns(self, takes_ns: Callable[[_Job], float]) -> float:
        """By the threads of the source, from when they may read."""
        return max(
            jobs[0].read_from_ns + sum(takes_ns(job) for job in jobs) + min(self._after(job) for job in jobs)
            for jobs in self._threads()
        )

    def _after(self, job: _Job) -> float:
        """What follows a job's work at the source; without work at least the end of its load does."""
        return self._after_read_ns(job.device) - (0 if job.whole.commands else self._last_load_ns(job.device))

    def _shared_ns(self, from_ns: Callable[[_Job], int], takes_ns: Callable[[_Job], float]) -> float:
        """By something at the source that all devices share."""
        return _queue((from_ns(job), self._after(job), takes_ns(job)) for job in self._jobs)

    def _save_chain_ns(self, job: _Job) -> float:
        """A reader of blocks makes the SAVE, then copies."""
        return (self._save_ns(job.late) + (self._read_ns(job.late) if self._blocks else 0.0)) / job.readers

    def _firmware(self) -> float:
        engines = self._scenario.firmware.engines
        of_pf = (
            _queue((job.saved_from_ns, self._after(job), self._save_ns(job.whole) / engines) for job in jobs)
            for jobs in self._by_pf()
        )
        alone = (job.saved_from_ns + self._save_ns(job.chain) / job.readers + self._after(job) for job in self._jobs)
        return max(*of_pf, *alone, self._threads_ns(self._save_chain_ns))

    def _lock(self) -> float:
        """One copy at a time where several readers take one lock."""
        match self._scenario.driver.lock:
            case "global":
                return self._shared_ns(lambda job: job.read_from_ns, lambda job: self._read_ns(job.whole))
            case "device":
                return max(job.read_from_ns + self._read_ns(job.whole) + self._after(job) for job in self._jobs)
            case "per_fd" if self._blocks:
                return max(job.read_from_ns + self._read_ns(job.chain) + self._after(job) for job in self._jobs)
            case _:
                return 0.0

    def _copy(self) -> float:
        memory = self._scenario.host.memory_gib_per_s * GIB
        threads_ns = self._threads_ns(lambda job: self._read_ns(job.chain) / job.readers)
        return max(
            threads_ns, self._shared_ns(lambda job: job.read_from_ns, lambda job: self._moved_ns(job.whole, memory))
        )

    def _link(self) -> float:
        rate = self._scenario.link.gbit_per_s * BYTES_PER_S_PER_GBIT
        shared = self._connections()
        if shared:
            rate = min(rate, shared * self._connection_bytes_per_s())
        all_ns = self._shared_ns(lambda job: job.read_from_ns, lambda job: self._moved_ns(job.whole, rate))
        return all_ns if shared else max(all_ns, self._threads_ns(self._stream_ns))

    def _connection_bytes_per_s(self) -> float:
        return self._scenario.link.per_connection_gbit_per_s * BYTES_PER_S_PER_GBIT

    def _connections(self) -> int:
        """That the data of all devices shares; 0: each wire stream has its own."""
        if self._multifd:
            return self._multifd.dedicated or self._multifd.channels
        if self._v3 is None or self._v3.wire is Wire.ONE:
            return 1
        return self._v3.pool_connections if self._v3.wire is Wire.POOL else 0

    def _stream_ns(self, job: _Job) -> float:
        return self._moved_ns(job.chain, self._connection_bytes_per_s()) / job.readers

    def _writers(self) -> float:
        """By the threads that write() at the target: their copies, LOAD and set-up inside, and the end of the load."""
        finish_ns = self._finish_ns()
        bounds = [
            _queue((*self._load_from_to(job), self._chain_load_ns(job) + finish_ns) for job in jobs)
            for jobs in self._threads()
        ]
        threads = self._load_threads()
        shared = ((*self._load_from_to(job), (self._chain_load_ns(job) + finish_ns) / threads) for job in self._jobs)
        return max(*bounds, _queue(shared) if threads < math.inf else 0.0)

    def _writers_copy(self) -> bool:
        """Whether they copy for longer than they load."""
        copying_ns = sum(self._write_ns(job.chain) / job.readers for job in self._jobs)
        loading_ns = sum(self._load_ns(job.chain) / job.readers + job.setup_ns for job in self._jobs)
        return copying_ns > loading_ns + len(self._jobs) * self._finish_ns()

    def _load_threads(self) -> float:
        """How many devices multifd loads at once; without end where there is no such limit."""
        return (self._multifd and self._multifd.load_threads) or math.inf

    def _load(self) -> float:
        """By each PF's engines at the target; the end of the load is a command, too."""
        finish_ns = self._finish_ns()
        engines = min(self._scenario.firmware.engines, self._load_threads())
        bounds = [0.0]
        for jobs in self._by_pf():
            bounds.append(
                _queue((*self._load_from_to(job), (self._load_ns(job.whole) + finish_ns) / engines) for job in jobs)
            )
            ends = ((self._all_but_finish_ns(job), self._after_load_ns(job.device)) for job in jobs)
            bounds.append(_queue((*end, finish_ns / engines) for end in ends))
        return max(bounds)

    def _load_from_to(self, job: _Job) -> tuple[int, int]:
        """When the first byte is there at the earliest, and what follows the load."""
        return job.read_from_ns + self._latency_ns, self._after_load_ns(job.device)

    def _chain_load_ns(self, job: _Job) -> float:
        """On one thread, or `readers` of them. In v3 what waits for the critical data may be copied before."""
        write_ns, load_ns = self._write_ns(job.chain) / job.readers, self._load_ns(job.chain) / job.readers
        return load_ns + (max(job.setup_ns, write_ns) if self._v3 else job.setup_ns + write_ns)

    def _all_but_finish_ns(self, job: _Job) -> float:
        """When the last record of a device is loaded at the earliest, were it alone."""
        read_ns = job.read_from_ns + max(
            self._save_chain_ns(job),
            self._read_ns(job.chain) / job.readers,
            0.0 if self._connections() else self._stream_ns(job),
        )
        saved_ns = job.saved_from_ns + self._save_ns(job.chain) / job.readers
        last_ns = self._last_load_ns(job.device) if job.whole.commands else 0.0
        arrived_ns = max(read_ns, saved_ns) + self._latency_ns + last_ns
        return max(arrived_ns, job.read_from_ns + self._latency_ns + self._chain_load_ns(job))

    def _config(self) -> float:
        """One at a time, each when its device is loaded, and that of all other devices when RAM is there."""
        loaded_ns = [self._all_but_finish_ns(job) + self._finish_ns() for job in self._jobs]
        if self._single:
            return max(at + self._after_load_ns(job.device) for at, job in zip(loaded_ns, self._jobs, strict=True))
        resume_ns = self._resume_ns()
        configs = [(at, resume_ns, ns(j.device.config_load_ms)) for at, j in zip(loaded_ns, self._jobs, strict=True)]
        others = (self._ram_saved_ns + self._latency_ns, resume_ns, ns(self._scenario.vmm.other_load_ms))
        return max(max(at for at, _, _ in configs) + resume_ns, _queue([*configs, others]))

    def _by_pf(self) -> list[list[_Job]]:
        pfs = sorted({job.device.pf for job in self._jobs})
        return [[job for job in self._jobs if job.device.pf == pf] for pf in pfs]


def _at_least(duration_ns: float) -> float:
    return max(0.0, duration_ns)


def _queue(work: Iterable[tuple[float, float, float]]) -> float:
    """When one server that does all of this is through, with what comes after it, at the earliest.

    Of each piece: when it can begin, what follows it, what it takes. For each moment: all that can begin no earlier is
    still to be done, and what follows the last of it is the least of what may. And each piece is done for itself.
    """
    latest_ns, takes_ns, after_ns = 0.0, 0.0, math.inf
    for begins_ns, follows_ns, each_ns in sorted(work, reverse=True):
        if each_ns > 0:
            takes_ns += each_ns
            after_ns = min(after_ns, follows_ns)
            latest_ns = max(latest_ns, begins_ns + takes_ns + after_ns, begins_ns + each_ns + follows_ns)
    return latest_ns
