# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's source: one task for each stream carries bytes from its fd to its wire stream, before and after the stop, until
the stream ends. Another task decides when to stop.

When all critical bytes of an epoch were sent, EPOCH_SENT follows them. The target answers EPOCH_LOADED when they are
loaded. A device is ready when nothing critical is unread and its newest epoch is loaded. Its critical task waits in
poll() for new epochs.

The guest is stopped when all devices are ready and the remaining bytes fit the downtime limit (stop_rule.py). RAM and
each dirty stream must also fit by themselves, because they move beside each other. Once RAM fits, a dirty stream that
ran dry is asked for more, and does not wait for the others.

The final check: with the vCPUs stopped and the devices in PRE_COPY_P2P, each critical fd is asked once more. No guest
runs, so the answer is final. With a new epoch, the guest is resumed (`retry`), or the stop continues (`proceed`).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Sequence

from typing_extensions import override

from proto_v3.notify import Notify
from proto_v3.timeline import Join, Work
from proto_v3.vfio.device import BlocksFd, DataFd, Ready
from proto_v3.vmm.device_calls import RETURNS_WITHIN_S
from proto_v3.vmm.first_pass import FirstPass
from proto_v3.vmm.migration import OutcomeKind, Side, Source, pause, read_some
from proto_v3.vmm.multifd import Senders
from proto_v3.vmm.return_path import HandOver
from proto_v3.vmm.stop_rule import StopRule
from proto_v3.vmm.switchover import Left, StoppedOnly
from proto_v3.vmm.v3 import V3Options, opt_out
from proto_v3.vmm.v3_blocks import BlockReaders
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import OutStream, OutStreams, OwnOutStreams, SharedOutStreams, Wire


class _RamPhase(enum.Enum):
    """What the RAM task does."""

    ITERATE = enum.auto()  # pre-copy: send pages as they become dirty
    PAUSED = enum.auto()  # the guest is being stopped, and may be resumed
    LAST_PASS = enum.auto()  # the guest is stopped for good
    GIVEN_UP = enum.auto()  # the migration ended in pre-copy


class _Critical:
    """What is known of a device's critical stream. loaded_epoch <= sent_epoch <= epoch."""

    def __init__(self) -> None:
        self.drained = False  # nothing was unread at the last info call, and no data arrived since
        self.epoch = 0  # the newest epoch that is known
        self.sent_epoch = 0  # the epoch of the last EPOCH_SENT
        self.loaded_epoch = 0  # the epoch of the last EPOCH_LOADED
        self.read_bytes = 0  # total since the start

    @property
    def ready(self) -> bool:
        return self.drained and self.loaded_epoch == self.epoch


class _Stream:
    """A data fd and the wire stream that carries its bytes."""

    def __init__(self, fd: DataFd, wire: OutStream, device: int, index: int) -> None:
        self.fd = fd
        self.wire = wire
        self.device = device
        self.index = index  # 0: the critical stream
        self.unread_bytes = 0  # as far as is known without asking
        self.read_bytes = 0  # total since the start
        self.sent_bytes = 0  # total since the start
        self.first_pass = FirstPass(device, [index])

    @property
    def what(self) -> str:
        """In words."""
        return f"stream {self.index}"

    async def ask(self) -> None:
        """Ask how much is unread. This makes a drained stream save what became dirty."""
        read_bytes = self.read_bytes
        pending_bytes = (await self.fd.stream_info()).pending_bytes
        # The answer may include what was read while it was on its way. Else that would never be subtracted.
        self.unread_bytes = max(0, pending_bytes - (self.read_bytes - read_bytes))

    async def send_control(self, kind: Kind, value: int = 0) -> None:
        """Send a frame without payload, behind the data."""
        await self.wire.send(Frame(kind, self.device, self.index, value))


class V3Source(Source):
    """The sending VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V3Options) -> None:
        devices = len(side.devices)
        own = options.without_multifd(devices)
        multifd = channels[own : options.connections(devices)]
        senders = Senders(options.multifd, multifd, side.machine.wake_up) if options.multifd else None
        super().__init__(side, channels, senders)
        self._options = options
        self._control = channels[0]
        self._streams: OutStreams
        if options.wire is Wire.STREAMS:
            self._streams = OwnOutStreams(channels, 1 + options.wire_streams)
        else:
            shared = channels[:1] if options.wire is Wire.ONE else channels[1:own]
            self._streams = SharedOutStreams(shared, devices, options.credits, side.machine.wake_up)
        self._critical = [_Critical() for _ in side.devices]
        self._stopped_only = [StoppedOnly() for _ in side.devices]
        self._not_dirty_bytes: list[int] = []
        """Of each device, what its dirty streams did not have when the session began."""
        self._readers: list[BlockReaders] = []
        self._parts: list[_Stream | BlockReaders] = []
        """One for each dirty stream, or for the readers of each device's blocks."""
        self._sending: list[asyncio.Task[None]] = []
        self._ready_changed = Notify()  # whether a device is ready may have changed
        self._force_at_ns: int | None = None
        self._rule = StopRule(side.settings, self.now_ns, by_parts=True)
        self._ram_phase = _RamPhase.ITERATE
        self._ram_notify = Notify()
        """The phase changed. Pausing wakes nobody: the task notices it at its next round."""

    @override
    async def opt_in(self) -> None:
        for device in self.side.devices:
            await device.set_streams(self._options.dirty_streams, self._options.flags)

    @override
    def work(self) -> list[Work]:
        return self._streams.work() + (self.senders.work() if self.senders else [])

    @override
    async def commit(self) -> None:
        await self.back.reached(HandOver.LOADED)
        self.back.commit()
        await self._control.send_control(Kind.COMMIT)

    @override
    async def recover(self) -> None:
        await super().recover()
        await opt_out(self.side.devices)

    @override
    async def give_up(self) -> None:
        await super().give_up()
        await opt_out(self.side.devices)

    @override
    async def move(self, start_ns: int) -> OutcomeKind | None:
        if self._options.force_after_ns is not None:
            self._force_at_ns = start_ns + self._options.force_after_ns
        async with Join() as tasks:
            ram = tasks.start(self._send_ram(), "source RAM")
            outcome = await self.in_precopy(start_ns, self._open(tasks)) or await self._until_stopped(start_ns)
            if outcome is None:
                live = {part.device for part in self._parts}
                for device in range(len(self.side.devices)):
                    if device not in live:
                        await self.ready_to_drain(device)
                        await self._start_streams(tasks, device)
                for readers in self._readers:
                    await readers.finish()
                self._set_ram_phase(_RamPhase.LAST_PASS)
            else:
                for task in self._sending:  # a target that waits for data that will not arrive may hold them up
                    task.cancel()
                self._set_ram_phase(_RamPhase.GIVEN_UP)
                await asyncio.wait([ram], timeout=RETURNS_WITHIN_S)  # after CANCEL nobody would receive its last frame
                ram.cancel()
        return outcome

    async def _open(self, tasks: Join) -> None:
        sizes = [await device.stop_copy_bytes() for device in self.side.devices]
        await self.open_sessions()
        for device in self.fds:
            await self._start_streams(tasks, device)
        self.switchover = self._rule.whole
        for part in self._parts:
            await part.ask()
            sizes[part.device] -= part.read_bytes + part.unread_bytes
        self._not_dirty_bytes = sizes

    def _set_ram_phase(self, phase: _RamPhase) -> None:
        self._ram_phase = phase
        self._ram_notify.notify()

    async def _start_streams(self, tasks: Join, device: int) -> None:
        name = self.side.devices[device].name
        critical = self.fds[device]
        fds = [await critical.get_stream(index) for index in range(self._options.dirty_streams)]
        stream = _Stream(critical, self._streams.stream(device, 0), device, 0)
        self._sending.append(tasks.start(self._send_critical(stream), f"source {name} stream 0"))
        if self._options.blocks:
            fd: BlocksFd = fds[0]  # type: ignore[assignment]  # chosen with BLOCKS
            streams = [self._streams.stream(device, 1 + at) for at in range(self._options.wire_streams)]
            readers = BlockReaders(fd, streams, device, self.side.settings.read_bytes)
            self._readers.append(readers)
            self._add(readers)
            self._sending.append(tasks.start(readers.work(name), f"source {name} blocks"))
            return
        for index, fd_of_stream in enumerate(fds, 1):
            stream = _Stream(fd_of_stream, self._streams.stream(device, index), device, index)
            self._add(stream)
            self._sending.append(tasks.start(self._send_dirty(stream), f"source {name} stream {index}"))

    def _add(self, part: _Stream | BlockReaders) -> None:
        self._parts.append(part)
        self._rule.add(part, self.now_ns)

    # --- what runs beside each other ----------------------------------------------------------------------------------

    async def _send_ram(self) -> None:
        settings, ram = self.side.settings, self.side.machine.ram
        while self._ram_phase in (_RamPhase.ITERATE, _RamPhase.PAUSED):
            if self._ram_phase is _RamPhase.PAUSED:
                await self._ram_notify.wait()
            elif (pages := await ram.take(settings.ram_budget_ns)) is not None:
                await self.send_pages(pages)
            else:
                await self.end_pass()
                await self._wait_for_dirty_ram()
        if self._ram_phase is _RamPhase.LAST_PASS:
            await self.save_last_ram()

    async def _wait_for_dirty_ram(self) -> None:
        """Wait for one decision interval, or until the phase changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.side.settings.decision_interval_ns / 1e9):
                await self._ram_notify.wait()

    async def _send_critical(self, stream: _Stream) -> None:
        known = self._critical[stream.device]
        while (data := await self._forward(stream)) is None or data:
            if data is None:
                info = await stream.fd.stream_info()
                known.epoch = info.epoch
                known.drained = info.pending_bytes == 0
                if known.drained and info.epoch > known.sent_epoch:
                    known.sent_epoch = info.epoch
                    await stream.send_control(Kind.EPOCH_SENT, info.epoch)
                self._ready_changed.notify()
                ready = await stream.fd.poll()
                known.drained = False
                if ready & Ready.NEW_EPOCH:
                    known.epoch = (await stream.fd.stream_info()).epoch
        await stream.send_control(Kind.STREAM_END)

    async def _send_dirty(self, stream: _Stream) -> None:
        while (data := await self._forward(stream)) is None or data:
            if data is None:
                await stream.first_pass.ran_dry(stream.wire, stream.index)
                await stream.fd.poll()
        await stream.send_control(Kind.STREAM_END)

    async def _forward(self, stream: _Stream) -> int | None:
        """Read and send once. Returns the bytes moved, None if there is nothing for now, 0 at the end of the stream."""
        settings = self.side.settings
        data = await read_some(stream.fd, settings.read_bytes * settings.reads_at_once)
        if data is None:
            stream.unread_bytes = 0
            return None
        if len(data):
            stream.unread_bytes = max(0, stream.unread_bytes - len(data))
            stream.read_bytes += len(data)
            if stream.index == 0:
                self._critical[stream.device].read_bytes += len(data)
            await stream.wire.send(Frame(Kind.DATA, stream.device, stream.index, payload=data))
            stream.sent_bytes += len(data)
        return len(data)

    @override
    def handle(self, frame: Frame) -> bool:
        if frame.kind is Kind.CREDIT:
            return self._streams.credited(frame)
        if frame.kind is Kind.FIRST_PASS_LOADED:
            passes = [part.first_pass for part in self._parts]
            return any(each.device == frame.device and each.answered(frame.stream) for each in passes)
        if frame.kind is not Kind.EPOCH_LOADED or frame.device >= len(self._critical):
            return False
        critical = self._critical[frame.device]
        if not critical.loaded_epoch < frame.value <= critical.sent_epoch:
            return False
        critical.loaded_epoch = frame.value
        self._ready_changed.notify()
        return True

    # --- when to stop -------------------------------------------------------------------------------------------------

    async def _until_stopped(self, start_ns: int) -> OutcomeKind | None:
        """Pre-copy, until the guest is stopped for good: None. Else how pre-copy ended."""
        while (outcome := await self.in_precopy(start_ns, self._converge())) is None:
            self._ram_phase = _RamPhase.PAUSED
            if await self.stop_guest():
                return None
            self._set_ram_phase(_RamPhase.ITERATE)
        return outcome

    async def _converge(self) -> None:
        """Wait until the switchover fits, and every device is ready or has to be no more."""
        settings = self.side.settings
        while True:
            self._sample()
            if self.out_of_time:
                left_bytes = self.side.machine.ram.pending_bytes() + self._unread_bytes
                self.note_force(left_bytes, self.held_up(self._unread_bytes))
                return
            if not (self._ready or self._forced):
                await self._until_ready(settings.bandwidth_window_ns)
                continue
            await self._ask_dry()
            # As in v2: the exact figure costs time, so it is asked for only once the cheap one fits.
            if self._fits(self._unread_bytes) and self._fits(await self._exact()) and (self._ready or self._forced):
                return
            await pause(settings.decision_interval_ns)

    def _sample(self) -> None:
        ram_bytes = self.side.machine.ram.pending_bytes()
        self._rule.sample(self.now_ns, self.bytes_sent(), self.ram_bytes_sent, ram_bytes)

    def _fits(self, device_bytes: int) -> bool:
        return self._rule.fits(self.side.machine.ram.pending_bytes(), device_bytes)

    @property
    def _ready(self) -> bool:
        return all(self._critical[device].ready for device in self.fds)

    @property
    def _forced(self) -> bool:
        """Whether the guest is stopped now even if its devices are not ready."""
        return self.out_of_time or (self._force_at_ns is not None and self.now_ns >= self._force_at_ns)

    async def _until_ready(self, at_most_ns: int) -> None:
        if self._force_at_ns is not None:
            at_most_ns = min(at_most_ns, max(0, self._force_at_ns - self.now_ns))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_ns / 1e9):
                while not self._ready:
                    await self._ready_changed.wait()

    @property
    def _unread_bytes(self) -> int:
        """The devices' remaining bytes, as far as the VMM knows without asking."""
        return sum(part.unread_bytes for part in self._parts)

    async def _exact(self) -> int:
        """The devices' remaining bytes, asked for: drained streams then save what became dirty. RAM is synced too."""
        await self.side.machine.ram.sync()
        await self._ask()
        sizes = [await device.stop_copy_bytes() for device in self.side.devices]
        for device in self.fds:
            if not any(part.unread_bytes for part in self._parts if part.device == device):
                self._stopped_only[device].drained(sizes[device])
        return sum(sizes)

    @override
    async def left(self) -> list[Left]:
        await self.side.machine.ram.sync()
        parts = [Left("RAM", self.side.machine.ram.pending_bytes())]
        for index, device in enumerate(self.side.devices):
            size, stopped_only = await device.stop_copy_bytes(), self._stopped_only[index]
            if index not in self.fds:
                stopped_only.drained(size)
            elif self._critical[index].drained and self._not_dirty_bytes:
                stopped_only.begins(size, self._not_dirty_bytes[index] - self._critical[index].read_bytes)
            parts.append(Left(device.name, size, min(size, stopped_only.bytes)))
        return parts

    @override
    def held_up(self, device_bytes: int) -> list[str]:
        names = [device.name for device in self.side.devices]
        lines = []
        for device in self.fds:
            if not (known := self._critical[device]).ready:
                where = "loaded" if known.drained and known.sent_epoch == known.epoch else "read to its end"
                lines.append(f"the critical data of {names[device]} (epoch {known.epoch}) was not {where}")
        return [*lines, *self._rule.held_up(names, self.side.machine.ram.pending_bytes(), device_bytes)]

    async def _ask(self) -> None:
        for part in self._parts:
            await part.ask()

    async def _ask_dry(self) -> None:
        """Ask the streams that ran dry, if RAM fits: if not, what they would save now would only become dirty again."""
        if self._rule.ram_fits(self.side.machine.ram.pending_bytes()):
            for part in self._parts:
                if part.unread_bytes == 0:
                    await part.ask()

    @override
    async def check_in_p2p(self) -> bool:
        late = []
        for device, fd in self.fds.items():
            info = await fd.stream_info()
            if info.epoch != self._critical[device].loaded_epoch or info.pending_bytes > 0:
                late.append(self.side.devices[device].name)
        self.counters.late_final_checks += len(late)
        if self._forced and (untold := [name for name in late if f"critical data of {name} " not in self.note]):
            forced = f"stopped by force: the critical data of {', '.join(untold)} was not loaded"
            self.note = "; ".join(filter(None, [self.note, forced]))
        return not late or self._forced or self.counters.retries >= self._options.max_retries
