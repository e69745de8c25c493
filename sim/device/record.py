# SPDX-License-Identifier: GPL-2.0-or-later
"""The contents of a driver's stream in virtual time: records, and runs of their bytes.

A record stands for a header and a payload; the bytes themselves are not made. To the VMM they are opaque: it sees an
`Extent`, which has a length and can be cut, like a memoryview. The target driver sees which bytes of which record it
received, and in which order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

import numpy as np

from proto_v3.wire.frames import Payload
from sim.device import record_format
from sim.device.guest import Int32
from sim.device.record_format import BlockRange, RecordClass
from sim.device.state import Indices

HEADER_BYTES = 16
"""v2: struct mlx5_vf_migration_header: u64 record_size, u32 flags, u32 tag (Linux drivers/vfio/pci/mlx5/cmd.h)."""
STOP_COPY_SIZE_BYTES = 8
"""struct mlx5_vf_migration_tag_stop_copy_data: u64 stop_copy_size, so that the target can allocate (the same file)."""
V3_HEADER_BYTES = record_format.RecordHeader.SIZE
TABLE = struct.Struct("<QQIII")
"""Fixed part of a table: epoch, sequence, flags, objects, blocks. Their numbers and versions follow, 32 bits each."""
TALLY = struct.Struct("<QQQ")
"""In the table of v2's END: records, bytes, digest."""

NO_INDICES: Indices = np.empty(0, np.intp)
NO_VERSIONS: Int32 = np.empty(0, np.int32)


def ranges_bytes(invalidates: tuple[BlockRange, ...]) -> int:
    """Bytes of the ranges in a critical record's payload."""
    return record_format.RecordRanges.SIZE + len(invalidates) * BlockRange.SIZE if invalidates else 0


def table_bytes(record: Record) -> int:
    """Bytes of a record's table, which lists its blocks and objects (sim/live/fd/codec.py)."""
    if record.header_bytes == V3_HEADER_BYTES and (record.end or record.by_number):
        return 0  # it is in their payloads (record_format.RecordEnd, record_format.RecordBlocks)
    return TABLE.size + 8 * (len(record.objects) + len(record.blocks)) + (TALLY.size if record.end else 0)


@dataclass(frozen=True, slots=True)
class Tally:
    """What a stream carried before its END: numbers of records and bytes, and a digest of their heads and tables."""

    records: int = 0
    bytes: int = 0
    digest: int = 0

    def add(self, record: Record) -> Tally:
        """The tally with one more record."""
        return Tally(self.records + 1, self.bytes + record.size_bytes, record.digest(self.digest))


@dataclass(slots=True, eq=False)
class Record:
    """One record of one stream: some blocks, some critical objects, or both, with the versions that were saved."""

    stream: int
    epoch: int
    payload_bytes: int
    sequence: int = -1
    """Its place in the stream, from 0; -1 until its first byte is read, for until then it may be dropped."""
    blocks: Indices = field(default_factory=lambda: NO_INDICES)
    block_versions: Int32 = field(default_factory=lambda: NO_VERSIONS)
    objects: Indices = field(default_factory=lambda: NO_INDICES)
    object_versions: Int32 = field(default_factory=lambda: NO_VERSIONS)
    initial: bool = False
    """Its bytes count as v2's initial_bytes."""
    header_bytes: int = HEADER_BYTES
    table_bytes: int = 0
    """Bytes of the table behind the header, which lists its blocks and objects. Only in live mode."""
    by_number: bool = False
    """v3, blocks: it was requested by the numbers of its blocks."""
    chunk: bool = False
    """It takes one of the stream's chunks until it is read."""
    epoch_complete: bool = False
    """The last record of its epoch's critical data."""
    invalidates: tuple[BlockRange, ...] = ()
    """v3: the blocks whose earlier dirty data is invalid since the epochs that this record reports."""
    end: bool = False
    """The stream's END record."""
    data: memoryview | None = None
    """Live, addressable blocks: the bytes of its blocks, until it is known which of them are loaded."""
    tally: Tally | None = None
    """Of the END record, set when its first byte is read: the records before it."""

    @property
    def size_bytes(self) -> int:
        """Bytes in the stream, the header included."""
        return self.header_bytes + self.table_bytes + self.payload_bytes

    @property
    def may_be_overtaken(self) -> bool:
        """Critical data may go before it: it has blocks alone, is no initial data, and nobody began to read it."""
        return self.sequence < 0 and not self.initial and len(self.blocks) > 0 and not len(self.objects)

    @property
    def record_class(self) -> RecordClass:
        """v3: the class in its header."""
        if self.end:
            return RecordClass.END
        if self.by_number:
            return RecordClass.BLOCKS
        return RecordClass.DIRTY if len(self.blocks) else RecordClass.CRITICAL

    def digest(self, before: int) -> int:
        """The digest `before`, updated with this record. It stands for a digest of the bytes, which are not made."""
        head = repr((self.stream, self.sequence, self.epoch, self.payload_bytes, self.epoch_complete, self.invalidates))
        before = crc32(head.encode(), before)
        for column in (self.blocks, self.block_versions, self.objects, self.object_versions):
            before = crc32(column.tobytes(), before)
        return before


class RecordSlice(NamedTuple):
    """Bytes [start, stop) of a record."""

    record: Record
    start: int
    stop: int


class Extent:
    """A run of stream bytes: parts of records, in order."""

    __slots__ = ("_bytes", "parts")

    def __init__(self, parts: list[RecordSlice]) -> None:
        self.parts = parts
        self._bytes = sum(part.stop - part.start for part in parts)

    def __len__(self) -> int:
        return self._bytes

    def __getitem__(self, piece: slice, /) -> Extent:
        begin, end, step = piece.indices(self._bytes)
        if step != 1:
            raise ValueError("a run of bytes can be cut with step 1 only")
        parts, at = [], 0
        for part in self.parts:
            size = part.stop - part.start
            first, last = max(begin - at, 0), min(end - at, size)
            if first < last:
                parts.append(RecordSlice(part.record, part.start + first, part.start + last))
            at += size
        return Extent(parts)


class Bulk:
    """Bytes of which only the number matters: pages of guest RAM."""

    __slots__ = ("_bytes",)

    def __init__(self, size_bytes: int) -> None:
        self._bytes = size_bytes

    def __len__(self) -> int:
        return self._bytes

    def __getitem__(self, piece: slice, /) -> Payload:
        return Bulk(len(range(*piece.indices(self._bytes))))
