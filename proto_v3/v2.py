"""v2, driven as QEMU drives it without multifd: one channel, one loop, one device after another.

Source (QEMU hw/vfio/migration.c, migration/migration.c): each round of the migration thread sends RAM for a while, then
does one read() of at most 1 MiB on each device; then it looks whether what is left fits. Once stopped: RAM, then each
device to its end, in turn, then their config. Target: whatever comes, in order, one write() after the other, so that
while one device loads, nothing else on the channel moves.
"""

from __future__ import annotations

from proto_v3.errors import PeerProtocolError
from proto_v3.frames import Frame, Kind
from proto_v3.migration import OutcomeKind, Source, Target, pause, read_some
from proto_v3.timeline import Mark


class V2Source(Source):
    """The sending VMM."""

    async def run(self) -> OutcomeKind:
        """See proto_v3.migration.Source."""
        (self.channel,) = self.channels
        start = self.now_ns
        await self.side.machine.set_up()
        await self.channel.tell(Kind.SETUP, value=len(self.side.devices))
        self.side.timeline.stage("setup", start)
        await self.open_sessions()
        if not await self._precopy(start):
            return await self.give_up()
        await self.stop_guest()
        await self._drain()
        self.side.timeline.mark(Mark.DRAINED)
        await self.channel.expect(Kind.RESUMED)
        await self.end_sessions()
        return OutcomeKind.COMPLETED

    async def _precopy(self, start_ns: int) -> bool:
        """Iterate until the switchover fits; False if that takes too long."""
        settings = self.side.settings
        switchover = self.switchover()
        self._unread = [0] * len(self.side.devices)
        await self._ask_devices()
        while True:
            sent = self.bytes_sent()
            await self._round()
            switchover.sample(self.now_ns, self.bytes_sent())
            if switchover.fits(self._estimate()) and switchover.fits(await self._exact()):
                return True
            if self.now_ns - start_ns > settings.give_up_ns:
                return False
            if self.bytes_sent() == sent:
                await pause(settings.decision_interval_ns)

    async def _round(self) -> None:
        settings, ram = self.side.settings, self.side.machine.ram
        until = self.now_ns + settings.ram_budget_ns
        while (left_ns := until - self.now_ns) > 0 and (pages := await ram.take(left_ns)) is not None:
            await self.channel.send(Frame(Kind.RAM, payload=pages))
        for index, fd in self.fds.items():
            data = await read_some(fd, settings.read_bytes)
            if data is None:
                self._unread[index] = 0
            else:
                self._unread[index] = max(0, self._unread[index] - len(data))
                await self.channel.send(Frame(Kind.DATA, index, payload=data))

    def _estimate(self) -> int:
        """What is left as far as the VMM knows without asking (QEMU's state_pending_estimate)."""
        return self.side.machine.ram.pending_bytes() + sum(self._unread)

    async def _exact(self) -> int:
        """What is left, asked for: it makes drained devices save what became dirty (QEMU's state_pending_exact)."""
        await self.side.machine.ram.sync()
        await self._ask_devices()
        stop_copy = 0
        for device in self.side.devices:
            stop_copy += await device.stop_copy_bytes()
        return self._estimate() + stop_copy

    async def _ask_devices(self) -> None:
        for index, fd in self.fds.items():
            info = await fd.precopy_info()
            self._unread[index] = info.initial_bytes + info.dirty_bytes

    async def _drain(self) -> None:
        timeline = self.side.timeline
        await self.save_last_ram(self.channel)
        for index in range(len(self.side.devices)):
            fd, start = self.fds[index], timeline.now_ns()
            await self.channel.tell(Kind.DEVICE_BEGIN, index)
            while len(data := await fd.read(self.side.settings.read_bytes)):
                await self.channel.send(Frame(Kind.DATA, index, payload=data))
            await self.channel.tell(Kind.STREAM_END, index)
            timeline.stage("device_save", start, index)
        for index in range(len(self.side.devices)):
            await self.channel.tell(Kind.CONFIG, index)
        await self.channel.tell(Kind.END)


class V2Target(Target):
    """The receiving VMM."""

    async def run(self) -> bool:
        """See proto_v3.migration.Target."""
        (channel,) = self.channels
        timeline = self.side.timeline
        fds = [await self.resuming(device) for device in self.side.devices]
        began = 0
        while True:
            frame = await channel.recv()
            index = self.device(frame)
            match frame.kind:
                case Kind.DATA:
                    await self.write(fds[index], frame.payload)
                case Kind.RAM:
                    await self.side.machine.ram.load(frame.payload)
                case Kind.RAM_BEGIN | Kind.DEVICE_BEGIN:
                    began = timeline.now_ns()
                case Kind.RAM_END:
                    timeline.stage("ram_load", began)
                    timeline.mark(Mark.TRANSFERRED)
                case Kind.STREAM_END:
                    timeline.stage("device_load", began, index)
                    timeline.mark(Mark.LOADED)
                case Kind.CONFIG:
                    await self.load_config(index)
                case Kind.END:
                    break
                case Kind.CANCEL:
                    return await self.cancelled()
                case Kind.SETUP:
                    pass
                case _:
                    raise PeerProtocolError(f"{frame.kind.name} is not a frame of v2")
        await self.resume_guest()
        await channel.tell(Kind.RESUMED)
        return True
