# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's one data fd: critical objects and blocks in one stream, and what GET_PRECOPY_INFO reports of it.

As in mlx5 (Linux drivers/vfio/pci/mlx5/main.c), GET_PRECOPY_INFO waits for the SAVE in flight. Once all is read, it
plans what became dirty; read() never does. New critical data, for a user who opted in to REINIT, is planned at once, by
one of two policies.
"""

from __future__ import annotations

import errno

from typing_extensions import override

from proto_v3.vfio.uapi import VFIO_MIG_GET_PRECOPY_INFO, PrecopyFlags, PrecopyInfo, State
from sim.clock.port import now_ns
from sim.device.record import NO_INDICES, STOP_COPY_SIZE_BYTES, Record
from sim.device.save import SaveStream
from sim.device.save_plan import SavePlan
from sim.device.state import DeviceState
from sim.device.stream import DriverLock, MigrationSession, fails


class V2Stream(SaveStream):
    """The whole state in one stream."""

    ioctls = frozenset({VFIO_MIG_GET_PRECOPY_INFO})

    def __init__(
        self, device: DeviceState, session: MigrationSession, fd_lock: DriverLock, *, reports_reinit: bool
    ) -> None:
        plan = SavePlan(0, device, session.driver, stripe=slice(None), objects=True)
        super().__init__(0, device, session, fd_lock, plan)
        self.reports_reinit = reports_reinit
        """The user opted in to PRECOPY_INFOv2."""
        self._told_epoch = 0
        """With priority: the newest epoch that was reported, or that the first image has."""

    @override
    def start_precopy(self) -> None:
        if self._driver.precopy == "incremental":
            # It says how much the target will have to take when the device is stopped (mlx5vf_add_stop_copy_header).
            self._append(self._plan.plain_record(STOP_COPY_SIZE_BYTES))
        super().start_precopy()
        self._told_epoch = self._plan.epoch

    @property
    def _ends_precopy_with_0(self) -> bool:
        return self._driver.precopy_end == "0"

    @override
    async def precopy_info(self) -> PrecopyInfo:
        await self._call()
        async with self._session.state_lock:  # mlx5vf_precopy_ioctl holds the state mutex throughout
            if self._session.device_state() not in (State.PRE_COPY, State.PRE_COPY_P2P):
                raise fails(errno.EINVAL)
            self.check_open()
            if self.suspended:  # no SAVE can be made, so what could be saved is not asked for either
                return self._info(PrecopyFlags(0))
            while self._queue.saving is not None:
                await self._notify.wait()
                self.check_open()
            self._device.advance(now_ns())
            if self._has_reinit():
                self._reinit()
                return self._info(PrecopyFlags.REINIT)
            unplanned_bytes = self._unplanned_bytes()
            if self._refill_if_drained():
                unplanned_bytes = 0  # they are in the plan now
            return self._info(PrecopyFlags(0), unplanned_bytes)

    def _has_reinit(self) -> bool:
        # Only a driver that saves what became new has new initial data to report: mlx5, so far.
        able = self._driver.precopy == "incremental" and self._driver.reinit != "none"
        told_epoch = self._told_epoch if self._overtakes else self._plan.epoch
        return self.reports_reinit and able and not self._plan.refused and self._device.epoch > told_epoch

    @override
    def _may_miss(self, record: Record) -> bool:
        """virtio: once the first context is read, one that cannot be read is left out (virtiovf_precopy_ioctl)."""
        return self._driver.precopy == "reread" and not record.initial

    def _info(self, flags: PrecopyFlags, unplanned_bytes: int = 0) -> PrecopyInfo:
        initial = self._queue.initial_bytes + self.buffer.initial_bytes + self._plan.planned_initial_bytes()
        dirty = self.pending_bytes() - initial + unplanned_bytes
        if flags or (initial and self._driver.initial == "image"):
            dirty = 0  # they count from the new initial data on; and mlx5 reports none before all initial data is read
        return PrecopyInfo(initial, round(dirty * self._driver.precopy_info_factor), flags=flags)

    @property
    def _critical_chunks(self) -> int:
        return 1 if self._driver.has_priority else 0

    @property
    def _overtakes(self) -> bool:
        return self.reports_reinit and self._driver.has_priority

    def epoch_began(self) -> None:
        """There is new critical data: with priority it is saved at once, whether or not anybody asks."""
        if self._overtakes and not (self.suspended or self._plan.refused or self._plan.final):
            self._plan.plan_objects(initial=False)
            self._plan_made()

    def _reinit(self) -> None:
        """Save new critical data at once, not when all is read. Records that come before it count as initial, too."""
        if self._overtakes:
            self._told_epoch = self._device.epoch
            self._plan.plan_objects(initial=True)
            self._queue.make_critical_initial(more=len(self._plan.objects) > 0)
            self.buffer.make_all_initial()
            self._plan_made()
            return
        invalidate = self._driver.reinit == "invalidate"
        if invalidate:
            self._drop_unread(lambda record: not record.initial)
        self._queue.make_all_initial()
        self.buffer.make_all_initial()
        if invalidate:  # blocks stay dirty, and are planned when the critical data is read
            self._plan.initial_objects = True
            self._plan.plan(self._plan.dirty_objects(), NO_INDICES)
            self._plan_made()
        else:
            self.plan_all(initial=True)

    def _unplanned_bytes(self) -> int:
        """Bytes of what became dirty since the plan was made.

        A driver that rereads reports a context only when it has it; one that checks has nothing to report.
        """
        return self._plan.unplanned_bytes() if self._driver.precopy == "incremental" else 0
