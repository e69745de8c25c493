# SPDX-License-Identifier: GPL-2.0-or-later
"""What the project's sample driver offers of a device beside VFIO: files in debugfs (kernel/driver/README.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sim.real.sysfs import DeviceEntry

DRIVER = "vfio_v3_sample"
DEBUGFS = Path("sys/kernel/debug") / DRIVER
MAX_DIGEST_CHARS = 128


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """A device's folder in debugfs."""

    folder: Path

    @classmethod
    def of(cls, entry: DeviceEntry, root: Path = Path("/")) -> SampleFiles | None:
        """Those of a device; None if its driver is another one, or debugfs is not there or not for this user."""
        folder = root / DEBUGFS / entry.name
        try:
            return cls(folder) if entry.driver == DRIVER and folder.is_dir() else None
        except PermissionError:
            return None

    def digest(self) -> bytes:
        """A hash of the whole state, as hexadecimal digits. It does not change while the device does not write to
        itself."""
        return (self.folder / "digest").read_text(encoding="ascii").strip()[:MAX_DIGEST_CHARS].encode("ascii")

    def reconfigure(self) -> None:
        """Begin a new epoch now, as a guest does that reconfigures the device."""
        (self.folder / "reconfigure").write_text("1", encoding="ascii")

    def parameters(self) -> dict[str, str]:
        """The device's parameters, as they were when it was created, or changed since."""
        lines = (self.folder / "params").read_text(encoding="ascii").splitlines()
        return {name: value for name, _, value in (line.partition(" ") for line in lines)}

    def set_parameter(self, name: str, value: str) -> None:
        """Change a parameter of this device, if it can be changed while the device is there."""
        (self.folder / "params").write_text(f"{name} {value}", encoding="ascii")
