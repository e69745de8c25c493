# SPDX-License-Identifier: GPL-2.0-or-later
"""The state as bytes: what is old, torn or in the wrong place is seen; where the bytes of a run of a stream are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.device.guest import Int32
from sim.device.record import V3_HEADER_BYTES, Extent, Record, RecordSlice, Tally, ranges_bytes, table_bytes
from sim.device.record_format import BlockRange
from sim.live.fd import codec
from sim.live.fd.load import placer
from sim.live.fd.save import Layout
from sim.live.fd.store import DIGEST_BYTES, StateStore, differences
from sim.scenario.device import Device
from sim.scenario.units import KIB
from tests.build.live_hosts import differing
from tests.build.scenario import small_scenario

SIZES = [(1, 4.0), (4, 0.3), (64, 1.7), (64, 9 / KIB)]
"""KiB of a block, and of a critical object: of whole words or not."""


def device(block_kib: int = 4, object_kib: float = 4.0, **changes: Any) -> Device:
    return small_scenario(
        {
            "device.0.state_mib": 16 * block_kib / KIB,
            "device.0.block_kib": block_kib,
            "device.0.critical.object_kib": object_kib,
            **changes,
        }
    ).devices[0]


def versions(of: Device, told: dict[int, int], count: int = -1) -> Int32:
    made = np.zeros(of.blocks if count < 0 else count, np.int32)
    for number, version in told.items():
        made[number] = version
    return made


def store_of(of: Device, blocks: Int32, objects: Int32) -> StateStore:
    """A device whose blocks and objects have these versions."""
    store = StateStore(of, filled=True)
    written, made_new = np.flatnonzero(blocks).astype(np.int32), np.flatnonzero(objects).astype(np.int32)
    store.write_blocks(written, blocks)
    store.write_objects(made_new, objects)
    return store


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_kib", "object_kib"), SIZES)
def test_no_two_blocks_or_objects_of_any_version_are_alike(block_kib: int, object_kib: float) -> None:
    of = device(block_kib, object_kib)
    seen: set[bytes] = set()
    count = of.blocks + of.critical.objects
    for version in range(8):
        blocks = np.full(of.blocks, version, np.int32)
        objects = np.full(of.critical.objects, version, np.int32)
        told = store_of(of, blocks, objects).digests()
        assert len(told) == count * DIGEST_BYTES
        seen |= {told[at : at + DIGEST_BYTES] for at in range(0, len(told), DIGEST_BYTES)}
    objects_alike = 8 * min(of.blocks, of.critical.objects) if of.block_bytes == round(object_kib * KIB) else 0
    assert len(seen) == 8 * count - objects_alike


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3)), max_size=30))
def test_the_bytes_are_those_of_the_versions_however_they_came_about(writes: list[tuple[int, int]]) -> None:
    of = device(1, 0.3)
    step_by_step = StateStore(of, filled=True)
    blocks, objects = versions(of, {}), versions(of, {}, of.critical.objects)
    for block, made_new in writes:
        blocks[block] += 1
        objects[made_new] += 2
        step_by_step.write_blocks(np.array([block, block], np.int32), blocks)  # twice in a tick: the newest counts
        step_by_step.write_objects(np.array([made_new], np.int32), objects)
    assert step_by_step.digests() == store_of(of, blocks, objects).digests()


def test_a_store_that_was_not_filled_differs_everywhere() -> None:
    of = device()
    assert len(differing(StateStore(of, filled=True).digests(), StateStore(of, filled=False).digests())) == 16 + 4


def copied(of: Device) -> tuple[StateStore, StateStore]:
    """A device, and a true copy of it."""
    source = store_of(of, versions(of, {3: 7, 5: 1}), versions(of, {1: 2}, of.critical.objects))
    target = StateStore(of, filled=False)
    target.view[:] = source.view
    assert differences(source.digests(), target.digests(), of.blocks) == ""
    return source, target


@pytest.mark.parametrize(("block_kib", "object_kib"), SIZES)
def test_a_copy_that_is_wrong_in_any_way_is_noticed(block_kib: int, object_kib: float) -> None:
    of = device(block_kib, object_kib)
    size, object_bytes = of.block_bytes, round(object_kib * KIB)

    def stale(target: StateStore) -> None:
        target.write_blocks(np.array([3], np.int32), versions(of, {3: 6}))

    def torn(target: StateStore) -> None:
        whole = bytes(target.view[3 * size : 4 * size])
        stale(target)
        target.view[3 * size : 3 * size + size // 2] = whole[: size // 2]

    def torn_in_the_last_word(target: StateStore) -> None:
        whole = bytes(target.view[3 * size : 4 * size])
        stale(target)
        target.view[3 * size : 4 * size - 8] = whole[:-8]

    def shifted_by_a_word(target: StateStore) -> None:
        target.view[3 * size + 8 : 4 * size] = bytes(target.view[3 * size : 4 * size - 8])

    def one_bit(target: StateStore) -> None:
        target.view[4 * size - 1] ^= 1

    def neighbour(target: StateStore) -> None:
        target.view[3 * size : 4 * size] = target.view[4 * size : 5 * size]

    for damage in (stale, torn, torn_in_the_last_word, shifted_by_a_word, one_bit, neighbour):
        source, target = copied(of)
        damage(target)
        assert differing(source.digests(), target.digests()) == [3], damage.__name__
        told = differences(source.digests(), target.digests(), of.blocks)
        assert told == "1 blocks and 0 critical objects differ in their bytes"

    def stale_object(target: StateStore) -> None:
        target.write_objects(np.array([1], np.int32), versions(of, {1: 1}, 4))

    def shifted_object(target: StateStore) -> None:
        view = target.object_at(1)
        view[8:] = bytes(view[:-8])

    for damage in (stale_object, *([shifted_object] if object_bytes >= 16 else [])):
        source, target = copied(of)
        damage(target)
        assert differing(source.digests(), target.digests()) == [of.blocks + 1], damage.__name__

    source, target = copied(of)
    target.view[2 * size : 4 * size] = bytes(target.view[3 * size : 4 * size]) + bytes(target.view[2 * size : 3 * size])
    assert differing(source.digests(), target.digests()) == [2, 3]


def test_digests_of_another_number_are_told_as_such() -> None:
    told = differences(StateStore(device(), filled=True).digests(), b"\0" * 8, 16)
    assert told == "20 digests at the source, 1 at the target"


# --- where the bytes are ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 15), unique=True, min_size=1).map(sorted), st.lists(st.integers(0, 3), unique=True))
def test_pieces_are_the_bytes_in_order_and_neighbours_are_one(blocks: list[int], objects: list[int]) -> None:
    of = device(1, 0.3)
    store = StateStore(of, filled=True)
    pieces = list(store.block_pieces(np.array(blocks, np.intp)))
    assert b"".join(pieces) == b"".join(store.view[at * KIB : (at + 1) * KIB] for at in blocks)
    assert len(pieces) == 1 + sum(b - a != 1 for a, b in pairwise(blocks))
    of_objects = list(store.object_pieces(np.array(objects, np.intp)))
    assert b"".join(of_objects) == b"".join(store.object_at(at) for at in objects)


def test_pieces_are_views_and_not_copies() -> None:
    store = StateStore(device(), filled=True)
    (piece,) = store.block_pieces(np.array([3]))
    store.view[3 * 4 * KIB] ^= 0xFF
    assert piece[0] == store.view[3 * 4 * KIB]


def test_only_wanted_blocks_are_put_in_their_place() -> None:
    of = device(1)
    store = StateStore(of, filled=False)
    data = memoryview(b"".join(bytes([at]) * KIB for at in (1, 2, 3)))
    placer(store)(np.array([7, 0, 15]), data, np.array([True, False, True]))
    there = [at for at in range(of.blocks) if any(store.view[at * KIB : (at + 1) * KIB])]
    assert there == [7, 15]
    assert store.view[7 * KIB : 8 * KIB] == b"\1" * KIB
    assert store.view[15 * KIB : 16 * KIB] == b"\3" * KIB


def _record(of: Device, blocks: list[int], objects: list[int], **more: Any) -> Record:
    record = Record(
        more.pop("stream", 0), 1, 0, sequence=3,
        blocks=np.array(blocks, np.intp), block_versions=np.zeros(len(blocks), np.int32),
        objects=np.array(objects, np.intp), object_versions=np.zeros(len(objects), np.int32), **more,
    )  # fmt: skip
    data = len(blocks) * of.block_bytes + len(objects) * round(of.critical.object_kib * KIB)
    record.payload_bytes = data + ranges_bytes(record.invalidates)
    record.table_bytes = table_bytes(record)
    return record


def _run_of_records(of: Device) -> list[Record]:
    """One of each kind, with data and without."""
    ranges = (BlockRange(0, 4, 1), BlockRange(8, 2, 1))
    plain = Record(0, 1, 8, sequence=0, initial=True)
    plain.table_bytes = table_bytes(plain)
    return [
        plain,
        _record(of, [2, 3, 7], [0, 1]),
        _record(of, [], [3]),
        _record(of, [], [], end=True, tally=Tally(3, 4, 5)),
        _record(of, [], [1, 2], header_bytes=V3_HEADER_BYTES, epoch_complete=True, invalidates=ranges),
        _record(of, [], [], header_bytes=V3_HEADER_BYTES, epoch_complete=True),
        _record(of, [0, 4, 8, 12], [], header_bytes=V3_HEADER_BYTES, stream=1),
    ]


@given(st.data())
def test_a_run_of_a_stream_has_the_same_bytes_however_it_is_cut(data: st.DataObject) -> None:
    of = device(1, 0.3)
    store = StateStore(of, filled=True)
    run = _run_of_records(of)
    whole = Extent([RecordSlice(record, 0, record.size_bytes) for record in run])
    expected = b"".join(
        b"".join([codec.head(each), *store.object_pieces(each.objects), *store.block_pieces(each.blocks)])
        for each in run
    )
    assert len(expected) == len(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    layout = Layout(store)
    got = [b"".join(layout.pieces(whole[start:stop])) for start, stop in pairwise([0, *cuts, len(whole)])]
    assert list(map(len, got)) == [stop - start for start, stop in pairwise([0, *cuts, len(whole)])]
    assert b"".join(got) == expected
