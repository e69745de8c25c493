# SPDX-License-Identifier: GPL-2.0-or-later
"""A data fd to read from: a stream that is saved from the device. v2 (`sim/device/save_v2`) and v3
(`sim/device/save_v3`) share this.

A producer saves what is planned (`sim/device/save_plan`), one SAVE command at a time, and appends a record to the queue
(`sim/device/save_queue`); readers take its bytes out under the fd's lock. Entering PRE_COPY plans the whole state;
entering STOP_COPY plans what is left. That SAVE is only queued then: the first read() pays its latency. It comes in
chunks, of which two exist; the next SAVE waits until one is read (Linux drivers/vfio/pci/mlx5/main.c). v2 and v3 differ
in what is planned in between.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from typing_extensions import override

from proto_v3.timeline import on_track
from proto_v3.vfio.device import Ready
from proto_v3.wire.frames import EMPTY, Payload
from sim.clock.port import now_ns
from sim.device.record import Extent, Record, table_bytes
from sim.device.save_plan import SavePlan
from sim.device.save_queue import ReadState, SaveQueue
from sim.device.state import DeviceState
from sim.device.stream import DriverLock, MigrationSession, SavedFd, fails


class SaveStream(SavedFd):
    """A stream of the records that its plan makes; its producer, produce(), is a task of the driver."""

    def __init__(
        self, index: int, device: DeviceState, session: MigrationSession, fd_lock: DriverLock, plan: SavePlan
    ) -> None:
        super().__init__(session)
        self.suspended = False
        """The device is in PRE_COPY_P2P: nothing more is planned to be saved."""
        self._index = index
        self._device = device
        self._driver = session.driver
        self._fd_lock = fd_lock
        self._command_lock: DriverLock = fd_lock if session.driver.lock_over == "command" else nullcontext()
        self._plan = plan
        self._planned_ns = 0
        chunks = self._driver.chunks + self._critical_chunks
        self._queue = SaveQueue(chunks)
        self.counters.pinned_chunks_bytes = chunks * self._driver.chunk_bytes

    # --- the producer -------------------------------------------------------------------------------------------------

    async def produce(self) -> None:
        """Save what is planned, until the END record is there."""
        on_track(f"source {self._device.spec.name} producer {self._index}")
        queue = self._queue
        while not queue.has_end:
            while not self._can_save():
                await self._notify.wait()
            self._device.advance(now_ns())
            record = self._plan.next_record()
            if not record.end:  # that one is the driver's own
                queue.start(record)
                self.counters.pinned_images_bytes = max(self.counters.pinned_images_bytes, queue.image_bytes)
                async with self._command_lock:
                    await self._context.firmware.save(record.size_bytes)
                queue.saving = None
                if (error := self._session.faults.of_command("SAVE")) is not None:
                    if not self._goes_on_without(record, error):
                        return
                    continue
                if self._plan.refused and not self._plan.final and not (len(record.objects) or record.epoch_complete):
                    queue.cancel(record)  # it was in flight when a SAVE of another stream was refused
                    self.counters.device_bytes_dropped += record.size_bytes
                    self._notify.notify()
                    continue
            self._append(record)

    @property
    def _is_saving(self) -> bool:
        """A SAVE is in flight, or planned."""
        return self._queue.saving is not None or (self._plan.has_record and not self._queue.has_end)

    def _can_save(self) -> bool:
        kept = 0 if len(self._plan.objects) else self._critical_chunks
        has_room = not self._plan.in_chunks or self._queue.free_chunks > kept or not self._plan.has_data
        return self._is_saving and has_room

    @property
    def _critical_chunks(self) -> int:
        """Chunks that only critical data may take, so that it can be saved while the others wait to be read."""
        return 0

    @property
    def _overtakes(self) -> bool:
        """Critical records go before dirty ones of which nothing was read."""
        return False

    async def settle(self) -> None:
        """Wait for the SAVE in flight: the device is suspended only after it (mlx5vf_cmd_suspend_vhca waits for
        save_comp). A whole image's is in flight from when it was planned."""
        queue = self._queue
        saving = queue.saving
        while (saving is not None and queue.saving is saving) or (self._is_saving and not self._plan.in_chunks):
            if self.over:
                return
            await self._notify.wait()

    def _goes_on_without(self, record: Record, error: OSError) -> bool:
        """A SAVE failed. Returns whether the session goes on without what it would have saved."""
        if self._plan.final or not (self._is_refusal(error) or self._may_miss(record)):
            self._save_failed()
            return False
        self._queue.cancel(record)
        self._plan.not_saved(record)
        if self._is_refusal(error):
            self.on_refused()
        self._notify.notify()
        return not self.over

    def _may_miss(self, record: Record) -> bool:
        """Whether a SAVE of pre-copy may fail, whatever the error."""
        return False

    def refuse(self) -> None:
        """Firmware refused a SAVE of the session: nothing more is saved before the device is stopped."""
        self._plan.refuse()
        self._notify.notify()

    def _save_failed(self) -> None:
        """A SAVE failed: nothing more comes (mlx5: MLX5_MIGF_STATE_ERROR, for which read() answers ENODEV)."""
        self.end()

    def start_precopy(self) -> None:
        """The session starts in pre-copy: plan the initial image, or append what the target is checked by."""
        if self._driver.precopy == "check":
            self._append(self._plan.plain_record(self._driver.check_bytes))
        else:
            self.plan_all(initial=True)

    def plan_all(self, *, initial: bool = False) -> None:
        """Plan what is dirty now."""
        self._device.advance(now_ns())
        self._plan.plan_all(initial=initial)
        self._plan_made()

    def _plan_made(self) -> None:
        self._planned_ns = now_ns()
        self._notify.notify()

    def finish(self) -> None:
        """The device is stopped: what is still dirty comes, then the END."""
        self._plan.final = True
        if self._driver.precopy == "reread" and self._driver.unread_context == "dropped":
            self._drop_unread(lambda record: len(record.blocks) > 0)
        self.plan_all()

    def _append(self, record: Record) -> None:
        if self._context.tables:
            record.table_bytes = table_bytes(record)
        self._queue.append(record, overtakes=self._overtakes and len(record.objects) > 0)
        self._notify.notify()

    # --- read and poll ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> ReadState:
        """What a read() would find now."""
        if self.over:
            return ReadState.OVER
        if self._readable_bytes:
            return ReadState.DATA
        if self._is_saving:
            return ReadState.SAVING
        return ReadState.END if self._plan.final else ReadState.DRAINED

    @property
    def _readable_bytes(self) -> int:
        """Unread bytes that a read() may take now. While critical data is being saved that overtakes, no record is
        begun that it may overtake."""
        comes = self._overtakes and (
            len(self._plan.objects) or (self._queue.saving and len(self._queue.saving.objects))
        )
        return self._queue.firm_bytes if comes else self._queue.unread_bytes

    @override
    async def read(self, max_bytes: int) -> Payload:
        return await self.read_with(self._copy, max_bytes)

    async def _copy(self, data: Extent) -> None:
        await self._context.memory.copy(len(data), self._context.call_ns, "read")

    async def read_with(self, copy: Callable[[Extent], Awaitable[None]], max_bytes: int) -> Payload:
        """read(), with `copy` to copy the bytes to the reader. When that returns, their chunks are free."""
        if max_bytes < 0:
            raise fails(errno.EINVAL)
        asked_ns = now_ns()
        while await self._has_data() and max_bytes:  # 0 bytes are asked for as any others (mtty, Linux 7.3)
            ready_ns = now_ns()
            async with self._fd_lock:
                if not (readable := self._readable_bytes):  # another reader took it while this one waited for the lock
                    continue
                locked_ns = now_ns()
                data, initial_bytes, chunks = self._queue.take(min(max_bytes, readable))
                self.buffer.add(len(data), initial_bytes)
                await copy(data)
                self.check_open()
                if chunks:
                    self._queue.free_chunks += chunks
                    self._notify.notify()
            self._count_read(len(data), asked_ns, ready_ns, locked_ns)
            return data
        return EMPTY

    async def _has_data(self) -> bool:
        """Wait for data; False at the end of the stream. ENOMSG at the temporary one, ENODEV if the fd is stale.

        With a SAVE in flight, it waits also in pre-copy (Linux 7.1, "vfio/mlx5: consider inflight SAVE during
        PRE_COPY").
        """
        while True:
            match self.state:
                case ReadState.OVER:
                    self.check_open()
                case ReadState.DATA:
                    return True
                case ReadState.SAVING:
                    if self.nonblocking:
                        await self._call()
                        raise fails(errno.EAGAIN)
                    await self._notify.wait()
                    await self._woken()
                case _:
                    await self._call()
                    state = self.state  # something may have come while the call went on
                    if state is ReadState.END or (state is ReadState.DRAINED and self._ends_precopy_with_0):
                        return False
                    if state is ReadState.DRAINED:
                        raise fails(errno.ENOMSG)

    @property
    def _ends_precopy_with_0(self) -> bool:
        """read() returns 0 at the temporary end instead of ENOMSG."""
        return False

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        if not self.ready() and timeout_ns != 0:
            try:
                async with asyncio.timeout(None if timeout_ns is None else timeout_ns / 1e9):
                    while not self.ready():
                        await self._notify.wait()
                    await self._woken()
            except TimeoutError:
                pass
        return self.ready()

    def ready(self) -> Ready:
        """What poll() finds now."""
        readable = self.state in (ReadState.DATA, ReadState.END, ReadState.OVER)
        return Ready.READABLE if readable else Ready.NOTHING

    # --- bytes that remain --------------------------------------------------------------------------------------------

    def _drop_unread(self, drops: Callable[[Record], bool]) -> None:
        """Drop records that nobody began to read: what they hold is dirty again."""
        for record in self._queue.drop(drops):
            self._device.unsave(record.blocks, record.objects)
            self.counters.device_bytes_dropped += record.size_bytes

    def _refill_if_drained(self) -> bool:
        """Plan what became dirty, if everything before it is read; returns whether it was planned."""
        if self.state is not ReadState.DRAINED or self.buffer.unread_bytes or self._driver.precopy == "check":
            return False
        if self._plan.refused:
            return False
        if self._driver.precopy == "reread" and now_ns() - self._planned_ns < self._driver.reread_ns:
            return False
        self.plan_all()
        return True

    @override
    def held_bytes(self) -> tuple[int, int]:
        return self.buffer.unread_bytes + self._queue.unread_bytes, self._queue.saving_bytes

    def pending_bytes(self) -> int:
        """Bytes that are unread, being saved or planned."""
        return sum(self.held_bytes()) + self._plan.planned_bytes()

    def left_bytes(self) -> int:
        """Bytes that would still be read from this stream if the device were stopped now, without the END."""
        self._device.advance(now_ns())
        return sum(self.held_bytes()) - self._queue.unread_end_bytes + self._plan.stopped_bytes()
