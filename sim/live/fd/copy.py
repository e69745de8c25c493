"""Copies between the driver and user space, in threads: under the driver's lock, and no faster than the scenario says.

A data fd is a socket whose buffer plays the end of the driver's chunks. What is copied in one call is what the socket
has room for; the lock is held for that long and not while there is no room.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

from sim.device.stream import fails
from sim.live.fd.lock import Mutex
from sim.live.io import MAX_IOV, advanced

SO_SNDBUFFORCE = 32
"""asm-generic/socket.h; Python has no name for it."""
MAX_VIEWS = 128
"""That are filled in one call: with small blocks still 512 KiB."""

_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy: when the lock was asked for, when it was there, when the copy was done. perf_counter_ns()."""

    size: int
    asked_ns: int
    locked_ns: int
    done_ns: int
    waited: bool
    """For room, before it asked for the lock."""

    @property
    def lock_ns(self) -> int:
        """Waiting for the lock."""
        return self.locked_ns - self.asked_ns

    @property
    def copy_ns(self) -> int:
        """Copying."""
        return self.done_ns - self.locked_ns


class Copier:
    """Copies of one data fd: its lock, and the rate that one thread has."""

    def __init__(self, mutex: Mutex | None, bytes_per_s: float) -> None:
        self._lock: AbstractContextManager[object] = nullcontext() if mutex is None else mutex
        self._bytes_per_s = bytes_per_s
        self._late_ns = 0

    def send(
        self, sock: socket.socket, closing: int, buffers: Sequence[memoryview], sent_more: Callable[[int], None]
    ) -> list[Copied]:
        """Copy all of the buffers into the socket, and tell of each part. ENODEV once `closing`, an eventfd, is set."""
        told = []
        waited = False
        room = _waiting(sock, select.POLLOUT, closing)
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
                    sent_more(sent)
                    self._pace(locked_ns, sent)
            if sent:
                told.append(Copied(sent, asked_ns, locked_ns, time.perf_counter_ns(), waited))
                left = advanced(left, sent)
            if left:
                _wait(room, closing)
                waited = True
        return told

    def receive(
        self, sock: socket.socket, closing: int, views: Iterable[memoryview], drained: Callable[[int], None]
    ) -> tuple[int, bool]:
        """Fill the views with what comes: how many bytes that were, and whether the stream went on to the last of them.

        `drained` is told how many came so far whenever there are no more for now. ENODEV once `closing` is set.
        """
        total = told = 0
        data = _waiting(sock, select.POLLIN, closing)
        more = (view for view in views if len(view))
        left: list[memoryview] = []
        while left := left + list(islice(more, MAX_VIEWS - len(left))):
            with self._lock:
                locked_ns = time.perf_counter_ns()
                try:
                    got = sock.recvmsg_into(left[:MAX_IOV], 0, socket.MSG_DONTWAIT)[0]
                except BlockingIOError:
                    got = -1
                if got > 0:
                    self._pace(locked_ns, got)
            if got == 0:
                return total, False
            if got > 0:
                total += got
                left = advanced(left, got)
                continue
            if total > told:
                drained(total)
                told = total
            _wait(data, closing)
        return total, True

    def _pace(self, start_ns: int, size: int) -> None:
        """Let the copy take as long as the scenario says; what is slept too long is taken off the next one."""
        due_ns = start_ns + round(size * 1e9 / self._bytes_per_s) - self._late_ns
        now_ns = time.perf_counter_ns()
        self._late_ns = 0
        if due_ns > now_ns:
            time.sleep((due_ns - now_ns) / 1e9)
            self._late_ns = max(0, time.perf_counter_ns() - due_ns)


def _waiting(sock: socket.socket, what: int, closing: int) -> select.poll:
    waiting = select.poll()
    waiting.register(sock, what)
    waiting.register(closing, select.POLLIN)
    return waiting


def _wait(waiting: select.poll, closing: int) -> None:
    if closing in {fd for fd, _ in waiting.poll()}:
        raise fails(errno.ENODEV)


class AnnouncedBytes:
    """How many bytes a VMM is writing, in all that it ever wrote, in a page that both processes have.

    write() tells the driver how much there is; a socket does not. So the driver knows when it has taken all of a
    write(), and answers once.
    """

    def __init__(self, memfd: int = -1) -> None:
        """Of the driver; with the VMM's own `memfd`, which it passed, the VMM's."""
        own = memfd < 0
        memfd = os.memfd_create("promise", os.MFD_CLOEXEC) if own else memfd
        if own:
            os.ftruncate(memfd, mmap.PAGESIZE)
        self._page = mmap.mmap(memfd, mmap.PAGESIZE)
        self._memfd = memfd

    def fd(self) -> int:
        """The page, to be passed on; nothing else can be passed after that."""
        memfd, self._memfd = self._memfd, -1
        return memfd

    def close(self) -> None:
        """No more."""
        self._page.close()
        if self._memfd >= 0:
            os.close(self._memfd)
            self._memfd = -1

    @property
    def bytes(self) -> int:
        """So many."""
        (size,) = _SIZE.unpack_from(self._page)
        return int(size)

    @bytes.setter
    def bytes(self, size: int) -> None:
        _SIZE.pack_into(self._page, 0, size)


def unread_bytes(sock: socket.socket) -> int:
    """What is in a socket to be read (FIONREAD)."""
    (size,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))
    return int(size)


def data_fd(room_bytes: int) -> tuple[socket.socket, socket.socket]:
    """The driver's end and the VMM's end of a data fd, with room for so many bytes that nobody has read.

    Without privileges the kernel gives what wmem_max allows. It doubles what it is asked for (man 7 socket).
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    asked = room_bytes // 2
    for end in (ours, theirs):
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, asked)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, asked)
    return ours, theirs


def eventfd() -> int:
    """A number that a thread can wait for."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
