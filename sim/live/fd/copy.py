# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies between the driver and user space, in threads: under the driver's lock, and at most at the scenario's rate.

A data fd is a socket whose buffer is the end of the driver's chunks. One call copies as much as the socket has room
for. The lock is held for that time, and not while there is no room.

The lock is a real mutex: threads take it while they copy, and tasks of the loop. It is first come, first served, as in
virtual time. Otherwise a thread that copies piece after piece would take it again before a waiting task has woken up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from proto_v3.timeline import Resource, Timeline
from sim.clock.port import now_ns
from sim.device.stream import PartOfSession, fails
from sim.live.io import MAX_IOV, Worker, advanced
from sim.live.merge_timelines import ProcessTimeline

SO_SNDBUFFORCE = 32
"""asm-generic/socket.h; Python has no name for it."""


# --- the lock ---------------------------------------------------------------------------------------------------------


class Mutex:
    """Mutual exclusion of threads, first come, first served. Any thread may release it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of what follows; never held for long
        self._held = False
        self._queue: deque[Callable[[], None]] = deque()

    def take(self, granted: Callable[[], None]) -> bool:
        """True if it was free: the caller has it. Otherwise `granted` is called, by the thread that hands it over."""
        with self._guard:
            if self._held:
                self._queue.append(granted)
                return False
            self._held = True
            return True

    def give_up(self, granted: Callable[[], None]) -> None:
        """Stop waiting. If it is too late for that, `granted` is or was called all the same."""
        with self._guard, contextlib.suppress(ValueError):
            self._queue.remove(granted)

    def release(self) -> None:
        """Hand it over to the longest waiter, if there is one."""
        with self._guard:
            self._held = bool(self._queue)
            granted = self._queue.popleft() if self._queue else None
        if granted is not None:
            granted()

    def __enter__(self) -> None:
        mine = threading.Lock()
        mine.acquire()
        if not self.take(mine.release):
            mine.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RealLock:
    """An asyncio lock over a `mutex` that threads take, too; records waiting as sim.resource.Lock does."""

    def __init__(self, timeline: Timeline) -> None:
        self.mutex = Mutex()
        self._timeline = timeline

    async def __aenter__(self) -> None:
        start_ns = now_ns()
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()

        def have() -> None:
            if mine.cancelled():  # in the meantime
                self.mutex.release()
            else:
                mine.set_result(None)

        def granted() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to end
                loop.call_soon_threadsafe(have)

        if self.mutex.take(granted):
            return
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self.mutex.release()
            else:
                self.mutex.give_up(granted)
            raise
        self._timeline.work(Resource.LOCK, "lock wait", start_ns)

    async def __aexit__(self, *_: object) -> None:
        self.mutex.release()


# --- copies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy: when the lock was requested, when it was taken, when the copy was done. perf_counter_ns()."""

    size: int
    asked_ns: int
    locked_ns: int
    done_ns: int
    waited: bool
    """For room in the socket, before it requested the lock."""

    @property
    def lock_ns(self) -> int:
        """Time spent waiting for the lock."""
        return self.locked_ns - self.asked_ns

    @property
    def copy_ns(self) -> int:
        """Time spent copying."""
        return self.done_ns - self.locked_ns


class Copier:
    """Copies of one data fd: with its lock, at the rate of one thread."""

    def __init__(self, mutex: Mutex | None, bytes_per_s: float) -> None:
        self._lock: AbstractContextManager[object] = nullcontext() if mutex is None else mutex
        self._bytes_per_s = bytes_per_s
        self._late_ns = 0

    def send(
        self, sock: socket.socket, closing: int, buffers: Sequence[memoryview], count_sent: Callable[[int], None]
    ) -> list[Copied]:
        """Copy all of the buffers into the socket; returns its parts. ENODEV once `closing`, an eventfd, is set.

        `count_sent` is called with the bytes of each part before the lock is released.
        """
        copies = []
        waited = False
        room = select.poll()
        room.register(sock, select.POLLOUT)
        room.register(closing, select.POLLIN)
        left = list(buffers)
        while left:
            asked_ns = time.perf_counter_ns()
            with self._lock:
                locked_ns = time.perf_counter_ns()
                try:
                    sent = sock.sendmsg(left[:MAX_IOV], (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    sent = 0
                if sent:
                    count_sent(sent)
                    self.pace(locked_ns, sent)
            if sent:
                copies.append(Copied(sent, asked_ns, locked_ns, time.perf_counter_ns(), waited))
                left = advanced(left, sent)
            if left:
                if closing in {fd for fd, _ in room.poll()}:
                    raise fails(errno.ENODEV)
                waited = True
        return copies

    def pace(self, start_ns: int, size: int) -> None:
        """Sleep until the copy took as long as the scenario says; oversleeping shortens the next sleep."""
        due_ns = start_ns + round(size * 1e9 / self._bytes_per_s) - self._late_ns
        now_ns = time.perf_counter_ns()
        self._late_ns = 0
        if due_ns > now_ns:
            time.sleep((due_ns - now_ns) / 1e9)
            self._late_ns = max(0, time.perf_counter_ns() - due_ns)


class DriverEnd:
    """The driver's end of a data fd: its socket, a thread that copies, and a task that moves the stream's bytes."""

    def __init__(
        self, ends_with: PartOfSession, copier: Copier, timeline: ProcessTimeline, edge: str, *, room_bytes: int
    ) -> None:
        """`edge` names the edges in the timeline; `room_bytes` fit the socket."""
        self.ends_with = ends_with
        self._copier = copier
        self._timeline = timeline
        self._edge = edge
        self._ours, self._theirs = data_fd(room_bytes)
        self._worker = Worker(f"{edge} copy")
        self._task = asyncio.create_task(self._run(), name=edge)
        self._watching = asyncio.create_task(self._watch(), name=f"{edge} watch")

    async def _run(self) -> None:
        raise NotImplementedError

    async def _watch(self) -> None:
        while not self.ends_with.over:
            await self.ends_with.changed()
        self._end_copy()

    def _end_copy(self) -> None:
        """The session is over: end a copy that waits."""
        raise NotImplementedError

    async def ended(self) -> None:
        """The session is over: return when the VMM can read none of its bytes, and none goes into the device."""
        await asyncio.wait([self._task])

    def _report_bug(self, error: Exception) -> None:
        """To be seen here, and not waited for there."""
        asyncio.get_running_loop().call_exception_handler({"message": self._edge, "exception": error})


def unread_bytes(sock: socket.socket) -> int:
    """Bytes in a socket that nobody has read (FIONREAD)."""
    (size,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))
    return int(size)


def data_fd(room_bytes: int) -> tuple[socket.socket, socket.socket]:
    """The driver's end and the VMM's end of a data fd, with room for `room_bytes` unread bytes.

    Without privileges the room is what wmem_max allows. The kernel doubles the requested size (man 7 socket).
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    asked = room_bytes // 2
    for end in (ours, theirs):
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, asked)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, asked)
    return ours, theirs
