# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's fd of blocks: any block by number, by any thread, in any order; the newest version wins.

At the source a bitmap shows which blocks changed since it was last fetched; each read_blocks() is a SAVE of its own.
At the target each record has a version a block: a block that is older than the one that is there is dropped. The END
record carries a digest over the versions of all blocks, as they are in STOP_COPY. Critical data, epochs and what they
make invalid are as with streams.
"""

from __future__ import annotations

import errno
from contextlib import nullcontext
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from proto_v3.vfio.device import BlocksFd, DirtyBlocks, Ready
from proto_v3.vfio.uapi import VFIO_MIG_GET_DIRTY_BLOCKS, VFIO_MIG_GET_STREAM_INFO, StreamInfo
from proto_v3.wire.frames import EMPTY, Payload
from sim.clock.port import now_ns
from sim.device import record_format
from sim.device.guest import Int32
from sim.device.load_v3 import V3LoadedFd, V3LoadSession
from sim.device.record import V3_HEADER_BYTES, Extent, Record, RecordSlice, Tally
from sim.device.record_format import BlockRange
from sim.device.state import DeviceState
from sim.device.stream import DriverLock, MigrationSession, SavedFd, WriteOnlyBlocksFd, fails

VERSION_BYTES = 8
"""Of each block's version in a BLOCKS record."""


def tally(version: Int32) -> Tally:
    """The END's tally: of all blocks, as they are."""
    return Tally(len(version), 0, crc32(version.tobytes()))


class SaveBlocks(SavedFd, BlocksFd):
    """The fd to read from."""

    ioctls = frozenset({VFIO_MIG_GET_STREAM_INFO, VFIO_MIG_GET_DIRTY_BLOCKS})

    def __init__(self, device: DeviceState, session: MigrationSession, fd_lock: DriverLock) -> None:
        super().__init__(session)
        self._device = device
        self._fd_lock = fd_lock
        self._command_lock: DriverLock = fd_lock if session.driver.lock_over == "command" else nullcontext()
        self._reported = np.full(len(device.version), -1, np.int32)
        """By block: its version when a bitmap last had it."""
        self._suspended = False
        self._final = False
        self._end_read = False
        self._in_flight = 0  # SAVEs
        self._reading = 0  # calls of read_blocks()
        self._sequence = 0
        self._refused = False  # firmware refused a SAVE in pre-copy
        self.given_epoch = 0
        """The newest epoch of what was read; 0: nothing was."""
        self._held_bytes = 0

    @property
    def suspended(self) -> bool:
        """The device is in PRE_COPY_P2P: no SAVE can be made."""
        return self._suspended

    @suspended.setter
    def suspended(self, suspended: bool) -> None:
        self._suspended = suspended
        self._notify.notify()

    def start_precopy(self) -> None:
        """The session starts in pre-copy: nothing is saved before read_blocks() asks for it."""

    def finish(self) -> None:
        """The device is stopped."""
        self._final, self._suspended = True, False
        self._notify.notify()

    async def settle(self) -> None:
        """Wait for the SAVEs in flight: the device is suspended only after them."""
        while self._in_flight and not self.over:
            await self._notify.wait()

    def invalidate(self, blocks: BlockRange) -> None:
        """These blocks are dirty again, whatever the last bitmap said."""
        self._reported[blocks.slice] = -1

    def refuse(self) -> None:
        """Firmware refused a SAVE of the session: all blocks are dirty again, and come when the device is stopped."""
        self._refused = True
        self._reported.fill(-1)
        self._device.forget_saves(objects=False)
        self._notify.notify()

    @property
    def _only_when_stopped(self) -> bool:
        """No block comes before the device is stopped."""
        return not self._final and (self._refused or self._session.driver.precopy == "check")

    @property
    def _there(self) -> int:
        """Number of blocks, from the first, that can be read in this state if any can."""
        device = self._device
        return len(device.version) - (0 if self._final else device.spec.stop_only_blocks)

    @property
    def _readable(self) -> int:
        """Number of blocks, from the first, that can be read now."""
        return 0 if self._only_when_stopped else self._there

    @override
    async def geometry(self) -> tuple[int, int]:
        self.check_open()
        return self._device.block_bytes, len(self._device.version)

    @override
    async def dirty_blocks(self) -> DirtyBlocks:
        await self._call()
        self.check_open()
        device = self._device
        device.advance(now_ns())
        changed = device.version != self._reported
        changed[self._readable :] = False
        self._reported[changed] = device.version[changed]
        return DirtyBlocks(device.block_bytes, len(changed), np.packbits(changed, bitorder="little").tobytes())

    @override
    async def read_blocks(self, first: int, count: int) -> Payload:
        self.check_open()
        if first < 0 or count < 1 or first + count > self._there:
            raise fails(errno.EINVAL)
        self._reading += 1
        try:
            return await self._read(first, count)
        finally:
            self._reading -= 1

    async def _read(self, first: int, count: int) -> Payload:
        asked_ns = now_ns()
        while self._suspended:
            if self.nonblocking:
                raise fails(errno.EAGAIN)
            await self._notify.wait()
            await self._woken()
            self.check_open()
        if self._only_when_stopped:
            await self._call()
            raise fails(errno.ENOMSG)
        device = self._device
        device.advance(now_ns())
        blocks = np.arange(first, first + count)
        payload_bytes = record_format.RecordBlocks.SIZE + count * (VERSION_BYTES + device.block_bytes)
        record = Record(1, device.epoch, payload_bytes, blocks=blocks, header_bytes=V3_HEADER_BYTES, by_number=True)
        record.sequence, self._sequence = self._sequence, self._sequence + 1
        record.block_versions = device.save_blocks(blocks)
        self._held_bytes += record.size_bytes
        self.counters.pinned_chunks_bytes = max(self.counters.pinned_chunks_bytes, self._held_bytes)
        try:
            return await self._save(record, asked_ns)
        finally:
            self._held_bytes -= record.size_bytes

    async def _save(self, record: Record, asked_ns: int) -> Payload:
        self._in_flight += 1
        try:
            async with self._command_lock:
                await self._context.firmware.save(record.size_bytes)
        finally:
            self._in_flight -= 1
            self._notify.notify()
        self.check_open()
        if (error := self._session.faults.of_command("SAVE")) is not None:
            if self._final or not self._is_refusal(error):
                self._session.fail()
            else:
                self.on_refused()
            self.check_open()
        if self._refused and not self._final:  # this SAVE, or another one that ended before
            raise fails(errno.ENOMSG)
        self.given_epoch = max(self.given_epoch, record.epoch)
        return await self._copy(record, asked_ns)

    @override
    async def read(self, max_bytes: int) -> Payload:
        self.check_open()
        if max_bytes < 1:
            raise fails(errno.EINVAL)
        if not self._final or self._reading or self.pending_bytes():
            await self._call()
            raise fails(errno.ENOMSG)
        if self._end_read:
            await self._call()
            return EMPTY
        end = Record(1, self._device.epoch, record_format.RecordEnd.SIZE, end=True, header_bytes=V3_HEADER_BYTES)
        end.sequence, end.tally = self._sequence, tally(self._device.version)
        if max_bytes < end.size_bytes:
            raise fails(errno.EINVAL)
        self._end_read = True
        return await self._copy(end, now_ns())

    async def _copy(self, record: Record, asked_ns: int) -> Payload:
        await self._woken()  # the caller slept while the device saved
        ready_ns = now_ns()
        async with self._fd_lock:
            locked_ns = now_ns()
            await self._context.memory.copy(record.size_bytes, self._context.call_ns, "read")
            self.check_open()
        self._count_read(record.size_bytes, asked_ns, ready_ns, locked_ns)
        return Extent([RecordSlice(record, 0, record.size_bytes)])

    def pending_bytes(self) -> int:
        """Bytes of the blocks that can be read and were not, as they are now."""
        return self._bytes(int(np.count_nonzero(self._unread()[: self._readable])))

    def left_bytes(self) -> int:
        """Bytes that would still be read if the device were stopped now, without the END."""
        self._device.advance(now_ns())
        return self._bytes(int(np.count_nonzero(self._unread())))

    def _unread(self) -> NDArray[np.bool_]:
        unread: NDArray[np.bool_] = self._device.version != self._device.saved
        return unread

    def _bytes(self, blocks: int) -> int:
        """Bytes of their records: data, versions, and a header for each chunk."""
        size = blocks * (VERSION_BYTES + self._device.block_bytes)
        chunk_blocks = self._session.driver.chunk_bytes // self._device.block_bytes
        return size + -(-blocks // chunk_blocks) * (V3_HEADER_BYTES + record_format.RecordBlocks.SIZE)

    @override
    async def stream_info(self) -> StreamInfo:
        await self._call()
        self.check_open()
        self._device.advance(now_ns())
        pending_bytes = round(self.pending_bytes() * self._session.driver.precopy_info_factor)
        return StreamInfo(self._device.epoch, pending_bytes)

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Blocks can be read at any time."""
        return Ready.READABLE | self.ready_at_the_end()


class BlocksLoadSession(V3LoadSession):
    """Loads a block only if its version is not older than the one that is there."""

    async def _end_stream(self, record: Record) -> None:
        if record.stream and record.tally != tally(self.image.version):
            raise self.refuse(errno.EBADMSG, "blocks: the END's digest is not that of the versions that came")
        await super()._end_stream(record)

    def _put(self, record: Record, valid: NDArray[np.bool_]) -> None:
        newer = valid & (record.block_versions >= self.image.version[record.blocks])
        self.counters.stale_bytes += int((valid & ~newer).sum()) * self._block_bytes
        super()._put(record, newer)


class LoadBlocks(V3LoadedFd, WriteOnlyBlocksFd):
    """The fd to write to: one whole record a write, from any number of threads."""

    ioctls = frozenset({VFIO_MIG_GET_STREAM_INFO, VFIO_MIG_GET_DIRTY_BLOCKS})

    def __init__(self, session: BlocksLoadSession) -> None:
        super().__init__(session)
        self._ended = False
        self._held_bytes = self._most_bytes = 0

    @override
    async def write(self, payload: Payload, piece_bytes: int) -> None:
        session = self.session
        session.check_open()
        if piece_bytes < 1:
            raise fails(errno.EINVAL)
        whole = isinstance(payload, Extent) and len(payload.parts) == 1
        if not isinstance(payload, Extent) or not whole or len(payload) != payload.parts[0].record.size_bytes:
            raise session.refuse(errno.EPROTO, "blocks: a write must be one whole record")
        calls = -(-len(payload) // piece_bytes)
        await session.context.memory.copy(len(payload), calls * session.context.call_ns, "write")
        await self.add(payload.parts[0].record)

    async def add(self, record: Record) -> None:
        """write() without the copy: in live mode, which made it elsewhere."""
        session = self.session
        session.check_open()
        if record.stream != 1:
            raise session.refuse(errno.EXDEV, f"blocks: a record of stream {record.stream} came")
        if len(record.objects) or record.epoch_complete or not (record.by_number or record.end):
            raise session.refuse(errno.EPROTO, f"blocks: a {record.record_class.name} record does not belong there")
        if self._ended:
            raise session.refuse(errno.EPROTO, "blocks: a record came after the END")
        if self.nonblocking and session.must_wait(record):
            raise fails(errno.EAGAIN)
        self._ended = record.end
        session.hold(record.size_bytes)
        self._held_bytes += record.size_bytes
        if self._held_bytes > self._most_bytes:
            session.counters.pinned_target_bytes += self._held_bytes - self._most_bytes
            self._most_bytes = self._held_bytes
        try:
            await session.load(record)
        finally:
            session.hold(-record.size_bytes)
            self._held_bytes -= record.size_bytes
