"""v3's data fds that are saved: a critical stream, and dirty streams that each have blocks of their own.

New critical data is planned as soon as it is there, on the critical stream alone; nobody has to ask. A record tells the
epoch in which its versions were taken. With the policy `invalidate`, a new epoch makes dirty again what was ever handed
out of the blocks that it names: the target will drop what is on its way and undo what it has loaded. What nobody began
to read of it is dropped here. See docs/protocol-v3.md.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np

from proto_v3.vfio import uapi
from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import BlockRange, StreamInfo
from sim.clock.port import now_ns
from sim.device.record import V3_HEADER_BYTES, Record
from sim.device.save import SaveStream
from sim.device.state import DeviceState
from sim.device.stream import DriverLock, MigrationSession, fails


class V3Stream(SaveStream):
    """What both kinds share."""

    header_bytes = V3_HEADER_BYTES
    end_bytes = uapi.RecordEnd.SIZE

    def _save_failed(self) -> None:
        self._session.fail()

    async def stream_info(self) -> StreamInfo:
        """See proto_v3.vfio.device.DataFd."""
        await self._call()
        self._check_open()
        self._device.advance(now_ns())
        if self._stripe is not None and not self.suspended:  # critical data is saved as soon as it is there
            self._refill_if_drained()
        return StreamInfo(self._epoch, self.pending_bytes())

    @property
    def _only_checks(self) -> bool:
        """Nothing of the state comes before the device is stopped."""
        return self._driver.precopy == "check" and not self._final

    @property
    def _epoch(self) -> int:
        """The newest that a reader is told of: the first, as long as nothing comes of any."""
        return 1 if self._only_checks else self._device.epoch


class CriticalStream(V3Stream):
    """The critical objects, and all that there is to tell of epochs."""

    def __init__(self, device: DeviceState, session: MigrationSession, fd_lock: DriverLock) -> None:
        super().__init__(0, device, session, fd_lock, stripe=None, objects=True)
        self.dirty: Sequence[DataFd] = ()
        """The session's other fds."""
        self._seen_epoch = 0
        self._untold: list[BlockRange] = []

    def epoch_began(self, invalidates: Sequence[BlockRange]) -> None:
        """There is new critical data: save it at once."""
        if self._only_checks:
            return
        self._untold += invalidates
        if not self._final:
            self.plan_all()

    def _new_epoch(self) -> bool:
        return not self._only_checks and self._device.epoch > self._told_epoch

    def _complete_epoch(self, record: Record) -> None:
        self._told_epoch = self._device.epoch
        record.invalidates, self._untold = tuple(self._untold), []

    def _ready(self) -> Ready:
        ready = super()._ready()
        return ready | Ready.NEW_EPOCH if self._epoch > self._seen_epoch else ready

    async def new_epoch(self) -> None:
        """Wait until the epoch grew since the last stream_info(), or the session is over."""
        while not (self._epoch > self._seen_epoch or self._closed):
            await self._notify.wait()

    async def stream_info(self) -> StreamInfo:
        """See proto_v3.vfio.device.DataFd."""
        info = await super().stream_info()
        self._seen_epoch = info.epoch
        return info

    async def get_stream(self, index: int) -> DataFd:
        """See proto_v3.vfio.device.DataFd."""
        self._check_open()
        if not 0 <= index < len(self.dirty):
            raise fails(errno.EINVAL)
        return self.dirty[index]


class DirtyStream(V3Stream):
    """The blocks of one stripe."""

    def __init__(
        self, index: int, device: DeviceState, session: MigrationSession, fd_lock: DriverLock, stripe: slice
    ) -> None:
        super().__init__(index, device, session, fd_lock, stripe=stripe, objects=False)

    def start_precopy(self) -> None:
        """See sim.device.save.SaveStream; the bytes by which the target is checked are critical."""
        if self._driver.precopy != "check":
            super().start_precopy()

    def invalidate(self, blocks: BlockRange) -> None:
        """What is saved of these blocks and nobody began to read need not be sent any more."""
        last = blocks.first_block + blocks.blocks
        self._drop_unread(
            lambda record: (
                len(record.blocks) > 0 and bool(np.all((record.blocks >= blocks.first_block) & (record.blocks < last)))
            )
        )
        self._notify.notify()
