# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's source from the order to stop on, driven as QEMU drives it. What comes before is in `v2_precopy`.

After the stop: RAM, then each device to its end, in turn, then their config. With multifd (`proto_v3/vmm/multifd`), RAM
and, since QEMU 10.0, the devices' stop-copy data use channels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from proto_v3.errors import ProtoV3Error
from proto_v3.timeline import Join, Work
from proto_v3.vmm.migration import OutcomeKind, Side
from proto_v3.vmm.stop_rule import StopRule
from proto_v3.vmm.v2 import Ack, V2Options
from proto_v3.vmm.v2_precopy import V2Precopy
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind


class LateAckError(ProtoV3Error):
    """A device needs an ack after it was decided to stop: the migration fails, the guest goes on (QEMU 11.1)."""


class V2Source(V2Precopy):
    """The sending VMM."""

    def __init__(self, side: Side, channels: Sequence[Channel], options: V2Options) -> None:
        super().__init__(side, channels, options)
        self._main = channels[0]
        self._late: list[int] = []
        """Devices that need an ack after it was decided to stop."""
        self._saving = Join()
        """The save threads, and around them all from the start of pre-copy to the last byte."""

    @override
    def work(self) -> list[Work]:
        return self.senders.work() if self.senders else []

    @override
    async def move(self, start_ns: int) -> OutcomeKind | None:
        async with self._saving:
            # The first window counts the set-up, too (migration_thread, update_iteration_initial_status).
            self.rule = StopRule(self.side.settings, start_ns, by_parts=False)
            self.switchover = self.rule.whole
            outcome = await self.in_precopy(start_ns, self.open()) or await self._until_stopped(start_ns)
            if outcome is None:
                await self._check_late()
                await self._drain()
        return outcome

    async def _until_stopped(self, start_ns: int) -> OutcomeKind | None:
        """Pre-copy, until the guest is stopped for good: None. Else how pre-copy ended."""
        while (outcome := await self.in_precopy(start_ns, self.iterate())) is None:
            if await self.stop_guest():
                return None
        return outcome

    @override
    async def commit(self) -> None:
        self.back.commit()
        await self._main.send_control(Kind.END)

    @override
    async def last_look(self, index: int) -> None:
        """QEMU 11.1 looks for REINIT once more during the switchover, right before a device's PRE_COPY_P2P, in which
        mlx5 reports none. With the vCPUs stopped the answer is final."""
        if self.out_of_time:  # no ack is waited for (migration_can_switchover)
            return
        if self.options.ack is Ack.REUSABLE and index in self.fds and await self.ask(index):
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

    @override
    async def check_in_p2p(self) -> bool:
        """With retries left, a late ack takes the order to stop back: the devices are in PRE_COPY_P2P at most, from
        where there is a way to PRE_COPY. From STOP_COPY, where QEMU finds it, there is none."""
        if self._late and self.counters.retries < self.options.max_retries:
            self._late.clear()
            return False
        if self.options.early_save:
            await self._main.send_control(Kind.SWITCHOVER_START)
        return True

    @override
    def device_stopped(self, index: int) -> None:
        if self.options.early_save:
            self._start_to_save(index)

    def _start_to_save(self, index: int) -> None:
        """Start a device's save thread, with multifd."""
        assert self.senders is not None
        work = self.senders.save_device(self, index, self.drain_bytes[index])
        self._saving.start(work, f"source {self.side.devices[index].name} save")

    async def _drain(self) -> None:
        """RAM and every device to their ends, then the devices' config. Save threads go on to theirs."""
        devices = range(len(self.side.devices))
        if self.options.devices_by_multifd:
            if not self.options.early_save:
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
            while len(data := await fd.read(self.drain_bytes[index])):
                await self.main.send(Frame(Kind.DATA, index, payload=data))
            await self._main.send_control(Kind.STREAM_END, index)
            self.side.timeline.stage("device_save", start, index)
        for index in devices:
            await self._main.send_control(Kind.CONFIG, index)
