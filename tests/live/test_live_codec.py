# SPDX-License-Identifier: GPL-2.0-or-later
"""Heads of records as bytes and back; what cannot be one is a ValueError and nothing else, however it is malformed."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.device import record_format
from sim.device.record import HEADER_BYTES, TABLE, TALLY, V3_HEADER_BYTES, Record, Tally, ranges_bytes, table_bytes
from sim.device.record_format import (
    BlockRange,
    RecordBlocks,
    RecordClass,
    RecordEnd,
    RecordFlags,
    RecordHeader,
    RecordRanges,
)
from sim.live.fd import codec
from sim.live.fd.codec import COMPLETE, END, INITIAL, MAX_NUMBER, MAX_RANGES, V2_HEADER, Decoder, TooBigError
from sim.scenario.units import KIB
from tests.build.scenario import small_scenario

SPEC = small_scenario(
    {"device.0.state_mib": 16 / KIB, "device.0.block_kib": 1, "device.0.critical.object_kib": 0.3}
).devices[0]
BLOCKS, OBJECTS = SPEC.blocks, SPEC.critical.objects
OBJECT_BYTES = round(0.3 * KIB)
MAX_PLAIN_BYTES = 1 << 20
MOST_BYTES = V3_HEADER_BYTES + RecordRanges.SIZE + MAX_RANGES * BlockRange.SIZE + TABLE.size + 8 * 20 + MAX_PLAIN_BYTES
"""Of a head, whatever it claims."""

U64 = st.one_of(st.integers(0, 300), st.integers(0, (1 << 64) - 1))
NUMBERS = st.one_of(st.integers(0, 5), st.integers(0, MAX_NUMBER))
EPOCHS = st.one_of(st.integers(1, 3), st.integers(1, MAX_NUMBER))
TALLIES = st.builds(Tally, U64, U64, U64)


def _some(there: int, at_least: int = 0) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, there - 1), min_size=at_least, max_size=there, unique=True)


def made(
    blocks: list[int], objects: list[int], versions: list[int], sequence: int = 0, epoch: int = 1, **more: Any
) -> Record:
    """A record of these, as a driver makes it."""
    stream = more.pop("stream", 0)
    payload_bytes = more.pop("payload_bytes", 0)
    record = Record(
        stream, epoch, payload_bytes, sequence,
        blocks=np.array(blocks, np.intp), block_versions=np.array(versions[: len(blocks)], np.int32),
        objects=np.array(objects, np.intp), object_versions=np.array(versions[-len(objects) or 99 :], np.int32), **more,
    )  # fmt: skip
    record.payload_bytes += len(blocks) * SPEC.block_bytes + len(objects) * OBJECT_BYTES
    record.payload_bytes += ranges_bytes(record.invalidates)
    record.table_bytes = table_bytes(record)
    return record


@st.composite
def ranges(draw: st.DrawFn, epoch: int) -> tuple[BlockRange, ...]:
    told = []
    for _ in range(draw(st.integers(0, 3))):
        first = draw(st.integers(0, BLOCKS))
        told.append(BlockRange(first, draw(st.integers(0, BLOCKS - first)), draw(st.integers(1, epoch))))
    return tuple(told)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Of every kind that there is."""
    versions = draw(st.lists(NUMBERS, min_size=BLOCKS + OBJECTS, max_size=BLOCKS + OBJECTS))
    sequence, epoch = draw(U64), draw(EPOCHS)
    v3: dict[str, Any] = {"header_bytes": V3_HEADER_BYTES, "sequence": sequence, "epoch": epoch}
    stream = draw(st.integers(0, 65535))
    match draw(st.sampled_from(["data", "plain", "end", "critical", "dirty", "v3 plain", "v3 end", "blocks"])):
        case "data":
            blocks = draw(_some(BLOCKS))
            objects = draw(_some(OBJECTS, at_least=not blocks))
            flags = {"initial": draw(st.booleans()), "epoch_complete": draw(st.booleans())}
            return made(blocks, objects, versions, sequence, epoch, **flags)
        case "plain":
            size = draw(st.one_of(st.integers(0, 9), st.integers(0, MAX_PLAIN_BYTES)))
            return made([], [], [], sequence, epoch, payload_bytes=size, initial=draw(st.booleans()))
        case "end":
            return made([], [], [], sequence, epoch, end=True, tally=draw(TALLIES))
        case "critical":
            objects, complete = draw(_some(OBJECTS)), draw(st.booleans())
            complete |= not objects
            told = draw(ranges(epoch)) if complete else ()
            initial = draw(st.booleans())
            return made([], objects, versions, **v3, initial=initial, epoch_complete=complete, invalidates=told)
        case "dirty":
            return made(draw(_some(BLOCKS, 1)), [], versions, **v3, stream=stream, initial=draw(st.booleans()))
        case "v3 plain":
            return made([], [], [], **v3, stream=stream, payload_bytes=draw(st.integers(0, 5000)), initial=True)
        case "v3 end":
            size = RecordEnd.SIZE
            return made([], [], [], **v3, stream=stream, end=True, tally=draw(TALLIES), payload_bytes=size)
        case _:
            first = draw(st.integers(0, BLOCKS - 1))
            count = draw(st.integers(1, BLOCKS - first))
            size = RecordBlocks.SIZE + count * codec.VERSION_BYTES
            blocks = list(range(first, first + count))
            return made(blocks, [], versions, **v3, stream=stream, by_number=True, payload_bytes=size)


def decoded(data: bytes, *, v3: bool) -> tuple[Record, int]:
    """The record that these bytes begin with, and how many of them were its head. EOFError if they end before."""
    decoder = Decoder(SPEC, v3, MAX_PLAIN_BYTES)
    while decoder.record is None:
        assert len(decoder.head) < decoder.wanted <= MOST_BYTES  # it goes on, and asks for no more than it may
        if decoder.wanted > len(data):
            raise EOFError
        decoder.head += data[len(decoder.head) : decoder.wanted]
        decoder.take()
    return decoder.record, len(decoder.head)


def is_v3(record: Record) -> bool:
    return record.header_bytes == V3_HEADER_BYTES


COLUMNS = ("blocks", "block_versions", "objects", "object_versions")
PARTS = (
    "stream", "epoch", "payload_bytes", "sequence", "initial", "header_bytes", "table_bytes", "by_number",
    "epoch_complete", "invalidates", "end", "tally", "size_bytes", "record_class",
)  # fmt: skip


@given(records(), st.binary(max_size=20))
def test_what_is_read_is_what_was_written(record: Record, behind: bytes) -> None:
    head = codec.head(record)
    got, size = decoded(head + behind, v3=is_v3(record))
    assert size == len(head)
    assert {name: getattr(got, name) for name in PARTS} == {name: getattr(record, name) for name in PARTS}
    for name in COLUMNS:
        here, there = getattr(record, name), getattr(got, name)
        assert here.dtype == there.dtype
        assert here.tolist() == there.tolist()
    assert got.digest(7) == record.digest(7)
    data = len(record.blocks) * SPEC.block_bytes + len(record.objects) * OBJECT_BYTES
    assert size + data == record.size_bytes


@given(records(), st.data())
def test_a_head_that_was_cut_is_waited_for(record: Record, data: st.DataObject) -> None:
    head = codec.head(record)
    with pytest.raises(EOFError):
        decoded(head[: data.draw(st.integers(0, len(head) - 1))], v3=is_v3(record))


def refused_or_the_same(data: bytes, *, v3: bool) -> None:
    """ValueError, or a record that would be written so: nothing is let pass that means something else."""
    try:
        record, size = decoded(data, v3=v3)
    except (ValueError, EOFError):
        return
    again = codec.head(record)
    plain = not (len(record.blocks) or len(record.objects) or record.end or record.epoch_complete)
    if plain:  # what is in it does not matter
        kept = size - (record.payload_bytes if plain else 0)
        assert again[:kept] == data[:kept]
    else:
        assert again == data[:size]


@pytest.mark.slow
@settings(max_examples=400)
@given(records(), st.data())
def test_a_head_with_any_byte_changed_is_refused_or_says_something_else(record: Record, data: st.DataObject) -> None:
    head = bytearray(codec.head(record))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(head), 300) - 1))
        head[at] = data.draw(st.sampled_from([0, 1, 2, 4, 0x7F, 0x80, 0xFF, head[at] ^ 1]))
    refused_or_the_same(bytes(head) + bytes(4 * MAX_PLAIN_BYTES), v3=is_v3(record))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_or_a_record(data: bytes, v3: bool) -> None:
    refused_or_the_same(data, v3=v3)


# --- one by one -------------------------------------------------------------------------------------------------------

BIG = [1 << 31, (1 << 32) - 1]
HUGE = [1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]


def v2(
    size: int | None = None, flags: int = 0, tag: int = 0, *, epoch: int = 1, told: int = 0,
    objects: int = 0, blocks: int = 0, columns: list[int] | None = None, behind: bytes = b"",
) -> bytes:  # fmt: skip
    table = TABLE.pack(epoch, 0, told, objects, blocks)
    table += struct.pack(f"<{len(columns or [])}i", *(columns or [])) + behind
    data = blocks * SPEC.block_bytes + objects * OBJECT_BYTES
    return V2_HEADER.pack(len(table) + data if size is None else size, flags, tag) + table


def v3(
    record_class: int = RecordClass.CRITICAL, flags: int = 0, *, stream: int = 0, epoch: int = 1, sequence: int = 0,
    length: int | None = None, payload: bytes = b"", data: int = 0,
) -> bytes:  # fmt: skip
    length = len(payload) + data if length is None else length
    return RecordHeader(record_class, stream, flags, epoch, sequence, length).pack() + payload


def table(epoch: int = 1, sequence: int = 0, told: int = 0, objects: int = 0, blocks: int = 0, *columns: int) -> bytes:
    return TABLE.pack(epoch, sequence, told, objects, blocks) + struct.pack(f"<{len(columns)}i", *columns)


GOOD = {
    "v2 data": v2(blocks=2, columns=[3, 5, 0, 1]),
    "v2 objects": v2(objects=1, columns=[3, 9], told=INITIAL | COMPLETE),
    "v2 plain": v2(behind=bytes(8)),
    "v2 END": v2(tag=1, told=END, behind=TALLY.pack(1, 2, 3)),
    "dirty": v3(RecordClass.DIRTY, stream=1, payload=table(1, 0, 0, 0, 1, 3, 0), data=SPEC.block_bytes),
    "complete": v3(flags=RecordFlags.EPOCH_COMPLETE, payload=table(told=COMPLETE)),
    "END": v3(RecordClass.END, payload=RecordEnd(1, 2, 3).pack()),
    "blocks": v3(RecordClass.BLOCKS, payload=RecordBlocks(15, 1).pack() + bytes(8), data=SPEC.block_bytes),
    "ranges": v3(
        flags=RecordFlags.EPOCH_COMPLETE | RecordFlags.INVALIDATES, epoch=2,
        payload=RecordRanges(1).pack() + BlockRange(0, BLOCKS, 2).pack() + table(2, told=COMPLETE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_the_examples_are_good_where_they_are_not_made_bad(name: str) -> None:
    data = GOOD[name]
    record, size = decoded(data, v3=not name.startswith("v2"))
    assert size == len(data)
    assert codec.head(record) == data


BAD_V2 = {
    "a length of nothing": v2(0),
    "no room for a table": v2(TABLE.size - 1),
    "no room for the numbers": v2(TABLE.size + 7, blocks=1, columns=[0, 0]),
    "a byte too many": v2(TABLE.size + 8 + SPEC.block_bytes + 1, blocks=1, columns=[0, 0]),
    "a byte too few": v2(TABLE.size + 8 + SPEC.block_bytes - 1, blocks=1, columns=[0, 0]),
    **{f"a length of {size}": v2(size, blocks=1, columns=[0, 0]) for size in HUGE},
    **{f"{size} bytes that are no state": v2(size) for size in [TABLE.size + MAX_PLAIN_BYTES + 1, *HUGE]},
    **{f"{count} blocks": v2(1 << 40, blocks=count, columns=[0] * 64) for count in [BLOCKS + 1, *BIG]},
    **{f"{count} objects": v2(1 << 40, objects=count, columns=[0] * 64) for count in [OBJECTS + 1, *BIG]},
    **{f"block {number}": v2(blocks=1, columns=[number, 0]) for number in (-1, BLOCKS, 2**31 - 1, -(2**31))},
    **{f"object {number}": v2(objects=1, columns=[number, 0]) for number in (-1, OBJECTS)},
    **{f"version {version}": v2(blocks=1, columns=[0, version]) for version in (-1, -(2**31))},
    "a version of an object below 0": v2(objects=1, columns=[0, -1]),
    **{f"epoch {epoch}": v2(epoch=epoch) for epoch in [0, *HUGE]},
    "an unknown flag": v2(told=8),
    "all flags": v2(told=(1 << 32) - 1),
    "a flag in the header": v2(flags=1),
    "an unknown tag": v2(tag=2),
    "a tag of the END, and none in the table": v2(tag=1),
    "an END in the table, and no tag": v2(told=END, behind=TALLY.pack(1, 2, 3)),
    "an END without a tally": v2(tag=1, told=END),
    "an END with blocks": v2(tag=1, told=END, blocks=1, columns=[0, 0], behind=TALLY.pack(1, 2, 3)),
    "an END with objects": v2(tag=1, told=END, objects=1, columns=[0, 0], behind=TALLY.pack(1, 2, 3)),
    "an END that completes an epoch": v2(tag=1, told=END | COMPLETE, behind=TALLY.pack(1, 2, 3)),
    "an END with more behind it": v2(tag=1, told=END, behind=TALLY.pack(1, 2, 3) + b"\0"),
}
INVALIDATES = RecordFlags.INVALIDATES | RecordFlags.EPOCH_COMPLETE
BLOCK = {"data": SPEC.block_bytes}


def _ranges(*told: BlockRange, count: int | None = None, **more: Any) -> bytes:
    payload = RecordRanges(len(told) if count is None else count).pack() + b"".join(each.pack() for each in told)
    return v3(flags=INVALIDATES, epoch=2, payload=payload + table(2, told=COMPLETE), **more)


def _blocks(first: int, count: int, *versions: int, **more: Any) -> bytes:
    payload = RecordBlocks(first, count).pack() + struct.pack(f"<{len(versions)}Q", *versions)
    return v3(RecordClass.BLOCKS, payload=payload, **({"data": count * SPEC.block_bytes} | more))


BAD_V3 = {
    **{f"class {number}": v3(number, payload=table()) for number in (0, 5, 65535)},
    **{f"flags {flags:#x}": v3(flags=flags, payload=table()) for flags in (4, 1 << 31)},
    **{f"epoch {epoch}": v3(epoch=epoch, payload=table(min(epoch, 1))) for epoch in [0, *HUGE]},
    **{f"a length of {length}": v3(length=length, payload=table()) for length in [0, TABLE.size - 1, *HUGE]},
    "another epoch in the table": v3(epoch=2, payload=table(1)),
    "another sequence number in the table": v3(sequence=1, payload=table(1, 2)),
    "an END in the table": v3(payload=table(told=END) + TALLY.pack(1, 2, 3)),
    "complete in the table alone": v3(payload=table(told=COMPLETE)),
    "complete in the header alone": v3(flags=RecordFlags.EPOCH_COMPLETE, payload=table()),
    "a critical record with blocks": v3(payload=table(1, 0, 0, 0, 1, 3, 0), **BLOCK),
    "a dirty record with objects": v3(RecordClass.DIRTY, payload=table(1, 0, 0, 1, 0, 3, 0), data=OBJECT_BYTES),
    "a dirty record without blocks": v3(RecordClass.DIRTY, payload=table()),
    "a dirty record that completes an epoch": v3(
        RecordClass.DIRTY, RecordFlags.EPOCH_COMPLETE, payload=table(1, 0, COMPLETE, 0, 1, 3, 0), **BLOCK
    ),
    "an END with flags": v3(RecordClass.END, RecordFlags.EPOCH_COMPLETE, payload=RecordEnd(1, 2, 3).pack()),
    "an END that is too short": v3(RecordClass.END, payload=RecordEnd(1, 2, 3).pack()[:-1]),
    "an END that is too long": v3(RecordClass.END, payload=RecordEnd(1, 2, 3).pack() + b"\0"),
    **{f"an END of {length} bytes": v3(RecordClass.END, length=length) for length in [0, *HUGE]},
    "no blocks": _blocks(0, 0),
    "a block behind the last": _blocks(BLOCKS, 1, 0),
    "blocks beyond the last": _blocks(BLOCKS - 1, 2, 0, 0),
    "too many blocks": _blocks(0, BLOCKS + 1, *[0] * (BLOCKS + 1)),
    **{f"blocks from {first}": _blocks(first, 1, 0) for first in HUGE},
    **{f"{count} blocks": _blocks(0, count, 0, length=0) for count in HUGE},
    **{f"version {version}": _blocks(0, 1, version) for version in HUGE},
    "a block with a byte too few": _blocks(0, 1, 0, data=SPEC.block_bytes - 1),
    "a block with a byte too many": _blocks(0, 1, 0, data=SPEC.block_bytes + 1),
    **{f"blocks in {length} bytes": _blocks(0, 1, 0, length=length) for length in [0, *HUGE]},
    "blocks with flags": v3(RecordClass.BLOCKS, 1, payload=RecordBlocks(0, 1).pack() + bytes(8), **BLOCK),
    "no range": _ranges(),
    **{f"{count} ranges": _ranges(count=count, length=1 << 62) for count in [MAX_RANGES + 1, *HUGE]},
    "more ranges than there is room for": _ranges(BlockRange(0, 1, 1), count=3),
    "a range beyond the last block": _ranges(BlockRange(1, BLOCKS, 1)),
    **{f"a range from {first}": _ranges(BlockRange(first, 1, 1)) for first in HUGE},
    **{f"a range of {count}": _ranges(BlockRange(0, count, 1)) for count in HUGE},
    **{f"a range before epoch {epoch}": _ranges(BlockRange(0, 1, epoch)) for epoch in [0, 3, *HUGE]},
    "ranges and no room for a table": v3(
        flags=INVALIDATES, payload=RecordRanges(1).pack() + BlockRange(0, 1, 1).pack()
    ),
    "dirty with ranges": v3(
        RecordClass.DIRTY, RecordFlags.INVALIDATES,
        payload=RecordRanges(1).pack() + BlockRange(0, 1, 1).pack() + table(1, 0, 0, 0, 1, 3, 0), **BLOCK,
    ),
}  # fmt: skip
BAD = {f"v2: {name}": (data, False) for name, data in BAD_V2.items()} | {
    f"v3: {name}": (data, True) for name, data in BAD_V3.items()
}


@pytest.mark.rule("v3.9.4")
@pytest.mark.parametrize(
    "name",
    [
        "v3: too many blocks",
        f"v3: {1 << 63} ranges",
        f"v3: {MAX_RANGES + 1} ranges",
        f"v3: blocks in {1 << 63} bytes",
        f"v3: {1 << 63} blocks",
    ],
)
def test_what_is_above_a_limit_is_told_apart_from_what_is_malformed(name: str) -> None:
    data, third = BAD[name]
    with pytest.raises(TooBigError):
        decoded(data, v3=third)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_head_is_refused_at_once_and_for_nothing(name: str) -> None:
    data, third = BAD[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\w"):
            decoded(data, v3=third)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, "it made room for what was only said"


def test_header_sizes_are_those_of_the_headers() -> None:
    assert (V2_HEADER.size, record_format.RecordHeader.SIZE) == (HEADER_BYTES, V3_HEADER_BYTES)
