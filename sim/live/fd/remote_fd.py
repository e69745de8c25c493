# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's end of a data fd: a descriptor that was passed, and ioctls by calls to the device process.

read(), write() and poll() are real, in threads or on the event loop (see sim.live.io).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from typing_extensions import override

from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import GetStream, PrecopyInfo, StreamInfo, Structure
from sim.device.stream import fails
from sim.live.fd.calls import Calls, Reply
from sim.live.io import Worker, set_done, stop_all
from sim.live.merge_timelines import ProcessTimeline
from sim.report import Counters

S = TypeVar("S", bound=Structure)
WOKEN = -1
"""Returned by read() and readable() when wake() ended the wait."""


# --- what all data fds of a VMM share ---------------------------------------------------------------------------------


class Devices:
    """What the data fds of a VMM share: the calls, the way of moving bytes, the timeline."""

    def __init__(self, calls: Calls, side: str, io: str, timeline: ProcessTimeline, read_bytes: int) -> None:
        self.calls = calls
        self.side = side
        self.io = io
        self.timeline = timeline
        self.read_bytes = read_bytes
        self.fds: list[RemoteFd] = []
        """All that were passed so far."""

    def was_reset(self, device: int) -> None:
        """A device was reset: the sessions that it had are over, also one that had failed."""
        for fd in self.fds:
            if fd.device == device:
                fd.session_over()

    def close(self) -> None:
        """Close all data fds."""
        for fd in self.fds:
            fd.drop()


class RemoteFd(DataFd):
    """A data fd of a live device; read (`remote_read`) or written (`remote_write`)."""

    blocks_kind: type[RemoteFd]
    """The kind that get_stream() returns for addressable blocks."""

    def __init__(self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices) -> None:
        """`device`, `number`: as calls name the device and this fd; `fds` were passed with it."""
        self.counters = Counters()
        """Of this end: calls that returned data, bytes, and all of their time as firmware_ns."""
        self.name = f"{devices.side} {name} fd {number}"
        self._name = name
        self.device = device
        self._number = number
        self._devices = devices
        self._calls = devices.calls
        self._timeline = devices.timeline
        self._fd: Descriptor = descriptor(fds[0], self.name, devices.io)
        self._streams: dict[int, RemoteFd] = {}
        """Of the critical fd: the others that it returned, by number."""
        devices.fds.append(self)

    def _ask(self, name: str, **more: object) -> asyncio.Future[Reply]:
        """A call that is answered when something happens; the answer wakes whoever waits at the fd."""
        asked = self._calls.begin(name, fd=self._number, **more)
        asked.add_done_callback(lambda _: self._fd.wake())
        return asked

    async def _ioctl(self, name: str, argument: S) -> S:
        answer = await self._calls.call(name, device=self.device, fd=self._number, buffer=argument.pack())
        return type(argument).unpack(answer.body["buffer"])

    @override
    async def precopy_info(self) -> PrecopyInfo:
        return await self._ioctl("precopy_info", PrecopyInfo(0, 0))

    @override
    async def stream_info(self) -> StreamInfo:
        return await self._ioctl("stream_info", StreamInfo(0, 0))

    @override
    async def get_stream(self, index: int) -> RemoteFd:
        argument = GetStream(GetStream.SIZE, 0, index).pack()
        answer = await self._calls.call("get_stream", device=self.device, fd=self._number, buffer=argument)
        number = GetStream.unpack(answer.body["buffer"]).fd
        if number not in self._streams:
            kind = self.blocks_kind if answer.body["blocks"] else type(self)
            self._streams[number] = kind(self.device, self._name, number, answer.fds, self._devices)
        return self._streams[number]

    def session_over(self) -> None:
        """The device was reset. The driver says so by itself; this end may know an older error."""

    @override
    async def close(self) -> None:
        await self._calls.call("close", fd=self._number)

    def drop(self) -> None:
        """Close the descriptor without a call to the driver."""
        self._fd.close()


# --- the descriptor ---------------------------------------------------------------------------------------------------


class Descriptor(Protocol):
    """A data fd, for one reader and one writer at a time."""

    number: int
    _closed: bool

    def __init__(self, number: int) -> None:
        os.set_blocking(number, False)
        self.number = number
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise fails(errno.ENODEV)

    async def read(self, view: memoryview) -> int:
        """read(): returns the number of bytes, 0 at the end, or WOKEN if wake() was called and there are no bytes.

        If the caller is cancelled, no bytes are lost: the next call returns them.
        """

    async def readable(self) -> int:
        """poll() for reading: returns 1 if there are bytes or the end; or WOKEN, as read()."""

    def readable_now(self) -> bool:
        """Whether there are bytes or the end, without waiting."""
        now = select.poll()
        if not self._closed:
            now.register(self.number, select.POLLIN)
        return bool(now.poll(0))

    def ends_now(self) -> bool:
        """Whether the driver puts no more into it."""
        now = select.poll()
        if not self._closed:
            now.register(self.number, select.POLLRDHUP)
        return any(events & select.POLLRDHUP for _, events in now.poll(0))

    async def write(self, view: memoryview, piece_bytes: int) -> None:
        """write() all of it, at most `piece_bytes` a call. OSError of write()."""

    def wake(self) -> None:
        """End a waiting read() or readable(), or the next one that would wait."""

    def close(self) -> None:
        """Close it; waiting calls fail with ENODEV. May be called again."""


class ThreadDescriptor(Descriptor):
    """With one thread a direction, which blocks."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number)  # it does not block: poll() does, and close() can end that
        self._name = name
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._in = select.poll()
        self._out = select.poll()
        for waits, what in ((self._in, select.POLLIN), (self._out, select.POLLOUT)):
            waits.register(number, what)
            waits.register(self._closing, select.POLLIN)
        self._in.register(self._wake, select.POLLIN)
        self._reader: Worker | None = None
        self._writer: Worker | None = None
        self._given_up: tuple[asyncio.Future[int], memoryview] | None = None
        """A read whose caller was cancelled, until it has ended."""
        self._unread = memoryview(b"")  # bytes of such a read

    @override
    async def read(self, view: memoryview) -> int:
        await self._end_given_up()
        if len(self._unread):
            size = min(len(view), len(self._unread))
            view[:size], self._unread = self._unread[:size], self._unread[size:]
            return size
        return await self._read_in_thread(lambda: self._read(view), view)

    @override
    async def readable(self) -> int:
        await self._end_given_up()
        if len(self._unread):
            return 1
        return await self._read_in_thread(lambda: 1 if self._wait_in() else WOKEN, memoryview(b""))

    @override
    def readable_now(self) -> bool:
        return bool(len(self._unread)) or super().readable_now()

    @override
    async def write(self, view: memoryview, piece_bytes: int) -> None:
        self._check_open()
        if self._writer is None:
            self._writer = Worker(f"{self._name} write")
        await self._writer.start(lambda: self._write(view, piece_bytes))

    async def _read_in_thread(self, job: Callable[[], int], view: memoryview) -> int:
        self._check_open()
        if self._reader is None:
            self._reader = Worker(f"{self._name} read")
        reading = self._reader.start(job)
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            self._given_up = reading, view
            self.wake()
            raise

    async def _end_given_up(self) -> None:
        """Wait for the end of a read whose caller was cancelled: it would take bytes and wake() from the next one."""
        if self._given_up is not None:
            reading, view = self._given_up
            await asyncio.wait([reading])
            if self._given_up is not None:
                self._given_up = None
                if reading.exception() is None and len(view):
                    self._unread = view[: max(0, reading.result())]
                self.wake()  # it may have taken a wake() that was meant for the next one

    @override
    def wake(self) -> None:
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    @override
    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._closing, 1)
        stop_all((self._reader, self._writer), self._release)

    def _release(self) -> None:
        for number in (self.number, self._wake, self._closing):
            os.close(number)

    def _read(self, view: memoryview) -> int:
        while True:
            try:
                return os.readv(self.number, [view])
            except BlockingIOError:
                if not self._wait_in():
                    return WOKEN

    def _wait_in(self) -> bool:
        """Wait for bytes or the end; False if wake() was first."""
        ready = {fd for fd, _ in self._in.poll()}
        if self._closing in ready:
            raise fails(errno.ENODEV)
        if self.number in ready:
            return True
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        return False

    def _write(self, view: memoryview, piece_bytes: int) -> None:
        while len(view):
            try:
                view = view[os.write(self.number, view[:piece_bytes]) :]
            except BlockingIOError:
                if self._closing in {fd for fd, _ in self._out.poll()}:
                    raise fails(errno.ENODEV) from None


class LoopDescriptor(Descriptor):
    """When the event loop finds it ready; copies are made in the loop's thread."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._waiting: set[asyncio.Future[None]] = set()

    @override
    async def read(self, view: memoryview) -> int:
        while True:
            self._check_open()
            try:
                return os.readv(self.number, [view])
            except BlockingIOError:
                if not await self._wait_in():
                    return WOKEN

    @override
    async def readable(self) -> int:
        self._check_open()
        return 1 if await self._wait_in() else WOKEN

    async def _wait_in(self) -> bool:
        if not self._woken:
            await self._ready(self._loop.add_reader, self._loop.remove_reader)
        woken, self._woken = self._woken, False
        return not woken

    @override
    async def write(self, view: memoryview, piece_bytes: int) -> None:
        while len(view):
            self._check_open()
            try:
                view = view[os.write(self.number, view[:piece_bytes]) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)

    async def _ready(self, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
        """Wait until it is ready, by these methods of the loop, or until wake(). ENODEV if it is closed meanwhile."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(ready)
        watch(self.number, set_done, ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if not self._closed:
                unwatch(self.number)
        self._check_open()

    @override
    def wake(self) -> None:
        self._woken = True
        for ready in self._waiting:
            set_done(ready)

    @override
    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self.number)
        self._loop.remove_writer(self.number)
        os.close(self.number)
        for ready in self._waiting:
            set_done(ready)


def descriptor(number: int, name: str, io: str) -> Descriptor:
    """A data fd that was passed, used in the way that `io` names (sim.live.io.IO)."""
    return ThreadDescriptor(number, name) if io == "threads" else LoopDescriptor(number)
