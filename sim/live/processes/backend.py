# SPDX-License-Identifier: GPL-2.0-or-later
"""The port between a VMM process and its devices: a device process, or devices of the kernel in the VMM itself.

All that a VMM process does beside migrating is the same for both: handshake, TCP, time limits, timelines, reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from proto_v3.vfio.device import MigrationDevice
from sim.host.machine import Guest, HostRam
from sim.live.merge_timelines import ProcessTimeline
from sim.live.processes.comparison import StateComparison
from sim.live.processes.report import DevicesReport, StreamReport
from sim.live.tcp.messages import Run
from sim.scenario.scenario import Scenario


class DeviceBackend(Protocol):
    """The devices of a VMM. Calls raise OSError if a device cannot do it, or is gone."""

    where: str
    """What is waited for, in words: `device process`."""
    guest: Guest
    """What the guest does to the devices."""
    comparison: StateComparison
    """How their states are held against those of the other side."""

    def check(self, run: Run) -> None:
        """UserError if these devices cannot take part in a run, as by `run.drivers`. Before init()."""

    async def init(self, scenario: Scenario, seed: int) -> None:
        """Have the devices, with the memory that they need. Their time begins later."""

    def begin(self, scenario: Scenario, timeline: ProcessTimeline) -> Sequence[MigrationDevice]:
        """Time 0 is fixed: the devices, in the order of the scenario. Calls are recorded in the timeline."""

    def ram(self, scenario: Scenario, timeline: ProcessTimeline) -> HostRam:
        """The guest's RAM, after begin()."""

    async def start(self, zero_ns: int) -> None:
        """Time 0 is at `zero_ns` of perf_counter_ns(); at the source the guest runs from then on."""

    async def progress(self) -> tuple[int, int]:
        """Bytes that are left to be saved, and bytes that the guest wrote, of all devices."""

    def streams(self) -> list[StreamReport]:
        """What the VMM counted at each data fd so far."""

    async def collect(self) -> DevicesReport:
        """What was measured of the devices, at the end."""

    async def digests(self) -> list[bytes]:
        """Of each device's state, after a completed migration, as `comparison` takes them."""

    async def beat(self, first_s: float, silent_s: float) -> None:
        """Watch the devices until they are gone. Give them up if they do not answer for `silent_s`; the first answer
        may take `first_s`."""

    @property
    def gone(self) -> bool:
        """Whether the devices are gone, or were given up."""

    def close(self, why: str) -> None:
        """Give the devices up: calls that wait fail with ENODEV and `why`."""

    async def put_back(self) -> list[str]:
        """Leave the devices as they were found, and release them; nothing is done to them after that. Returns what was
        not to be expected of it, in words."""
