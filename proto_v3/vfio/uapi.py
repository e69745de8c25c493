# SPDX-License-Identifier: GPL-2.0-or-later
"""States, feature bits and structures of the VFIO migration protocol, as numbers and as bytes.

Source of v2: Linux `include/uapi/linux/vfio.h`, as of Linux 7.1. Additions of v3 are experimental, exist in no kernel,
and are marked as such.

The header aligns each 64-bit member to 8 bytes and leaves no hole between members. So a structure has the same layout
on every architecture, 32-bit user space included. The byte order is the machine's.

What the bytes of v3's streams are is not here, because a VMM never looks: see docs/vfio_v3_stream.h.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Self, TypeAlias, get_type_hints

Buffer: TypeAlias = bytes | bytearray | memoryview
"""The types that a structure can be unpacked from. collections.abc.Buffer needs Python 3.12."""


class State(enum.IntEnum):
    """Device migration states, with the kernel's numbers (`enum vfio_device_mig_state`)."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


class MigrationFlags(enum.IntFlag):
    """Flags of `VFIO_DEVICE_FEATURE_MIGRATION` (`VFIO_MIGRATION_*`)."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class PrecopyFlags(enum.IntFlag):
    """Flags of `VFIO_MIG_GET_PRECOPY_INFO` (`VFIO_PRECOPY_INFO_*`); only after MIG_PRECOPY_INFOV2 was set."""

    REINIT = 1 << 0  # there is new initial data; initial_bytes and dirty_bytes are counted anew


def _io(number: int) -> int:
    """`_IO(VFIO_TYPE, VFIO_BASE + number)`: without direction and size, because the structure has its argsz."""
    vfio_type, vfio_base = ord(";"), 100
    return vfio_type << 8 | vfio_base + number


VFIO_DEVICE_RESET = _io(11)
VFIO_DEVICE_FEATURE = _io(17)
VFIO_MIG_GET_PRECOPY_INFO = _io(21)  # on a data fd, not on the device
VFIO_MIG_GET_STREAM = _io(22)  # v3, experimental: on the critical fd
VFIO_MIG_GET_STREAM_INFO = _io(23)  # v3, experimental: on any stream's fd
VFIO_MIG_GET_DIRTY_BLOCKS = _io(24)  # v3, experimental: on the fd of blocks


class Feature(enum.IntEnum):
    """Indices in the low half of `vfio_device_feature.flags` (`VFIO_DEVICE_FEATURE_*`), those of migration only."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    MIG_PRECOPY_INFOV2 = 12
    MIG_STREAMS = 14  # v3, experimental: the next free number; 13 is ZPCI_ERROR in Linux 7.3-rc1


FEATURE_MASK = 0xFFFF


class FeatureOp(enum.IntFlag):
    """The operation on a feature: the high half of `vfio_device_feature.flags`."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18  # only ask whether the feature exists, and GET or SET of it where given


class CType(enum.StrEnum):
    """The C types of members, as `struct` formats: standard sizes, no padding. The byte order is the machine's; that of
    the LE types is little-endian."""

    U32 = "=I"
    S32 = "=i"
    U64 = "=Q"
    LE16 = "<H"
    LE32 = "<I"
    LE64 = "<Q"


U32: TypeAlias = Annotated[int, CType.U32]
S32: TypeAlias = Annotated[int, CType.S32]
U64: TypeAlias = Annotated[int, CType.U64]


@dataclass(frozen=True, slots=True)
class Structure:
    """Base of the structures: dataclasses whose fields are the members of the C structure, in its order."""

    LAYOUT: ClassVar[dict[str, CType]]
    SIZE: ClassVar[int]  # bytes: C's sizeof, a flexible array at the end not counted
    _TYPES: ClassVar[dict[str, type[int]]]

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls.LAYOUT = {member: hints[member].__metadata__[0] for member in cls.__annotations__}
        cls.SIZE = sum(map(struct.calcsize, cls.LAYOUT.values()))
        cls._TYPES = {member: hints[member].__origin__ for member in cls.LAYOUT}

    def pack(self) -> bytes:
        """The structure as C has it, SIZE bytes. ValueError for a value that its member cannot hold."""
        packed = bytearray()
        for member, ctype in self.LAYOUT.items():
            value = getattr(self, member)
            try:
                packed += struct.pack(ctype, value)
            except struct.error:
                message = f"{type(self).__name__}.{member}: {value!r} does not fit into {ctype.name}"
                raise ValueError(message) from None
        return bytes(packed)

    @classmethod
    def unpack(cls, buffer: Buffer) -> Self:
        """Parse the first SIZE bytes of `buffer`. OSError EINVAL if it has fewer.

        Unknown flags are kept. An argsz that is always the structure's size is not taken from the buffer.
        """
        members = cls.members(buffer)
        return cls(**{each.name: cls._TYPES[each.name](members[each.name]) for each in fields(cls) if each.init})

    @classmethod
    def members(cls, buffer: Buffer) -> dict[str, int]:
        """The values of the C members by name. OSError EINVAL as unpack()."""
        if len(buffer) < cls.SIZE:
            raise OSError(errno.EINVAL, f"{cls.__name__} has {cls.SIZE} bytes, the buffer {len(buffer)}")
        return {
            member: struct.unpack_from(ctype, buffer, offset_of(cls, member))[0] for member, ctype in cls.LAYOUT.items()
        }


def offset_of(structure: type[Structure], member: str) -> int:
    """Bytes before `member`, as C's offsetof. ValueError if there is no such member."""
    members = list(structure.LAYOUT)
    return sum(struct.calcsize(structure.LAYOUT[before]) for before in members[: members.index(member)])


@dataclass(frozen=True, slots=True)
class DeviceFeature(Structure):
    """`struct vfio_device_feature`, without its data: what VFIO_DEVICE_FEATURE takes. The data follows it."""

    argsz: U32  # bytes of the caller's header and data
    flags: U32  # a Feature and FeatureOp bits


@dataclass(frozen=True, slots=True)
class FeatureMigration(Structure):
    """`struct vfio_device_feature_migration`: data of MIGRATION, GET."""

    flags: Annotated[MigrationFlags, CType.U64]


@dataclass(frozen=True, slots=True)
class FeatureMigState(Structure):
    """`struct vfio_device_feature_mig_state`: data of MIG_DEVICE_STATE, GET and SET."""

    device_state: U32  # a State, unless the caller asks for one that does not exist
    data_fd: S32 = -1  # -1: none


@dataclass(frozen=True, slots=True)
class FeatureMigDataSize(Structure):
    """`struct vfio_device_feature_mig_data_size`: data of MIG_DATA_SIZE, GET."""

    stop_copy_length: U64  # bytes, an estimate


@dataclass(frozen=True, slots=True)
class PrecopyInfo(Structure):
    """The answer of `VFIO_MIG_GET_PRECOPY_INFO` on a data fd (`struct vfio_precopy_info`)."""

    argsz: U32 = field(default=24, init=False)  # SIZE in the kernel of this header
    flags: Annotated[PrecopyFlags, CType.U32] = field(default=PrecopyFlags(0), kw_only=True)
    initial_bytes: U64
    dirty_bytes: U64

    @property
    def reinit(self) -> bool:
        """Whether the device has new initial data, so that the caller must check again whether it is ready to stop."""
        return PrecopyFlags.REINIT in self.flags


# --- v3, experimental: docs/vfio_v3.h has it in C ---------------------------------------------------------------------


MAX_DIRTY_STREAMS = 64
"""Of any device (`VFIO_MIG_MAX_DIRTY_STREAMS`)."""
BLOCKS_HEAD_BYTES = 48
"""Of a pread() on the fd of blocks, beside 8 and the block's bytes for each (`VFIO_MIG_BLOCKS_HEAD_BYTES`)."""
BLOCKS_END_BYTES = 56
"""Of the end of the fd of blocks (`VFIO_MIG_BLOCKS_END_BYTES`)."""


class StreamFlags(enum.IntFlag):
    """How a device's state is read (`VFIO_MIG_STREAMS_*`)."""

    BLOCKS = 1 << 0  # one fd of addressable blocks instead of the dirty streams


@dataclass(frozen=True, slots=True)
class FeatureMigStreams(Structure):
    """`struct vfio_device_feature_mig_streams`: data of MIG_STREAMS, GET and SET."""

    dirty_streams: U32  # GET: the maximum of the device. SET: the number to use, 0 for v2
    flags: Annotated[StreamFlags, CType.U32] = field(default=StreamFlags(0))
    """GET: those that the device knows. SET: those to use."""


@dataclass(frozen=True, slots=True)
class GetStream(Structure):
    """`struct vfio_mig_get_stream`: argument and answer of `VFIO_MIG_GET_STREAM` on the critical fd."""

    argsz: U32
    flags: U32  # none is defined
    index: U32  # from 0
    fd: S32 = -1


@dataclass(frozen=True, slots=True)
class StreamInfo(Structure):
    """`struct vfio_mig_stream_info`: the answer of `VFIO_MIG_GET_STREAM_INFO` on the fd of any stream."""

    argsz: U32 = field(default=24, init=False)  # SIZE
    flags: U32 = field(default=0, kw_only=True)  # none is defined
    epoch: U64  # newest epoch of critical data; stays 1 until STOP_COPY on devices without pre-copy
    pending_bytes: U64  # unread bytes of this stream, including those not saved yet


@dataclass(frozen=True, slots=True)
class GetDirtyBlocks(Structure):
    """`struct vfio_mig_dirty_blocks`: argument and answer of `VFIO_MIG_GET_DIRTY_BLOCKS` on the fd of blocks."""

    argsz: U32
    flags: U32  # none is defined
    block_bytes: U64  # out: bytes of a block
    blocks: U64  # in: bits in the bitmap; out: blocks of the device
    bitmap: U64  # address of the bitmap; the kernel sets bits in it and clears none
