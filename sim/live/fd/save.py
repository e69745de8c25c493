# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's end of a data fd that is read: bytes of a saved stream are copied into a socket, which a VMM reads.

The socket's buffer is the end of the driver's chunks: bytes in it are unread to the driver, and count as such in all
that it reports. A full buffer keeps the chunk, and so the engine waits.

A socket cannot report the error of a read() that finds nothing (ENOMSG, ENODEV, EIO). The VMM asks for it with the call
`idle`. When a session is over, its unread bytes are gone, as in the kernel: the socket is emptied, then shut.

Addressable blocks have no socket, for pread() takes an offset. A reader requests blocks by a call; the driver saves
them, and copies the record into a slot of a memfd, under its lock; the reader pread()s it there. The reader frees the
slot with its next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import mmap
import os
import socket
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from proto_v3.notify import Notify
from proto_v3.timeline import Resource, on_track
from sim.device.blocks import SaveBlocks
from sim.device.record import NO_INDICES, Extent, Record
from sim.device.save import SaveStream
from sim.device.save_queue import ReadState
from sim.device.stream import FdBuffer
from sim.live.fd import codec
from sim.live.fd.copy import Copied, Copier, DriverEnd, Mutex, unread_bytes
from sim.live.fd.store import StateStore
from sim.live.io import Worker
from sim.live.merge_timelines import LATEST, ProcessTimeline
from sim.scenario.units import NS_PER_S

DRAIN_BYTES = 1 << 20
"""Of one recv() that empties a socket."""
UNCONTENDED_NS = 20_000
"""Taking a free lock, or finding that there is room, takes less."""


class SocketBuffer(FdBuffer):
    """Bytes in the socket, or about to be."""

    def __init__(self, theirs: socket.socket) -> None:
        self._theirs = theirs
        self._taken = 0
        self._sent = 0
        self._consumed = 0
        self._initial_through = 0
        self._closed = False

    @property
    def sent(self) -> int:
        """Bytes that were ever put into the socket."""
        return self._sent

    def count_sent(self, size: int) -> None:
        """`size` more bytes are in the socket: called by the thread that copies."""
        self._sent += size

    @property
    def consumed(self) -> int:
        """Bytes that the VMM read, of all that were ever sent."""
        if not self._closed:
            sent = self._sent  # first: bytes that the thread puts in meanwhile are not read
            unread = unread_bytes(self._theirs)
            self._consumed = max(self._consumed, sent - unread)  # bytes put in just now may not be counted yet
        return self._consumed

    def close(self) -> None:
        """The socket is about to be closed."""
        self._closed = True

    @property
    @override
    def unread_bytes(self) -> int:
        return self._taken - self.consumed

    @property
    @override
    def initial_bytes(self) -> int:
        return max(0, self._initial_through - self.consumed)

    @override
    def add(self, size: int, initial_bytes: int) -> None:
        if initial_bytes:
            self._initial_through = self._taken + initial_bytes
        self._taken += size

    @override
    def make_all_initial(self) -> None:
        self._initial_through = self._taken


class FdState(enum.Enum):
    """Of the driver's end."""

    COPYING = enum.auto()
    """The driver has data or is saving; the copy may wait for room in the socket."""
    DRAINED = enum.auto()
    """Everything is in the socket, until the driver has more."""
    ENDED = enum.auto()
    """Everything is in the socket, for good: the END, or an error."""
    CLOSED = enum.auto()
    """The session is over, and the socket is emptied."""


class ReadEnd(NamedTuple):
    """What a read() finds behind the last byte in the socket."""

    what: str
    """`ENOMSG`, `END` (an empty read(); for now only, if the driver does so) or `ERROR` (whatever is in the socket)."""
    errno: int = 0
    text: str = ""


class SavedData(DriverEnd):
    """The driver's end: copies what a stream has into the socket, and says what comes behind it."""

    def __init__(
        self,
        stream: SaveStream,
        store: StateStore,
        copier: Copier,
        timeline: ProcessTimeline,
        edge: str,
        *,
        room_bytes: int,
        piece_bytes: int,
    ) -> None:
        """`piece_bytes` are copied at once, under the lock: those of one read()."""
        super().__init__(stream, copier, timeline, edge, room_bytes=room_bytes)
        self.stream = stream
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._piece_bytes = piece_bytes
        self.lock_ns = self.copy_ns = 0
        self._layout = Layout(store)
        self._zero_ns = time.perf_counter_ns() - timeline.now_ns()
        self._buffer = SocketBuffer(self._theirs)
        stream.buffer = self._buffer
        self._state = FdState.COPYING
        self._read_end = ReadEnd("END")
        """In DRAINED and ENDED."""
        self._notify = Notify()

    def fds(self) -> list[int]:
        """The VMM's end, to be passed to it."""
        return [os.dup(self._theirs.fileno())]

    async def idle(self) -> tuple[ReadEnd, int]:
        """Wait until all that the driver has is in the socket: what a read() finds behind it, and the number of bytes
        that were ever in it."""
        while (end := self._end_now()) is None:
            await self._notify.wait()
        return end, self._buffer.sent

    def _end_now(self) -> ReadEnd | None:
        """None while the driver has more, or the VMM could still read bytes of a session that is over."""
        error = self.stream.error
        if error is not None:
            return ReadEnd("ERROR", error.errno or errno.EIO) if self._state is FdState.CLOSED else None
        match self._state:
            case FdState.DRAINED if self.stream.state is not ReadState.DRAINED:
                return None  # the driver has something new, and the task here is not woken yet
            case FdState.DRAINED | FdState.ENDED:
                return self._read_end
            case _:
                return None

    @override
    async def _run(self) -> None:
        on_track(self._edge)
        try:
            while self._state is not FdState.ENDED:
                await self._put()
        except OSError as error:
            self._enter(FdState.ENDED, ReadEnd("ERROR", error.errno or errno.EIO, str(error.strerror or error)))
        except Exception as error:
            self._enter(FdState.ENDED, ReadEnd("ERROR", errno.EIO, repr(error)))
            self._report_bug(error)
        finally:
            await self._watching
            self._close()
            self._notify.notify()

    async def _put(self) -> None:
        """Copy some of what the driver has; or wait until it has more; or end."""
        try:
            if len(await self.stream.read_with(self._copy, self._piece_bytes)):
                return
            end = ReadEnd("END")
        except OSError as error:
            if error.errno != errno.ENOMSG:
                raise
            end = ReadEnd("ENOMSG", errno.ENOMSG)
        if self.stream.state is ReadState.END:
            self._enter(FdState.ENDED, end)
            self._shut()
            return
        self._enter(FdState.DRAINED, end)
        while self.stream.state is ReadState.DRAINED:
            await self.stream.changed()
            self._notify.notify()  # something new may have been dropped again
        self._state = FdState.COPYING

    @override
    def _end_copy(self) -> None:
        os.eventfd_write(self._closing, 1)

    def _enter(self, state: FdState, end: ReadEnd) -> None:
        self._state, self._read_end = state, end
        self._notify.notify()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)  # the VMM reads 0, and asks why

    def _close(self) -> None:
        """Take what is in the socket from the VMM."""
        self._state = FdState.CLOSED
        self._buffer.close()
        self._shut()
        with contextlib.suppress(OSError):
            while self._theirs.recv(DRAIN_BYTES, socket.MSG_DONTWAIT):
                pass
        self._worker.stop()
        self._ours.close()
        self._theirs.close()
        os.close(self._closing)

    async def _copy(self, data: Extent) -> None:
        buffers = list(self._layout.pieces(data))
        sent, asked_ns = self._buffer.sent, time.perf_counter_ns()
        send = self._copier.send
        copies = await self._worker.start(lambda: send(self._ours, self._closing, buffers, self._buffer.count_sent))
        for copied in copies:
            sent += copied.size
            self._record(copied, sent, asked_ns)
            asked_ns = copied.done_ns

    def _record(self, copied: Copied, sent: int, before_ns: int) -> None:
        """Write a copy into the timeline. `sent`: bytes in all after it; `before_ns`: when the copy before it ended."""
        timeline, zero_ns = self._timeline, self._zero_ns
        asked_ns, locked_ns = copied.asked_ns - zero_ns, copied.locked_ns - zero_ns
        if copied.waited and copied.asked_ns - before_ns > UNCONTENDED_NS:
            timeline.waited_for(
                Resource.COPY, "room in data fd", f"{self._edge} room", LATEST, before_ns - zero_ns, asked_ns
            )
        if copied.lock_ns > UNCONTENDED_NS:
            timeline.work(Resource.LOCK, "lock wait", asked_ns, locked_ns)
        timeline.sent(f"{self._edge} read", sent, locked_ns)
        timeline.work(Resource.COPY, "read", locked_ns, copied.done_ns - zero_ns)
        self.lock_ns += copied.lock_ns
        self.copy_ns += copied.copy_ns


class Layout:
    """The bytes of records, without a copy: their heads, and the device's state as it is now."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._record: Record | None = None  # the last one: records are asked for piece by piece
        self._head = memoryview(b"")
        self._starts = self._offsets = self._sizes = NO_INDICES
        """Of its pieces, the first of which is the head: offset in the record, offset in the store, bytes."""

    def pieces(self, data: Extent) -> Iterator[memoryview]:
        """The bytes of a run of the stream."""
        for part in data.parts:
            self._lay_out(part.record)
            first = np.searchsorted(self._starts, part.start, "right") - 1
            for at in range(first, np.searchsorted(self._starts, part.stop)):
                start, offset = self._starts[at], self._offsets[at]
                piece = self._store.view[offset : offset + self._sizes[at]] if at else self._head
                yield piece[max(part.start - start, 0) : part.stop - start]

    def _lay_out(self, record: Record) -> None:
        if record is self._record:
            return
        self._record = record
        self._head = memoryview(codec.head(record))
        objects, blocks = self._store.object_runs(record.objects), self._store.block_runs(record.blocks)
        self._offsets = np.concatenate([[0], objects[0], blocks[0]])
        self._sizes = np.concatenate([[len(self._head)], objects[1], blocks[1]])
        self._starts = np.cumsum(self._sizes) - self._sizes


class BlocksData:
    """The driver's end of the fd of addressable blocks: the memfd, its slots, and the threads that copy."""

    def __init__(
        self, stream: SaveBlocks, store: StateStore, mutex: Mutex | None, bytes_per_s: float, timeline: ProcessTimeline
    ) -> None:
        self.stream = self.ends_with = stream
        self.lock_ns = self.copy_ns = 0
        self._layout = Layout(store)
        self._lock = nullcontext() if mutex is None else mutex
        self._bytes_per_s = bytes_per_s
        self._timeline = timeline
        self._memfd = os.memfd_create("blocks", os.MFD_CLOEXEC)
        self._slots: dict[int, int] = {}
        """Bytes of each slot, by its offset."""
        self._free: list[int] = []
        """Offsets of the slots that no reader has."""
        self._workers: list[Worker] = []
        """Idle threads. There are as many threads as copies at once, for any number of readers may read."""
        self._copies = 0
        self._notify = Notify()

    def fds(self) -> list[int]:
        """The memfd, to be passed to the VMM."""
        return [os.dup(self._memfd)]

    async def read_blocks(self, first: int, count: int, free: int) -> tuple[int, int]:
        """Save blocks; returns the record's offset in the memfd, and its bytes. `free`: a slot to be freed, or -1."""
        if free >= 0:
            self._free.append(free)
        record = await self.stream.read_blocks(first, count)
        assert isinstance(record, Extent)
        offset = self._slot(len(record))
        buffers = list(self._layout.pieces(record))
        worker = self._workers.pop() if self._workers else Worker("blocks copy")
        copying = worker.start(lambda: self._copy(buffers, offset))
        self._copies += 1
        copying.add_done_callback(lambda _: self._copied(worker))
        asked_ns, locked_ns, done_ns = await asyncio.shield(copying)
        if locked_ns - asked_ns > UNCONTENDED_NS:
            self._timeline.work(Resource.LOCK, "lock wait", asked_ns, locked_ns)
        self._timeline.work(Resource.COPY, "read", locked_ns, done_ns)
        self.lock_ns += locked_ns - asked_ns
        self.copy_ns += done_ns - locked_ns
        return offset, len(record)

    def _copied(self, worker: Worker) -> None:
        self._copies -= 1
        self._workers.append(worker)
        self._notify.notify()

    def _copy(self, buffers: list[memoryview], offset: int) -> tuple[int, int, int]:
        """Returns when the lock was requested, when it was taken, and when the copy was done."""
        now_ns = self._timeline.now_ns
        asked_ns = now_ns()
        with self._lock:
            locked_ns = now_ns()
            at = offset
            for buffer in buffers:
                at += os.pwrite(self._memfd, buffer, at)
            remaining_s = (at - offset) / self._bytes_per_s - (now_ns() - locked_ns) / NS_PER_S
            if remaining_s > 0:
                time.sleep(remaining_s)
            return asked_ns, locked_ns, now_ns()

    def _slot(self, size: int) -> int:
        """Take a free slot that is large enough, or a new one at the end of the memfd; returns its offset."""
        for offset in self._free:
            if self._slots[offset] >= size:
                self._free.remove(offset)
                return offset
        offset = sum(self._slots.values())
        self._slots[offset] = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._memfd, offset + self._slots[offset])
        return offset

    async def read(self, max_bytes: int) -> bytes:
        """The bytes of the END record, empty after it; or the errors of read()."""
        end = await self.stream.read(max_bytes)
        return b"".join(self._layout.pieces(end)) if isinstance(end, Extent) else b""

    async def ended(self) -> None:
        """The session is over: return when nothing is copied any more."""
        while self._copies:
            await self._notify.wait()
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        if self._memfd >= 0:
            os.close(self._memfd)
            self._memfd = -1
