# SPDX-License-Identifier: GPL-2.0-or-later
"""Multifd: RAM and the devices' stop-copy data over a pool of channels (QEMU migration/multifd.c,
hw/vfio/migration-multifd.c, since QEMU 10.0).

Source: each channel has a thread that sends one packet at a time. A packet goes to the next channel that is free. A
device's save thread reads its one fd to the end, 1 MiB at a time, and numbers the packets.

Target: each channel has a thread that receives. A device's load thread puts the packets back in order and write()s
them, then loads the device's config, one device at a time. So the devices run in parallel, not the channels.

The threads of QEMU copy each packet on both sides, under mutexes (Multifd.copies); the target's closes its channels
before the guest starts.

Packets that arrive early wait in memory, without a bound (QEMU's default). The most that waited is recorded.

v3 moves RAM so too, if it is told to; its devices have streams of their own.

A pass over RAM ends with SYNC on each channel and RAM_PASS_END, or after the last one RAM_END, on the main channel. A
channel's thread at the target waits at SYNC until all of them are there and the main thread has that frame, so that no
page is loaded over a newer one (QEMU migration/ram.c, find_dirty_block; multifd_recv_sync_main).

END comes on the main channel, and may overtake what is on these ones. A target that has END and still needs a packet
waits for it for as long as anything arrives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from proto_v3.errors import PeerProtocolError
from proto_v3.notify import Notify, Woken
from proto_v3.timeline import NO_CAUSE, Join, Mark, Work, cause, caused_by
from proto_v3.vfio.device import DataFd
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload
from proto_v3.wire.streams import OutStream, most_frames

ARRIVES_WITHIN_S = 10.0
"""How long a target waits for what is missing while nothing arrives. Ours: QEMU waits for ever."""

STOP_COPY = (Kind.PACKET, Kind.CONFIG)
"""What comes of a device after the stop."""
Answer = Callable[[Frame], Awaitable[None]]

if TYPE_CHECKING:
    from proto_v3.vmm.migration import Source, Target


@dataclass(frozen=True, slots=True)
class Multifd:
    """A VMM's multifd settings, the same at both sides."""

    channels: int
    device_state: bool
    """The devices' stop-copy data uses these channels too. If False, the main channel, as before QEMU 10.0."""
    dedicated: int
    """This many of the channels carry device state only; 0: all carry both. (Tried in the RFC of April 2024,
    cover.1713269378.git.maciej.szmigiero@oracle.com, and objected to.)"""
    coupled: bool
    """A channel's thread waits until the data it received is loaded. (Tried for comparison,
    6240036b-f8b8-4592-8f80-21ee6d3eaa1e@maciej.szmigiero.name.)"""
    load_threads: int  # at most this many devices load at once; 0: all
    max_queued_bytes: int | None = None
    """Limit for one device at the target: if more bytes wait, the migration fails. None: no limit. (QEMU's
    x-migration-max-queued-buffers-size, which has no limit by default.)"""
    precopy: bool = False
    """The devices' pre-copy data uses these channels, too."""
    copies: bool = False
    """To copy a packet takes time. The save threads copy and hand over one packet at a time, all devices together
    (QEMU's queue_job_mutex, held in multifd_queue_device_state over the copy and over multifd_send). The target's
    channels each copy what they received, one packet of a device at a time (load_bufs_mutex of that device, held in
    vfio_multifd_load_state_buffer over the copy)."""


class _Mutex:
    """A mutex of the VMM, first come, first served. What its holder did last is why the next one goes on."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._users = 0
        self._let_go_by = NO_CAUSE

    async def __aenter__(self) -> None:
        self._users += 1
        waits = self._users > 1
        try:
            await self._lock.acquire()
        except asyncio.CancelledError:
            self._users -= 1
            raise
        if waits:
            caused_by(self._let_go_by)

    async def __aexit__(self, *_: object) -> None:
        self._users -= 1
        self._let_go_by = cause()
        self._lock.release()


class _Sender:
    """One channel's thread at the source."""

    def __init__(self, channel: Channel, pool: Pool) -> None:
        self._channel = channel
        self._pool = pool
        self._packet: Frame | None = None
        self._notify = Notify(pool.woken)
        self.sync_due = 0  # the pass whose SYNC is to be sent after the packet in hand; 0: none

    def give(self, packet: Frame) -> None:
        self._packet = packet
        self._notify.notify()

    def ask_sync(self, number: int) -> None:
        self.sync_due = number
        self._notify.notify()

    async def work(self) -> None:
        while True:
            while self._packet is None and not self.sync_due:
                await self._notify.wait()
            if self._packet is not None:
                await self._channel.send(self._packet)
                self._packet = None
                self._pool.free.append(self)
            else:
                await self._channel.send_control(Kind.SYNC, value=self.sync_due)
                self.sync_due = 0
            self._pool.changed.notify()


class Pool:
    """Channels of which the one that has been free for longest takes the next packet."""

    def __init__(self, channels: Sequence[Channel], woken: Woken | None = None) -> None:
        """`woken`: of the channels' threads, and of those that wait for one."""
        self.woken = woken
        self.senders = [_Sender(channel, self) for channel in channels]
        self.free = deque(self.senders)
        self.changed = Notify(woken)  # a sender has sent its packet or its SYNC

    async def send(self, packet: Frame) -> None:
        """Hand a packet to a channel's thread; waits while all are busy."""
        while not self.free:
            await self.changed.wait()
        self.free.popleft().give(packet)

    async def sync(self, number: int) -> None:
        """Send SYNC of a pass over RAM on each channel, behind its packet. Packets of devices may follow at any time;
        RAM that follows is of a later pass (multifd_send_sync_main)."""
        for sender in self.senders:
            sender.ask_sync(number)
        while any(sender.sync_due for sender in self.senders):
            await self.changed.wait()


class _Packets(OutStream):
    """What is sent of a device, as packets that have numbers."""

    def __init__(self, senders: Senders, source: Source, index: int) -> None:
        self._senders, self._source, self._index = senders, source, index
        self._number = 0

    @override
    async def send(self, frame: Frame) -> None:
        kind = Kind.PACKET if frame.kind is Kind.DATA else frame.kind
        packet = Frame(kind, self._index, frame.value, self._number, frame.payload)
        self._number += 1
        await self._senders.queue(self._source, packet)


class Senders:
    """The source's half."""

    def __init__(self, settings: Multifd, channels: Sequence[Channel], woken: Woken | None = None) -> None:
        """`woken`: of all threads."""
        self.ram = Pool(channels[settings.dedicated :], woken)
        self._devices = Pool(channels[: settings.dedicated], woken) if settings.dedicated else self.ram
        self._passes = 0  # over RAM, that ended at the channels too
        self._syncs = 0
        self._mutex = _Mutex() if settings.copies else None
        self._packets: dict[int, _Packets] = {}

    def stream(self, source: Source, index: int) -> OutStream:
        """A device's packets, in pre-copy and after it."""
        return self._packets.setdefault(index, _Packets(self, source, index))

    def work(self) -> list[Work]:
        """One thread for each channel; they run until they are cancelled."""
        pools = [self.ram] if self._devices is self.ram else [self._devices, self.ram]
        senders = [sender for pool in pools for sender in pool.senders]
        return [(sender.work(), f"source multifd {at}") for at, sender in enumerate(senders)]

    async def send_pages(self, source: Source, pages: Payload) -> None:
        """Send pages of RAM."""
        await self.end_pass(source)
        await self.ram.send(Frame(Kind.RAM, payload=pages))

    async def end_pass(self, source: Source) -> None:
        """If a pass over RAM has ended: sync the channels, and tell the target on the main one."""
        if self._passes < source.side.machine.ram.passes:
            await self.sync(source)
            await source.channels[0].send_control(Kind.RAM_PASS_END, value=self._syncs)

    async def sync(self, source: Source) -> None:
        """Sync the channels that carry RAM, behind all pages that were sent."""
        self._passes = source.side.machine.ram.passes
        self._syncs += 1
        await source.side.machine.sync_channels(len(self.ram.senders))
        await self.ram.sync(self._syncs)

    async def save_device(self, source: Source, index: int, read_bytes: int) -> None:
        """A device's save thread: send its data to the end, then its config."""
        start = source.now_ns
        fd = await source.ready_to_drain(index)
        packets = self.stream(source, index)
        while len(data := await fd.read(read_bytes)):
            await packets.send(Frame(Kind.DATA, index, payload=data))
        await packets.send(Frame(Kind.CONFIG, index))
        source.side.timeline.stage("device_save", start, index)

    async def queue(self, source: Source, packet: Frame) -> None:
        """Hand over a packet of a device."""
        if self._mutex is None:
            await self._devices.send(packet)
            return
        async with self._mutex:
            await source.side.machine.copy_packet(len(packet.payload))
            await self._devices.send(packet)


class _Loader:
    """One device's load thread at the target."""

    def __init__(
        self, index: int, target: Target, max_queued_bytes: int | None, idle: Notify, answer: Answer | None
    ) -> None:
        """`idle` is notified when there is nothing to do for now. `answer`: what is done about a packet without data,
        when all before it is written; None: there is none."""
        self.index = index
        self._answer = answer
        self._stopped_ns: int | None = None  # when the switchover began
        self._idle = idle
        self._max_queued_bytes = max_queued_bytes
        self.waiting: dict[int, Frame] = {}  # packets that arrived and are not written yet, by their number
        self.waiting_bytes = 0
        self.done = False
        self._target = target
        self._next = 0
        self._last: int | None = None  # the config's number, when that arrived
        self._writes = False
        self._mutex = _Mutex()
        self._notify = Notify(target.side.machine.wake_up)

    async def copied(self, packet: Frame) -> None:
        """A channel's thread copies a packet into memory of its own, one packet of the device at a time."""
        async with self._mutex:
            await self._target.side.machine.copy_packet(len(packet.payload))

    def put(self, packet: Frame) -> None:
        """Take a packet. PeerProtocolError if its number arrived before, if too many bytes wait, or if it is behind the
        config, which is the last one."""
        if packet.value < self._next or packet.value in self.waiting:
            raise PeerProtocolError(f"device {self.index}: packet {packet.value} came twice")
        if packet.kind is Kind.CONFIG and self._last is None:
            self._last = packet.value
        newest = max([packet.value, *self.waiting]) if packet.kind is Kind.CONFIG else packet.value
        if self._last is not None and newest > self._last:
            raise PeerProtocolError(f"device {self.index}: packet {newest} is behind its config, {self._last}")
        waiting_bytes = self.waiting_bytes + len(packet.payload)
        if self._max_queued_bytes is not None and waiting_bytes > self._max_queued_bytes:
            raise PeerProtocolError(
                f"device {self.index}: {waiting_bytes} bytes of it wait to be written, and "
                f"vmm.multifd_max_queued_mib allows {self._max_queued_bytes} bytes: data comes faster than it is loaded"
            )
        if len(self.waiting) >= most_frames(waiting_bytes):
            raise PeerProtocolError(f"device {self.index}: {len(self.waiting)} packets of {waiting_bytes} bytes wait")
        self.waiting[packet.value] = packet
        self.waiting_bytes = waiting_bytes
        self._notify.notify()

    @property
    def at_work(self) -> bool:
        """Whether there is something to do with what arrived."""
        in_config = self._last is not None and self._next > self._last
        return not self.done and (self._writes or self._next in self.waiting or in_config)

    @property
    def missing(self) -> str:
        """What it needs and does not have, in words."""
        return f"packet {self._next} of device {self.index}"

    async def starved(self) -> None:
        """Wait until nothing more can be done with the packets that arrived."""
        while not self.done and (self._writes or self._next in self.waiting):
            await self._notify.wait()

    def switchover(self) -> None:
        """The guest is stopped: what is written from now on counts for the stages, and the config may be loaded."""
        self._stopped_ns = self._target.side.timeline.now_ns()
        self._notify.notify()

    async def load(self, fd: DataFd) -> None:
        """Write the packets in order, then load the config."""
        timeline = self._target.side.timeline
        began, writing = -1, 0
        while True:
            while self._next not in self.waiting:
                await self._notify.wait()
            packet = self.waiting.pop(self._next)
            self.waiting_bytes -= len(packet.payload)
            self._next += 1
            if packet.kind is Kind.CONFIG:
                break
            if packet.kind is not Kind.PACKET:
                assert self._answer is not None  # else it was refused
                await self._answer(packet)
                self._packet_done()
                continue
            start = timeline.now_ns()
            if began < (self._stopped_ns or 0):
                began, writing = start, 0
            self._writes = True
            # One write() for each packet, not cut into pieces (vfio_load_state_buffer_write).
            await fd.write(packet.payload, max(1, len(packet.payload)))
            self._writes = False
            writing += timeline.now_ns() - start
            self._packet_done()
            del packet
        while self._stopped_ns is None:
            await self._notify.wait()
        now = timeline.now_ns()
        if began < self._stopped_ns:
            began, writing = now, 0
        timeline.stage("load_total", began, self.index)
        timeline.stage("load_writing", now - writing, self.index)
        timeline.stage("load_waiting", began + writing, self.index)
        timeline.mark(Mark.LOADED)
        await self._target.load_config(self.index)
        self.done = True
        self._notify.notify()

    def _packet_done(self) -> None:
        """A packet is done with: a channel's thread may wait for that, and so may who waits for the last one."""
        self._notify.notify()
        if not self.at_work:
            self._idle.notify()


class Receivers:
    """The target's half."""

    def __init__(
        self, settings: Multifd, channels: Sequence[Channel], target: Target, answer: Answer | None = None
    ) -> None:
        """`answer`: of a packet without data that came in pre-copy, when all of its device before it is loaded."""
        self._settings = settings
        self._channels = channels
        self._target = target
        devices = range(len(target.side.devices))
        self._fds: Sequence[DataFd] = []
        self._synced = [0] * len(channels)
        """Of each channel, the pass over RAM whose SYNC came last."""
        self._passes = 0
        """The passes over RAM that ended on all channels and on the main one."""
        self._ram_is_here = False
        self._arrived = 0  # frames
        self._notify = Notify(target.side.machine.wake_up)
        limit_bytes = settings.max_queued_bytes
        self._loaders = [_Loader(index, target, limit_bytes, self._notify, answer) for index in devices]

    def work(self) -> list[Work]:
        """One thread for each channel, and the devices' load threads. To be cancelled when everything is loaded."""
        receiving = [(self._receive(at), f"target multifd {at}") for at in range(len(self._channels))]
        return [*receiving, (self._load_devices(), "target loads")]

    def start_loading(self, fds: Sequence[DataFd]) -> None:
        """The devices' load threads start."""
        self._fds = fds
        self._notify.notify()

    def switchover(self, fds: Sequence[DataFd]) -> None:
        """The switchover began: the devices' load threads start (vfio_multifd_switchover_start), or run already."""
        for loader in self._loaders:
            loader.switchover()
        self.start_loading(fds)

    async def pass_ended(self, number: int) -> None:
        """The main channel brought the end of a pass over RAM: wait for its SYNC on every channel that carries RAM, and
        let their threads go on. PeerProtocolError if one does not come, or if another pass is due."""
        if number != self._passes + 1:
            raise PeerProtocolError(f"pass {number} over RAM ended, where {self._passes + 1} was due")
        due = range(self._settings.dedicated, len(self._channels))
        await self._until(lambda: [f"SYNC of channel {at}" for at in due if self._synced[at] < number])
        self._passes = number
        self._notify.notify()

    async def ram_ended(self) -> None:
        """As pass_ended(), of the last pass."""
        await self.pass_ended(self._passes + 1)
        self._ram_is_here = True

    async def loaded(self) -> None:
        """Wait until every device that uses these channels is loaded, its config included. PeerProtocolError if a
        packet does not come."""
        loaders = self._loaders if self._settings.device_state else []
        await self._until(lambda: [loader.missing for loader in loaders if not loader.done])

    async def _until(self, missing: Callable[[], list[str]]) -> None:
        """Wait until nothing is missing; PeerProtocolError if something is, nothing arrives, and no device loads."""
        quiet, arrived = 0, self._arrived
        while waits_for := missing():
            loads = any(loader.at_work for loader in self._loaders)  # for as long as it takes
            try:
                async with asyncio.timeout(None if loads else ARRIVES_WITHIN_S / 2):
                    await self._notify.wait()
            except TimeoutError:  # twice: one may be late, of a process that was stopped itself
                quiet, arrived = 0 if arrived != self._arrived else quiet + 1, self._arrived
                if quiet == 2:
                    raise PeerProtocolError(
                        f"{', '.join(waits_for)} did not come, and nothing has for {ARRIVES_WITHIN_S:g} s"
                    ) from None

    async def _receive(self, at: int) -> None:
        target, dedicated = self._target, self._settings.dedicated
        while True:
            frame = await self._channels[at].recv()
            self._arrived += 1
            match frame.kind:
                case Kind.RAM if at >= dedicated and not self._ram_is_here:
                    await target.side.machine.ram.load(frame.payload)
                case Kind.SYNC if at >= dedicated and frame.value == self._synced[at] + 1 and not self._ram_is_here:
                    self._synced[at] = frame.value
                    self._notify.notify()
                    while self._passes < frame.value:
                        await self._notify.wait()
                case Kind.PACKET | Kind.CONFIG | Kind.INIT_DATA_SENT | Kind.FIRST_PASS_SENT if (
                    (frame.kind in STOP_COPY or self._settings.precopy)
                    and self._settings.device_state
                    and (at < dedicated or not dedicated)
                ):
                    loader = self._loaders[target.device(frame)]
                    target.side.timeline.mark(Mark.TRANSFERRED)
                    if self._settings.copies:
                        await loader.copied(frame)
                    loader.put(frame)
                    target.note_reorder_bytes(sum(each.waiting_bytes for each in self._loaders))
                    if self._settings.coupled:
                        await loader.starved()
                case _:
                    after = f" after SYNC {self._synced[at]}" if self._synced[at] else ""
                    raise PeerProtocolError(f"{frame.kind.name} does not belong on multifd channel {at}{after}")
            del frame  # its payload's memory is free once it is loaded

    async def _load_devices(self) -> None:
        while not self._fds:
            await self._notify.wait()
        if not self._settings.device_state:
            return
        remaining = deque(self._loaders)
        threads = self._settings.load_threads or len(remaining)
        async with Join() as loads:
            for at in range(min(threads, len(remaining))):
                loads.start(self._load_thread(remaining), f"target load thread {at}")

    async def _load_thread(self, remaining: deque[_Loader]) -> None:
        while remaining:
            loader = remaining.popleft()
            await loader.load(self._fds[loader.index])
            self._notify.notify()
