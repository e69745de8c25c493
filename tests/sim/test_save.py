# SPDX-License-Identifier: GPL-2.0-or-later
"""A data fd to read from: what its stream holds, in which order, when there is something to read, and kinds of drivers.

What is left to read, and REINIT, are in test_precopy_info.py.
"""

from __future__ import annotations

import asyncio
import errno
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.timeline import Mark
from proto_v3.vfio.device import DataFd, Ready
from proto_v3.vfio.uapi import MigrationFlags, State
from proto_v3.vmm.migration import OutcomeKind, read_some
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES, Extent, RecordSlice
from sim.run import simulate
from sim.scenario.protocol import Protocol
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
    US,
    WHOLE,
    Hosts,
    blocks,
    copy_ns,
    fails_with,
    move,
    objects,
    read,
    read_all,
    records,
    save_ns,
    saved,
    session,
    size,
    still_waits,
    told,
    took_ns,
)
from tests.build.scenario import small_scenario, virtual

BUSY = {"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}}
"""160 blocks a second."""

# --- what a stream holds ---------------------------------------------------------------------------------------------


@virtual
async def test_v2_is_one_stream_critical_objects_first_then_blocks_then_the_end() -> None:
    (parts,) = await saved(Hosts())
    assert blocks(parts) == list(range(BLOCKS))
    first, *middle, last = records(parts)
    assert first.objects.tolist() == [0, 1, 2, 3]
    assert all(len(record.blocks) == 16 for record in middle)
    assert last.end
    assert size(parts) == STATE_BYTES + 10 * HEADER_BYTES


@pytest.mark.rule("v2.driver.1")
@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P])
@virtual
async def test_before_the_first_image_the_size_of_the_stop_copy_is_announced(state: State) -> None:
    (fd,) = await session(Hosts().source, state)
    first = records((await read(fd)).parts)[0]
    assert first.size_bytes == FIRST_BYTES == 24
    assert not len(first.blocks)
    assert not len(first.objects)


@pytest.mark.parametrize("streams", [1, 2, 3, 16])
@virtual
async def test_v3_has_critical_objects_on_their_own_and_each_block_once_on_a_dirty_stream(streams: int) -> None:
    critical, *dirty = await saved(Hosts(), streams)
    assert [record.objects.tolist() for record in records(critical)] == [[0, 1, 2, 3], []]
    assert records(critical)[0].epoch_complete
    assert sorted(block for parts in dirty for block in blocks(parts)) == list(range(BLOCKS))
    assert all(records(parts)[-1].end for parts in [critical, *dirty])
    assert not any(record.end for parts in dirty for record in records(parts)[:-1])


@pytest.mark.rule("v3.3.2")
@pytest.mark.parametrize("streams", [2, 3, 16])
@virtual
async def test_a_blocks_home_is_its_number_modulo_the_streams(streams: int) -> None:
    _, *dirty = await saved(Hosts(), streams)
    stripes = {block: index for index, parts in enumerate(dirty) for block in blocks(parts)}
    assert stripes == {block: block % streams for block in range(BLOCKS)}


@pytest.mark.rule("v3.3.2")
@virtual
async def test_a_block_keeps_its_home_through_the_session() -> None:
    hosts = Hosts({"device.0.writes": {"pattern": "uniform", "mib_per_s": 100.0}})
    _, *dirty = await session(hosts.source, State.PRE_COPY, 3)
    first = [set(blocks(await read_all(fd))) for fd in dirty]
    await sleep_ns(50 * MS)
    await hosts.stop()
    last = [set(blocks(await read_all(fd))) for fd in dirty]
    assert all(again and again <= stripe for again, stripe in zip(last, first, strict=True))


@pytest.mark.parametrize("image", [{}, WHOLE], ids=["chunks", "whole images"])
@virtual
async def test_blocks_of_the_stopped_device_only_come_in_stop_copy(image: dict[str, Any]) -> None:
    hosts = Hosts({**image, "device.0.stop_only_mib": 2.0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert blocks(await read_all(fd)) == list(range(96))
    await hosts.stop()
    assert blocks(await read_all(fd)) == list(range(96, BLOCKS))


@virtual
async def test_the_last_image_has_what_changed_since_the_others_and_no_more() -> None:
    """128 blocks come with the first image; 48 are written to in the 300 ms after it, of which the last 16 late."""
    hosts = Hosts({**WHOLE, **BUSY, "device.0.reconfigurations": {"at_s": [0.2], "objects_each": 2}})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_until_ns(150 * MS)
    await read_all(fd)
    await sleep_until_ns(200 * MS)
    await fd.precopy_info()
    middle = await read_all(fd)
    await sleep_until_ns(300 * MS)
    await hosts.stop()
    last = await read_all(fd)
    assert len(objects(middle)) == 2
    assert objects(last) == []
    assert len(blocks(middle)) == 32
    assert len(blocks(last)) == 16
    assert not set(blocks(middle)) & set(blocks(last))


# --- images whole, or in chunks --------------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.1")
@virtual
async def test_a_whole_image_is_one_record_of_one_save() -> None:
    (fd,) = await session(Hosts(WHOLE).source, State.PRE_COPY)
    await read(fd)
    assert await took_ns(fd.poll()) == save_ns(STATE_BYTES) - CALL_NS - copy_ns(FIRST_BYTES)
    (record,) = records((await read(fd)).parts)
    assert record.objects.tolist() == [0, 1, 2, 3]
    assert record.blocks.tolist() == list(range(BLOCKS))
    assert record.payload_bytes == STATE_BYTES


@virtual
async def test_a_whole_image_whose_critical_objects_alone_are_initial_is_two_records() -> None:
    (fd,) = await session(Hosts({"driver.precopy_image": "whole"}).source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    first, critical, rest = records(await read_all(fd))
    assert [record.initial for record in (first, critical, rest)] == [True, True, False]
    assert critical.objects.tolist() == [0, 1, 2, 3]
    assert not len(critical.blocks)
    assert rest.blocks.tolist() == list(range(BLOCKS))


@virtual
async def test_a_middle_image_is_whole_too() -> None:
    hosts = Hosts({**WHOLE, **BUSY, "device.0.reconfigurations": {"at_s": [0.2], "objects_each": 2}})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_until_ns(500 * MS)
    await fd.precopy_info()
    (record,) = records(await read_all(fd))
    assert len(record.objects) == 2
    assert len(record.blocks) == 80
    assert not record.initial


@pytest.mark.rule("v2.driver.8")
@pytest.mark.parametrize("image", [{}, WHOLE], ids=["chunks", "whole images"])
@virtual
async def test_after_the_stop_the_image_comes_in_chunks_whatever_it_was_before(image: dict[str, Any]) -> None:
    (parts,) = await saved(Hosts(image))
    assert [len(record.blocks) for record in records(parts)] == [0, *[16] * 8, 0]


@virtual
async def test_an_unread_whole_image_takes_no_chunk_from_the_last_one() -> None:
    hosts = Hosts({**WHOLE, "device.0.stop_only_mib": 4.0, "device.0.critical.objects": 0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    await hosts.stop()
    await sleep_ns(100 * MS)
    assert len(await read(fd)) == FIRST_BYTES + 4 * MIB + HEADER_BYTES + 2 * (CHUNK_BYTES + HEADER_BYTES)


@virtual
async def test_a_save_in_flight_at_the_stop_ends_and_the_last_image_has_only_what_came_later() -> None:
    hosts = Hosts({**WHOLE, "device.0.stop_only_mib": 2.0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await hosts.stop()  # 3 ms; the first SAVE takes about 6
    parts = await read_all(fd)
    assert blocks(parts) == list(range(BLOCKS))
    assert [len(record.blocks) for record in records(parts)] == [0, 96, 16, 16, 0]


# --- chunks and the reader -------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.8")
@pytest.mark.rule("v2.best.d5")
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("state", [State.PRE_COPY, State.STOP_COPY])
@virtual
async def test_the_device_saves_so_many_chunks_ahead_of_the_reader_and_no_more(state: State, chunks: int) -> None:
    changes = {"driver.chunks": chunks, "device.0.state_mib": 32.0, "device.0.critical.objects": 0}
    (fd,) = await session(Hosts(changes).source, state)
    if state is State.PRE_COPY:
        assert len(await read(fd)) == FIRST_BYTES
    for _ in range(3):
        await sleep_ns(100 * MS)
        assert len(await read(fd)) == chunks * (CHUNK_BYTES + HEADER_BYTES)


@pytest.mark.rule("v2.driver.8")
@virtual
async def test_of_two_chunks_of_8_mib_the_next_save_waits_until_one_is_read_to_its_last_byte() -> None:
    changes = {"driver.chunk_mib": 8, "device.0.state_mib": 32.0, "device.0.critical.objects": 0}
    (fd,) = await session(Hosts(changes).source, State.STOP_COPY)
    await sleep_ns(100 * MS)
    assert len(await read(fd, 8 * MIB + HEADER_BYTES - 1)) == 8 * MIB + HEADER_BYTES - 1
    await sleep_ns(100 * MS)
    assert len(await read(fd, 1)) == 1
    freed = now_ns()
    assert len(await read(fd)) == 8 * MIB + HEADER_BYTES
    await fd.poll()
    assert now_ns() - freed == save_ns(8 * MIB)


@virtual
async def test_reading_slowly_is_as_slow_as_it_is_and_reading_fast_as_slow_as_the_saves() -> None:
    (fd,) = await session(Hosts({"device.0.critical.objects": 0}).source, State.STOP_COPY)
    one_by_one = await took_ns(read_all(fd))
    last_copy = CALL_NS + copy_ns(CHUNK_BYTES + 2 * HEADER_BYTES)  # with the END's
    assert one_by_one == pytest.approx(8 * save_ns(CHUNK_BYTES) + last_copy + CALL_NS, abs=10)
    (fd,) = await session(Hosts({"device.0.critical.objects": 0}).source, State.STOP_COPY)
    start = now_ns()
    while len(await fd.read(CHUNK_BYTES + HEADER_BYTES)):
        await sleep_ns(10 * MS)
    calls = 9 * CALL_NS + copy_ns(8 * (CHUNK_BYTES + HEADER_BYTES) + HEADER_BYTES) + CALL_NS
    assert now_ns() - start == pytest.approx(save_ns(CHUNK_BYTES) + 9 * 10 * MS + calls, abs=10)


async def whole_took_ns(hosts: Hosts, streams: int) -> int:
    """To read all devices to the end, by a task for each data fd."""
    fds = [fd for source in hosts.sources for fd in await session(source, State.STOP_COPY, streams)]
    start = now_ns()
    await asyncio.gather(*map(read_all, fds))
    return now_ns() - start


@pytest.mark.parametrize(
    ("lock", "over", "at_once"),
    [
        ("per_fd", "copy", 4),
        ("global", "copy", 4),
        ("per_fd", "command", 4),
        ("device", "command", 2),
        ("global", "command", 1),
    ],
)
def test_a_lock_over_the_command_lets_one_command_through_at_a_time(lock: str, over: str, at_once: int) -> None:
    """Of two devices with two streams each, whose commands take a hundred times as long as their copies."""
    changes: dict[str, Any] = {"driver.lock": lock, "driver.lock_over": over, "firmware.engines": 4}
    changes |= {"firmware.save_mib_per_s": 10.0, "firmware.save_command_us": 0.0, "device.0.count": 2}

    @virtual
    async def reads() -> None:
        took = await whole_took_ns(Hosts(changes | {"device.0.critical.objects": 0}), 2)
        assert took == pytest.approx(2 * 8 * 100 * MS / at_once, rel=0.02)

    reads()


@pytest.mark.parametrize("protocol", ["v2", "v3-n2", "v3-blocks"])
def test_a_migration_under_one_lock_over_commands_and_copies_completes(protocol: str) -> None:
    """SET_STATE and PRECOPY_INFO wait for commands under the state mutex, which is another one."""
    scenario = small_scenario({"driver.lock": "device", "driver.lock_over": "command", "device.0.stop_only_mib": 4.0})
    outcome = simulate(scenario, Protocol.parse(protocol, scenario), 1)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.contract.9")
@virtual
async def test_the_end_is_temporary_in_pre_copy() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    for state in (State.PRE_COPY, State.PRE_COPY_P2P, State.PRE_COPY):
        await hosts.source.set_state(state)
        for _ in range(3):
            await fails_with(errno.ENOMSG, fd.read(ALL))
            assert await fd.poll(0) is Ready.NOTHING


@pytest.mark.rule("v2.contract.9", "v3.3.4")
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_the_end_is_for_ever_in_stop_copy(streams: int) -> None:
    hosts = Hosts()
    fds = await session(hosts.source, State.PRE_COPY, streams)
    await hosts.stop()
    for fd in fds:
        await read_all(fd)
        for _ in range(3):
            assert len(await fd.read(ALL)) == 0
            await sleep_ns(10 * MS)
            assert await fd.poll(0) & Ready.READABLE


@virtual
async def test_the_end_is_for_ever_though_the_guest_would_have_reconfigured_the_device_later() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.05]}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await sleep_ns(10 * MS)
    await hosts.stop()
    await sleep_until_ns(60 * MS)
    reading = asyncio.create_task(read_all(critical))
    await sleep_ns(10 * MS)
    assert reading.done()
    assert records(reading.result())[-1].end


@virtual
async def test_the_end_is_not_told_before_the_data_of_a_stop_that_comes_within_the_call() -> None:
    hosts = Hosts({"driver.call_us": 1000.0, "device.0.stop_only_mib": 2.0, "device.0.quiesce_ms": 0.5})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    reading = asyncio.create_task(read_some(fd, ALL))
    await hosts.stop()
    assert await hosts.source.state() is State.STOP_COPY
    data = await reading
    assert data is None or len(data)
    parts = data.parts if isinstance(data, Extent) else []
    assert blocks([*parts, *await read_all(fd)]) == list(range(96, BLOCKS))


@pytest.mark.parametrize("max_bytes", [1, 16, 17, 100_000, ALL])
@virtual
async def test_a_read_gives_at_least_one_byte_and_at_most_what_was_asked_for(max_bytes: int) -> None:
    (fd,) = await session(Hosts({"device.0.state_mib": 0.0625}).source, State.STOP_COPY)
    for _ in range(20):
        assert 1 <= len(await fd.read(max_bytes)) <= max_bytes
        if max_bytes > 17:
            break


@settings(max_examples=30)
@given(st.integers(20 * KIB, 3 * MIB), st.sampled_from([0, 1, 3]))
@virtual
async def test_the_stream_is_the_same_however_it_is_cut(max_bytes: int, streams: int) -> None:
    whole, cut = await saved(Hosts(), streams), []
    for fd in await session(Hosts().source, State.STOP_COPY, streams):
        cut.append(await read_all(fd, max_bytes))
    for one, other in zip(whole, cut, strict=True):
        assert blocks(one) == blocks(other)
        at = [0, 0]  # record and offset
        for part in other:
            assert [part.record.sequence, part.start] == at
            at = [at[0], part.stop] if part.stop < part.record.size_bytes else [at[0] + 1, 0]


@pytest.mark.rule("v2.driver.7")
@virtual
async def test_the_first_read_in_stop_copy_waits_for_the_save_that_the_stop_only_queued() -> None:
    hosts = Hosts({"device.0.critical.objects": 0, "device.0.stop_only_mib": 1.0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    assert await took_ns(hosts.stop()) == 3 * MS
    assert await fd.poll(0) is Ready.NOTHING
    assert await took_ns(fd.read(64 * KIB)) == save_ns(CHUNK_BYTES) + CALL_NS + copy_ns(64 * KIB)
    assert await took_ns(fd.read(64 * KIB)) == CALL_NS + copy_ns(64 * KIB)


@pytest.mark.rule("v2.driver.5")
@virtual
async def test_read_waits_for_a_save_in_flight_in_pre_copy_too() -> None:
    """Rather than giving ENOMSG ("vfio/mlx5: consider inflight SAVE during PRE_COPY")."""
    (fd,) = await session(Hosts(WHOLE).source, State.PRE_COPY)
    assert await took_ns(fd.read(ALL)) == CALL_NS + copy_ns(FIRST_BYTES)
    await fd.read(1)
    assert now_ns() == save_ns(STATE_BYTES) + CALL_NS


@pytest.mark.rule("v3.3.4")
@virtual
async def test_read_waits_for_a_save_that_began_before_the_guest_was_stopped() -> None:
    """Also when a reconfiguration that the stop forestalled would have come meanwhile."""
    hosts = Hosts({"device.0.critical.object_kib": 256.0, "device.0.reconfigurations": {"at_s": [0.0005]}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await sleep_until_ns(100 * US)
    hosts.state.stop(now_ns())
    await sleep_until_ns(600 * US)
    assert len(await critical.read(ALL)) == MIB + V3_HEADER_BYTES


@virtual
async def test_what_reading_took_is_told_by_its_parts() -> None:
    hosts = Hosts()
    start = now_ns()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    parts: list[RecordSlice] = []
    for _ in range(9):
        parts += (await read(fd)).parts
    (counts,) = hosts.source.counters
    assert counts.reads == 9
    assert counts.device_bytes == size(parts)
    assert counts.read_firmware_ns + counts.read_copy_ns == now_ns() - start
    assert counts.read_copy_ns == pytest.approx(9 * CALL_NS + copy_ns(size(parts)), abs=9)
    assert counts.read_lock_ns == counts.device_bytes_dropped == 0


@virtual
async def test_all_the_time_that_reading_to_the_end_takes_is_on_the_timeline() -> None:
    hosts = Hosts()
    hosts.timeline.mark(Mark.STOP_ORDERED)
    (fd,) = await session(hosts.source, State.STOP_COPY)
    await read_all(fd)
    hosts.timeline.mark(Mark.RESUMED)
    assert hosts.timeline.critical_path_ns()["unexplained"] == 0


# --- poll ------------------------------------------------------------------------------------------------------------


@virtual
async def test_poll_returns_when_its_time_is_over() -> None:
    (fd,) = await session(Hosts().source, State.PRE_COPY)
    await read_all(fd)
    for timeout in (0, 1, 5 * MS):
        start = now_ns()
        assert await fd.poll(timeout) is Ready.NOTHING
        assert now_ns() - start == timeout


@virtual
async def test_poll_returns_when_data_is_saved() -> None:
    (fd,) = await session(Hosts({"device.0.critical.objects": 0}).source, State.STOP_COPY)
    assert await fd.poll(0) is Ready.NOTHING
    assert await took_ns(fd.poll()) == save_ns(CHUNK_BYTES)
    assert await fd.poll() is Ready.READABLE


@virtual
async def test_poll_returns_when_the_device_stops() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    polling = await still_waits(fd.poll())
    await hosts.stop()
    assert await polling is Ready.READABLE


@virtual
async def test_poll_takes_nothing() -> None:
    (fd,) = await session(Hosts().source, State.STOP_COPY)
    for _ in range(5):
        await fd.poll()
    assert blocks(await read_all(fd)) == list(range(BLOCKS))


# --- epochs (v3) -----------------------------------------------------------------------------------------------------


@virtual
async def test_a_new_epoch_is_told_on_the_critical_fd_alone_until_it_was_asked_for() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1, 0.2]}})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    for fd in (critical, dirty):
        await read_all(fd)
        assert (await fd.stream_info()).epoch == 1
    assert await critical.poll(1 * MS) is Ready.NOTHING
    waiting = asyncio.create_task(dirty.poll())
    assert Ready.NEW_EPOCH in await critical.poll()
    assert now_ns() == 100 * MS
    assert await critical.poll() is not Ready.NOTHING
    assert (await critical.stream_info()).epoch == 2
    await read_all(critical)
    assert await critical.poll(1 * MS) is Ready.NOTHING
    assert not waiting.done()
    waiting.cancel()


@pytest.mark.rule("v3.3.10")
@virtual
async def test_a_new_epochs_critical_data_is_saved_without_being_asked_for() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    await critical.stream_info()
    await sleep_until_ns(150 * MS)
    assert Ready.READABLE in await critical.poll(0)
    (record,) = records(await read_all(critical))
    assert (record.epoch, record.epoch_complete, len(record.objects)) == (2, True, 2)


@virtual
async def test_an_epoch_that_the_stop_brings_is_saved_without_being_asked_for() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"during_stop_ms": [5.0], "objects_each": 2}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    await sleep_until_ns(100 * MS)
    hosts.state.order_stop(now_ns())
    await sleep_until_ns(110 * MS)
    (record,) = records(await read_all(critical))
    assert (record.epoch, len(record.objects)) == (2, 2)


@virtual
async def test_a_new_epoch_is_pending_from_when_it_began_until_it_is_read() -> None:
    """Else a VMM would say that it sent an epoch which the firmware was still saving."""
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    seen: list[tuple[int, bool]] = []
    await sleep_until_ns(100 * MS - 5 * CALL_NS)
    while not seen or seen[-1][0] == 1 or now_ns() < 101 * MS:
        info = await critical.stream_info()
        seen.append((info.epoch, info.pending_bytes > 0))
    assert set(seen) == {(1, False), (2, True)}
    await read_all(critical)
    assert (await critical.stream_info()).pending_bytes == 0


# --- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.9")
@pytest.mark.parametrize(
    ("lock", "one_fd", "two_fds", "two_devices"),
    [("none", 1, 1, 1), ("per_fd", 2, 1, 1), ("device", 2, 2, 1), ("global", 2, 2, 2)],
)
@virtual
async def test_which_reads_take_turns(lock: str, one_fd: int, two_fds: int, two_devices: int) -> None:
    """Two reads at once take as long as so many one after the other."""
    piece = 256 * KIB
    hosts = Hosts({"driver.lock": lock, "device.0.count": 2, "device.0.critical.objects": 0})
    _, one, other = await session(hosts.sources[0], State.PRE_COPY, 2)
    _, elsewhere = await session(hosts.sources[1], State.PRE_COPY, 1)
    await sleep_ns(100 * MS)
    for second, turns in ((one, one_fd), (other, two_fds), (elsewhere, two_devices)):
        start = now_ns()
        await asyncio.gather(*(asyncio.create_task(fd.read(piece)) for fd in (one, second)))
        assert now_ns() - start == turns * (CALL_NS + copy_ns(piece))
    lock_ns = sum(counts.read_lock_ns for source in hosts.sources for counts in source.counters)
    assert lock_ns == (one_fd + two_fds + two_devices - 3) * (CALL_NS + copy_ns(piece))


@pytest.mark.parametrize("lock", ["none", "per_fd", "device", "global"])
@pytest.mark.parametrize("max_bytes", [100_000, ALL])
@virtual
async def test_of_several_readers_of_one_fd_each_byte_goes_to_one(lock: str, max_bytes: int) -> None:
    (fd,) = await session(Hosts({"driver.lock": lock}).source, State.PRE_COPY)
    readers = [asyncio.create_task(read_all(fd, max_bytes)) for _ in range(3)]
    parts = [part for reader in readers for part in await reader]
    assert size(parts) == FIRST_BYTES + STATE_BYTES + 9 * HEADER_BYTES
    assert len({(part.record.sequence, part.start) for part in parts}) == len(parts)


@virtual
async def test_a_reader_that_another_one_forestalled_waits_for_the_next_record() -> None:
    """Two wait for the lock while there is data for one: the other finds an empty queue, which is no end."""
    (fd,) = await session(Hosts({"driver.chunks": 1}).source, State.STOP_COPY)
    await sleep_ns(100 * MS)
    first, rest, late = await asyncio.gather(*(asyncio.create_task(read(fd, most)) for most in (1_000, ALL, ALL)))
    assert len(first) + len(rest) == OBJECTS_BYTES + HEADER_BYTES
    assert blocks(late.parts) == list(range(16))


@virtual
async def test_waiting_for_another_reader_is_told_as_waiting_for_the_lock() -> None:
    hosts = Hosts({"driver.lock": "device", "device.0.critical.objects": 0})
    _, one, other = await session(hosts.source, State.PRE_COPY, 2)
    await sleep_ns(100 * MS)

    async def read_four_times(fd: DataFd) -> None:
        for _ in range(4):
            await fd.read(64 * KIB)

    await asyncio.gather(*(asyncio.create_task(read_four_times(fd)) for fd in (one, other)))
    assert sum(counts.read_lock_ns for counts in hosts.source.counters) == 7 * (CALL_NS + copy_ns(64 * KIB))


# --- drivers that only check (hisi_acc, qat) -------------------------------------------------------------------------


@pytest.mark.rule("v2.driver.15")
@pytest.mark.parametrize("check_bytes", [1, 40, 4096])
@virtual
async def test_a_driver_that_checks_gives_its_few_bytes_and_the_state_only_when_stopped(check_bytes: int) -> None:
    hosts = Hosts({"driver.precopy": "check", "driver.check_bytes": check_bytes, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert told(await fd.precopy_info()) == (check_bytes + HEADER_BYTES, 0, False)
    check = await read_all(fd)
    assert size(check) == check_bytes + HEADER_BYTES
    assert blocks(check) == objects(check) == []
    await sleep_ns(100 * MS)
    assert told(await fd.precopy_info()) == (0, 0, False)
    await fails_with(errno.ENOMSG, fd.read(ALL))
    await hosts.stop()
    last = await read_all(fd)
    assert blocks(last) == list(range(BLOCKS))
    assert objects(last) == [0, 1, 2, 3]


@virtual
async def test_a_check_costs_the_firmware_nothing() -> None:
    hosts = Hosts({"driver.precopy": "check"})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert await took_ns(read_all(fd)) == CALL_NS + copy_ns(4096 + HEADER_BYTES) + CALL_NS  # the second gives ENOMSG


@virtual
async def test_what_a_driver_that_checks_will_give_is_in_the_estimate() -> None:
    hosts = Hosts({"driver.precopy": "check"})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    assert await hosts.source.stop_copy_bytes() == STATE_BYTES + 9 * HEADER_BYTES


# --- drivers that give 0 at the temporary end (mtty, qat) ------------------------------------------------------------


@pytest.mark.rule("v2.driver.15")
@virtual
async def test_a_sloppy_driver_gives_0_in_pre_copy_where_others_give_enomsg() -> None:
    hosts = Hosts({"driver.precopy_end": "0", **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    for state in (State.PRE_COPY, State.PRE_COPY_P2P, State.PRE_COPY):
        await hosts.source.set_state(state)
        assert len(await fd.read(ALL)) == 0
        assert await fd.poll(0) is Ready.NOTHING
    await sleep_ns(100 * MS)
    await fd.precopy_info()
    assert len(await fd.read(ALL)) > 0


@virtual
async def test_a_0_of_a_sloppy_driver_is_not_the_end_of_what_comes_when_the_device_is_stopped() -> None:
    hosts = Hosts({"driver.precopy_end": "0", "device.0.stop_only_mib": 2.0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await hosts.stop()
    parts = await read_all(fd)
    assert blocks(parts) == list(range(96, BLOCKS))
    assert records(parts)[-1].end
    await fd.read(ALL)
    assert await fd.poll(0) is Ready.READABLE


# --- drivers that read the whole context again (virtio) --------------------------------------------------------------

REREAD = {**WHOLE, "driver.precopy": "reread", "driver.reread_ms": 1000.0}


@pytest.mark.rule("v2.driver.15")
@virtual
async def test_a_driver_without_increments_gives_the_whole_context_again_though_nothing_changed() -> None:
    hosts = Hosts(REREAD)
    (fd,) = await session(hosts.source, State.PRE_COPY)
    images = [await read_all(fd)]
    for _ in range(2):
        await sleep_ns(1000 * MS)
        assert told(await fd.precopy_info()) == (0, STATE_BYTES + HEADER_BYTES, False)
        images.append(await read_all(fd))
    await hosts.stop()
    images.append(await read_all(fd))
    for image in images:
        assert blocks(image) == list(range(BLOCKS))
        assert objects(image) == [0, 1, 2, 3]


@pytest.mark.rule("v2.driver.15")
@pytest.mark.parametrize("reread_ms", [0.5, 50.0, 1000.0])
@virtual
async def test_the_context_is_read_again_at_most_once_in_so_long_and_never_before_it_is_read(reread_ms: float) -> None:
    hosts = Hosts({**REREAD, "driver.reread_ms": reread_ms})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    began = [0]
    while now_ns() < 1900 * MS and len(began) < 10:
        await read_all(fd)
        info = await fd.precopy_info()
        if info.dirty_bytes:
            began.append(now_ns())
        else:
            await fails_with(errno.ENOMSG, fd.read(ALL))
            await sleep_ns(1 * MS)
    gaps = [then - before for before, then in pairwise(began)]
    one_pass_ns = save_ns(STATE_BYTES) + copy_ns(STATE_BYTES)
    shortest = max(reread_ms * MS, one_pass_ns)
    assert gaps
    assert all(shortest <= gap < shortest + 1100 * US for gap in gaps)


@virtual
async def test_between_two_passes_nothing_is_told_as_dirty_whatever_was_written() -> None:
    """virtio knows of a context only when it has it."""
    (fd,) = await session(Hosts({**REREAD, **BUSY}).source, State.PRE_COPY)
    for at in (50, 500, 999):
        await read_all(fd)
        await sleep_until_ns(at * MS)
        assert told(await fd.precopy_info()) == (0, 0, False)
    await sleep_until_ns(1000 * MS)
    assert told(await fd.precopy_info()) == (0, STATE_BYTES + HEADER_BYTES, False)


@virtual
async def test_the_context_that_is_read_again_is_as_of_then() -> None:
    hosts = Hosts({**REREAD, **BUSY})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    (first,) = records(await read_all(fd))
    await sleep_until_ns(1000 * MS)
    await fd.precopy_info()
    (again,) = records(await read_all(fd))
    assert first.block_versions.sum() == 0
    assert again.block_versions.sum() == 160


# --- one session of every kind, to the end ---------------------------------------------------------------------------

RESTLESS = {
    "firmware.service_cv": 0.5,
    "device.0.stop_only_mib": 1.0,
    "device.0.critical.objects": 300,
    "device.0.critical.setup_us": 5.0,
    "device.0.writes": {"pattern": "hotspot", "mib_per_s": 200.0},
    "device.0.reconfigurations": {"poisson_per_s": 100.0, "objects_each": 20, "during_stop_ms": [0.0, 0.3, 5.0]},
}


@pytest.mark.rule("v2.driver.15")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reinit", ["flush", "invalidate", "priority", "none"])
@settings(max_examples=8)
@given(
    precopy_ns=st.integers(0, 60 * MS),
    read_kib=st.integers(16, 10_000),
    opts_in=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_image_of_any_kind_of_driver_is_the_device_as_it_was_stopped(
    kind: str, reinit: str, precopy_ns: int, read_kib: int, opts_in: bool, seed: int
) -> None:
    @virtual
    async def moved() -> None:
        hosts = Hosts({**RESTLESS, **KINDS[kind], "driver.reinit": reinit}, seed=seed)
        if opts_in and MigrationFlags.PRE_COPY in await hosts.source.migration_flags():
            await hosts.source.set_precopy_info_v2()
        await move(hosts, precopy_ns, read_kib * KIB)
        assert not hosts.image.differences(hosts.state)
        assert await hosts.source.stop_copy_bytes() == 0
        assert hosts.state.epoch > 1

    moved()


@settings(max_examples=50)
@given(
    streams=st.sampled_from([0, 1, 2, 5]),
    precopy_ns=st.integers(0, 60 * MS),
    read_kib=st.integers(16, 2048),
    chunks=st.integers(1, 4),
    lock=st.sampled_from(["none", "per_fd", "device", "global"]),
    seed=st.integers(0, 1000),
)
@virtual
async def test_whatever_the_order_of_events_the_image_is_the_device_as_it_was_stopped(
    streams: int, precopy_ns: int, read_kib: int, chunks: int, lock: str, seed: int
) -> None:
    hosts = Hosts({**RESTLESS, "driver.chunks": chunks, "driver.lock": lock}, seed=seed)
    await move(hosts, precopy_ns, read_kib * KIB, streams=streams)
    assert not hosts.image.differences(hosts.state)
    assert await hosts.source.stop_copy_bytes() == 0


@pytest.mark.parametrize("kind", KINDS)
@virtual
async def test_who_never_asks_gets_the_first_image_and_the_last_one(kind: str) -> None:
    hosts = Hosts({**RESTLESS, **KINDS[kind]})
    await move(hosts, 50 * MS, asks=False)
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_an_idle_device_is_moved_once() -> None:
    hosts = Hosts(WHOLE)
    assert await move(hosts, 50 * MS) == FIRST_BYTES + STATE_BYTES + 2 * HEADER_BYTES
    assert BLOCKS * BLOCK_BYTES + OBJECTS_BYTES == STATE_BYTES
