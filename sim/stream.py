"""Data fds: a stream that is saved from the device, and one that is loaded into it.

`SaveStream` has a producer that fills a few chunks at the firmware's pace and stops when none is free (mlx5: two
chunks of 8 MiB, drivers/vfio/pci/mlx5/main.c), and readers that take bytes out under a lock. What the producer is to
save is its *plan*: critical objects first, then blocks. A block's version is taken when its chunk's SAVE starts.
`LoadStream` takes bytes in, checks that they are in order and whole, and loads each record that they complete.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from proto_v3.device import Ready
from proto_v3.frames import EMPTY, Payload
from proto_v3.timeline import Resource, Timeline, on_track
from proto_v3.uapi import PrecopyInfo, StreamInfo
from sim.clock import now_ns, sleep_ns
from sim.device import DeviceState, Image, Indices
from sim.firmware import FirmwareModel
from sim.record import HEADER_BYTES, NO_INDICES, Extent, Part, Record
from sim.resource import Bell, Memory

DriverLock = AbstractAsyncContextManager[None]


def fails(code: int) -> OSError:
    """The error that a system call gives."""
    return OSError(code, os.strerror(code))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every stream of a device uses."""

    firmware: FirmwareModel
    memory: Memory
    timeline: Timeline
    call_ns: int


@dataclass(slots=True)
class ReadCounts:
    """What reading one stream took: calls that gave data, their bytes, and where their time went."""

    calls: int = 0
    bytes: int = 0
    firmware_ns: int = 0
    lock_ns: int = 0
    copy_ns: int = 0


class SaveStream:
    """A data fd to read from. `home` are its blocks; `objects` says whether it carries the critical objects."""

    def __init__(
        self,
        index: int,
        device: DeviceState,
        around: Surroundings,
        lock: DriverLock,
        *,
        home: slice | None,
        objects: bool,
        chunk_bytes: int,
        chunks: int,
    ) -> None:
        self.reads = ReadCounts()
        self._index = index
        self._device = device
        self._around = around
        self._lock = lock
        self._home = home
        self._carries_objects = objects
        self._chunk_bytes = chunk_bytes
        self._free_chunks = chunks
        self._saving: Record | None = None
        self._records: deque[Record] = deque()
        self._offset = 0  # bytes of the first record that were read
        self._unread_bytes = 0
        self._plan_blocks: Indices = NO_INDICES
        self._plan_objects: Indices = NO_INDICES
        self._planned = False  # something is to be saved, or being saved
        self._initial = True  # until the first image is read: its critical objects count as initial_bytes
        self._final = False
        self._ended = False  # the END record is saved
        self._closed = False
        self._sequence = 0
        self._told_epoch = 0
        self._seen_epoch = 0
        self._bell = Bell()

    # --- the producer -------------------------------------------------------------------------------------------------

    async def produce(self) -> None:
        """Save what is planned, chunk by chunk, until the END record is saved."""
        on_track(f"source {self._device.spec.name} producer {self._index}")
        while True:
            while not self._planned:
                await self._bell.wait()
            while self._free_chunks == 0:
                await self._bell.wait()
            self._free_chunks -= 1
            record = self._saving = self._next_record()
            await self._around.firmware.save(record.size_bytes)
            self._saving = None
            self._records.append(record)
            self._unread_bytes += record.size_bytes
            self._ended = record.end
            self._planned = self._has_plan()
            self._bell.ring()
            if record.end:
                return

    def plan_all(self) -> None:
        """Plan what is dirty: everything at first, later what was written to or reconfigured since it was saved."""
        self._device.advance(now_ns())
        if self._carries_objects:
            self._plan_objects = self._device.dirty_objects()
        if self._home is not None:
            self._plan_blocks = self._device.dirty_blocks(self._home, stopped=self._final)
        self._planned = self._has_plan()
        self._bell.ring()

    def finish(self) -> None:
        """The device is stopped: what is still dirty comes, then the END."""
        self._final = True
        self.plan_all()

    def _new_epoch(self) -> bool:
        return self._home is None and self._device.epoch > self._told_epoch

    def _has_plan(self) -> bool:
        # A new epoch, and the end, are told by a record even where there is nothing to save.
        told = self._final or self._new_epoch() or bool(len(self._plan_objects) or len(self._plan_blocks))
        return self._saving is not None or (told and not self._ended)

    def _next_record(self) -> Record:
        device = self._device
        device.advance(now_ns())
        record = Record(self._index, self._sequence, device.epoch, 0)
        self._sequence += 1
        if len(self._plan_objects) or self._new_epoch():
            count = max(1, self._chunk_bytes // device.object_bytes)
            record.objects, self._plan_objects = self._plan_objects[:count], self._plan_objects[count:]
            record.object_versions = device.save_objects(record.objects)
            record.payload_bytes = len(record.objects) * device.object_bytes
            record.initial = self._initial
            record.epoch_complete = not len(self._plan_objects)
            if record.epoch_complete:
                self._told_epoch = device.epoch
        elif len(self._plan_blocks):
            count = self._chunk_bytes // device.block_bytes
            record.blocks, self._plan_blocks = self._plan_blocks[:count], self._plan_blocks[count:]
            record.block_versions = device.save_blocks(record.blocks)
            record.payload_bytes = len(record.blocks) * device.block_bytes
        else:
            record.end = True
        return record

    # --- the fd -------------------------------------------------------------------------------------------------------

    async def read(self, max_bytes: int) -> Payload:
        """See proto_v3.device.DataFd."""
        asked_ns = now_ns()
        while await self._has_data():
            ready_ns = now_ns()
            async with self._lock:
                if not self._unread_bytes:  # another reader took it while this one waited for the lock
                    continue
                locked_ns = now_ns()
                data, chunks = self._take(min(max_bytes, self._unread_bytes))
                await self._around.memory.copy(len(data), self._around.call_ns, "read")
                self._check_open()
                if chunks:
                    self._free_chunks += chunks
                    self._bell.ring()
            counts = self.reads
            counts.calls += 1
            counts.bytes += len(data)
            counts.firmware_ns += ready_ns - asked_ns
            counts.lock_ns += locked_ns - ready_ns
            counts.copy_ns += now_ns() - locked_ns
            return data
        return EMPTY

    async def _has_data(self) -> bool:
        """Wait for data; False at the end of the stream. ENOMSG at the temporary one, ENODEV if the fd is stale."""
        while True:
            self._check_open()
            if self._unread_bytes:
                return True
            if self._planned:
                await self._bell.wait()
                continue
            await self._call()
            if not (self._unread_bytes or self._planned or self._closed):  # nothing came while the call went on
                if self._final:
                    return False
                raise fails(errno.ENOMSG)

    async def _call(self) -> None:
        """The fixed cost of a call that copies nothing."""
        start = now_ns()
        await sleep_ns(self._around.call_ns)
        self._around.timeline.work(Resource.COPY, "call", start)

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """Not for a stream that is saved: EBADF, as for any fd that is open for reading only."""
        raise fails(errno.EBADF)

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """See proto_v3.device.DataFd."""
        if not self._ready() and timeout_ns != 0:
            try:
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    while not self._ready():
                        await self._bell.wait()
            except TimeoutError:
                pass
        return self._ready()

    async def precopy_info(self) -> PrecopyInfo:
        """See proto_v3.device.DataFd."""
        await self._call()
        self._check_open()
        if self._final:
            raise fails(errno.EINVAL)
        self._refill_if_drained()
        initial = self._initial_bytes()
        return PrecopyInfo(initial, self.pending_bytes() - initial)

    async def stream_info(self) -> StreamInfo:
        """See proto_v3.device.DataFd."""
        await self._call()
        self._check_open()
        self._device.advance(now_ns())
        if self._new_epoch() and not self._planned:
            self.plan_all()
        self._refill_if_drained()
        self._seen_epoch = self._device.epoch
        return StreamInfo(self._device.epoch, self.pending_bytes())

    def pending_bytes(self) -> int:
        """Unread bytes, those that are being saved, and those that are planned."""
        device = self._device
        saving = self._saving.size_bytes if self._saving else 0
        blocks = _records_bytes(len(self._plan_blocks), device.block_bytes, self._chunk_bytes)
        return self._unread_bytes + saving + self._planned_object_bytes() + blocks

    def planned_bytes(self) -> int:
        """Bytes of the state that are planned, not saved yet."""
        device = self._device
        return len(self._plan_objects) * device.object_bytes + len(self._plan_blocks) * device.block_bytes

    def _planned_object_bytes(self) -> int:
        return _records_bytes(len(self._plan_objects), self._device.object_bytes, self._chunk_bytes)

    def _initial_bytes(self) -> int:
        """What is left of the first image's critical objects."""
        if not self._initial:
            return 0
        saving = self._saving.size_bytes if self._saving and self._saving.initial else 0
        return self._unread_initial_bytes() + saving + self._planned_object_bytes()

    def close(self) -> None:
        """The session is over: whoever waits gets ENODEV."""
        self._closed = True
        self._bell.ring()

    def _refill_if_drained(self) -> None:
        if not (self._planned or self._unread_bytes or self._final):
            self._initial = False
            self.plan_all()

    def _ready(self) -> Ready:
        ready = Ready.NOTHING
        if self._unread_bytes or self._closed or (self._final and not self._planned):
            ready |= Ready.READABLE
        if self._home is None and self._device.epoch > self._seen_epoch:
            ready |= Ready.NEW_EPOCH
        return ready

    def _unread_initial_bytes(self) -> int:
        unread = sum(record.size_bytes for record in self._records if record.initial)
        return unread - (self._offset if self._records and self._records[0].initial else 0)

    def _take(self, size: int) -> tuple[Extent, int]:
        """Cut so many bytes off the queue; how many chunks are wholly read with them."""
        self._unread_bytes -= size
        parts = []
        chunks = 0
        while size:
            record = self._records[0]
            part = Part(record, self._offset, min(record.size_bytes, self._offset + size))
            parts.append(part)
            taken = part.stop - part.start
            size -= taken
            self._offset = part.stop
            if part.stop == record.size_bytes:
                self._records.popleft()
                self._offset = 0
                chunks += 1
        return Extent(parts), chunks

    def _check_open(self) -> None:
        if self._closed:
            raise fails(errno.ENODEV)


def _records_bytes(count: int, each_bytes: int, chunk_bytes: int) -> int:
    """Bytes of so many blocks or objects in records, headers included."""
    return count * each_bytes + -(-count // max(1, chunk_bytes // each_bytes)) * HEADER_BYTES


class LoadSession:
    """What the streams of one device's load share: the image, and what is loaded of it so far."""

    def __init__(self, image: Image, around: Surroundings, setup_ns: int, streams: int, *, holds_back: bool) -> None:
        self.image = image
        self.around = around
        self.holds_back = holds_back
        self._setup_ns = setup_ns
        self._open_streams = streams
        self._closed = False
        self._epoch_loaded = 0
        self._bell = Bell()

    @property
    def whole(self) -> bool:
        """Whether every stream came to its end."""
        return self._open_streams == 0

    def close(self) -> None:
        """The session is over: whoever waits gets ENODEV."""
        self._closed = True
        self._bell.ring()

    def check_open(self) -> None:
        """ENODEV if the session is over."""
        if self._closed:
            raise fails(errno.ENODEV)

    async def load(self, record: Record) -> None:
        """Load one whole record."""
        if record.end:
            self._open_streams -= 1
            if self.whole:
                await self.around.firmware.finish_load()
        elif len(record.blocks):
            while self.holds_back and self._epoch_loaded < record.epoch:
                await self._bell.wait()
                self.check_open()
            await self.around.firmware.load(record.size_bytes)
            self.check_open()
            self.image.version[record.blocks] = record.block_versions
        else:
            await self._load_objects(record)

    async def _load_objects(self, record: Record) -> None:
        await self.around.firmware.load(record.size_bytes)
        start = now_ns()
        await sleep_ns(self._setup_ns * len(record.objects))
        self.around.timeline.work(Resource.SETUP, "critical set-up", start)
        self.check_open()
        self.image.object_version[record.objects] = record.object_versions
        if record.epoch_complete:
            self._epoch_loaded = max(self._epoch_loaded, record.epoch)
            self._bell.ring()


class LoadStream:
    """A data fd to write to."""

    def __init__(self, index: int, session: LoadSession, lock: DriverLock) -> None:
        self._index = index
        self._session = session
        self._lock = lock
        self._sequence = 0
        self._offset = 0

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """See proto_v3.device.DataFd."""
        self._session.check_open()
        if not isinstance(payload, Extent):
            raise fails(errno.EINVAL)
        async with self._lock:
            around = self._session.around
            calls = -(-len(payload) // piece_bytes)
            await around.memory.copy(len(payload), calls * around.call_ns, "write")
            self._session.check_open()
            for part in payload.parts:
                self._check_order(part)
                if part.stop == part.record.size_bytes:
                    self._sequence += 1
                    self._offset = 0
                    await self._session.load(part.record)

    def _check_order(self, part: Part) -> None:
        """The next bytes of the stream must be these; anything else is a stream that was cut, altered or reordered."""
        record = part.record
        if record.stream != self._index or record.sequence != self._sequence or part.start != self._offset:
            raise fails(errno.EINVAL)
        self._offset = part.stop

    async def read(self, max_bytes: int) -> Payload:
        """Not for a stream that is loaded: EBADF."""
        raise fails(errno.EBADF)

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """Nothing can be read from it, ever."""
        return Ready.NOTHING

    async def precopy_info(self) -> PrecopyInfo:
        """Not in RESUMING: EINVAL."""
        raise fails(errno.EINVAL)

    async def stream_info(self) -> StreamInfo:
        """Not in RESUMING: EINVAL."""
        raise fails(errno.EINVAL)
