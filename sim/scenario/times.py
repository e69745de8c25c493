# SPDX-License-Identifier: GPL-2.0-or-later
"""The fixed times of a device: its own keys, and what grows with the VFs of its PF and with its size. This is the only
place that adds them up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """What a device takes whatever its state is, in nanoseconds."""

    suspend_ns: int
    quiesce_ns: int
    resume_ns: int
    load_finish_ns: int
    config_load_ns: int


def device_times(scenario: Scenario) -> list[DeviceTimes]:
    """The times of each of scenario.devices, in their order."""
    firmware, vmm, devices = scenario.firmware, scenario.vmm, scenario.devices
    vfs: Counter[int] = Counter()
    vectors: Counter[int] = Counter()
    for device in devices:
        vfs[device.pf] += 1
        vectors[device.pf] += device.vectors
    times = []
    for device in devices:
        state_ns = vfs[device.pf] * firmware.state_command_ns_per_vf
        state_ns += device.vectors * firmware.state_command_ns_per_vector
        state_ns += vectors[device.pf] * firmware.state_command_ns_per_pf_vector
        times.append(
            DeviceTimes(
                suspend_ns=device.suspend_ns + round(2 * (1 - firmware.quiesce_share) * state_ns),
                quiesce_ns=device.quiesce_ns + round(2 * firmware.quiesce_share * state_ns),
                resume_ns=device.resume_ns,
                load_finish_ns=firmware.load_finish_ns + device.vectors * firmware.load_finish_ns_per_vector,
                config_load_ns=device.config_load_ns + device.vectors * vmm.config_load_ns_per_vector,
            )
        )
    return times
