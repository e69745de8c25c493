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
from typing import Any

from proto_v3.vfio import ioctl
from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import FEATURE_MASK, DeviceFeature, Feature, FeatureOp
from sim.clock import port as clock
from sim.device.blocks import LoadBlocks, SaveBlocks
from sim.device.driver import SimDriver
from sim.device.load import LoadStream
from sim.device.save import SaveStream
from sim.device.save_v3 import CriticalStream
from sim.device.sessions import report_bug
from sim.device.state import DeviceState, Image
from sim.device.stream import fails
from sim.host.host import LiveHost, device_report, devices_at_source, devices_at_target, seeds
from sim.live.fd.blocks import BlocksData
from sim.live.fd.calls import Calls, Reply
from sim.live.fd.codec import Decoder
from sim.live.fd.copy import Copier
from sim.live.fd.load import LoadedBlocks, LoadedStream, placer
from sim.live.fd.lock import RealLock
from sim.live.fd.save import SavedData
from sim.live.fd.store import StateStore
from sim.live.merge_timelines import ProcessTimeline
from sim.live.plain import to_plain
from sim.live.processes.report import DeviceProcessReport, Digests, ProcessReport
from sim.live.real_time import RealTime
from sim.report import DeviceReport
from sim.scenario.scenario import Scenario

GUEST_TICK_NS = 2_000_000
"""How often the guest's due writes are applied: short beside every time that a device is asked for."""

Data = SavedData | LoadedStream | LoadedBlocks | BlocksData


class DeviceProcess:
    """Answers the calls of its VMM."""

    def __init__(self, side: str) -> None:
        self.side = side
        self._calls: Calls | None = None
        self._data: dict[int, Data] = {}
        self._ended: set[int] = set()
        """Numbers of the fds that are cleaned up."""
        self._devices: list[_Device] = []
        self._guest: asyncio.Task[None] | None = None
        self._time: RealTime | None = None
        self._handlers: dict[str, Callable[[dict[str, Any]], Awaitable[Reply]]] = {
            "init": self._init,
            "start": self._start,
            "ping": self._ping,
            "feature": self._feature,
            "reset": self._reset,
            "precopy_info": self._precopy_info,
            "stream_info": self._stream_info,
            "get_stream": self._get_stream,
            "idle": self._idle,
            "new_epoch": self._new_epoch,
            "close": self._close,
            "dirty_blocks": self._dirty_blocks,
            "read_blocks": self._read_blocks,
            "read_end": self._read_end,
            "guest": self._guest_does,
            "digests": self._digests,
            "progress": self._progress,
            "collect": self._collect,
        }

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
        handler = self._handlers.get(name)
        if handler is None:
            raise OSError(errno.ENOTTY, f"there is no call {name!r}")
        return await handler(body)

    # --- set-up -------------------------------------------------------------------------------------------------------

    async def _init(self, body: dict[str, Any]) -> Reply:
        """Make the devices. The time begins later, with `start`."""
        scenario = Scenario.model_validate_json(body["scenario"])
        stores = [
            await asyncio.to_thread(StateStore, device, filled=self.side == "source") for device in scenario.devices
        ]
        self._scenario, self._stores, self._seed = scenario, stores, body["seed"]
        return Reply()

    async def _start(self, body: dict[str, Any]) -> Reply:
        """Time 0 is at `zero_ns` of perf_counter_ns(); the guest runs from then on."""
        self._time = time = RealTime(body["zero_ns"])
        clock.use(time)
        self.timeline = ProcessTimeline(time.now_ns)
        assert self._calls is not None
        self._calls.trace(self.timeline, self.side)
        guest_seed, source_seed, target_seed = seeds(self._seed)
        host_seed = source_seed if self.side == "source" else target_seed
        host = LiveHost(self._scenario, host_seed, self.timeline, RealLock)
        made: list[tuple[SimDriver, Any]] = []
        if self.side == "source":
            made += devices_at_source(self._scenario, guest_seed, host)
        else:
            made += devices_at_target(self._scenario, host)
        self._devices = [_Device(*each, store) for each, store in zip(made, self._stores, strict=True)]
        if self.side == "source":
            self._guest = asyncio.create_task(self._run_guest(), name="guest")
            self._guest.add_done_callback(report_bug)
        return Reply()

    async def _run_guest(self) -> None:
        """Write what is due every GUEST_TICK_NS. A driver that needs it earlier calls DeviceState.advance itself."""
        written_to = [device for device in self._devices if device.busy]
        while written_to:
            await clock.sleep_ns(GUEST_TICK_NS)
            for device in written_to:
                device.advance()

    async def _ping(self, body: dict[str, Any]) -> Reply:
        return Reply()

    # --- the device fd ------------------------------------------------------------------------------------------------

    async def _feature(self, body: dict[str, Any]) -> Reply:
        """VFIO_DEVICE_FEATURE."""
        device = self._devices[body["device"]]
        buffer = bytearray(body["buffer"])
        installed: list[int] = []

        def install(fd: DataFd) -> int:
            installed.append(self._install(device, fd))
            return installed[-1]

        try:
            await ioctl.device_feature(device.driver, buffer, install)
        finally:
            await self._end_what_is_over()
        header = DeviceFeature.unpack(buffer)
        done = header.flags & FeatureOp.SET and not header.flags & FeatureOp.PROBE
        if header.flags & FEATURE_MASK == Feature.MIG_PRECOPY_INFOV2 and done:
            device.opted_in = True
        return Reply({"buffer": bytes(buffer)}, [fd for number in installed for fd in self._data[number].fds()])

    async def _reset(self, body: dict[str, Any]) -> Reply:
        await self._devices[body["device"]].driver.reset()
        await self._end_what_is_over()
        return Reply()

    def _install(self, device: _Device, fd: DataFd) -> int:
        """Make the socket of a data fd; returns its number."""
        number = len(self._data) + 1
        name = f"{self.side} {device.driver.name} fd {number}"
        scenario = self._scenario
        lock = device.driver.lock_for_a_copy()
        mutex = lock.mutex if isinstance(lock, RealLock) else None
        rate = scenario.host.copy_bytes_per_s
        v3 = device.driver.dirty_streams > 0
        room_bytes = scenario.driver.chunk_bytes  # the socket is the end of the driver's chunks
        data: Data
        if isinstance(fd, SaveStream):
            copier, piece_bytes = Copier(mutex, rate), scenario.vmm.read_bytes
            data = SavedData(
                fd, device.store, copier, self.timeline, name, room_bytes=room_bytes, piece_bytes=piece_bytes
            )
        elif isinstance(fd, SaveBlocks):
            data = BlocksData(fd, device.store, mutex, rate, self.timeline)
        else:
            assert isinstance(fd, LoadStream | LoadBlocks)
            kind = LoadedBlocks if isinstance(fd, LoadBlocks) else LoadedStream

            def decoder() -> Decoder:
                return Decoder(device.driver.spec, v3)

            data = kind(fd, decoder, device.store, Copier(None, rate), self.timeline, name, room_bytes=room_bytes)
        self._data[number] = data
        return number

    async def _end_what_is_over(self) -> None:
        """Clean up the fds of sessions that are over: nothing more is read, or written to the device's state."""
        for number, data in list(self._data.items()):
            if data.stream.over and number not in self._ended:
                await data.ended()
                self._ended.add(number)

    # --- data fds -----------------------------------------------------------------------------------------------------

    def _of(self, body: dict[str, Any]) -> Any:
        return self._data[body["fd"]]

    async def _precopy_info(self, body: dict[str, Any]) -> Reply:
        buffer = bytearray(body["buffer"])
        opted_in = self._devices[body["device"]].opted_in
        await ioctl.get_precopy_info(self._of(body).stream, buffer, opted_in=opted_in)
        return Reply({"buffer": bytes(buffer)})

    async def _stream_info(self, body: dict[str, Any]) -> Reply:
        buffer = bytearray(body["buffer"])
        await ioctl.get_stream_info(self._of(body).stream, buffer)
        return Reply({"buffer": bytes(buffer)})

    async def _get_stream(self, body: dict[str, Any]) -> Reply:
        device = self._devices[body["device"]]
        buffer = bytearray(body["buffer"])
        installed: list[int] = []

        def install(fd: DataFd) -> int:
            """A stream that the VMM has already keeps its number, and is not passed again."""
            for number, data in self._data.items():
                if data.stream is fd:
                    return number
            installed.append(self._install(device, fd))
            return installed[-1]

        await ioctl.get_stream(self._of(body).stream, buffer, install)
        passed = [self._data[number] for number in installed]
        blocks = any(isinstance(data, BlocksData | LoadedBlocks) for data in passed)
        return Reply({"buffer": bytes(buffer), "blocks": blocks}, [fd for data in passed for fd in data.fds()])

    async def _idle(self, body: dict[str, Any]) -> Reply:
        data = self._of(body)
        if not isinstance(data, SavedData):
            raise fails(errno.EBADF)
        end, sent = await data.idle()
        return Reply({"what": end.what, "errno": end.errno, "text": end.text, "sent": sent})

    async def _new_epoch(self, body: dict[str, Any]) -> Reply:
        """Whether there is a new epoch; waits for one if `wait` is set."""
        stream = self._of(body).stream
        if not isinstance(stream, CriticalStream):
            raise fails(errno.ENOTTY)
        if body["wait"]:
            await stream.new_epoch()
        return Reply({"new": bool(stream.ready() & Ready.NEW_EPOCH)})

    async def _close(self, body: dict[str, Any]) -> Reply:
        await self._of(body).stream.close()
        return Reply()

    async def _dirty_blocks(self, body: dict[str, Any]) -> Reply:
        buffer, bitmap = bytearray(body["buffer"]), bytearray(body["bitmap_bytes"])
        try:
            await ioctl.get_dirty_blocks(self._of(body).stream, buffer, bitmap)
        except OSError as error:
            if error.errno != errno.EINVAL:  # with which it reports the number of bits that it needs
                raise
            bitmap.clear()
        return Reply({"buffer": bytes(buffer), "bitmap": bytes(bitmap)})

    async def _read_blocks(self, body: dict[str, Any]) -> Reply:
        data = self._of(body)
        if not isinstance(data, BlocksData):
            raise fails(errno.EBADF)
        offset, size = await data.read_blocks(body["first"], body["count"], body["free"])
        return Reply({"offset": offset, "size": size})

    async def _read_end(self, body: dict[str, Any]) -> Reply:
        return Reply({"data": await self._of(body).read(body["max_bytes"])})

    # --- the guest, and the end ---------------------------------------------------------------------------------------

    async def _guest_does(self, body: dict[str, Any]) -> Reply:
        for device in self._devices:
            device.guest_does(body["what"])
        return Reply()

    async def _digests(self, body: dict[str, Any]) -> Reply:
        """Of the current state; the guest must be stopped."""
        digests = [await asyncio.to_thread(device.store.digests) for device in self._devices]
        return Reply(to_plain(Digests(digests)))

    async def _progress(self, body: dict[str, Any]) -> Reply:
        """For progress notes, in bytes: what remains, and what the guest has written so far."""
        left = [await device.driver.stop_copy_bytes() for device in self._devices]
        return Reply({"left_bytes": sum(left), "written_bytes": sum(device.written_bytes for device in self._devices)})

    async def _collect(self, body: dict[str, Any]) -> Reply:
        for data in self._data.values():
            if isinstance(data, SavedData | BlocksData):
                counters = data.stream.counters
                counters.read_lock_ns, counters.read_copy_ns = data.lock_ns, data.copy_ns
        assert self._time is not None
        process = ProcessReport(self.timeline.export(), self._time.delays(), self._time.cpu_ns)
        report = DeviceProcessReport(process, [device.report() for device in self._devices])
        return Reply(to_plain(report))


class _Device:
    """A driver, and the state behind it."""

    def __init__(self, driver: SimDriver, state: DeviceState | Image, store: StateStore) -> None:
        self.driver = driver
        self.store = store
        self.opted_in = False
        """To PRECOPY_INFOv2."""
        self._state = state
        if isinstance(state, DeviceState):
            state.content = store
        else:
            state.place = placer(store)

    @property
    def busy(self) -> bool:
        """Whether the guest ever writes to it or reconfigures it."""
        return isinstance(self._state, DeviceState) and self._state.activity.busy

    def advance(self) -> None:
        """Write what the guest should have written by now."""
        if isinstance(self._state, DeviceState):
            self._state.advance(clock.now_ns())

    @property
    def written_bytes(self) -> int:
        """What the guest has written so far."""
        return self._state.written_bytes if isinstance(self._state, DeviceState) else 0

    def guest_does(self, what: str) -> None:
        """The guest is about to stop, stops, or starts."""
        if not isinstance(self._state, DeviceState):
            return  # at the target there is nothing to do
        match what:
            case "order_stop":
                self._state.order_stop(clock.now_ns())
            case "stop":
                self._state.stop(clock.now_ns())
            case "start":
                self._state.start()
            case _:
                raise fails(errno.EINVAL)

    def report(self) -> DeviceReport:
        """What the driver knows at the end."""
        return device_report(self.driver, self._state)
