"""The driver's end of v3's fd of addressable blocks, read: a memfd for the records that a VMM requests.

pread() takes an offset, which a socket does not have. So a reader requests blocks by a call; the driver saves them, and
copies the record into a slot of the memfd, under its lock; the reader pread()s it there. The reader frees the slot with
its next request.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from contextlib import nullcontext

from proto_v3.timeline import Notify, Resource
from sim.device.blocks import SaveBlocks
from sim.device.record import Extent
from sim.live.fd.lock import Mutex
from sim.live.fd.save import UNCONTENDED_NS, Layout
from sim.live.fd.store import StateStore
from sim.live.io import Worker
from sim.live.merge_timelines import ProcessTimeline
from sim.scenario.units import NS_PER_S


class BlocksData:
    """The driver's end: the memfd, its slots, and the threads that copy."""

    def __init__(
        self, stream: SaveBlocks, store: StateStore, mutex: Mutex | None, bytes_per_s: float, timeline: ProcessTimeline
    ) -> None:
        self.stream = stream
        self.lock_ns = self.copy_ns = 0
        self._layout = Layout(store)
        self._lock = nullcontext() if mutex is None else mutex
        self._bytes_per_s = bytes_per_s
        self._timeline = timeline
        self._memfd = os.memfd_create("blocks", os.MFD_CLOEXEC)
        self._slots: dict[int, int] = {}
        """Bytes of each slot, by its offset."""
        self._free: list[int] = []
        """Offsets of the slots that no reader has."""
        self._workers: list[Worker] = []
        """Idle threads. There are as many threads as copies at once, for any number of readers may read."""
        self._copies = 0
        self._notify = Notify()

    def fds(self) -> list[int]:
        """The memfd, to be passed to the VMM."""
        return [os.dup(self._memfd)]

    async def read_blocks(self, first: int, count: int, free: int) -> tuple[int, int]:
        """Save blocks; returns the record's offset in the memfd, and its bytes. `free`: a slot to be freed, or -1."""
        if free >= 0:
            self._free.append(free)
        record = await self.stream.read_blocks(first, count)
        assert isinstance(record, Extent)
        offset = self._slot(len(record))
        buffers = list(self._layout.pieces(record))
        worker = self._workers.pop() if self._workers else Worker("blocks copy")
        copying = worker.start(lambda: self._copy(buffers, offset))
        self._copies += 1
        copying.add_done_callback(lambda _: self._copied(worker))
        asked_ns, locked_ns, done_ns = await asyncio.shield(copying)
        if locked_ns - asked_ns > UNCONTENDED_NS:
            self._timeline.work(Resource.LOCK, "lock wait", asked_ns, locked_ns)
        self._timeline.work(Resource.COPY, "read", locked_ns, done_ns)
        self.lock_ns += locked_ns - asked_ns
        self.copy_ns += done_ns - locked_ns
        return offset, len(record)

    def _copied(self, worker: Worker) -> None:
        self._copies -= 1
        self._workers.append(worker)
        self._notify.notify()

    def _copy(self, buffers: list[memoryview], offset: int) -> tuple[int, int, int]:
        """Returns when the lock was requested, when it was taken, and when the copy was done."""
        now_ns = self._timeline.now_ns
        asked_ns = now_ns()
        with self._lock:
            locked_ns = now_ns()
            at = offset
            for buffer in buffers:
                at += os.pwrite(self._memfd, buffer, at)
            remaining_s = (at - offset) / self._bytes_per_s - (now_ns() - locked_ns) / NS_PER_S
            if remaining_s > 0:
                time.sleep(remaining_s)
            return asked_ns, locked_ns, now_ns()

    def _slot(self, size: int) -> int:
        """Take a free slot that is large enough, or a new one at the end of the memfd; returns its offset."""
        for offset in self._free:
            if self._slots[offset] >= size:
                self._free.remove(offset)
                return offset
        offset = sum(self._slots.values())
        self._slots[offset] = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._memfd, offset + self._slots[offset])
        return offset

    async def read(self, max_bytes: int) -> bytes:
        """The bytes of the END record, empty after it; or the errors of read()."""
        end = await self.stream.read(max_bytes)
        return b"".join(self._layout.pieces(end)) if isinstance(end, Extent) else b""

    async def ended(self) -> None:
        """The session is over: return when nothing is copied any more."""
        while self._copies:
            await self._notify.wait()
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        if self._memfd >= 0:
            os.close(self._memfd)
            self._memfd = -1
