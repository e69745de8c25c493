# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left to read: GET_PRECOPY_INFO, which starts saves and reports REINIT, MIG_DATA_SIZE, v3's stream_info."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import read_some
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.device.record import HEADER_BYTES, Extent, Record, RecordSlice
from sim.scenario.units import KIB, MIB
from tests.build.hosts import (
    ALL,
    BLOCK_BYTES,
    BLOCKS,
    CALL_NS,
    CHUNK_BYTES,
    FIRST_BYTES,
    KINDS,
    MS,
    OBJECTS_BYTES,
    STATE_BYTES,
    V3_END_BYTES,
    WHOLE,
    Hosts,
    blocks,
    fails_with,
    objects,
    opted_in,
    read,
    read_all,
    records,
    save_ns,
    session,
    size,
    told,
    took_ns,
)
from tests.build.scenario import virtual

BUSY = {"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}}
"""160 blocks a second."""
NEW_AT_100_MS = {"device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}}
NEW_OBJECTS_BYTES = OBJECTS_BYTES // 2 + HEADER_BYTES
WITH_PRECOPY = [kind for kind, changes in KINDS.items() if "PRE_COPY" in changes.get("device.0.features", ["PRE_COPY"])]
NOT_REREAD = [kind for kind in WITH_PRECOPY if KINDS[kind].get("driver.precopy") != "reread"]


# --- when it can be asked --------------------------------------------------------------------------------------------


@virtual
async def test_precopy_info_is_for_pre_copy_only() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await fd.precopy_info()
    await hosts.source.set_state(State.PRE_COPY_P2P)
    await fd.precopy_info()
    await hosts.source.set_state(State.STOP_COPY)
    await fails_with(errno.EINVAL, fd.precopy_info())
    await read_all(fd)
    await fails_with(errno.EINVAL, fd.precopy_info())


@virtual
async def test_precopy_info_is_not_for_a_session_that_began_in_stop_copy() -> None:
    (fd,) = await session(Hosts().source, State.STOP_COPY)
    await fails_with(errno.EINVAL, fd.precopy_info())


@pytest.mark.rule("v2.contract.8")
@virtual
async def test_the_state_of_the_device_is_looked_at_before_the_session_of_the_fd() -> None:
    hosts = Hosts()
    (stale,) = await session(hosts.source, State.PRE_COPY)
    for state in (State.RUNNING, State.STOP, State.STOP_COPY):
        await hosts.source.set_state(state)
        await fails_with(errno.EINVAL, stale.precopy_info())
    await hosts.source.set_state(State.RUNNING)
    for state in (State.PRE_COPY, State.PRE_COPY_P2P):
        await hosts.source.set_state(state)
        await fails_with(errno.ENODEV, stale.precopy_info())


@virtual
async def test_neither_info_is_for_resuming() -> None:
    (fd,) = await session(Hosts().target, State.RESUMING)
    await fails_with(errno.ENOTTY, fd.precopy_info())
    await fails_with(errno.ENOTTY, fd.stream_info())


# --- initial bytes, then dirty bytes ---------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.1")
@virtual
async def test_all_of_the_first_image_is_initial_and_nothing_is_dirty() -> None:
    (fd,) = await session(Hosts(WHOLE).source, State.PRE_COPY)
    assert told(await fd.precopy_info()) == (FIRST_BYTES + STATE_BYTES + HEADER_BYTES, 0, False)


@virtual
async def test_the_first_image_is_initial_in_chunks_too_saved_or_not() -> None:
    (fd,) = await session(Hosts({"driver.initial": "image"}).source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    whole = FIRST_BYTES + STATE_BYTES + 9 * HEADER_BYTES
    assert told(await fd.precopy_info()) == (whole, 0, False)
    await read(fd)
    got = FIRST_BYTES + OBJECTS_BYTES + CHUNK_BYTES + 2 * HEADER_BYTES
    await sleep_ns(100 * MS)
    assert told(await fd.precopy_info()) == (whole - got, 0, False)


@pytest.mark.rule("v2.contract.11", "v2.best.d4")
@virtual
async def test_where_critical_objects_alone_are_initial_they_come_first() -> None:
    (fd,) = await session(Hosts().source, State.PRE_COPY)
    await sleep_ns(100 * MS)  # until the producer waits for a free chunk
    info = await fd.precopy_info()
    assert info.initial_bytes == FIRST_BYTES + OBJECTS_BYTES + HEADER_BYTES
    assert info.dirty_bytes == BLOCKS * BLOCK_BYTES + 8 * HEADER_BYTES
    initial = await read(fd, info.initial_bytes)
    assert objects(initial.parts) == [0, 1, 2, 3]
    assert blocks(initial.parts) == []
    assert (await fd.precopy_info()).initial_bytes == 0
    assert (await read(fd)).parts[0].record.blocks.tolist() == list(range(16))


@pytest.mark.rule("v2.contract.11")
@pytest.mark.parametrize("kind", WITH_PRECOPY)
@settings(max_examples=15)
@given(steps=st.lists(st.tuples(st.integers(0, 2 * MS), st.integers(0, 4 * MIB)), min_size=5, max_size=40))
def test_initial_bytes_start_non_zero_and_only_fall(kind: str, steps: list[tuple[int, int]]) -> None:
    """Also when the guest reconfigures the device: v2 without the opt-in to REINIT cannot tell."""

    @virtual
    async def asked() -> None:
        reconfigured = {"device.0.critical.objects": 600, "device.0.reconfigurations": {"at_s": [0.001, 0.01, 0.02]}}
        (fd,) = await session(Hosts({**KINDS[kind], **BUSY, **reconfigured}).source, State.PRE_COPY)
        infos = [await fd.precopy_info()]
        for delay, max_bytes in steps:
            await sleep_ns(delay)
            if max_bytes:
                await read_some(fd, max_bytes)
            infos.append(await fd.precopy_info())
        initial = [info.initial_bytes for info in infos]
        assert initial[0] > 0
        assert initial == sorted(initial, reverse=True)
        assert not any(info.reinit for info in infos)

    asked()


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 2 * MS), st.integers(0, MIB)), max_size=20),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([{}, WHOLE, {"driver.precopy_image": "whole"}, {"driver.initial": "image"}]),
)
@virtual
async def test_what_is_pending_is_all_that_was_not_read_yet(
    steps: list[tuple[int, int]], streams: int, image: dict[str, Any]
) -> None:
    """Of an idle device; what is being saved just now counts too."""
    fds = await session(Hosts(image).source, State.PRE_COPY, streams)
    got, sums = 0, set()
    for number, (delay, max_bytes) in enumerate(steps):
        await sleep_ns(delay)
        if max_bytes and (data := await read_some(fds[number % len(fds)], max_bytes)) is not None:
            got += len(data)
        if streams:
            pending = sum([(await fd.stream_info()).pending_bytes for fd in fds])
        else:
            info = await fds[0].precopy_info()
            pending = info.initial_bytes + info.dirty_bytes
        sums.add(got + pending)
    assert sums <= {sum([size(await read_all(fd)) for fd in fds]) + got}


# --- what it starts --------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.3")
@pytest.mark.parametrize("image", [{}, WHOLE], ids=["chunks", "whole images"])
@virtual
async def test_precopy_info_makes_the_device_save_what_became_dirty_and_read_does_not(image: dict[str, Any]) -> None:
    hosts = Hosts({**image, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_ns(100 * MS)
    await fails_with(errno.ENOMSG, fd.read(ALL))
    assert not await fd.poll(1 * MS)
    info = await fd.precopy_info()
    assert info.initial_bytes == 0
    assert info.dirty_bytes > 10 * BLOCK_BYTES
    assert size(await read_all(fd)) == info.dirty_bytes
    await fails_with(errno.ENOMSG, fd.read(ALL))


@pytest.mark.rule("v2.driver.3")
@virtual
async def test_precopy_info_starts_no_save_before_all_earlier_data_is_read() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    image_bytes = FIRST_BYTES + STATE_BYTES + HEADER_BYTES
    first = (await read(fd, image_bytes - 1)).parts
    for _ in range(3):
        await sleep_ns(100 * MS)
        await fd.precopy_info()
    first += (await read(fd)).parts
    assert size(first) == image_bytes
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await fd.precopy_info()
    assert len(blocks(await read_all(fd))) == 64


@pytest.mark.rule("v2.driver.4")
@virtual
async def test_what_became_dirty_is_told_before_it_is_saved_but_not_before_the_initial_data_is_read() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_until_ns(100 * MS)
    assert told(await fd.precopy_info()) == (FIRST_BYTES + STATE_BYTES + HEADER_BYTES, 0, False)
    await read_all(fd)
    info = await fd.precopy_info()
    assert info.initial_bytes == 0
    assert info.dirty_bytes >= 16 * BLOCK_BYTES + HEADER_BYTES


@virtual
async def test_nothing_is_saved_where_nothing_became_dirty() -> None:
    (fd,) = await session(Hosts(WHOLE).source, State.PRE_COPY)
    await read_all(fd)
    for _ in range(3):
        await sleep_ns(100 * MS)
        assert told(await fd.precopy_info()) == (0, 0, False)
        await fails_with(errno.ENOMSG, fd.read(ALL))


@pytest.mark.rule("v2.driver.3")
@virtual
async def test_precopy_info_waits_for_the_save_in_flight() -> None:
    (fd,) = await session(Hosts(WHOLE).source, State.PRE_COPY)
    assert await took_ns(fd.precopy_info()) == save_ns(STATE_BYTES)
    assert await took_ns(fd.precopy_info()) == CALL_NS


@virtual
async def test_precopy_info_returns_without_waiting_for_the_save_that_it_starts() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_until_ns(100 * MS)
    assert await took_ns(fd.precopy_info()) == CALL_NS
    assert await fd.poll(0) is Ready.NOTHING
    assert await took_ns(fd.poll()) == save_ns(16 * BLOCK_BYTES)


@virtual
async def test_two_that_ask_at_once_start_one_save() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_until_ns(100 * MS)
    one, other = await asyncio.gather(*(asyncio.create_task(fd.precopy_info()) for _ in range(2)))
    assert told(one) == told(other) == (0, 16 * BLOCK_BYTES + HEADER_BYTES, False)
    assert size(await read_all(fd)) == 16 * BLOCK_BYTES + HEADER_BYTES


# --- PRE_COPY_P2P ----------------------------------------------------------------------------------------------------


@virtual
async def test_in_precopy_p2p_nothing_new_is_told_or_saved() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    await sleep_ns(100 * MS)
    assert told(await fd.precopy_info()) == (0, 0, False)
    await sleep_ns(100 * MS)
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await hosts.source.set_state(State.PRE_COPY)
    info = await fd.precopy_info()
    assert info.dirty_bytes > 30 * BLOCK_BYTES
    assert size(await read_all(fd)) == info.dirty_bytes


@virtual
async def test_in_precopy_p2p_what_is_left_from_before_is_told_and_can_be_read() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_until_ns(100 * MS)
    await read(fd, FIRST_BYTES)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    assert told(await fd.precopy_info()) == (STATE_BYTES + HEADER_BYTES, 0, False)
    assert blocks(await read_all(fd)) == list(range(BLOCKS))


@virtual
async def test_in_precopy_p2p_precopy_info_does_not_wait_for_the_save_in_flight() -> None:
    """As mlx5, which asks its firmware in PRE_COPY only (mlx5vf_precopy_ioctl)."""
    hosts = Hosts({**WHOLE, "firmware.save_command_us": 1e5})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    assert await took_ns(fd.precopy_info()) == CALL_NS


@virtual
async def test_a_session_that_begins_in_precopy_p2p_has_the_first_image() -> None:
    (fd,) = await session(Hosts(WHOLE).source, State.PRE_COPY_P2P)
    assert told(await fd.precopy_info()) == (FIRST_BYTES + STATE_BYTES + HEADER_BYTES, 0, False)
    assert blocks(await read_all(fd)) == list(range(BLOCKS))


# --- REINIT: when it is told -----------------------------------------------------------------------------------------


async def asked_every(fd: DataFd, interval_ns: int, until_ns: int) -> list[int]:
    """Milliseconds at which REINIT was reported."""
    reported = []
    while now_ns() < until_ns:
        if (await fd.precopy_info()).reinit:
            reported.append(now_ns() // MS)
        await read_all(fd)
        await sleep_until_ns((now_ns() // interval_ns + 1) * interval_ns)
    return reported


@pytest.mark.rule("v2.contract.12", "v2.best.d2")
@pytest.mark.parametrize("reinit", ["flush", "invalidate", "priority"])
@virtual
async def test_reinit_is_told_once_for_each_reconfiguration_that_is_seen(reinit: str) -> None:
    """Those of 201 and 204 ms are seen in one call."""
    changes = {"driver.reinit": reinit, "device.0.reconfigurations": {"at_s": [0.101, 0.201, 0.204, 0.301]}}
    fd = await opted_in(Hosts({**WHOLE, **BUSY, **changes}).source)
    assert await asked_every(fd, 10 * MS, 500 * MS) == [110, 210, 310]


@pytest.mark.rule("v2.contract.12")
@pytest.mark.parametrize(
    ("reinit", "opts_in"), [("none", True), ("none", False), ("flush", False), ("priority", False)]
)
@virtual
async def test_reinit_is_not_told_without_the_opt_in_nor_by_a_driver_that_has_none(reinit: str, opts_in: bool) -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS, "driver.reinit": reinit})
    if opts_in:
        await hosts.source.set_precopy_info_v2()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert await asked_every(fd, 10 * MS, 300 * MS) == []


@virtual
async def test_without_the_opt_in_a_reconfiguration_is_dirty_bytes_like_any_others() -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await fd.precopy_info()
    await sleep_until_ns(110 * MS)
    assert await fd.poll(1 * MS) is Ready.NOTHING
    await fails_with(errno.ENOMSG, fd.read(ALL))
    assert told(await fd.precopy_info()) == (0, NEW_OBJECTS_BYTES, False)
    assert len(objects(await read_all(fd))) == 2


@pytest.mark.rule("v2.contract.12")
@pytest.mark.parametrize("reinit", ["flush", "invalidate", "priority"])
@virtual
async def test_with_the_opt_in_it_is_the_same_bytes_as_initial_ones(reinit: str) -> None:
    fd = await opted_in(Hosts({**WHOLE, **NEW_AT_100_MS, "driver.reinit": reinit}).source)
    await read_all(fd)
    await sleep_until_ns(110 * MS)
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, True)
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, False)
    assert len(objects(await read_all(fd))) == 2
    assert told(await fd.precopy_info()) == (0, 0, False)


@virtual
async def test_a_session_may_opt_in_when_it_is_open_already() -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_until_ns(110 * MS)
    await hosts.source.set_precopy_info_v2()
    assert (await fd.precopy_info()).reinit


@virtual
async def test_a_reconfiguration_before_the_session_is_in_its_first_image_and_not_told() -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS})
    await sleep_until_ns(200 * MS)
    fd = await opted_in(hosts.source)
    assert told(await fd.precopy_info()) == (FIRST_BYTES + STATE_BYTES + HEADER_BYTES, 0, False)


@virtual
async def test_one_that_the_first_image_is_too_early_for_is_told() -> None:
    hosts = Hosts({**WHOLE, "device.0.reconfigurations": {"at_s": [0.001], "objects_each": 2}})
    fd = await opted_in(hosts.source)
    first = FIRST_BYTES + STATE_BYTES + HEADER_BYTES
    assert told(await fd.precopy_info()) == (first + NEW_OBJECTS_BYTES, 0, True)


@pytest.mark.rule("v2.contract.12")
@virtual
async def test_in_precopy_p2p_no_reinit_is_told_but_back_in_pre_copy_it_is() -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS})
    fd = await opted_in(hosts.source)
    await read_all(fd)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    await sleep_until_ns(110 * MS)
    assert told(await fd.precopy_info()) == (0, 0, False)
    await hosts.source.set_state(State.PRE_COPY)
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, True)


@virtual
async def test_a_reconfiguration_after_the_last_call_is_never_told_and_comes_with_the_last_image() -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS})
    fd = await opted_in(hosts.source)
    await read_all(fd)
    await sleep_until_ns(110 * MS)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    assert not (await fd.precopy_info()).reinit
    await hosts.stop()
    last = await read_all(fd)
    assert len(objects(last)) == 2
    assert not any(record.initial for record in records(last))


@virtual
async def test_a_reconfiguration_that_the_stop_brings_is_told_to_who_asks_once_more_after_it() -> None:
    hosts = Hosts({**WHOLE, "device.0.reconfigurations": {"during_stop_ms": [0.5], "objects_each": 2}})
    fd = await opted_in(hosts.source)
    await read_all(fd)
    hosts.state.order_stop(now_ns())
    assert not (await fd.precopy_info()).reinit
    await sleep_ns(1 * MS)
    hosts.state.stop(now_ns())
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, True)


@virtual
async def test_a_new_session_tells_of_new_reconfigurations_only() -> None:
    hosts = Hosts({**WHOLE, "device.0.reconfigurations": {"at_s": [0.1, 0.3]}})
    await opted_in(hosts.source)
    await sleep_until_ns(200 * MS)
    await hosts.source.set_state(State.RUNNING)
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert not (await fd.precopy_info()).reinit
    await sleep_until_ns(310 * MS)
    assert (await fd.precopy_info()).reinit


@pytest.mark.rule("v2.contract.12")
@pytest.mark.parametrize("kind", NOT_REREAD)
@pytest.mark.parametrize("reinit", ["flush", "invalidate", "priority"])
@settings(max_examples=10)
@given(steps=st.lists(st.tuples(st.integers(0, 4 * MS), st.integers(0, 4 * MIB)), min_size=5, max_size=30))
def test_initial_bytes_rise_with_a_reinit_only_and_then_nothing_is_dirty(
    kind: str, reinit: str, steps: list[tuple[int, int]]
) -> None:
    @virtual
    async def asked() -> None:
        events = {"device.0.critical.objects": 600, "device.0.reconfigurations": {"poisson_per_s": 100.0}}
        fd = await opted_in(Hosts({**KINDS[kind], **BUSY, **events, "driver.reinit": reinit}).source)
        before = (await fd.precopy_info()).initial_bytes
        for delay, max_bytes in steps:
            await sleep_ns(delay)
            if max_bytes:
                await read_some(fd, max_bytes)
            info = await fd.precopy_info()
            assert info.initial_bytes <= before or info.reinit
            assert not (info.reinit and info.dirty_bytes)
            before = info.initial_bytes

    asked()


# --- REINIT: what becomes of unread bytes ----------------------------------------------------------------------------


async def with_unread_dirty_bytes(changes: dict[str, Any]) -> tuple[Hosts, DataFd]:
    """At 110 ms: 16 dirty blocks are saved and unread, 2 critical objects and 1 block are new."""
    hosts = Hosts({**WHOLE, **BUSY, **NEW_AT_100_MS, **changes})
    fd = await opted_in(hosts.source)
    await read_all(fd)
    await sleep_until_ns(100 * MS - CALL_NS - 1)
    assert (await fd.precopy_info()).dirty_bytes == DIRTY_BYTES
    await sleep_until_ns(110 * MS)
    return hosts, fd


DIRTY_BYTES = 15 * BLOCK_BYTES + HEADER_BYTES
"""What the writes of just under 100 ms make dirty, saved."""


@pytest.mark.rule("v2.driver.12")
@virtual
async def test_flush_makes_unread_bytes_initial_and_the_new_ones_follow() -> None:
    hosts, fd = await with_unread_dirty_bytes({})
    new_bytes = OBJECTS_BYTES // 2 + 2 * BLOCK_BYTES + HEADER_BYTES
    assert told(await fd.precopy_info()) == (DIRTY_BYTES + new_bytes, 0, True)
    await sleep_until_ns(111 * MS)
    assert told(await fd.precopy_info()) == (DIRTY_BYTES + new_bytes, 0, False)
    old, new = records(await read_all(fd))
    assert (len(old.objects), len(old.blocks)) == (0, 15)
    assert (len(new.objects), len(new.blocks)) == (2, 2)
    assert hosts.source.counters[0].device_bytes_dropped == 0


@pytest.mark.rule("v2.driver.12")
@virtual
async def test_flush_saves_at_once_although_not_all_is_read() -> None:
    _, fd = await with_unread_dirty_bytes({})
    await fd.precopy_info()
    await sleep_ns(50 * MS)
    assert len((await read(fd)).parts) == 2  # in one read(), so both were there


@virtual
async def test_flush_counts_of_a_record_that_was_begun_only_the_rest() -> None:
    _, fd = await with_unread_dirty_bytes({})
    await read(fd, 100_000)
    new_bytes = OBJECTS_BYTES // 2 + 2 * BLOCK_BYTES + HEADER_BYTES
    assert told(await fd.precopy_info()) == (DIRTY_BYTES - 100_000 + new_bytes, 0, True)


@pytest.mark.rule("v2.driver.4")
@virtual
async def test_after_a_flush_no_dirty_bytes_are_told_of_until_the_new_initial_ones_are_read() -> None:
    _, fd = await with_unread_dirty_bytes({})
    first = await fd.precopy_info()
    await sleep_until_ns(200 * MS)
    info = await fd.precopy_info()
    assert info.initial_bytes == first.initial_bytes
    assert info.dirty_bytes == 0


@virtual
async def test_reinit_is_told_once_also_while_the_new_data_waits_for_a_chunk() -> None:
    fd = await opted_in(Hosts(NEW_AT_100_MS).source)
    await sleep_until_ns(110 * MS)
    reported = [(await fd.precopy_info()).reinit for _ in range(3)]
    assert reported == [True, False, False]


@virtual
async def test_where_critical_objects_alone_are_initial_flush_puts_the_new_ones_before_the_dirty_blocks() -> None:
    hosts, fd = await with_unread_dirty_bytes({"driver.initial": "critical"})
    assert told(await fd.precopy_info()) == (DIRTY_BYTES + NEW_OBJECTS_BYTES, 0, True)
    await sleep_until_ns(111 * MS)
    info = await fd.precopy_info()
    assert told(info) == (DIRTY_BYTES + NEW_OBJECTS_BYTES, 2 * BLOCK_BYTES + HEADER_BYTES, False)
    old, new, rest = records(await read_all(fd))
    assert [len(record.objects) for record in (old, new, rest)] == [0, 2, 0]
    assert [len(record.blocks) for record in (old, new, rest)] == [15, 0, 2]
    assert hosts.source.counters[0].device_bytes_dropped == 0


INVALIDATE = {"driver.reinit": "invalidate"}


@pytest.mark.rule("v2.driver.13")
@virtual
async def test_invalidate_drops_unread_dirty_bytes_and_they_are_dirty_again() -> None:
    hosts, fd = await with_unread_dirty_bytes(INVALIDATE)
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, True)
    assert hosts.source.counters[0].device_bytes_dropped == DIRTY_BYTES
    initial = await read_all(fd)
    assert len(objects(initial)) == 2
    assert blocks(initial) == []
    info = await fd.precopy_info()
    assert told(info) == (0, 17 * BLOCK_BYTES + HEADER_BYTES, False)
    assert len(blocks(await read_all(fd))) == 17


@virtual
async def test_after_an_invalidation_what_was_dropped_is_told_as_dirty_once_the_new_initial_data_is_read() -> None:
    _, fd = await with_unread_dirty_bytes(INVALIDATE)
    await fd.precopy_info()
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, False)
    await read_all(fd)
    assert told(await fd.precopy_info()) == (0, 17 * BLOCK_BYTES + HEADER_BYTES, False)


@pytest.mark.rule("v2.driver.13")
@virtual
async def test_invalidate_keeps_a_record_that_was_begun() -> None:
    """Its bytes are on their way: the target would see a stream that was cut."""
    hosts, fd = await with_unread_dirty_bytes(INVALIDATE)
    await read(fd, 1)
    assert told(await fd.precopy_info()) == (DIRTY_BYTES - 1 + NEW_OBJECTS_BYTES, 0, True)
    assert hosts.source.counters[0].device_bytes_dropped == 0
    old, new = records(await read_all(fd))
    assert (len(old.blocks), len(new.objects)) == (15, 2)


@virtual
async def test_invalidate_keeps_unread_initial_bytes() -> None:
    hosts = Hosts({**WHOLE, **NEW_AT_100_MS, **INVALIDATE})
    fd = await opted_in(hosts.source)
    await sleep_until_ns(110 * MS)
    first = FIRST_BYTES + STATE_BYTES + HEADER_BYTES
    assert told(await fd.precopy_info()) == (first + NEW_OBJECTS_BYTES, 0, True)
    assert hosts.source.counters[0].device_bytes_dropped == 0


@virtual
async def test_invalidate_gives_the_chunks_of_what_it_drops_back() -> None:
    """Both chunks are full; else the new critical objects would have to wait for a reader."""
    hosts = Hosts({**NEW_AT_100_MS, **INVALIDATE})
    fd = await opted_in(hosts.source)
    await read(fd)
    await read(fd)
    await sleep_until_ns(110 * MS)
    assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, True)
    assert hosts.source.counters[0].device_bytes_dropped == 2 * (CHUNK_BYTES + HEADER_BYTES)
    assert await took_ns(fd.poll()) == save_ns(OBJECTS_BYTES // 2)


@virtual
async def test_what_was_dropped_is_saved_again_at_the_stop_if_nobody_asked_before() -> None:
    hosts, fd = await with_unread_dirty_bytes(INVALIDATE)
    await fd.precopy_info()
    await hosts.stop()
    parts = await read_all(fd)
    assert len(objects(parts)) == 2
    assert len(blocks(parts)) == len(set(blocks(parts))) == 17


@pytest.mark.rule("v2.driver.12", "v2.driver.13", "v2.best.d3")
@pytest.mark.parametrize("reinit", ["flush", "invalidate", "priority"])
@pytest.mark.parametrize("image", [{}, WHOLE], ids=["chunks", "whole images"])
@settings(max_examples=15)
@given(precopy_ns=st.integers(5 * MS, 60 * MS), read_kib=st.integers(16, 512), seed=st.integers(0, 1000))
def test_the_image_is_the_source_whatever_was_flushed_or_dropped(
    reinit: str, image: dict[str, Any], precopy_ns: int, read_kib: int, seed: int
) -> None:
    """Asked in between, not only when drained: so there are unread bytes when REINIT is reported."""

    @virtual
    async def moved() -> None:
        changes = {
            "driver.reinit": reinit,
            "device.0.critical.objects": 300,
            "device.0.critical.setup_us": 5.0,
            "device.0.writes": {"pattern": "hotspot", "mib_per_s": 2000.0},
            "device.0.reconfigurations": {"poisson_per_s": 1000.0, "objects_each": 20, "during_stop_ms": [0.3]},
        }
        hosts = Hosts({**image, **changes}, seed=seed)
        fd = await opted_in(hosts.source)
        (to,) = await session(hosts.target, State.RESUMING)
        reported = 0
        sent: list[RecordSlice] = []
        while now_ns() < precopy_ns:
            reported += (await fd.precopy_info()).reinit
            if (data := await read_some(fd, read_kib * KIB)) is not None:
                sent += parts_of(data)
                await to.write(data, 32 * KIB)
        await hosts.stop()
        while len(data := await fd.read(MIB)):
            sent += parts_of(data)
            await to.write(data, 32 * KIB)
        if reinit == "priority":
            check_order(records(sent))
        await hosts.target.set_state(State.RUNNING)
        assert not hosts.image.differences(hosts.state)
        event(f"REINIT reported {'once or more' if reported else 'never'}")

    moved()


def parts_of(data: Payload) -> list[RecordSlice]:
    assert isinstance(data, Extent)
    return data.parts


def check_order(sent: list[Record]) -> None:
    """Nothing comes twice, nothing older behind something newer, and no dirty data before its epoch's critical data."""
    newest: dict[tuple[str, int], int] = {}
    epoch = 0
    for record in sent:
        for kind, numbers, versions in (
            ("block", record.blocks, record.block_versions),
            ("object", record.objects, record.object_versions),
        ):
            for number, version in zip(numbers.tolist(), versions.tolist(), strict=True):
                assert newest.get((kind, number), -1) < version
                newest[kind, number] = version
        epoch = record.epoch if record.epoch_complete else epoch
        assert not len(record.blocks) or record.epoch <= epoch


# --- REINIT, with priority -------------------------------------------------------------------------------------------

PRIORITY = {"driver.reinit": "priority"}


@pytest.mark.rule("v2.best.d1")
@pytest.mark.parametrize("asks", [True, False])
@virtual
async def test_with_priority_new_critical_data_goes_before_unread_dirty_data_and_none_is_dropped(asks: bool) -> None:
    """Whether or not anybody asks: it is saved as soon as it is there."""
    hosts, fd = await with_unread_dirty_bytes(PRIORITY)
    if asks:
        assert told(await fd.precopy_info()) == (NEW_OBJECTS_BYTES, 0, True)
    new, old = records(await read_all(fd))
    assert [(len(each.objects), len(each.blocks)) for each in (new, old)] == [(2, 0), (0, 15)]
    assert hosts.source.counters[0].device_bytes_dropped == 0
    if not asks:
        assert told(await fd.precopy_info()) == (0, 0, True), "what is read is initial no more; the epoch is told"
    assert told(await fd.precopy_info()) == (0, 2 * BLOCK_BYTES + HEADER_BYTES, False)


@pytest.mark.rule("v2.best.d1", "v2.best.d2")
@virtual
async def test_with_priority_the_rest_of_a_record_that_was_begun_comes_first_and_counts() -> None:
    hosts = Hosts({**WHOLE, **BUSY, **NEW_AT_100_MS, **PRIORITY})
    fd = await opted_in(hosts.source)
    await read_all(fd)
    await sleep_until_ns(99 * MS)
    await fd.precopy_info()
    await sleep_until_ns(99 * MS + MS // 2)
    begun = await read(fd, 100_000)
    await sleep_until_ns(110 * MS)
    info = await fd.precopy_info()
    rest_bytes = begun.parts[0].record.size_bytes - 100_000
    assert told(info) == (rest_bytes + NEW_OBJECTS_BYTES, 0, True)
    data = await read(fd, rest_bytes + 1)
    assert [(part.start, len(part.record.objects)) for part in data.parts] == [(100_000, 0), (0, 2)]
    assert told(await fd.precopy_info())[0] == NEW_OBJECTS_BYTES - 1


@pytest.mark.rule("v2.best.d1")
@virtual
async def test_with_priority_only_what_was_read_keeps_a_record_from_being_overtaken() -> None:
    """Of two chunks one is begun; the other, and one that is being saved, come behind the critical data, which has a
    chunk of its own."""
    hosts = Hosts({**NEW_AT_100_MS, **PRIORITY})
    fd = await opted_in(hosts.source)
    await sleep_until_ns(50 * MS)
    await read(fd, FIRST_BYTES + OBJECTS_BYTES + HEADER_BYTES + 1)
    await sleep_until_ns(110 * MS)
    assert told(await fd.precopy_info()) == (CHUNK_BYTES + HEADER_BYTES - 1 + NEW_OBJECTS_BYTES, 0, True)
    assert [len(record.objects) for record in records((await read(fd)).parts)][:2] == [0, 2]


@pytest.mark.rule("v2.best.d1")
@virtual
async def test_with_priority_no_record_is_begun_that_critical_data_may_still_overtake() -> None:
    """At a record's end a read() waits for the SAVE of critical data that goes on."""
    changes = {"firmware.save_command_us": 5000.0, "device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}}
    fd = await opted_in(Hosts({**changes, **PRIORITY}).source)
    await sleep_until_ns(50 * MS)
    first = await read(fd, FIRST_BYTES + OBJECTS_BYTES + HEADER_BYTES + CHUNK_BYTES)
    assert len(first.parts) == 3
    await sleep_until_ns(101 * MS)
    (rest,) = (await read(fd)).parts
    assert (len(rest.record.objects), rest.stop) == (0, CHUNK_BYTES + HEADER_BYTES), "of the one that is begun"
    assert await fd.poll(0) is Ready.NOTHING
    assert 3 * MS < await took_ns(fd.poll()) < 5 * MS
    assert [len(record.objects) for record in records((await read(fd)).parts)][:1] == [2]


@pytest.mark.rule("v2.best.d1")
@virtual
async def test_with_priority_late_critical_data_comes_first_after_the_stop_too() -> None:
    """Unread dirty data of before the stop comes behind it, and what was dirtied since then."""
    hosts, fd = await with_unread_dirty_bytes({**PRIORITY, "device.0.reconfigurations": {"during_stop_ms": [0.5]}})
    hosts.state.order_stop(now_ns())
    await sleep_ns(MS)
    await hosts.stop()
    order = [(len(record.objects), len(record.blocks)) for record in records(await read_all(fd))]
    assert order[0][0] > 0
    assert order[1] == (0, 15)
    assert all(objects == 0 for objects, _ in order[1:])


@pytest.mark.rule("v2.best.d1")
@virtual
async def test_priority_is_for_who_opted_in() -> None:
    changes = {**WHOLE, **BUSY, **NEW_AT_100_MS, **PRIORITY}
    hosts = Hosts(changes)
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_until_ns(99 * MS)
    await fd.precopy_info()
    await sleep_until_ns(110 * MS)
    assert [len(record.objects) for record in records(await read_all(fd))] == [0]
    assert not (await fd.precopy_info()).reinit
    assert len(objects(await read_all(fd))) == 2


# --- MIG_DATA_SIZE ---------------------------------------------------------------------------------------------------

WITHOUT_A_SAVING_SESSION = [State.RUNNING, State.RUNNING_P2P, State.STOP, State.RESUMING]


@pytest.mark.parametrize("state", WITHOUT_A_SAVING_SESSION, ids=[state.name for state in WITHOUT_A_SAVING_SESSION])
@virtual
async def test_without_a_session_the_estimate_for_stop_copy_is_the_whole_state(state: State) -> None:
    driver = Hosts({"device.0.stop_only_mib": 2.0}).both
    await driver.set_state(state)
    assert await driver.stop_copy_bytes() == STATE_BYTES + 9 * HEADER_BYTES


@pytest.mark.rule("v2.driver.17")
@pytest.mark.parametrize("streams", [0, 3])
@virtual
async def test_a_driver_that_reports_a_whole_image_does_so_whatever_was_read(streams: int) -> None:
    hosts = Hosts({"driver.stop_copy_size": "full"})
    fds = await session(hosts.source, State.PRE_COPY, streams)
    whole_bytes = await hosts.source.stop_copy_bytes()
    assert whole_bytes >= STATE_BYTES
    for fd in fds:
        await read_all(fd)
    assert await hosts.source.stop_copy_bytes() == whole_bytes
    await hosts.stop()
    assert await hosts.source.stop_copy_bytes() == whole_bytes


@pytest.mark.rule("v2.driver.17")
@virtual
async def test_a_driver_that_reports_what_is_left_has_nothing_left_once_all_is_read() -> None:
    hosts = Hosts({"driver.stop_copy_size": "left"})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    assert await hosts.source.stop_copy_bytes() == 0


@virtual
async def test_an_estimate_can_be_had_in_error_too() -> None:
    target = Hosts().target
    await session(target, State.RESUMING)
    await fails_with(errno.EIO, target.set_state(State.STOP))
    assert await target.state() is State.ERROR
    assert await target.stop_copy_bytes() == STATE_BYTES + 9 * HEADER_BYTES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [0, 3])
@virtual
async def test_on_entering_stop_copy_the_estimate_is_what_is_then_read_but_for_the_ends(
    kind: str, streams: int
) -> None:
    hosts = Hosts({**KINDS[kind], "device.0.stop_only_mib": 2.0, "device.0.critical.objects": 600})
    precopy = kind in WITH_PRECOPY
    fds = await session(hosts.source, State.PRE_COPY if precopy else State.STOP_COPY, streams)
    if precopy:
        await read(fds[0], 20)
        await sleep_ns(1 * MS)
        await hosts.stop()
    estimate = await hosts.source.stop_copy_bytes()
    ends = (1 + streams) * V3_END_BYTES if streams else HEADER_BYTES
    assert estimate == sum([size(await read_all(fd)) for fd in fds]) - ends
    assert await hosts.source.stop_copy_bytes() == 0


@virtual
async def test_in_stop_copy_the_estimate_falls_by_what_is_read() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.STOP_COPY)
    estimates, got = [await hosts.source.stop_copy_bytes()], 0
    for _ in range(40):
        got += len(await fd.read(100_000))
        estimates.append(await hosts.source.stop_copy_bytes() + got)
    assert set(estimates) == {STATE_BYTES + 9 * HEADER_BYTES}


@pytest.mark.parametrize("kind", NOT_REREAD)
@settings(max_examples=10)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5 * MS), st.integers(0, 2 * MIB), st.booleans()), max_size=20),
    reinit=st.sampled_from(["flush", "invalidate", "none"]),
)
def test_in_pre_copy_the_estimate_has_the_unread_bytes_in_it_and_is_off_by_headers_at_most(
    kind: str, steps: list[tuple[int, int, bool]], reinit: str
) -> None:
    """How many records the last image will be cut into is not known yet."""

    @virtual
    async def estimated() -> None:
        events = {"device.0.stop_only_mib": 1.0, "device.0.reconfigurations": {"poisson_per_s": 100.0}}
        hosts = Hosts({**KINDS[kind], **BUSY, **events, "driver.reinit": reinit})
        fd = await opted_in(hosts.source)
        for delay, max_bytes, asks in steps:
            await sleep_ns(delay)
            if max_bytes:
                await read_some(fd, max_bytes)
            if asks:
                await fd.precopy_info()
        hosts.state.stop(now_ns())
        estimate = await hosts.source.stop_copy_bytes()
        await hosts.stop()
        rest = await read_all(fd)
        error = estimate - size(rest)
        assert error % HEADER_BYTES == 0
        assert abs(error) <= len(records(rest)) * HEADER_BYTES

    estimated()


@virtual
async def test_the_estimate_grows_with_what_the_guest_writes_and_asks_for_no_save() -> None:
    hosts = Hosts({**WHOLE, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    estimates = []
    for at in (100, 200, 300):
        await sleep_until_ns(at * MS)
        estimates.append(await hosts.source.stop_copy_bytes())
    chunks = {16: 1, 32: 2, 48: 3}
    assert estimates == [blocks * BLOCK_BYTES + count * HEADER_BYTES for blocks, count in chunks.items()]
    await fails_with(errno.ENOMSG, fd.read(ALL))


@virtual
async def test_the_estimate_is_whole_again_after_the_session() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    assert await hosts.source.stop_copy_bytes() == 0
    await hosts.source.set_state(State.RUNNING)
    assert await hosts.source.stop_copy_bytes() == STATE_BYTES + 9 * HEADER_BYTES


@virtual
async def test_asking_for_the_estimate_costs_no_time_and_keeps_nobody_out() -> None:
    hosts = Hosts()
    assert await took_ns(hosts.source.stop_copy_bytes()) == 0
    await hosts.source.set_state(State.STOP)


# --- stream_info (v3) ------------------------------------------------------------------------------------------------


@virtual
async def test_stream_info_is_for_stop_copy_too() -> None:
    hosts = Hosts()
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await hosts.stop()
    await sleep_ns(100 * MS)
    assert (await critical.stream_info()).epoch == 1
    assert (await dirty.stream_info()).pending_bytes >= BLOCKS * BLOCK_BYTES
    await read_all(dirty)
    assert (await dirty.stream_info()).pending_bytes == 0


@virtual
async def test_stream_info_makes_a_drained_dirty_stream_save_its_own_blocks() -> None:
    hosts = Hosts(BUSY)
    _, one, other = await session(hosts.source, State.PRE_COPY, 2)
    await read_all(one)
    await read_all(other)
    await sleep_ns(50 * MS)
    assert (await one.stream_info()).pending_bytes > 0
    assert len(blocks(await read_all(one))) > 0
    await fails_with(errno.ENOMSG, other.read(ALL))


@virtual
async def test_in_precopy_p2p_stream_info_starts_no_save() -> None:
    hosts = Hosts(BUSY)
    _, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(dirty)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    await sleep_ns(50 * MS)
    assert (await dirty.stream_info()).pending_bytes == 0
    await fails_with(errno.ENOMSG, dirty.read(ALL))


# --- drivers of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qat", "hisi_acc"])
@virtual
async def test_a_driver_that_only_checks_reports_no_reinit(kind: str) -> None:
    fd = await opted_in(Hosts({**KINDS[kind], "device.0.reconfigurations": {"at_s": [0.1]}}).source)
    for at in (1, 110, 200):
        await sleep_until_ns(at * MS)
        assert not (await fd.precopy_info()).reinit
    assert blocks(await read_all(fd)) == []


@virtual
async def test_with_streams_too_a_driver_that_only_checks_saves_no_objects_in_pre_copy() -> None:
    critical, _ = await session(Hosts(KINDS["hisi_acc"]).source, State.PRE_COPY, 1)
    await critical.stream_info()
    await sleep_ns(50 * MS)
    assert objects(await read_all(critical)) == []


@virtual
async def test_the_estimate_of_a_driver_without_increments_is_the_whole_context_again() -> None:
    hosts = Hosts(KINDS["virtio"])
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    estimate = await hosts.source.stop_copy_bytes()
    await hosts.stop()
    assert estimate == size(await read_all(fd)) - HEADER_BYTES


@virtual
async def test_a_driver_without_increments_reads_its_context_no_more_often_for_a_reconfiguration() -> None:
    events = {"driver.reread_ms": 1000.0, "device.0.reconfigurations": {"at_s": [0.1, 0.2, 0.3]}}
    fd = await opted_in(Hosts({**KINDS["virtio"], **events}).source)
    images = 0
    for at in (50, 150, 250, 350):
        await sleep_until_ns(at * MS)
        await fd.precopy_info()
        images += bool(blocks(await read_all(fd)))
    assert images == 1


@virtual
async def test_a_session_with_streams_has_stream_info_in_place_of_precopy_info_and_reports_no_reinit() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1]}})
    await hosts.source.set_precopy_info_v2()
    fds = await session(hosts.source, State.PRE_COPY, 1)
    await sleep_until_ns(150 * MS)
    for fd in fds:
        await fails_with(errno.ENOTTY, fd.precopy_info())
        info = await fd.stream_info()
        assert (info.epoch, info.flags) == (2, 0)


# --- MIG_DATA_SIZE is exact ------------------------------------------------------------------------------------------


@virtual
async def test_the_estimate_in_stop_copy_never_counts_the_end() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.STOP_COPY)
    got, sums, whole = 0, set(), STATE_BYTES + 9 * HEADER_BYTES
    while len(data := await fd.read(MIB)):
        got += len(data)
        await sleep_ns(5 * MS)
        sums.add(min(got, whole) + await hosts.source.stop_copy_bytes())
    assert sums == {whole}


@pytest.mark.parametrize("changes", [{}, WHOLE], ids=["chunks", "whole"])
@virtual
async def test_the_estimate_in_pre_copy_is_what_is_then_read(changes: dict[str, Any]) -> None:
    hosts = Hosts({**changes, "device.0.stop_only_mib": 2.0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    hosts.state.stop(now_ns())
    estimate = await hosts.source.stop_copy_bytes()
    await hosts.stop()
    assert estimate == size(await read_all(fd)) - HEADER_BYTES
