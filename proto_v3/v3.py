"""v3, first form: per device a critical fd and N dirty fds, read at once, a connection each; RAM on one of its own.

Source: a task a stream carries bytes from its fd to its connection until the stream's end, through the stop and all; a
task that decides when to stop. When all critical bytes of an epoch were sent it says EPOCH_SENT behind them; the target
answers EPOCH_LOADED when they are loaded, and only with the newest epoch loaded everywhere is the guest stopped.
Target: a task a connection writes what comes; the driver holds dirty records back until their epoch is loaded. When a
device's streams are all at their end its config is loaded. Then LOADED, COMMIT from the source, and the guest runs: at
most one side ever runs it.

Channel 0 carries RAM and control; then come 1 + N for each device.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from proto_v3.bell import Bell
from proto_v3.channel import Channel
from proto_v3.device import DataFd
from proto_v3.errors import PeerProtocolError
from proto_v3.frames import Frame, Kind
from proto_v3.migration import OutcomeKind, Side, Source, Target, UnsupportedError, pause, read_some
from proto_v3.switchover import NS_PER_S, BusyRate, Switchover
from proto_v3.timeline import Join, Mark, cause, caused_by


def channels_needed(devices: int, dirty_streams: int) -> int:
    """Connections for so many devices."""
    return 1 + devices * (1 + dirty_streams)


class _Stream:
    """A data fd, the connection that its bytes take, and what is known of both."""

    def __init__(self, fd: DataFd, channel: Channel, device: int, index: int, window_ns: int) -> None:
        self.fd = fd
        self.channel = channel
        self.device = device
        self.index = index
        """0 is the critical stream."""
        self.unread_bytes = 0
        """As far as is known without asking."""
        self.rate = BusyRate(window_ns)

    async def end(self) -> None:
        """Say that everything was sent."""
        await self.channel.tell(Kind.STREAM_END, self.device, self.index)


class V3Source(Source):
    """The sending VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], dirty_streams: int) -> None:
        super().__init__(side, channels)
        self._dirty_streams = dirty_streams
        self._control = channels[0]
        self._streams: list[_Stream] = []
        self._sending: list[asyncio.Task[None]] = []
        self._ram_rate = BusyRate(side.settings.bandwidth_window_ns)
        self._epoch_loaded = [0] * len(side.devices)
        self._decided = asyncio.Event()
        """Pre-copy is over: the guest is being stopped, or the migration given up."""
        self._stopped: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        """The span that stopped the guest, once it is stopped; None if the migration was given up."""

    async def migrate(self) -> OutcomeKind:
        """See proto_v3.migration.Source."""
        await self._opt_in()
        start = self.now_ns
        await self.side.machine.set_up()
        await self._control.tell(Kind.SETUP, value=self._dirty_streams)
        self.side.timeline.stage("setup", start)
        async with Join() as answers:
            hearing = [answers.start(self.back.listen(), "source return path")]
            for device in range(len(self.side.devices)):
                hearing.append(answers.start(self._hear(device), f"source answers {device}"))
            if (outcome := await self._move(start)) is not None:
                for task in hearing:
                    task.cancel()
                return outcome
            self.side.timeline.mark(Mark.DRAINED)
            await self.back.wait_for(Kind.LOADED)
            self.back.may_resume = True
            await self._control.tell(Kind.COMMIT)
            await self.back.wait_for(Kind.RESUMED)
        await self.end_sessions()
        return OutcomeKind.COMPLETED

    async def recover(self) -> None:
        """See proto_v3.migration.Source; the devices are v2's again."""
        await super().recover()
        for device in self.side.devices:
            await device.set_streams(0)

    async def _opt_in(self) -> None:
        for device in self.side.devices:
            has = await device.max_dirty_streams()
            if has < self._dirty_streams:
                raise UnsupportedError(f"{device.name} has {has} dirty streams; {self._dirty_streams} were asked for")
            await device.set_streams(self._dirty_streams)

    async def _move(self, start_ns: int) -> OutcomeKind | None:
        """Pre-copy, switchover and drain, every stream to its end; or how it ended in pre-copy."""
        async with Join() as tasks:
            tasks.start(self._send_ram(), "source RAM")
            await self.open_sessions()
            live = list(self.fds)
            for device in live:
                await self._start_streams(tasks, device)
            outcome = await self.unless_cancelled(start_ns, self._converge(start_ns))
            self._decided.set()
            if outcome is None:
                await self.stop_guest()
                for device in range(len(self.side.devices)):
                    if device not in live:
                        await self.ready_to_drain(device)
                        await self._start_streams(tasks, device)
            else:
                for task in self._sending:  # they may be held up by a target that waits for what will not come
                    task.cancel()
                await self.give_up()
            self._stopped.set_result(cause() if outcome is None else None)
        return outcome

    async def _start_streams(self, tasks: Join, device: int) -> None:
        opened = self.side.devices[device]
        fds = [self.fds[device], *[await opened.get_stream(index) for index in range(self._dirty_streams)]]
        for index, fd in enumerate(fds):
            channel = self._channel(device, index)
            stream = _Stream(fd, channel, device, index, self.side.settings.bandwidth_window_ns)
            self._streams.append(stream)
            work = self._send_dirty(stream) if index else self._send_critical(stream)
            self._sending.append(tasks.start(work, f"source {opened.name} stream {index}"))

    # --- what runs beside each other ----------------------------------------------------------------------------------

    async def _send_ram(self) -> None:
        settings, ram = self.side.settings, self.side.machine.ram
        while not self._decided.is_set():
            start = self.now_ns
            if (pages := await ram.take(settings.ram_budget_ns)) is None:
                await self._until_decided(settings.decision_interval_ns)
                continue
            await self._control.send(Frame(Kind.RAM, payload=pages))
            self._ram_rate.add(len(pages), self.now_ns - start)
        waits = not self._stopped.done()
        stop = await self._stopped
        if stop is None:
            return
        if waits:
            caused_by(stop)
        await self.save_last_ram()

    async def _until_decided(self, timeout_ns: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ns / 1e9):
                await self._decided.wait()

    async def _send_critical(self, stream: _Stream) -> None:
        sent_epoch = 0
        while (data := await self._forward(stream)) is None or data:
            if data is None:
                info = await stream.fd.stream_info()
                if info.pending_bytes == 0 and info.epoch > sent_epoch:
                    sent_epoch = info.epoch
                    await stream.channel.tell(Kind.EPOCH_SENT, stream.device, 0, sent_epoch)
                await stream.fd.poll()
        await stream.end()

    async def _send_dirty(self, stream: _Stream) -> None:
        while (data := await self._forward(stream)) is None or data:
            if data is None:
                await stream.fd.poll()
        await stream.end()

    async def _forward(self, stream: _Stream) -> int | None:
        """Read and send once: bytes moved, None if there was nothing for now, 0 at the end of the stream."""
        start = self.now_ns
        data = await read_some(stream.fd, self.side.settings.read_bytes)
        if data is None:
            stream.unread_bytes = 0
            return None
        if len(data):
            stream.unread_bytes = max(0, stream.unread_bytes - len(data))
            await stream.channel.send(Frame(Kind.DATA, stream.device, stream.index, payload=data))
            stream.rate.add(len(data), self.now_ns - start)
        return len(data)

    async def _hear(self, device: int) -> None:
        """The target's answers on a device's critical connection, until it echoes the end."""
        channel = self._channel(device, 0)
        while (frame := await channel.recv()).kind is not Kind.STREAM_END:
            if frame.kind is not Kind.EPOCH_LOADED:
                raise PeerProtocolError(f"{frame.kind.name} came where EPOCH_LOADED was due")
            self._epoch_loaded[device] = frame.value

    # --- when to stop -------------------------------------------------------------------------------------------------

    async def _converge(self, start_ns: int) -> OutcomeKind | None:
        """Wait until the switchover fits and every device is ready; or how it ended without that."""
        settings = self.side.settings
        switchover = self.switchover()
        await self._ask_streams()
        while (outcome := self.given_up(start_ns)) is None:
            await pause(settings.decision_interval_ns)
            switchover.sample(self.now_ns, self.bytes_sent())
            if self._fits(switchover, [0] * len(self.side.devices)):
                await self.side.machine.ram.sync()
                await self._ask_streams()
                stop_copy = [await device.stop_copy_bytes() for device in self.side.devices]
                for stream in self._streams:  # what is left beyond its unread bytes, which _fits() adds by itself
                    stop_copy[stream.device] -= stream.unread_bytes
                if self._fits(switchover, [max(0, size) for size in stop_copy]) and await self._ready():
                    return None
        return outcome

    def _fits(self, switchover: Switchover, stop_copy_bytes: list[int]) -> bool:
        """Whether each connection can send what is left for it within the limit.

        `stop_copy_bytes`, per device, is what comes only once it is stopped; its dirty streams share it.
        """
        settings = self.side.settings
        ram_bytes = self.side.machine.ram.pending_bytes()
        if settings.given_bandwidth_bytes_per_s is not None:
            unread = sum(stream.unread_bytes for stream in self._streams)
            return switchover.fits(ram_bytes + unread + sum(stop_copy_bytes))
        if ram_bytes and not self._ram_rate.bytes_per_s:
            return False
        left = [(self._ram_rate.bytes_per_s, float(ram_bytes))]
        for stream in self._streams:
            share = stop_copy_bytes[stream.device] / self._dirty_streams if stream.index else 0
            if stream.unread_bytes and not stream.rate.bytes_per_s:
                return False  # its first bytes are on their way: they will tell
            left.append((stream.rate.bytes_per_s, stream.unread_bytes + share))
        for device, size in enumerate(stop_copy_bytes):
            if device not in self.fds:  # its streams open once it is stopped
                left.append((0.0, size / self._dirty_streams))
        # A connection that has carried nothing yet is taken to be as fast as the fastest one measured.
        fastest = max(bytes_per_s for bytes_per_s, _ in left)
        limit_s = settings.downtime_limit_ns / NS_PER_S
        return all(not size or size < (bytes_per_s or fastest) * limit_s for bytes_per_s, size in left)

    async def _ask_streams(self) -> None:
        for stream in self._streams:
            stream.unread_bytes = (await stream.fd.stream_info()).pending_bytes

    async def _ready(self) -> bool:
        """Nothing critical is pending anywhere, and the newest epoch is loaded at the target."""
        for stream in self._streams:
            if stream.index == 0:
                info = await stream.fd.stream_info()
                if info.pending_bytes or info.epoch != self._epoch_loaded[stream.device]:
                    return False
        return True

    def _channel(self, device: int, stream: int) -> Channel:
        return self.channels[1 + device * (1 + self._dirty_streams) + stream]


class V3Target(Target):
    """The receiving VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], dirty_streams: int) -> None:
        super().__init__(side, channels)
        self._dirty_streams = dirty_streams
        self._control = channels[0]
        self._loading: list[asyncio.Task[None]] = []
        self._ram_loaded = False
        self._cancelled = False
        self._bell = Bell()

    async def receive(self) -> bool:
        """See proto_v3.migration.Target."""
        async with Join() as beside:
            beside.start(self._listen(), "target RAM")
            async with Join() as parts:
                for index in range(len(self.side.devices)):
                    self._loading.append(parts.start(self._load_device(index), f"target device {index}"))
                self._loading.append(parts.start(self._until_ram_is_loaded(), "target RAM end"))
            if not self._cancelled:
                await self._control.tell(Kind.LOADED)
        if self._cancelled:
            return await self.cancelled()
        await self.resume_guest()
        await self._control.tell(Kind.RESUMED)
        return True

    async def _until_ram_is_loaded(self) -> None:
        while not self._ram_loaded:
            await self._bell.wait()

    async def _listen(self) -> None:
        """What comes on the control connection, until the source commits or cancels."""
        began = 0
        while True:
            frame = await self._control.recv()
            match frame.kind:
                case Kind.SETUP:
                    if frame.value != self._dirty_streams:
                        raise PeerProtocolError(
                            f"the source has {frame.value} dirty streams, here are {self._dirty_streams}"
                        )
                case Kind.RAM:
                    await self.side.machine.ram.load(frame.payload)
                case Kind.RAM_BEGIN:
                    began = self.side.timeline.now_ns()
                case Kind.RAM_END:
                    self.side.timeline.stage("ram_load", began)
                    self.side.timeline.mark(Mark.TRANSFERRED)
                    await self.side.machine.load_other_devices()
                    self._ram_loaded = True
                    self._bell.ring()
                case Kind.COMMIT:
                    return
                case Kind.CANCEL:
                    self._cancelled = True
                    for task in self._loading:
                        task.cancel()
                    return
                case _:
                    raise PeerProtocolError(f"{frame.kind.name} does not belong on the control connection")

    async def _load_device(self, index: int) -> None:
        """A device's streams to their ends, then its config."""
        device = self.side.devices[index]
        await device.set_streams(self._dirty_streams)
        critical = await self.resuming(device)
        dirty = [await device.get_stream(i) for i in range(self._dirty_streams)]
        first = 1 + index * (1 + self._dirty_streams)
        async with Join() as streams:
            for stream, fd in enumerate([critical, *dirty]):
                work = self._load_stream(index, stream, fd, self.channels[first + stream])
                streams.start(work, f"target {device.name} stream {stream}")
        self.side.timeline.mark(Mark.LOADED)
        await self.load_config(index)

    async def _load_stream(self, index: int, stream: int, fd: DataFd, channel: Channel) -> None:
        while True:
            frame = await channel.recv()
            if (self.device(frame), frame.stream) != (index, stream):
                raise PeerProtocolError(f"device {frame.device} stream {frame.stream} on the connection of another")
            match frame.kind:
                case Kind.DATA:
                    await self.write(fd, frame.payload)
                case Kind.EPOCH_SENT if stream == 0:
                    await channel.tell(Kind.EPOCH_LOADED, index, 0, frame.value)
                case Kind.STREAM_END:
                    if stream == 0:
                        await channel.tell(Kind.STREAM_END, index)
                    return
                case _:
                    raise PeerProtocolError(f"{frame.kind.name} does not belong on stream {stream}")
