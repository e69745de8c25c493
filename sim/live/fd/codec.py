# SPDX-License-Identifier: GPL-2.0-or-later
"""Records as bytes: the head of a record, which is all before its data, is packed here and parsed.

A record begins with its header: in v2 that of mlx5, in v3 `struct vfio_mig_record`. Behind it comes a table that is
private to the driver: epoch, sequence and flags, and the numbers and versions of the blocks and critical objects whose
data follows. (In virtual time there is none: a record is the object itself.) v3's END and BLOCKS records have the
payload of docs/vfio_v3_stream.h, and no table.

The parser trusts nothing: an impossible length, number or flag raises ValueError, one above a limit TooBigError, before
the bytes that it announces are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator

import numpy as np

from sim.device import record_format
from sim.device.blocks import VERSION_BYTES
from sim.device.guest import Int32
from sim.device.record import HEADER_BYTES, TABLE, TALLY, V3_HEADER_BYTES, Record, Tally, ranges_bytes
from sim.device.record_format import BlockRange, RecordClass, RecordFlags
from sim.device.state import Indices
from sim.scenario.device import Device

V2_HEADER = struct.Struct("<QII")
"""struct mlx5_vf_migration_header: record_size, flags, tag (Linux drivers/vfio/pci/mlx5/cmd.h)."""
END, INITIAL, COMPLETE = 1, 2, 4
"""Flags of the table."""
MAX_RANGES = 4096
MAX_NUMBER = (1 << 31) - 1
"""Of versions and epochs: the drivers keep them in 32 bits."""


class TooBigError(ValueError):
    """A length or a number above a limit: E2BIG."""


def head(record: Record) -> bytes:
    """Pack all of a record that is before its data."""
    if record.header_bytes == V3_HEADER_BYTES:
        return _v3_header(record) + _v3_fixed(record)
    header = V2_HEADER.pack(record.size_bytes - HEADER_BYTES, 0, int(record.end))
    plain = b"" if len(record.objects) or len(record.blocks) else bytes(record.payload_bytes)
    return header + _table(record) + plain


def _v3_header(record: Record) -> bytes:
    flags = RecordFlags(0)
    if record.epoch_complete:
        flags |= RecordFlags.EPOCH_COMPLETE
    if record.invalidates:
        flags |= RecordFlags.INVALIDATES
    length = record.size_bytes - V3_HEADER_BYTES
    parts = (record.record_class, record.stream, flags, record.epoch, record.sequence, length)
    return record_format.RecordHeader(*map(int, parts)).pack()


def _v3_fixed(record: Record) -> bytes:
    if record.end:
        tally = record.tally or Tally()
        return record_format.RecordEnd(tally.records, tally.bytes, tally.digest).pack()
    if record.by_number:
        first = int(record.blocks[0])
        versions = record.block_versions.astype("<u8").tobytes()
        return record_format.RecordBlocks(first, len(record.blocks)).pack() + versions
    if not (len(record.objects) or len(record.blocks) or record.epoch_complete):
        return _table(record) + bytes(record.payload_bytes)
    ranges = b""
    if record.invalidates:
        ranges = record_format.RecordRanges(len(record.invalidates)).pack()
        ranges += b"".join(each.pack() for each in record.invalidates)
    return ranges + _table(record)


def _table(record: Record) -> bytes:
    flags = END * record.end | INITIAL * record.initial | COMPLETE * record.epoch_complete
    fixed = TABLE.pack(record.epoch, record.sequence, flags, len(record.objects), len(record.blocks))
    columns = (record.objects, record.object_versions, record.blocks, record.block_versions)
    table = fixed + b"".join(column.astype("<i4").tobytes() for column in columns)
    if record.end:
        tally = record.tally or Tally()
        table += TALLY.pack(tally.records, tally.bytes, tally.digest)
    return table


Steps = Generator[int, None, Record]
"""Parses a head: yields the bytes that it must have to go on, and returns its record."""


class Decoder:
    """Parses the head of one record, as its bytes come. Pure: whoever has the bytes appends them.

    Append to `head` until it has `wanted` bytes, and call take(); repeat until `record` is set. v2 has one stream: 0.
    """

    def __init__(self, spec: Device, v3: bool, plain_bytes: int) -> None:
        """`plain_bytes`: the most in a record that holds neither blocks nor objects: messages between v2's drivers."""
        self.head = bytearray()
        self.record: Record | None = None
        self._spec = spec
        self._plain = plain_bytes
        listed = 8 * (spec.critical.objects + spec.blocks)  # numbers and versions
        ranges = record_format.RecordRanges.SIZE + MAX_RANGES * BlockRange.SIZE
        self._longest = spec.whole_bytes + listed + TABLE.size + TALLY.size + ranges + plain_bytes
        """Bytes of a payload: all of the device in one record."""
        self._steps = self._v3() if v3 else self._v2()
        self.wanted = next(self._steps)

    def take(self) -> None:
        """`head` has the wanted bytes. ValueError if it cannot be a record's head."""
        assert len(self.head) == self.wanted
        try:
            self.wanted = next(self._steps)
        except StopIteration as end:
            self.record = end.value

    def _until(self, size: int) -> Iterator[int]:
        """Wait until the head has `size` bytes."""
        if len(self.head) < size:
            yield size

    # --- v2 -----------------------------------------------------------------------------------------------------------

    def _v2(self) -> Steps:
        yield HEADER_BYTES
        size, flags, tag = V2_HEADER.unpack_from(self.head)
        if flags or tag > 1:
            raise ValueError(f"flags {flags:#x} and tag {tag} in a header")
        record = yield from self._table(HEADER_BYTES, size)
        if record.end != bool(tag):
            raise ValueError("header and table do not agree")
        return record

    def _table(self, at: int, payload_bytes: int) -> Steps:
        """The table at `at`, of a record with `payload_bytes` behind `at`."""
        if payload_bytes < TABLE.size:
            raise ValueError(f"{payload_bytes} bytes have no room for a table")
        yield from self._until(at + TABLE.size)
        epoch, sequence, flags, objects, blocks = TABLE.unpack_from(self.head, at)
        if objects > self._spec.critical.objects or blocks > self._spec.blocks:
            raise TooBigError(f"{blocks} blocks and {objects} critical objects in one record")
        end = bool(flags & END)
        if flags & ~(END | INITIAL | COMPLETE) or (end and (flags & COMPLETE or objects or blocks)):
            raise ValueError(f"flags {flags:#x} in a table of {objects} critical objects and {blocks} blocks")
        _check_epoch(epoch)
        size = TABLE.size + 8 * (objects + blocks) + (TALLY.size if end else 0)
        if payload_bytes < size:
            raise ValueError(f"{payload_bytes} bytes have no room for a table of {size}")
        yield from self._until(at + size)
        # A copy: a bytearray cannot grow while an array is a view of it.
        numbers = np.frombuffer(self.head, "<i4", 2 * (objects + blocks), at + TABLE.size).copy()
        of_objects, of_blocks = numbers[: 2 * objects], numbers[2 * objects :]
        record = Record(
            0,
            epoch,
            payload_bytes - size,
            sequence,
            blocks=_numbers(of_blocks[:blocks], self._spec.blocks),
            block_versions=_versions(of_blocks[blocks:]),
            objects=_numbers(of_objects[:objects], self._spec.critical.objects),
            object_versions=_versions(of_objects[objects:]),
            initial=bool(flags & INITIAL),
            header_bytes=HEADER_BYTES,
            table_bytes=size,
            epoch_complete=bool(flags & COMPLETE),
            end=end,
        )
        if end:
            record.tally = Tally(*TALLY.unpack_from(self.head, at + size - TALLY.size))
        yield from self._plain_bytes(record, at + size)
        return record

    def _plain_bytes(self, record: Record, at: int) -> Iterator[int]:
        """Behind the table come the data of its blocks and objects, or a few bytes that are no state."""
        object_bytes = self._spec.critical.object_bytes
        extra = record.payload_bytes - len(record.blocks) * self._spec.block_bytes - len(record.objects) * object_bytes
        if len(record.blocks) or len(record.objects) or record.end or record.epoch_complete:
            if extra:
                raise ValueError(f"{extra} bytes too many")
        elif not 0 <= extra <= self._plain:
            raise ValueError(f"{extra} bytes that are no state")
        else:
            yield from self._until(at + extra)

    # --- v3 -----------------------------------------------------------------------------------------------------------

    def _v3(self) -> Steps:
        yield V3_HEADER_BYTES
        header = record_format.RecordHeader.unpack(self.head)
        if header.record_class not in RecordClass.__members__.values():
            raise ValueError(f"there is no record class {header.record_class}")
        critical = header.record_class == RecordClass.CRITICAL
        if header.flags & ~int(RecordFlags.EPOCH_COMPLETE | RecordFlags.INVALIDATES) or (header.flags and not critical):
            raise ValueError(f"flags {header.flags:#x} in a record of class {header.record_class}")
        _check_epoch(header.epoch)
        if header.length > self._longest:
            raise TooBigError(f"a record of {header.length} bytes")
        match RecordClass(header.record_class):
            case RecordClass.END:
                return (yield from self._end(header))
            case RecordClass.BLOCKS:
                return (yield from self._blocks(header))
            case _:
                return (yield from self._data(header))

    def _record(self, header: record_format.RecordHeader) -> Record:
        return Record(header.stream, header.epoch, header.length, header.sequence, header_bytes=V3_HEADER_BYTES)

    def _end(self, header: record_format.RecordHeader) -> Steps:
        if header.length != record_format.RecordEnd.SIZE:
            raise ValueError(f"an END of {header.length} bytes")
        yield from self._until(V3_HEADER_BYTES + header.length)
        end = record_format.RecordEnd.unpack(self.head[V3_HEADER_BYTES:])
        record = self._record(header)
        record.end, record.tally = True, Tally(end.records, end.bytes, end.digest)
        return record

    def _blocks(self, header: record_format.RecordHeader) -> Steps:
        fixed = V3_HEADER_BYTES + record_format.RecordBlocks.SIZE
        yield from self._until(fixed)
        of = record_format.RecordBlocks.unpack(self.head[V3_HEADER_BYTES:fixed])
        if of.blocks > self._spec.blocks:
            raise TooBigError(f"{of.blocks} blocks in one record")
        if of.blocks < 1 or of.first_block + of.blocks > self._spec.blocks:
            raise ValueError(f"blocks {of.first_block} to {of.first_block + of.blocks - 1}")
        size = record_format.RecordBlocks.SIZE + of.blocks * (VERSION_BYTES + self._spec.block_bytes)
        if header.length != size:
            raise ValueError(f"{of.blocks} blocks in {header.length} bytes")
        yield from self._until(fixed + of.blocks * VERSION_BYTES)
        versions = np.frombuffer(self.head, "<u8", of.blocks, fixed)
        if versions.max() > MAX_NUMBER:
            raise ValueError("a version that no block can have")
        record = self._record(header)
        record.by_number = True
        record.blocks = np.arange(of.first_block, of.first_block + of.blocks)
        record.block_versions = versions.astype(np.int32)
        return record

    def _data(self, header: record_format.RecordHeader) -> Steps:
        invalidates = (yield from self._ranges(header)) if header.flags & RecordFlags.INVALIDATES else ()
        ranges = ranges_bytes(invalidates)
        record = yield from self._table(V3_HEADER_BYTES + ranges, header.length - ranges)
        record.stream, record.header_bytes = header.stream, V3_HEADER_BYTES
        record.payload_bytes += ranges
        record.invalidates = invalidates
        complete = bool(header.flags & RecordFlags.EPOCH_COMPLETE)
        of_table = (record.epoch, record.sequence, record.end, record.record_class, record.epoch_complete)
        if of_table != (header.epoch, header.sequence, False, header.record_class, complete):
            raise ValueError("header and table do not agree")
        return record

    def _ranges(self, header: record_format.RecordHeader) -> Generator[int, None, tuple[BlockRange, ...]]:
        first = V3_HEADER_BYTES + record_format.RecordRanges.SIZE
        yield from self._until(first)
        count = record_format.RecordRanges.unpack(self.head[V3_HEADER_BYTES:first]).count
        if count > MAX_RANGES:
            raise TooBigError(f"{count} ranges")
        if count < 1:
            raise ValueError("no ranges")
        end = first + count * BlockRange.SIZE
        if header.length < end - V3_HEADER_BYTES:
            raise ValueError(f"{header.length} bytes have no room for {count} ranges")
        yield from self._until(end)
        invalidates = tuple(
            BlockRange.unpack(self.head[at : at + BlockRange.SIZE]) for at in range(first, end, BlockRange.SIZE)
        )
        if any(each.first_block + each.blocks > self._spec.blocks for each in invalidates):
            raise ValueError("a range of blocks that do not exist")
        if any(not 1 <= each.epoch <= header.epoch for each in invalidates):
            raise ValueError("a range of an epoch that has not begun")
        return invalidates


def _check_epoch(epoch: int) -> None:
    if epoch > MAX_NUMBER:
        raise TooBigError(f"epoch {epoch}")
    if epoch < 1:
        raise ValueError(f"epoch {epoch}")


def _numbers(column: Int32, there: int) -> Indices:
    numbers = column.astype(np.intp)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < there:
        raise ValueError(f"numbers {numbers.min()} to {numbers.max()}; there are {there}")
    return numbers


def _versions(column: Int32) -> Int32:
    versions = column.astype(np.int32)
    if len(versions) and versions.min() < 0:
        raise ValueError("a version that nothing can have")
    return versions
