"""A device as its VMM sees it: ioctls by calls to the device process, data fds as descriptors that were passed.

These are the ports of `proto_v3.vfio.device`, so the protocols cannot tell it from the simulated one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

from proto_v3.timeline import Resource
from proto_v3.vfio.device import NO_STREAM_FLAGS, DirtyBlocks, Ready
from proto_v3.vfio.uapi import (
    DeviceFeature,
    Feature,
    FeatureMigDataSize,
    FeatureMigration,
    FeatureMigState,
    FeatureMigStreams,
    FeatureOp,
    GetDirtyBlocks,
    GetStream,
    MigrationFlags,
    PrecopyInfo,
    State,
    StreamFlags,
    StreamInfo,
    Structure,
)
from proto_v3.wire.frames import EMPTY, Payload
from sim.device.stream import ReadCounts, fails
from sim.live.buffers import Buffers, as_view
from sim.live.fd.calls import Calls, Reply
from sim.live.fd.copy import AnnouncedBytes
from sim.live.fd.data_fd import WOKEN, Descriptor, descriptor
from sim.live.fd.load import SIZE, TAKEN
from sim.live.io import OnLoop, Worker, look
from sim.live.merge_timelines import ProcessTimeline

S = TypeVar("S", bound=Structure)
ANSWER_BYTES = 4096
KEPT_BUFFERS = 2
"""Of each data fd: one is being sent while the next is read; with multifd more, which are made anew."""


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

    def close(self) -> None:
        """Close all data fds."""
        for fd in self.fds:
            fd.drop()


class RemoteDevice:
    """See proto_v3.vfio.device.MigrationDevice."""

    def __init__(self, index: int, name: str, devices: Devices) -> None:
        self.name = name
        self._index = index
        self._devices = devices

    async def _get(self, feature: Feature, kind: type[S]) -> S:
        answer = await self._feature(feature | FeatureOp.GET, bytes(kind.SIZE))
        return kind.unpack(answer.body["buffer"][DeviceFeature.SIZE :])

    async def _set(self, feature: Feature, data: bytes = b"") -> Reply:
        return await self._feature(feature | FeatureOp.SET, data)

    async def _feature(self, flags: int, data: bytes) -> Reply:
        header = DeviceFeature(DeviceFeature.SIZE + len(data), flags).pack()
        return await self._devices.calls.call("feature", device=self._index, buffer=header + data)

    async def migration_flags(self) -> MigrationFlags:
        """See proto_v3.vfio.device.MigrationDevice."""
        return (await self._get(Feature.MIGRATION, FeatureMigration)).flags

    async def state(self) -> State:
        """See proto_v3.vfio.device.MigrationDevice."""
        return State((await self._get(Feature.MIG_DEVICE_STATE, FeatureMigState)).device_state)

    async def set_state(self, target: State) -> RemoteFd | None:
        """See proto_v3.vfio.device.MigrationDevice."""
        answer = await self._set(Feature.MIG_DEVICE_STATE, FeatureMigState(target).pack())
        number = FeatureMigState.unpack(answer.body["buffer"][DeviceFeature.SIZE :]).data_fd
        if number < 0:
            return None
        loads = target is State.RESUMING
        return RemoteFd(self._index, self.name, number, answer.fds, self._devices, loads=loads)

    async def reset(self) -> None:
        """See proto_v3.vfio.device.MigrationDevice."""
        await self._devices.calls.call("reset", device=self._index)

    async def stop_copy_bytes(self) -> int:
        """See proto_v3.vfio.device.MigrationDevice."""
        return (await self._get(Feature.MIG_DATA_SIZE, FeatureMigDataSize)).stop_copy_length

    async def set_precopy_info_v2(self) -> None:
        """See proto_v3.vfio.device.MigrationDevice."""
        await self._set(Feature.MIG_PRECOPY_INFOV2)

    async def streams(self) -> FeatureMigStreams:
        """See proto_v3.vfio.device.MigrationDevice."""
        return await self._get(Feature.MIG_STREAMS, FeatureMigStreams)

    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        """See proto_v3.vfio.device.MigrationDevice."""
        await self._set(Feature.MIG_STREAMS, FeatureMigStreams(dirty_streams, flags).pack())


class RemoteFd:
    """See proto_v3.vfio.device.DataFd."""

    def __init__(
        self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices, *, loads: bool
    ) -> None:
        """`fds` were passed for it; `loads`: it is to be written to; else it is to be read."""
        self.reads = ReadCounts()
        """Of this end: calls that gave data, bytes, and all of their time as firmware_ns."""
        self.name = f"{devices.side} {name} fd {number}"
        self._name = name
        self._device = device
        self._number = number
        self._loads = loads
        self._devices = devices
        self._calls = devices.calls
        self._timeline = devices.timeline
        self._fd: Descriptor = descriptor(fds[0], self.name, devices.io)
        self._promise = AnnouncedBytes(fds[1]) if loads else None
        self._buffers = Buffers(devices.read_bytes, KEPT_BUFFERS)
        self._idle: asyncio.Future[Reply] | None = None
        self._epoch: asyncio.Future[Reply] | None = None
        self._streams: dict[int, RemoteFd] = {}
        """Of the critical fd: the others that it gave, by number."""
        self._written = 0
        self._listening = False
        self._refused = 0  # the errno that every write() gets, if any
        self._writers: deque[tuple[int, asyncio.Future[int]]] = deque()
        self._answer = b""
        self._turn = asyncio.Lock()
        devices.fds.append(self)

    # --- read and poll ------------------------------------------------------------------------------------------------

    async def read(self, max_bytes: int) -> Payload:
        """See proto_v3.vfio.device.DataFd."""
        self._check(loads=False)
        if max_bytes < 1:
            raise fails(errno.EINVAL)
        start_ns = self._timeline.now_ns()
        if self._idle is not None and self._idle.done():
            self._idle = None  # what was so before this call may not be so any more
        lent = self._buffers.take()
        view = lent.view[:max_bytes]
        while True:
            idle = self._idle = self._idle or self._ask("idle")
            if idle.done():
                self._fd.wake()
            got = await self._fd.read(view)
            if got > 0:
                self.reads.bytes += got
                self.reads.calls += 1
                self.reads.firmware_ns += self._timeline.now_ns() - start_ns
                self._timeline.got(Resource.COPY, "read", f"{self.name} read", self.reads.bytes, start_ns)
                self._timeline.gave(f"{self.name} room", self.reads.bytes, start_ns)  # it wakes whoever waits for it
                return view[:got]
            if got == 0:
                await asyncio.wait([idle])
            if idle.done() and self._is_end(idle.result(), closed=got == 0):
                return EMPTY

    def _check(self, *, loads: bool) -> None:
        """EBADF for a read() of an fd that is open for writing only, and the other way round."""
        if self._loads is not loads:
            raise fails(errno.EBADF)

    def _ask(self, name: str, **more: Any) -> asyncio.Future[Reply]:
        """A call that is answered when something comes to be; it then wakes whoever waits at the fd."""
        asked = self._calls.begin(name, fd=self._number, **more)
        asked.add_done_callback(lambda _: self._fd.wake())
        return asked

    def _is_end(self, answer: Reply, *, closed: bool) -> bool:
        """There was nothing to read, and the driver says why: whether it is the end, or its error raised.

        False if it is not so any more: there is more in the socket.
        """
        told = answer.body
        if told["sent"] > self.reads.bytes and not closed and told["what"] != "ERROR":
            return False
        self._idle = None
        self.reads.wakeups += 1
        edge = f"{self._devices.side} answer"
        self._timeline.got(Resource.COPY, "read", edge, answer.number, self._timeline.now_ns())
        if told["what"] != "END":
            raise OSError(told["errno"], told["text"] or os.strerror(told["errno"]))
        if told["sent"] != self.reads.bytes:
            raise OSError(errno.ENODEV, f"{self.name}: {self.reads.bytes} bytes of {told['sent']} came")
        return True

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """See proto_v3.vfio.device.DataFd."""
        if self._loads:
            return Ready.NOTHING
        if timeout_ns != 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    return await self._poll()
        return await self._ready()

    async def _ready(self) -> Ready:
        """What there is now."""
        ready = Ready.READABLE if self._fd.readable_now() else Ready.NOTHING
        with contextlib.suppress(OSError):  # ENOTTY: it has no epochs to tell of
            if (await self._calls.call("new_epoch", fd=self._number, wait=False)).body["new"]:
                ready |= Ready.NEW_EPOCH
        return ready

    async def _poll(self) -> Ready:
        start_ns = self._timeline.now_ns()
        while True:
            epoch = self._epoch = self._epoch or self._ask("new_epoch", wait=True)
            if _came(epoch):
                self._fd.wake()
            got = await self._fd.readable()
            if got == WOKEN and not _came(epoch):
                continue
            self.reads.wakeups += 1
            edge, count = f"{self.name} read", self.reads.bytes + 1
            if _came(epoch):
                edge, count = f"{self._devices.side} answer", epoch.result().number
            self._timeline.got(Resource.COPY, "poll", edge, count, start_ns)
            readable = Ready.READABLE if got != WOKEN else Ready.NOTHING
            return readable | (Ready.NEW_EPOCH if _came(epoch) else Ready.NOTHING)

    # --- ioctls -------------------------------------------------------------------------------------------------------

    async def _ioctl(self, name: str, asked: S) -> S:
        answer = await self._calls.call(name, device=self._device, fd=self._number, buffer=asked.pack())
        return type(asked).unpack(answer.body["buffer"])

    async def precopy_info(self) -> PrecopyInfo:
        """See proto_v3.vfio.device.DataFd."""
        return await self._ioctl("precopy_info", PrecopyInfo(0, 0))

    async def stream_info(self) -> StreamInfo:
        """See proto_v3.vfio.device.DataFd."""
        info = await self._ioctl("stream_info", StreamInfo(0, 0))
        if self._epoch is not None and _came(self._epoch):
            self._epoch = None  # answers come in order: that one was told before this one
        return info

    async def get_stream(self, index: int) -> RemoteFd:
        """See proto_v3.vfio.device.DataFd."""
        asked = GetStream(GetStream.SIZE, 0, index).pack()
        answer = await self._calls.call("get_stream", device=self._device, fd=self._number, buffer=asked)
        number = GetStream.unpack(answer.body["buffer"]).fd
        if number not in self._streams:
            kind = RemoteBlocksFd if answer.body["blocks"] else RemoteFd
            stream = kind(self._device, self._name, number, answer.fds, self._devices, loads=self._loads)
            self._streams[number] = stream
        return self._streams[number]

    # --- write --------------------------------------------------------------------------------------------------------

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """See proto_v3.vfio.device.DataFd."""
        self._check(loads=True)
        if piece_bytes < 1:
            raise fails(errno.EINVAL)
        if self._refused:
            raise fails(self._refused)
        view = as_view(payload)
        prefix = self._prefix(len(view))
        if not (prefix or len(view)):
            return
        self._listen()
        start_ns = self._timeline.now_ns()
        self._written += len(prefix) + len(view)
        taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._writers.append((self._written, taken))
        self._timeline.gave(f"{self.name} write", self._written)
        if self._promise is not None:
            self._promise.bytes = self._written
        with contextlib.suppress(ConnectionError):  # the driver takes no more, and says why
            async with self._turn:
                await self._fd.write(memoryview(prefix), max(1, len(prefix)))
                await self._fd.write(view, piece_bytes)
        sent_ns = self._timeline.now_ns()
        self._timeline.work(Resource.COPY, "write", start_ns)
        number = await taken
        self._timeline.got(Resource.COPY, "write", f"{self.name} taken", number, sent_ns)

    def _prefix(self, size: int) -> bytes:
        """What the driver has to be told before a payload of so many bytes: nothing, if where it ends does not
        matter."""
        return b""

    def _listen(self) -> None:
        """Hear what the driver took, from now on."""
        if not self._listening:
            self._listening = True
            asyncio.get_running_loop().add_reader(self._fd.number, self._answered)
            self._calls.gone.add_done_callback(lambda _: self._refuse(fails(errno.ENODEV), errno.ENODEV))

    def _answered(self) -> None:
        try:
            data = os.read(self._fd.number, ANSWER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd.number)
            self._refuse(OSError(errno.ENODEV, f"{self.name}: the driver takes no more"), errno.ENODEV)
            return
        self._answer += data
        while len(self._answer) >= TAKEN.size:
            taken, number, code, later, text_bytes = TAKEN.unpack_from(self._answer)
            if len(self._answer) < TAKEN.size + text_bytes:
                return
            text = self._answer[TAKEN.size : TAKEN.size + text_bytes].decode(errors="replace")
            self._answer = self._answer[TAKEN.size + text_bytes :]
            if code:
                self._refuse(OSError(code, text), later, taken)
                self._take_answer(taken - 1, number)  # what came before that was taken
            else:
                self._take_answer(taken, number)

    def _take_answer(self, taken: int, number: int) -> None:
        while self._writers and self._writers[0][0] <= taken:
            _, writer = self._writers.popleft()
            if not writer.done():
                writer.set_result(number)

    def _refuse(self, error: OSError, later: int, at: int = 0) -> None:
        """What came up to a place was refused, by an error for the write() that it is in; all after it get another."""
        self._refused = self._refused or later
        for writer in [writer for writer in self._writers if writer[0] >= at]:
            self._writers.remove(writer)
            if not writer[1].done():
                writer[1].set_exception(error)
                look(writer[1])
            error = fails(later)

    async def close(self) -> None:
        """See proto_v3.vfio.device.DataFd."""
        await self._calls.call("close", device=self._device, fd=self._number)

    def drop(self) -> None:
        """Close the descriptor, without a word to the driver."""
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._fd.number)
        self._refuse(fails(errno.ENODEV), errno.ENODEV)
        if self._promise is not None:
            self._promise.close()
            self._promise = None
        self._fd.close()


def _came(epoch: asyncio.Future[Reply]) -> bool:
    """Whether a new epoch was told of; a driver that has none to tell of does not answer so."""
    return epoch.done() and epoch.exception() is None and bool(epoch.result().body["new"])


class RemoteBlocksFd(RemoteFd):
    """See proto_v3.vfio.device.BlocksFd: at the source a memfd to pread() from, at the target a socket as all
    others are."""

    def __init__(
        self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices, *, loads: bool
    ) -> None:
        super().__init__(device, name, number, fds, devices, loads=loads)
        self._readers: list[Worker] = []
        self._reading = 0  # threads in a pread()
        self._dropped = False
        self._done_slots: list[int] = []

    async def geometry(self) -> tuple[int, int]:
        """See proto_v3.vfio.device.BlocksFd."""
        size, _ = await self._dirty(0)
        return size.block_bytes, size.blocks

    async def dirty_blocks(self) -> DirtyBlocks:
        """See proto_v3.vfio.device.BlocksFd."""
        _, blocks = await self.geometry()
        told, bitmap = await self._dirty(blocks)
        return DirtyBlocks(told.block_bytes, told.blocks, bitmap)

    async def _dirty(self, blocks: int) -> tuple[GetDirtyBlocks, bytes]:
        asked = GetDirtyBlocks(GetDirtyBlocks.SIZE, 0, 0, blocks, 0).pack()
        bitmap_bytes = -(-blocks // 8)
        answer = await self._calls.call("dirty_blocks", fd=self._number, buffer=asked, bitmap_bytes=bitmap_bytes)
        return GetDirtyBlocks.unpack(answer.body["buffer"]), answer.body["bitmap"]

    async def read_blocks(self, first: int, count: int) -> Payload:
        """See proto_v3.vfio.device.BlocksFd: any number of readers at once, each pread() in a thread of its own."""
        self._check(loads=False)
        start_ns = self._timeline.now_ns()
        free = self._done_slots.pop() if self._done_slots else -1
        answer = await self._calls.call("read_blocks", fd=self._number, first=first, count=count, free=free)
        offset, size = answer.body["offset"], answer.body["size"]
        if size > self._buffers.size_bytes:
            self._buffers = Buffers(size, KEPT_BUFFERS)
        view = self._buffers.take().view[:size]
        if self._devices.io == OnLoop.name:
            self._pread(view, offset)
        else:
            reader = self._readers.pop() if self._readers else Worker(f"{self.name} reader")
            reading = reader.start(lambda: self._pread(view, offset))
            self._reading += 1
            reading.add_done_callback(lambda _: self._has_read(reader))
            await asyncio.shield(reading)
        self._done_slots.append(offset)
        self.reads.calls += 1
        self.reads.bytes += size
        self.reads.wakeups += 1
        self.reads.firmware_ns += self._timeline.now_ns() - start_ns
        self._timeline.work(Resource.COPY, "read", self._timeline.now_ns())
        return view

    def _has_read(self, reader: Worker) -> None:
        self._reading -= 1
        self._readers.append(reader)
        if self._dropped:
            self.drop()

    def _pread(self, view: memoryview, offset: int) -> None:
        while len(view):
            got = os.preadv(self._fd.number, [view], offset)
            view, offset = view[got:], offset + got

    async def read(self, max_bytes: int) -> Payload:
        """See proto_v3.vfio.device.BlocksFd."""
        self._check(loads=False)
        answer = await self._calls.call("read_end", fd=self._number, max_bytes=max_bytes)
        data = answer.body["data"]
        self.reads.bytes += len(data)
        return memoryview(data) if data else EMPTY

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """See proto_v3.vfio.device.BlocksFd."""
        return Ready.NOTHING if self._loads else Ready.READABLE

    def _prefix(self, size: int) -> bytes:
        return SIZE.pack(size)

    def _take_answer(self, taken: int, number: int) -> None:
        """Each record is answered by itself, in any order."""
        for writer in [writer for writer in self._writers if writer[0] == taken]:
            self._writers.remove(writer)
            if not writer[1].done():
                writer[1].set_result(number)

    def drop(self) -> None:
        """See RemoteFd; the memfd is closed when nobody reads from it any more."""
        self._dropped = True
        for reader in self._readers:
            reader.stop()
        self._readers.clear()
        if not self._reading:
            super().drop()
