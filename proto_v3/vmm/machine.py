# SPDX-License-Identifier: GPL-2.0-or-later
"""The port of what a VMM owns besides the VFIO devices: vCPUs, guest RAM, device config.

RAM is here because it shares the link and the downtime with the devices. It is not studied for itself.
"""

from __future__ import annotations

from typing import Protocol

from proto_v3.wire.frames import Payload


class GuestRam(Protocol):
    """Guest RAM with its dirty bitmap."""

    def pending_bytes(self) -> int:
        """Bytes of the pages known to be dirty (since the last sync) and not yet taken."""

    passes: int
    """How many times the search for dirty pages came to the end of RAM. A page is taken twice only if this grew in
    between."""

    async def sync(self) -> None:
        """Fetch the dirty bitmap."""

    async def final_sync(self) -> None:
        """Fetch it for the last time, with vCPUs and devices stopped."""

    async def final_scan(self) -> None:
        """Walk over all of it for the last time; the dirty pages are then pending."""

    async def take(self, budget_ns: int) -> Payload | None:
        """Prepare the next pages, for at most `budget_ns` of work. None if no page is pending."""

    async def load(self, payload: Payload) -> None:
        """Put pages in place, at the target."""


class Machine(Protocol):
    """The guest of one VMM, without its VFIO devices."""

    @property
    def ram(self) -> GuestRam:
        """Its RAM."""

    @property
    def running(self) -> bool:
        """Whether the vCPUs run."""

    async def set_up(self) -> None:
        """Take the time that a migration costs before its first byte."""

    async def stop_vcpus(self) -> None:
        """Stop the vCPUs; return when none runs."""

    async def buffer_device_data(self, size_bytes: int) -> None:
        """Copy device data through the main channel's own buffers (QEMUFile: 32 KiB), at either side.

        Only v2's single channel does this. multifd and v3 send, and write(), from the buffer that was read into.
        """

    async def copy_packet(self, size_bytes: int) -> None:
        """Copy device data into a packet of multifd at the source, or out of it at the target."""

    async def sync_channels(self, count: int) -> None:
        """What it takes the source's migration thread to have so many channels of multifd synced."""

    async def close_channels(self, count: int) -> None:
        """Shut down the channels of multifd at the target: no more data comes."""

    async def wake_up(self) -> None:
        """Let the time pass that a thread of the VMM takes to run again after it waited for another one."""

    async def load_other_devices(self) -> None:
        """Load the state of all devices that are not VFIO devices, before the config of those."""

    async def load_config(self, device: int) -> None:
        """Load a device's config space and interrupts, one device at a time (QEMU's big lock), or all at once if the
        VMM's settings say so."""

    async def start_vcpus(self) -> None:
        """Start the vCPUs; return when the guest runs."""
