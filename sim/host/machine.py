# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM's guest without its VFIO devices: vCPUs, RAM, device config (proto_v3.vmm.machine).

RAM is a fluid, not an array. The dirty bytes grow toward the working set W as W x (1 - exp(-rate x time / W)): the
expected number of distinct bytes that are hit by writes spread evenly over W. RAM shares the link and the downtime with
the devices.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

from typing_extensions import override

from proto_v3.timeline import Resource, Timeline
from proto_v3.vmm.machine import GuestRam
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns, sleep_ns
from sim.device.record import Bulk
from sim.device.state import DeviceState
from sim.resource import duration_ns, spend, wake_up
from sim.scenario import screening
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Ram
from sim.scenario.times import device_times
from sim.scenario.units import GIB, MIB, NS_PER_S, PAGE_BYTES

ZERO_PAGE_BYTES = 9
"""A page of zeros on the wire: 8 bytes of offset and flags, 1 of fill (QEMU migration/ram.c, RAM_SAVE_FLAG_ZERO)."""


Pages = Callable[[int], Payload]


class HostRam(GuestRam, Protocol):
    """Guest RAM that is told when the vCPUs stand still."""

    def stop(self) -> None:
        """The vCPUs are stopped: they write to no page any more."""

    def start(self) -> None:
        """The vCPUs run again."""


class RamModel(HostRam):
    """Guest RAM: pages of zeros are scanned, others copied. The first pass takes all of it, later ones dirty pages."""

    def __init__(self, settings: Ram, timeline: Timeline, pages: Pages = Bulk, frames_at_once: int = 1) -> None:
        self._settings = settings
        self._frames_at_once = frames_at_once
        self._pages = pages
        self._timeline = timeline
        self.passes = 0
        self._zero_bytes = round((settings.size_gib - settings.nonzero_gib) * GIB)
        self._dirty_bytes = round(settings.nonzero_gib * GIB)
        self._synced_ns = 0
        self._stopped_ns: int | None = None

    @override
    def pending_bytes(self) -> int:
        return self._zero_bytes + self._dirty_bytes

    @override
    def stop(self) -> None:
        self._stopped_ns = now_ns()

    @override
    def start(self) -> None:
        """While they were stopped, no page became dirty."""
        if self._stopped_ns is not None:
            self._synced_ns += now_ns() - max(self._stopped_ns, self._synced_ns)
            self._stopped_ns = None

    @override
    async def sync(self) -> None:
        await spend(self._timeline, Resource.FIXED, "RAM sync", self._settings.sync_ns)
        self._collect()

    @override
    async def final_sync(self) -> None:
        await spend(self._timeline, Resource.FIXED, "last RAM sync", self._settings.final_sync_ns)
        self._collect()

    @override
    async def final_scan(self) -> None:
        await spend(self._timeline, Resource.FIXED, "last RAM scan", self._settings.final_scan_ns)

    @override
    async def take(self, budget_ns: int) -> Payload | None:
        if self._zero_bytes:
            scan_bytes_per_s = self._settings.scan_bytes_per_s
            scanned = min(self._zero_bytes, max(PAGE_BYTES, int(scan_bytes_per_s * budget_ns / NS_PER_S)))
            await spend(self._timeline, Resource.RAM, "RAM scan", duration_ns(scanned, scan_bytes_per_s))
            self._zero_bytes -= scanned
            return self._pages(-(-scanned // PAGE_BYTES) * ZERO_PAGE_BYTES)
        if self._dirty_bytes:
            size = min(self._dirty_bytes, self._frames_in(budget_ns) * self._settings.frame_bytes)
            await spend(self._timeline, Resource.RAM, "RAM pages", duration_ns(size, self._settings.send_bytes_per_s))
            self._dirty_bytes -= size
            return self._pages(size)
        self.passes += 1
        return None

    def _frames_in(self, budget_ns: int) -> int:
        """How many frames are taken at once: no more than would begin within the budget."""
        if self._frames_at_once == 1:
            return 1
        frame_ns = duration_ns(self._settings.frame_bytes, self._settings.send_bytes_per_s)
        return max(1, min(self._frames_at_once, -(-budget_ns // frame_ns)))

    @override
    async def load(self, payload: Payload) -> None:
        pass  # it costs no time of its own: the target's thread is no slower than the source's, which scans too

    def _collect(self) -> None:
        until = now_ns() if self._stopped_ns is None else self._stopped_ns
        elapsed_s = max(0, until - self._synced_ns) / NS_PER_S
        self._synced_ns = until
        working_set = self._settings.working_set_mib * MIB
        written = self._settings.dirty_bytes_per_s * elapsed_s
        dirtied = round(working_set * -math.expm1(-written / working_set))
        self._dirty_bytes = min(self._dirty_bytes + dirtied, round(self._settings.size_gib * GIB))


class Guest(Protocol):
    """What the guest does to its devices, wherever they are."""

    async def order_stop(self) -> None:
        """The vCPUs are about to be stopped."""

    async def stop(self) -> None:
        """They are stopped: nothing writes to a device any more."""

    async def start(self) -> None:
        """They run."""


class GuestHere(Guest):
    """A guest with its devices in this process. `devices`: those it writes to; none where it does not run yet."""

    def __init__(self, devices: Sequence[DeviceState]) -> None:
        self._devices = devices

    @override
    async def order_stop(self) -> None:
        for device in self._devices:
            device.order_stop(now_ns())

    @override
    async def stop(self) -> None:
        for device in self._devices:
            device.stop(now_ns())

    @override
    async def start(self) -> None:
        for device in self._devices:
            device.start()


class MachineModel:
    """One VMM's guest (proto_v3.vmm.machine.Machine)."""

    def __init__(
        self,
        scenario: Scenario,
        guest: Guest,
        timeline: Timeline,
        *,
        running: bool,
        ram: HostRam | None = None,
        wake_up_ns: int = 0,
    ) -> None:
        """`ram`: None is RamModel, in virtual time. `wake_up_ns`: 0 in live mode, whose threads take their own time."""
        self.running = running
        frames = screening.frames_at_once(scenario)
        self.ram: HostRam = RamModel(scenario.ram, timeline, frames_at_once=frames) if ram is None else ram
        self._vmm = scenario.vmm
        self._config_load_ns = [times.config_load_ns for times in device_times(scenario)]
        self._guest = guest
        self._config_lock = asyncio.Lock()
        self._timeline = timeline
        self._wake_up_ns = wake_up_ns

    async def set_up(self) -> None:
        """Take the time that a migration costs before its first byte."""
        await self._fixed(self._vmm.setup_ns, "migration set-up")

    async def stop_vcpus(self) -> None:
        """Stop the vCPUs: the guest is warned, stops after `vcpu_stop_ms`, and then writes nothing more.

        If this is cancelled, `running` is False: who wants the guest to run must start the vCPUs.
        """
        self.running = False
        await self._guest.order_stop()
        await self._fixed(self._vmm.vcpu_stop_ns, "vCPUs stop")
        self.ram.stop()
        await self._guest.stop()

    async def buffer_device_data(self, size_bytes: int) -> None:
        """Copy through the main channel's own buffers, at `device_buffer_gib_per_s`."""
        bytes_per_s = self._vmm.device_buffer_bytes_per_s
        if bytes_per_s is not None and (cost_ns := duration_ns(size_bytes, bytes_per_s)):
            await spend(self._timeline, Resource.COPY, "VMM buffers", cost_ns)

    async def copy_packet(self, size_bytes: int) -> None:
        """Copy into a packet of multifd, or out of it, at `multifd_copy_gib_per_s`."""
        bytes_per_s = self._vmm.multifd_copy_bytes_per_s
        if bytes_per_s is not None:
            await spend(self._timeline, Resource.COPY, "multifd copy", duration_ns(size_bytes, bytes_per_s))

    async def sync_channels(self, count: int) -> None:
        """Have multifd's channels synced, at `multifd_sync_us_per_channel`."""
        await self._fixed(count * self._vmm.multifd_sync_ns_per_channel, "channels sync")

    async def close_channels(self, count: int) -> None:
        """Shut down multifd's channels at the target, at `multifd_close_us_per_channel`."""
        await self._fixed(count * self._vmm.multifd_close_ns_per_channel, "channels close")

    async def wake_up(self) -> None:
        """Let the time of a thread's wake-up pass."""
        if self._wake_up_ns:
            await wake_up(self._timeline, self._wake_up_ns)

    async def load_other_devices(self) -> None:
        """Load the devices that are not VFIO devices, under the big lock."""
        if self._vmm.other_load_ms:
            start = now_ns()
            async with self._config_lock:  # QEMU's big lock; to wait for it is to wait for a config, a fixed cost too
                await sleep_ns(self._vmm.other_load_ns)
                self._timeline.work(Resource.FIXED, "other devices", start)

    async def load_config(self, device: int) -> None:
        """Load a device's config, under the big lock, or beside all else with `parallel_config`."""
        start = now_ns()
        async with (
            nullcontext() if self._vmm.parallel_config else self._config_lock
        ):  # waiting for it is waiting for another device's config: the same fixed cost
            await sleep_ns(self._config_load_ns[device])
            self._timeline.work(Resource.FIXED, "config load", start)

    async def start_vcpus(self) -> None:
        """Start the vCPUs, which takes `vcpu_start_ms`; then the guest writes again."""
        await self._fixed(self._vmm.vcpu_start_ns, "vCPUs start")
        self.running = True
        self.ram.start()
        await self._guest.start()

    async def _fixed(self, cost_ns: int, what: str) -> None:
        if cost_ns:
            await spend(self._timeline, Resource.FIXED, what, cost_ns)
