"""States, feature bits and structures of the VFIO migration protocol, as numbers and as bytes.

Source of v2: Linux `include/uapi/linux/vfio.h`, as of Linux 7.1. What v3 adds is experimental, exists in no kernel, and
is marked as such.

The header aligns each 64-bit member to 8 bytes and leaves no hole between members, so a structure has one layout on
every architecture, 32-bit user space included. Its byte order is the machine's.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass, field
from typing import ClassVar, Self, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What a structure is unpacked from; collections.abc.Buffer needs Python 3.12."""


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
    """What `VFIO_DEVICE_FEATURE_MIGRATION` reports (`VFIO_MIGRATION_*`)."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2
    MULTI_STREAM = 1 << 3  # v3, experimental


class PrecopyFlags(enum.IntFlag):
    """What `VFIO_MIG_GET_PRECOPY_INFO` says in its flags (`VFIO_PRECOPY_INFO_*`), after MIG_PRECOPY_INFOV2 only."""

    REINIT = 1 << 0  # there is new initial data, and initial_bytes and dirty_bytes are counted anew


def _io(number: int) -> int:
    """`_IO(VFIO_TYPE, VFIO_BASE + number)`: no direction and no size in the number, for the structure has its argsz."""
    vfio_type, vfio_base = ord(";"), 100
    return vfio_type << 8 | vfio_base + number


VFIO_DEVICE_RESET = _io(11)
VFIO_DEVICE_FEATURE = _io(17)
VFIO_MIG_GET_PRECOPY_INFO = _io(21)  # on a data fd, not on the device


class Feature(enum.IntEnum):
    """Indices for the low half of `vfio_device_feature.flags` (`VFIO_DEVICE_FEATURE_*`); migration's ones only."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9
    MIG_PRECOPY_INFOV2 = 12


FEATURE_MASK = 0xFFFF


class FeatureOp(enum.IntFlag):
    """What to do with a feature: the high half of `vfio_device_feature.flags`."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18  # only ask whether the feature, and GET or SET of it where given, exists


class CType(enum.StrEnum):
    """The C types of the header's members, as `struct` formats: native byte order, standard sizes, no padding."""

    U32 = "=I"
    S32 = "=i"
    U64 = "=Q"


class Structure:
    """Base of the structures: a dataclass, whose LAYOUT names the members that C has, in C's order."""

    __slots__ = ()
    LAYOUT: ClassVar[dict[str, CType]] = {}
    SIZE: ClassVar[int]  # bytes: C's sizeof, a flexible array at the end not counted

    def __init_subclass__(cls) -> None:
        cls.SIZE = sum(map(struct.calcsize, cls.LAYOUT.values()))

    def pack(self) -> bytes:
        """The SIZE bytes that C has. ValueError for a value that its member cannot hold."""
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
        """From the first SIZE bytes of `buffer`. EINVAL if it has fewer."""
        return cls(**cls.members(buffer))

    @classmethod
    def members(cls, buffer: Buffer) -> dict[str, int]:
        """What unpack() finds in each of C's members, by its name."""
        if len(buffer) < cls.SIZE:
            raise OSError(errno.EINVAL, f"{cls.__name__} has {cls.SIZE} bytes, the buffer {len(buffer)}")
        return {
            member: struct.unpack_from(ctype, buffer, offset_of(cls, member))[0] for member, ctype in cls.LAYOUT.items()
        }


def offset_of(structure: type[Structure], member: str) -> int:
    """Bytes before `member`: C's offsetof. ValueError if there is no such member."""
    members = list(structure.LAYOUT)
    return sum(struct.calcsize(structure.LAYOUT[before]) for before in members[: members.index(member)])


@dataclass(frozen=True, slots=True)
class DeviceFeature(Structure):
    """`struct vfio_device_feature`, without its data: what VFIO_DEVICE_FEATURE takes. The data follows it."""

    LAYOUT: ClassVar = {"argsz": CType.U32, "flags": CType.U32}
    argsz: int  # bytes of the header and its data, as the caller has them
    flags: int  # a Feature and FeatureOp bits


@dataclass(frozen=True, slots=True)
class FeatureMigration(Structure):
    """`struct vfio_device_feature_migration`: data of MIGRATION, GET."""

    LAYOUT: ClassVar = {"flags": CType.U64}
    flags: MigrationFlags

    @classmethod
    def unpack(cls, buffer: Buffer) -> Self:
        """As Structure.unpack(); bits that have no name are kept."""
        return cls(MigrationFlags(cls.members(buffer)["flags"]))


@dataclass(frozen=True, slots=True)
class FeatureMigState(Structure):
    """`struct vfio_device_feature_mig_state`: data of MIG_DEVICE_STATE, GET and SET."""

    LAYOUT: ClassVar = {"device_state": CType.U32, "data_fd": CType.S32}
    device_state: int  # a State, unless the caller asks for one that does not exist
    data_fd: int = -1  # -1: none


@dataclass(frozen=True, slots=True)
class FeatureMigDataSize(Structure):
    """`struct vfio_device_feature_mig_data_size`: data of MIG_DATA_SIZE, GET."""

    LAYOUT: ClassVar = {"stop_copy_length": CType.U64}
    stop_copy_length: int  # bytes, an estimate


@dataclass(frozen=True, slots=True)
class DmaLoggingControl(Structure):
    """`struct vfio_device_feature_dma_logging_control`: data of DMA_LOGGING_START, SET."""

    LAYOUT: ClassVar = {
        "page_size": CType.U64,
        "num_ranges": CType.U32,
        "reserved": CType.U32,
        "ranges": CType.U64,
    }
    page_size: int  # bytes, a hint
    num_ranges: int
    reserved: int
    ranges: int  # address of num_ranges DmaLoggingRange


@dataclass(frozen=True, slots=True)
class DmaLoggingRange(Structure):
    """`struct vfio_device_feature_dma_logging_range`: I/O virtual addresses whose writes are logged."""

    LAYOUT: ClassVar = {"iova": CType.U64, "length": CType.U64}
    iova: int
    length: int  # bytes


@dataclass(frozen=True, slots=True)
class DmaLoggingReport(Structure):
    """`struct vfio_device_feature_dma_logging_report`: data of DMA_LOGGING_REPORT, GET."""

    LAYOUT: ClassVar = {"iova": CType.U64, "length": CType.U64, "page_size": CType.U64, "bitmap": CType.U64}
    iova: int
    length: int  # bytes
    page_size: int  # bytes that one bit stands for
    bitmap: int  # address of the bitmap; the kernel sets bits in it and clears none


@dataclass(frozen=True, slots=True)
class PrecopyInfo(Structure):
    """What `VFIO_MIG_GET_PRECOPY_INFO` on a data fd answers (`struct vfio_precopy_info`)."""

    LAYOUT: ClassVar = {
        "argsz": CType.U32,
        "flags": CType.U32,
        "initial_bytes": CType.U64,
        "dirty_bytes": CType.U64,
    }
    initial_bytes: int
    dirty_bytes: int
    flags: PrecopyFlags = field(default=PrecopyFlags(0))

    @property
    def argsz(self) -> int:
        """Bytes of the structure, as the kernel of this header has it."""
        return self.SIZE

    @property
    def reinit(self) -> bool:
        """Whether the device has new initial data, so that the caller has to judge anew whether it is ready to stop."""
        return PrecopyFlags.REINIT in self.flags

    @classmethod
    def unpack(cls, buffer: Buffer) -> Self:
        """As Structure.unpack(); the caller's argsz is not kept, flags that have no name are."""
        members = cls.members(buffer)
        return cls(members["initial_bytes"], members["dirty_bytes"], PrecopyFlags(members["flags"]))


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """v3, experimental: what `MIG_GET_STREAM_INFO` on a stream's fd answers.

    `epoch` is the newest generation of critical data that the device has begun; `pending_bytes` are this stream's
    unread bytes, those that wait to be saved included.
    """

    epoch: int
    pending_bytes: int
