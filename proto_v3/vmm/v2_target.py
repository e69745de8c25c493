# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's target: loads what arrives on the main channel, in order, one write() after the other.

While one device loads, nothing else on the channel moves. With multifd (`proto_v3/vmm/multifd`), RAM and, since QEMU
10.0, the devices' stop-copy data arrive on channels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from proto_v3.errors import PeerProtocolError
from proto_v3.timeline import Join, Mark
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import MigrationFlags
from proto_v3.vmm.migration import Side, Target
from proto_v3.vmm.multifd import Receivers
from proto_v3.vmm.order import PASS_ENDS, RAM, Order, Table, by_multifd, stays
from proto_v3.vmm.v2 import Ack, V2Options
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload

ON_MAIN: Table = {
    **RAM,
    **stays("pre-copy", [Kind.DATA, Kind.INIT_DATA_SENT, Kind.FIRST_PASS_SENT]),
    **stays("RAM is here", [Kind.DEVICE_BEGIN, Kind.DATA, Kind.STREAM_END, Kind.CONFIG]),
    ("RAM is here", Kind.END): "ended",
}
"""What comes on the main channel if it carries everything."""
ALL_BY_MULTIFD: Table = {
    ("set-up", Kind.SETUP): "pre-copy",
    **PASS_ENDS,
    **stays("pre-copy", [Kind.DATA, Kind.INIT_DATA_SENT, Kind.FIRST_PASS_SENT]),
    ("pre-copy", Kind.SWITCHOVER_START): "switchover",
    ("switchover", Kind.RAM_BEGIN): "last pass",
    ("last pass", Kind.RAM_END): "RAM is here",
    ("RAM is here", Kind.END): "ended",
}
"""What comes on it if multifd carries RAM and the devices' stop-copy data."""
OF_DEVICE: Table = {
    **stays("pre-copy", [Kind.DATA, Kind.INIT_DATA_SENT, Kind.FIRST_PASS_SENT]),
    ("pre-copy", Kind.DEVICE_BEGIN): "stop-copy",
    **stays("stop-copy", [Kind.DATA]),
    ("stop-copy", Kind.STREAM_END): "loaded",
    ("loaded", Kind.CONFIG): "configured",
}
"""What comes of each device on the main channel. Only one that is configured may run."""
KINDS_OF_DEVICE = {kind for _, kind in OF_DEVICE}
PRECOPY_BY_MULTIFD: Table = {at: after for at, after in ALL_BY_MULTIFD.items() if at[1] not in KINDS_OF_DEVICE}
"""What comes on the main channel if multifd carries the devices' data before the stop, too."""


class V2Target(Target):
    """The receiving VMM."""

    def __init__(
        self, side: Side, channels: Sequence[Channel], options: V2Options, set_up: Frame | None = None
    ) -> None:
        """`set_up`: the SETUP, if it was received already."""
        super().__init__(side, channels)
        self._options = options
        self._main = channels[0]
        self._fds: list[DataFd] = []
        self._acks_due = 0
        self._others_loaded = False
        multifd = channels[1 : options.channels]
        self._receivers = Receivers(options.multifd, multifd, self, self._answer) if options.multifd else None
        self._reads_ahead = options.multifd is not None and options.multifd.precopy
        table = ON_MAIN if options.multifd is None else by_multifd(ON_MAIN)
        table = ALL_BY_MULTIFD if options.devices_by_multifd else table
        table = PRECOPY_BY_MULTIFD if self._reads_ahead else table
        self._order = Order(table, "set-up", "on the main channel")
        self._orders = [Order(OF_DEVICE, "pre-copy", f"for {device.name}") for device in side.devices]
        self._requests = [0] * len(side.devices)
        """The newest request for an ack that came, by device."""
        self._set_up = set_up

    @override
    async def receive(self) -> bool:
        self._fds = [await self.resuming(device) for device in self.side.devices]
        for device in self.side.devices:  # these will report when their initial data was sent
            self._acks_due += MigrationFlags.PRE_COPY in await device.migration_flags()
        if self._options.ack is Ack.ONE_SHOT and not self._acks_due:
            await self._main.send_control(Kind.SWITCHOVER_ACK)
        async with Join() as beside:
            if self._receivers and self._reads_ahead:
                self._receivers.start_loading(self._fds)
            receiving = [beside.start(work, track) for work, track in self._receivers.work()] if self._receivers else []
            async with Join() as self._configs:
                complete = await self._load()
            if complete and self._receivers:
                await self._receivers.loaded()
            for task in receiving:
                task.cancel()
        if not complete:
            return await self.cancelled()
        if self._receivers:
            await self.side.machine.close_channels(self._options.channels - 1)
        await self.resume_guest()
        await self._main.send_control(Kind.RESUMED)
        return True

    async def _load(self) -> bool:
        """Load what arrives on the main channel, until END: True. False if the source cancelled."""
        timeline = self.side.timeline
        began = 0
        while True:
            frame, self._set_up = self._set_up or await self._main.recv(), None
            index = self.device(frame)
            if frame.kind is Kind.CANCEL:
                return False
            self._take(frame, index)
            match frame.kind:
                case Kind.DATA:
                    await self.side.machine.buffer_device_data(len(frame.payload))
                    await self._write_from_buffer(self._fds[index], frame.payload)
                case Kind.RAM:
                    await self.side.machine.ram.load(frame.payload)
                case Kind.INIT_DATA_SENT | Kind.FIRST_PASS_SENT:
                    await self._loaded(frame.kind, index, frame.value)
                case Kind.SWITCHOVER_START if self._receivers is not None:
                    self._receivers.switchover(self._fds)
                case Kind.RAM_PASS_END if self._receivers is not None:
                    await self._receivers.pass_ended(frame.value)
                case Kind.RAM_BEGIN | Kind.DEVICE_BEGIN:
                    began = timeline.now_ns()
                case Kind.RAM_END:
                    if self._receivers is not None:
                        await self._receivers.ram_ended()
                    timeline.stage("ram_load", began)
                    timeline.mark(Mark.TRANSFERRED)
                case Kind.STREAM_END:
                    timeline.stage("device_load", began, index)
                    timeline.mark(Mark.LOADED)
                case Kind.CONFIG:
                    await self._load_others()
                    if self.side.settings.parallel_config:
                        self._configs.start(
                            self._load_in_thread(index), f"target {self.side.devices[index].name} config"
                        )
                    else:
                        await self.load_config(index)
                case Kind.END:
                    await self._load_others()
                    return True
            del frame  # its payload's memory is free while the next one comes

    async def _write_from_buffer(self, fd: DataFd, payload: Payload) -> None:
        """write() a payload that just arrived from the buffer that it came in, which is filled with whatever the
        channel brings: a write() is at most one buffer, the first one ends where the buffer does (qemu_file_get_to_fd).
        """
        buffer_bytes = self.side.settings.write_bytes
        first = buffer_bytes - (self._main.bytes_received - len(payload)) % buffer_bytes
        for piece in (payload[:first], payload[first:]):
            if len(piece):
                await self.write(fd, piece, buffer_bytes)

    def _take(self, frame: Frame, index: int) -> None:
        """PeerProtocolError if the frame is not due: nothing may be left out before the guest runs, or come twice."""
        kind = frame.kind
        self._order.take(kind)
        if kind in KINDS_OF_DEVICE:
            self._orders[index].take(kind)
        if kind is Kind.SETUP:
            self.check_devices(frame)
        if kind is Kind.END and not self._options.devices_by_multifd:
            for device, order in zip(self.side.devices, self._orders, strict=True):
                if order.state != "configured":
                    raise PeerProtocolError(f"END came, but {device.name} is not whole ({order.state})")

    async def _load_in_thread(self, index: int) -> None:
        """Load a device's config beside those of others."""
        await self.side.machine.wake_up()
        await self.load_config(index)

    async def _load_others(self) -> None:
        """Load all other devices of the guest, once: before the first config."""
        if not self._others_loaded:
            await self.side.machine.load_other_devices()
        self._others_loaded = True

    async def _answer(self, packet: Frame) -> None:
        """As _loaded(), of a packet of multifd, which has the request in place of the stream."""
        await self._loaded(packet.kind, packet.device, packet.stream)

    async def _loaded(self, kind: Kind, device: int, request: int) -> None:
        """Everything that arrived before on this channel is loaded, and so is the initial data, or the first pass."""
        if kind is Kind.FIRST_PASS_SENT:
            await self._main.send_control(Kind.FIRST_PASS_LOADED, device)
            return
        if request <= self._requests[device]:
            raise PeerProtocolError(f"INIT_DATA_SENT came for request {request} of device {device} twice")
        self._requests[device] = request
        match self._options.ack:
            case Ack.ONE_SHOT:
                self._acks_due -= 1
                if self._acks_due == 0:
                    await self._main.send_control(Kind.SWITCHOVER_ACK)
            case Ack.REUSABLE:
                await self._main.send_control(Kind.SWITCHOVER_ACK, device, value=request)
            case _:
                raise PeerProtocolError("INIT_DATA_SENT came, but switchover-ack is not used")
