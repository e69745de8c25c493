# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's source, driven as QEMU drives it.

QEMU hw/vfio/migration.c, migration/migration.c: each round of the migration thread sends RAM for a while, then does one
read() of at most 1 MiB on each device, then checks whether the rest fits the downtime limit. After the stop: RAM, then
each device to its end, in turn, then their config. With multifd (`proto_v3/vmm/multifd`), RAM and, since QEMU 10.0, the
devices' stop-copy data use channels of their own.

In pre-copy a VMM knows of a device what GET_PRECOPY_INFO last answered, less what it read since. Only the next call can
show whether that is still right: between two calls, and between the last call and the stop, the device may have been
reconfigured.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from typing_extensions import override

from proto_v3.errors import ProtoV3Error
from proto_v3.timeline import Join, Work
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import MigrationFlags, State
from proto_v3.vmm.first_pass import FirstPass
from proto_v3.vmm.migration import HUNG, OutcomeKind, Side, Source, pause, read_some
from proto_v3.vmm.multifd import Senders
from proto_v3.vmm.stop_rule import StopRule
from proto_v3.vmm.switchover import Left, StoppedOnly, Switchover
from proto_v3.vmm.v2 import Ack, V2Options
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload

UNKNOWN_STOP_COPY_BYTES = 100 << 30
"""Assumed when MIG_DATA_SIZE fails, so that the downtime limit is not violated (QEMU, VFIO_MIG_STOP_COPY_SIZE)."""


READS_OF_A_DRAIN = 256
"""If reads are made as one, a device still takes at least so many. Each stage takes a whole piece in turn, so that
larger ones would be felt at both ends."""
SECTION_BYTES = 18
"""What a round sends of RAM, and of each device, even if that has nothing: header and footer of a section, 5 bytes
each, and an end mark of 8 (QEMU, save_section_header, save_section_footer, vfio_save_iterate). Only the measured
bandwidth counts them: an idle guest's is small, and not 0. Seen: 54 bytes a round with two devices, QEMU 11.1.3."""


class LateAckError(ProtoV3Error):
    """A device needs an ack after it was decided to stop: the migration fails, the guest goes on (QEMU 11.1)."""


class _Known:
    """What the source knows of a device in pre-copy."""

    what = ""  # it is all that a device has

    def __init__(self, device: int) -> None:
        self.device = device
        self.sent_bytes = 0  # total since the start
        self.first_pass = FirstPass(device, [0])
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


class V2Source(Source):
    """The sending VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V2Options) -> None:
        multifd = channels[1 : options.channels]
        senders = Senders(options.multifd, multifd, side.machine.wake_up) if options.multifd else None
        super().__init__(side, channels, senders)
        self._options = options
        self._main = channels[0]
        self._known = [_Known(index) for index in range(len(side.devices))]
        self._all_acked = False  # whether the one-shot ack was received
        self._late: list[int] = []
        """Devices that need an ack after it was decided to stop."""
        self._read_bytes: list[int] = []
        self._drain_bytes: list[int] = []
        """The same for reads after the stop, several of which may be made as one."""
        self._section_bytes = 0
        self._decided_ns = self.now_ns  # when the last round began
        self._rule: StopRule  # from the start of pre-copy
        self._saving = Join()
        """The save threads, and around them all from the start of pre-copy to the last byte."""

    @override
    def work(self) -> list[Work]:
        return self.senders.work() if self.senders else []

    @override
    async def move(self, start_ns: int) -> OutcomeKind | None:
        async with self._saving:
            # The first window counts the set-up, too (migration_thread, update_iteration_initial_status).
            self._rule = StopRule(self.side.settings, start_ns, by_parts=False)
            self.switchover = self._rule.whole
            outcome = await self.in_precopy(start_ns, self._open()) or await self._until_stopped(start_ns)
            if outcome is None:
                await self._check_late()
                await self._drain()
        return outcome

    async def _until_stopped(self, start_ns: int) -> OutcomeKind | None:
        """Pre-copy, until the guest is stopped for good: None. Else how pre-copy ended."""
        while (outcome := await self.in_precopy(start_ns, self._precopy())) is None:
            if await self.stop_guest():
                return None
        return outcome

    @override
    async def commit(self) -> None:
        self.back.commit()
        await self._main.send_control(Kind.END)

    @override
    def handle(self, frame: Frame) -> bool:
        known = self._known[frame.device] if frame.device < len(self._known) else None
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
            if self._options.reinit and self._has(index, MigrationFlags.PRE_COPY):
                try:
                    await device.set_precopy_info_v2()
                except OSError as error:
                    if error.errno != errno.ENOTTY:
                        raise

    async def _open(self) -> None:
        """Set up each device, one after the other: its size, its session, what it has (QEMU, vfio_save_setup)."""
        for index, (device, known) in enumerate(zip(self.side.devices, self._known, strict=True)):
            size = await _stop_copy_bytes(device)
            # No larger buffer than the device can fill.
            read_bytes = max(1, min(self.side.settings.read_bytes, size))
            self._read_bytes.append(read_bytes)
            at_once = min(self.side.settings.reads_at_once, size // (READS_OF_A_DRAIN * read_bytes))
            self._drain_bytes.append(read_bytes * max(1, at_once))
            if self._has(index, MigrationFlags.PRE_COPY):
                await self._enter(index, State.PRE_COPY)
                await self._ask(index)
                self._rule.add(known, self.now_ns)
            if size != UNKNOWN_STOP_COPY_BYTES:
                known.stopped_only.begins(size, size - known.unread_bytes)

    # --- pre-copy -----------------------------------------------------------------------------------------------------

    async def _precopy(self) -> None:
        """Iterate until the guest can be stopped."""
        settings, switchover, ram = self.side.settings, self._rule.whole, self.side.machine.ram
        while True:
            self._decided_ns = self.now_ns
            moved = await self._round(switchover)
            self._section_bytes += SECTION_BYTES * (1 + len(self.fds))
            self._sample()
            if switchover.window_is_full(self._counted_bytes()):  # nothing is sent or decided before it is over
                await pause(switchover.window_left_ns(self.now_ns))
                self._sample()
            if self.out_of_time:
                self.note_force(ram.pending_bytes() + self._unread_bytes, self.held_up(self._unread_bytes))
                return
            if self._options.polls:
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
        for index, fd in self.fds.items():
            if switchover.window_is_full(self._counted_bytes()):
                return moved
            known = self._known[index]
            data = await read_some(fd, self._read_bytes[index])
            if data is not None and len(data):
                known.read(len(data))
                await self._send_device_data(index, data)
                known.sent_bytes += len(data)
                moved = True
            else:  # ENOMSG, or 0 from a driver that returns that instead
                known.drained()
                if self._rule.by_parts:
                    await known.first_pass.ran_dry(self._main, 0)
            if self._options.ack is not Ack.OFF and known.initial_bytes == 0 and not known.sent:
                known.sent = True
                await self._main.send_control(Kind.INIT_DATA_SENT, index, value=known.requests)
                moved = True
        return moved

    def _counted_bytes(self) -> int:
        """What bandwidth and max-bandwidth count."""
        return self.bytes_sent() + self._section_bytes

    def _sample(self) -> None:
        ram_bytes = self.side.machine.ram.pending_bytes()
        self._rule.sample(self.now_ns, self._counted_bytes(), self.ram_bytes_sent, ram_bytes)

    def _fits(self, device_bytes: int) -> bool:
        return self._rule.fits(self.side.machine.ram.pending_bytes(), device_bytes)

    @property
    def _unread_bytes(self) -> int:
        """The devices' remaining bytes as far as the VMM knows without asking (QEMU's state_pending_estimate)."""
        return sum(known.unread_bytes for known in self._known)

    async def _exact(self) -> int:
        """The devices' remaining bytes, asked for, as RAM's are. That makes drained devices save what became dirty
        (QEMU's state_pending_exact).

        A device's part is MIG_DATA_SIZE. Then it is asked for what pre-copy has to give, before the next device.
        """
        await self.side.machine.ram.sync()
        remaining = 0
        for index, (device, known) in enumerate(zip(self.side.devices, self._known, strict=True)):
            size = await _stop_copy_bytes(device)
            if index in self.fds:
                await self._ask(index)
            if not known.unread_bytes and size != UNKNOWN_STOP_COPY_BYTES:
                known.stopped_only.drained(size)
            remaining += size
        return remaining

    @override
    async def left(self) -> list[Left]:
        await self.side.machine.ram.sync()
        parts = [Left("RAM", self.side.machine.ram.pending_bytes())]
        for device, known in zip(self.side.devices, self._known, strict=True):
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
        lines += self._rule.held_up(names, self.side.machine.ram.pending_bytes(), device_bytes)
        if self._can_switch_over():
            return lines
        if unsent := [names[index] for index in self.fds if not self._known[index].sent]:
            lines.append(f"the initial data of {', '.join(unsent)} must be loaded first, and was not read to its end")
        elif self._options.ack is Ack.ONE_SHOT:
            lines.append("the target has not acknowledged that the initial data is loaded")
        else:
            late = [names[index] for index in self.fds if self._known[index].acked < self._known[index].requests]
            lines.append(f"the target has not acknowledged that the newest initial data of {', '.join(late)} is loaded")
        return lines

    async def _ask_devices(self) -> None:
        for index in self.fds:
            await self._ask(index)

    async def _ask(self, index: int) -> bool:
        """GET_PRECOPY_INFO. Returns whether it reported REINIT. It does so once, so the need for a new ack is kept."""
        info = await self.fds[index].precopy_info()
        known = self._known[index]
        known.initial_bytes, known.dirty_bytes = info.initial_bytes, info.dirty_bytes
        if info.reinit:
            known.requests += 1
            known.sent = self._options.ack is Ack.ONE_SHOT and known.sent
        return info.reinit

    def _can_switch_over(self) -> bool:
        match self._options.ack:
            case Ack.ONE_SHOT:
                return self._all_acked
            case Ack.REUSABLE:
                return all(self._known[index].acked == self._known[index].requests for index in self.fds)
            case _:
                return True

    @override
    async def last_look(self, index: int) -> None:
        """QEMU 11.1 looks for REINIT once more during the switchover, right before a device's PRE_COPY_P2P, in which
        mlx5 reports none. With the vCPUs stopped the answer is final."""
        if self.out_of_time:  # no ack is waited for (migration_can_switchover)
            return
        if self._options.ack is Ack.REUSABLE and index in self.fds and await self._ask(index):
            self._late.append(index)

    async def _check_late(self) -> None:
        """LateAckError if the last look found that an ack is needed. QEMU 11.1 notices it only in its last query of
        what is pending, when all devices are stopped and RAM is synced."""
        if self._late:
            await self.side.machine.ram.final_sync()
            names = [self.side.devices[index].name for index in sorted(self._late)]
            count = f"{len(self._late)} device{'s' if len(self._late) > 1 else ''}"
            raise LateAckError(
                f"{', '.join(names)} reported REINIT after it was decided to stop: its ack comes too late "
                f"(switchover-ack was requested by {count} during switchover)"
            )

    # --- stop-copy ----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """RAM and every device to their ends, then the devices' config. Save threads go on to theirs."""
        devices = range(len(self.side.devices))
        if self._options.devices_by_multifd:
            if not self._options.early_save:
                await self._main.send_control(Kind.SWITCHOVER_START)
                for index in devices:
                    self._start_to_save(index)
            await self.save_last_ram()
            return
        await self.save_last_ram()
        for index in devices:
            start = self.now_ns
            await self._main.send_control(Kind.DEVICE_BEGIN, index)
            fd = await self.ready_to_drain(index)
            while len(data := await fd.read(self._drain_bytes[index])):
                await self._send_device_data(index, data)
            await self._main.send_control(Kind.STREAM_END, index)
            self.side.timeline.stage("device_save", start, index)
        for index in devices:
            await self._main.send_control(Kind.CONFIG, index)

    @override
    async def check_in_p2p(self) -> bool:
        """With retries left, a late ack takes the order to stop back: the devices are in PRE_COPY_P2P at most, from
        where there is a way to PRE_COPY. From STOP_COPY, where QEMU finds it, there is none."""
        if self._late and self.counters.retries < self._options.max_retries:
            self._late.clear()
            return False
        if self._options.early_save:
            await self._main.send_control(Kind.SWITCHOVER_START)
        return True

    @override
    def device_stopped(self, index: int) -> None:
        if self._options.early_save:
            self._start_to_save(index)

    def _start_to_save(self, index: int) -> None:
        """Start a device's save thread, with multifd."""
        assert self.senders is not None
        work = self.senders.save_device(self, index, self._drain_bytes[index])
        self._saving.start(work, f"source {self.side.devices[index].name} save")

    async def _send_device_data(self, index: int, data: Payload) -> None:
        await self.side.machine.buffer_device_data(len(data))
        await self._main.send(Frame(Kind.DATA, index, payload=data))
