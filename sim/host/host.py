# SPDX-License-Identifier: GPL-2.0-or-later
"""One of the two hosts: its firmware, memory and locks, and the scenario's devices there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from typing_extensions import override

from proto_v3.timeline import Timeline
from sim.device.driver import SimDriver
from sim.device.firmware import FirmwareModel, VfFirmware
from sim.device.guest import make_activity
from sim.device.state import DeviceState, Image
from sim.device.stream import CopyModel, DriverContext, DriverLock
from sim.host.vmms import target_device
from sim.report import Counters, DeviceReport
from sim.resource import Lock, Memory
from sim.scenario.scenario import Scenario
from sim.scenario.times import DeviceTimes, device_times


class HostResources:
    """What all devices of a host share."""

    def __init__(self, scenario: Scenario, seed: np.random.SeedSequence, timeline: Timeline) -> None:
        self.timeline = timeline
        pfs = sorted({device.pf for device in scenario.devices})
        self._firmware = {
            pf: FirmwareModel(scenario.firmware, np.random.default_rng(child), timeline)
            for pf, child in zip(pfs, seed.spawn(len(pfs)), strict=True)
        }
        self._devices = list(zip(scenario.devices, device_times(scenario), strict=True))
        host = scenario.host
        self._memory: CopyModel = Memory(host.copy_bytes_per_s, host.memory_bytes_per_s, timeline)
        self._call_ns = scenario.driver.call_ns
        self._wake_up_ns = host.wake_up_ns
        self.global_lock: DriverLock = Lock(timeline)

    def context(self, device: int) -> DriverContext:
        """The context of a device's driver. `device`: its index among the scenario's devices."""
        return DriverContext(*self._of_device(device), call_ns=self._call_ns, wake_up_ns=self._wake_up_ns)

    def _of_device(self, device: int) -> tuple[VfFirmware, CopyModel, Timeline, DeviceTimes]:
        spec, times = self._devices[device]
        firmware = VfFirmware(self._firmware[spec.pf], device, times.load_finish_ns)
        return firmware, self._memory, self.timeline, times


class LiveHost(HostResources):
    """In live mode: copies and calls take the time that the machine needs, and locks are real."""

    def __init__(
        self,
        scenario: Scenario,
        seed: np.random.SeedSequence,
        timeline: Timeline,
        new_lock: Callable[[Timeline], DriverLock],
    ) -> None:
        super().__init__(scenario, seed, timeline)
        self._memory = _Elsewhere()
        self._new_lock = new_lock
        self.global_lock = new_lock(timeline)

    @override
    def context(self, device: int) -> DriverContext:
        shared = self._of_device(device)
        return DriverContext(*shared, call_ns=0, new_lock=self._new_lock, locks_in_read=False, tables=True)


class _Elsewhere(CopyModel):
    """Copies are made outside of the model, and take their time there (sim.live.fd.copy)."""

    @override
    async def copy(self, size_bytes: int, call_ns: int, what: str) -> None:
        pass


def seeds(seed: int) -> list[np.random.SeedSequence]:
    """Seeds of the guest, the source host and the target host: the same for every protocol and clock."""
    return np.random.SeedSequence(seed).spawn(3)


def devices_at_source(
    scenario: Scenario, guest_seed: np.random.SeedSequence, host: HostResources
) -> list[tuple[SimDriver, DeviceState]]:
    """The devices that the guest uses, each with its state."""
    devices = []
    for at, (spec, child) in enumerate(zip(scenario.devices, guest_seed.spawn(len(scenario.devices)), strict=True)):
        state = DeviceState(spec, make_activity(spec, scenario.horizon_ns, np.random.default_rng(child)))
        devices.append((SimDriver(spec, scenario.driver, host.context(at), host.global_lock, state=state), state))
    return devices


def devices_at_target(scenario: Scenario, host: HostResources) -> list[tuple[SimDriver, Image]]:
    """The devices that are loaded, each with the image of what is loaded."""
    devices = []
    for at, spec in enumerate(scenario.devices):
        image = Image(spec)
        there = target_device(scenario, spec)
        devices.append((SimDriver(there, scenario.driver, host.context(at), host.global_lock, image=image), image))
    return devices


def device_report(driver: SimDriver, state: DeviceState | Image) -> DeviceReport:
    """What a driver knows of its device at the end of a run."""
    return DeviceReport(
        driver.name,
        driver.spec.whole_bytes,
        Counters.total(driver.counters),
        driver.critical_loads,
        state.activity.reconfiguration_ns[: state.epoch - 1].tolist() if isinstance(state, DeviceState) else [],
        driver.log.messages,
    )
