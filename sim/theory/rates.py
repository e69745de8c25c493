# SPDX-License-Identifier: GPL-2.0-or-later
"""Closed forms for rates: how fast a device's state moves, and which dirty rate that outruns.

`scenario` is the scenario as the protocol changes it (sim.scenario.protocol.Protocol.applied); `streams` is the number
of streams, or of threads, that move one device's data at once: 1 under v2.
"""

from __future__ import annotations

from sim.scenario.scenario import Scenario
from sim.scenario.units import BYTES_PER_S_PER_GBIT, GIB, KIB, MIB

MIB_PER_S_PER_GBIT = BYTES_PER_S_PER_GBIT / MIB


def precopy_mib_per_s(scenario: Scenario, streams: int) -> float:
    """The highest rate at which a device's data moves in pre-copy: what N streams carry, and what they share."""
    firmware, link = scenario.firmware, scenario.link
    copy = scenario.host.copy_gib_per_s * KIB
    of_a_stream = min(
        link.per_connection_gbit_per_s * MIB_PER_S_PER_GBIT,
        firmware.save_mib_per_s,
        1 / (1 / copy + 1 / firmware.load_mib_per_s),  # one thread writes, and waits for LOAD in it
    )
    return min(
        streams * of_a_stream,
        min(firmware.engines_for_saves, firmware.engines_of_a_vf) * firmware.save_mib_per_s,
        min(firmware.engines_for_loads, firmware.engines_of_a_vf) * firmware.load_mib_per_s,
        link.gbit_per_s * MIB_PER_S_PER_GBIT,
    )


def convergence_mib_per_s(scenario: Scenario, streams: int) -> float:
    """The dirty rate from which pre-copy of the first device does not converge, for writes to all blocks alike;
    infinity if it always converges.

    Of writes at a rate w, those to clean blocks make new work: w (1 - x), where x is the dirty part of the state. It
    settles where that equals the rate that is carried, at x = 1 - carried / w. Pre-copy converges if that part fits
    the downtime limit.
    """
    carried, device = precopy_mib_per_s(scenario, streams), scenario.device[0]
    fits_mib = carried * scenario.vmm.downtime_limit_ms / 1e3 - device.stop_only_mib
    part = fits_mib / (device.state_mib - device.stop_only_mib)
    return float("inf") if part >= 1 else carried / (1 - part)


def stopped_gib_per_s(scenario: Scenario, streams: int) -> dict[str, float]:
    """The rates at which firmware (SAVE), read() and link each move a stopped device's state. The least of them is the
    rate of the whole, if all of them are busy from the first byte to the last."""
    chunk, firmware, host, link = scenario.driver.chunk_mib, scenario.firmware, scenario.host, scenario.link
    save_s = firmware.save_command_us * 1e-6 + chunk / firmware.save_mib_per_s
    call_s, read_gib = scenario.driver.call_us * 1e-6, scenario.vmm.read_mib * MIB / GIB
    copy = read_gib / (call_s + read_gib / host.copy_gib_per_s)
    threads = streams if scenario.driver.lock in ("none", "per_fd") else 1
    engines = min(firmware.engines_for_saves, firmware.engines_of_a_vf)
    commands = min(threads if scenario.driver.lock_over == "command" else streams, engines)
    return {
        "SAVE": commands * chunk * MIB / GIB / save_s,
        "read": min(threads * copy, host.memory_gib_per_s),
        "link": min(link.gbit_per_s, streams * link.per_connection_gbit_per_s) * BYTES_PER_S_PER_GBIT / GIB,
    }
