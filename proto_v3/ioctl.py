"""The migration ioctls on bytes: what VFIO_DEVICE_FEATURE and VFIO_MIG_GET_PRECOPY_INFO do with a caller's buffer.

They stand before the port (proto_v3.device), as the kernel's core stands before its drivers, and answer in the same
order with the same errno. Source: Linux 7.1 `drivers/vfio/vfio_main.c`, vfio_ioctl_device_feature() and what it calls;
`include/linux/vfio.h`, vfio_check_feature() and vfio_check_precopy_ioctl(). What differs is said where it does.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from proto_v3.device import DataFd, MigrationDevice
from proto_v3.fsm import STATES
from proto_v3.uapi import (
    FEATURE_MASK,
    DeviceFeature,
    Feature,
    FeatureMigDataSize,
    FeatureMigration,
    FeatureMigState,
    FeatureOp,
    MigrationFlags,
    PrecopyFlags,
    PrecopyInfo,
    State,
    Structure,
    offset_of,
)

GET_OR_SET = FeatureOp.GET | FeatureOp.SET
KNOWN_FLAGS = FEATURE_MASK | int(GET_OR_SET | FeatureOp.PROBE)  # an int: ~ of a Flag has no more bits than the Flag

FEATURES: dict[int, tuple[FeatureOp, int]] = {
    Feature.MIGRATION: (FeatureOp.GET, FeatureMigration.SIZE),
    Feature.MIG_DEVICE_STATE: (GET_OR_SET, FeatureMigState.SIZE),
    Feature.MIG_DATA_SIZE: (FeatureOp.GET, FeatureMigDataSize.SIZE),
    Feature.MIG_PRECOPY_INFOV2: (FeatureOp.SET, 0),
}
"""What each feature can do, and the bytes of data that it needs. DMA logging is not modelled: the guest's memory is
tracked by the simulated VMM, so it answers as a device without it does, ENOTTY."""


async def device_feature(
    device: MigrationDevice, buffer: bytearray, install_fd: Callable[[DataFd], int]
) -> DataFd | None:
    """VFIO_DEVICE_FEATURE: `buffer` holds a DeviceFeature and its data, and takes the answer.

    Where SET of MIG_DEVICE_STATE begins a session, the data fd is returned too; `install_fd` gives it the number that
    the caller reads in data_fd, and may refuse with OSError (EMFILE). data_fd is -1 where there is none, and after a
    SET that the device or `install_fd` refused; any other error leaves the buffer as it was.

    Raises OSError:
    - EFAULT if the buffer is shorter than the header, or than its argsz. (The kernel notices only if it has to touch
      what is missing; to claim more than there is, is a mistake in any case.)
    - EINVAL for an argsz shorter than header and data, a flag that does not exist, GET with SET, neither of them, one
      that the feature does not have, a state that does not exist, MIG_PRECOPY_INFOV2 without PRE_COPY. A PROBE takes
      GET with SET, neither of them, and needs no data.
    - ENOTTY for a feature that does not exist, or on a device that does not migrate.
    - what the device answers.
    """
    header = _header(buffer)
    number = header.flags & FEATURE_MASK
    if number not in FEATURES:
        raise OSError(errno.ENOTTY, f"no feature {number}")
    features = await device.migration_flags()
    if number == Feature.MIG_PRECOPY_INFOV2:
        # The kernel looks at the flags alone here, so a device that does not migrate gives EINVAL, not ENOTTY.
        if MigrationFlags.PRE_COPY not in features:
            raise OSError(errno.EINVAL, "this device has no PRE_COPY")
    elif not features:
        raise OSError(errno.ENOTTY, "this device does not migrate")
    ops, data_bytes = FEATURES[number]
    _check_op(header, ops, data_bytes)
    if header.flags & FeatureOp.PROBE:
        return None

    if number == Feature.MIGRATION:
        _put(buffer, FeatureMigration(features))
    elif number == Feature.MIG_DATA_SIZE:
        _put(buffer, FeatureMigDataSize(await device.stop_copy_bytes()))
    elif number == Feature.MIG_PRECOPY_INFOV2:
        await device.set_precopy_info_v2()
    elif header.flags & FeatureOp.GET:
        _put(buffer, FeatureMigState(await device.state()))
    else:
        return await _set_state(device, buffer, install_fd)
    return None


def _header(buffer: bytearray) -> DeviceFeature:
    if len(buffer) < DeviceFeature.SIZE:
        raise OSError(errno.EFAULT, f"a buffer of {len(buffer)} bytes has no header")
    header = DeviceFeature.unpack(buffer)
    if header.argsz < DeviceFeature.SIZE:
        raise OSError(errno.EINVAL, f"argsz {header.argsz} is shorter than the header")
    if len(buffer) < header.argsz:
        raise OSError(errno.EFAULT, f"argsz {header.argsz}, but the buffer has {len(buffer)} bytes")
    if header.flags & ~KNOWN_FLAGS:
        raise OSError(errno.EINVAL, f"flags {header.flags:#x}: unknown bits")
    if not header.flags & FeatureOp.PROBE and header.flags & GET_OR_SET == GET_OR_SET:
        raise OSError(errno.EINVAL, "GET and SET at once, and no PROBE")
    return header


def _check_op(header: DeviceFeature, ops: FeatureOp, data_bytes: int) -> None:
    op = header.flags & GET_OR_SET
    if op & ~ops:
        raise OSError(errno.EINVAL, f"flags {header.flags:#x}: the feature has only {ops.name}")
    if header.flags & FeatureOp.PROBE:
        return
    if not op:
        raise OSError(errno.EINVAL, "neither GET nor SET nor PROBE")
    if header.argsz - DeviceFeature.SIZE < data_bytes:
        raise OSError(errno.EINVAL, f"argsz {header.argsz}: the feature needs {data_bytes} bytes of data")


def _put(buffer: bytearray, data: Structure) -> None:
    buffer[DeviceFeature.SIZE : DeviceFeature.SIZE + data.SIZE] = data.pack()


async def _set_state(device: MigrationDevice, buffer: bytearray, install_fd: Callable[[DataFd], int]) -> DataFd | None:
    target = FeatureMigState.unpack(buffer[DeviceFeature.SIZE :]).device_state
    _put(buffer, FeatureMigState(target, data_fd=-1))  # whatever fails now, no stale number is taken for a data fd
    if target not in STATES:
        raise OSError(errno.EINVAL, f"there is no state {target}")
    fd = await device.set_state(State(target))
    if fd is not None:
        _put(buffer, FeatureMigState(target, install_fd(fd)))
    return fd


async def get_precopy_info(fd: DataFd, buffer: bytearray, *, opted_in: bool) -> None:
    """VFIO_MIG_GET_PRECOPY_INFO: `buffer` holds a PrecopyInfo and takes the answer; the caller's argsz stays.

    `opted_in` is whether the device was given MIG_PRECOPY_INFOV2. Without it the caller gets its own flags back: before
    flags had a meaning, drivers copied the structure in and out again and never set them, and the kernel keeps to that.
    With it they are the device's: REINIT or none. Source: Linux commits d7140b5dde45 and 50ff3f404617 (Yishai Hadas,
    series 20260317161753.18964).

    Raises OSError: EFAULT for a short buffer, as device_feature(); EINVAL for an argsz shorter than the structure; what
    the data fd answers, EINVAL outside of PRE_COPY and PRE_COPY_P2P.
    """
    if len(buffer) < PrecopyInfo.SIZE:
        raise OSError(errno.EFAULT, f"the buffer has {len(buffer)} bytes, the structure {PrecopyInfo.SIZE}")
    asked = PrecopyInfo.members(buffer)
    if asked["argsz"] < PrecopyInfo.SIZE:
        raise OSError(errno.EINVAL, f"argsz {asked['argsz']}: the structure has {PrecopyInfo.SIZE} bytes")
    if len(buffer) < asked["argsz"]:
        raise OSError(errno.EFAULT, f"argsz {asked['argsz']}, but the buffer has {len(buffer)} bytes")
    info = await fd.precopy_info()
    flags = info.flags if opted_in else PrecopyFlags(asked["flags"])
    answer = PrecopyInfo(info.initial_bytes, info.dirty_bytes, flags).pack()
    after_argsz = offset_of(PrecopyInfo, "flags")
    buffer[after_argsz : PrecopyInfo.SIZE] = answer[after_argsz:]
