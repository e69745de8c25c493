# SPDX-License-Identifier: GPL-2.0-or-later
"""Data fds of a live device that a VMM reads: a socket, or a memfd for addressable blocks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Sequence

from typing_extensions import override

from proto_v3.timeline import Resource
from proto_v3.vfio.device import BlocksFd, DirtyBlocks, Ready
from proto_v3.vfio.uapi import GetDirtyBlocks, StreamInfo
from proto_v3.wire.frames import EMPTY, Payload
from sim.device.stream import ReadOnlyFd, fails
from sim.live.buffers import Buffers
from sim.live.fd.calls import Reply
from sim.live.fd.remote_fd import WOKEN, Devices, RemoteFd
from sim.live.io import LOOP, Worker

KEPT_BUFFERS = 2
"""Of each data fd: one is being sent while the next is read. With multifd more are used; those are made anew."""


class RemoteReadFd(RemoteFd, ReadOnlyFd):
    """A stream that is saved."""

    def __init__(self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices) -> None:
        super().__init__(device, name, number, fds, devices)
        self._buffers = Buffers(devices.read_bytes, KEPT_BUFFERS)
        self._idle: asyncio.Future[Reply] | None = None
        """The call `idle`, outstanding or answered."""
        self._epoch: asyncio.Future[Reply] | None = None
        """The call `new_epoch`, outstanding or answered."""

    @override
    async def read(self, max_bytes: int) -> Payload:
        if max_bytes < 1:
            raise fails(errno.EINVAL)
        start_ns = self._timeline.now_ns()
        if self._idle is not None and self._idle.done():
            self._idle = None  # its answer is older than this call
        view = self._buffers.take()[:max_bytes]
        while True:
            idle = self._idle = self._idle or self._ask("idle")
            if idle.done():
                self._fd.wake()
            size = await self._fd.read(view)
            if size > 0:
                self.counters.device_bytes += size
                self.counters.reads += 1
                self.counters.read_firmware_ns += self._timeline.now_ns() - start_ns
                total = self.counters.device_bytes
                self._timeline.waited_for(Resource.COPY, "read", f"{self.name} read", total, start_ns)
                # it wakes whoever waits for room
                self._timeline.sent(f"{self.name} room", total, start_ns)
                return view[:size]
            if size == 0:
                await asyncio.wait([idle])
            if idle.done() and self._is_end(idle.result(), closed=size == 0):
                return EMPTY

    def _is_end(self, answer: Reply, *, closed: bool) -> bool:
        """Nothing was read, and the driver answered why: True at the end of the stream, or its error is raised.

        False if the answer is outdated: there is more in the socket.
        """
        end = answer.body
        if end["sent"] > self.counters.device_bytes and not closed and end["what"] != "ERROR":
            return False
        self._idle = None
        self.counters.wakeups += 1
        edge = f"{self._devices.side} answer"
        self._timeline.waited_for(Resource.COPY, "read", edge, answer.number, self._timeline.now_ns())
        if end["what"] != "END":
            raise OSError(end["errno"], end["text"] or os.strerror(end["errno"]))
        if end["sent"] != self.counters.device_bytes:
            raise OSError(errno.ENODEV, f"{self.name}: {self.counters.device_bytes} bytes of {end['sent']} came")
        return True

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        if timeout_ns != 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    return await self._poll()
        return await self._ready()

    async def _ready(self) -> Ready:
        """What poll() finds now."""
        ready = Ready.READABLE if self._fd.readable_now() else Ready.NOTHING
        return ready | await self._events()

    async def _events(self) -> Ready:
        """v3: a new epoch, the end of the session. Nothing of v2's fds."""
        with contextlib.suppress(OSError):  # ENOTTY: v2's
            events = (await self._calls.call("new_epoch", fd=self._number, wait=False)).body
            return Ready(events["end"]) | (Ready.NEW_EPOCH if events["new"] else Ready.NOTHING)
        return Ready.NOTHING

    async def _poll(self) -> Ready:
        start_ns = self._timeline.now_ns()
        while True:
            epoch = self._epoch = self._epoch or self._ask("new_epoch", wait=True)
            if _is_new(epoch):
                self._fd.wake()
            found = await self._fd.readable()
            if found == WOKEN and not _is_new(epoch):
                continue
            self.counters.wakeups += 1
            edge, count = f"{self.name} read", self.counters.device_bytes + 1
            if _is_new(epoch):
                edge, count = f"{self._devices.side} answer", epoch.result().number
            self._timeline.waited_for(Resource.COPY, "poll", edge, count, start_ns)
            if self._fd.ends_now():
                return Ready.READABLE | await self._events()
            readable = Ready.READABLE if found != WOKEN else Ready.NOTHING
            return readable | (Ready.NEW_EPOCH if _is_new(epoch) else Ready.NOTHING)

    @override
    async def stream_info(self) -> StreamInfo:
        info = await super().stream_info()
        if self._epoch is not None and _is_new(self._epoch):
            self._epoch = None  # answers come in order: that one is older than this one
        return info


def _is_new(epoch: asyncio.Future[Reply]) -> bool:
    """Whether the call `new_epoch` reported one; a driver without epochs answers with an error."""
    return epoch.done() and epoch.exception() is None and bool(epoch.result().body["new"])


class RemoteReadBlocksFd(RemoteReadFd, BlocksFd):
    """Addressable blocks: records in a memfd, to pread() from; the END and all else by calls."""

    def __init__(self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices) -> None:
        super().__init__(device, name, number, fds, devices)
        self._readers: list[Worker] = []
        """Threads with nothing to do."""
        self._reading = 0  # threads in a pread()
        self._dropped = False
        self._done_slots: list[int] = []
        """Offsets of records that were read: the next call hands one back."""

    @override
    async def geometry(self) -> tuple[int, int]:
        size, _ = await self._dirty(0)
        return size.block_bytes, size.blocks

    @override
    async def dirty_blocks(self) -> DirtyBlocks:
        _, blocks = await self.geometry()
        size, bitmap = await self._dirty(blocks)
        return DirtyBlocks(size.block_bytes, size.blocks, bitmap)

    async def _dirty(self, blocks: int) -> tuple[GetDirtyBlocks, bytes]:
        argument = GetDirtyBlocks(GetDirtyBlocks.SIZE, 0, 0, blocks, 0).pack()
        bitmap_bytes = -(-blocks // 8)
        answer = await self._calls.call("dirty_blocks", fd=self._number, buffer=argument, bitmap_bytes=bitmap_bytes)
        return GetDirtyBlocks.unpack(answer.body["buffer"]), answer.body["bitmap"]

    @override
    async def read_blocks(self, first: int, count: int) -> Payload:
        """Any number of readers at once, each pread() in a thread of its own."""
        start_ns = self._timeline.now_ns()
        free = self._done_slots.pop() if self._done_slots else -1
        answer = await self._calls.call("read_blocks", fd=self._number, first=first, count=count, free=free)
        offset, size = answer.body["offset"], answer.body["size"]
        if size > self._buffers.size_bytes:
            self._buffers = Buffers(size, KEPT_BUFFERS)
        view = self._buffers.take()[:size]
        if self._devices.io == LOOP:
            self._pread(view, offset)
        else:
            reader = self._readers.pop() if self._readers else Worker(f"{self.name} reader")
            reading = reader.start(lambda: self._pread(view, offset))
            self._reading += 1
            reading.add_done_callback(lambda _: self._has_read(reader))
            await asyncio.shield(reading)
        self._done_slots.append(offset)
        self.counters.reads += 1
        self.counters.device_bytes += size
        self.counters.wakeups += 1
        self.counters.read_firmware_ns += self._timeline.now_ns() - start_ns
        self._timeline.work(Resource.COPY, "read", self._timeline.now_ns())
        return view

    def _has_read(self, reader: Worker) -> None:
        self._reading -= 1
        self._readers.append(reader)
        if self._dropped:
            self.drop()

    def _pread(self, view: memoryview, offset: int) -> None:
        while len(view):
            size = os.preadv(self._fd.number, [view], offset)
            view, offset = view[size:], offset + size

    @override
    async def read(self, max_bytes: int) -> Payload:
        answer = await self._calls.call("read_end", fd=self._number, max_bytes=max_bytes)
        data = answer.body["data"]
        self.counters.device_bytes += len(data)
        return memoryview(data) if data else EMPTY

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Blocks can be read at any time."""
        return Ready.READABLE | await self._events()

    @override
    def drop(self) -> None:
        """Close the memfd, when nobody reads from it any more."""
        self._dropped = True
        for reader in self._readers:
            reader.stop()
        self._readers.clear()
        if not self._reading:
            super().drop()


RemoteReadFd.blocks_kind = RemoteReadBlocksFd
