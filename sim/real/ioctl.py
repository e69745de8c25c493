# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctl() with the structures of the headers. Errors are OSError with the kernel's errno. Each call may block."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
from typing import TypeVar

from proto_v3.vfio.uapi import VFIO_DEVICE_FEATURE, DeviceFeature, Feature, FeatureOp, Structure

S = TypeVar("S", bound=Structure)


def call(fd: int, number: int, argument: S) -> S:
    """An ioctl that takes a structure; returns the structure as the kernel left it."""
    buffer = bytearray(argument.pack())
    fcntl.ioctl(fd, number, buffer)
    return type(argument).unpack(buffer)


def feature(fd: int, flags: int, data: bytes = b"") -> bytes:
    """VFIO_DEVICE_FEATURE on a device fd: `flags` are a Feature and FeatureOp bits. Returns the data as the kernel left
    it."""
    buffer = bytearray(DeviceFeature(DeviceFeature.SIZE + len(data), flags).pack() + data)
    fcntl.ioctl(fd, VFIO_DEVICE_FEATURE, buffer)
    return bytes(buffer[DeviceFeature.SIZE :])


def get_feature(fd: int, number: Feature, kind: type[S]) -> S:
    """GET of a feature whose data is this structure."""
    return kind.unpack(feature(fd, number | FeatureOp.GET, bytes(kind.SIZE)))


def set_feature(fd: int, number: Feature, data: Structure | None = None) -> bytes:
    """SET of a feature. Returns the data as the kernel left it."""
    return feature(fd, number | FeatureOp.SET, b"" if data is None else data.pack())


def has_feature(fd: int, number: Feature, op: FeatureOp) -> bool:
    """Whether the device answers a PROBE of this operation of a feature."""
    try:
        feature(fd, number | op | FeatureOp.PROBE)
    except OSError:
        return False
    return True


def address_of(buffer: bytearray | mmap.mmap) -> int:
    """The address of a buffer's first byte. It must not be resized or freed while the kernel uses it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
