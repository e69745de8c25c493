"""Records as bytes: what is before a record's data, and the other way round.

A record begins with its header: in v2 the one of mlx5, in v3 `struct vfio_mig_record`. Behind it comes a table that is
the driver's own business: epoch, sequence and flags, and which blocks and critical objects, in which versions, the data
are of. (The simulation needs none: there, a record is the object itself.) v3's END and BLOCKS records have the payload
that docs/vfio_v3.h gives them, and no table.

At the target nothing is taken for granted: a length, number or flag that cannot be gives ValueError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import BlockRange, RecordClass, RecordFlags
from sim.device.blocks import VERSION_BYTES
from sim.device.record import HEADER_BYTES, TABLE, TALLY, V3_HEADER_BYTES, Record, Tally
from sim.scenario.tables import Device
from sim.scenario.units import KIB

V2_HEADER = struct.Struct("<QII")
"""struct mlx5_vf_migration_header: record_size, flags, tag (Linux drivers/vfio/pci/mlx5/cmd.h)."""
END, INITIAL, COMPLETE = 1, 2, 4
"""Flags of the table."""
MAX_PLAIN_BYTES = 1 << 20
"""Of a record that holds neither blocks nor objects: what v2's drivers tell each other."""
MAX_RANGES = 4096
MAX_NUMBER = (1 << 31) - 1
"""Of versions and epochs: the drivers keep them in 32 bits."""


def head(record: Record) -> bytes:
    """All of a record that is before its data."""
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
    return uapi.RecordHeader(*map(int, parts)).pack()


def _v3_fixed(record: Record) -> bytes:
    if record.end:
        tally = record.tally or Tally()
        return uapi.RecordEnd(tally.records, tally.bytes, tally.digest).pack()
    if record.by_number:
        first = int(record.blocks[0])
        versions = record.block_versions.astype(np.uint64).tobytes()
        return uapi.RecordBlocks(first, len(record.blocks)).pack() + versions
    if not (len(record.objects) or len(record.blocks) or record.epoch_complete):
        return _table(record) + bytes(record.payload_bytes)
    ranges = b""
    if record.invalidates:
        ranges = uapi.RecordRanges(len(record.invalidates)).pack()
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


@dataclass(slots=True)
class Decoder:
    """Takes the head of one record apart, as its bytes come. v2 has one stream, which is 0.

    `wanted` is how many bytes of it have to be there to go on; once `record` is set, all of the head is.
    """

    spec: Device
    v3: bool
    record: Record | None = None
    head: bytearray = field(default_factory=bytearray)
    wanted: int = 0

    def __post_init__(self) -> None:
        self.wanted = V3_HEADER_BYTES if self.v3 else HEADER_BYTES

    def take(self) -> None:
        """What was wanted is there. ValueError if it cannot be a record's head."""
        assert len(self.head) == self.wanted
        if self.v3:
            self._take_v3()
        else:
            self._take_v2()

    # --- v2 -----------------------------------------------------------------------------------------------------------

    def _take_v2(self) -> None:
        size, flags, tag = V2_HEADER.unpack_from(self.head)
        if flags or tag > 1:
            raise ValueError(f"flags {flags:#x} and tag {tag} in a header")
        self._take_table(HEADER_BYTES, size)
        if self.record is not None and self.record.end != bool(tag):
            raise ValueError("header and table do not agree")

    def _take_table(self, at: int, payload_bytes: int) -> None:
        """The table at `at`, of a record with so many bytes behind `at`."""
        if len(self.head) < at + TABLE.size:
            if payload_bytes < TABLE.size:
                raise ValueError(f"{payload_bytes} bytes have no room for a table")
            self.wanted = at + TABLE.size
            return
        epoch, sequence, flags, objects, blocks = TABLE.unpack_from(self.head, at)
        if objects > self.spec.critical.objects or blocks > self.spec.blocks:
            raise ValueError(f"{blocks} blocks and {objects} critical objects in one record")
        end = bool(flags & END)
        if flags & ~(END | INITIAL | COMPLETE) or (end and (flags & COMPLETE or objects or blocks)):
            raise ValueError(f"flags {flags:#x} in a table of {objects} critical objects and {blocks} blocks")
        if not 1 <= epoch <= MAX_NUMBER:
            raise ValueError(f"epoch {epoch}")
        size = TABLE.size + 8 * (objects + blocks) + (TALLY.size if end else 0)
        if len(self.head) < at + size:
            if payload_bytes < size:
                raise ValueError(f"{payload_bytes} bytes have no room for a table of {size}")
            self.wanted = at + size
            return
        numbers = np.frombuffer(self.head, "<i4", 2 * (objects + blocks), at + TABLE.size)
        parts = np.split(numbers, [objects, 2 * objects, 2 * objects + blocks])
        record = Record(
            0,
            epoch,
            payload_bytes - size,
            sequence,
            blocks=_numbers(parts[2], self.spec.blocks),
            block_versions=_versions(parts[3]),
            objects=_numbers(parts[0], self.spec.critical.objects),
            object_versions=_versions(parts[1]),
            initial=bool(flags & INITIAL),
            header_bytes=HEADER_BYTES,
            table_bytes=size,
            epoch_complete=bool(flags & COMPLETE),
            end=end,
        )
        if end:
            record.tally = Tally(*TALLY.unpack_from(self.head, at + size - TALLY.size))
        self._finish_table(record, at)

    def _finish_table(self, record: Record, at: int) -> None:
        """What is behind the table must be the data of its blocks and objects, or a few bytes that are no state."""
        data = self._data_bytes(record)
        extra = record.payload_bytes - data
        if len(record.blocks) or len(record.objects) or record.end or record.epoch_complete:
            if extra:
                raise ValueError(f"{extra} bytes too many")
        elif not 0 <= extra <= MAX_PLAIN_BYTES:
            raise ValueError(f"{extra} bytes that are no state")
        elif len(self.head) < at + record.table_bytes + extra:
            self.wanted = at + record.table_bytes + extra
            return
        self.record = record

    def _data_bytes(self, record: Record) -> int:
        object_bytes = round(self.spec.critical.object_kib * KIB)
        return len(record.blocks) * self.spec.block_bytes + len(record.objects) * object_bytes

    # --- v3 -----------------------------------------------------------------------------------------------------------

    def _take_v3(self) -> None:
        header = uapi.RecordHeader.unpack(self.head)
        if header.record_class not in RecordClass.__members__.values():
            raise ValueError(f"there is no record class {header.record_class}")
        critical = header.record_class == RecordClass.CRITICAL
        if header.flags & ~int(RecordFlags.EPOCH_COMPLETE | RecordFlags.INVALIDATES) or (header.flags and not critical):
            raise ValueError(f"flags {header.flags:#x} in a record of class {header.record_class}")
        if not 1 <= header.epoch <= MAX_NUMBER:
            raise ValueError(f"epoch {header.epoch}")
        match RecordClass(header.record_class):
            case RecordClass.END:
                self._take_end(header)
            case RecordClass.BLOCKS:
                self._take_blocks(header)
            case _:
                self._take_data(header)

    def _new(self, header: uapi.RecordHeader, **more: object) -> Record:
        record = Record(header.stream, header.epoch, header.length, header.sequence, header_bytes=V3_HEADER_BYTES)
        for name, value in more.items():
            setattr(record, name, value)
        return record

    def _take_end(self, header: uapi.RecordHeader) -> None:
        if header.length != uapi.RecordEnd.SIZE:
            raise ValueError(f"an END of {header.length} bytes")
        if not self._has(V3_HEADER_BYTES + header.length):
            return
        end = uapi.RecordEnd.unpack(self.head[V3_HEADER_BYTES:])
        self.record = self._new(header, end=True, tally=Tally(end.records, end.bytes, end.digest))

    def _take_blocks(self, header: uapi.RecordHeader) -> None:
        fixed = V3_HEADER_BYTES + uapi.RecordBlocks.SIZE
        if not self._has(fixed):
            return
        of = uapi.RecordBlocks.unpack(self.head[V3_HEADER_BYTES:fixed])
        if not 1 <= of.blocks <= self.spec.blocks or of.first_block + of.blocks > self.spec.blocks:
            raise ValueError(f"blocks {of.first_block} to {of.first_block + of.blocks - 1}")
        size = uapi.RecordBlocks.SIZE + of.blocks * (VERSION_BYTES + self.spec.block_bytes)
        if header.length != size:
            raise ValueError(f"{of.blocks} blocks in {header.length} bytes")
        if not self._has(fixed + of.blocks * VERSION_BYTES):
            return
        versions = np.frombuffer(self.head, "<u8", of.blocks, fixed)
        if versions.max() > MAX_NUMBER:
            raise ValueError("a version that no block can have")
        blocks = np.arange(of.first_block, of.first_block + of.blocks)
        self.record = self._new(header, blocks=blocks, block_versions=versions.astype(np.int32), by_number=True)

    def _take_data(self, header: uapi.RecordHeader) -> None:
        at = V3_HEADER_BYTES
        invalidates: tuple[BlockRange, ...] = ()
        if header.flags & RecordFlags.INVALIDATES:
            if not self._has(at + uapi.RecordRanges.SIZE):
                return
            count = uapi.RecordRanges.unpack(self.head[at : at + uapi.RecordRanges.SIZE]).count
            if not 1 <= count <= MAX_RANGES:
                raise ValueError(f"{count} ranges")
            end = at + uapi.RecordRanges.SIZE + count * BlockRange.SIZE
            if header.length < end - V3_HEADER_BYTES:
                raise ValueError(f"{header.length} bytes have no room for {count} ranges")
            if not self._has(end):
                return
            ranges = self.head[at + uapi.RecordRanges.SIZE : end]
            invalidates = tuple(
                BlockRange.unpack(ranges[i : i + BlockRange.SIZE]) for i in range(0, len(ranges), BlockRange.SIZE)
            )
            if any(each.first_block + each.blocks > self.spec.blocks for each in invalidates):
                raise ValueError("a range of blocks that do not exist")
            if any(not 1 <= each.epoch <= header.epoch for each in invalidates):
                raise ValueError("a range of an epoch that has not begun")
            at = end
        self._take_table(at, header.length - (at - V3_HEADER_BYTES))
        if self.record is not None:
            record = self.record
            record.stream, record.header_bytes = header.stream, V3_HEADER_BYTES
            record.payload_bytes += at - V3_HEADER_BYTES
            record.invalidates = invalidates
            if (record.epoch, record.sequence, record.end) != (header.epoch, header.sequence, False):
                raise ValueError("header and table do not agree")
            if record.record_class != header.record_class or record.epoch_complete != bool(
                header.flags & RecordFlags.EPOCH_COMPLETE
            ):
                raise ValueError("header and table do not agree")

    def _has(self, size: int) -> bool:
        """Whether so many bytes of the head are there; they are wanted, if not."""
        if len(self.head) >= size:
            return True
        self.wanted = size
        return False


def _numbers(
    column: np.ndarray[tuple[int], np.dtype[np.int32]], there: int
) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    numbers = column.astype(np.intp)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < there:
        raise ValueError(f"numbers {numbers.min()} to {numbers.max()}; there are {there}")
    return numbers


def _versions(column: np.ndarray[tuple[int], np.dtype[np.int32]]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    versions = column.astype(np.int32)
    if len(versions) and versions.min() < 0:
        raise ValueError("a version that nothing can have")
    return versions
