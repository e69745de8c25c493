"""The port: what a VMM owns besides the devices: vCPUs, guest RAM, device config.

RAM is here because it shares the link and the downtime with the devices, not to be studied for itself.
"""

from __future__ import annotations

from typing import Protocol

from proto_v3.wire.frames import Payload


class GuestRam(Protocol):
    """Guest RAM with its dirty bitmap."""

    def pending_bytes(self) -> int:
        """Bytes of the pages that are known to be dirty (since the last sync), not yet taken."""

    async def sync(self) -> None:
        """Fetch the dirty bitmap."""

    async def final_sync(self) -> None:
        """Fetch it for the last time, vCPUs and devices stopped."""

    async def final_scan(self) -> None:
        """Walk over all of it for the last time; what is dirty is then pending."""

    async def take(self, budget_ns: int) -> Payload | None:
        """Prepare the next pages, working for at most `budget_ns`; None when none is pending."""

    async def load(self, payload: Payload) -> None:
        """Put pages in place, at the target."""


class Machine(Protocol):
    """One VMM's guest, without its VFIO devices."""

    @property
    def ram(self) -> GuestRam:
        """Its RAM."""

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""

    async def set_up(self) -> None:
        """What a migration costs before its first byte."""

    async def stop_vcpus(self) -> None:
        """Return when no vCPU runs any more."""

    async def buffer_device_data(self, size_bytes: int) -> None:
        """Move device data through the main channel's own buffers (QEMUFile: 32 KiB), at either side.

        Only the single channel does it; multifd and v3 send from, and write() from, the buffer that was read into.
        """

    async def load_other_devices(self) -> None:
        """Load the state of all devices that are not VFIO's; it comes before theirs."""

    async def load_config(self, device: int) -> None:
        """Load a device's config space and interrupts: one at a time over all devices (QEMU's big lock)."""

    async def start_vcpus(self) -> None:
        """Return when the guest runs."""
