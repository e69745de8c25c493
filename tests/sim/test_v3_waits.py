# SPDX-License-Identifier: GPL-2.0-or-later
"""v3 on one device: calls that wait, O_NONBLOCK, interruptions, poll(), and limits. See docs/vfio_v3.h."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable
from typing import Any

import pytest

from proto_v3.vfio.device import Ready
from proto_v3.vfio.uapi import State
from sim.clock.port import sleep_ns
from sim.device.record import RecordSlice
from sim.device.record_format import MAX_EPOCHS_AHEAD
from tests.build.hosts import ALL, BLOCK_BYTES, BLOCKS, MS, Hosts, fails_with, read_all, saved, session
from tests.build.scenario import virtual
from tests.build.v3_hosts import altered, cut, opened_blocks, write

# --- waiting ---------------------------------------------------------------------------------------------------------


async def unloaded(hosts: Hosts, streams: int = 2) -> tuple[list[list[RecordSlice]], list[Any]]:
    """A whole state in streams, and the fds of a device that has nothing of it yet."""
    parts = await saved(hosts, streams)
    return parts, await session(hosts.target, State.RESUMING, streams)


async def blocked(call: Awaitable[Any]) -> int:
    """What a call took that fails with EAGAIN."""
    with pytest.raises(BlockingIOError) as caught:
        await call
    assert caught.value.errno == errno.EAGAIN
    return caught.value.characters_written


@pytest.mark.rule("v3.5.5")
@virtual
async def test_with_o_nonblock_a_write_takes_all_but_what_waits_for_an_epoch() -> None:
    hosts = Hosts()
    parts, (critical, first, second) = await unloaded(hosts)
    first.nonblocking = True
    record = parts[1][0].record
    assert await blocked(write(first, parts[1])) == record.size_bytes - 1
    assert await blocked(write(first, cut(parts[1], record.size_bytes - 1))) == 0
    assert await first.poll(0) is Ready.NOTHING
    assert await second.poll(0) is await critical.poll(0) is Ready.WRITABLE
    waits = asyncio.create_task(first.poll())
    await sleep_ns(10 * MS)
    assert not waits.done()
    await write(critical, parts[0])
    assert await waits is Ready.WRITABLE
    await write(first, cut(parts[1], record.size_bytes - 1))
    await write(second, parts[2])
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.5.5")
@pytest.mark.parametrize("cuts", [1, 1000, 1 << 30])
@virtual
async def test_who_is_interrupted_while_he_waits_loses_no_byte_and_writes_none_twice(cuts: int) -> None:
    """A cancelled task stands for a signal: all but the last byte of the record is taken."""
    hosts = Hosts()
    parts, (critical, first, second) = await unloaded(hosts)
    record = parts[1][0].record
    cuts = min(cuts, record.size_bytes)
    await write(first, cut(parts[1], 0, record.size_bytes - cuts))
    writing = asyncio.create_task(write(first, cut(parts[1], record.size_bytes - cuts)))
    await sleep_ns(10 * MS)
    held = hosts.target.counters[0].peak_held_bytes
    assert held == record.size_bytes
    writing.cancel()
    await asyncio.wait([writing])
    assert writing.cancelled()
    for fd, rest in ((critical, parts[0]), (first, cut(parts[1], record.size_bytes - 1)), (second, parts[2])):
        await write(fd, rest)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.5.6")
@pytest.mark.parametrize(
    ("how", "code"), [("reset", errno.ENODEV), ("leave", errno.ENODEV), ("fail", errno.EIO), ("end", errno.EPROTO)]
)
@virtual
async def test_a_write_that_waits_ends_with_whatever_ends_its_wait(how: str, code: int) -> None:
    hosts = Hosts()
    parts, (critical, first, second) = await unloaded(hosts)
    waiting = asyncio.create_task(write(first, [altered(parts[1][0], epoch=9)]))
    await sleep_ns(10 * MS)
    polling = asyncio.create_task(first.poll())
    await sleep_ns(10 * MS)
    assert not waiting.done()
    assert not polling.done()
    match how:
        case "reset":
            await hosts.target.reset()
        case "leave":
            await fails_with(errno.ENODATA, hosts.target.set_state(State.STOP))
        case "fail":
            await fails_with(errno.EXDEV, write(second, parts[1][:1]))
        case _:
            await write(critical, parts[0])
    await fails_with(code, waiting)
    over = Ready.WRITABLE | Ready.OVER
    assert await polling == (over if code == errno.ENODEV else over | Ready.FAILED)


@pytest.mark.rule("v3.3.4")
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_with_o_nonblock_a_read_does_not_wait_while_the_device_saves(streams: int) -> None:
    hosts = Hosts()
    fds: list[Any] = await session(hosts.source, State.PRE_COPY, streams)
    for fd in fds:
        fd.nonblocking = True
        if Ready.READABLE not in await fd.poll(0):
            await fails_with(errno.EAGAIN, fd.read(ALL))
        while Ready.READABLE not in await fd.poll(0):
            await sleep_ns(1 * MS)
        assert len(await fd.read(ALL)) > 0


@pytest.mark.rule("v3.3.4")
@virtual
async def test_with_o_nonblock_a_read_of_blocks_does_not_wait_until_p2p_is_left() -> None:
    hosts = Hosts()
    _, fd = await opened_blocks(hosts.source, State.PRE_COPY)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    waiting = asyncio.create_task(fd.read_blocks(0, 16))
    await sleep_ns(10 * MS)
    fd.nonblocking = True  # type: ignore[attr-defined]
    await fails_with(errno.EAGAIN, fd.read_blocks(16, 16))
    assert not waiting.done()
    await hosts.source.set_state(State.PRE_COPY)
    assert len(await waiting) > 16 * BLOCK_BYTES


@pytest.mark.rule("v3.5.5")
@virtual
async def test_of_blocks_a_write_that_would_wait_or_is_interrupted_takes_nothing() -> None:
    hosts = Hosts()
    critical, fd = await opened_blocks(hosts.source, State.STOP_COPY)
    to_critical, to = await opened_blocks(hosts.target, State.RESUMING)
    records = [await fd.read_blocks(first, 16) for first in range(0, BLOCKS, 16)]
    for record in records:
        writing = asyncio.create_task(to.write(record, ALL))
        await sleep_ns(1 * MS)
        writing.cancel()
        await asyncio.wait([writing])
    to.nonblocking = True  # type: ignore[attr-defined]
    await fails_with(errno.EAGAIN, to.write(records[0], ALL))
    await write(to_critical, await read_all(critical))
    for record in records:
        await to.write(record, ALL)
    await to.write(await fd.read(ALL), ALL)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.9.4")
@virtual
async def test_an_epoch_that_is_too_far_ahead_is_refused_at_once() -> None:
    for ahead, code in ((MAX_EPOCHS_AHEAD, None), (MAX_EPOCHS_AHEAD + 1, errno.E2BIG)):
        hosts = Hosts()
        parts, (critical, first, _) = await unloaded(hosts)
        await write(critical, parts[0][:-1])
        waiting = asyncio.create_task(write(first, [altered(parts[1][0], epoch=1 + ahead)]))
        await sleep_ns(10 * MS)
        assert waiting.done() == (code is not None)
        if code is None:
            waiting.cancel()
        else:
            await fails_with(code, waiting)
            assert await hosts.target.state() is State.ERROR


@virtual
async def test_before_any_epoch_is_loaded_none_is_too_far_ahead() -> None:
    """A device may have been reconfigured any number of times before its migration."""
    hosts = Hosts()
    parts, (critical, first, second) = await unloaded(hosts)
    far = 10 * MAX_EPOCHS_AHEAD
    of = [[altered(part, epoch=far) for part in stream] for stream in parts]
    waiting = asyncio.create_task(write(first, of[1][:1]))
    await sleep_ns(10 * MS)
    await write(critical, of[0][:-1])
    await waiting
    await write(second, of[2][:1])


@pytest.mark.rule("v3.9.4")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"blocks": [0] * (BLOCKS + 1), "block_versions": [0] * (BLOCKS + 1)}, errno.E2BIG),
        ({"epoch": 0}, errno.EPROTO),
    ],
)
@virtual
async def test_more_than_there_can_be_is_refused(changes: dict[str, Any], code: int) -> None:
    hosts = Hosts()
    parts, (critical, first, _) = await unloaded(hosts)
    await write(critical, parts[0])
    await fails_with(code, write(first, [altered(parts[1][0], **changes)]))
    assert await hosts.target.state() is State.ERROR
