# SPDX-License-Identifier: GPL-2.0-or-later
"""A real run: from devices of this kernel to others, on this machine or with a target on another.

As in a live run, the supervisor starts a VMM process for each side that is here; there is no device process.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sim.live.processes.children import start
from sim.live.processes.settings import Settings
from sim.live.processes.vmm import run_source, run_target
from sim.live.result import LiveResult, SideEnd, result
from sim.live.run import MakeSide, Notes, RunningSide, Started, Watch, applied, both_sides, one_side
from sim.live.tcp.messages import Run
from sim.real.backend import RAM_AND_STATE, is_compared
from sim.real.process import ENDS_WITHIN_S, real_vmm_main
from sim.real.put_back import put_back_after
from sim.real.sysfs import DeviceEntry
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class SideDevices:
    """The devices of a side, and how they are opened."""

    entries: Sequence[DeviceEntry]
    way: str | None
    """sim.real.vfio.WAYS; None: by cdev where there is one."""

    @property
    def drivers(self) -> str:
        """As an offer names them."""
        return ",".join(entry.driver for entry in self.entries)


@dataclass(frozen=True, slots=True)
class RealResult:
    """What came of a real run."""

    live: LiveResult
    """As that of a live run."""
    compared: list[bool] = field(default_factory=list)
    """By device, of a completed run: whether the driver at both ends says what its state is."""
    put_back: list[str] = field(default_factory=list)
    """What was not to be expected when the devices were left as they were found, in words."""


def real_side(devices: SideDevices) -> MakeSide:
    """Makes a side with these devices."""

    def make(side: str, settings: Settings, notes: Notes, *migrate: Any) -> RunningSide:
        vmm = start(f"{side} VMM", real_vmm_main, notes, list(devices.entries), devices.way, side, settings, *migrate)
        vmm.ends_within_s = ENDS_WITHIN_S
        return RunningSide(side, settings, vmm)

    return make


async def run_here(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    source: SideDevices,
    target: SideDevices,
    watch: Watch | None = None,
    started: Started | None = None,
) -> RealResult:
    """Migrate from the source's devices to the target's, both of this kernel. `scenario`: sim.real.scenario.of_devices.
    `started` is called with the processes, while they run; its errors are raised."""
    run_as = applied(scenario, protocol, settings)
    run, notes = Run(scenario.to_json(), protocol.name, seed, source.drivers), Notes(watch)
    ends = await both_sides(real_side(source), real_side(target), run, settings, notes, started)
    told = [*await _put_back(ends["source"], source), *await _put_back(ends["target"], target)]
    return _result(result(run_as, seed, ends, notes.ran, RAM_AND_STATE, simulated=False), ends, told)


async def run_to(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    source: SideDevices,
    address: tuple[str, int],
    watch: Watch | None = None,
) -> RealResult:
    """Migrate from these devices to those of the target that listens at this address (`serve_one`)."""
    run_as = applied(scenario, protocol, settings)
    run, notes = Run(scenario.to_json(), protocol.name, seed, source.drivers), Notes(watch)
    ends = {"source": await one_side(real_side(source)("source", settings, notes, run_source, run, address))}
    told = await _put_back(ends["source"], source)
    return _result(result(run_as, seed, ends, notes.ran, RAM_AND_STATE, simulated=False), ends, told)


async def serve_one(
    listener: socket.socket, settings: Settings, target: SideDevices, watch: Watch | None = None
) -> tuple[SideEnd, list[str]]:
    """Run the target's side of one migration; returns how it ended, and what put_back of RealResult says."""
    end = await one_side(real_side(target)("target", settings, Notes(watch), run_target, listener))
    return end, await _put_back(end, target)


async def _put_back(end: SideEnd, devices: SideDevices) -> list[str]:
    """What was done to leave the devices as they were found; it is done here if the VMM could not."""
    if end.report is not None and not end.deaths:
        return end.report.put_back
    return await asyncio.to_thread(put_back_after, devices.entries, devices.way)


def _result(live: LiveResult, ends: dict[str, SideEnd], told: list[str]) -> RealResult:
    source = ends["source"].report
    target = source.peer if source is not None else None
    digests = zip(source.digests, target.digests, strict=False) if source is not None and target is not None else []
    return RealResult(live, [is_compared(here, there) for here, there in digests], told)
