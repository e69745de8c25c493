"""v3's source: a task a stream carries bytes from its fd to its wire stream until its end, through the stop too; and
a task that decides when to stop.

When all critical bytes of an epoch were sent, EPOCH_SENT goes behind them; the target answers EPOCH_LOADED when they
are loaded. A device is ready when nothing critical is unread and its newest epoch is loaded; its critical task learns
of new epochs by waiting in poll(). The guest is stopped when all devices are ready and what is left fits, by the same
rule as in v2, and RAM and each dirty stream by itself as well, for they move beside each other. One that ran dry is
asked for more while others are not through, once RAM fits: it need not wait for them. With the vCPUs stopped and the
devices in PRE_COPY_P2P each critical fd is asked once more: no guest runs, so that answer is final. If a new epoch
slipped in, the guest is resumed (`retry`), or the stop goes on (`proceed`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from proto_v3.notify import Notify
from proto_v3.timeline import Join, Mark
from proto_v3.vfio.device import BlocksFd, DataFd, Ready
from proto_v3.vmm.migration import OutcomeKind, ReturnPath, Side, Source, pause, read_some
from proto_v3.vmm.switchover import RamBacklog, StreamBacklog
from proto_v3.vmm.v3 import V3Options, opt_out
from proto_v3.vmm.v3_blocks import BlockReaders
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import OutStream, OutStreams, OwnOutStreams, SharedOutStreams, Wire


class _Critical:
    """What is known of a device's critical stream."""

    def __init__(self) -> None:
        self.drained = False
        """Nothing was unread when it was asked last, and nothing came since."""
        self.epoch = 0
        """The newest that is known."""
        self.sent_epoch = 0
        self.loaded_epoch = 0
        """As the target said."""

    @property
    def ready(self) -> bool:
        return self.drained and self.loaded_epoch == self.epoch


class _Stream:
    """A data fd and the wire stream that carries its bytes."""

    def __init__(self, fd: DataFd, wire: OutStream, device: int, index: int) -> None:
        self.fd = fd
        self.wire = wire
        self.device = device
        self.index = index
        """0 is the critical stream."""
        self.unread_bytes = 0
        """As far as is known without asking."""
        self.read_bytes = 0
        """In all."""
        self.sent_bytes = 0
        """In all."""

    async def ask(self) -> None:
        """What is unread; a stream that is drained saves what became dirty."""
        read_bytes = self.read_bytes
        pending_bytes = (await self.fd.stream_info()).pending_bytes
        # What was read while the answer was on its way may be in it: else it would never be taken off.
        self.unread_bytes = max(0, pending_bytes - (self.read_bytes - read_bytes))

    async def say(self, kind: Kind, value: int = 0) -> None:
        """A frame without payload, behind what was sent."""
        await self.wire.send(Frame(kind, self.device, self.index, value))


class V3Source(Source):
    """The sending VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V3Options) -> None:
        super().__init__(side, channels)
        self._options = options
        self._control = channels[0]
        devices = len(side.devices)
        self._streams: OutStreams
        if options.wire is Wire.STREAMS:
            self._streams = OwnOutStreams(channels, 1 + options.wire_streams)
        else:
            shared = channels[:1] if options.wire is Wire.ONE else channels[1:]
            self._streams = SharedOutStreams(shared, devices, options.credits)
        self._critical = [_Critical() for _ in side.devices]
        self._readers: list[BlockReaders] = []
        self._backlogs: list[tuple[_Stream | BlockReaders, StreamBacklog]] = []
        """Of each dirty stream, and of the readers of each device's blocks."""
        self._sending: list[asyncio.Task[None]] = []
        self._news = Notify()
        """Whether a device is ready may have changed."""
        self._whole = self.switchover()
        self._ram = RamBacklog(side.settings, self.now_ns)
        self._ram_bytes_sent = 0
        self._ram_bell = Notify()
        self._ram_goes_on = True
        """Not while the guest is being stopped."""
        self.back = ReturnPath(channels[0], devices, self._heard)
        self._stopped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """The guest is stopped for good; False if the migration was given up."""

    async def migrate(self) -> OutcomeKind:
        """See proto_v3.vmm.migration.Source."""
        for device in self.side.devices:
            await device.set_streams(self._options.dirty_streams, self._options.flags)
        start = self.now_ns
        await self.side.machine.set_up()
        await self._control.send_control(Kind.SETUP, value=len(self.side.devices))
        self.side.timeline.stage("setup", start)
        async with Join() as beside:
            listening = beside.start(self.back.listen(), "source return path")
            carrying = [beside.start(work, track) for work, track in self._streams.work()]
            outcome = await self._move(start)
            if outcome is None:
                self.side.timeline.mark(Mark.DRAINED)
                await self.back.wait_for(Kind.LOADED)
                self.back.may_resume = True
                await self._control.send_control(Kind.COMMIT)
                await self.back.wait_for(Kind.RESUMED)
            else:
                listening.cancel()
            for task in carrying:
                task.cancel()
        if outcome is None:
            await self.end_sessions()
        return outcome or OutcomeKind.COMPLETED

    async def recover(self) -> None:
        """See proto_v3.vmm.migration.Source; the devices are v2's again."""
        await super().recover()
        await opt_out(self.side.devices)

    async def give_up(self) -> None:
        """See proto_v3.vmm.migration.Source; the devices are v2's again."""
        await super().give_up()
        await opt_out(self.side.devices)

    async def _move(self, start_ns: int) -> OutcomeKind | None:
        """Pre-copy, switchover and drain, every stream to its end; or how it ended in pre-copy."""
        async with Join() as tasks:
            ram = tasks.start(self._send_ram(), "source RAM")
            await self.open_sessions()
            live = list(self.fds)
            for device in live:
                await self._start_streams(tasks, device)
            outcome = await self._until_stopped(start_ns)
            if outcome is None:
                for device in range(len(self.side.devices)):
                    if device not in live:
                        await self.ready_to_drain(device)
                        await self._start_streams(tasks, device)
                for readers in self._readers:
                    await readers.finish()
                self._end_precopy(stopped=True)
            else:
                for task in self._sending:  # they may be held up by a target that waits for what will not come
                    task.cancel()
                self._end_precopy(stopped=False)
                await ram  # after CANCEL nobody would receive its last frame
                await self.give_up()
        return outcome

    def _end_precopy(self, *, stopped: bool) -> None:
        self._stopped.set_result(stopped)
        self._ram_bell.notify()

    async def _start_streams(self, tasks: Join, device: int) -> None:
        name = self.side.devices[device].name
        critical = self.fds[device]
        fds = [await critical.get_stream(index) for index in range(self._options.dirty_streams)]
        stream = _Stream(critical, self._streams.stream(device, 0), device, 0)
        self._sending.append(tasks.start(self._send_critical(stream), f"source {name} stream 0"))
        if self._options.blocks:
            fd: BlocksFd = fds[0]  # type: ignore[assignment]  # opted in to with BLOCKS
            streams = [self._streams.stream(device, 1 + at) for at in range(self._options.wire_streams)]
            readers = BlockReaders(fd, streams, device, self.side.settings.read_bytes)
            self._readers.append(readers)
            self._backlogs.append((readers, StreamBacklog(self.side.settings, self.now_ns)))
            self._sending.append(tasks.start(readers.work(name), f"source {name} blocks"))
            return
        for index, fd_of_stream in enumerate(fds, 1):
            stream = _Stream(fd_of_stream, self._streams.stream(device, index), device, index)
            self._backlogs.append((stream, StreamBacklog(self.side.settings, self.now_ns)))
            self._sending.append(tasks.start(self._send_dirty(stream), f"source {name} stream {index}"))

    # --- what runs beside each other ----------------------------------------------------------------------------------

    async def _send_ram(self) -> None:
        settings, ram = self.side.settings, self.side.machine.ram
        while not self._stopped.done():
            if not self._ram_goes_on:
                await self._ram_bell.wait()
            elif (pages := await ram.take(settings.ram_budget_ns)) is not None:
                await self._control.send(Frame(Kind.RAM, payload=pages))
                self._ram_bytes_sent += len(pages)
            else:
                await self._idle()
        if await self._stopped:
            await self.save_last_ram()

    async def _idle(self) -> None:
        """No RAM is left for now: until a while has passed, or the guest is being stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.side.settings.decision_interval_ns / 1e9):
                await self._ram_bell.wait()

    async def _send_critical(self, stream: _Stream) -> None:
        known = self._critical[stream.device]
        while (data := await self._forward(stream)) is None or data:
            if data is None:
                info = await stream.fd.stream_info()
                known.epoch = info.epoch
                known.drained = info.pending_bytes == 0
                if known.drained and info.epoch > known.sent_epoch:
                    known.sent_epoch = info.epoch
                    await stream.say(Kind.EPOCH_SENT, info.epoch)
                self._news.notify()
                news = await stream.fd.poll()
                known.drained = False
                if news & Ready.NEW_EPOCH:
                    known.epoch = (await stream.fd.stream_info()).epoch
        await stream.say(Kind.STREAM_END)

    async def _send_dirty(self, stream: _Stream) -> None:
        while (data := await self._forward(stream)) is None or data:
            if data is None:
                await stream.fd.poll()
        await stream.say(Kind.STREAM_END)

    async def _forward(self, stream: _Stream) -> int | None:
        """Read and send once: bytes moved, None if there was nothing for now, 0 at the end of the stream."""
        data = await read_some(stream.fd, self.side.settings.read_bytes)
        if data is None:
            stream.unread_bytes = 0
            return None
        if len(data):
            stream.unread_bytes = max(0, stream.unread_bytes - len(data))
            stream.read_bytes += len(data)
            await stream.wire.send(Frame(Kind.DATA, stream.device, stream.index, payload=data))
            stream.sent_bytes += len(data)
        return len(data)

    def _heard(self, frame: Frame) -> bool:
        """What only v3's target says; False if it is not due."""
        if frame.kind is Kind.CREDIT:
            return self._streams.credited(frame)
        if frame.kind is not Kind.EPOCH_LOADED or frame.device >= len(self._critical):
            return False
        critical = self._critical[frame.device]
        if not critical.loaded_epoch < frame.value <= critical.sent_epoch:
            return False
        critical.loaded_epoch = frame.value
        self._news.notify()
        return True

    # --- when to stop -------------------------------------------------------------------------------------------------

    async def _until_stopped(self, start_ns: int) -> OutcomeKind | None:
        """Pre-copy, until the guest is stopped for good; or how it ended without that."""
        await self._ask()
        while (outcome := await self.unless_cancelled(start_ns, self._converge(start_ns))) is None:
            self._ram_goes_on = False
            if await self.stop_guest():
                return None
            self._ram_goes_on = True
            self._ram_bell.notify()
        return outcome

    async def _converge(self, start_ns: int) -> OutcomeKind | None:
        """Wait until the switchover fits and every device is ready; or how it ended without that."""
        settings = self.side.settings
        while (outcome := self.given_up(start_ns)) is None:
            self._sample()
            if not self._ready:
                await self._until_ready(settings.bandwidth_window_ns)
                continue
            await self._ask_dry()
            # As in v2: the exact figure costs, and is asked for only once the cheap one fits.
            if self._fits(self._unread_bytes) and self._fits(await self._exact()) and self._ready:
                return None
            await pause(settings.decision_interval_ns)
        return outcome

    def _sample(self) -> None:
        now_ns = self.now_ns
        self._whole.sample(now_ns, self.bytes_sent())
        self._ram.sample(now_ns, self._ram_bytes_sent, self.side.machine.ram.pending_bytes())
        for part, backlog in self._backlogs:
            backlog.sample(now_ns, part.sent_bytes, part.unread_bytes)

    def _fits(self, device_bytes: int) -> bool:
        """Whether all that is left does, of the devices so much, and every part by itself."""
        ram_bytes = self.side.machine.ram.pending_bytes()
        return (
            self._whole.fits(ram_bytes + device_bytes)
            and self._ram.fits(ram_bytes)
            and all(backlog.fits(part.unread_bytes) for part, backlog in self._backlogs)
        )

    @property
    def _ready(self) -> bool:
        return all(self._critical[device].ready for device in self.fds)

    async def _until_ready(self, at_most_ns: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_ns / 1e9):
                while not self._ready:
                    await self._news.wait()

    @property
    def _unread_bytes(self) -> int:
        """What is left of the devices, as far as the VMM knows without asking."""
        return sum(part.unread_bytes for part, _ in self._backlogs)

    async def _exact(self) -> int:
        """What is left of the devices, asked for: it makes drained streams save what became dirty. RAM is asked too."""
        await self.side.machine.ram.sync()
        await self._ask()
        return sum([await device.stop_copy_bytes() for device in self.side.devices])

    async def _ask(self) -> None:
        for part, _ in self._backlogs:
            await part.ask()

    async def _ask_dry(self) -> None:
        """Streams get out of step. While RAM does not fit, though, what they have would only be dirtied again."""
        ram_bytes = self.side.machine.ram.pending_bytes()
        if self._whole.fits(ram_bytes) and self._ram.fits(ram_bytes):
            for part, _ in self._backlogs:
                if part.unread_bytes == 0:
                    await part.ask()

    async def settled(self) -> bool:
        """See proto_v3.vmm.migration.Source: the last look."""
        late = 0
        for device, fd in self.fds.items():
            info = await fd.stream_info()
            late += info.epoch != self._critical[device].loaded_epoch or info.pending_bytes > 0
        self.late_final_checks += late
        return not late or self.retries >= self._options.max_retries
