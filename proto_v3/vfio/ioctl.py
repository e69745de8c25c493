# SPDX-License-Identifier: GPL-2.0-or-later
"""The migration ioctls on bytes: VFIO_DEVICE_FEATURE and the ioctls of a data fd, on a caller's buffer.

They call the port (proto_v3.vfio.device), as the kernel's core calls its drivers, and check in the same order with the
same errno. Source: Linux 7.1 `drivers/vfio/vfio_main.c`, vfio_ioctl_device_feature() and what it calls;
`include/linux/vfio.h`, vfio_check_feature() and vfio_check_precopy_ioctl(). Differences are stated where they are. The
calls of v3 are experimental; their source is docs/vfio_v3.h.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from operator import or_

from proto_v3.vfio.device import BlocksFd, DataFd, MigrationDevice
from proto_v3.vfio.fsm import STATES
from proto_v3.vfio.uapi import (
    FEATURE_MASK,
    VFIO_MIG_GET_DIRTY_BLOCKS,
    VFIO_MIG_GET_PRECOPY_INFO,
    VFIO_MIG_GET_STREAM,
    VFIO_MIG_GET_STREAM_INFO,
    DeviceFeature,
    Feature,
    FeatureMigDataSize,
    FeatureMigration,
    FeatureMigState,
    FeatureMigStreams,
    FeatureOp,
    GetDirtyBlocks,
    GetStream,
    MigrationFlags,
    PrecopyFlags,
    PrecopyInfo,
    State,
    StreamInfo,
    Structure,
    offset_of,
)

GET_OR_SET = FeatureOp.GET | FeatureOp.SET
KNOWN_FLAGS = FEATURE_MASK | int(GET_OR_SET | FeatureOp.PROBE)  # an int: ~ of a Flag has only the bits of the Flag

FEATURES: dict[int, tuple[FeatureOp, int]] = {
    Feature.MIGRATION: (FeatureOp.GET, FeatureMigration.SIZE),
    Feature.MIG_DEVICE_STATE: (GET_OR_SET, FeatureMigState.SIZE),
    Feature.MIG_DATA_SIZE: (FeatureOp.GET, FeatureMigDataSize.SIZE),
    Feature.MIG_PRECOPY_INFOV2: (FeatureOp.SET, 0),
    Feature.MIG_STREAMS: (GET_OR_SET, FeatureMigStreams.SIZE),
}
"""The operations of each feature, and the bytes of data that it needs. DMA logging is not modelled, because the
simulated VMM tracks the guest's memory: it fails with ENOTTY, as on a device without it."""


async def device_feature(
    device: MigrationDevice, buffer: bytearray, install_fd: Callable[[DataFd], int]
) -> DataFd | None:
    """VFIO_DEVICE_FEATURE: `buffer` holds a DeviceFeature and its data, and receives the answer.

    If SET of MIG_DEVICE_STATE begins a session, the data fd is returned, too. `install_fd` gives it the number that the
    caller reads in data_fd, and may refuse with OSError (EMFILE). data_fd is -1 if there is no fd, and after a SET that
    the device or `install_fd` refused. Any other error leaves the buffer unchanged.

    Raises OSError:
    - EFAULT if the buffer is shorter than the header, or than header and data. A larger argsz is never looked at.
    - EINVAL for an argsz shorter than header and data, an unknown flag, GET with SET, neither of them, an operation
      that the feature does not have, a state that does not exist, MIG_PRECOPY_INFOV2 without PRE_COPY. A PROBE accepts
      GET with SET and neither of them, and needs no data.
    - ENOTTY for an unknown feature, on a device that does not migrate, or for MIG_STREAMS on a device without it.
    - the errors of the device; it answers unknown flags of MIG_STREAMS with EINVAL.
    """
    header = _header(buffer)
    number = header.flags & FEATURE_MASK
    if number not in FEATURES:
        raise OSError(errno.ENOTTY, f"no feature {number}")
    features = await device.migration_flags()
    if number == Feature.MIG_PRECOPY_INFOV2:
        # The kernel checks only the flags here, so a device that does not migrate returns EINVAL, not ENOTTY.
        if MigrationFlags.PRE_COPY not in features:
            raise OSError(errno.EINVAL, "this device has no PRE_COPY")
    elif not features:
        raise OSError(errno.ENOTTY, "this device does not migrate")
    elif number == Feature.MIG_STREAMS:
        await device.streams()  # ENOTTY if the device does not have them, before the operation is looked at
    ops, data_bytes = FEATURES[number]
    _check_op(header, ops, data_bytes)
    if header.flags & FeatureOp.PROBE:
        return None
    if len(buffer) < DeviceFeature.SIZE + data_bytes:
        raise OSError(errno.EFAULT, f"a buffer of {len(buffer)} bytes has no room for {data_bytes} bytes of data")

    if number == Feature.MIGRATION:
        _put(buffer, FeatureMigration(features))
    elif number == Feature.MIG_DATA_SIZE:
        _put(buffer, FeatureMigDataSize(await device.stop_copy_bytes()))
    elif number == Feature.MIG_PRECOPY_INFOV2:
        await device.set_precopy_info_v2()
    elif number == Feature.MIG_STREAMS and header.flags & FeatureOp.GET:
        _put(buffer, await device.streams())
    elif number == Feature.MIG_STREAMS:
        asked = FeatureMigStreams.unpack(buffer[DeviceFeature.SIZE :])
        await device.set_streams(asked.dirty_streams, asked.flags)
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
    _put(buffer, FeatureMigState(target, data_fd=-1))  # if it fails from here on, no stale number is read as a data fd
    if target not in STATES:
        raise OSError(errno.EINVAL, f"there is no state {target}")
    fd = await device.set_state(State(target))
    if fd is not None:
        _put(buffer, FeatureMigState(target, install_fd(fd)))
    return fd


async def get_precopy_info(fd: DataFd, buffer: bytearray, *, opted_in: bool) -> None:
    """VFIO_MIG_GET_PRECOPY_INFO: `buffer` holds a PrecopyInfo and receives the answer; the caller's argsz stays.

    `opted_in`: whether MIG_PRECOPY_INFOV2 was set on the device. If not, the flags stay the caller's: before flags had
    a meaning, drivers copied the structure in and out and never set them, and the kernel keeps that behaviour. If it
    was, the flags are the device's: REINIT or none. Source: Linux commits d7140b5dde45 and 50ff3f404617 (Yishai Hadas,
    series 20260317161753.18964).

    Raises OSError: ENOTTY on an fd that does not know the ioctl, as one that is loaded; EFAULT for a short buffer, as
    device_feature(); EINVAL for an argsz shorter than the structure; the errors of the data fd, among them EINVAL
    outside of PRE_COPY and PRE_COPY_P2P.
    """
    _check_known(fd, VFIO_MIG_GET_PRECOPY_INFO)
    asked = _asked(PrecopyInfo, buffer)
    info = await fd.precopy_info()
    flags = info.flags if opted_in else PrecopyFlags(asked["flags"])
    _answer(buffer, PrecopyInfo(info.initial_bytes, info.dirty_bytes, flags=flags))


def _check_known(fd: DataFd, number: int) -> None:
    """ENOTTY if the fd does not know the ioctl. Drivers look at that first, the kernel for a driver without ioctls."""
    if not fd.has_ioctl(number):
        raise OSError(errno.ENOTTY, f"the fd does not know ioctl {number:#x}")


def _asked(structure: type[Structure], buffer: bytearray) -> dict[str, int]:
    """The members of the caller's structure. EFAULT or EINVAL if it is incomplete, in the kernel's order of checks."""
    if len(buffer) < structure.SIZE:
        raise OSError(errno.EFAULT, f"the buffer has {len(buffer)} bytes, the structure {structure.SIZE}")
    asked = structure.members(buffer)
    if asked["argsz"] < structure.SIZE:
        raise OSError(errno.EINVAL, f"argsz {asked['argsz']}: the structure has {structure.SIZE} bytes")
    return asked


def _answer(buffer: bytearray, structure: Structure) -> None:
    """Write the answer to the caller's buffer, except argsz."""
    after_argsz = offset_of(type(structure), "flags")
    buffer[after_argsz : structure.SIZE] = structure.pack()[after_argsz:]


# --- v3, experimental -------------------------------------------------------------------------------------------------


def _asked_without_flags(structure: type[Structure], buffer: bytearray) -> dict[str, int]:
    """As _asked(). EINVAL also for any flag, as none is defined."""
    asked = _asked(structure, buffer)
    if asked["flags"]:
        raise OSError(errno.EINVAL, f"flags {asked['flags']:#x}: none is defined")
    return asked


async def get_stream(fd: DataFd, buffer: bytearray, install_fd: Callable[[DataFd], int]) -> DataFd:
    """VFIO_MIG_GET_STREAM: `buffer` holds a GetStream and receives the answer; the dirty fd is returned, too.

    `install_fd` gives it a number, as in device_feature(). It may refuse (EMFILE), and the caller can ask again: the
    file is the session's. Who asks twice gets two descriptors of one file.

    Raises OSError: ENOTTY, EFAULT and EINVAL as get_precopy_info(), EINVAL for flags; these leave the buffer unchanged.
    The errors of the critical fd or of `install_fd`; the fd in the buffer is then -1.
    """
    _check_known(fd, VFIO_MIG_GET_STREAM)
    asked = _asked_without_flags(GetStream, buffer)
    index = asked["index"]
    _answer(buffer, GetStream(asked["argsz"], flags=0, index=index, fd=-1))
    stream = await fd.get_stream(index)
    _answer(buffer, GetStream(asked["argsz"], flags=0, index=index, fd=install_fd(stream)))
    return stream


async def get_stream_info(fd: DataFd, buffer: bytearray) -> None:
    """VFIO_MIG_GET_STREAM_INFO: `buffer` holds a StreamInfo and receives the answer; the caller's argsz stays.

    OSError leaves the buffer unchanged: ENOTTY, EFAULT, EINVAL as get_precopy_info(), EINVAL for flags, errors of the
    data fd.
    """
    _check_known(fd, VFIO_MIG_GET_STREAM_INFO)
    _asked_without_flags(StreamInfo, buffer)
    _answer(buffer, await fd.stream_info())


async def get_dirty_blocks(fd: BlocksFd, buffer: bytearray, bitmap: bytearray) -> None:
    """VFIO_MIG_GET_DIRTY_BLOCKS: `buffer` holds a GetDirtyBlocks and receives the answer, except argsz and the address.

    `bitmap` is the memory at that address. Bits are set in it, and none is cleared.

    Raises OSError: ENOTTY, EFAULT, EINVAL as get_precopy_info(); EINVAL for flags; EFAULT if `bitmap` has fewer bits
    than the caller's `blocks`; EINVAL for fewer bits than the device has blocks, with block_bytes and blocks answered
    all the same; the errors of the data fd. After any of these the fd still reports the same blocks. (A kernel that
    cannot write the bitmap notices it after the driver reported the blocks: EFAULT; the user should then take all as
    dirty.)
    """
    _check_known(fd, VFIO_MIG_GET_DIRTY_BLOCKS)
    asked = _asked_without_flags(GetDirtyBlocks, buffer)
    if asked["blocks"] > 8 * len(bitmap):
        raise OSError(errno.EFAULT, f"a bitmap for {asked['blocks']} blocks, but it has {len(bitmap)} bytes")
    block_bytes, blocks = await fd.geometry()
    size = GetDirtyBlocks(asked["argsz"], 0, block_bytes, blocks, asked["bitmap"])
    if asked["blocks"] < blocks:
        _answer(buffer, size)
        raise OSError(errno.EINVAL, f"a bitmap for {asked['blocks']} blocks, but the device has {blocks}")
    found = await fd.dirty_blocks()
    _answer(buffer, size)
    bitmap[: len(found.bitmap)] = bytes(map(or_, bitmap, found.bitmap))
