# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices of a VMM in a device process, reached by calls and by data fds that are passed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from typing_extensions import override

from proto_v3.errors import UserError
from proto_v3.vfio.device import MigrationDevice
from sim.host.machine import Guest, RamModel
from sim.live.fd.calls import Calls
from sim.live.fd.remote import RemoteDevice
from sim.live.fd.remote_fd import Devices
from sim.live.merge_timelines import ProcessTimeline
from sim.live.plain import from_plain
from sim.live.processes.backend import DeviceBackend
from sim.live.processes.comparison import BLOCK_BY_BLOCK
from sim.live.processes.report import DeviceProcessReport, DevicesReport, Digests, StreamReport
from sim.live.tcp.messages import Run
from sim.scenario.scenario import Scenario


class RemoteBackend(DeviceBackend):
    """A device process at the other end of the calls."""

    where = "device process"
    comparison = BLOCK_BY_BLOCK

    def __init__(self, calls: Calls, side: str, io: str) -> None:
        self.calls = calls
        self.guest = GuestThere(calls)
        self._side = side
        self._io = io
        self._devices: Devices | None = None

    @override
    def check(self, run: Run) -> None:
        if run.drivers:
            raise UserError(
                f"the source migrates devices of a kernel ({run.drivers}), and this target simulates its own: "
                "take `proto-v3 real DEVICE --listen`"
            )

    @override
    async def init(self, scenario: Scenario, seed: int) -> None:
        await self.calls.call("init", scenario=scenario.to_json(), seed=seed)

    @override
    def begin(self, scenario: Scenario, timeline: ProcessTimeline) -> Sequence[MigrationDevice]:
        self.calls.trace(timeline, self._side)
        read_bytes = scenario.vmm.read_bytes
        devices = self._devices = Devices(self.calls, self._side, self._io, timeline, read_bytes)
        return [RemoteDevice(index, each.name, devices) for index, each in enumerate(scenario.devices)]

    @override
    def ram(self, scenario: Scenario, timeline: ProcessTimeline) -> RamModel:
        return RamModel(scenario.ram, timeline, Pages())

    @override
    async def start(self, zero_ns: int) -> None:
        await self.calls.call("start", zero_ns=zero_ns)

    @override
    async def progress(self) -> tuple[int, int]:
        answer = (await self.calls.call("progress")).body
        return answer["left_bytes"], answer["written_bytes"]

    @override
    def streams(self) -> list[StreamReport]:
        return [] if self._devices is None else [StreamReport(fd.name, fd.counters) for fd in self._devices.fds]

    @override
    async def collect(self) -> DevicesReport:
        report = from_plain(DeviceProcessReport, (await self.calls.call("collect")).body)
        return DevicesReport(report.devices, report.process)

    @override
    async def digests(self) -> list[bytes]:
        return from_plain(Digests, (await self.calls.call("digests")).body).digests

    @override
    async def beat(self, first_s: float, silent_s: float) -> None:
        if await self.calls.unanswered(first_s, silent_s):
            self.close(f"does not answer for {silent_s:g} s")

    @property
    @override
    def gone(self) -> bool:
        return self.calls.gone.done()

    @override
    def close(self, why: str) -> None:
        self.calls.close(why)

    @override
    async def put_back(self) -> list[str]:
        return []  # the device process does it when this process is gone

    def release(self) -> None:
        """Close all descriptors, of a VMM that is no process of its own."""
        if self._devices is not None:
            self._devices.close()
        self.calls.close()


class GuestThere(Guest):
    """A guest that writes to its devices in the device process."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @override
    async def order_stop(self) -> None:
        await self._calls.call("guest", what="order_stop")

    @override
    async def stop(self) -> None:
        await self._calls.call("guest", what="stop")

    @override
    async def start(self) -> None:
        await self._calls.call("guest", what="start")


class Pages:
    """Pages of RAM as bytes of which only the number matters. They are never written, so they take no memory."""

    def __init__(self) -> None:
        self._zeros = memoryview(b"")

    def __call__(self, size_bytes: int) -> memoryview:
        """`size_bytes` zeros."""
        if size_bytes > len(self._zeros):
            self._zeros = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return self._zeros[:size_bytes]
