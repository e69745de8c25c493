# SPDX-License-Identifier: GPL-2.0-or-later
"""v3 on one device, case by case: opting in, the fds, epochs, what fails and how. See proto_v3/vfio/device.py."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from proto_v3.vfio.device import BlocksFd, DataFd, Ready
from proto_v3.vfio.uapi import State, StreamFlags
from proto_v3.vmm.migration import read_some
from proto_v3.wire.frames import EMPTY
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.device.driver import SimDriver
from sim.device.record import V3_HEADER_BYTES, Extent, Record, RecordSlice, Tally
from sim.device.record_format import RecordBlocks, RecordEnd
from sim.scenario.units import KIB, MIB
from tests.build.hosts import (
    ALL,
    BLOCK_BYTES,
    BLOCKS,
    MS,
    SECOND,
    US,
    Hosts,
    blocks,
    fails_somehow,
    fails_with,
    move,
    objects,
    read,
    read_all,
    records,
    saved,
    session,
    still_waits,
    took_ns,
)
from tests.build.scenario import virtual
from tests.build.v3_hosts import (
    PIECE,
    altered,
    cut,
    opened_blocks,
    reconfigure,
    whole,
    write,
    writes,
)

INVALIDATE = {"driver.epochs": "invalidate"}
HALF = (32, 64)
"""A range: the blocks from 32, 64 of them."""
OUTSIDE = [block for block in range(BLOCKS) if not 32 <= block < 96]
CHUNK_BLOCKS = 16
END_BYTES = V3_HEADER_BYTES + RecordEnd.SIZE


def kind_of_ready(driver: SimDriver) -> Ready:
    return Ready.READABLE if driver._image is None else Ready.WRITABLE


async def check_in_error(driver: SimDriver, fds: Sequence[DataFd]) -> None:
    """The device failed: every fd says so, no way leads on, and after a reset it is as good as new."""
    assert await driver.state() is State.ERROR
    for fd in fds:
        await fails_with(errno.EIO, fd.write(Extent([]), PIECE) if driver._image is not None else fd.read(ALL))
        found = await fd.poll(0)
        assert found & ~Ready.NEW_EPOCH == kind_of_ready(driver) | Ready.OVER | Ready.FAILED
    for state in State:
        await fails_with(errno.EIO, driver.set_state(state))
    await driver.reset()
    assert await driver.state() is State.RUNNING
    for fd in fds:
        await fails_somehow(fd.write(Extent([]), PIECE) if driver._image is not None else fd.read(ALL))


# --- opting in -------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.2.1")
@virtual
async def test_a_device_tells_how_many_streams_it_has_and_what_it_can_do() -> None:
    for most in (1, 4, 64):
        able = await Hosts({"device.0.max_dirty_streams": most}).source.streams()
        assert (able.dirty_streams, able.flags) == (most, StreamFlags.BLOCKS)
    for precopy, flags in (("reread", 0), ("check", StreamFlags.BLOCKS)):
        able = await Hosts({"driver.precopy": precopy}).source.streams()
        assert (able.dirty_streams, able.flags) == (16, flags), "who rereads cannot tell which blocks changed"


@pytest.mark.rule("v3.2.1")
@virtual
async def test_a_device_with_one_stream_only_knows_nothing_of_streams() -> None:
    driver = Hosts({"device.0.max_dirty_streams": 0}).source
    assert await driver.migration_flags() == await Hosts().source.migration_flags(), "no flag tells"
    await fails_with(errno.ENOTTY, driver.streams())
    for count in (0, 1, 17):
        await fails_with(errno.ENOTTY, driver.set_streams(count))
    fd = await driver.set_state(State.PRE_COPY)
    assert fd is not None
    await fails_with(errno.ENOTTY, driver.set_streams(1))


WRONG: list[tuple[int, int]] = [
    *((count, 0) for count in (-1, 17, 1 << 40)),
    *((count, StreamFlags.BLOCKS) for count in (-1, 0, 2, 16, 17)),
    *((1, flags) for flags in (2, 3, 1 << 31)),
]


@pytest.mark.rule("v3.2.2")
@pytest.mark.parametrize(("count", "flags"), WRONG)
@virtual
async def test_what_a_device_does_not_have_is_refused_and_the_choice_before_holds(count: int, flags: int) -> None:
    driver = Hosts().source
    for before in (0, 3):
        await driver.set_streams(before)
        await fails_with(errno.EINVAL, driver.set_streams(count, StreamFlags(flags)))
        fd = await driver.set_state(State.PRE_COPY)
        assert fd is not None
        if before:
            await fd.get_stream(2)
            await fails_with(errno.EINVAL, fd.get_stream(3))
        else:
            await fails_with(errno.ENOTTY, fd.get_stream(0))
        await driver.set_state(State.RUNNING)


@pytest.mark.rule("v3.11.4")
@virtual
async def test_a_device_that_cannot_tell_what_changed_has_no_blocks_to_give() -> None:
    await fails_with(errno.EINVAL, Hosts({"driver.precopy": "reread"}).source.set_streams(1, StreamFlags.BLOCKS))


@pytest.mark.rule("v3.2.2")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING])
@pytest.mark.parametrize("before", [(0, 0), (2, 0), (1, StreamFlags.BLOCKS)])
@virtual
async def test_with_a_session_open_nothing_can_be_chosen(state: State, before: tuple[int, int]) -> None:
    driver = Hosts().both
    await driver.set_streams(before[0], StreamFlags(before[1]))
    await driver.set_state(state)
    for count in (0, 1, 2, 17):
        for flags in (0, 1, 2):
            await fails_with(errno.EBUSY, driver.set_streams(count, StreamFlags(flags)))
    await driver.reset()
    await driver.set_streams(2)


@pytest.mark.rule("v3.2.4")
@virtual
async def test_a_choice_holds_for_all_sessions_to_come_until_a_reset() -> None:
    hosts = Hosts()
    await hosts.source.set_streams(2)
    for _ in range(2):
        fd = await hosts.source.set_state(State.PRE_COPY)
        assert fd is not None
        await fd.get_stream(1)
        await hosts.source.set_state(State.RUNNING)
    await hosts.source.reset()
    assert hosts.source.dirty_streams == 0
    fd = await hosts.source.set_state(State.PRE_COPY)
    assert fd is not None
    await fails_with(errno.ENOTTY, fd.get_stream(1))
    assert (await fd.precopy_info()).initial_bytes > 0, "it is v2's"


@pytest.mark.rule("v3.2.3")
@pytest.mark.parametrize("streams", [1, 16])
def test_opted_in_and_out_a_device_is_v2s_to_the_nanosecond(streams: int) -> None:
    changes = {
        "device.0.writes": {"pattern": "uniform", "mib_per_s": 100.0},
        "device.0.reconfigurations": {"poisson_per_s": 200.0, "objects_each": 2},
    }
    digests = set()
    for knows, opts_in in ((0, False), (16, False), (16, True)):

        @virtual
        async def moves(knows: int = knows, opts_in: bool = opts_in) -> None:
            hosts = Hosts({**changes, "device.0.max_dirty_streams": knows})
            if opts_in:
                for driver in (hosts.source, hosts.target):
                    await driver.set_streams(streams)
                    await driver.set_streams(0)
            await move(hosts, 20 * MS)
            assert not hosts.image.differences(hosts.state)
            digests.add(hosts.timeline.digest())

        moves()
    assert len(digests) == 1


# --- the fds ---------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.3.1")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING])
@virtual
async def test_the_critical_fd_gives_the_others_and_no_other_fd_does(state: State) -> None:
    driver = Hosts().both
    critical, *dirty = await session(driver, state, 3)
    assert len({id(fd) for fd in (critical, *dirty)}) == 4
    for index, fd in enumerate(dirty):
        assert await critical.get_stream(index) is fd, "asked for again, it is the same stream"
        await fails_with(errno.ENOTTY, fd.get_stream(0))
    for index in (-1, 3, 16, 1 << 31):
        await fails_with(errno.EINVAL, critical.get_stream(index))
    await driver.reset()
    await fails_with(errno.ENODEV, critical.get_stream(0))


@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY, State.RESUMING])
@virtual
async def test_of_addressable_blocks_there_is_one_fd(state: State) -> None:
    driver = Hosts().both
    critical, dirty = await opened_blocks(driver, state)
    assert await critical.get_stream(0) is dirty
    await fails_with(errno.ENOTTY, dirty.get_stream(0))
    for index in (-1, 1):
        await fails_with(errno.EINVAL, critical.get_stream(index))


@pytest.mark.rule("v3.2.3", "v3.3.11")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY, State.RESUMING])
@virtual
async def test_v2s_fd_knows_nothing_of_streams_and_v3s_nothing_of_v2s_question(state: State) -> None:
    hosts = Hosts()
    fd = await hosts.both.set_state(state)
    assert fd is not None
    await fails_with(errno.ENOTTY, fd.get_stream(0))
    await fails_with(errno.ENOTTY, fd.stream_info())
    driver = Hosts().both
    for fd in await session(driver, state, 2):
        await fails_with(errno.ENOTTY, fd.precopy_info())
    driver = Hosts().both
    for fd in await opened_blocks(driver, state):
        await fails_with(errno.ENOTTY, fd.precopy_info())


@virtual
async def test_fds_are_open_in_one_direction_only() -> None:
    hosts = Hosts()
    for fd in await session(hosts.source, State.PRE_COPY, 2):
        await fails_with(errno.EBADF, fd.write(Extent([]), PIECE))
    for fd in await session(hosts.target, State.RESUMING, 2):
        await fails_with(errno.EBADF, fd.read(ALL))
        assert await fd.poll(1 * MS) is Ready.WRITABLE
    hosts = Hosts()
    for fd in await opened_blocks(hosts.source, State.PRE_COPY):
        await fails_with(errno.EBADF, fd.write(Extent([]), PIECE))
    _, loads = await opened_blocks(hosts.target, State.RESUMING)
    for call in (loads.read(ALL), loads.read_blocks(0, 1), loads.dirty_blocks(), loads.geometry()):
        await fails_with(errno.EBADF, call)
    assert await loads.poll(1 * MS) is Ready.WRITABLE


@pytest.mark.rule("v3.3.2", "v3.3.4")
@virtual
async def test_a_critical_stream_has_the_critical_objects_and_each_block_has_one_home() -> None:
    for streams in (1, 2, 5, 16):
        hosts = Hosts()
        critical, *dirty = await saved(hosts, streams)
        assert objects(critical) == [0, 1, 2, 3]
        assert blocks(critical) == []
        for index, stream in enumerate(dirty):
            assert blocks(stream) == list(range(index, BLOCKS, streams))
            assert objects(stream) == []
        for index, stream in enumerate((critical, *dirty)):
            assert [record.sequence for record in records(stream)] == list(range(len(records(stream))))
            assert {record.stream for record in records(stream)} == {index}
            assert [record.end for record in records(stream)] == [False] * (len(records(stream)) - 1) + [True]


@pytest.mark.rule("v3.7.1")
@virtual
async def test_an_end_tells_what_came_before_it() -> None:
    for parts in await saved(Hosts(), 3):
        *before, end = records(parts)
        tally = Tally()
        for record in before:
            tally = tally.add(record)
        assert end.tally == tally
        assert (tally.records, tally.bytes) == (len(before), sum(record.size_bytes for record in before))
        assert end.size_bytes == END_BYTES


@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY])
@virtual
async def test_who_waits_in_a_session_that_is_reset_is_woken(state: State) -> None:
    hosts = Hosts({"firmware.save_mib_per_s": 1.0})
    fds = await session(hosts.source, state, 2)
    reading = [asyncio.create_task(fd.read(ALL)) for fd in fds[1:]]
    polling = [asyncio.create_task(fd.poll()) for fd in fds[1:]]
    await sleep_ns(1 * MS)
    await hosts.source.reset()
    for task in reading:
        await fails_with(errno.ENODEV, task)
    for polled in polling:
        assert await polled & Ready.READABLE, "it would not wait, it would fail"


# --- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.3.7", "v3.4.1")
@virtual
async def test_each_stream_tells_its_own_bytes_and_all_tell_the_newest_epoch() -> None:
    hosts = Hosts()
    reconfigure(hosts.state, {50 * MS: HALF, 60 * MS: HALF}, objects=[1, 2])
    critical, *dirty = await session(hosts.source, State.PRE_COPY, 2)
    for fd, held in ((critical, 4 * 4 * KIB), *((fd, BLOCKS // 2 * BLOCK_BYTES) for fd in dirty)):
        info = await fd.stream_info()
        records_there = 1 if fd is critical else 4
        assert (info.epoch, info.pending_bytes) == (1, held + records_there * V3_HEADER_BYTES)
    for fd in (critical, *dirty):
        await read_all(fd)
        assert (await fd.stream_info()).pending_bytes == 0
    await sleep_until_ns(70 * MS)
    assert [(await fd.stream_info()).epoch for fd in (*dirty, critical)] == [3, 3, 3]
    assert (await critical.stream_info()).pending_bytes == sum(
        record.size_bytes for record in records(await read_all(critical))
    )
    assert (await critical.stream_info()).pending_bytes == 0


@pytest.mark.rule("v3.3.4", "v3.3.10")
@virtual
async def test_asking_a_drained_dirty_stream_makes_it_save_what_became_dirty_and_reading_does_not() -> None:
    hosts = Hosts()
    writes(hosts.state, [4, 6, 9], per_s=100.0)
    _, even, odd = await session(hosts.source, State.PRE_COPY, 2)
    for fd in (even, odd):
        await read_all(fd)
    await sleep_until_ns(100 * MS)
    assert await read_all(even) == []
    assert (await even.stream_info()).pending_bytes == 2 * BLOCK_BYTES + V3_HEADER_BYTES
    assert blocks(await read_all(even)) == [4, 6]
    assert await read_all(odd) == []
    await odd.stream_info()
    assert blocks(await read_all(odd)) == [9]


@pytest.mark.rule("v3.3.7")
@virtual
async def test_in_p2p_asking_tells_and_makes_nothing() -> None:
    hosts = Hosts()
    writes(hosts.state, [4, 6, 9], per_s=100.0)
    critical, even, odd = fds = await session(hosts.source, State.PRE_COPY, 2)
    for fd in fds:
        await read_all(fd)
    await sleep_until_ns(100 * MS)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    for fd in fds:
        assert (await fd.stream_info()).pending_bytes == 0
        assert await read_all(fd) == []
    await hosts.source.set_state(State.PRE_COPY)
    assert (await even.stream_info()).pending_bytes > 0
    assert blocks(await read_all(even)) == [4, 6]
    await hosts.stop()
    assert (await odd.stream_info()).pending_bytes == BLOCK_BYTES + V3_HEADER_BYTES
    assert objects(await read_all(critical)) == []


@pytest.mark.rule("v3.6.4")
@pytest.mark.parametrize("after_ns", [-1, 0, 1])
@virtual
async def test_the_last_look_in_p2p_sees_a_reconfiguration_that_came_until_the_vcpus_stopped(after_ns: int) -> None:
    """G6: no guest runs, so what the critical fd says then is final."""
    hosts = Hosts()
    reconfigure(hosts.state, {50 * MS: HALF})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    await sleep_until_ns(50 * MS + after_ns)
    hosts.state.stop(now_ns())
    await hosts.source.set_state(State.PRE_COPY_P2P)
    info = await critical.stream_info()
    assert (info.epoch, info.pending_bytes > 0) == ((1, False) if after_ns < 0 else (2, True))
    await sleep_ns(1 * SECOND)
    assert await critical.stream_info() == info
    await hosts.source.set_state(State.STOP_COPY)
    assert (await critical.stream_info()).epoch == info.epoch


@pytest.mark.rule("v3.3.7")
@virtual
async def test_in_stop_copy_it_tells_what_is_left_and_afterwards_nothing() -> None:
    hosts = Hosts()
    fds = await session(hosts.source, State.STOP_COPY, 2)
    for fd in fds:
        before = (await fd.stream_info()).pending_bytes
        assert before > 0
        taken = len(await read(fd, 100))
        assert (await fd.stream_info()).pending_bytes in (before - taken, before - taken + END_BYTES)
        await read_all(fd)
        assert (await fd.stream_info()).pending_bytes == 0
    await hosts.source.set_state(State.STOP)
    for fd in fds:
        await fails_with(errno.ENODEV, fd.stream_info())


@pytest.mark.rule("v3.3.7")
@virtual
async def test_of_a_stream_that_is_loaded_there_is_nothing_to_tell() -> None:
    hosts = Hosts()
    for fd in await session(hosts.target, State.RESUMING, 2):
        await fails_with(errno.EINVAL, fd.stream_info())
    hosts = Hosts()
    for fd in await opened_blocks(hosts.target, State.RESUMING):
        await fails_with(errno.EINVAL, fd.stream_info())


# --- waiting for an epoch --------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.3.6", "v3.4.1")
@virtual
async def test_a_new_epoch_is_told_once_for_each_time_it_grew_and_on_the_critical_fd_alone() -> None:
    hosts = Hosts()
    reconfigure(hosts.state, {50 * MS: HALF, 80 * MS: HALF, 80 * MS + 1: HALF, 80 * MS + 2: HALF})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    assert not await critical.poll(0) & Ready.NEW_EPOCH, "the one that the session began in"
    for epoch, until in ((1, 0), (2, 50 * MS), (5, 81 * MS)):
        await sleep_until_ns(max(until, now_ns()))
        for _ in range(3):
            assert (await critical.poll(0) & Ready.NEW_EPOCH) is (Ready.NEW_EPOCH if epoch > 1 else Ready.NOTHING), (
                "it stays until it was asked for"
            )
        assert (await critical.stream_info()).epoch == epoch
        assert not await critical.poll(0) & Ready.NEW_EPOCH
        assert (await critical.stream_info()).epoch == epoch
        assert not await critical.poll(0) & Ready.NEW_EPOCH
        assert not await dirty.poll(0) & Ready.NEW_EPOCH
        await read_all(critical)
        assert await critical.poll(0) is Ready.NOTHING


@pytest.mark.rule("v3.3.6")
@virtual
async def test_who_waits_in_poll_is_woken_when_the_epoch_begins_and_not_when_its_data_is_saved() -> None:
    hosts = Hosts({"firmware.save_command_us": 5000.0})
    reconfigure(hosts.state, {50 * MS: HALF, 90 * MS: HALF})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    for at in (50 * MS, 90 * MS):
        await read_all(critical)
        await read_all(dirty)
        await critical.stream_info()
        asleep = asyncio.create_task(dirty.poll(at + 1 * SECOND))
        assert await critical.poll() is Ready.NEW_EPOCH
        assert now_ns() == at
        await critical.stream_info()
        assert await critical.poll() is Ready.READABLE
        assert now_ns() >= at + 5 * MS
        assert not asleep.done(), "a dirty fd has nothing to tell of it"
        asleep.cancel()


@pytest.mark.rule("v3.3.6")
@virtual
async def test_asking_a_dirty_fd_leaves_the_event_on_the_critical_one() -> None:
    hosts = Hosts()
    reconfigure(hosts.state, {50 * MS: HALF})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await critical.stream_info()
    await sleep_until_ns(60 * MS)
    assert (await dirty.stream_info()).epoch == 2
    assert await critical.poll(0) & Ready.NEW_EPOCH


@pytest.mark.rule("v3.3.9")
@virtual
async def test_one_that_only_checks_has_nothing_of_an_epoch_to_wait_for_until_it_is_stopped() -> None:
    hosts = Hosts({"driver.precopy": "check", "driver.check_bytes": 64, "driver.epochs": "invalidate"})
    reconfigure(hosts.state, {50 * MS: HALF}, objects=[1, 2])
    critical, dirty = fds = await session(hosts.source, State.PRE_COPY, 1)
    assert [record.size_bytes - V3_HEADER_BYTES for record in records(await read_all(critical))] == [64]
    assert await read_all(dirty) == [], "what the target is checked by is critical"
    await critical.stream_info()
    asleep = await still_waits(critical.poll())
    for fd in fds:
        info = await fd.stream_info()
        assert (info.epoch, info.pending_bytes) == (1, 0)
        assert await read_all(fd) == []
    await hosts.stop()
    assert (await critical.stream_info()).epoch == 2
    assert await asleep & Ready.NEW_EPOCH
    last = await read_all(critical)
    assert objects(last) == list(range(hosts.state.spec.critical.objects))
    assert not any(record.invalidates for record in records(last)), "nothing was given out before"
    assert blocks(await read_all(dirty)) == list(range(BLOCKS))


@virtual
async def test_asking_makes_no_critical_data_new_whatever_a_driver_rereads() -> None:
    """Else a device without P2P, which is asked for the last time in PRE_COPY, would always be late."""
    hosts = Hosts({"driver.precopy": "reread", "driver.reread_ms": 10.0})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    for fd in (critical, dirty):
        await read_all(fd)
    await sleep_until_ns(1 * SECOND)
    assert (await critical.stream_info()).pending_bytes == 0
    assert (await dirty.stream_info()).pending_bytes > 0
    await hosts.stop()
    assert len(objects(await read_all(critical))) == hosts.state.spec.critical.objects


# --- KEEP and INVALIDATE ---------------------------------------------------------------------------------------------

# Two dirty streams of 64 blocks each, 16 a record. When the second epoch begins, the first record of each is loaded,
# the second one is in the VMM, the third one is saved and unread (of the second stream one byte was read), and the last
# one is being saved. So wherever a range lies, it has blocks in each of these places, or leaves them out.


class Halfway:
    """Two hosts at the moment when an epoch begins that names a range of blocks."""

    def __init__(self, policy: str, range_: tuple[int, int]) -> None:
        slow = {"firmware.save_mib_per_s": 500.0, "device.0.critical.setup_us": 0.0}
        self.hosts = Hosts({**slow, "driver.epochs": policy})
        self.range = range_
        self.loaded: list[int] = []
        self.in_vmm: list[list[RecordSlice]] = []

    async def begin(self) -> None:
        hosts, record_bytes = self.hosts, MIB + V3_HEADER_BYTES
        reconfigure(hosts.state, {50 * MS: self.range})
        self.critical, *self.dirty = await session(hosts.source, State.PRE_COPY, 2)
        self.to_critical, *self.to_dirty = await session(hosts.target, State.RESUMING, 2)
        await write(self.to_critical, await read_all(self.critical))
        await self.critical.stream_info()
        for fd, to in zip(self.dirty, self.to_dirty, strict=True):
            first = (await read(fd, record_bytes)).parts
            await write(to, first)
            self.loaded += blocks(first)
        await sleep_until_ns(49 * MS)  # a SAVE takes 2 ms, and both chunks are full
        for fd in self.dirty:
            self.in_vmm.append((await read(fd, record_bytes)).parts)
        self.begun = [[], (await read(self.dirty[1], 1)).parts]
        await sleep_until_ns(50 * MS)

    @property
    def blocks_in_vmm(self) -> list[int]:
        return [block for parts in self.in_vmm for block in blocks(parts)]

    async def rest(self) -> list[list[RecordSlice]]:
        """All that the dirty streams give from now on, until the device is stopped and at their ends."""
        await sleep_ns(20 * MS)
        rest = []
        for fd in self.dirty:
            parts = await read_all(fd)
            await fd.stream_info()
            parts += await read_all(fd)
            rest.append(parts)
        await self.hosts.stop()
        for parts, fd in zip(rest, self.dirty, strict=True):
            parts += await read_all(fd)
        return rest

    async def check_target(self, rest: list[list[RecordSlice]]) -> None:
        """The new critical data overtakes all dirty data that is on its way; the target drops what is invalid, undoes
        what it loaded of that, and has the device's state at the end."""
        hosts, image = self.hosts, self.hosts.image
        invalid = inside(self.range) if hosts.scenario.driver.epochs == "invalidate" else set()
        await write(self.to_critical, await read_all(self.critical))
        counts = hosts.target.counters[0]
        assert counts.undone_bytes == len(invalid & set(self.loaded)) * BLOCK_BYTES
        assert set(np.flatnonzero(image.version >= 0).tolist()) == set(self.loaded) - invalid
        for to, parts in zip(self.to_dirty, self.in_vmm, strict=True):
            await write(to, parts)
        assert set(np.flatnonzero(image.version >= 0).tolist()) == {*self.loaded, *self.blocks_in_vmm} - invalid
        assert counts.overtaken_bytes == len(invalid & set(self.blocks_in_vmm)) * BLOCK_BYTES
        for to, begun, parts in zip(self.to_dirty, self.begun, rest, strict=True):
            await write(to, begun + parts)
        await hosts.target.set_state(State.RUNNING)
        assert not image.differences(hosts.state)


def inside(range_: tuple[int, int]) -> set[int]:
    return set(range(range_[0], range_[0] + range_[1]))


RANGES = [(0, BLOCKS), (32, 64), (0, 1), (127, 1), (31, 70), (70, 4), (5, 0)]


@pytest.mark.rule("v3.4.4", "v3.4.5")
@pytest.mark.parametrize("range_", RANGES)
@virtual
async def test_with_invalidate_all_of_the_range_that_was_ever_handed_out_comes_again(range_: tuple[int, int]) -> None:
    at = Halfway("invalidate", range_)
    await at.begin()
    rest = await at.rest()
    old, new = (
        [block for parts in rest for record in records(parts) if record.epoch == epoch for block in record.blocks]
        for epoch in (1, 2)
    )
    assert len(new) == len(set(new)), "once"
    assert inside(range_) <= set(new), "unread, in flight, read or loaded: all of it"
    assert not ({*at.loaded, *at.blocks_in_vmm, *old} - inside(range_)) & set(new), "and nothing else"
    assert {*at.loaded, *at.blocks_in_vmm, *old, *new} == set(range(BLOCKS))
    invalid = set(range(64, 96, 2)) <= inside(range_)
    dropped = [each.device_bytes_dropped for each in at.hosts.source.counters]
    assert dropped == [0, invalid * (MIB + V3_HEADER_BYTES), 0], "a record that nobody began to read, if all of it is"
    if range_ == (0, BLOCKS):
        epochs = [[record.epoch for record in records(parts)] for parts in rest]
        assert epochs == [[1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2]], (
            "the SAVE in flight, and what was begun, still come"
        )
    await at.check_target(rest)


@pytest.mark.rule("v3.4.3")
@pytest.mark.parametrize("range_", RANGES)
@virtual
async def test_with_keep_no_block_comes_again(range_: tuple[int, int]) -> None:
    at = Halfway("keep", range_)
    await at.begin()
    rest = await at.rest()
    came = [*at.loaded, *at.blocks_in_vmm, *blocks(rest[0]), *blocks(rest[1])]
    assert sorted(came) == list(range(BLOCKS))
    await at.check_target(rest)
    counts = at.hosts.target.counters[0]
    assert (counts.overtaken_bytes, counts.undone_bytes) == (0, 0)
    assert all(each.device_bytes_dropped == 0 for each in at.hosts.source.counters)


@virtual
async def test_a_record_that_is_only_dropped_takes_no_load() -> None:
    at = Halfway("invalidate", (0, BLOCKS))
    await at.begin()
    await write(at.to_critical, await read_all(at.critical))
    copy_only = await took_ns(write(at.to_dirty[0], at.in_vmm[0]))
    assert copy_only < 350 * US, "a MiB and its calls; a LOAD would be 500 us more"


@pytest.mark.rule("v3.4.4")
@virtual
async def test_a_record_that_an_epoch_overtakes_while_it_is_loaded_is_not_taken_for_the_device() -> None:
    hosts = Hosts({**INVALIDATE, "firmware.load_mib_per_s": 10.0, "device.0.critical.setup_us": 0.0})
    reconfigure(hosts.state, {200 * MS: HALF})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    await write(to_critical, await read_all(critical))
    first = await read_all(dirty)
    await sleep_until_ns(201 * MS)
    second = await read_all(critical)
    loading = asyncio.create_task(write(to_dirty, cut(first, 0, 3 * (MIB + V3_HEADER_BYTES))))
    await sleep_ns(230 * MS)  # the third record, blocks 32 to 47, is being loaded: 100 ms each
    assert (hosts.image.version[:32] == 0).all()
    await write(to_critical, second)
    await loading
    assert (hosts.image.version[32:48] == -1).all()
    assert hosts.target.counters[0].undone_bytes == 16 * BLOCK_BYTES


@pytest.mark.rule("v3.4.2", "v3.4.6")
@virtual
async def test_several_epochs_at_once_make_all_their_ranges_invalid() -> None:
    hosts = Hosts(INVALIDATE)
    # The first one's SAVE is in flight when the other two begin.
    reconfigure(hosts.state, {50 * MS: (0, 16), 50 * MS + 1: (100, 20), 50 * MS + 2: (110, 18)})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    first = [await read_all(fd) for fd in (critical, dirty)]
    await sleep_until_ns(60 * MS)
    told = records(await read_all(critical))
    ranges = [[(each.first_block, each.blocks, each.epoch) for each in record.invalidates] for record in told]
    assert ranges == [[(0, 16, 2)], [(100, 20, 3), (110, 18, 4)]]
    await dirty.stream_info()
    again = await read_all(dirty)
    assert blocks(again) == [*range(16), *range(100, 128)]
    assert {record.epoch for record in records(again)} == {4}
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    await write(to_critical, first[0])
    await write(to_dirty, first[1])
    await write(to_critical, [whole(record) for record in told])
    assert set(np.flatnonzero(hosts.image.version < 0).tolist()) == {*range(16), *range(100, 128)}
    await write(to_dirty, again)
    assert (hosts.image.version == 0).all()


@virtual
async def test_an_epoch_that_begins_while_the_vcpus_stop_invalidates_as_any_other() -> None:
    hosts = Hosts(INVALIDATE)
    reconfigure(hosts.state, {100 * MS: HALF})
    critical, dirty = fds = await session(hosts.source, State.PRE_COPY, 1)
    to = await session(hosts.target, State.RESUMING, 1)
    for fd, there in zip(fds, to, strict=True):
        await write(there, await read_all(fd))
    await sleep_until_ns(100 * MS)
    hosts.state.stop(now_ns())
    await hosts.source.set_state(State.PRE_COPY_P2P)
    await hosts.source.set_state(State.STOP_COPY)
    late = await read_all(dirty)
    assert blocks(late) == list(range(32, 96))
    await write(to[0], await read_all(critical))
    await write(to[1], late)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_what_was_before_the_session_is_in_its_first_epoch() -> None:
    hosts = Hosts(INVALIDATE)
    reconfigure(hosts.state, {10 * MS: HALF, 20 * MS: HALF})
    await sleep_until_ns(50 * MS)
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    assert (await critical.stream_info()).epoch == 3
    assert all(not record.invalidates for record in records(await read_all(critical)))
    assert {record.epoch for record in records(await read_all(dirty))} == {3}


# --- commands that fail ----------------------------------------------------------------------------------------------

CODES = ["EIO", "ENOMEM", "ETIMEDOUT"]


def failing(command: str, after: int, code: str = "EIO") -> dict[str, Any]:
    side = "source" if command == "SAVE" else "target"
    return {"device.0.faults": [{"side": side, "command": command, "after": after, "errno": code}]}


@pytest.mark.rule("v3.9.1")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY])
@pytest.mark.parametrize("after", [0, 1, 5])
@virtual
async def test_v3_a_save_that_fails_puts_the_device_in_error_and_ends_every_stream(state: State, after: int) -> None:
    hosts = Hosts(failing("SAVE", after, "ENOMEM"))
    fds = await session(hosts.source, state, 2)
    results = await asyncio.gather(*(read_all(fd) for fd in fds), return_exceptions=True)
    codes = {result.errno for result in results if isinstance(result, OSError)}
    assert codes == {errno.EIO}
    for fd in fds:
        await fails_with(errno.EIO, fd.read(ALL))
        await fails_with(errno.EIO, fd.stream_info())
    await fails_with(errno.EIO, fds[0].get_stream(0))
    await check_in_error(hosts.source, fds)
    assert all(blocks(parts) for parts in (await saved(hosts, 2))[1:]), "the fault is used up"


@virtual
async def test_blocks_a_save_that_fails_after_a_reset_is_nobodys() -> None:
    hosts = Hosts(failing("SAVE", 0))
    _, blocks_fd = await opened_blocks(hosts.source, State.PRE_COPY)
    reading = asyncio.create_task(blocks_fd.read_blocks(0, 1))
    await sleep_ns(1)
    await hosts.source.reset()
    await fails_with(errno.ENODEV, reading)
    assert await hosts.source.state() is State.RUNNING


@pytest.mark.rule("v3.9.1")
@virtual
async def test_v3_who_waits_while_a_save_fails_elsewhere_is_woken() -> None:
    """The streams have nothing to do with each other but for their device."""
    hosts = Hosts(failing("SAVE", 2))
    writes(hosts.state, [0, 2], per_s=1000.0)
    critical, even, odd = await session(hosts.source, State.PRE_COPY, 2)
    # Three SAVEs began together; the third one to end fails.
    waiting = [asyncio.create_task(fd.poll()) for fd in (critical, even, odd)]
    await sleep_ns(1 * SECOND)
    assert all(task.done() for task in waiting)
    for fd in (critical, even, odd):
        await fails_with(errno.EIO, fd.read(ALL))
    assert await hosts.source.state() is State.ERROR


@pytest.mark.rule("v3.9.1")
@pytest.mark.parametrize("after", [0, 3, 7])
@pytest.mark.parametrize("code", CODES)
@virtual
async def test_v3_a_load_that_fails_puts_the_device_in_error_and_ends_every_stream(after: int, code: str) -> None:
    hosts = Hosts(failing("LOAD", after, code))
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    results = await asyncio.gather(*(map(write, fds, streams)), return_exceptions=True)
    failed = sorted(result.errno or 0 for result in results if isinstance(result, OSError))
    assert getattr(errno, code) in failed
    assert set(failed) <= {getattr(errno, code), errno.EIO}
    await fails_with(errno.EIO, fds[0].get_stream(0))
    await check_in_error(hosts.target, fds)
    await hosts.target.set_streams(2)
    fds = await session(hosts.target, State.RESUMING, 2)
    await asyncio.gather(*map(write, fds, streams))
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.9.1")
@virtual
async def test_v3_a_dirty_write_that_waits_fails_when_the_critical_load_does() -> None:
    hosts = Hosts(failing("LOAD", 0, "ENOMEM"))
    critical, dirty = await saved(hosts, 1)
    fds = await session(hosts.target, State.RESUMING, 1)
    waiting = await still_waits(write(fds[1], dirty))
    await fails_with(errno.ENOMEM, write(fds[0], critical))
    await fails_with(errno.EIO, waiting)
    await check_in_error(hosts.target, fds)


@pytest.mark.rule("v2.driver.2")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY])
@virtual
async def test_v2_a_save_that_fails_ends_the_session_and_the_state_stays(state: State) -> None:
    for after in (0, 1, 5):
        hosts = Hosts(failing("SAVE", after, "ENOMEM"))
        fd = await hosts.source.set_state(state)
        assert fd is not None
        await fails_with(errno.ENODEV, read_all(fd))
        assert await hosts.source.state() is state
        await hosts.source.set_state(State.RUNNING)
        fd = await hosts.source.set_state(State.STOP_COPY)
        assert fd is not None
        assert blocks(await read_all(fd)) == list(range(BLOCKS))


@pytest.mark.rule("v2.driver.2")
@pytest.mark.parametrize("code", CODES)
@virtual
async def test_v2_a_load_that_fails_ends_the_session_and_the_state_stays(code: str) -> None:
    for after in (0, 1, 5):
        hosts = Hosts(failing("LOAD", after, code))
        fd = await hosts.source.set_state(State.STOP_COPY)
        to = await hosts.target.set_state(State.RESUMING)
        assert fd is not None
        assert to is not None
        parts = await read_all(fd)
        await fails_with(getattr(errno, code), to.write(Extent(parts), PIECE))
        await fails_with(errno.ENODEV, to.write(Extent(parts), PIECE))
        assert await hosts.target.state() is State.RESUMING
        await fails_with(errno.EIO, hosts.target.set_state(State.STOP))


@pytest.mark.parametrize("command", ["SAVE", "LOAD"])
@virtual
async def test_blocks_a_command_that_fails_puts_the_device_in_error(command: str) -> None:
    for after in (0, 1, 3):
        hosts = Hosts(failing(command, after, "ENOMEM"))
        critical, dirty = await opened_blocks(hosts.source, State.STOP_COPY)
        to_critical, to_blocks = await opened_blocks(hosts.target, State.RESUMING)

        async def moves(fd: DataFd, to: DataFd) -> None:
            await write(to, await read_all(fd))

        async def moves_blocks(fd: BlocksFd, to: DataFd, first: int) -> None:
            await to.write(await fd.read_blocks(first, 16), PIECE)

        results = await asyncio.gather(
            moves(critical, to_critical),
            *(moves_blocks(dirty, to_blocks, first) for first in range(0, BLOCKS, 16)),
            return_exceptions=True,
        )
        codes = {result.errno for result in results if isinstance(result, OSError)}
        if command == "SAVE":
            assert codes == {errno.EIO}
            await fails_with(errno.EIO, dirty.read_blocks(0, 1))
            await fails_with(errno.EIO, dirty.dirty_blocks())
            await check_in_error(hosts.source, [critical, dirty])
        else:
            assert codes == {errno.EIO, errno.ENOMEM}
            await check_in_error(hosts.target, [to_critical, to_blocks])


# --- the end of a load -----------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.3.8")
@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("how", ["nothing came", "cut in a record", "all but the END", "cut in the END"])
@virtual
async def test_closing_before_the_end_changes_nothing_and_leaving_resuming_tells(stream: int, how: str) -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    length = sum(part.stop - part.start for part in streams[stream])
    until = {"nothing came": 0, "cut in a record": 100, "all but the END": length - END_BYTES}.get(how, length - 1)
    await write(fds[0], streams[0] if stream else cut(streams[0], 0, until))
    if stream:
        await write(fds[stream], cut(streams[stream], 0, until))
    for fd in fds:
        await fd.close()
        await fd.close()
    assert await hosts.target.state() is State.RESUMING
    with pytest.raises(OSError, match=rf"^\[Errno {errno.ENODATA}\] dev: \d of its streams did not come to their END"):
        await hosts.target.set_state(State.STOP)
    assert await hosts.target.state() is State.ERROR
    for fd in fds:
        await fails_with(errno.ENODEV, fd.write(Extent([]), PIECE))
        await fd.close()


@pytest.mark.rule("v3.3.8")
@virtual
async def test_what_is_closed_can_be_asked_for_again_and_written_to_its_end() -> None:
    """close() of one descriptor is not the end of the stream, which has as many descriptors as are asked for."""
    hosts = Hosts()
    streams = await saved(hosts, 2)
    critical, first, second = await session(hosts.target, State.RESUMING, 2)
    await write(critical, streams[0])
    await write(first, cut(streams[1], 0, 1000))
    await first.close()
    again = await critical.get_stream(0)
    await write(again, cut(streams[1], 1000))
    await write(second, streams[2])
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.3.8")
@virtual
async def test_closing_after_the_end_changes_nothing_and_can_be_done_twice() -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    for fd, parts in zip(fds, streams, strict=True):
        await write(fd, parts)
        await fd.close()
        await fd.close()
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.3.8")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY])
@virtual
async def test_closing_an_fd_that_is_saved_changes_nothing(state: State) -> None:
    hosts = Hosts()
    fds = await session(hosts.source, state, 2)
    for fd in fds:
        await fd.close()
    assert await hosts.source.state() is state
    assert [len(await read_all(fd)) > 0 for fd in fds] == [True] * 3


@pytest.mark.rule("v3.7.3")
@pytest.mark.parametrize("target", [State.STOP, State.RUNNING, State.RUNNING_P2P, State.STOP_COPY])
@pytest.mark.parametrize("short", [0, 1, 2])
@virtual
async def test_leaving_resuming_short_of_an_end_fails_and_the_device_is_in_error(short: int, target: State) -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    for index, (fd, parts) in enumerate(zip(fds, streams, strict=True)):
        await write(fd, parts[:-1] if index == short else parts)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.ENODATA}\] dev: 1 of its streams did not come to their END"):
        await hosts.target.set_state(target)
    assert await hosts.target.state() is State.ERROR
    await fails_with(errno.EIO, hosts.target.set_state(State.RUNNING))
    await hosts.target.reset()
    assert await hosts.target.state() is State.RUNNING


@pytest.mark.rule("v3.7.3")
@virtual
async def test_leaving_resuming_without_the_newest_epochs_critical_data_fails() -> None:
    """A dirty stream's END tells of an epoch that the critical stream, whole as it is, knows nothing of."""
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    streams[2][-1] = altered(streams[2][-1], epoch=2)
    for fd, parts in zip(fds, streams, strict=True):
        await write(fd, parts)
        await fd.close()
    with pytest.raises(OSError, match=rf"^\[Errno {errno.ENODATA}\] dev: critical data of epoch 2 is not there"):
        await hosts.target.set_state(State.RUNNING)
    assert await hosts.target.state() is State.ERROR


@virtual
async def test_what_is_refused_names_device_and_stream_and_ends_every_stream() -> None:
    for stream in (0, 1, 2):
        hosts = Hosts()
        streams = await saved(hosts, 2)
        fds = await session(hosts.target, State.RESUMING, 2)
        with pytest.raises(OSError, match=rf"^\[Errno {errno.EILSEQ}\] dev stream {stream}: byte 0 of record 1"):
            await write(fds[stream], streams[stream][1:])
        await check_in_error(hosts.target, fds)


# A stream that was tampered with as a whole migration, frame by frame, is in test_v3_refusals.py.
REFUSED: dict[str, tuple[int, list[int]]] = {
    "of another stream": (1, [errno.EXDEV]),
    "again": (1, [errno.EALREADY]),
    "too early": (1, [errno.EILSEQ]),
    "half of it again": (1, [errno.EPROTO]),
    "after the END": (1, [errno.EPROTO]),
    "with a critical object": (1, [errno.EPROTO]),
    "that completes an epoch": (1, [errno.EPROTO]),
    "with blocks": (0, [errno.EPROTO]),
    "of a block that there is not": (1, [errno.EPROTO]),
    "of an object that there is not": (0, [errno.EPROTO]),
    "other versions": (1, [errno.EBADMSG]),
    "other object versions": (0, [errno.EBADMSG]),
    "an epoch that never came": (1, [errno.EPROTO]),
    "no bytes of a device": (1, [errno.EPROTO]),
}


def tampered(how: str, parts: list[RecordSlice], others: list[list[RecordSlice]]) -> list[RecordSlice]:
    first, second, *rest = parts
    match how:
        case "of another stream":
            return others[2]
        case "again":
            return [first, first, second, *rest]
        case "too early":
            return [second, first, *rest]
        case "half of it again":
            return [*cut([first], 0, 1000), *cut([first], 500), second, *rest]
        case "after the END":
            return [*parts, altered(parts[-1], sequence=parts[-1].record.sequence + 1)]
        case "with a critical object":
            return [altered(first, objects=[0], object_versions=[0]), second, *rest]
        case "that completes an epoch":
            return [altered(first, epoch_complete=True), second, *rest]
        case "with blocks":
            return [altered(first, blocks=[0], block_versions=[0]), second, *rest]
        case "of a block that there is not":
            return [altered(first, blocks=[BLOCKS], block_versions=[0]), second, *rest]
        case "of an object that there is not":
            return [altered(first, objects=[-1], object_versions=[0]), second, *rest]
        case "other versions":
            return [altered(first, block_versions=[1] * 16), second, *rest]
        case "other object versions":
            return [altered(first, object_versions=[1] * 4), second, *rest]
        case _:
            return [altered(first, epoch=2), second, *rest]


@pytest.mark.rule("v3.5.4", "v3.9.2")
@pytest.mark.parametrize("how", REFUSED)
@virtual
async def test_each_thing_that_cannot_be_the_sources_stream_has_an_errno_of_its_own(how: str) -> None:
    stream, codes = REFUSED[how]
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    payload: Any = b"no record" if how == "no bytes of a device" else None

    async def carry(index: int) -> None:
        if index != stream:
            return await write(fds[index], streams[index])
        return await fds[index].write(payload or Extent(tampered(how, streams[index], streams)), PIECE)

    results = await asyncio.gather(*map(carry, range(3)), return_exceptions=True)
    failed = [result for result in results if isinstance(result, OSError)]
    told = [error for error in failed if error.errno != errno.EIO]
    assert [error.errno for error in told] == codes
    assert str(told[0]).startswith(f"[Errno {codes[0]}] dev")
    await check_in_error(hosts.target, fds)


# --- blocks ----------------------------------------------------------------------------------------------------------


async def told_blocks(fd: BlocksFd) -> list[int]:
    told = await fd.dirty_blocks()
    assert (told.block_bytes, told.blocks, len(told.bitmap)) == (BLOCK_BYTES, BLOCKS, BLOCKS // 8)
    bits = np.unpackbits(np.frombuffer(told.bitmap, np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


async def read_run(fd: BlocksFd, first: int, count: int) -> Record:
    data = await fd.read_blocks(first, count)
    assert isinstance(data, Extent)
    ((record, start, stop),) = [(part.record, part.start, part.stop) for part in data.parts]
    assert (start, stop) == (0, record.size_bytes), "one whole record"
    assert record.size_bytes == V3_HEADER_BYTES + RecordBlocks.SIZE + count * (8 + BLOCK_BYTES)
    assert record.blocks.tolist() == list(range(first, first + count))
    return record


@pytest.mark.rule("v3.11.1")
@virtual
async def test_a_bitmap_tells_all_at_first_and_then_what_changed_since() -> None:
    hosts = Hosts()
    writes(hosts.state, [4, 6, 4, 127], per_s=100.0)
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    assert await fd.geometry() == (BLOCK_BYTES, BLOCKS)
    assert await told_blocks(fd) == list(range(BLOCKS))
    assert await told_blocks(fd) == []
    await sleep_until_ns(20 * MS)
    assert await told_blocks(fd) == [4, 6]
    assert await told_blocks(fd) == [], "told of, they are the caller's to read"
    await sleep_until_ns(50 * MS)
    assert await told_blocks(fd) == [4, 127], "4 changed again"


@virtual
async def test_blocks_that_can_only_be_read_when_stopped_are_told_of_then() -> None:
    hosts = Hosts({"device.0.stop_only_mib": 2.0})
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    assert await told_blocks(fd) == list(range(96))
    for first, count in ((96, 1), (95, 2), (127, 1)):
        await fails_with(errno.EINVAL, fd.read_blocks(first, count))
    await hosts.stop()
    assert await told_blocks(fd) == list(range(96, 128))
    await read_run(fd, 90, 38)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0, -1), (128, 1), (127, 2), (0, 129), (1 << 60, 1)])
@virtual
async def test_blocks_that_there_are_not_cannot_be_read(first: int, count: int) -> None:
    hosts = Hosts()
    _, fd = await opened_blocks(hosts.source, State.STOP_COPY)
    await fails_with(errno.EINVAL, fd.read_blocks(first, count))
    assert await hosts.source.state() is State.STOP_COPY, "nothing else happens"
    await read_run(fd, 0, BLOCKS)


@pytest.mark.rule("v3.11.2")
@virtual
async def test_a_block_can_be_read_as_often_as_one_likes_and_is_as_it_is_then() -> None:
    hosts = Hosts()
    writes(hosts.state, [4] * 3, per_s=100.0)
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    seen = []
    for _ in range(5):
        seen.append(int((await read_run(fd, 4, 1)).block_versions[0]))
        await sleep_ns(10 * MS)
    assert seen == [0, 1, 2, 3, 3]


@virtual
async def test_reads_of_blocks_run_at_once_as_far_as_there_are_engines() -> None:
    for engines, times in ((1, 4), (2, 2), (4, 1), (8, 1)):
        hosts = Hosts({"firmware.engines": engines, "driver.lock": "none"})
        _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
        one = await took_ns(fd.read_blocks(0, 16))
        four = await took_ns(asyncio.gather(*(fd.read_blocks(16 * at, 16) for at in range(4))))  # type: ignore[arg-type]
        save_ns = 10 * US + (V3_HEADER_BYTES + RecordBlocks.SIZE + 16 * (8 + BLOCK_BYTES)) / MIB / 1024 * 1e9
        copy_ns = one - save_ns
        assert times * save_ns <= four <= times * save_ns + 4 * copy_ns


@virtual
async def test_reads_of_blocks_wait_in_p2p_until_it_is_left() -> None:
    for leaves in (State.PRE_COPY, State.STOP_COPY):
        hosts = Hosts()
        _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
        await hosts.source.set_state(State.PRE_COPY_P2P)
        reading = [await still_waits(fd.read_blocks(first, 16), 10 * MS) for first in (0, 32)]
        await hosts.source.set_state(leaves)
        for task in reading:
            assert len(await task) > MIB
    hosts = Hosts()
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    reading = [await still_waits(fd.read_blocks(0, 16), 10 * MS)]
    await hosts.source.set_state(State.RUNNING)
    await fails_with(errno.ENODEV, reading[0])


@pytest.mark.rule("v2.driver.6")
@virtual
async def test_a_device_is_suspended_only_after_the_saves_of_blocks_in_flight() -> None:
    hosts = Hosts({"firmware.save_mib_per_s": 10.0, "driver.lock": "none"})
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    reading = [asyncio.create_task(fd.read_blocks(first, 16)) for first in (0, 16)]
    await sleep_ns(1 * MS)
    assert await took_ns(hosts.source.set_state(State.PRE_COPY_P2P)) > 98 * MS
    assert all([len(await task) for task in reading])


@pytest.mark.rule("v3.11.3")
@virtual
async def test_the_end_of_blocks_comes_when_all_were_read_as_they_are_in_stop_copy() -> None:
    hosts = Hosts()
    writes(hosts.state, [100], per_s=10.0)
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await read_run(fd, 0, BLOCKS)
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await sleep_until_ns(200 * MS)
    await hosts.stop()
    assert (await fd.stream_info()).pending_bytes > 0
    assert await read_some(fd, ALL) is None
    assert await told_blocks(fd) == list(range(BLOCKS)), "nobody asked before"
    await read_run(fd, 96, 8)
    assert (await fd.stream_info()).pending_bytes == 0
    await fails_with(errno.EINVAL, fd.read(0))
    await fails_with(errno.EINVAL, fd.read(END_BYTES - 1))
    (end,) = records((await read(fd)).parts)
    assert end.end
    assert end.size_bytes == END_BYTES
    for _ in range(2):
        assert await read_some(fd, ALL) == EMPTY


@virtual
async def test_the_end_of_blocks_does_not_come_before_a_read_that_another_thread_is_in() -> None:
    hosts = Hosts({"driver.lock": "none"})
    _, fd = await opened_blocks(hosts.source, State.STOP_COPY)
    reading = asyncio.create_task(fd.read_blocks(0, BLOCKS))
    while not reading.done():
        if not reading.done():
            assert await read_some(fd, ALL) is None or reading.done()
        await sleep_ns(100 * US)
    assert records((await read(fd)).parts)[0].end


@pytest.mark.parametrize(("policy", "expected"), [("keep", []), ("invalidate", list(range(32, 96)))])
@virtual
async def test_with_blocks_an_epoch_makes_dirty_again_what_it_names(policy: str, expected: list[int]) -> None:
    hosts = Hosts({"driver.epochs": policy})
    reconfigure(hosts.state, {50 * MS: HALF})
    critical, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    to_critical, to = await opened_blocks(hosts.target, State.RESUMING)
    await write(to_critical, await read_all(critical))
    await told_blocks(fd)
    first = [await read_run(fd, at, 16) for at in range(0, BLOCKS, 16)]
    for record in first[:4]:
        await write(to, [whole(record)])
    await sleep_until_ns(60 * MS)
    assert await told_blocks(fd) == expected
    assert await told_blocks(fd) == []
    await write(to_critical, await read_all(critical))
    for record in first[4:]:
        await write(to, [whole(record)])
    assert np.flatnonzero(hosts.image.version < 0).tolist() == expected, "undone, or dropped on arrival"
    for at in expected[::16]:
        again = await read_run(fd, at, 16)
        assert again.epoch == 2
        await write(to, [whole(again)])
    await hosts.stop()
    await write(to, (await read(fd)).parts)
    await write(to_critical, await read_all(critical))
    for each in (to_critical, to):
        await each.close()
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.11.2")
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 1), (0, 1, 0, 0), (1, 1)])
@virtual
async def test_of_two_records_with_the_same_block_the_newer_one_wins_whatever_the_order(order: tuple[int, ...]) -> None:
    hosts = Hosts()
    writes(hosts.state, [4, 4, 5], per_s=100.0)
    critical, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    to_critical, to = await opened_blocks(hosts.target, State.RESUMING)
    await write(to_critical, await read_all(critical))
    both = [await read_run(fd, 0, 16)]
    await sleep_until_ns(100 * MS)
    both.append(await read_run(fd, 4, 4))
    for at in order:
        await write(to, [whole(both[at])])
    others = 0 if 0 in order else -1
    assert hosts.image.version[:12].tolist() == [others] * 4 + [2, 1, 0, 0] + [others] * 4
    stale = hosts.target.counters[0].stale_bytes // BLOCK_BYTES
    assert stale == sum(2 for at, one in enumerate(order) if one == 0 and 1 in order[:at]), "4 and 5, each time"


@pytest.mark.rule("v3.11.2")
@virtual
async def test_blocks_wait_for_their_epoch_and_any_number_of_threads_may_write() -> None:
    hosts = Hosts()
    critical, fd = await opened_blocks(hosts.source, State.STOP_COPY)
    to_critical, to = await opened_blocks(hosts.target, State.RESUMING)
    waiting = [
        asyncio.create_task(write(to, [whole(await read_run(fd, first, 16))])) for first in reversed(range(0, 128, 16))
    ]
    await sleep_ns(1 * SECOND)
    assert not any(task.done() for task in waiting)
    assert hosts.target.counters[0].peak_held_bytes == sum(
        V3_HEADER_BYTES + RecordBlocks.SIZE + 16 * (8 + BLOCK_BYTES) for _ in waiting
    )
    await write(to_critical, await read_all(critical))
    await asyncio.gather(*waiting)
    await write(to, (await read(fd)).parts)
    await to.close()
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


BLOCKS_REFUSED: dict[str, int] = {
    "half a record": errno.EPROTO,
    "two records": errno.EPROTO,
    "nothing": errno.EPROTO,
    "no bytes of a device": errno.EPROTO,
    "a dirty stream's record": errno.EXDEV,
    "the critical stream's record": errno.EXDEV,
    "with a critical object": errno.EPROTO,
    "that completes an epoch": errno.EPROTO,
    "of a block that there is not": errno.EPROTO,
    "an epoch that never came": errno.EPROTO,
    "a newer version than there is": errno.EBADMSG,
    "an older version than there is": errno.EBADMSG,
    "one is missing": errno.EBADMSG,
    "the END comes too early": errno.EBADMSG,
    "after the END": errno.EPROTO,
    "an END of other counts": errno.EBADMSG,
}


@pytest.mark.rule("v3.11.3")
@pytest.mark.parametrize("how", BLOCKS_REFUSED)
@virtual
async def test_blocks_what_cannot_be_the_sources_is_refused(how: str) -> None:
    hosts = Hosts()
    critical, fd = await opened_blocks(hosts.source, State.STOP_COPY)
    fds = to_critical, to = await opened_blocks(hosts.target, State.RESUMING)
    of_critical = await read_all(critical)
    parts = [whole(await read_run(fd, first, 16)) for first in range(0, BLOCKS, 16)]
    end = (await read(fd)).parts[0]
    await write(to_critical, of_critical)
    first, second, *rest = parts
    one_by_one: dict[str, list[list[RecordSlice]]] = {
        "half a record": [cut([first], 0, 1000)],
        "two records": [[first, second]],
        "nothing": [[]],
        "a dirty stream's record": [[altered(first, stream=2)]],
        "the critical stream's record": [of_critical[:1]],
        "with a critical object": [[altered(first, objects=[0], object_versions=[0])]],
        "that completes an epoch": [[altered(first, epoch_complete=True)]],
        "of a block that there is not": [[altered(first, blocks=[BLOCKS], block_versions=[0])]],
        "an epoch that never came": [[altered(first, epoch=2)]],
        "a newer version than there is": [[altered(first, block_versions=[1] * 16)], [second], *([p] for p in rest)],
        "an older version than there is": [[altered(first, block_versions=[-1] * 16)], *([p] for p in parts[1:])],
        "one is missing": [[second], *([part] for part in rest)],
        "the END comes too early": [[first], [second]],
        "after the END": [*([part] for part in parts), [end], [first]],
        "an END of other counts": [*([p] for p in parts), [altered(end, tally=Tally(BLOCKS - 1, 0, 7))]],
    }
    ends = how not in ("after the END", "an END of other counts")

    async def carry() -> None:
        if how == "no bytes of a device":
            await to.write(b"no record", PIECE)
        for each in one_by_one[how]:
            await write(to, each)
        if ends:
            await write(to, [end])

    with pytest.raises(OSError, match=rf"^\[Errno {BLOCKS_REFUSED[how]}\] dev (blocks|stream 1): "):
        await carry()
    await check_in_error(hosts.target, fds)


@pytest.mark.parametrize("side", ["source", "target"])
@virtual
async def test_a_session_that_failed_is_open_until_a_reset_and_over_then(side: str) -> None:
    """As of the sample driver: until then SET of MIG_STREAMS is EBUSY and its fds say EIO, from then on ENODEV."""
    hosts = Hosts({"device.0.faults": [{"side": "source", "command": "SAVE"}, {"side": "target", "command": "LOAD"}]})
    driver = hosts.source if side == "source" else hosts.target
    parts = (await saved(Hosts(), 2))[0]
    fds = await session(driver, State.PRE_COPY if side == "source" else State.RESUMING, 2)
    if side == "target":
        await fails_somehow(fds[0].write(Extent(parts), PIECE))
    await sleep_ns(100 * MS)
    assert await driver.state() is State.ERROR
    for _ in range(2):
        await fails_with(errno.EBUSY, driver.set_streams(0))
        for fd in fds:
            await fails_with(errno.EIO, fd.read(ALL) if side == "source" else fd.write(Extent(parts), PIECE))
    await driver.reset()
    for fd in fds:
        await fails_with(errno.ENODEV, fd.read(ALL) if side == "source" else fd.write(Extent(parts), PIECE))
    await driver.set_streams(1)
