# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes of v3's streams: docs/vfio_v3_stream.h in Python.

Between the drivers of source and target; a VMM never looks at them. Numbers are little-endian, because source and
target may be different machines. Structures have no padding, and records follow each other without alignment.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from proto_v3.vfio.uapi import CType, Structure

LE16: TypeAlias = Annotated[int, CType.LE16]
LE32: TypeAlias = Annotated[int, CType.LE32]
LE64: TypeAlias = Annotated[int, CType.LE64]


class RecordClass(enum.IntEnum):
    """The kind of a record (`VFIO_MIG_RECORD_*`)."""

    CRITICAL = 1
    DIRTY = 2
    END = 3
    BLOCKS = 4  # of the fd of blocks


class RecordFlags(enum.IntFlag):
    """Flags of a critical record (`VFIO_MIG_RECORD_F_*`)."""

    EPOCH_COMPLETE = 1 << 0  # the last critical record of its epoch
    INVALIDATES = 1 << 1  # the payload begins with a RecordRanges and its ranges; optional


MAX_EPOCHS_AHEAD = 65536
"""A record whose epoch is further ahead of the newest loaded one is refused (`VFIO_MIG_MAX_EPOCHS_AHEAD`)."""


@dataclass(frozen=True, slots=True)
class RecordHeader(Structure):
    """`struct vfio_mig_record`: the header before each record's payload."""

    record_class: LE16
    stream: LE16  # 0 is the critical one
    flags: LE32
    epoch: LE64
    sequence: LE64  # from 0, in its stream
    length: LE64  # bytes of the payload


@dataclass(frozen=True, slots=True)
class RecordEnd(Structure):
    """`struct vfio_mig_record_end`: the payload of an END record, about all records before it in the stream.

    On the fd of blocks it is about all blocks in STOP_COPY: their number, 0 bytes, a digest of their versions.
    """

    records: LE64
    bytes: LE64  # headers included
    digest: LE64


@dataclass(frozen=True, slots=True)
class RecordRanges(Structure):
    """`struct vfio_mig_record_ranges`: the number of BlockRange that follow."""

    count: LE64


@dataclass(frozen=True, slots=True)
class BlockRange(Structure):
    """`struct vfio_mig_block_range`: dirty data of these blocks from an epoch before `epoch` is invalid."""

    first_block: LE64
    blocks: LE64
    epoch: LE64

    @property
    def slice(self) -> slice:
        """The range as a slice of an array by block."""
        return slice(self.first_block, self.first_block + self.blocks)


@dataclass(frozen=True, slots=True)
class RecordBlocks(Structure):
    """`struct vfio_mig_record_blocks`: the start of a BLOCKS record's payload. A LE64 version for each block follows,
    then their data."""

    first_block: LE64
    blocks: LE64
