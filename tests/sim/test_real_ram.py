# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM that is memory: what is taken at one side and loaded at the other, without a device."""

from __future__ import annotations

import asyncio
import mmap
import random

import pytest

from proto_v3.errors import PeerProtocolError
from proto_v3.wire.frames import Payload
from sim.live.merge_timelines import ProcessTimeline
from sim.real.iommu import DmaLog
from sim.real.ram import RealRam, ram_bytes
from sim.real.scenario import loaded
from sim.scenario.units import GIB, PAGE_BYTES

SETTINGS = loaded(None, ["ram.size_gib=0.0009765625", "ram.nonzero_gib=0.00048828125", "ram.frame_mib=0.0625"]).ram
PAGES = ram_bytes(SETTINGS) // PAGE_BYTES


class Logged(DmaLog):
    """A device that wrote to these pages."""

    def __init__(self, *pages: int) -> None:
        super().__init__(-1, PAGE_BYTES)
        self.pages = pages

    def report(self, iova: int, size_bytes: int) -> bytes:
        assert (iova, size_bytes) == (0, ram_bytes(SETTINGS))
        bits = sum(1 << page for page in self.pages)
        return bits.to_bytes(-(-PAGES // 64) * 8, "little")


def ram(at_source: bool, *logs: DmaLog, clock_ns: list[int] | None = None) -> RealRam:
    times_ns = clock_ns or [0]
    memory = mmap.mmap(-1, ram_bytes(SETTINGS))
    return RealRam(SETTINGS, memory, ProcessTimeline(lambda: times_ns[0]), logs, at_source=at_source, seed=1)


async def taken(source: RealRam) -> list[Payload]:
    frames = []
    while (frame := await source.take(1)) is not None:
        frames.append(frame)
    return frames


def test_the_target_has_what_the_guest_and_a_device_wrote_in_whatever_order_frames_of_a_pass_come() -> None:
    async def work() -> None:
        times_ns = [0]
        source, target = ram(True, Logged(PAGES - 1), clock_ns=times_ns), ram(False)
        assert (source.pending_bytes(), target.pending_bytes()) == (ram_bytes(SETTINGS), 0)
        passes = [await taken(source)]
        assert all(len(frame) <= SETTINGS.frame_bytes * (1 + 1 / 128) + 16 for frame in passes[0])
        for _ in range(3):
            times_ns[0] += 500_000_000
            source._pages[PAGES - 1] += 7
            await source.sync()
            assert source.pending_bytes() > PAGE_BYTES
            passes.append(await taken(source))
        assert source.passes == len(passes) == 4
        for frames in passes:
            random.Random(1).shuffle(frames)
            for frame in frames:
                await target.load(frame)
        assert target.digest() == source.digest()
        assert target._pages[PAGES - 1].all()
        await source.end()

    asyncio.run(work())


def test_a_page_that_is_dirty_again_is_taken_in_the_next_pass_and_that_is_told() -> None:
    """The guest writes to the first page while the search is behind it: the others come first."""

    async def work() -> None:
        source = ram(True)
        first = await source.take(1)
        assert first is not None
        assert source.passes == 0
        source._dirty[0] = True
        numbers, passes = [], []
        while (frame := await source.take(1)) is not None:
            view = memoryview(frame)  # type: ignore[arg-type]
            numbers.append(int.from_bytes(view[8:16], "little") & ((1 << 63) - 1))
            passes.append(source.passes)
        assert numbers[:-1] == sorted(numbers[:-1])
        assert numbers[-1] == 0
        assert passes == [0] * (len(passes) - 1) + [1]
        assert source.passes == 2

    asyncio.run(work())


def test_a_guest_that_is_stopped_writes_to_nothing() -> None:
    async def work() -> None:
        times_ns = [0]
        source = ram(True, clock_ns=times_ns)
        await taken(source)
        source.stop()
        times_ns[0] += 10**10
        await source.final_sync()
        assert source.pending_bytes() == 0
        source.start()
        times_ns[0] += 10**9
        await source.sync()
        assert source.pending_bytes() > 0

    asyncio.run(work())


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        bytes(7),
        (1).to_bytes(8, "little"),
        (1).to_bytes(8, "little") + (0).to_bytes(8, "little"),
        (1).to_bytes(8, "little") + (PAGES).to_bytes(8, "little") + bytes(PAGE_BYTES),
        (1).to_bytes(8, "little") + (PAGES | 1 << 63).to_bytes(8, "little"),
        (1).to_bytes(8, "little") + (0).to_bytes(8, "little") + bytes(PAGE_BYTES - 1),
        (1 << 60).to_bytes(8, "little") + bytes(PAGE_BYTES),
    ],
)
def test_a_frame_that_is_malformed_is_the_peers_error(frame: bytes) -> None:
    target = ram(False)
    with pytest.raises(PeerProtocolError):
        asyncio.run(target.load(memoryview(frame)))
    assert target.digest() == ram(False).digest()


def test_its_size_is_whole_pages() -> None:
    assert ram_bytes(SETTINGS) == GIB // 1024
    assert ram_bytes(SETTINGS.model_copy(update={"size_gib": 1e-6})) == PAGE_BYTES
