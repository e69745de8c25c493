"""A data fd to read from: a stream that is saved from the device; what v2 (`sim/device/save_v2`) and v3
(`sim/device/save_v3`) share.

A producer saves what is *planned*, one SAVE command at a time, and appends a record; readers take the bytes out under
the fd's lock. A plan is critical objects first, then blocks; a version is taken when its SAVE starts. Entering PRE_COPY
plans the whole state; entering STOP_COPY plans what is left. That SAVE is only queued then: the first read() pays its
latency. It comes in chunks, of which two exist; the next SAVE waits until one is read (Linux
drivers/vfio/pci/mlx5/main.c). What is planned in between is what v2 and v3 differ in.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Awaitable, Callable

from proto_v3.timeline import on_track
from proto_v3.vfio.device import Ready
from proto_v3.wire.frames import EMPTY, Payload
from sim.clock.port import now_ns
from sim.device.record import HEADER_BYTES, NO_INDICES, Extent, Record, RecordSlice, Tally, ranges_bytes, table_bytes
from sim.device.state import DeviceState, Indices
from sim.device.stream import DriverLock, MigrationSession, SavedFd, fails
from sim.scenario.tables import Device, Driver
from sim.scenario.units import KIB, ns


def image_bytes(spec: Device, driver: Driver, objects: int, blocks: int, header_bytes: int = HEADER_BYTES) -> int:
    """Bytes of an image in chunks of so many critical objects and blocks, headers included."""
    object_bytes = round(spec.critical.object_kib * KIB)
    chunk_bytes = driver.chunk_bytes
    records = -(-objects // max(1, chunk_bytes // object_bytes)) + -(-blocks // (chunk_bytes // spec.block_bytes))
    return objects * object_bytes + blocks * spec.block_bytes + records * header_bytes


class SaveStream(SavedFd):
    """A stream of `stripe`, which are its blocks (None: it has none), and of the critical objects if `objects` is
    set."""

    header_bytes = HEADER_BYTES
    end_bytes = 0
    """Of the END record's payload."""

    def __init__(
        self,
        index: int,
        device: DeviceState,
        session: MigrationSession,
        fd_lock: DriverLock,
        *,
        stripe: slice | None,
        objects: bool,
    ) -> None:
        super().__init__(session)
        self.suspended = False
        """The device is in PRE_COPY_P2P: nothing more is planned to be saved."""
        self._index = index
        self._device = device
        self._driver = session.driver
        self._fd_lock = fd_lock
        self._stripe = stripe
        self._carries_objects = objects
        self._chunk_bytes = self._driver.chunk_bytes
        self._free_chunks = self._driver.chunks
        self._saving: Record | None = None
        self._records: deque[Record] = deque()
        self._offset = 0  # bytes of the first record that were read
        self._unread_bytes = 0
        self._plan_blocks: Indices = NO_INDICES
        self._plan_objects: Indices = NO_INDICES
        self._plan_initial = False
        self._planned = False  # something is to be saved, or being saved
        self._planned_ns = 0  # when the last plan was made
        self._final = False
        self._ended = False  # the END record is there
        self._sequence = 0
        self._tally = Tally()
        self._told_epoch = 0

    # --- the producer -------------------------------------------------------------------------------------------------

    async def produce(self) -> None:
        """Save what is planned, until the END record is there."""
        on_track(f"source {self._device.spec.name} producer {self._index}")
        while not self._ended:
            while not self._can_save():
                await self._notify.wait()
            record = self._next_record()
            if not record.end:  # that one is the driver's own
                self._saving = record
                await self._around.firmware.save(record.size_bytes)
                self._saving = None
                if self._session.faults.of_command("SAVE") is not None:
                    self._save_failed()
                    return
            self._append(record)
            self._planned = self._has_plan()
            self._notify.notify()

    def _can_save(self) -> bool:
        room = not self._in_chunks or self._free_chunks > 0 or not self._holds_data()
        return self._planned and room

    async def settle(self) -> None:
        """Wait for the SAVE in flight: the device is suspended only after it (mlx5vf_cmd_suspend_vhca waits for
        save_comp). A whole image's is in flight from when it was planned."""
        saving = self._saving
        while (saving is not None and self._saving is saving) or (self._planned and not self._in_chunks):
            if self._closed:
                return
            await self._notify.wait()

    def _save_failed(self) -> None:
        """A SAVE failed: nothing more comes (mlx5: MLX5_MIGF_STATE_ERROR, for which read() answers ENODEV)."""
        self.end_session()

    def start_precopy(self) -> None:
        """The session starts in pre-copy: plan the initial image."""
        if self._driver.precopy != "check":
            self.plan_all(initial=True)
            return
        self._append(self._new_record(payload_bytes=self._driver.check_bytes, initial=True))
        self._notify.notify()

    def plan_all(self, *, initial: bool = False) -> None:
        """Plan what is dirty: everything at first, later what was written to or reconfigured since it was saved."""
        self._device.advance(now_ns())
        if self._driver.precopy == "reread":
            self._device.forget_saves(self._stripe or slice(0), objects=self._carries_objects)
        self._plan_initial = initial
        self._plan(self._dirty_objects(), self._dirty_blocks(stopped=self._final))

    def finish(self) -> None:
        """The device is stopped: what is still dirty comes, then the END."""
        self._final = True
        self.plan_all()

    def _plan(self, objects: Indices, blocks: Indices) -> None:
        self._plan_objects, self._plan_blocks = objects, blocks
        self._planned_ns = now_ns()
        self._planned = self._has_plan()
        self._notify.notify()

    def _dirty_objects(self) -> Indices:
        return self._device.dirty_objects() if self._carries_objects else NO_INDICES

    def _dirty_blocks(self, *, stopped: bool) -> Indices:
        return NO_INDICES if self._stripe is None else self._device.dirty_blocks(self._stripe, stopped=stopped)

    def _new_epoch(self) -> bool:
        """An epoch is to be told of, be there anything to save or not: v3's critical stream does it."""
        return False

    def _holds_data(self) -> bool:
        return bool(len(self._plan_objects) or len(self._plan_blocks))

    def _has_plan(self) -> bool:
        # A new epoch, and the end, are told by a record even where there is nothing to save.
        told = self._final or self._new_epoch() or self._holds_data()
        return self._saving is not None or (told and not self._ended)

    @property
    def _in_chunks(self) -> bool:
        return self._final or self._driver.precopy_image == "chunks"

    @property
    def _together(self) -> bool:
        """Objects and blocks are one image."""
        return not self._in_chunks and self._driver.initial == "image"

    def _next_record(self) -> Record:
        device = self._device
        device.advance(now_ns())
        if self._new_epoch():  # it may have begun just now: what it made new belongs to the epoch that is told
            self._plan_objects = self._dirty_objects()
        record = self._new_record()
        if len(self._plan_objects) or self._new_epoch():
            count = max(1, self._chunk_bytes // device.object_bytes) if self._in_chunks else len(self._plan_objects)
            record.objects, self._plan_objects = self._plan_objects[:count], self._plan_objects[count:]
            record.object_versions = device.save_objects(record.objects)
            record.initial = self._plan_initial
            # A plan of several records may be older than the newest epoch, which then is not complete with it.
            record.epoch_complete = not len(self._plan_objects) and not len(device.dirty_objects())
            if record.epoch_complete:
                self._complete_epoch(record)
        if len(self._plan_blocks) and (self._together or not len(record.objects)):
            count = self._chunk_bytes // device.block_bytes if self._in_chunks else len(self._plan_blocks)
            record.blocks, self._plan_blocks = self._plan_blocks[:count], self._plan_blocks[count:]
            record.block_versions = device.save_blocks(record.blocks)
            record.initial |= self._plan_initial and self._driver.initial == "image"
        record.payload_bytes = len(record.objects) * device.object_bytes + len(record.blocks) * device.block_bytes
        record.payload_bytes += ranges_bytes(record.invalidates)
        record.chunk = self._in_chunks and record.payload_bytes > 0
        if record.chunk:
            self._free_chunks -= 1
        record.end = not record.payload_bytes and not record.epoch_complete
        if record.end:
            record.payload_bytes = self.end_bytes
        return record

    def _new_record(self, payload_bytes: int = 0, *, initial: bool = False) -> Record:
        return Record(self._index, self._device.epoch, payload_bytes, initial=initial, header_bytes=self.header_bytes)

    def _complete_epoch(self, record: Record) -> None:
        """The record is the last one of its epoch's critical data."""

    def _append(self, record: Record) -> None:
        if self._around.tables:
            record.table_bytes = table_bytes(record)
        self._records.append(record)
        self._unread_bytes += record.size_bytes
        self._ended = record.end

    # --- read and poll ------------------------------------------------------------------------------------------------

    async def read(self, max_bytes: int) -> Payload:
        """See proto_v3.vfio.device.DataFd."""
        return await self.move(max_bytes, self._copy)

    async def _copy(self, data: Extent) -> None:
        await self._around.memory.copy(len(data), self._around.call_ns, "read")

    async def move(self, max_bytes: int, copy: Callable[[Extent], Awaitable[None]]) -> Payload:
        """What read() does, with `copy` for the copying. Its chunks are free when that is done."""
        if max_bytes < 1:
            raise fails(errno.EINVAL)
        asked_ns = now_ns()
        while await self._has_data():
            ready_ns = now_ns()
            async with self._fd_lock:
                if not self._unread_bytes:  # another reader took it while this one waited for the lock
                    continue
                locked_ns = now_ns()
                data, chunks = self._take(min(max_bytes, self._unread_bytes))
                await copy(data)
                self._check_open()
                if chunks:
                    self._free_chunks += chunks
                    self._notify.notify()
            self.reads.add(len(data), asked_ns, ready_ns, locked_ns)
            return data
        return EMPTY

    async def _has_data(self) -> bool:
        """Wait for data; False at the end of the stream. ENOMSG at the temporary one, ENODEV if the fd is stale.

        With a SAVE in flight, it waits also in pre-copy (Linux 7.1, "vfio/mlx5: consider inflight SAVE during
        PRE_COPY").
        """
        while True:
            self._check_open()
            if self._unread_bytes:
                return True
            if self._planned:
                await self._notify.wait()
                self.reads.wakeups += 1
                continue
            await self._call()
            if not (self._unread_bytes or self._planned or self._closed):  # nothing came while the call went on
                if self._final or self._ends_precopy_with_0:
                    return False
                raise fails(errno.ENOMSG)

    @property
    def _ends_precopy_with_0(self) -> bool:
        """read() gives 0 at the temporary end, not ENOMSG."""
        return False

    def _take(self, size: int) -> tuple[Extent, int]:
        """Cut so many bytes off the queue; how many chunks are wholly read with them."""
        self._unread_bytes -= size
        parts = []
        chunks = taken = initial_bytes = 0
        while size:
            record = self._records[0]
            if record.sequence < 0:
                self._number(record)
            part = RecordSlice(record, self._offset, min(record.size_bytes, self._offset + size))
            parts.append(part)
            size -= part.stop - part.start
            taken += part.stop - part.start
            if record.initial:
                initial_bytes = taken
            self._offset = part.stop
            if part.stop == record.size_bytes:
                self._records.popleft()
                self._offset = 0
                chunks += record.chunk
        self.outlet.took(taken, initial_bytes)
        return Extent(parts), chunks

    def _number(self, record: Record) -> None:
        """The record's first byte is read: from now on it has its place in the stream."""
        record.sequence = self._sequence
        self._sequence += 1
        if record.end:
            record.tally = self._tally
        else:
            self._tally = self._tally.add(record)

    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """See proto_v3.vfio.device.DataFd."""
        if not self._ready() and timeout_ns != 0:
            try:
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    while not self._ready():
                        await self._notify.wait()
                    self.reads.wakeups += 1
            except TimeoutError:
                pass
        return self._ready()

    def _ready(self) -> Ready:
        ready = Ready.NOTHING
        if self._unread_bytes or self._closed or (self._final and not self._planned):
            ready |= Ready.READABLE
        return ready

    # --- what is left -------------------------------------------------------------------------------------------------

    def _drop_unread(self, drops: Callable[[Record], bool]) -> None:
        """Drop records that nobody began to read: what they hold is dirty again."""
        kept: deque[Record] = deque()
        for record in self._records:
            if record.sequence >= 0 or not drops(record):  # what was begun must be read to its end
                kept.append(record)
                continue
            self._device.unsave(record.blocks, record.objects)
            self._unread_bytes -= record.size_bytes
            self._free_chunks += record.chunk
            self.reads.dropped_bytes += record.size_bytes
        self._records = kept

    def _refill_if_drained(self) -> bool:
        """Plan what became dirty, if all else is read."""
        if (
            self._planned
            or self._unread_bytes
            or self.outlet.unread_bytes
            or self._final
            or self._driver.precopy == "check"
        ):
            return False
        if self._driver.precopy == "reread" and now_ns() - self._planned_ns < ns(self._driver.reread_ms):
            return False
        self.plan_all()
        return True

    def held_bytes(self) -> tuple[int, int]:
        """See sim.device.stream.SavedFd."""
        saving = self._saving.size_bytes if self._saving else 0
        return self.outlet.unread_bytes + self._unread_bytes, saving

    def pending_bytes(self) -> int:
        """Unread bytes, those that are being saved, and those that are planned."""
        return sum(self.held_bytes()) + self._planned_bytes(self._plan_objects, self._plan_blocks)

    def left_bytes(self) -> int:
        """All that would still be read from this stream, were the device stopped now; the END is not counted."""
        self._device.advance(now_ns())
        saving = self._saving.size_bytes if self._saving else 0
        end = self._records[-1].size_bytes if self._ended and self._records else 0
        return self.outlet.unread_bytes + self._unread_bytes + saving - end + self._left_to_save_bytes()

    def _left_to_save_bytes(self) -> int:
        """What stopping would make it save: what is dirty then, planned or not; all of it where a driver rereads."""
        device = self._device
        objects, blocks = len(self._dirty_objects()), len(self._dirty_blocks(stopped=True))
        if self._driver.precopy == "reread" and not self._final:
            stripe = slice(0) if self._stripe is None else self._stripe
            objects = len(device.object_version) if self._carries_objects else 0
            blocks = len(device.version[stripe])
        planned = 0
        if not self._in_chunks:  # what is planned by now is still one image, the rest will come in chunks
            planned = self._planned_bytes(self._plan_objects, self._plan_blocks)
            objects, blocks = objects - len(self._plan_objects), blocks - len(self._plan_blocks)
        return planned + self._image_bytes(objects, blocks)

    def _planned_bytes(self, objects: Indices, blocks: Indices) -> int:
        """Bytes of records with these, headers included."""
        device = self._device
        if self._in_chunks:
            return self._image_bytes(len(objects), len(blocks))
        records = bool(len(objects)) + bool(len(blocks)) - bool(len(objects) and len(blocks) and self._together)
        return len(objects) * device.object_bytes + len(blocks) * device.block_bytes + records * self.header_bytes

    def _image_bytes(self, objects: int, blocks: int) -> int:
        return image_bytes(self._device.spec, self._driver, objects, blocks, self.header_bytes)
