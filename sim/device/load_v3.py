# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's data fds that are loaded: dirty records wait for their epoch's critical data, critical records do not wait.

No write holds the device's state mutex: a dirty stream's write that waits for its epoch would keep out the critical
data that it waits for. The driver holds no more of a stream than the record that is coming in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import VFIO_MIG_GET_STREAM, VFIO_MIG_GET_STREAM_INFO, PrecopyInfo, StreamInfo
from sim.device.load import LoadedFd, LoadSession, LoadStream
from sim.device.record import Record
from sim.device.record_format import MAX_EPOCHS_AHEAD
from sim.device.state import Image
from sim.device.stream import DriverLock, MigrationSession, fails
from sim.scenario.device import Device


class V3LoadSession(LoadSession):
    """Beside the image: which epochs are loaded, and from which on each block's data is valid."""

    def __init__(self, image: Image, spec: Device, session: MigrationSession, streams: int) -> None:
        super().__init__(image, spec, session, streams)
        self._name = spec.name
        self._block_bytes = spec.block_bytes
        self._epoch_loaded = 0
        self._last_epoch = 0  # that an END names
        self._critical_ended = False
        self._valid_from = np.zeros(spec.blocks, np.int32)
        """By block: data of earlier epochs is invalid."""

    @override
    def check_whole(self) -> None:
        """Leaving RESUMING: ENODATA unless every END and the newest epoch's critical data are there."""
        self.check_open()
        why = ""
        if self._open_streams:
            why = f"{self._open_streams} of its streams did not come to their END"
        elif self._epoch_loaded < self._last_epoch:
            why = f"critical data of epoch {self._last_epoch} is not there, only up to epoch {self._epoch_loaded}"
        if why:
            self.session.log.add(why)
            raise OSError(errno.ENODATA, f"{self._name}: {why}")

    @override
    def refuse(self, code: int, why: str) -> OSError:
        """The error of a write() of something that is not the source's stream: `code`. The device is in ERROR then."""
        self.session.log.add(why)
        self.session.fail()
        return OSError(code, f"{self._name} {why}")

    @override
    def load_failed(self) -> None:
        self.session.fail()

    @override
    async def load(self, record: Record) -> None:
        """Load one whole record; a dirty one waits for its epoch first."""
        self._check_there(record)
        if record.end or not len(record.blocks):
            await super().load(record)
            return
        await self.until_epoch_loaded(record)
        valid = self._valid(record)
        self.counters.overtaken_bytes += (len(record.blocks) - int(valid.sum())) * self._block_bytes
        if not valid.any():
            return
        await self._load_command(record.size_bytes)
        still = self._valid(record)  # an epoch may have come in the meantime
        self.counters.undone_bytes += int((valid & ~still).sum()) * self._block_bytes
        self._put(record, still)
        await self._loaded()

    async def until_epoch_loaded(self, record: Record) -> None:
        """Wait until a dirty record may be loaded. Nobody else has to wait meanwhile, whatever he does."""
        while self.must_wait(record):
            what = f"stream {record.stream}: record {record.sequence} waits for epoch {record.epoch}"
            if self._critical_ended:
                raise self.refuse(errno.EPROTO, f"{what}, which never came: {self._epoch_loaded} was the last")
            if self._epoch_loaded and record.epoch > self._epoch_loaded + MAX_EPOCHS_AHEAD:
                raise self.refuse(errno.E2BIG, f"{what}; {self._epoch_loaded} was the last, and that is too far ahead")
            await self._notify.wait()
            self.check_open()

    def must_wait(self, record: Record) -> bool:
        """Whether the critical data of a dirty record's epoch is not loaded."""
        return not record.end and len(record.blocks) > 0 and self._epoch_loaded < record.epoch

    def _check_there(self, record: Record) -> None:
        """E2BIG for more blocks or objects than the device has, EPROTO for one that it does not have, or epoch 0."""
        if record.epoch < 1:
            what = f"stream {record.stream}: record {record.sequence}"
            raise self.refuse(errno.EPROTO, f"{what} is of epoch {record.epoch}")
        of_device = ((record.blocks, self.image.version), (record.objects, self.image.object_version))
        for numbers, there in of_device:
            if len(numbers) > len(there):
                what = f"stream {record.stream}: record {record.sequence} has {len(numbers)} blocks or objects"
                raise self.refuse(errno.E2BIG, f"{what}; the device has {len(there)}")
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(there):
                what = f"stream {record.stream}: record {record.sequence} has {numbers.min()} to {numbers.max()}"
                raise self.refuse(errno.EPROTO, f"{what}; the device has 0 to {len(there) - 1}")

    def _put(self, record: Record, valid: NDArray[np.bool_]) -> None:
        self.image.version[record.blocks[valid]] = record.block_versions[valid]
        if record.data is not None and self.image.place is not None:
            self.image.place(record.blocks, record.data, valid)

    def _valid(self, record: Record) -> NDArray[np.bool_]:
        """Mask of a record's blocks that no later epoch made invalid."""
        return self._valid_from[record.blocks] <= record.epoch

    async def _set_up(self, record: Record, start_ns: int) -> None:
        await super()._set_up(record, start_ns)
        if not record.epoch_complete:
            return
        for each in record.invalidates:
            undone = int(np.count_nonzero(self.image.version[each.slice] >= 0))
            self.counters.undone_bytes += undone * self._block_bytes
            self.image.version[each.slice] = -1
            self._valid_from[each.slice] = each.epoch
        self._epoch_loaded = max(self._epoch_loaded, record.epoch)
        self._notify.notify()

    async def _end_stream(self, record: Record) -> None:
        self._last_epoch = max(self._last_epoch, record.epoch)
        if record.stream == 0:
            self._critical_ended = True
            self._notify.notify()
        await super()._end_stream(record)


class V3LoadedFd(LoadedFd):
    """What v3's kinds share."""

    ioctls = frozenset({VFIO_MIG_GET_STREAM_INFO})
    session: V3LoadSession
    nonblocking = False
    """O_NONBLOCK: write() does not wait for an epoch, but fails with EAGAIN."""

    @property
    def waits(self) -> bool:
        """Whether a write() would wait for an epoch before it takes a byte."""
        return False

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Wait until a write() would take a byte."""
        if timeout_ns != 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    while self.waits and not self.session.over:
                        await self.session.changed()
        ready = Ready.NOTHING if self.waits and not self.session.over else Ready.WRITABLE
        return ready | self.session.ready_at_the_end()

    @override
    async def precopy_info(self) -> PrecopyInfo:
        """v2's."""
        raise fails(errno.ENOTTY)

    @override
    async def stream_info(self) -> StreamInfo:
        """Not in RESUMING: EINVAL."""
        self.session.check_open()
        raise fails(errno.EINVAL)


class V3LoadStream(V3LoadedFd, LoadStream):
    """A stream of records; stream 0 is the critical one."""

    def __init__(self, index: int, session: V3LoadSession, fd_lock: DriverLock) -> None:
        LoadStream.__init__(self, index, session, fd_lock)
        if index == 0:
            self.ioctls |= {VFIO_MIG_GET_STREAM}
        self.dirty: Sequence[DataFd] = ()
        """Of the critical stream: the session's other fds."""
        self._next: Record | None = None
        """The record that a write() waits with, or gave up to wait with."""

    @property
    @override
    def waits(self) -> bool:
        return self._next is not None and self.session.must_wait(self._next)

    @override
    async def _until_due(self, record: Record, start: int) -> int:
        """Wait for a dirty record's epoch. Its last byte is taken after that: whoever is interrupted loses none."""
        session = self.session
        if not session.must_wait(record):
            return start
        self._check_kind(record)
        last = record.size_bytes - 1
        if start < last:
            self._queue.add(record, start, last)
        self._next = record
        try:
            if self.nonblocking:
                error = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                error.characters_written = last - start
                raise error
            await session.until_epoch_loaded(record)
        except BaseException:
            session.hold(-1)
            raise
        return last

    @override
    def _check_kind(self, record: Record) -> None:
        strange = len(record.blocks) > 0 if self._index == 0 else len(record.objects) > 0 or record.epoch_complete
        if strange:
            why = f"stream {self._index}: a {record.record_class.name} record does not belong there"
            raise self.session.refuse(errno.EPROTO, why)

    @override
    async def get_stream(self, index: int) -> DataFd:
        self.session.check_open()
        if self._index:
            raise fails(errno.ENOTTY)
        if not 0 <= index < len(self.dirty):
            raise fails(errno.EINVAL)
        return self.dirty[index]
