"""v3's fd of addressable blocks, read: a memfd in which the driver puts the records that were asked for.

pread() wants an offset, which a socket has not. So a reader asks by a call for the blocks; the driver saves them, and
puts the record into a slot of the memfd, under its lock; the reader pread()s it there. The slot is free for others when
its reader asks for the next one.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from contextlib import nullcontext

from proto_v3.timeline import Resource
from sim.blocks import SaveBlocks
from sim.live.parts import Part
from sim.live.save import Layout
from sim.live.store import Store
from sim.record import Extent
from sim.schema import NS_PER_S


class BlocksData:
    """The driver's end."""

    def __init__(
        self, stream: SaveBlocks, store: Store, mutex: threading.Lock | None, bytes_per_s: float, timeline: Part
    ) -> None:
        self.stream = stream
        self.lock_ns = self.copy_ns = 0
        self._layout = Layout(store)
        self._lock = nullcontext() if mutex is None else mutex
        self._bytes_per_s = bytes_per_s
        self._timeline = timeline
        self._memfd = os.memfd_create("blocks", os.MFD_CLOEXEC)
        self._slots: dict[int, int] = {}
        """Bytes by offset."""
        self._free: list[int] = []

    def fd(self) -> int:
        """The memfd, to be passed to the VMM."""
        return os.dup(self._memfd)

    async def read_blocks(self, first: int, count: int, free: int) -> tuple[int, int]:
        """Save blocks; where the record is in the memfd, and its bytes. `free` is a slot's offset, or -1."""
        if free >= 0:
            self._free.append(free)
        record = await self.stream.read_blocks(first, count)
        assert isinstance(record, Extent)
        offset = self._slot(len(record))
        buffers = list(self._layout.pieces(record))
        lock_ns, copy_ns = await asyncio.to_thread(self._copy, buffers, offset)
        self._timeline.work(Resource.COPY, "read", self._timeline.now_ns() - copy_ns)
        self.lock_ns += lock_ns
        self.copy_ns += copy_ns
        return offset, len(record)

    def _copy(self, buffers: list[memoryview], offset: int) -> tuple[int, int]:
        asked_ns = time.perf_counter_ns()
        with self._lock:
            locked_ns = time.perf_counter_ns()
            at = offset
            for buffer in buffers:
                at += os.pwrite(self._memfd, buffer, at)
            left_s = (at - offset) / self._bytes_per_s - (time.perf_counter_ns() - locked_ns) / NS_PER_S
            if left_s > 0:
                time.sleep(left_s)
            return locked_ns - asked_ns, time.perf_counter_ns() - locked_ns

    def _slot(self, size: int) -> int:
        """The offset of a free slot that is large enough, or of a new one at the end of the memfd."""
        for offset in self._free:
            if self._slots[offset] >= size:
                self._free.remove(offset)
                return offset
        offset = sum(self._slots.values())
        self._slots[offset] = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._memfd, offset + self._slots[offset])
        return offset

    async def read(self, max_bytes: int) -> bytes:
        """The END record, or nothing behind it; the errors of read() else."""
        end = await self.stream.read(max_bytes)
        return b"".join(self._layout.pieces(end)) if isinstance(end, Extent) else b""

    def end(self) -> None:
        """The session is over."""
