# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers and structures beside those of migration: how a VFIO device is opened, and how memory is mapped for its DMA.

Sources: Linux 7.1 `include/uapi/linux/vfio.h` and `include/uapi/linux/iommufd.h`. What migration itself needs is in
proto_v3/vfio/uapi.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from proto_v3.vfio.uapi import S32, U32, U64, Structure


def _vfio(number: int) -> int:
    """`_IO(VFIO_TYPE, VFIO_BASE + number)`."""
    vfio_type, vfio_base = ord(";"), 100
    return vfio_type << 8 | vfio_base + number


def _iommufd(number: int) -> int:
    """`_IO(IOMMUFD_TYPE, number)`. The type is VFIO's, the numbers begin above VFIO's."""
    iommufd_type = ord(";")
    return iommufd_type << 8 | number


# --- the device -------------------------------------------------------------------------------------------------------

VFIO_DEVICE_GET_INFO = _vfio(7)
VFIO_DEVICE_GET_REGION_INFO = _vfio(8)
VFIO_DEVICE_BIND_IOMMUFD = _vfio(18)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _vfio(19)


class InfoFlags(enum.IntFlag):
    """Flags of VFIO_DEVICE_GET_INFO (`VFIO_DEVICE_FLAGS_*`), those that are of interest here."""

    RESET = 1 << 0
    PCI = 1 << 1


@dataclass(frozen=True, slots=True)
class DeviceInfo(Structure):
    """`struct vfio_device_info`."""

    argsz: U32
    flags: U32 = 0
    num_regions: U32 = 0
    num_irqs: U32 = 0
    cap_offset: U32 = 0
    pad: U32 = 0


@dataclass(frozen=True, slots=True)
class RegionInfo(Structure):
    """`struct vfio_region_info`: where a region is in the device fd."""

    argsz: U32
    flags: U32
    index: U32
    cap_offset: U32 = 0
    size: U64 = 0
    offset: U64 = 0


@dataclass(frozen=True, slots=True)
class BindIommufd(Structure):
    """`struct vfio_device_bind_iommufd`."""

    argsz: U32
    flags: U32
    iommufd: S32
    out_devid: U32 = 0


@dataclass(frozen=True, slots=True)
class AttachIommufdPt(Structure):
    """`struct vfio_device_attach_iommufd_pt`."""

    argsz: U32
    flags: U32
    pt_id: U32


# --- group and container ----------------------------------------------------------------------------------------------

VFIO_CHECK_EXTENSION = _vfio(1)
VFIO_SET_IOMMU = _vfio(2)
VFIO_GROUP_GET_STATUS = _vfio(3)
VFIO_GROUP_SET_CONTAINER = _vfio(4)
VFIO_GROUP_GET_DEVICE_FD = _vfio(6)
VFIO_IOMMU_MAP_DMA = _vfio(13)
VFIO_IOMMU_UNMAP_DMA = _vfio(14)

VFIO_TYPE1V2_IOMMU = 3
VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE = 1 << 0, 1 << 1


class GroupFlags(enum.IntFlag):
    """Flags of VFIO_GROUP_GET_STATUS (`VFIO_GROUP_FLAGS_*`)."""

    VIABLE = 1 << 0
    CONTAINER_SET = 1 << 1


@dataclass(frozen=True, slots=True)
class GroupStatus(Structure):
    """`struct vfio_group_status`."""

    argsz: U32
    flags: U32 = 0


@dataclass(frozen=True, slots=True)
class MapDma(Structure):
    """`struct vfio_iommu_type1_dma_map`."""

    argsz: U32 = field(default=32, init=False)
    flags: U32
    vaddr: U64
    iova: U64
    size: U64


@dataclass(frozen=True, slots=True)
class UnmapDma(Structure):
    """`struct vfio_iommu_type1_dma_unmap`."""

    argsz: U32 = field(default=24, init=False)
    flags: U32
    iova: U64
    size: U64


# --- iommufd ----------------------------------------------------------------------------------------------------------

IOMMU_DESTROY = _iommufd(0x80)
IOMMU_IOAS_ALLOC = _iommufd(0x81)
IOMMU_IOAS_MAP = _iommufd(0x85)
IOMMU_IOAS_UNMAP = _iommufd(0x86)

IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_MAP_WRITEABLE, IOMMU_IOAS_MAP_READABLE = 1 << 0, 1 << 1, 1 << 2


@dataclass(frozen=True, slots=True)
class IoasAlloc(Structure):
    """`struct iommu_ioas_alloc`."""

    size: U32
    flags: U32 = 0
    out_ioas_id: U32 = 0


@dataclass(frozen=True, slots=True)
class IoasMap(Structure):
    """`struct iommu_ioas_map`."""

    size: U32 = field(default=40, init=False)
    flags: U32
    ioas_id: U32
    reserved: U32 = field(default=0, init=False)
    user_va: U64
    length: U64
    iova: U64


@dataclass(frozen=True, slots=True)
class IoasUnmap(Structure):
    """`struct iommu_ioas_unmap`."""

    size: U32 = field(default=24, init=False)
    ioas_id: U32
    iova: U64
    length: U64


# --- the device's log of its DMA --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DmaLoggingControl(Structure):
    """`struct vfio_device_feature_dma_logging_control`: data of DMA_LOGGING_START, SET."""

    page_size: U64
    num_ranges: U32
    reserved: U32
    ranges: U64  # address of an array of DmaLoggingRange


@dataclass(frozen=True, slots=True)
class DmaLoggingRange(Structure):
    """`struct vfio_device_feature_dma_logging_range`."""

    iova: U64
    length: U64


@dataclass(frozen=True, slots=True)
class DmaLoggingReport(Structure):
    """`struct vfio_device_feature_dma_logging_report`: data of DMA_LOGGING_REPORT, GET."""

    iova: U64
    length: U64
    page_size: U64
    bitmap: U64  # address: a bit a page, the lowest bit of a byte first; the kernel sets bits and clears none
