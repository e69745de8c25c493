"""v3's target: one task for each wire stream writes what comes; the driver holds dirty records back
until their epoch is loaded.

When a device's streams are all at their ends its config is loaded. The devices leave RESUMING, which checks them; then
LOADED, COMMIT from the source, and the guest runs: at most one side ever runs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from proto_v3.errors import PeerProtocolError
from proto_v3.notify import Notify
from proto_v3.timeline import Join, Mark
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import Side, Target
from proto_v3.vmm.v3 import V3Options, opt_out
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import InStream, InStreams, OwnInStreams, SharedInStreams, Wire


class V3Target(Target):
    """The receiving VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V3Options) -> None:
        super().__init__(side, channels)
        self._options = options
        self._control = channels[0]
        streams = 1 + options.wire_streams
        self._streams: InStreams
        if options.wire is Wire.STREAMS:
            self._streams = OwnInStreams(channels, streams, self._hold)
        else:
            shared = channels[:1] if options.wire is Wire.ONE else channels[1:]
            devices = len(side.devices)
            self._streams = SharedInStreams(channels[0], shared, devices, streams, options.credits, self._hold)
        self._held_bytes = 0
        self._loading: list[asyncio.Task[None]] = []
        self._ram_sent = self._loaded = self._committed = self._cancelled = False
        self._notify = Notify()

    async def receive(self) -> bool:
        """See proto_v3.vmm.migration.Target."""
        async with Join() as beside:
            beside.start(self._listen(), "target RAM")
            carrying = [beside.start(work, track) for work, track in self._streams.work()]
            async with Join() as parts:
                for index in range(len(self.side.devices)):
                    self._loading.append(parts.start(self._load_device(index), f"target device {index}"))
                self._loading.append(parts.start(self._load_others(), "target other devices"))
            for task in carrying:  # all has come: if their connections are lost now, nothing is
                task.cancel()
            if not self._cancelled:
                # The drivers check here that all is there: while the source may still run its guest.
                for device in self.side.devices:
                    await device.set_state(State.STOP)
                self._loaded = True
                await self._control.send_control(Kind.LOADED)
            while not (self._committed or self._cancelled):
                await self._notify.wait()
        if self._cancelled:
            return await self.cancelled()
        await self.resume_guest()
        await opt_out(self.side.devices)  # before it is said: that may fail, and the guest runs all the same
        await self._control.send_control(Kind.RESUMED)
        return True

    async def cancelled(self) -> bool:
        """See proto_v3.vmm.migration.Target; the devices are v2's again."""
        await super().cancelled()
        await opt_out(self.side.devices)
        return False

    async def _load_others(self) -> None:
        """All other devices of the guest, once RAM is here."""
        while not self._ram_sent:
            await self._notify.wait()
        await self.side.machine.load_other_devices()

    async def _listen(self) -> None:
        """What comes on the first connection, until the source commits or cancels. It never waits for a driver."""
        began = 0
        while True:
            frame = await self._control.recv()
            match frame.kind:
                case _ if self._streams.arrived(frame):
                    pass
                case Kind.SETUP:
                    if frame.value != len(self.side.devices):
                        raise PeerProtocolError(
                            f"the source has {frame.value} devices, here are {len(self.side.devices)}"
                        )
                case Kind.RAM:
                    await self.side.machine.ram.load(frame.payload)
                case Kind.RAM_BEGIN:
                    began = self.side.timeline.now_ns()
                case Kind.RAM_END:
                    self.side.timeline.stage("ram_load", began)
                    self.side.timeline.mark(Mark.TRANSFERRED)
                    self._ram_sent = True
                    self._notify.notify()
                case Kind.COMMIT if self._loaded:
                    self._committed = True
                    self._notify.notify()
                    return
                case Kind.CANCEL:
                    self._cancelled = True
                    for task in self._loading:
                        task.cancel()
                    self._notify.notify()
                    return
                case _:
                    raise PeerProtocolError(f"{frame.kind.name} came on the first connection, where it is not due")

    async def _load_device(self, index: int) -> None:
        """A device's streams to their ends, then its config."""
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
        while True:
            frame = await stream.recv()
            match frame.kind:
                case Kind.DATA:
                    await self.write(fd, frame.payload, max(1, len(frame.payload)))  # from where it was received
                case Kind.LAST if self._options.blocks and at and not last:
                    last.append(frame)
                case Kind.EPOCH_SENT if at == 0:
                    await self._control.send_control(Kind.EPOCH_LOADED, index, 0, frame.value)
                case Kind.STREAM_END:
                    if at == 0 or not self._options.blocks:
                        await fd.close()
                    return
                case _:
                    raise PeerProtocolError(f"{frame.kind.name} does not belong on stream {at}")
            await stream.done(frame)
            del frame  # its payload's memory is free while the next one comes

    def _hold(self, size: int) -> None:
        self._held_bytes += size
        self.note_reorder_bytes(self._held_bytes)
