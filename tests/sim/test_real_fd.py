# SPDX-License-Identifier: GPL-2.0-or-later
"""A data fd's read(), write() and poll() on descriptors of the host: pipes and files in place of a driver's."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from proto_v3.vfio.device import Ready
from sim.live.merge_timelines import ProcessTimeline
from sim.real.fd import DataFds, RealFd
from tests.build.live_hosts import code_of

SOON_S = 0.02
"""How long a test looks whether something waits that should; it cannot fail by a slow machine."""


@asynccontextmanager
async def piped(read_bytes: int = 64) -> AsyncIterator[tuple[RealFd, RealFd, DataFds]]:
    """The two ends of a pipe, as fds that are read and written."""
    fds = DataFds("source", ProcessTimeline(), read_bytes)
    out, into = os.pipe()
    yield RealFd(out, "nic", fds), RealFd(into, "nic", fds), fds
    fds.give_up("the test is over")
    await asyncio.wait_for(fds.close(), 60)


Test = Callable[[], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Test], None]:
    def runs(work: Test) -> None:
        async def main() -> None:
            await work()

        if request.param == "uvloop":
            uvloop.run(main())
        else:
            asyncio.run(main())

    return runs


def test_bytes_go_through_and_are_counted(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        async with piped() as (out, into, _):
            await into.write(memoryview(b"abcdefgh"), 3)
            assert bytes(await out.read(5)) == b"abcde"
            assert bytes(await out.read(64)) == b"fgh"
            assert (out.counters.reads, out.counters.device_bytes) == (2, 8)
            assert out.name.startswith("source nic fd ")
            await into.close()
            assert len(await out.read(64)) == 0
            assert out.counters.reads == 2, "the end is no data"

    run(work)


def test_a_read_that_is_cancelled_loses_no_bytes(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        async with piped() as (out, into, _):
            for text in (b"first", b"second"):
                reading = asyncio.create_task(out.read(64))
                await asyncio.sleep(SOON_S)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await into.write(memoryview(text), 64)
                got = b""
                while len(got) < len(text):
                    got += bytes(await out.read(2))
                assert got == text
            assert out.counters.device_bytes == len(b"firstsecond")

    run(work)


def test_a_read_that_was_cancelled_and_failed_fails_the_next_one(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        async with piped() as (out, _, fds):
            reading = asyncio.create_task(out.read(64))
            await asyncio.sleep(SOON_S)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            fds.give_up("gone")
            with pytest.raises(OSError, match="gone") as error:
                await out.read(64)
            assert error.value.errno == errno.ENODEV
            os.close(os.dup(out._number))  # it is still open: the thread has it
            fds.fds[1]._start("write", lambda number: os.write(number, b"x"))  # the read() returns

    run(work)


def test_errors_are_the_kernels(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        async with piped() as (out, into, _):
            assert await code_of(into.read(8)) == "EBADF"
            assert await code_of(out.precopy_info()) == "ENOTTY"
            assert await code_of(into.write(memoryview(b"x"), 0)) == "EINVAL"
            await out.close()
            assert await code_of(out.read(8)) == "EBADF"
            await out.close()

    run(work)


def test_poll_waits_for_data_and_can_be_cancelled(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        async with piped() as (out, into, _):
            assert await out.poll(0) == Ready.NOTHING
            assert await out.poll(1_000_000) == Ready.NOTHING
            polling = asyncio.create_task(out.poll())
            await asyncio.sleep(SOON_S)
            assert not polling.done()
            polling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await polling
            polling = asyncio.create_task(out.poll())
            await into.write(memoryview(b"x"), 1)
            assert await polling == Ready.READABLE
            assert await out.poll() == Ready.READABLE, "until it is read"
            await out.read(1)
            assert await out.poll(0) == Ready.NOTHING
            await into.close()
            assert await out.poll() == Ready.OVER, "the end of a pipe"

    run(work)


def test_poll_finds_the_bytes_of_a_read_that_was_cancelled(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        async with piped() as (out, into, _):
            reading = asyncio.create_task(out.read(64))
            await asyncio.sleep(SOON_S)
            reading.cancel()
            await asyncio.wait([reading])
            await into.write(memoryview(b"xy"), 2)
            while await out.poll(1_000_000) != Ready.READABLE:  # the thread may not have them yet
                pass
            assert bytes(await out.read(1)) == b"x"
            assert await out.poll(0) == Ready.READABLE
            assert bytes(await out.read(1)) == b"y"

    run(work)


def test_an_fd_without_poll_is_always_ready(run: Callable[[Test], None], tmp_path: Path) -> None:
    async def work() -> None:
        file = tmp_path / "file"
        file.write_bytes(b"")
        fds = DataFds("source", ProcessTimeline(), 64)
        fd = RealFd(os.open(file, os.O_RDONLY), "mtty", fds)  # epoll: EPERM
        assert await asyncio.wait_for(fd.poll(), 60) == Ready.READABLE | Ready.WRITABLE
        await fds.close()

    run(work)


def test_fds_wait_for_nothing_of_each_other(run: Callable[[Test], None]) -> None:
    async def work() -> None:
        many = 70  # more than any pool that asyncio makes has threads
        fds = DataFds("source", ProcessTimeline(), 64)
        pairs = [os.pipe() for _ in range(many)]
        readers = [RealFd(out, "nic", fds) for out, _ in pairs]
        reads = [asyncio.create_task(each.read(8)) for each in readers]
        await asyncio.sleep(SOON_S)
        writer = RealFd(pairs[-1][1], "nic", fds)
        await asyncio.wait_for(writer.write(memoryview(b"last"), 8), 60)
        assert bytes(await asyncio.wait_for(reads[-1], 60)) == b"last"
        for _, into in pairs[:-1]:
            os.close(into)
        assert [len(data) for data in await asyncio.gather(*reads[:-1])] == [0] * (many - 1)
        await fds.close()

    run(work)


def test_close_ends_all_threads_and_gives_the_descriptor_back(run: Callable[[Test], None]) -> None:
    before, descriptors = threading.active_count(), set(os.listdir("/proc/self/fd"))

    async def work() -> None:
        async with piped() as (out, into, _):
            await into.write(memoryview(b"abc"), 1)
            await out.read(3)
            await out.poll(0)

    run(work)
    while threading.active_count() > before:
        pass
    assert set(os.listdir("/proc/self/fd")) <= descriptors
