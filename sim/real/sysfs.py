# SPDX-License-Identifier: GPL-2.0-or-later
"""Which device a name is of, by sysfs, and what sysfs says of it.

A name is a PCI address (`0000:3b:00.2`), the UUID of a mediated device, `/dev/vfio/devices/vfioN`, or a path in sysfs.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from proto_v3.errors import UserError

CDEVS = "/dev/vfio/devices/"
SHORT_PCI = re.compile(r"[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
"""A PCI address without its domain, which is 0000 then, as lspci prints it."""
CDEV = re.compile(r"vfio[0-9]+")


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A device of this machine that a VFIO driver is bound to."""

    name: str
    """Its name on its bus: the PCI address, the UUID."""
    sysfs: Path
    driver: str
    module: str
    """The module that the driver is in; empty if sysfs does not say."""
    cdev: Path | None
    """/dev/vfio/devices/vfioN, if the kernel has made one."""
    group: Path | None
    """/dev/vfio/GROUP, if the device is in an IOMMU group and the kernel has made the file."""


def find(name: str, root: Path = Path("/")) -> DeviceEntry:
    """The device of this name. UserError if there is none, or if it is not bound to a VFIO driver.

    `root`: where sys/ and dev/ are.
    """
    path = _path_of(name, root)
    driver = _link(path / "driver")
    if driver is None:
        raise UserError(f"{name}: is bound to no driver; bind it to its vfio driver first (docs/real.md)")
    cdevs = sorted(each.name for each in (path / "vfio-dev").glob("vfio*"))
    if not cdevs and (root / "sys/class/vfio-dev").is_dir():
        raise UserError(
            f"{name}: is bound to {driver.name}, which is no VFIO driver; bind it to its vfio driver (docs/real.md)"
        )
    module, group = _link(driver / "module"), _link(path / "iommu_group")
    return DeviceEntry(
        name=path.name,
        sysfs=path,
        driver=driver.name,
        module="" if module is None else module.name,
        cdev=_existing(root / "dev/vfio/devices" / cdevs[0]) if cdevs else None,
        group=_existing(root / "dev/vfio" / group.name) if group is not None else None,
    )


def _path_of(name: str, root: Path) -> Path:
    cdev = name.removeprefix(CDEVS)
    if CDEV.fullmatch(cdev):
        places = [root / "sys/class/vfio-dev" / cdev / "device"]
    elif "/" in name:
        places = [root / name.lstrip("/")]
    else:
        name = f"0000:{name}" if SHORT_PCI.fullmatch(name) else name
        places = list((root / "sys/bus").glob(f"*/devices/{_literal(name)}"))
    for place in places:
        if (path := place.resolve()).is_dir() and _is_device(path):
            return path
    raise UserError(f"{name}: there is no such device; VFIO devices here: {', '.join(names(root)) or 'none'}")


def _is_device(path: Path) -> bool:
    return (path / "subsystem").exists() or (path / "driver").exists()


def _literal(name: str) -> str:
    """A glob that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def names(root: Path = Path("/")) -> list[str]:
    """The names of all devices here that a VFIO driver is bound to."""
    return sorted({each.resolve().name for each in (root / "sys/class/vfio-dev").glob("*/device")})


def _link(path: Path) -> Path | None:
    """What a link of sysfs leads to; None if there is none."""
    return path.resolve() if path.exists() else None


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def module_parameters(module: str, root: Path = Path("/")) -> dict[str, str]:
    """The parameters of a module, as far as this user may read them."""
    found = {}
    for path in sorted((root / "sys/module" / module / "parameters").glob("*")) if module else []:
        with contextlib.suppress(OSError):
            found[path.name] = path.read_text(encoding="utf-8", errors="replace").strip()
    return found


def module_version(module: str, root: Path = Path("/")) -> str:
    """The version that a module says it has; empty if it says none."""
    with contextlib.suppress(OSError):
        return (root / "sys/module" / module / "version").read_text(encoding="utf-8", errors="replace").strip()
    return ""
