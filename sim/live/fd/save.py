"""A stream that is saved, put into a data fd: what the driver has ready is copied into a socket, which a VMM reads.

The socket's buffer is what is left of the driver's chunks once they are on their way: bytes in it are unread to the
driver, and count as such in all that it tells. A full buffer keeps the chunk, and so the engine waits.

What a socket cannot say, the error that read() would give where there is nothing to read, is told by a call: `idle`.
A session that is over takes what is unread with it, as in the kernel: the socket is emptied, and then at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator

import numpy as np

from proto_v3.notify import Notify
from proto_v3.timeline import Resource, on_track
from sim.device.record import NO_INDICES, Extent, Record
from sim.device.save import SaveStream
from sim.device.stream import FdBuffer
from sim.live.fd import codec
from sim.live.fd.copy import Copied, Copier, data_fd, eventfd, unread_bytes
from sim.live.fd.store import StateStore
from sim.live.io import Worker
from sim.live.merge_timelines import LATEST, ProcessTimeline

DRAIN_BYTES = 1 << 20
"""Taken out of a socket at once that nobody reads any more."""
UNCONTENDED_NS = 20_000
"""Taking a lock that is free, or finding that there is room, takes less."""


class SocketOutlet(FdBuffer):
    """What is in the socket, or about to be."""

    def __init__(self, theirs: socket.socket) -> None:
        self._theirs = theirs
        self._taken = 0
        self._sent = 0
        self._consumed = 0
        self._initial_through = 0
        self.closed = False
        """There is no socket any more."""

    @property
    def sent(self) -> int:
        """Bytes that were ever in the socket."""
        return self._sent

    def sent_more(self, size: int) -> None:
        """So many more: told by the thread that copies."""
        self._sent += size

    @property
    def consumed(self) -> int:
        """What the VMM read, of all that was ever sent."""
        if not self.closed:
            sent = self._sent  # first: what the thread puts in meanwhile is not to be taken for read
            unread = unread_bytes(self._theirs)
            self._consumed = max(self._consumed, sent - unread)  # what was put in just now may not be counted yet
        return self._consumed

    def close(self) -> None:
        """The socket is about to be closed."""
        self.closed = True

    @property
    def unread_bytes(self) -> int:  # type: ignore[override]
        """See sim.device.stream.FdBuffer."""
        return self._taken - self.consumed

    @property
    def initial_bytes(self) -> int:  # type: ignore[override]
        """See sim.device.stream.FdBuffer."""
        return max(0, self._initial_through - self.consumed)

    def took(self, size: int, initial_bytes: int) -> None:
        """See sim.device.stream.FdBuffer."""
        if initial_bytes:
            self._initial_through = self._taken + initial_bytes
        self._taken += size

    def all_initial(self) -> None:
        """See sim.device.stream.FdBuffer."""
        self._initial_through = self._taken


class SavedData:
    """The driver's end of a data fd that is read."""

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
        """`room_bytes` fit the socket; `piece_bytes` are copied at once, under the lock: what one read() takes."""
        self.stream = stream
        self._piece_bytes = piece_bytes
        self.lock_ns = self.copy_ns = 0
        self._layout = Layout(store)
        self._copier = copier
        self._timeline = timeline
        self._zero_ns = time.perf_counter_ns() - timeline.now_ns()
        self._edge = edge
        self._ours, self._theirs = data_fd(room_bytes)
        self._outlet = SocketOutlet(self._theirs)
        stream.outlet = self._outlet
        self._closing = eventfd()
        self._worker = Worker(f"{edge} copy")
        self._ended = False  # what was said last is so for good
        self._idle: tuple[str, int, str] | None = None
        self._notify = Notify()
        self._task = asyncio.create_task(self._run(), name=edge)
        self._watching = asyncio.create_task(self._watch(), name=f"{edge} watch")

    def fds(self) -> list[int]:
        """The VMM's end, to be passed to it."""
        return [os.dup(self._theirs.fileno())]

    async def idle(self) -> tuple[str, int, str, int]:
        """Wait until all that the driver has is in the socket: what read() gives behind that (`ENOMSG`, `END` or
        `ERROR`), with errno and text; and how many bytes were ever in it.

        An `ERROR` is what read() gives whatever is in the socket. `END` may be for now only, where a driver says so.
        """
        while (told := self._told()) is None:
            await self._notify.wait()
        return *told, self._outlet.sent

    def _told(self) -> tuple[str, int, str] | None:
        if self.stream.over:  # said when nothing can be read any more
            return ("ERROR", self.stream._closed, "") if self._outlet.closed else None
        # The driver may have something new since it was said, and its task here not be woken yet.
        return None if self._idle is None or self._has_more() else self._idle

    def _has_more(self) -> bool:
        """After a temporary end: whether read() would wait, or give something else."""
        stream = self.stream
        return not self._ended and bool(stream._unread_bytes or stream._planned or stream._final)

    async def _run(self) -> None:
        on_track(self._edge)
        try:
            while await self._put():
                pass
        except OSError as error:
            self._fail(error.errno or errno.EIO, str(error.strerror or error))
        except Exception as error:  # a bug: to be seen here, and not waited for there
            self._fail(errno.EIO, repr(error))
            asyncio.get_running_loop().call_exception_handler({"message": self._edge, "exception": error})
        finally:
            await self._watching
            self._close()
            self._notify.notify()

    async def _put(self) -> bool:
        """Some of what the driver has, or what read() gives in its place; False at the end of the stream."""
        try:
            data = await self.stream.move(self._piece_bytes, self._copy)
        except OSError as error:
            if error.errno != errno.ENOMSG:
                raise
            self._say("ENOMSG", errno.ENOMSG)
        else:
            if len(data):
                return True
            self._ended = self.stream._final
            self._say("END", 0)
            if self._ended:
                self._shut()
                return False
        while not (self._has_more() or self.stream.over):
            await self.stream._notify.wait()
            self._notify.notify()  # what was new may have been dropped again
        self._idle = None
        return True

    async def _watch(self) -> None:
        """Until the session is over: a copy that waits for room then waits for nothing."""
        while not self.stream.over:
            await self.stream._notify.wait()
        os.eventfd_write(self._closing, 1)

    def _fail(self, code: int, text: str) -> None:
        self._ended = True
        self._say("ERROR", code, text)

    def _say(self, what: str, code: int, text: str = "") -> None:
        self._idle = (what, code, text)
        self._notify.notify()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)  # the VMM reads 0, and asks what it is

    def _close(self) -> None:
        """What is in the socket is not to be read any more."""
        self._outlet.close()
        self._shut()
        with contextlib.suppress(OSError):
            while self._theirs.recv(DRAIN_BYTES, socket.MSG_DONTWAIT):
                pass
        self._worker.stop()
        self._ours.close()
        self._theirs.close()
        os.close(self._closing)

    async def ended(self) -> None:
        """The session is over: return when nothing of it can be read any more."""
        await asyncio.wait([self._task])

    async def _copy(self, data: Extent) -> None:
        buffers = list(self._layout.pieces(data))
        sent, asked_ns = self._outlet.sent, time.perf_counter_ns()
        send = self._copier.send
        copies = await self._worker.start(lambda: send(self._ours, self._closing, buffers, self._outlet.sent_more))
        for copied in copies:
            sent += copied.size
            self._tell(copied, sent, asked_ns)
            asked_ns = copied.done_ns

    def _tell(self, copied: Copied, sent: int, before_ns: int) -> None:
        """The timeline, of a copy after which so much was sent in all; the one before it was done at `before_ns`."""
        timeline, zero_ns = self._timeline, self._zero_ns
        asked_ns, locked_ns = copied.asked_ns - zero_ns, copied.locked_ns - zero_ns
        if copied.waited and copied.asked_ns - before_ns > UNCONTENDED_NS:
            timeline.got(Resource.COPY, "room in data fd", f"{self._edge} room", LATEST, before_ns - zero_ns, asked_ns)
        if copied.lock_ns > UNCONTENDED_NS:
            timeline.work(Resource.LOCK, "lock wait", asked_ns, locked_ns)
        timeline.gave(f"{self._edge} read", sent, locked_ns)
        timeline.work(Resource.COPY, "read", locked_ns, copied.done_ns - zero_ns)
        self.lock_ns += copied.lock_ns
        self.copy_ns += copied.copy_ns


class Layout:
    """Where the bytes of records are: their heads, and the device's state as it is now, without a copy."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._record: Record | None = None  # the last one, for it is asked for piece by piece
        self._head = memoryview(b"")
        self._starts = self._offsets = self._sizes = NO_INDICES
        """Of its pieces, of which the first is the head: where each begins in the record, where in the store, bytes."""

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
