# SPDX-License-Identifier: GPL-2.0-or-later
"""The address space of a VMM's devices: memory mapped for DMA, and the devices' own logs of what they wrote to.

Two ways lead there: an iommufd, to which device cdevs are bound, or a container, in which groups are put. A VMM uses
one of them for all its devices.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Protocol

from proto_v3.vfio.uapi import Feature, FeatureOp
from sim.real.ioctl import address_of, call, feature, has_feature
from sim.real.uapi import (
    IOMMU_IOAS_ALLOC,
    IOMMU_IOAS_MAP,
    IOMMU_IOAS_MAP_FIXED_IOVA,
    IOMMU_IOAS_MAP_READABLE,
    IOMMU_IOAS_MAP_WRITEABLE,
    IOMMU_IOAS_UNMAP,
    VFIO_CHECK_EXTENSION,
    VFIO_DMA_MAP_FLAG_READ,
    VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_UNMAP_DMA,
    VFIO_SET_IOMMU,
    VFIO_TYPE1V2_IOMMU,
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
    IoasAlloc,
    IoasMap,
    IoasUnmap,
    MapDma,
    UnmapDma,
)

IOMMUFD = Path("/dev/iommu")
CONTAINER = Path("/dev/vfio/vfio")


class AddressSpace(Protocol):
    """Where devices of a VMM find memory by DMA. Errors are OSError with the kernel's errno."""

    way: str
    """How it was made, in words."""

    def map(self, memory: mmap.mmap, iova: int) -> None:
        """Let the devices read and write all of this memory at `iova`. It is pinned until unmap() or close()."""

    def unmap(self, iova: int, size_bytes: int) -> None:
        """Take memory back that was mapped."""

    def close(self) -> None:
        """Close it, after its devices. May be called again."""


class Iommufd(AddressSpace):
    """An iommufd with one IO address space."""

    way = "cdev and iommufd"

    def __init__(self, path: Path = IOMMUFD) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.ioas = call(self.fd, IOMMU_IOAS_ALLOC, IoasAlloc(IoasAlloc.SIZE)).out_ioas_id
        except BaseException:
            os.close(self.fd)
            raise

    def map(self, memory: mmap.mmap, iova: int) -> None:
        """IOMMU_IOAS_MAP."""
        flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_WRITEABLE | IOMMU_IOAS_MAP_READABLE
        call(self.fd, IOMMU_IOAS_MAP, IoasMap(flags, self.ioas, address_of(memory), len(memory), iova))

    def unmap(self, iova: int, size_bytes: int) -> None:
        """IOMMU_IOAS_UNMAP."""
        call(self.fd, IOMMU_IOAS_UNMAP, IoasUnmap(self.ioas, iova, size_bytes))

    def close(self) -> None:
        """Close the iommufd."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Container(AddressSpace):
    """A container, with an IOMMU of type 1. Its IOMMU is set once the first group is in it."""

    way = "group and container"

    def __init__(self, path: Path) -> None:
        """`path`: CONTAINER; or IOMMUFD, which takes groups as well (Linux, drivers/iommu/iommufd/vfio_compat.c)."""
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._set = False
        if path == IOMMUFD:
            self.way = "group and iommufd"

    @property
    def has_type1(self) -> bool:
        """Whether there is an IOMMU of type 1, in its second version."""
        return bool(fcntl.ioctl(self.fd, VFIO_CHECK_EXTENSION, VFIO_TYPE1V2_IOMMU))

    def set_iommu(self) -> None:
        """VFIO_SET_IOMMU, after the first group was put in."""
        if not self._set:
            fcntl.ioctl(self.fd, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU)
            self._set = True

    def map(self, memory: mmap.mmap, iova: int) -> None:
        """VFIO_IOMMU_MAP_DMA."""
        flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE
        call(self.fd, VFIO_IOMMU_MAP_DMA, MapDma(flags, address_of(memory), iova, len(memory)))

    def unmap(self, iova: int, size_bytes: int) -> None:
        """VFIO_IOMMU_UNMAP_DMA."""
        call(self.fd, VFIO_IOMMU_UNMAP_DMA, UnmapDma(0, iova, size_bytes))

    def close(self) -> None:
        """Close the container."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# --- what a device wrote to -------------------------------------------------------------------------------------------


class DmaLog:
    """A device's log of the pages that it wrote to by DMA: VFIO_DEVICE_FEATURE_DMA_LOGGING_*."""

    def __init__(self, device_fd: int, page_bytes: int) -> None:
        self._fd = device_fd
        self._page_bytes = page_bytes
        self.started = False

    @property
    def exists(self) -> bool:
        """Whether the device has such a log."""
        return has_feature(self._fd, Feature.DMA_LOGGING_START, FeatureOp.SET)

    def start(self, iova: int, size_bytes: int) -> None:
        """Log writes to this range from now on."""
        ranges = bytearray(DmaLoggingRange(iova, size_bytes).pack())
        control = DmaLoggingControl(self._page_bytes, 1, 0, address_of(ranges))
        feature(self._fd, Feature.DMA_LOGGING_START | FeatureOp.SET, control.pack())
        self.started = True

    def report(self, iova: int, size_bytes: int) -> bytes:
        """A bit for each page of this range, the lowest bit of a byte first, set if the device wrote to the page since
        the last report of it."""
        words = -(-size_bytes // self._page_bytes // 64)
        bitmap = bytearray(8 * words)
        asked = DmaLoggingReport(iova, size_bytes, self._page_bytes, address_of(bitmap))
        feature(self._fd, Feature.DMA_LOGGING_REPORT | FeatureOp.GET, asked.pack())
        return bytes(bitmap)

    def stop(self) -> None:
        """Log no more. May be called if it does not log."""
        if self.started:
            self.started = False
            feature(self._fd, Feature.DMA_LOGGING_STOP | FeatureOp.SET)
