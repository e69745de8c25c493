# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's data fds that are saved: a critical stream, and dirty streams that each have blocks of their own.

New critical data is planned as soon as it is there, on the critical stream alone; nobody has to ask. A record carries
the epoch in which its versions were taken. With the policy `invalidate`, a new epoch makes everything dirty again that
was ever handed out of the blocks that it names: the target will drop what is on its way and undo what it has loaded.
Records of them that nobody began to read are dropped here. See docs/protocol-v3.md.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import VFIO_MIG_GET_STREAM, VFIO_MIG_GET_STREAM_INFO, StreamInfo
from sim.clock.port import now_ns
from sim.device.record_format import BlockRange
from sim.device.save import SaveStream
from sim.device.save_plan import CriticalPlan, V3Plan
from sim.device.state import DeviceState
from sim.device.stream import DriverLock, MigrationSession, fails


class V3Stream(SaveStream):
    """What both kinds share."""

    ioctls = frozenset({VFIO_MIG_GET_STREAM_INFO})
    _plan: V3Plan

    @override
    def ready(self) -> Ready:
        return super().ready() | self.ready_at_the_end()

    @override
    def _save_failed(self) -> None:
        self._session.fail()

    @override
    async def stream_info(self) -> StreamInfo:
        await self._call()
        self.check_open()
        self._device.advance(now_ns())
        self._before_info()
        return StreamInfo(self._plan.newest_epoch, self._reported_bytes())

    def _before_info(self) -> None:
        """Called by stream_info(), before it counts."""

    def _reported_bytes(self) -> int:
        """What stream_info() says is unread."""
        return self.pending_bytes()


class CriticalStream(V3Stream):
    """The critical objects, and all reports of epochs."""

    ioctls = frozenset({VFIO_MIG_GET_STREAM_INFO, VFIO_MIG_GET_STREAM})
    _plan: CriticalPlan

    def __init__(self, device: DeviceState, session: MigrationSession, fd_lock: DriverLock) -> None:
        super().__init__(0, device, session, fd_lock, CriticalPlan(device, session.driver))
        self.dirty: Sequence[DataFd] = ()
        """The session's other fds."""
        device.advance(now_ns())
        self._seen_epoch = self._plan.newest_epoch

    def epoch_began(self, invalidates: Sequence[BlockRange]) -> None:
        """There is new critical data: save it at once."""
        if self._plan.only_checks:
            return
        self._plan.epoch_began(invalidates)
        if not self._plan.final:
            self.plan_all()

    @property
    def completed_epoch(self) -> int:
        """The newest epoch whose critical data is saved, or being saved."""
        return self._plan.completed_epoch

    @property
    def _has_new_epoch(self) -> bool:
        return self._plan.newest_epoch > self._seen_epoch

    @override
    def ready(self) -> Ready:
        ready = super().ready()
        return ready | Ready.NEW_EPOCH if self._has_new_epoch else ready

    async def new_epoch(self) -> None:
        """Wait until the epoch grew since the last stream_info(), or the session is over."""
        while not (self._has_new_epoch or self.over):
            await self._notify.wait()

    @override
    async def stream_info(self) -> StreamInfo:
        info = await super().stream_info()
        self._seen_epoch = info.epoch
        return info

    @override
    async def get_stream(self, index: int) -> DataFd:
        self.check_open()
        if not 0 <= index < len(self.dirty):
            raise fails(errno.EINVAL)
        return self.dirty[index]


class DirtyStream(V3Stream):
    """The blocks of one stripe."""

    def __init__(
        self, index: int, device: DeviceState, session: MigrationSession, fd_lock: DriverLock, stripe: slice
    ) -> None:
        plan = V3Plan(index, device, session.driver, stripe=stripe, objects=False)
        super().__init__(index, device, session, fd_lock, plan)

    @override
    def start_precopy(self) -> None:
        if self._driver.precopy != "check":  # the bytes by which the target is checked are critical
            super().start_precopy()

    @override
    def _before_info(self) -> None:
        if not self.suspended:
            self._refill_if_drained()

    @override
    def _reported_bytes(self) -> int:
        return round(self.pending_bytes() * self._driver.precopy_info_factor)

    @property
    def given_epoch(self) -> int:
        """The newest epoch of what was read; 0: nothing was."""
        return self._queue.given_epoch

    @override
    def refuse(self) -> None:
        """What nobody began to read is dropped: critical data that it waits for may not come before the stop."""
        self._drop_unread(lambda record: True)
        super().refuse()

    def invalidate(self, blocks: BlockRange) -> None:
        """Drop saved records of these blocks that nobody began to read: they need not be sent any more."""
        last = blocks.first_block + blocks.blocks
        self._drop_unread(
            lambda record: (
                len(record.blocks) > 0 and bool(np.all((record.blocks >= blocks.first_block) & (record.blocks < last)))
            )
        )
        self._notify.notify()
