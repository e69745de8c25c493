# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's source before the stop, driven as QEMU drives it.

QEMU hw/vfio/migration.c, migration/migration.c: each round of the migration thread sends RAM for a while, then does one
read() of at most 1 MiB on each device, then checks whether the rest fits the downtime limit.

Not in QEMU: `precopy_threads`. Each device has a thread that reads it all the time, beside RAM and the other devices.
It sends on multifd's channels, as the save threads do after the stop, if these carry device state, else on the main
one. When there is nothing to read, it waits for `precopy_idle_ns` and asks the device, which then saves what became
dirty, and may report REINIT.

In pre-copy a VMM knows of a device what GET_PRECOPY_INFO last answered, less what it read since. Only the next call can
show whether that is still right: between two calls, and between the last call and the stop, the device may have been
reconfigured.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Sequence

from typing_extensions import override

from proto_v3.notify import Notify
from proto_v3.timeline import Join
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import MigrationFlags, State
from proto_v3.vmm.first_pass import FirstPass
from proto_v3.vmm.migration import HUNG, Side, Source, pause, read_some
from proto_v3.vmm.multifd import Senders
from proto_v3.vmm.stop_rule import StopRule
from proto_v3.vmm.switchover import Left, StoppedOnly, Switchover
from proto_v3.vmm.v2 import Ack, V2Options
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import OutStream

UNKNOWN_STOP_COPY_BYTES = 100 << 30
"""Assumed when MIG_DATA_SIZE fails, so that the downtime limit is not violated (QEMU, VFIO_MIG_STOP_COPY_SIZE)."""


READS_OF_A_DRAIN = 256
"""If reads are made as one, a device still takes at least so many. Each stage takes a whole piece in turn, so that
larger ones would be felt at both ends."""
SECTION_BYTES = 18
"""What a round sends of RAM, and of each device, even if that has nothing: header and footer of a section, 5 bytes
each, and an end mark of 8 (QEMU, save_section_header, save_section_footer, vfio_save_iterate). Only the measured
bandwidth counts them: an idle guest's is small, and not 0. Seen: 54 bytes a round with two devices, QEMU 11.1.3."""


class KnownDevice:
    """What the source knows of a device in pre-copy."""

    what = ""  # it is all that a device has

    def __init__(self, device: int) -> None:
        self.device = device
        self.sent_bytes = 0  # total since the start
        self.first_pass = FirstPass(device, [0])
        self.mutex = asyncio.Lock()
        """Held over a call on the data fd and what it changes here: with threads, two may be at it."""
        self.initial_bytes = 0
        self.dirty_bytes = 0
        self.requests = 1  # acks needed so far: one for the initial data, one for each REINIT
        self.sent = False  # whether INIT_DATA_SENT was sent for the newest request
        self.acked = 0  # the newest request that the target acknowledged
        self.stopped_only = StoppedOnly()

    @property
    def unread_bytes(self) -> int:
        """Bytes that pre-copy has to give."""
        return self.initial_bytes + self.dirty_bytes

    def read(self, size: int) -> None:
        """`size` bytes were read. Initial data comes first (vfio_update_estimated_pending_data)."""
        initial = min(self.initial_bytes, size)
        self.initial_bytes -= initial
        self.dirty_bytes = max(0, self.dirty_bytes - (size - initial))

    def drained(self) -> None:
        """Nothing is left to read for now."""
        self.initial_bytes = self.dirty_bytes = 0


async def _stop_copy_bytes(device: MigrationDevice) -> int:
    """MIG_DATA_SIZE, or UNKNOWN_STOP_COPY_BYTES if that fails."""
    try:
        return await device.stop_copy_bytes()
    except OSError:
        return UNKNOWN_STOP_COPY_BYTES


class _MainStream(OutStream):
    """A device's data on the main channel."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @override
    async def send(self, frame: Frame) -> None:
        if size_bytes := len(frame.payload):
            await self._source.side.machine.buffer_device_data(size_bytes)
        await self._source.channels[0].send(frame)


class V2Precopy(Source):
    """The sending VMM, up to the order to stop."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V2Options) -> None:
        multifd = channels[1 : options.channels]
        senders = Senders(options.multifd, multifd, side.machine.wake_up) if options.multifd else None
        super().__init__(side, channels, senders)
        self.options = options
        self.known = [KnownDevice(index) for index in range(len(side.devices))]
        self.read_bytes: list[int] = []
        """Of one read(), by device."""
        self.drain_bytes: list[int] = []
        """The same for reads after the stop, several of which may be made as one."""
        self.rule: StopRule  # from the start of pre-copy
        self.main = _MainStream(self)
        self._out: list[OutStream] = [self.main for _ in side.devices]
        if senders is not None and options.precopy_threads and options.devices_by_multifd:
            self._out = [senders.stream(self, index) for index in range(len(side.devices))]
        self._all_acked = False  # whether the one-shot ack was received
        self._section_bytes = 0
        self._decided_ns = self.now_ns  # when the last round began
        self._reading = False  # whether devices' threads go on
        self._stop_reading = Notify(side.machine.wake_up)

    @override
    def handle(self, frame: Frame) -> bool:
        known = self.known[frame.device] if frame.device < len(self.known) else None
        match frame.kind:
            case Kind.SWITCHOVER_ACK if frame.value == 0:
                self._all_acked = True
            case Kind.SWITCHOVER_ACK if known is not None:
                known.acked = frame.value
            case Kind.FIRST_PASS_LOADED if known is not None:
                return known.first_pass.answered(frame.stream)
            case _:
                return False
        return True

    @override
    async def opt_in(self) -> None:
        """To PRECOPY_INFOv2, where a device has it: QEMU asks when the device is realized, and goes on without."""
        for index, device in enumerate(self.side.devices):
            if self.options.reinit and self._has(index, MigrationFlags.PRE_COPY):
                try:
                    await device.set_precopy_info_v2()
                except OSError as error:
                    if error.errno != errno.ENOTTY:
                        raise

    async def open(self) -> None:
        """Set up each device, one after the other: its size, its session, what it has (QEMU, vfio_save_setup)."""
        for index, (device, known) in enumerate(zip(self.side.devices, self.known, strict=True)):
            size = await _stop_copy_bytes(device)
            # No larger buffer than the device can fill.
            read_bytes = max(1, min(self.side.settings.read_bytes, size))
            self.read_bytes.append(read_bytes)
            at_once = min(self.side.settings.reads_at_once, size // (READS_OF_A_DRAIN * read_bytes))
            self.drain_bytes.append(read_bytes * max(1, at_once))
            if self._has(index, MigrationFlags.PRE_COPY):
                await self._enter(index, State.PRE_COPY)
                await self.ask(index)
                self.rule.add(known, self.now_ns)
            if size != UNKNOWN_STOP_COPY_BYTES:
                known.stopped_only.begins(size, size - known.unread_bytes)

    # --- rounds -------------------------------------------------------------------------------------------------------

    async def iterate(self) -> None:
        """Pre-copy until the guest can be stopped."""
        if not self.options.precopy_threads:
            await self._rounds()
            return
        while True:
            async with Join() as threads:
                self._reading = True
                for index in self.fds:
                    threads.start(self._read_in_thread(index), f"source {self.side.devices[index].name} pre-copy")
                await self._rounds()
                self._reading = False
                self._stop_reading.notify()
            await self.side.machine.wake_up()
            # A thread may have found a REINIT in its last call, which reports it only once.
            if self.out_of_time or self._can_switch_over():
                return

    async def _read_in_thread(self, index: int) -> None:
        """A device's thread: reads and sends, and asks when there is nothing to read."""
        whole, idle_ns = self.rule.whole, self.side.settings.precopy_idle_ns
        while self._reading:
            if whole.window_is_full(self._counted_bytes()):
                await self._wait_in_thread(max(idle_ns, whole.window_left_ns(self.now_ns)))
            elif not await self._turn(index):
                await self._wait_in_thread(idle_ns)
                if self._reading:
                    await self.ask(index)

    async def _wait_in_thread(self, wait_ns: int) -> None:
        """Wait, but not longer than until the threads are to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_ns / 1e9):
                await self._stop_reading.wait()

    async def _rounds(self) -> None:
        """Those of the migration thread, until the guest can be stopped."""
        settings, switchover, ram = self.side.settings, self.rule.whole, self.side.machine.ram
        while True:
            self._decided_ns = self.now_ns
            moved = await self._round(switchover)
            self._section_bytes += SECTION_BYTES * (1 if self.options.precopy_threads else 1 + len(self.fds))
            self._sample()
            if switchover.window_is_full(self._counted_bytes()):  # nothing is sent or decided before it is over
                await pause(switchover.window_left_ns(self.now_ns))
                self._sample()
            if self.out_of_time:
                self.note_force(ram.pending_bytes() + self._unread_bytes, self.held_up(self._unread_bytes))
                return
            if self.options.polls:
                await self._ask_devices()
            # migration_iteration_run: the exact figure costs, and is asked for only once the cheap one fits
            if self._fits(self._unread_bytes) and self._fits(await self._exact()) and self._can_switch_over():
                return
            if not moved:
                await pause(settings.idle_round_ns)

    async def _round(self, switchover: Switchover) -> bool:
        """RAM, then one read() on each device. Before each page and each device the window may be full: then the rest
        has no turn (qemu_savevm_state_iterate, ram_save_iterate). Returns whether there was anything to send."""
        settings, ram = self.side.settings, self.side.machine.ram
        moved = False
        until = self.now_ns + settings.ram_budget_ns
        while (budget_ns := until - self.now_ns) > 0 and not switchover.window_is_full(self._counted_bytes()):
            if (pages := await ram.take(budget_ns)) is None:
                await self.end_pass()
                break
            await self.send_pages(pages)
            moved = True
        for index in () if self.options.precopy_threads else self.fds:
            if switchover.window_is_full(self._counted_bytes()):
                return moved
            moved |= await self._turn(index)
        return moved

    async def _turn(self, index: int) -> bool:
        """Do one read() on a device, and send what comes. Returns whether there was anything to send."""
        known, out = self.known[index], self._out[index]
        async with known.mutex:
            data = await read_some(self.fds[index], self.read_bytes[index])
            if data is not None:
                known.read(len(data))
            if not data:  # ENOMSG, or 0 from a driver that returns that instead
                known.drained()
        moved = bool(data)
        if data:
            await out.send(Frame(Kind.DATA, index, payload=data))
            known.sent_bytes += len(data)
        elif self.rule.by_parts:
            await known.first_pass.ran_dry(out, 0)
        if self.options.ack is not Ack.OFF and known.initial_bytes == 0 and not known.sent:
            known.sent = True
            await out.send(Frame(Kind.INIT_DATA_SENT, index, value=known.requests))
            moved = True
        return moved

    def _counted_bytes(self) -> int:
        """What bandwidth and max-bandwidth count."""
        return self.bytes_sent() + self._section_bytes

    def _sample(self) -> None:
        ram_bytes = self.side.machine.ram.pending_bytes()
        self.rule.sample(self.now_ns, self._counted_bytes(), self.ram_bytes_sent, ram_bytes)

    def _fits(self, device_bytes: int) -> bool:
        return self.rule.fits(self.side.machine.ram.pending_bytes(), device_bytes)

    @property
    def _unread_bytes(self) -> int:
        """The devices' remaining bytes as far as the VMM knows without asking (QEMU's state_pending_estimate)."""
        return sum(known.unread_bytes for known in self.known)

    async def _exact(self) -> int:
        """The devices' remaining bytes, asked for, as RAM's are. That makes drained devices save what became dirty
        (QEMU's state_pending_exact).

        A device's part is MIG_DATA_SIZE. Then it is asked for what pre-copy has to give, before the next device.
        """
        await self.side.machine.ram.sync()
        remaining = 0
        for index, (device, known) in enumerate(zip(self.side.devices, self.known, strict=True)):
            size = await _stop_copy_bytes(device)
            if index in self.fds:
                await self.ask(index)
            if not known.unread_bytes and size != UNKNOWN_STOP_COPY_BYTES:
                known.stopped_only.drained(size)
            remaining += size
        return remaining

    @override
    async def left(self) -> list[Left]:
        await self.side.machine.ram.sync()
        parts = [Left("RAM", self.side.machine.ram.pending_bytes())]
        for device, known in zip(self.side.devices, self.known, strict=True):
            size = await _stop_copy_bytes(device)
            name = f"{device.name} (MIG_DATA_SIZE fails)" if size == UNKNOWN_STOP_COPY_BYTES else device.name
            parts.append(Left(name, size, min(size, known.stopped_only.bytes)))
        return parts

    @override
    def held_up(self, device_bytes: int) -> list[str]:
        lines, names = [], [device.name for device in self.side.devices]
        decided_ns = self.now_ns - self._decided_ns
        if decided_ns > HUNG * self.side.settings.give_up_ns:
            lines.append(f"the target did not take what was sent for {decided_ns / 1e9:.3g} s")
        lines += self.rule.held_up(names, self.side.machine.ram.pending_bytes(), device_bytes)
        if self._can_switch_over():
            return lines
        if unsent := [names[index] for index in self.fds if not self.known[index].sent]:
            lines.append(f"the initial data of {', '.join(unsent)} must be loaded first, and was not read to its end")
        elif self.options.ack is Ack.ONE_SHOT:
            lines.append("the target has not acknowledged that the initial data is loaded")
        else:
            late = [names[index] for index in self.fds if self.known[index].acked < self.known[index].requests]
            lines.append(f"the target has not acknowledged that the newest initial data of {', '.join(late)} is loaded")
        return lines

    async def _ask_devices(self) -> None:
        for index in self.fds:
            await self.ask(index)

    async def ask(self, index: int) -> bool:
        """GET_PRECOPY_INFO. Returns whether it reported REINIT. It does so once, so the need for a new ack is kept."""
        known = self.known[index]
        async with known.mutex:
            info = await self.fds[index].precopy_info()
            known.initial_bytes, known.dirty_bytes = info.initial_bytes, info.dirty_bytes
            if info.reinit:
                known.requests += 1
                known.sent = self.options.ack is Ack.ONE_SHOT and known.sent
        return info.reinit

    def _can_switch_over(self) -> bool:
        match self.options.ack:
            case Ack.ONE_SHOT:
                return self._all_acked
            case Ack.REUSABLE:
                return all(self.known[index].acked == self.known[index].requests for index in self.fds)
            case _:
                return True
