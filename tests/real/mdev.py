# SPDX-License-Identifier: GPL-2.0-or-later
"""Mediated devices of the kernel, by sysfs (driver-api/vfio-mediated-device.rst of Linux): created, named, removed."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path

SYSFS_DEVICES = Path("/sys/bus/mdev/devices")
SYSFS_PARENTS = Path("/sys/class/mdev_bus")
DEVICE_NODES = Path("/dev/vfio")
MTTY = ("mtty", "mtty-2")
SAMPLE_MODULE = "vfio_v3_sample"
SAMPLE = (SAMPLE_MODULE, f"{SAMPLE_MODULE}-1")
SAMPLE_PARAMETERS = Path("/sys/module") / SAMPLE_MODULE / "parameters"
SAMPLE_DEBUGFS = Path("/sys/kernel/debug") / SAMPLE_MODULE


@dataclass(frozen=True)
class Mdev:
    """A mediated device that exists until remove()."""

    uuid: str

    @property
    def sysfs(self) -> Path:
        return SYSFS_DEVICES / self.uuid

    @property
    def cdev(self) -> Path:
        """/dev/vfio/devices/vfioN."""
        (name,) = (each.name for each in (self.sysfs / "vfio-dev").iterdir())
        return DEVICE_NODES / "devices" / name

    @property
    def group(self) -> Path:
        """/dev/vfio/N."""
        return DEVICE_NODES / (self.sysfs / "iommu_group").resolve().name

    def remove(self) -> None:
        """Remove the device. The kernel waits until nobody has it open."""
        (self.sysfs / "remove").write_text("1")


class SampleMdev(Mdev):
    """A device of the sample driver: kernel/driver/ says what its files in debugfs hold."""

    @property
    def debugfs(self) -> Path:
        return SAMPLE_DEBUGFS / self.uuid

    def log(self) -> list[str]:
        """The calls of the device since the log was cleared, one line each, the oldest first."""
        return (self.debugfs / "log").read_text().splitlines()

    def clear_log(self) -> None:
        (self.debugfs / "log").write_text("0")

    def digest(self) -> str:
        """A digest of the whole state of the device, as hexadecimal digits."""
        return (self.debugfs / "digest").read_text().strip()

    def reconfigure(self) -> None:
        """Begin a new epoch: critical data changes."""
        (self.debugfs / "reconfigure").write_text("1")

    def dirty(self, first: int, count: int) -> None:
        """Write to `count` blocks of the device, from block `first` on."""
        (self.debugfs / "write").write_text(f"{first} {count}")

    def counters(self) -> str:
        return (self.debugfs / "counters").read_text()


def supported(kind: tuple[str, str]) -> bool:
    """Whether the kernel has the parent device of this kind, (parent, type)."""
    return type_folder(kind).is_dir()


def type_folder(kind: tuple[str, str]) -> Path:
    parent, name = kind
    return SYSFS_PARENTS / parent / "mdev_supported_types" / name


def create(kind: tuple[str, str]) -> str:
    """Create a device of this kind. Returns its UUID, when its nodes in /dev are there."""
    name = str(uuid.uuid4())
    (type_folder(kind) / "create").write_text(name)
    end = time.monotonic() + 5
    while not Mdev(name).cdev.exists():  # devtmpfs makes the node in a thread of its own
        if time.monotonic() > end:
            raise TimeoutError(f"{name} has no node in {DEVICE_NODES}/devices after 5 s")
        time.sleep(0.001)
    return name


def create_mtty() -> Mdev:
    return Mdev(create(MTTY))


def create_sample(**parameters: int | str) -> SampleMdev:
    """A device of the sample driver with these module parameters; the others have the module's own values.

    The driver reads the parameters when a device is created: afterwards they are put back.
    """
    earlier = {name: (SAMPLE_PARAMETERS / name).read_text().strip() for name in parameters}
    try:
        for name, value in parameters.items():
            (SAMPLE_PARAMETERS / name).write_text(str(value))
        return SampleMdev(create(SAMPLE))
    finally:
        for name, value in earlier.items():
            (SAMPLE_PARAMETERS / name).write_text(f"{value}\n")


def sample_parameters() -> dict[str, str]:
    """The sample driver's parameters, as a device that is created now would have them."""
    return {path.name: path.read_text().strip() for path in sorted(SAMPLE_PARAMETERS.iterdir())}
