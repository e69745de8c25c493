"""States, feature bits and info structures of the VFIO migration protocol.

Source of v2: Linux `include/uapi/linux/vfio.h` (enum vfio_device_mig_state, VFIO_MIGRATION_*, struct
vfio_precopy_info). What v3 adds is experimental, exists in no kernel, and is marked as such.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


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
    """What `VFIO_DEVICE_FEATURE_MIGRATION` reports."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2
    MULTI_STREAM = 1 << 3  # v3, experimental


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """What `VFIO_MIG_GET_PRECOPY_INFO` on a data fd answers (`struct vfio_precopy_info`)."""

    initial_bytes: int
    dirty_bytes: int


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """v3, experimental: what `MIG_GET_STREAM_INFO` on a stream's fd answers.

    `epoch` is the newest generation of critical data that the device has begun; `pending_bytes` are this stream's
    unread bytes, those that wait to be saved included.
    """

    epoch: int
    pending_bytes: int
