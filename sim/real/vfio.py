# SPDX-License-Identifier: GPL-2.0-or-later
"""Opening VFIO devices of the running kernel: by cdev and iommufd, or by group and container.

What the user can mend is a UserError; anything else an OSError with the kernel's errno. Linux 7.1,
drivers/vfio/device_cdev.c and drivers/vfio/group.c say when which errno comes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proto_v3.errors import UserError
from proto_v3.vfio.uapi import Feature, FeatureMigration, MigrationFlags
from sim.real.ioctl import call, get_feature
from sim.real.iommu import CONTAINER, IOMMUFD, AddressSpace, Container, Iommufd
from sim.real.sysfs import DeviceEntry
from sim.real.uapi import (
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_DEVICE_BIND_IOMMUFD,
    VFIO_GROUP_GET_DEVICE_FD,
    VFIO_GROUP_GET_STATUS,
    VFIO_GROUP_SET_CONTAINER,
    AttachIommufdPt,
    BindIommufd,
    GroupFlags,
    GroupStatus,
)

CDEV, GROUP = "cdev", "group"
WAYS = (CDEV, GROUP)
IN_USE = "is in use by another process, as a VMM"


@dataclass(slots=True)
class OpenDevice:
    """A device that this process has open."""

    entry: DeviceEntry
    fd: int

    def migration_flags(self) -> MigrationFlags:
        """VFIO_DEVICE_FEATURE_MIGRATION. UserError if the device does not migrate."""
        try:
            return get_feature(self.fd, Feature.MIGRATION, FeatureMigration).flags
        except OSError as error:
            if error.errno == errno.ENOTTY:
                raise UserError(
                    f"{self.entry.name}: its driver, {self.entry.driver}, does not migrate this device "
                    "(VFIO_DEVICE_FEATURE_MIGRATION: ENOTTY)"
                ) from None
            raise


class OpenDevices:
    """Devices that this process has open, in one address space. Use it as a context, or close it."""

    def __init__(self, entries: Sequence[DeviceEntry], way: str | None = None) -> None:
        """`way`: CDEV or GROUP; None: CDEV where all devices have one.

        UserError if a device cannot be opened for a reason that the user can mend, else OSError.
        """
        self.devices: list[OpenDevice] = []
        self._groups: dict[Path, int] = {}
        self.way = way or _way_for(entries)
        self.space: AddressSpace = _iommufd() if self.way == CDEV else _container()
        try:
            for entry in entries:
                with _explained(entry):
                    fd = self._by_cdev(entry) if self.way == CDEV else self._by_group(entry)
                    self.devices.append(OpenDevice(entry, fd))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenDevices:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close devices, groups and address space. May be called again."""
        while self.devices:
            os.close(self.devices.pop().fd)
        while self._groups:
            os.close(self._groups.popitem()[1])
        self.space.close()

    # --- by cdev and iommufd ------------------------------------------------------------------------------------------

    def _by_cdev(self, entry: DeviceEntry) -> int:
        if entry.cdev is None:
            raise UserError(f"{entry.name}: has no /dev/vfio/devices/vfioN (CONFIG_VFIO_DEVICE_CDEV)")
        assert isinstance(self.space, Iommufd)
        fd = _opened(entry.cdev)
        try:
            call(fd, VFIO_DEVICE_BIND_IOMMUFD, BindIommufd(BindIommufd.SIZE, 0, self.space.fd))
            call(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, AttachIommufdPt(AttachIommufdPt.SIZE, 0, self.space.ioas))
        except BaseException:
            os.close(fd)
            raise
        return fd

    # --- by group and container ---------------------------------------------------------------------------------------

    def _by_group(self, entry: DeviceEntry) -> int:
        if entry.group is None:
            raise UserError(f"{entry.name}: has no /dev/vfio/GROUP (CONFIG_VFIO_GROUP)")
        assert isinstance(self.space, Container)
        if entry.group not in self._groups:
            group = self._groups[entry.group] = _opened(entry.group)
            status = GroupFlags(call(group, VFIO_GROUP_GET_STATUS, GroupStatus(GroupStatus.SIZE)).flags)
            if GroupFlags.VIABLE not in status:
                raise UserError(
                    f"{entry.name}: its group, {entry.group.name}, is not viable: all devices in it "
                    "(/sys/kernel/iommu_groups) must be bound to vfio drivers"
                )
            fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, bytearray(self.space.fd.to_bytes(4, sys.byteorder)))
            self.space.set_iommu()
        name = bytearray(entry.name.encode() + b"\0")
        fd: int = fcntl.ioctl(self._groups[entry.group], VFIO_GROUP_GET_DEVICE_FD, name)
        return fd


def _way_for(entries: Sequence[DeviceEntry]) -> str:
    return CDEV if all(entry.cdev for entry in entries) and IOMMUFD.exists() else GROUP


def _iommufd() -> Iommufd:
    with _explained_file(IOMMUFD):
        return Iommufd()


def _container() -> Container:
    """The container; an iommufd in its place where there is no IOMMU of type 1."""
    for path in (CONTAINER, IOMMUFD):
        with contextlib.suppress(FileNotFoundError), _explained_file(path, missing=False):
            container = Container(path)
            if container.has_type1:
                return container
            container.close()
    raise UserError(f"{CONTAINER}: this kernel has no IOMMU for VFIO groups (module vfio_iommu_type1)")


@contextlib.contextmanager
def _explained_file(path: Path, *, missing: bool = True) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise UserError(f"{path}: this user may not open it; be root, or change its owner") from None
    except FileNotFoundError:
        if missing:
            raise UserError(f"{path}: is not there: this kernel has no iommufd, or it is not loaded") from None
        raise


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


@contextlib.contextmanager
def _explained(entry: DeviceEntry) -> Iterator[None]:
    """Make a UserError of an OSError whose reason the user can mend."""
    try:
        yield
    except OSError as error:
        of = error.filename or entry.name
        match error.errno:
            case errno.EACCES:
                raise UserError(f"{of}: this user may not open it; be root, or change its owner") from None
            case errno.EBUSY:
                raise UserError(f"{entry.name}: {IN_USE}, or as its group") from None
            case errno.EPERM | errno.EINVAL if error.filename is None:
                raise UserError(
                    f"{entry.name}: the kernel does not give it to this process ({error.strerror}): it, or another "
                    "device of its IOMMU group, is in use or bound to another driver"
                ) from None
        raise
