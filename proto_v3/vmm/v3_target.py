# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's target: one task for each wire stream writes what arrives. The driver holds dirty records back until their epoch
is loaded.

When all streams of a device have ended, its config is loaded. The devices leave RESUMING, which checks them. Then
LOADED is sent, the source answers with COMMIT, and the guest runs: at most one side ever runs it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence

from typing_extensions import override

from proto_v3.errors import PeerProtocolError
from proto_v3.notify import Notify
from proto_v3.timeline import Join, Mark
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import Side, Target
from proto_v3.vmm.multifd import Receivers
from proto_v3.vmm.order import RAM, Order, Table, by_multifd
from proto_v3.vmm.v3 import V3Options, opt_out
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import InStream, InStreams, OwnInStreams, SharedInStreams, Wire


class Phase(enum.Enum):
    """How far the target is."""

    LOADING = enum.auto()  # RAM and devices' data arrive and are loaded
    LOADED = enum.auto()  # everything is loaded, LOADED is being sent; the source may still run its guest
    COMMITTED = enum.auto()  # the source gave up its right: this side runs the guest
    CANCELLED = enum.auto()  # the source keeps its guest


ON_FIRST: Table = {**RAM, ("RAM is here", Kind.COMMIT): "committed"}
"""What may come on the first connection, beside CANCEL and what the streams take. COMMIT answers LOADED."""


class V3Target(Target):
    """The receiving VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V3Options) -> None:
        super().__init__(side, channels)
        self._options = options
        self._control = channels[0]
        devices, streams = len(side.devices), 1 + options.wire_streams
        own = options.without_multifd(devices)
        multifd = channels[own : options.connections(devices)]
        self._receivers = Receivers(options.multifd, multifd, self) if options.multifd else None
        self._streams: InStreams
        if options.wire is Wire.STREAMS:
            self._streams = OwnInStreams(channels, streams, self._on_held)
        else:
            shared = channels[:1] if options.wire is Wire.ONE else channels[1:own]
            self._streams = SharedInStreams(
                channels[0], shared, devices, streams, options.credits, self._on_held, side.machine.wake_up
            )
        self._held_bytes = 0
        self._loading: list[asyncio.Task[None]] = []
        self._phase = Phase.LOADING
        table = by_multifd(ON_FIRST) if options.multifd else ON_FIRST
        self._order = Order(table, "set-up", "on the first connection")
        self._ram_began_ns = 0
        self._notify = Notify()  # the phase changed, or all RAM arrived

    @override
    async def receive(self) -> bool:
        async with Join() as beside:
            beside.start(self._listen(), "target RAM")
            ways = [*self._streams.work(), *(self._receivers.work() if self._receivers else [])]
            receiving = [beside.start(work, track) for work, track in ways]
            async with Join() as parts:
                for index in range(len(self.side.devices)):
                    self._loading.append(parts.start(self._load_device(index), f"target device {index}"))
                self._loading.append(parts.start(self._load_others(), "target other devices"))
            for task in receiving:  # everything arrived: if a connection is lost from now on, no data is
                task.cancel()
            if self._phase is Phase.LOADING:
                # The drivers check here that all data is there, while the source may still run its guest.
                for device in self.side.devices:
                    await device.set_state(State.STOP)
                if self._phase is Phase.LOADING:  # no CANCEL arrived meanwhile
                    self._phase = Phase.LOADED
                    await self._control.send_control(Kind.LOADED)
            while self._phase is Phase.LOADED:
                await self._notify.wait()
        if self._phase is Phase.CANCELLED:
            return await self.cancelled()
        if self._options.multifd:
            await self.side.machine.close_channels(self._options.multifd.channels)
        await self.resume_guest()
        await opt_out(self.side.devices)  # before RESUMED is sent: that may fail, and the guest runs all the same
        await self._control.send_control(Kind.RESUMED)
        return True

    @override
    async def cancelled(self) -> bool:
        await super().cancelled()
        await opt_out(self.side.devices)
        return False

    async def _load_others(self) -> None:
        """Load all other devices of the guest, once RAM is here."""
        while self._order.state != "RAM is here":
            await self._notify.wait()
        await self.side.machine.load_other_devices()

    async def _listen(self) -> None:
        """Read the first connection until the source commits or cancels. It never waits for a driver."""
        while self._phase in (Phase.LOADING, Phase.LOADED):
            frame = await self._control.recv()
            if not self._streams.arrived(frame):
                await self._handle(frame)
            del frame  # its payload's memory is free while the next one is received

    async def _handle(self, frame: Frame) -> None:
        if frame.kind is Kind.COMMIT and self._phase is not Phase.LOADED:
            raise PeerProtocolError("COMMIT came on the first connection, where it is not due (not all is loaded)")
        if frame.kind is not Kind.CANCEL:
            self._order.take(frame.kind)
        timeline = self.side.timeline
        match frame.kind:
            case Kind.SETUP:
                self.check_devices(frame)
            case Kind.RAM:
                await self.side.machine.ram.load(frame.payload)
            case Kind.RAM_PASS_END if self._receivers is not None:
                await self._receivers.pass_ended(frame.value)
            case Kind.RAM_BEGIN:
                self._ram_began_ns = timeline.now_ns()
            case Kind.RAM_END:
                if self._receivers is not None:
                    await self._receivers.ram_ended()
                timeline.stage("ram_load", self._ram_began_ns)
                timeline.mark(Mark.TRANSFERRED)
                self._notify.notify()
            case Kind.COMMIT:
                self._phase = Phase.COMMITTED
                self._notify.notify()
            case Kind.CANCEL:
                self._phase = Phase.CANCELLED
                for task in self._loading:
                    task.cancel()
                self._notify.notify()

    async def _load_device(self, index: int) -> None:
        """Load a device's streams to their ends, then its config."""
        device = self.side.devices[index]
        await device.set_streams(self._options.dirty_streams, self._options.flags)
        critical = await self.resuming(device)
        fds = [await critical.get_stream(at) for at in range(self._options.dirty_streams)]
        if self._options.blocks:
            fds *= self._options.wire_streams
        last: list[Frame] = []
        async with Join() as streams:
            for at, fd in enumerate([critical, *fds]):
                work = self._load_stream(self._streams.stream(index, at), index, at, fd, last)
                streams.start(work, f"target {device.name} stream {at}")
        if self._options.blocks:
            for frame in last:
                await self.write(fds[0], frame.payload, len(frame.payload))
            await fds[0].close()
        self.side.timeline.mark(Mark.LOADED)
        await self.load_config(index)

    async def _load_stream(self, stream: InStream, index: int, at: int, fd: DataFd, last: list[Frame]) -> None:
        """Load one wire stream. `last` takes the LAST frame of a device's blocks: it is written after all streams."""
        critical = at == 0
        while True:
            frame = await stream.recv()
            match frame.kind:
                case Kind.DATA:
                    await self.write(fd, frame.payload, max(1, len(frame.payload)))  # from where it was received
                case Kind.LAST if self._options.blocks and not critical and not last:
                    last.append(frame)
                case Kind.EPOCH_SENT if critical:
                    await self._control.send_control(Kind.EPOCH_LOADED, index, 0, frame.value)
                case Kind.FIRST_PASS_SENT if not critical:
                    await self._control.send_control(Kind.FIRST_PASS_LOADED, index, at)
                case Kind.STREAM_END:
                    if critical or not self._options.blocks:
                        await fd.close()
                    return
                case _:
                    raise PeerProtocolError(f"{frame.kind.name} does not belong on stream {at}")
            await stream.done(frame)
            del frame  # its payload's memory is free while the next one is received

    def _on_held(self, size: int) -> None:
        self._held_bytes += size
        self.note_reorder_bytes(self._held_bytes)
