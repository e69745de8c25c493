"""v2's one data fd: critical objects and blocks in one stream, and what GET_PRECOPY_INFO tells of it.

As mlx5 does it (Linux drivers/vfio/pci/mlx5/main.c): GET_PRECOPY_INFO waits for the SAVE in flight, and, once all is
read, plans what became dirty: read() never does. New critical data, for a user who opted in to REINIT, is planned at
once, by one of two policies.
"""

from __future__ import annotations

import errno

from proto_v3.vfio.uapi import PrecopyFlags, PrecopyInfo
from sim.clock.port import now_ns
from sim.device.record import NO_INDICES, STOP_COPY_SIZE_BYTES
from sim.device.save import SaveStream
from sim.device.state import DeviceState, Indices
from sim.device.stream import DriverLock, MigrationSession, fails


class V2Stream(SaveStream):
    """The whole state in one stream."""

    def __init__(
        self, device: DeviceState, session: MigrationSession, fd_lock: DriverLock, *, reports_reinit: bool
    ) -> None:
        super().__init__(0, device, session, fd_lock, stripe=slice(None), objects=True)
        self.reports_reinit = reports_reinit
        """The user opted in to PRECOPY_INFOv2."""

    def start_precopy(self) -> None:
        """See sim.device.save.SaveStream."""
        if self._driver.precopy == "check":
            self._told_epoch = self._device.epoch
        if self._driver.precopy == "incremental":
            # It tells the target how much it will have to take when the device is stopped
            # (mlx5vf_add_stop_copy_header).
            self._append(self._new_record(payload_bytes=STOP_COPY_SIZE_BYTES, initial=True))
        super().start_precopy()

    def _plan(self, objects: Indices, blocks: Indices) -> None:
        self._told_epoch = self._device.epoch
        super()._plan(objects, blocks)

    @property
    def _ends_precopy_with_0(self) -> bool:
        return self._driver.precopy_end == "0"

    async def precopy_info(self) -> PrecopyInfo:
        """See proto_v3.vfio.device.DataFd."""
        await self._call()
        async with self._session.state_lock:  # mlx5vf_precopy_ioctl holds the state mutex throughout
            self._check_open()
            if self._final:
                raise fails(errno.EINVAL)
            if self.suspended:  # no SAVE can be made, so what could be saved is not asked for either
                return self._told(PrecopyFlags(0))
            while self._saving is not None:
                await self._notify.wait()
                self._check_open()
            self._device.advance(now_ns())
            if self._reports_reinit_now():
                self._reinit()
                return self._told(PrecopyFlags.REINIT)
            undone = self._undone_bytes()
            if self._refill_if_drained():
                undone = 0  # it is in the plan now
            return self._told(PrecopyFlags(0), undone)

    def _reports_reinit_now(self) -> bool:
        # Only a driver that saves what became new has new initial data to tell of: mlx5, so far.
        able = self._driver.precopy == "incremental" and self._driver.reinit != "none"
        return self.reports_reinit and able and self._device.epoch > self._told_epoch

    def _told(self, flags: PrecopyFlags, undone_bytes: int = 0) -> PrecopyInfo:
        initial = self._initial_bytes()
        dirty = self.pending_bytes() - initial + undone_bytes
        if flags or (initial and self._driver.initial == "image"):
            dirty = 0  # they count from the new initial data on; and mlx5 tells of none before all initial data is read
        return PrecopyInfo(initial, dirty, flags)

    def _reinit(self) -> None:
        """New critical data, to be saved at once, not when all is read."""
        if self._driver.reinit == "invalidate":
            self._drop_unread(lambda record: not record.initial)
            for record in self._records:  # initial data stays, and what was begun is read to its end
                record.initial = True
            self.outlet.all_initial()
            self._plan_initial = True
            self._plan(self._dirty_objects(), NO_INDICES)  # blocks stay dirty, and are planned when this is read
        else:
            for record in self._records:  # they must be read before the new ones can be: so they count with them
                record.initial = True
            self.outlet.all_initial()
            self.plan_all(initial=True)

    def _undone_bytes(self) -> int:
        """What the device could save now besides what is planned: it became dirty since."""
        if self._driver.precopy != "incremental":
            # One that rereads tells of a context only when it has it; one that checks has nothing to tell of.
            return 0
        objects, blocks = self._dirty_objects(), self._dirty_blocks(stopped=False)
        # What is planned is dirty too, until its SAVE starts; only the numbers matter here.
        objects = objects[: len(objects) - len(self._plan_objects)]
        return self._planned_bytes(objects, blocks[: len(blocks) - len(self._plan_blocks)])

    def _initial_bytes(self) -> int:
        """What is left of the data that counts as initial."""
        unread = sum(record.size_bytes for record in self._records if record.initial)
        if self._records and self._records[0].initial:
            unread -= self._offset
        unread += self.outlet.initial_bytes
        if self._saving and self._saving.initial:
            unread += self._saving.size_bytes
        if self._plan_initial:
            blocks = self._plan_blocks if self._driver.initial == "image" else NO_INDICES
            unread += self._planned_bytes(self._plan_objects, blocks)
        return unread
