# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's V2Source and V2Target on devices of the same driver in the same kernel, as a case of QEMU's sets them.

Both are in this process, joined by queues. The guest is as QEMU's here: idle, with a little RAM.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import time
from collections.abc import Callable, Sequence

from typing_extensions import override

from proto_v3.errors import ProtoV3Error, leaves
from proto_v3.vmm.machine import GuestRam, Machine
from proto_v3.vmm.migration import OutcomeKind, Side
from proto_v3.vmm.v2_source import V2Source
from proto_v3.vmm.v2_target import V2Target
from proto_v3.wire.channel import Channel, Transport
from proto_v3.wire.frames import Payload
from sim.live.merge_timelines import ProcessTimeline
from sim.real.device import RealDevice
from sim.real.fd import DataFds
from sim.real.sysfs import find
from sim.real.vfio import OpenDevices
from sim.scenario.protocol import Protocol
from tests.build.scenario import small_scenario
from tests.real import mdev
from tests.real.qemu.cases import Act, Case
from tests.real.qemu.migrate import LOG_LINES, Record, calls_of

RAM_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
QUEUED = 4
"""Frames that a connection takes before its sender waits."""
QEMU_DEFAULTS = {
    "vmm.read_mib": 1.0,
    "vmm.write_kib": 32,
    "vmm.downtime_limit_ms": 300.0,
    "vmm.bandwidth_window_ms": 100.0,
    "vmm.ram_budget_ms": 50.0,
    "vmm.give_up_s": 60.0,
}


def protocol_of(case: Case, version: str) -> str:
    """The project's name for what the case sets, under this version of QEMU."""
    new = version.startswith("11")
    words = ["v2"]
    if case.multifd:
        words.append("multifd")
    if new:
        words.append("reinit-flush")
    if case.ack:
        words.append("ack-reusable" if new and case.machine == "pc" else "ack")
    return "-".join(words)


def settings_of(case: Case) -> dict[str, object]:
    """QEMU's defaults, and what the case sets otherwise, as keys of a scenario."""
    changes: dict[str, object] = dict(QEMU_DEFAULTS)
    if "downtime-limit" in case.parameters:
        changes["vmm.downtime_limit_ms"] = float(case.parameters["downtime-limit"])
    if "multifd-channels" in case.parameters:
        changes["vmm.multifd_channels"] = case.parameters["multifd-channels"]
    if "max-bandwidth" in case.parameters:
        changes["vmm.max_bandwidth_mib_per_s"] = case.parameters["max-bandwidth"] / (1 << 20)
    if case.act is Act.CANCEL_PRECOPY:
        changes["vmm.cancel_after_s"] = 2.0
    return changes


class QueueTransport(Transport):
    """One end of a connection between two tasks of this process."""

    def __init__(
        self, out: asyncio.Queue[tuple[bytes, Payload] | None], back: asyncio.Queue[tuple[bytes, Payload] | None]
    ):
        self._out, self._in = out, back
        self.closed = False

    @override
    async def send(self, header: bytes, payload: Payload) -> None:
        if self.closed:
            raise ConnectionResetError("the other side closed the connection")
        await self._out.put((header, memoryview(bytes(payload))))  # type: ignore[call-overload]

    @override
    async def recv(self) -> tuple[bytes, Payload]:
        message = None if self.closed else await self._in.get()
        if message is None:
            self.closed = True
            raise ConnectionResetError("the other side closed the connection")
        return message


def connection() -> tuple[QueueTransport, QueueTransport]:
    """Both ends of one."""
    there: asyncio.Queue[tuple[bytes, Payload] | None] = asyncio.Queue(QUEUED)
    back: asyncio.Queue[tuple[bytes, Payload] | None] = asyncio.Queue(QUEUED)
    return QueueTransport(there, back), QueueTransport(back, there)


class IdleRam(GuestRam):
    """RAM that is sent once, and never dirty again."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.passes = 0

    @override
    def pending_bytes(self) -> int:
        return self._left

    @override
    async def sync(self) -> None: ...

    @override
    async def final_sync(self) -> None: ...

    @override
    async def final_scan(self) -> None: ...

    @override
    async def take(self, budget_ns: int) -> Payload | None:
        size = min(self._left, PIECE_BYTES)
        self._left -= size
        self.passes += not size
        return memoryview(bytes(size)) if size else None

    @override
    async def load(self, payload: Payload) -> None: ...


class IdleMachine(Machine):
    """A guest that does nothing."""

    def __init__(self, ram: GuestRam, running: bool, on_stop: Callable[[], None] | None = None) -> None:
        """`on_stop`: what the guest does last."""
        self._ram, self._running, self._on_stop = ram, running, on_stop

    @property
    @override
    def ram(self) -> GuestRam:
        return self._ram

    @property
    @override
    def running(self) -> bool:
        return self._running

    @override
    async def set_up(self) -> None: ...

    @override
    async def stop_vcpus(self) -> None:
        if self._on_stop is not None:
            self._on_stop()
        self._running = False

    @override
    async def buffer_device_data(self, size_bytes: int) -> None: ...

    @override
    async def load_other_devices(self) -> None: ...

    @override
    async def load_config(self, device: int) -> None: ...

    @override
    async def start_vcpus(self) -> None:
        self._running = True


class Project:
    """The two VMMs of one case."""

    def __init__(self, case: Case, version: str) -> None:
        self._case = case
        scenario = small_scenario(settings_of(case))
        self._scenario = Protocol.parse(protocol_of(case, version), scenario).applied(scenario).scenario

    async def run(self, devices: Sequence[mdev.SampleMdev]) -> tuple[str, str, dict[str, bool]]:
        """Migrate from the first half of the devices to the second: how it ended, why it failed, which guests run."""
        sources = devices[: self._case.devices]

        def reconfigure() -> None:
            for device in sources if self._case.late_reinit else ():
                device.reconfigure()

        options, settings = self._scenario.v2_options(), self._scenario.switchover_settings()
        zero_ns = time.perf_counter_ns()
        timeline = ProcessTimeline(lambda: time.perf_counter_ns() - zero_ns)
        entries = [find(device.uuid) for device in devices]
        ends = [connection() for _ in range(options.channels)]
        with OpenDevices(entries[: self._case.devices]) as here, OpenDevices(entries[self._case.devices :]) as there:
            fds, sides, all_devices = [], [], []
            for name, opened, running in (("source", here, True), ("target", there, False)):
                fds.append(DataFds(name, timeline, settings.read_bytes))
                made = [RealDevice(each.entry.name, each.fd, fds[-1]) for each in opened.devices]
                all_devices += made
                machine = IdleMachine(IdleRam(RAM_BYTES if running else 0), running, reconfigure)
                sides.append(Side(machine, made, settings, timeline))
            source = V2Source(sides[0], [Channel(end) for end, _ in ends], options)
            target = V2Target(sides[1], [Channel(end) for _, end in ends], options)
            kind, error = await self._both(source, target, ends, devices)
            for each in fds:
                await each.close()
            for device in all_devices:
                await device.stop()
            runs = {name: side.machine.running for name, side in zip(("source", "target"), sides, strict=True)}
        return kind, error, runs

    async def _both(
        self,
        source: V2Source,
        target: V2Target,
        ends: Sequence[tuple[QueueTransport, QueueTransport]],
        devices: Sequence[mdev.SampleMdev],
    ) -> tuple[str, str]:
        sending, receiving = asyncio.create_task(source.run()), asyncio.create_task(target.run())
        if self._case.act in (Act.KILL_PRECOPY, Act.KILL_DEVICE):
            await self._until_due(source, devices[-1])
            receiving.cancel()
            cut(ends)
        result = (await asyncio.gather(sending, return_exceptions=True))[0]
        if not isinstance(result, OutcomeKind):
            cut(ends)
        with contextlib.suppress(asyncio.CancelledError, OSError, ProtoV3Error, ExceptionGroup):
            await receiving
        if isinstance(result, OutcomeKind):
            return result.lower(), source.reason
        if isinstance(result, (OSError, ProtoV3Error, ExceptionGroup)):
            return OutcomeKind.FAILED.lower(), "; ".join(dict.fromkeys(str(each) for each in leaves(result)))
        raise result

    async def _until_due(self, source: V2Source, loaded: mdev.SampleMdev) -> None:
        """Until the moment at which the case's target is killed: it loads, or has to resume the devices."""
        while not any(" write " in line for line in loaded.log()):
            await asyncio.sleep(0.01)
        while self._case.act is Act.KILL_DEVICE and not source.handed_over:
            await asyncio.sleep(0.01)


def cut(ends: Sequence[tuple[QueueTransport, QueueTransport]]) -> None:
    """Break all connections."""
    for pair in ends:
        for end in pair:
            end.closed = True
            for queue in (end._out, end._in):
                with contextlib.suppress(asyncio.QueueFull):
                    queue.put_nowait(None)


def migrate(case: Case, version: str) -> Record:
    """Run the case with the project's VMMs, as under this version of QEMU."""
    names = [f"{side}{index}" for side in "ab" for index in range(case.devices)]
    driver = {key: value for key, value in case.driver.items() if key != "reinit_at" or not case.late_reinit}
    devices = {name: mdev.create_sample(log_lines=LOG_LINES, **driver) for name in names}
    record = Record(
        case.name,
        protocol_of(case, version),
        protocol_of(case, version),
        platform.release(),
        {**mdev.sample_parameters(), **{key: str(value) for key, value in driver.items()}},
    )
    try:
        record.status, record.error, runs = asyncio.run(Project(case, version).run(list(devices.values())))
        record.source_status = "running" if runs["source"] else "stopped"
        record.target_status = "running" if runs["target"] else "stopped"
        record.digests = {name: device.digest() for name, device in devices.items()}
        record.calls = calls_of(devices)
    finally:
        for device in devices.values():
            device.remove()
    return record
