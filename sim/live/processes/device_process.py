# SPDX-License-Identifier: GPL-2.0-or-later
"""The device process: all devices of one host, on the real clock, with their state as bytes.

It runs the drivers of `sim` as they are. A VMM reaches them by calls (`sim.live.fd.calls`), of which those that are
ioctls carry the kernel's structures; data fds are passed to it. At the source the guest lives here, too: it writes
to the devices at the scenario's rate, until the VMM stops it. The process ends when its VMM does.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from proto_v3.vfio import ioctl
from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import FEATURE_MASK, DeviceFeature, Feature, FeatureOp
from sim.clock import port as clock
from sim.device.blocks import LoadBlocks, SaveBlocks
from sim.device.driver import SimDriver
from sim.device.load import LoadStream
from sim.device.save import SaveStream
from sim.device.save_v3 import CriticalStream, V3Stream
from sim.device.sessions import report_bug
from sim.device.state import DeviceState, Image
from sim.device.stream import fails
from sim.host.host import LiveHost, device_report, devices_at_source, devices_at_target, seeds
from sim.live.fd.calls import Calls, Reply
from sim.live.fd.codec import Decoder
from sim.live.fd.copy import Copier, RealLock
from sim.live.fd.load import LoadedBlocks, LoadedStream, placer
from sim.live.fd.save import BlocksData, SavedData
from sim.live.fd.store import StateStore
from sim.live.merge_timelines import ProcessTimeline
from sim.live.plain import to_plain
from sim.live.processes.report import DeviceProcessReport, Digests, ProcessReport
from sim.live.real_time import RealTime
from sim.scenario.scenario import Scenario

GUEST_TICK_NS = 2_000_000
"""How often the guest's due writes are applied: short beside every time that a device is asked for."""

Data = SavedData | LoadedStream | LoadedBlocks | BlocksData


class DeviceProcess:
    """Answers the calls of its VMM: the call `idle` by `_do_idle`, with the call's body as arguments, and so on."""

    def __init__(self, side: str) -> None:
        self.side = side
        self._calls: Calls | None = None
        self._data: dict[int, Data] = {}
        self._ended: set[int] = set()
        """Numbers of the fds that are cleaned up."""
        self._devices: list[_Device] = []
        self._guest: asyncio.Task[None] | None = None
        self._time: RealTime | None = None
        self._written: list[DeviceState] = []
        """The states that the guest writes to: none at the target."""

    async def serve(self, control: socket.socket) -> None:
        """Reply to calls until the VMM is gone; then stop everything."""
        self._calls = Calls(control, "VMM", self._handle)
        try:
            await self._calls.gone
        finally:
            if self._guest is not None:
                self._guest.cancel()
            for device in self._devices:
                await device.driver.reset()
            await self._end_what_is_over()
            if self._time is not None:
                self._time.close()

    async def _handle(self, name: str, body: dict[str, Any]) -> Reply:
        handler: Callable[..., Awaitable[Reply]] | None = getattr(self, f"_do_{name}", None)
        if handler is None:
            raise OSError(errno.ENOTTY, f"there is no call {name!r}")
        return await handler(**body)

    # --- set-up -------------------------------------------------------------------------------------------------------

    async def _do_init(self, scenario: str, seed: int) -> Reply:
        """Make the devices. The time begins later, with `start`."""
        self._scenario, self._seed = Scenario.model_validate_json(scenario), seed
        filled = self.side == "source"
        self._stores = [await asyncio.to_thread(StateStore, spec, filled=filled) for spec in self._scenario.devices]
        return Reply()

    async def _do_start(self, zero_ns: int) -> Reply:
        """Time 0 is at `zero_ns` of perf_counter_ns(); the guest runs from then on."""
        self._time = time = RealTime(zero_ns)
        clock.use(time)
        self.timeline = ProcessTimeline(time.now_ns)
        assert self._calls is not None
        self._calls.trace(self.timeline, self.side)
        guest_seed, source_seed, target_seed = seeds(self._seed)
        at_source = self.side == "source"
        host = LiveHost(self._scenario, source_seed if at_source else target_seed, self.timeline, RealLock)
        made: list[tuple[SimDriver, DeviceState | Image]] = []
        if at_source:
            made += devices_at_source(self._scenario, guest_seed, host)
        else:
            made += devices_at_target(self._scenario, host)
        for (driver, state), store in zip(made, self._stores, strict=True):
            if isinstance(state, DeviceState):
                state.content = store
                self._written.append(state)
            else:
                state.place = placer(store)
            self._devices.append(_Device(driver, state, store))
        if at_source:
            self._guest = asyncio.create_task(self._run_guest(), name="guest")
            self._guest.add_done_callback(report_bug)
        return Reply()

    async def _run_guest(self) -> None:
        """Write what is due every GUEST_TICK_NS. A driver that needs it earlier calls DeviceState.advance itself."""
        busy = [state for state in self._written if state.activity.busy]
        while busy:
            await clock.sleep_ns(GUEST_TICK_NS)
            for state in busy:
                state.advance(clock.now_ns())

    async def _do_ping(self) -> Reply:
        return Reply()

    # --- the device fd ------------------------------------------------------------------------------------------------

    async def _do_feature(self, device: int, buffer: bytes) -> Reply:
        """VFIO_DEVICE_FEATURE."""
        of, argument = self._devices[device], bytearray(buffer)
        passed: list[Data] = []
        try:
            await ioctl.device_feature(of.driver, argument, lambda fd: self._install(of, fd, passed))
        finally:
            await self._end_what_is_over()
        header = DeviceFeature.unpack(argument)
        done = header.flags & FeatureOp.SET and not header.flags & FeatureOp.PROBE
        if header.flags & FEATURE_MASK == Feature.MIG_PRECOPY_INFOV2 and done:
            of.opted_in = True
        return Reply({"buffer": bytes(argument)}, [fd for data in passed for fd in data.fds()])

    async def _do_reset(self, device: int) -> Reply:
        await self._devices[device].driver.reset()
        await self._end_what_is_over()
        return Reply()

    def _install(self, device: _Device, fd: DataFd, passed: list[Data]) -> int:
        """The number of a data fd. One that the VMM does not have yet is made, and added to those that are passed."""
        for number, data in self._data.items():
            if data.stream is fd:
                return number
        number = len(self._data) + 1
        name = f"{self.side} {device.driver.name} fd {number}"
        scenario = self._scenario
        lock = device.driver.lock_for_a_copy()
        mutex = lock.mutex if isinstance(lock, RealLock) else None
        rate = scenario.host.copy_bytes_per_s
        room_bytes = scenario.driver.chunk_bytes  # the socket is the end of the driver's chunks
        if isinstance(fd, SaveStream):
            copier, piece_bytes = Copier(mutex, rate), scenario.vmm.read_bytes
            if mutex is None:  # nobody waits for the lock between two reads
                piece_bytes = max(piece_bytes, scenario.driver.chunk_bytes)
            data = SavedData(
                fd, device.store, copier, self.timeline, name, room_bytes=room_bytes, piece_bytes=piece_bytes
            )
        elif isinstance(fd, SaveBlocks):
            data = BlocksData(fd, device.store, mutex, rate, self.timeline)
        else:
            assert isinstance(fd, LoadStream | LoadBlocks)
            kind = LoadedBlocks if isinstance(fd, LoadBlocks) else LoadedStream
            decoder = partial(Decoder, device.driver.spec, device.driver.dirty_streams > 0, scenario.driver.check_bytes)
            data = kind(fd, decoder, device.store, Copier(None, rate), self.timeline, name, room_bytes=room_bytes)
        self._data[number] = data
        passed.append(data)
        return number

    async def _end_what_is_over(self) -> None:
        """Clean up the fds of sessions that are over: nothing more is read, or written to the device's state."""
        for number, data in list(self._data.items()):
            if data.ends_with.over and number not in self._ended:
                await data.ended()
                self._ended.add(number)

    # --- data fds -----------------------------------------------------------------------------------------------------

    async def _do_precopy_info(self, device: int, fd: int, buffer: bytes) -> Reply:
        argument, stream = bytearray(buffer), self._data[fd].stream
        await ioctl.get_precopy_info(stream, argument, opted_in=self._devices[device].opted_in)
        return Reply({"buffer": bytes(argument)})

    async def _do_stream_info(self, device: int, fd: int, buffer: bytes) -> Reply:
        argument = bytearray(buffer)
        await ioctl.get_stream_info(self._data[fd].stream, argument)
        return Reply({"buffer": bytes(argument)})

    async def _do_get_stream(self, device: int, fd: int, buffer: bytes) -> Reply:
        of, argument = self._devices[device], bytearray(buffer)
        passed: list[Data] = []
        await ioctl.get_stream(self._data[fd].stream, argument, lambda stream: self._install(of, stream, passed))
        blocks = any(isinstance(data, BlocksData | LoadedBlocks) for data in passed)
        return Reply({"buffer": bytes(argument), "blocks": blocks}, [fd for data in passed for fd in data.fds()])

    async def _do_idle(self, fd: int) -> Reply:
        data = self._data[fd]
        if not isinstance(data, SavedData):
            raise fails(errno.EBADF)
        end, sent = await data.idle()
        return Reply({"what": end.what, "errno": end.errno, "text": end.text, "sent": sent})

    async def _do_new_epoch(self, fd: int, wait: bool) -> Reply:
        """Of v3's saved fds: whether there is a new epoch, and whether the session is over. `wait`: for a new epoch."""
        stream = self._data[fd].stream
        critical = stream if isinstance(stream, CriticalStream) else None
        if not isinstance(stream, V3Stream | SaveBlocks) or (wait and critical is None):
            raise fails(errno.ENOTTY)
        if wait and critical is not None:
            await critical.new_epoch()
        new = critical is not None and bool(critical.ready() & Ready.NEW_EPOCH)
        return Reply({"new": new, "end": int(stream.ready_at_the_end())})

    async def _do_poll(self, fd: int, timeout_ns: int | None) -> Reply:
        """poll() of a fd that is loaded."""
        return Reply({"ready": int(await self._data[fd].stream.poll(timeout_ns))})

    async def _do_close(self, fd: int) -> Reply:
        await self._data[fd].stream.close()
        return Reply()

    async def _do_dirty_blocks(self, fd: int, buffer: bytes, bitmap_bytes: int) -> Reply:
        argument, bitmap, stream = bytearray(buffer), bytearray(bitmap_bytes), self._data[fd].stream
        if not isinstance(stream, SaveBlocks | LoadBlocks):
            raise fails(errno.ENOTTY)
        try:
            await ioctl.get_dirty_blocks(stream, argument, bitmap)
        except OSError as error:
            if error.errno != errno.EINVAL:  # with which it reports the number of bits that it needs
                raise
            bitmap.clear()
        return Reply({"buffer": bytes(argument), "bitmap": bytes(bitmap)})

    async def _do_read_blocks(self, fd: int, first: int, count: int, free: int) -> Reply:
        data = self._data[fd]
        if not isinstance(data, BlocksData):
            raise fails(errno.EBADF)
        offset, size = await data.read_blocks(first, count, free)
        return Reply({"offset": offset, "size": size})

    async def _do_read_end(self, fd: int, max_bytes: int) -> Reply:
        data = self._data[fd]
        if not isinstance(data, BlocksData):
            raise fails(errno.EBADF)
        return Reply({"data": await data.read(max_bytes)})

    # --- the guest, and the end ---------------------------------------------------------------------------------------

    async def _do_guest(self, what: str) -> Reply:
        """The guest is about to stop, stops, or starts. At the target there is nothing to do."""
        for state in self._written:
            match what:
                case "order_stop":
                    state.order_stop(clock.now_ns())
                case "stop":
                    state.stop(clock.now_ns())
                case "start":
                    state.start()
                case _:
                    raise fails(errno.EINVAL)
        return Reply()

    async def _do_digests(self) -> Reply:
        """Of the current state; the guest must be stopped."""
        digests = [await asyncio.to_thread(device.store.digests) for device in self._devices]
        return Reply(to_plain(Digests(digests)))

    async def _do_progress(self) -> Reply:
        """For progress notes, in bytes: what remains, and what the guest has written so far."""
        left = [await device.driver.stop_copy_bytes() for device in self._devices]
        return Reply({"left_bytes": sum(left), "written_bytes": sum(state.written_bytes for state in self._written)})

    async def _do_collect(self) -> Reply:
        for data in self._data.values():
            if isinstance(data, SavedData | BlocksData):
                counters = data.stream.counters
                counters.read_lock_ns, counters.read_copy_ns = data.lock_ns, data.copy_ns
        assert self._time is not None
        process = ProcessReport(self.timeline.export(), self._time.delays(), self._time.cpu_ns, self._time.user_ns)
        report = DeviceProcessReport(process, [device_report(device.driver, device.state) for device in self._devices])
        return Reply(to_plain(report))


@dataclass(slots=True)
class _Device:
    """A driver, and the state behind it."""

    driver: SimDriver
    state: DeviceState | Image
    store: StateStore
    opted_in: bool = False
    """To PRECOPY_INFOv2."""
