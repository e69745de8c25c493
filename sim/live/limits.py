# SPDX-License-Identifier: GPL-2.0-or-later
"""What live mode cannot emulate of a scenario: delays shorter than a timer is late, and properties of the machine.

Lateness does not add up (sim.live.real_time), but each delay that is too short lasts as long as the timer makes it.
"""

from __future__ import annotations

import asyncio

from proto_v3.errors import UserError
from sim.clock import port as clock
from sim.live.real_time import RealTime
from sim.scenario.scenario import Scenario
from sim.scenario.times import device_times
from sim.scenario.units import NS_PER_S

TRIES = 50
TRIED_NS = 200_000

THE_MACHINES_OWN = {
    "driver.call_us": "a call costs what it costs",
    "host.wake_up_us": "a thread that waited wakes up as fast as it does",
    "host.memory_gib_per_s": "all copies together are as fast as they are; one thread's copy_gib_per_s is kept to",
    "link.gbit_per_s": "the network is what it is; per_connection_gbit_per_s is asked of the kernel's pacing",
    "link.round_trip_us": "the network's own",
}
"""Keys of a scenario that a live run does not emulate, and what applies in their place."""


def check_lock(scenario: Scenario) -> None:
    """UserError for a lock that live mode cannot hold as the scenario says."""
    if scenario.driver.lock_over == "command":
        raise UserError(
            'driver.lock_over = "command": must be "copy" in a live run, whose copying threads take the lock'
        )


def measured_lateness_ns() -> int:
    """How late a timer is on this machine now: the median of TRIES, in nanoseconds."""

    async def measure() -> int:
        time = RealTime()
        try:
            clock.use(time)
            for _ in range(TRIES):
                await clock.sleep_ns(TRIED_NS)
            return time.delays().late_median_ns
        finally:
            time.close()

    return asyncio.run(measure())


def delays_ns(scenario: Scenario) -> dict[str, float]:
    """The delays of a live run in nanoseconds, by the key of the scenario; without those that are 0."""
    vmm, firmware, ram = scenario.vmm, scenario.firmware, scenario.ram
    of_devices = device_times(scenario)
    asked = {
        "firmware.save_command_us": firmware.save_command_ns,
        "firmware.load_command_us": firmware.load_command_ns,
        "firmware.load_finish_ms": min(times.load_finish_ns for times in of_devices),
        "ram.sync_ms": ram.sync_ns,
        "ram.final_sync_ms": ram.final_sync_ns,
        "ram.final_scan_ms": ram.final_scan_ns,
        "ram.send_gib_per_s": ram.frame_bytes / ram.send_bytes_per_s * NS_PER_S,
        "vmm.setup_ms": vmm.setup_ns,
        "vmm.vcpu_stop_ms": vmm.vcpu_stop_ns,
        "vmm.vcpu_start_ms": vmm.vcpu_start_ns,
        "vmm.other_load_ms": vmm.other_load_ns,
    }
    if vmm.device_buffer_bytes_per_s is not None:
        asked["vmm.device_buffer_gib_per_s"] = vmm.read_bytes / vmm.device_buffer_bytes_per_s * NS_PER_S
    if vmm.multifd:
        asked["vmm.multifd_sync_us_per_channel"] = vmm.multifd_channels * vmm.multifd_sync_ns_per_channel
        asked["vmm.multifd_close_us_per_channel"] = vmm.multifd_channels * vmm.multifd_close_ns_per_channel
    first = 0
    for at, device in enumerate(scenario.device):
        key, times = f"device.{at}", of_devices[first]
        first += device.count
        asked[f"{key}.suspend_ms"] = times.suspend_ns
        asked[f"{key}.quiesce_ms"] = times.quiesce_ns
        asked[f"{key}.resume_ms"] = times.resume_ns
        asked[f"{key}.config_load_ms"] = times.config_load_ns
        asked[f"{key}.critical.setup_us"] = device.critical.setup_ns
    return {key: value for key, value in asked.items() if value > 0}


def too_short(scenario: Scenario, lateness_ns: int) -> dict[str, float]:
    """The delays in nanoseconds that are shorter than a timer is late, by the key of the scenario."""
    return {key: asked_ns for key, asked_ns in delays_ns(scenario).items() if asked_ns < lateness_ns}
