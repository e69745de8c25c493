# SPDX-License-Identifier: GPL-2.0-or-later
"""Which device a name is of: a tree of files in place of sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto_v3.errors import UserError
from sim.real.sysfs import find, module_parameters, module_version, names

UUID = "00000000-0000-0000-0000-000000000001"
ADDRESS = "0000:3b:00.2"


def add_device(
    root: Path, bus: str, name: str, driver: str | None, cdev: str | None = None, group: str | None = None
) -> None:
    device = root / "sys/devices" / bus / name
    device.mkdir(parents=True)
    (root / "sys/bus" / bus / "devices").mkdir(parents=True, exist_ok=True)
    (root / "sys/bus" / bus / "devices" / name).symlink_to(device)
    (device / "subsystem").symlink_to(root / "sys/bus" / bus)
    (root / "sys/class/vfio-dev").mkdir(parents=True, exist_ok=True)
    (root / "dev/vfio/devices").mkdir(parents=True, exist_ok=True)
    if driver is not None:
        folder, module = root / "sys/bus" / bus / "drivers" / driver, root / "sys/module" / driver
        for each in (folder, module / "parameters"):
            each.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(folder)
        if not (folder / "module").exists():
            (folder / "module").symlink_to(module)
        (module / "parameters/size_kib").write_text("4096\n")
        (module / "version").write_text("0.1\n")
    if cdev is not None:
        (device / "vfio-dev" / cdev).mkdir(parents=True)
        (device / "vfio-dev" / cdev / "device").symlink_to(device)
        (root / "sys/class/vfio-dev" / cdev).symlink_to(device / "vfio-dev" / cdev)
        (root / "dev/vfio/devices" / cdev).touch()
    if group is not None:
        (root / "sys/kernel/iommu_groups" / group).mkdir(parents=True, exist_ok=True)
        (device / "iommu_group").symlink_to(root / "sys/kernel/iommu_groups" / group)
        (root / "dev/vfio" / group).touch()


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    add_device(tmp_path, "mdev", UUID, "mtty", "vfio0", "0")
    add_device(tmp_path, "pci", ADDRESS, "mlx5_vfio_pci", "vfio12", "7")
    add_device(tmp_path, "pci", "0000:3b:00.3", "mlx5_core", None, "7")
    add_device(tmp_path, "pci", "0000:3b:00.4", None)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (UUID, UUID),
        (ADDRESS, ADDRESS),
        ("3b:00.2", ADDRESS),
        ("/dev/vfio/devices/vfio12", ADDRESS),
        ("vfio0", UUID),
        (f"/sys/bus/pci/devices/{ADDRESS}", ADDRESS),
        (f"/sys/bus/pci/devices/{ADDRESS}/", ADDRESS),
    ],
)
def test_a_device_is_found_by_each_of_its_names(machine: Path, name: str, found: str) -> None:
    assert find(name, machine).name == found


def test_what_sysfs_says_of_a_device(machine: Path) -> None:
    entry = find(ADDRESS, machine)
    assert (entry.driver, entry.module) == ("mlx5_vfio_pci", "mlx5_vfio_pci")
    assert entry.cdev == machine / "dev/vfio/devices/vfio12"
    assert entry.group == machine / "dev/vfio/7"
    assert module_parameters(entry.module, machine) == {"size_kib": "4096"}
    assert module_version(entry.module, machine) == "0.1"
    assert names(machine) == [UUID, ADDRESS]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("0000:3b:00.3", "is bound to mlx5_core, which is no VFIO driver"),
        ("0000:3b:00.4", "is bound to no driver"),
        ("0000:3b:00.5", f"there is no such device; VFIO devices here: {UUID}, {ADDRESS}"),
        ("0000:3b:00.?", "there is no such device"),
        ("/dev/vfio/devices/vfio9", "there is no such device"),
        ("/sys/bus/pci", "there is no such device"),
        ("", "there is no such device"),
    ],
)
def test_a_name_that_is_of_no_vfio_device_is_refused(machine: Path, name: str, why: str) -> None:
    with pytest.raises(UserError) as error:
        find(name, machine)
    assert str(error.value).startswith(f"{name}: ")
    assert why in str(error.value)


def test_a_device_without_a_group_or_a_cdev(machine: Path) -> None:
    add_device(machine, "platform", "sample.0", "sample", "vfio3")
    assert find("sample.0", machine).group is None
    (machine / "dev/vfio/devices/vfio0").unlink()
    assert find(UUID, machine).cdev is None
