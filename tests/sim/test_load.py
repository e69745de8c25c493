# SPDX-License-Identifier: GPL-2.0-or-later
"""A data fd to write to: the costs of a write, a stream's order and wholeness, leaving RESUMING, v3's holding back."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.vfio.uapi import State
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.device.record import HEADER_BYTES, Bulk, Extent, Record, RecordSlice, Tally
from sim.scenario.units import KIB, MIB
from tests.build.hosts import (
    ALL,
    BLOCKS,
    CALL_NS,
    CHUNK_BYTES,
    KINDS,
    MS,
    OBJECTS_BYTES,
    V3_END_BYTES,
    WHOLE,
    Hosts,
    copy_ns,
    fails_somehow,
    fails_with,
    load_ns,
    read_all,
    saved,
    session,
    size,
    still_waits,
    took_ns,
)
from tests.build.scenario import virtual

# --- write -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_kib", [32, 64, 1024, 4096])
@virtual
async def test_a_write_costs_its_calls_its_copy_and_the_load_that_it_completes(piece_kib: int) -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    chunk = Extent(parts)[: CHUNK_BYTES + HEADER_BYTES]
    calls = -(-len(chunk) // (piece_kib * KIB))
    assert await took_ns(fd.write(chunk, piece_kib * KIB)) == pytest.approx(
        calls * CALL_NS + copy_ns(len(chunk)) + load_ns(CHUNK_BYTES), abs=2
    )
    assert (hosts.image.version[:16] == 0).all()
    assert (hosts.image.version[16:] == -1).all()


@pytest.mark.rule("v2.driver.10")
@virtual
async def test_a_record_is_loaded_when_its_last_byte_is_written() -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    most = Extent(parts)[: CHUNK_BYTES + HEADER_BYTES - 1]
    assert await took_ns(fd.write(most, MIB)) == CALL_NS + 1 * CALL_NS + copy_ns(len(most))
    assert (hosts.image.version == -1).all()
    last_byte = Extent(parts)[CHUNK_BYTES + HEADER_BYTES - 1 : CHUNK_BYTES + HEADER_BYTES]
    assert await took_ns(fd.write(last_byte, MIB)) == CALL_NS + load_ns(CHUNK_BYTES)
    assert (hosts.image.version[:16] == 0).all()


@virtual
async def test_a_write_that_completes_several_records_loads_one_after_the_other() -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    three = Extent(parts)[: 3 * (CHUNK_BYTES + HEADER_BYTES)]
    expected = CALL_NS + copy_ns(len(three)) + 3 * load_ns(CHUNK_BYTES)
    assert await took_ns(fd.write(three, ALL)) == pytest.approx(expected, abs=2)
    assert np.count_nonzero(hosts.image.version == 0) == 48


@virtual
async def test_the_record_that_announces_the_size_and_a_check_cost_the_firmware_nothing() -> None:
    for kind in ("mlx5", "hisi_acc"):
        hosts = Hosts({**KINDS[kind], "firmware.load_command_us": 1e6, "device.0.features": ["STOP_COPY", "PRE_COPY"]})
        (source,) = await session(hosts.source, State.PRE_COPY)
        (fd,) = await session(hosts.target, State.RESUMING)
        first = await source.read(ALL)
        assert await took_ns(fd.write(first, ALL)) == CALL_NS + copy_ns(len(first))


@virtual
async def test_critical_objects_are_set_up_one_by_one() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    record = Extent(parts)[: OBJECTS_BYTES + HEADER_BYTES]
    expected = CALL_NS + copy_ns(len(record)) + load_ns(OBJECTS_BYTES) + 4 * 100_000
    assert await took_ns(fd.write(record, MIB)) == pytest.approx(expected, abs=2)
    assert (hosts.image.object_version == 0).all()


@virtual
async def test_a_whole_image_is_loaded_as_one_and_its_critical_objects_are_told_apart() -> None:
    hosts = Hosts({**WHOLE, "device.0.critical.setup_us": 50.0})
    (source,) = await session(hosts.source, State.PRE_COPY)
    parts = await read_all(source)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), MIB)
    assert (hosts.image.version == 0).all()
    (load,) = hosts.target.critical_loads
    assert (load.epoch, load.complete, load.objects, load.bytes) == (1, True, 4, OBJECTS_BYTES)
    assert load.end_ns - load.start_ns == load_ns(BLOCKS * 64 * KIB + OBJECTS_BYTES) + 4 * 50_000


@pytest.mark.rule("v3.3.5")
@virtual
async def test_a_device_is_finished_once_when_its_last_stream_ended() -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    await fds[0].write(Extent(streams[0]), MIB)
    await fds[1].write(Extent(streams[1]), MIB)
    *most, end = streams[2]
    await fds[2].write(Extent(most), MIB)
    assert end.record.end
    expected = CALL_NS + copy_ns(V3_END_BYTES) + 5 * MS
    assert await took_ns(fds[2].write(Extent([end]), MIB)) == pytest.approx(expected, abs=2)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v2.driver.10")
@virtual
async def test_two_writers_of_one_fd_take_turns() -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    start = now_ns()
    await asyncio.gather(*(asyncio.create_task(fd.write(Extent([part]), ALL)) for part in parts[:2]))
    assert now_ns() - start == pytest.approx(
        2 * (CALL_NS + copy_ns(CHUNK_BYTES + HEADER_BYTES) + load_ns(CHUNK_BYTES)), abs=2
    )


@virtual
async def test_writing_nothing_changes_nothing() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent([]), 32 * KIB)
    await fd.write(Extent(parts), 32 * KIB)
    await fd.write(Extent([]), 32 * KIB)
    await hosts.target.set_state(State.RUNNING)


# --- a stream that is not as it was saved ----------------------------------------------------------------------------


def numbered(record: Record, sequence: int) -> RecordSlice:
    """All of a copy of it that has another place in the stream."""
    return RecordSlice(replace(record, sequence=sequence), 0, record.size_bytes)


REORDERED: dict[str, Callable[[list[RecordSlice]], list[RecordSlice]]] = {
    "a record is missing": lambda p: [p[0], *p[2:]],
    "the first record is missing": lambda p: p[1:],
    "the last record before the end is missing": lambda p: [*p[:-2], p[-1]],
    "all but the end is missing": lambda p: p[-1:],
    "two records changed places": lambda p: [p[0], p[2], p[1], *p[3:]],
    "the end came too early": lambda p: [*p[:-2], p[-1], p[-2]],
    "a record comes again": lambda p: [p[0], p[0], *p[1:]],
    "a record comes again later": lambda p: [*p[:3], p[0], *p[3:]],
    "all of it comes again": lambda p: [*p, *p],
    "the end comes again": lambda p: [*p, p[-1]],
    "a record comes behind the end": lambda p: [*p, p[1]],
    "a record is numbered on behind the end": lambda p: [*p, numbered(p[1].record, p[-1].record.sequence + 1)],
    "bytes come behind the end": lambda p: [*p, p[0]._replace(stop=1)],
    "bytes are missing inside a record": lambda p: [p[0], p[1]._replace(stop=100), p[1]._replace(start=101), *p[2:]],
    "bytes are missing at the end of a record": lambda p: [p[0], p[1]._replace(stop=100), *p[2:]],
    "bytes are missing at the start of a record": lambda p: [p[0], p[1]._replace(start=1), *p[2:]],
    "bytes come again": lambda p: [p[0], p[1]._replace(stop=100), p[1]._replace(start=99), *p[2:]],
}


async def written(hosts: Hosts, parts: list[RecordSlice]) -> None:
    """Write it to a target in RESUMING, as one write."""
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)


async def cannot_be_left_but_by_a_reset(hosts: Hosts, parts: list[RecordSlice]) -> None:
    """What the target does after a stream that it did not take, and that it then takes the right one."""
    await fails_with(errno.EIO, hosts.target.set_state(State.RUNNING))
    assert await hosts.target.state() is State.ERROR
    for state in State:
        await fails_with(errno.EINVAL, hosts.target.set_state(state))
    await hosts.target.reset()
    await written(hosts, parts)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v2.contract.10", "v2.driver.11")
@pytest.mark.parametrize("how", REORDERED)
@virtual
async def test_a_stream_that_is_not_in_order_is_refused(how: str) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fails_with(errno.EINVAL, fd.write(Extent(REORDERED[how](parts)), 32 * KIB))
    await fails_with(errno.ENODEV, fd.write(Extent(parts), 32 * KIB))
    await cannot_be_left_but_by_a_reset(hosts, parts)


@virtual
async def test_what_comes_behind_a_hole_is_not_loaded() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fails_with(errno.EINVAL, fd.write(Extent([*parts[:2], *parts[3:]]), 32 * KIB))
    assert (hosts.image.object_version == 0).all()
    assert (hosts.image.version[:16] == 0).all()
    assert (hosts.image.version[16:] == -1).all()


SHORT: dict[str, Callable[[list[RecordSlice]], list[RecordSlice]]] = {
    "nothing came": lambda p: [],
    "one byte came": lambda p: [p[0]._replace(stop=1)],
    "one record came": lambda p: p[:1],
    "a record is cut": lambda p: [*p[:3], p[3]._replace(stop=100)],
    "the end is missing": lambda p: p[:-1],
    "the end is cut": lambda p: [*p[:-1], p[-1]._replace(stop=p[-1].stop - 1)],
}


@pytest.mark.rule("v2.contract.10")
@pytest.mark.parametrize("how", SHORT)
@virtual
async def test_a_stream_that_is_short_is_taken_but_is_no_whole_image(how: str) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    await written(hosts, SHORT[how](parts))
    await cannot_be_left_but_by_a_reset(hosts, parts)


ALTERED: dict[str, Callable[[Record], Record]] = {
    "one block's version": lambda r: replace(r, block_versions=r.block_versions + (r.blocks == r.blocks[3])),
    "all blocks' versions": lambda r: replace(r, block_versions=r.block_versions + np.int32(1)),
    "the blocks' order": lambda r: replace(r, blocks=r.blocks[::-1].copy()),
    "which blocks": lambda r: replace(r, blocks=r.blocks + 1),
    "its epoch": lambda r: replace(r, epoch=r.epoch + 1),
    "whether the epoch is complete": lambda r: replace(r, epoch_complete=not r.epoch_complete),
    "an object in it": lambda r: replace(r, objects=np.array([0]), object_versions=np.array([0], np.int32)),
    "nothing in it any more": lambda r: replace(
        r, blocks=r.blocks[:0], block_versions=r.block_versions[:0], epoch_complete=False
    ),
}


@pytest.mark.rule("v2.contract.10")
@pytest.mark.parametrize("what", ALTERED)
@virtual
async def test_a_record_that_was_altered_is_noticed_at_the_end(what: str) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    changed = ALTERED[what](parts[4].record)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent([*parts[:4], RecordSlice(changed, 0, changed.size_bytes), *parts[5:-1]]), 32 * KIB)
    await fails_with(errno.EINVAL, fd.write(Extent(parts[-1:]), 32 * KIB))
    await cannot_be_left_but_by_a_reset(hosts, parts)


@pytest.mark.parametrize("column", ["objects", "object_versions"])
@virtual
async def test_altered_critical_objects_are_noticed_at_the_end(column: str) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    record = parts[0].record
    changed = replace(record, **{column: getattr(record, column)[::-1] + 1 - 1 * (column == "objects")})
    await fails_with(errno.EINVAL, written(hosts, [RecordSlice(changed, 0, changed.size_bytes), *parts[1:]]))
    await cannot_be_left_but_by_a_reset(hosts, parts)


@pytest.mark.parametrize("by", [-16, 16])
@virtual
async def test_a_record_of_another_length_is_noticed_at_the_end(by: int) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    changed = replace(parts[2].record, payload_bytes=parts[2].record.payload_bytes + by)
    await fails_with(
        errno.EINVAL, written(hosts, [*parts[:2], RecordSlice(changed, 0, changed.size_bytes), *parts[3:]])
    )
    await cannot_be_left_but_by_a_reset(hosts, parts)


@pytest.mark.parametrize("tally", [None, Tally(), "one record more", "one byte more", "another digest"])
@virtual
async def test_an_end_that_tells_of_another_stream_is_refused(tally: Any) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    right = parts[-1].record.tally
    assert right is not None
    match tally:
        case "one record more":
            tally = replace(right, records=right.records + 1)
        case "one byte more":
            tally = replace(right, bytes=right.bytes + 1)
        case "another digest":
            tally = replace(right, digest=right.digest ^ 1)
    end = replace(parts[-1].record, tally=tally)
    await fails_with(errno.EINVAL, written(hosts, [*parts[:-1], RecordSlice(end, 0, end.size_bytes)]))
    await cannot_be_left_but_by_a_reset(hosts, parts)


@virtual
async def test_the_end_of_another_session_is_refused_though_the_records_are_as_many_and_as_long() -> None:
    hosts = Hosts({"device.0.writes": {"pattern": "uniform", "mib_per_s": 100.0}})
    (early,) = await saved(hosts)
    await hosts.source.set_state(State.RUNNING)
    await sleep_ns(100 * MS)
    hosts.state.stop(now_ns())
    (late,) = await saved(hosts)
    assert [part.stop for part in early] == [part.stop for part in late]
    await fails_with(errno.EINVAL, written(hosts, [*late[:-1], early[-1]]))
    await cannot_be_left_but_by_a_reset(hosts, late)


@pytest.mark.rule("v2.contract.10")
@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 8 * MIB + 17_000), max_size=6).map(sorted), data=st.data())
@virtual
async def test_a_stream_is_taken_if_it_is_the_same_bytes_in_the_same_order_however_they_are_cut(
    cuts: list[int], data: st.DataObject
) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    whole = Extent(parts)
    bounds = [0, *cuts, len(whole)]
    pieces = [whole[start:stop] for start, stop in pairwise(bounds)]
    order = data.draw(
        st.one_of(
            st.just(list(range(len(pieces)))),
            st.permutations(range(len(pieces))),
            st.lists(st.integers(0, len(pieces) - 1), max_size=len(pieces) + 2),
        )
    )
    same = [at for at in order if len(pieces[at])] == [at for at in range(len(pieces)) if len(pieces[at])]
    (fd,) = await session(hosts.target, State.RESUMING)
    errors: list[int | None] = []
    for at in order:
        try:
            await fd.write(pieces[at], 32 * KIB)
        except OSError as error:
            errors.append(error.errno)
    assert set(errors[1:]) <= {errno.ENODEV}
    if same:
        assert errors == []
        await hosts.target.set_state(State.RUNNING)
        assert not hosts.image.differences(hosts.state)
    else:
        assert errors[:1] in ([], [errno.EINVAL])
        await fails_with(errno.EIO, hosts.target.set_state(State.RUNNING))
        assert await hosts.target.state() is State.ERROR


@pytest.mark.parametrize(("stream", "other"), [(0, 1), (1, 2), (2, 0), (2, 1)])
@virtual
async def test_another_streams_bytes_are_refused(stream: int, other: int) -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    await fails_with(errno.EXDEV, fds[stream].write(Extent(streams[other]), 32 * KIB))
    assert (hosts.image.version == -1).all()
    assert await hosts.target.state() is State.ERROR
    for fd, parts in zip(fds, streams, strict=True):
        await fails_with(errno.EIO, fd.write(Extent(parts), 32 * KIB))


@pytest.mark.parametrize("payload", [Bulk(100), memoryview(b"bytes")])
@virtual
async def test_bytes_that_no_driver_made_are_refused(payload: Any) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fails_with(errno.EINVAL, fd.write(payload, 32 * KIB))
    await cannot_be_left_but_by_a_reset(hosts, parts)


# --- leaving RESUMING ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize("target", [State.STOP, State.RUNNING])
@virtual
async def test_a_whole_image_can_be_run(streams: int, target: State) -> None:
    hosts = Hosts()
    saved_streams = await saved(hosts, streams)
    for fd, parts in zip(await session(hosts.target, State.RESUMING, streams), saved_streams, strict=True):
        await fd.write(Extent(parts), 32 * KIB)
    await hosts.target.set_state(target)
    assert await hosts.target.state() is target
    assert not hosts.image.differences(hosts.state)


@pytest.mark.parametrize("short", [0, 1, 2])
@virtual
async def test_an_image_of_which_one_stream_is_short_fails_and_leaves_the_device_in_error(short: int) -> None:
    hosts = Hosts()
    saved_streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    for index, (fd, parts) in enumerate(zip(fds, saved_streams, strict=True)):
        await fd.write(Extent(parts[:-1] if index == short else parts), 32 * KIB)
    await fails_with(errno.ENODATA, hosts.target.set_state(State.RUNNING))
    assert await hosts.target.state() is State.ERROR
    for fd in fds:
        await fails_with(errno.ENODEV, fd.write(Extent(saved_streams[0]), 32 * KIB))


@virtual
async def test_a_second_image_has_nothing_to_do_with_the_first() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    for _ in range(2):
        await written(hosts, parts)
        await hosts.target.set_state(State.STOP)
    await written(hosts, parts[:-1])
    await fails_with(errno.EIO, hosts.target.set_state(State.STOP))


# --- holding back (v3) -----------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.3.5", "v3.5.2")
@virtual
async def test_a_dirty_record_waits_until_its_epochs_critical_data_is_loaded() -> None:
    hosts = Hosts()
    critical, dirty = await saved(hosts, 1)
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = await still_waits(to_dirty.write(Extent(dirty), 32 * KIB))
    assert (hosts.image.version == -1).all()
    await to_critical.write(Extent(critical), 32 * KIB)
    assert (hosts.image.object_version == 0).all()
    await writing
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.5.2")
@virtual
async def test_a_dirty_record_of_a_later_epoch_waits_for_that_one() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1]}, "device.0.stop_only_mib": 2.0})
    fds = await session(hosts.source, State.PRE_COPY, 1)
    early = [await read_all(fd) for fd in fds]
    await sleep_until_ns(150 * MS)
    await hosts.stop()
    late = [await read_all(fd) for fd in fds]
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    await to_critical.write(Extent(early[0]), 32 * KIB)
    await to_dirty.write(Extent(early[1]), 32 * KIB)
    writing = await still_waits(to_dirty.write(Extent(late[1]), 32 * KIB))
    assert (hosts.image.version[96:] == -1).all()
    await to_critical.write(Extent(late[0]), 32 * KIB)
    await writing
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@pytest.mark.rule("v3.4.2")
@virtual
async def test_an_epochs_dirty_data_waits_for_all_of_its_critical_data() -> None:
    hosts = Hosts({"device.0.critical.objects": 600})
    critical, dirty = await saved(hosts, 1)
    first, second, third, end = critical
    assert [part.record.epoch_complete for part in critical] == [False, False, True, False]
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = asyncio.create_task(to_dirty.write(Extent(dirty), 32 * KIB))
    await to_critical.write(Extent([first, second]), 32 * KIB)
    await sleep_ns(500 * MS)
    assert (hosts.image.version == -1).all()
    await to_critical.write(Extent([third, end]), 32 * KIB)
    await writing


@virtual
async def test_a_write_that_waits_ends_when_the_session_does() -> None:
    hosts = Hosts()
    _, dirty = await saved(hosts, 1)
    _, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = await still_waits(to_dirty.write(Extent(dirty), 32 * KIB))
    await fails_somehow(hosts.target.set_state(State.STOP))
    await sleep_ns(1 * MS)
    assert writing.done()
    await fails_with(errno.ENODEV, writing)


@virtual
async def test_a_write_that_waits_ends_when_another_stream_is_refused() -> None:
    hosts = Hosts()
    critical, dirty = await saved(hosts, 1)
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = await still_waits(to_dirty.write(Extent(dirty), 32 * KIB))
    await fails_with(errno.EILSEQ, to_critical.write(Extent(critical[1:]), 32 * KIB))
    await fails_with(errno.EIO, writing)
    assert await hosts.target.state() is State.ERROR


@virtual
async def test_v2_holds_nothing_back() -> None:
    """Its one stream is in order already; a record of any epoch is loaded as it comes."""
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1]}, "device.0.critical.objects": 4})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    early = await read_all(fd)
    await sleep_until_ns(150 * MS)
    await hosts.stop()
    (to,) = await session(hosts.target, State.RESUMING)
    await to.write(Extent(early), 32 * KIB)
    await to.write(Extent(await read_all(fd)), 32 * KIB)
    assert size(early) > 0
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_a_write_of_the_end_fails_if_the_session_ended_meanwhile() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts[:-1]), MIB)
    writing = await still_waits(fd.write(Extent(parts[-1:]), MIB), 1 * MS)
    await hosts.target.reset()
    await fails_with(errno.ENODEV, writing)
