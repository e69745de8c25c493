# SPDX-License-Identifier: GPL-2.0-or-later
"""A data fd of a VFIO device behind the port `DataFd`: every call is a read(), write(), pread(), poll() or ioctl().

They block in the kernel, in threads: one for read(), one for write() and one for ioctls of each fd. No thread is shared
by fds, so none waits for another's. Of a fd of blocks, each pread() and each write() has a thread while it lasts.

A call that has begun goes on if its caller is cancelled. The bytes of such a read() are what the next read() returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import os
import select
from collections.abc import Callable
from operator import or_
from typing import Any, TypeVar

from typing_extensions import override

from proto_v3.timeline import Resource
from proto_v3.vfio.device import BlocksFd, DirtyBlocks, Ready
from proto_v3.vfio.uapi import (
    BLOCKS_HEAD_BYTES,
    VFIO_MIG_GET_DIRTY_BLOCKS,
    VFIO_MIG_GET_PRECOPY_INFO,
    VFIO_MIG_GET_STREAM,
    VFIO_MIG_GET_STREAM_INFO,
    GetDirtyBlocks,
    GetStream,
    PrecopyInfo,
    StreamInfo,
)
from proto_v3.wire.frames import EMPTY, Payload
from sim.device.stream import fails
from sim.live.buffers import Buffers, as_view
from sim.live.io import Worker, set_done
from sim.live.merge_timelines import ProcessTimeline
from sim.real.ioctl import S, address_of, call
from sim.report import Counters

T = TypeVar("T")

KEPT_BUFFERS = 2
"""Of each data fd: one is being sent while the next is read. With multifd more are used; those are made anew."""
VERSION_BYTES = 8
"""Of each block in a record of blocks (docs/vfio_v3.h)."""
EVENTS = {
    select.EPOLLIN: Ready.READABLE,
    select.EPOLLPRI: Ready.NEW_EPOCH,
    select.EPOLLOUT: Ready.WRITABLE,
    select.EPOLLHUP: Ready.OVER,
    select.EPOLLERR: Ready.FAILED,
}


class DataFds:
    """What the data fds of a VMM share."""

    def __init__(self, side: str, timeline: ProcessTimeline, read_bytes: int) -> None:
        self.side = side
        self.timeline = timeline
        self.read_bytes = read_bytes
        self.fds: list[RealFd] = []
        """All that the kernel has given so far."""
        self._given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._why = ""

    def now_ns(self) -> int:
        """The timeline's time."""
        return self.timeline.now_ns()

    def give_up(self, why: str) -> None:
        """Calls that wait fail with ENODEV and `why`, and so do later ones that do not return at once."""
        self._why = self._why or why
        set_done(self._given_up)

    async def wait(self, call: asyncio.Future[T]) -> T:
        """The result of a call in a thread. The call goes on if this is cancelled, or given up."""
        await self.ended(call)
        return call.result()

    async def ended(self, call: asyncio.Future[Any]) -> None:
        """Wait until the call has ended, with or without an error. OSError if all calls are given up."""
        await asyncio.wait([call, self._given_up], return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            raise OSError(errno.ENODEV, self._why)

    async def close(self) -> None:
        """Close all data fds; returns when no call is left in the kernel."""
        for fd in self.fds:
            await fd.close()


class RealFd(BlocksFd):
    """A data fd by its number, which it closes. If it is one of blocks, the calls of BlocksFd work, too."""

    def __init__(self, number: int, name: str, fds: DataFds, *, blocks: bool = False) -> None:
        """`blocks`: its session is one with addressable blocks; get_stream() then gives their fd."""
        self.counters = Counters()
        """Calls that returned data, bytes, and all of their time as firmware_ns: the kernel does not say more."""
        self.name = f"{fds.side} {name} fd {number}"
        self.of = name
        """The device's name."""
        self._fds = fds
        self._number = number
        self._blocks = blocks
        self._workers: dict[str, Worker] = {}
        self._idle: list[Worker] = []
        """Threads for pread() with nothing to do."""
        self._concurrent = False
        """It is the fd of blocks: write() may be called from many tasks at once."""
        self._made = 0
        self._buffers = Buffers(fds.read_bytes, KEPT_BUFFERS)
        self._given_up: tuple[asyncio.Future[int], memoryview] | None = None
        """A read() whose caller was cancelled."""
        self._unread = memoryview(b"")
        """Bytes of such a read()."""
        self._epoll: select.epoll | None = None
        self._polls = True
        """The driver has poll()."""
        self._closing: asyncio.Future[None] | None = None
        fds.fds.append(self)

    # --- threads ------------------------------------------------------------------------------------------------------

    def _start(self, what: str, job: Callable[[int], T]) -> asyncio.Future[T]:
        """Do it in this thread, after all that was begun there."""
        if self._closing is not None:
            raise fails(errno.EBADF)
        worker = self._workers.get(what)
        if worker is None:
            worker = self._workers[what] = Worker(f"{self.name} {what}")
        number = self._number
        return worker.start(lambda: job(number))

    def start(self, job: Callable[[int], T]) -> asyncio.Future[T]:
        """Any other calls, with the number of the fd, in a thread of their own, one job after the other."""
        return self._start("job", job)

    def _start_any(self, job: Callable[[int], T]) -> asyncio.Future[T]:
        """Do it in a thread that has nothing to do."""
        if self._closing is not None:
            raise fails(errno.EBADF)
        if self._idle:
            worker = self._idle.pop()
        else:
            self._made += 1
            worker = self._workers[f"any {self._made}"] = Worker(f"{self.name} {self._made}")
        number = self._number
        done = worker.start(lambda: job(number))
        done.add_done_callback(lambda _: self._idle.append(worker))
        return done

    # --- read() -------------------------------------------------------------------------------------------------------

    @override
    async def read(self, max_bytes: int) -> Payload:
        start_ns = self._fds.now_ns()
        await self._end_given_up()
        if len(self._unread):
            data, self._unread = self._unread[:max_bytes], self._unread[max_bytes:]
            return data
        view = self._buffer(max_bytes)
        reading = self._start("read", lambda number: os.readv(number, [view]))
        try:
            size = await self._fds.wait(reading)
        except BaseException:
            if not reading.done() or reading.exception() is None:
                self._given_up = reading, view
            raise
        finally:
            self.counters.wakeups += 1
        return self._took(view[:size], start_ns)

    async def _end_given_up(self) -> None:
        """Wait for the end of a read() whose caller was cancelled, and keep its bytes, or raise its error."""
        if self._given_up is None:
            return
        reading, view = self._given_up
        await self._fds.ended(reading)
        if self._given_up is not None:
            self._given_up = None
            self._unread = view[: reading.result()]
            self._took(self._unread, self._fds.now_ns())

    def _buffer(self, max_bytes: int) -> memoryview:
        if max_bytes > self._buffers.size_bytes:
            self._buffers = Buffers(max_bytes, KEPT_BUFFERS)
        return self._buffers.take()[:max_bytes]

    def _took(self, data: memoryview, start_ns: int) -> Payload:
        """Count what was read."""
        self._fds.timeline.work(Resource.FIRMWARE, "read", start_ns)
        if not len(data):
            return EMPTY
        self.counters.device_bytes += len(data)
        self.counters.reads += 1
        self.counters.read_firmware_ns += self._fds.now_ns() - start_ns
        return data

    # --- write() ------------------------------------------------------------------------------------------------------

    @override
    async def write(self, payload: Payload, piece_bytes: int) -> None:
        if piece_bytes < 1:
            raise fails(errno.EINVAL)
        view = as_view(payload)
        start_ns = self._fds.now_ns()
        if self._concurrent:
            writing = self._start_any(lambda number: _write_record(number, view))
        else:
            writing = self._start("write", lambda number: _write(number, view, piece_bytes))
        await self._fds.wait(writing)
        self._fds.timeline.work(Resource.LOAD, "write", start_ns)

    # --- poll() -------------------------------------------------------------------------------------------------------

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        if self._closing is not None:
            raise fails(errno.EBADF)
        start_ns = self._fds.now_ns()
        found = self._poll()
        if not found and timeout_ns != 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    await self._ready()
            found = self._poll()
        else:
            await asyncio.sleep(0)  # let other tasks run
        self.counters.wakeups += 1
        self._fds.timeline.work(Resource.FIRMWARE, "poll", start_ns)
        return found

    def _poll(self) -> Ready:
        """What poll(2) finds now. A fd whose driver has no poll() is always ready, as poll(2) says."""
        if len(self._unread) or (self._given_up is not None and self._given_up[0].done()):
            return Ready.READABLE
        epoll = self._epoll_fd()
        if epoll is None:
            return Ready.READABLE | Ready.WRITABLE
        events = dict(epoll.poll(0)).get(self._number, 0)
        found = (ready for event, ready in EVENTS.items() if events & event)
        return functools.reduce(or_, found, Ready.NOTHING)

    def _epoll_fd(self) -> select.epoll | None:
        """The epoll that the fd is in; None if its driver has no poll(): EPERM (Linux, fs/eventpoll.c)."""
        if self._epoll is None and self._polls:
            epoll = select.epoll()
            try:
                epoll.register(self._number, select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT)
            except PermissionError:
                epoll.close()
                self._polls = False
            else:
                self._epoll = epoll
        return self._epoll

    async def _ready(self) -> None:
        """Wait until the epoll is readable, by the event loop: this can be cancelled."""
        assert self._epoll is not None
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._epoll.fileno(), set_done, seen)
        try:
            await seen
        finally:
            loop.remove_reader(self._epoll.fileno())

    # --- ioctls -------------------------------------------------------------------------------------------------------

    async def _ioctl(self, what: str, number: int, argument: S) -> S:
        start_ns = self._fds.now_ns()
        answer = await self._fds.wait(self._start("ioctl", lambda fd: call(fd, number, argument)))
        self._fds.timeline.work(Resource.FIRMWARE, what, start_ns)
        return answer

    @override
    async def precopy_info(self) -> PrecopyInfo:
        return await self._ioctl("GET_PRECOPY_INFO", VFIO_MIG_GET_PRECOPY_INFO, PrecopyInfo(0, 0))

    @override
    async def stream_info(self) -> StreamInfo:
        return await self._ioctl("GET_STREAM_INFO", VFIO_MIG_GET_STREAM_INFO, StreamInfo(0, 0))

    @override
    async def get_stream(self, index: int) -> RealFd:
        argument = GetStream(GetStream.SIZE, 0, index)
        getting = self._start("ioctl", lambda fd: call(fd, VFIO_MIG_GET_STREAM, argument).fd)
        try:
            number = await self._fds.wait(getting)
        except BaseException:
            getting.add_done_callback(_close_unwanted_stream)
            raise
        stream = RealFd(number, self.of, self._fds)
        stream._concurrent = self._blocks
        return stream

    # --- blocks -------------------------------------------------------------------------------------------------------

    @override
    async def geometry(self) -> tuple[int, int]:
        size = await self._fds.wait(self._start("ioctl", lambda fd: _dirty_blocks(fd, bytearray(), 0)))
        return size.block_bytes, size.blocks

    @override
    async def dirty_blocks(self) -> DirtyBlocks:
        start_ns = self._fds.now_ns()
        _, blocks = await self.geometry()
        bitmap = bytearray(-(-blocks // 64) * 8)
        size = await self._fds.wait(self._start("ioctl", lambda fd: _dirty_blocks(fd, bitmap, blocks)))
        self._fds.timeline.work(Resource.FIRMWARE, "GET_DIRTY_BLOCKS", start_ns)
        return DirtyBlocks(size.block_bytes, size.blocks, bytes(bitmap[: -(-size.blocks // 8)]))

    @override
    async def read_blocks(self, first: int, count: int) -> Payload:
        start_ns = self._fds.now_ns()
        block_bytes, _ = await self.geometry()
        size = BLOCKS_HEAD_BYTES + count * (VERSION_BYTES + block_bytes)
        view = self._buffer(size)
        await self._fds.wait(self._start_any(lambda number: _pread(number, view, first * block_bytes)))
        self.counters.wakeups += 1
        return self._took(view, start_ns)

    # --- the end ------------------------------------------------------------------------------------------------------

    @override
    async def close(self) -> None:
        """Close it. Returns when the calls that were begun have returned; may be called again."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        stopped = [worker.stop() for worker in self._workers.values()]
        if stopped:
            await asyncio.wait(stopped)
        if self._epoll is not None:
            self._epoll.close()
        closer = Worker(f"{self.name} close")  # a driver's release may wait for its firmware
        await asyncio.wait([closer.start(lambda: os.close(self._number)), closer.stop()])


def _write(number: int, view: memoryview, piece_bytes: int) -> None:
    while len(view):
        view = view[os.write(number, view[:piece_bytes]) :]


def _write_record(number: int, view: memoryview) -> None:
    """One write() with one record of blocks."""
    size = os.write(number, view)
    if size != len(view):
        raise OSError(errno.EIO, f"the driver took {size} bytes of a record of {len(view)}")


def _pread(number: int, view: memoryview, offset: int) -> None:
    """One pread() of one record of blocks."""
    size = os.preadv(number, [view], offset)
    if size != len(view):
        raise OSError(errno.EIO, f"the driver gave {size} bytes of a record of {len(view)}")


def _dirty_blocks(number: int, bitmap: bytearray, blocks: int) -> GetDirtyBlocks:
    """VFIO_MIG_GET_DIRTY_BLOCKS. For a bitmap that is too small it fails with EINVAL, and answers the size needed."""
    address = address_of(bitmap) if bitmap else 0
    buffer = bytearray(GetDirtyBlocks(GetDirtyBlocks.SIZE, 0, 0, blocks, address).pack())
    try:
        fcntl.ioctl(number, VFIO_MIG_GET_DIRTY_BLOCKS, buffer)
    except OSError as error:
        answer = GetDirtyBlocks.unpack(buffer)
        if error.errno != errno.EINVAL or blocks or not answer.blocks:
            raise
        return answer
    return GetDirtyBlocks.unpack(buffer)


def _close_unwanted_stream(getting: asyncio.Future[int]) -> None:
    """The caller of GET_STREAM has stopped waiting: nobody else will close the fd."""
    if not getting.cancelled() and getting.exception() is None:
        with contextlib.suppress(OSError):
            os.close(getting.result())
