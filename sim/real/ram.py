# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM that is memory: mapped for the devices' DMA, with a dirty bitmap, and with pages that go over the wire.

The scenario says how large it is, how much of it is not zero, and how fast the guest writes to it. The guest's writes
are made when the bitmap is fetched: as many pages of the working set as RamModel would count. Pages that the devices
wrote to come from their own logs.

Dirty pages are looked for from the first to the last, and again from the first: a page is taken once in a pass. With
multifd, a pass is loaded before the next one begins (proto_v3/vmm/multifd.py), so whatever channels its frames take, a
page is never put over a newer one.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from proto_v3.errors import PeerProtocolError
from proto_v3.timeline import Resource
from proto_v3.wire.frames import Payload
from sim.host.machine import HostRam
from sim.live.buffers import as_view
from sim.live.io import Worker
from sim.live.merge_timelines import ProcessTimeline
from sim.real.iommu import DmaLog
from sim.scenario.tables import Ram
from sim.scenario.units import GIB, MIB, NS_PER_S, PAGE_BYTES

RAM_IOVA = 0
"""Where the devices find the first page."""
HEAD_BYTES = 8
"""Of a frame: how many pages it has. The pages' numbers follow, then those that are not zero."""
ZERO_PAGE = 1 << 63
"""In a frame: of this page no bytes follow, it has zeros alone."""


def ram_bytes(settings: Ram) -> int:
    """The size of the memory, in whole pages."""
    return max(1, round(settings.size_gib * GIB) // PAGE_BYTES) * PAGE_BYTES


class RealRam(HostRam):
    """A guest's RAM. The devices' logs are read in a thread, for that is an ioctl that may block."""

    def __init__(
        self,
        settings: Ram,
        memory: mmap.mmap,
        timeline: ProcessTimeline,
        logs: Sequence[DmaLog],
        *,
        at_source: bool,
        seed: int,
    ) -> None:
        """`memory`: ram_bytes() of them. `logs`: those of the devices, which log already."""
        self._settings = settings
        self._timeline = timeline
        self._logs = logs
        self._pages: NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(-1, PAGE_BYTES)
        self._rng = np.random.default_rng(seed)
        self._dirty = np.full(len(self._pages), at_source)
        self.passes = 0
        self._at = 0  # the page that the search for dirty ones is at
        self._synced_ns = timeline.now_ns()
        self._stopped_ns: int | None = None
        self._worker: Worker | None = None
        if at_source:
            nonzero = min(len(self._pages), round(settings.nonzero_gib * GIB) // PAGE_BYTES)
            self._pages[:nonzero] = self._rng.integers(1, 256, (nonzero, 1), np.uint8)

    @override
    def pending_bytes(self) -> int:
        return int(np.count_nonzero(self._dirty)) * PAGE_BYTES

    @override
    def stop(self) -> None:
        self._stopped_ns = self._timeline.now_ns()

    @override
    def start(self) -> None:
        if self._stopped_ns is not None:
            self._synced_ns += self._timeline.now_ns() - max(self._stopped_ns, self._synced_ns)
            self._stopped_ns = None

    @override
    async def sync(self) -> None:
        await self._sync("RAM sync")

    @override
    async def final_sync(self) -> None:
        await self._sync("last RAM sync")

    async def _sync(self, what: str) -> None:
        start_ns = self._timeline.now_ns()
        self._guest_writes()
        if self._logs:
            for bitmap in await self._in_thread(self._reports):
                bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=len(self._dirty), bitorder="little")
                self._dirty |= bits.astype(bool)
        self._timeline.work(Resource.RAM, what, start_ns)

    @override
    async def final_scan(self) -> None:
        pass

    def _reports(self) -> list[bytes]:
        return [log.report(RAM_IOVA, self._pages.nbytes) for log in self._logs]

    async def _in_thread(self, job: Callable[[], list[bytes]]) -> list[bytes]:
        if self._worker is None:
            self._worker = Worker("RAM sync")
        return await self._worker.start(job)

    async def end(self) -> None:
        """End its thread, once the call that was begun has returned."""
        if self._worker is not None:
            await self._worker.stop()

    def _guest_writes(self) -> None:
        """What the guest wrote to since the last sync."""
        until_ns = self._timeline.now_ns() if self._stopped_ns is None else self._stopped_ns
        elapsed_s = max(0, until_ns - self._synced_ns) / NS_PER_S
        self._synced_ns = until_ns
        pages = min(len(self._pages), max(1, round(self._settings.working_set_mib * MIB) // PAGE_BYTES))
        written = self._settings.dirty_bytes_per_s * elapsed_s / PAGE_BYTES
        count = round(pages * -math.expm1(-written / pages))
        which = self._rng.choice(pages, count, replace=False)
        self._pages[which, :8] = self._rng.integers(0, 256, (count, 8), np.uint8)
        self._dirty[which] = True

    @override
    async def take(self, budget_ns: int) -> Payload | None:
        start_ns = self._timeline.now_ns()
        which = self._at + np.flatnonzero(self._dirty[self._at :])
        if not len(which):
            self.passes += 1
            which = np.flatnonzero(self._dirty)
            self._at = 0
        which = which[: max(1, self._settings.frame_bytes // PAGE_BYTES)]
        if not len(which):
            return None
        self._at = int(which[-1]) + 1
        self._dirty[which] = False  # before they are copied: a device that writes meanwhile makes them dirty again
        pages = self._pages[which]
        full = pages.any(axis=1)
        heads = which.astype("<u8") | np.where(full, 0, ZERO_PAGE).astype("<u8")
        head = np.array([len(heads)], "<u8")
        frame = np.concatenate([head.view(np.uint8), heads.view(np.uint8), pages[full].ravel()])
        self._timeline.work(Resource.RAM, "RAM pages", start_ns)
        return frame.data

    @override
    async def load(self, payload: Payload) -> None:
        start_ns = self._timeline.now_ns()
        view = as_view(payload)
        count = int.from_bytes(view[:HEAD_BYTES], "little")
        if len(view) < HEAD_BYTES or count > (len(view) - HEAD_BYTES) // 8:
            raise PeerProtocolError(f"a frame of RAM with {len(view)} bytes for {count} pages")
        heads = np.frombuffer(view, "<u8", count, HEAD_BYTES)
        full = heads < ZERO_PAGE
        which = (heads & np.uint64(ZERO_PAGE - 1)).astype(np.int64)
        data = np.frombuffer(view, np.uint8, offset=HEAD_BYTES + 8 * count)
        if which.max(initial=-1) >= len(self._pages) or len(data) != np.count_nonzero(full) * PAGE_BYTES:
            raise PeerProtocolError(f"a frame of RAM with {len(data)} bytes of pages up to {which.max(initial=0)}")
        self._pages[which[full]] = data.reshape(-1, PAGE_BYTES)
        self._pages[which[~full]] = 0
        self._timeline.work(Resource.RAM, "RAM load", start_ns)

    def digest(self) -> bytes:
        """A hash of all of it."""
        return hashlib.sha256(self._pages.data).digest()
