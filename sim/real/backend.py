# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices of a VMM process that are the kernel's own: opened there, called, and left as they were found."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from typing_extensions import override

from proto_v3.errors import UserError
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import Feature, FeatureMigDataSize
from sim.host.machine import Guest
from sim.live.io import Worker
from sim.live.merge_timelines import ProcessTimeline
from sim.live.processes.backend import DeviceBackend
from sim.live.processes.comparison import StateComparison
from sim.live.processes.report import DevicesReport, StreamReport
from sim.live.tcp.messages import Run
from sim.real.device import RealDevice
from sim.real.fd import DataFds
from sim.real.ioctl import get_feature
from sim.real.iommu import DmaLog
from sim.real.put_back import put_back
from sim.real.ram import RAM_IOVA, RealRam, ram_bytes
from sim.real.sample import MAX_DIGEST_CHARS, SampleFiles
from sim.real.sysfs import DeviceEntry
from sim.real.vfio import OpenDevice, OpenDevices
from sim.report import Counters, DeviceReport
from sim.scenario.device import Device
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_S, PAGE_BYTES

T = TypeVar("T")

RAM_DIGEST_BYTES = 32
"""SHA-256."""
PUT_BACK_S = 10.0
"""How long calls that were begun may take to return before the devices are put back. Ours."""


class RamAndState(StateComparison):
    """A device's digest is a hash of the guest's RAM, and then what its driver says of its state, or nothing."""

    @override
    def wrong(self, devices: Sequence[Device], digests: Sequence[bytes]) -> str:
        sizes = range(RAM_DIGEST_BYTES, RAM_DIGEST_BYTES + MAX_DIGEST_CHARS + 1)
        if not digests or (len(digests) == len(devices) and all(len(each) in sizes for each in digests)):
            return ""
        return f"must be none, or {len(devices)} of {sizes.start} to {sizes.stop - 1} bytes"

    @override
    def difference(self, device: Device, source: bytes, target: bytes) -> str:
        if source[:RAM_DIGEST_BYTES] != target[:RAM_DIGEST_BYTES]:
            return "the guest's RAM is another"
        if not is_compared(source, target) or source == target:
            return ""
        here, there = (each[RAM_DIGEST_BYTES:].decode("ascii", "replace") for each in (source, target))
        return f"its driver's digest is {here} at the source and {there} at the target"


def is_compared(source: bytes, target: bytes) -> bool:
    """Whether the drivers at both ends say what the device's state is."""
    return min(len(source), len(target)) > RAM_DIGEST_BYTES


RAM_AND_STATE = RamAndState()


@dataclass(slots=True)
class _BackendDevice:
    """A device, in this process."""

    opened: OpenDevice
    sample: SampleFiles | None
    log: DmaLog
    image_bytes: int
    """What STOP_COPY would return before the migration."""
    held: dict[str, str]
    """Parameters of the sample driver that were changed, with their values before."""
    port: RealDevice | None = None


class RealBackend(DeviceBackend):
    """Devices of the kernel."""

    where = "devices"
    comparison = RAM_AND_STATE

    def __init__(self, side: str, entries: Sequence[DeviceEntry], way: str | None) -> None:
        """`way`: how they are opened (sim.real.vfio.WAYS). They are opened by init()."""
        self.guest = EventsGuest()
        self._side = side
        self._entries = entries
        self._way = way
        self._worker = Worker(f"{side} devices")
        """For all that may block, but is no call of a migration."""
        self._open: OpenDevices | None = None
        self._devices: list[_BackendDevice] = []
        self._fds: DataFds | None = None
        self._memory: mmap.mmap | None = None
        self._ram: RealRam | None = None
        self._seed = 0
        self._put_back: list[str] = []
        self._closed_why = ""
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def drivers(self) -> str:
        """As an offer names them."""
        return ",".join(entry.driver for entry in self._entries)

    @override
    def check(self, run: Run) -> None:
        if not run.drivers:
            raise UserError(
                f"the source simulates its devices, and this target has devices of its kernel ({self.drivers}): "
                "take `proto-v3 real DEVICE --connect`"
            )
        if run.drivers != self.drivers:
            raise UserError(f"the source's devices have the drivers {run.drivers}, this target's {self.drivers}")

    # --- set-up -------------------------------------------------------------------------------------------------------

    @override
    async def init(self, scenario: Scenario, seed: int) -> None:
        self._seed = seed
        await self._in_thread(lambda: self._init(scenario))

    def _init(self, scenario: Scenario) -> None:
        self._open = OpenDevices(self._entries, self._way)
        for opened in self._open.devices:
            opened.migration_flags()
            device = _BackendDevice(opened, SampleFiles.of(opened.entry), DmaLog(opened.fd, PAGE_BYTES), 0, {})
            self._devices.append(device)
            self._put_back += put_back(opened, "was found in")
            with contextlib.suppress(OSError):  # a driver need not have it
                device.image_bytes = get_feature(opened.fd, Feature.MIG_DATA_SIZE, FeatureMigDataSize).stop_copy_length
        self._memory = mmap.mmap(-1, ram_bytes(scenario.ram))
        try:
            self._open.space.map(self._memory, RAM_IOVA)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.EPERM):
                raise UserError(
                    f"ram.size_gib: the kernel does not pin {len(self._memory)} bytes for this user "
                    f"({error.strerror}): raise the limit (ulimit -l), or take less"
                ) from None
            raise

    @override
    def begin(self, scenario: Scenario, timeline: ProcessTimeline) -> Sequence[MigrationDevice]:
        fds = self._fds = DataFds(self._side, timeline, scenario.vmm.read_bytes)
        for device, spec in zip(self._devices, scenario.devices, strict=True):
            device.port = RealDevice(spec.name, device.opened.fd, fds)
            if spec.reconfigurations is not None:
                self.guest.plan(spec.reconfigurations.at_s, device.sample)
        return [device.port for device in self._devices if device.port is not None]

    @override
    def ram(self, scenario: Scenario, timeline: ProcessTimeline) -> RealRam:
        assert self._memory is not None
        at_source = self._side == "source"
        logs = [device.log for device in self._devices if at_source and device.log.exists]
        self._ram = RealRam(scenario.ram, self._memory, timeline, logs, at_source=at_source, seed=self._seed)
        return self._ram

    @override
    async def start(self, zero_ns: int) -> None:
        await self._in_thread(self._start)
        if self._side == "source":
            self.guest.begin(zero_ns, self._devices)

    def _start(self) -> None:
        assert self._memory is not None
        for device in self._devices:
            if self._side == "source":
                if device.log.exists:
                    device.log.start(RAM_IOVA, len(self._memory))
            elif device.sample is not None:  # what it wrote to itself once it runs would not be the source's state
                self._hold(device, device.sample, "dirty_kib_s", "0")

    def _hold(self, device: _BackendDevice, sample: SampleFiles, name: str, value: str) -> None:
        before = sample.parameters().get(name, value)
        if before != value:
            device.held[name] = before
            sample.set_parameter(name, value)

    # --- what is asked meanwhile, and at the end ----------------------------------------------------------------------

    @override
    async def progress(self) -> tuple[int, int]:
        # The devices are not asked: that would be a call among those of the migration. No driver says what was written.
        read_bytes = sum(fd.counters.device_bytes for fd in self._fds.fds) if self._fds is not None else 0
        return max(0, sum(device.image_bytes for device in self._devices) - read_bytes), 0

    @override
    def streams(self) -> list[StreamReport]:
        return [] if self._fds is None else [StreamReport(fd.name, fd.counters) for fd in self._fds.fds]

    @override
    async def collect(self) -> DevicesReport:
        if self.gone or self._fds is None:
            raise OSError(errno.ENODEV, self._closed_why)
        reports = []
        for device in self._devices:
            assert device.port is not None
            counters = Counters.total(fd.counters for fd in self._fds.fds if fd.of == device.port.name)
            events_ns = self.guest.events_ns if device is self._devices[0] else []
            reports.append(
                DeviceReport(device.port.name, device.image_bytes, counters, reconfigurations_ns=list(events_ns))
            )
        return DevicesReport(reports, None)

    @override
    async def digests(self) -> list[bytes]:
        return await self._in_thread(self._digests)

    def _digests(self) -> list[bytes]:
        assert self._ram is not None
        ram = self._ram.digest()
        return [ram + (b"" if device.sample is None else device.sample.digest()) for device in self._devices]

    @override
    async def beat(self, first_s: float, silent_s: float) -> None:
        await asyncio.wait([self._closed])  # a kernel does not answer pings: a call that hangs is known by its time

    @property
    @override
    def gone(self) -> bool:
        return bool(self._closed_why)

    @override
    def close(self, why: str) -> None:
        self._closed_why = self._closed_why or f"the devices: {why}"
        if self._fds is not None:
            self._fds.give_up(self._closed_why)
        if not self._closed.done():
            self._closed.set_result(None)

    @override
    async def put_back(self) -> list[str]:
        if self._open is None:
            return self._put_back
        self.close("released")
        await self.guest.end()
        try:
            async with asyncio.timeout(PUT_BACK_S):
                await self._in_thread(self._stop_sessions)
                if self._fds is not None:
                    await self._fds.close()
                for device in self._devices:
                    if device.port is not None:
                        await device.port.stop()
                if self._ram is not None:
                    await self._ram.end()
                await self._in_thread(self._release)
        except TimeoutError:
            self._put_back.append(
                f"{self._side}: calls of the devices did not return within {PUT_BACK_S:g} s; the kernel puts the "
                "devices back when this process is gone"
            )
        return self._put_back

    def _stop_sessions(self) -> None:
        """Each device to RUNNING, which ends its session, and with it all reads and writes that wait."""
        for device in self._devices:
            with contextlib.suppress(OSError):
                device.log.stop()
            self._put_back += put_back(device.opened, "was left in")
            if device.sample is not None:
                for name, value in device.held.items():
                    device.sample.set_parameter(name, value)

    def _release(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await asyncio.shield(self._worker.start(job))


# --- the guest --------------------------------------------------------------------------------------------------------


class EventsGuest(Guest):
    """What the guest does to devices of the kernel: what these do by themselves, and reconfigurations at the scenario's
    times, where the driver can be told to (sim.real.sample)."""

    def __init__(self) -> None:
        self.events_ns: list[int] = []
        """When the first device was reconfigured, on the run's clock."""
        self._due: list[tuple[int, SampleFiles]] = []
        self._zero_ns = 0
        self._runs = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._worker: Worker | None = None
        self._first: SampleFiles | None = None

    def plan(self, at_s: Sequence[float], sample: SampleFiles | None) -> None:
        """Reconfigure a device at these times."""
        if sample is not None:
            self._due += [(round(each * NS_PER_S), sample) for each in at_s]

    def begin(self, zero_ns: int, devices: Sequence[_BackendDevice]) -> None:
        """Time 0 is at `zero_ns` of perf_counter_ns(). The guest runs."""
        self._zero_ns = zero_ns
        self._first = devices[0].sample
        self._runs.set()
        if self._due:
            self._worker = Worker("guest")
            self._task = asyncio.create_task(self._run(), name="guest")

    async def _run(self) -> None:
        assert self._worker is not None
        for due_ns, sample in sorted(self._due, key=lambda due: due[0]):
            await asyncio.sleep(max(0, due_ns + self._zero_ns - time.perf_counter_ns()) / NS_PER_S)
            await self._runs.wait()
            at_ns = time.perf_counter_ns() - self._zero_ns
            await asyncio.shield(self._worker.start(sample.reconfigure))
            if sample is self._first:
                self.events_ns.append(at_ns)

    async def end(self) -> None:
        """The guest is over."""
        if self._task is not None:
            self._task.cancel()
        if self._worker is not None:
            await self._worker.stop()

    @override
    async def order_stop(self) -> None:
        pass

    @override
    async def stop(self) -> None:
        self._runs.clear()

    @override
    async def start(self) -> None:
        self._runs.set()
