# SPDX-License-Identifier: GPL-2.0-or-later
"""A scenario as parameters of the sample driver: a real device that takes the times which a simulated one takes.

Pure: it touches no device.

Not among them is what a machine has by itself (call_us, copy_gib_per_s, memory_gib_per_s), and what the VMM does.
"""

from __future__ import annotations

from collections.abc import Iterator

from proto_v3.errors import UserError
from sim.scenario.device import Device
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Firmware
from sim.scenario.times import DeviceTimes, device_times
from sim.scenario.units import KIB, NS_PER_US

Parameters = dict[str, int | str]
"""By name (kernel/driver/README.md)."""


def module_parameters(scenario: Scenario) -> Parameters:
    """The parameters with which the driver's devices are what the scenario says, whose devices must be alike.

    UserError if the driver cannot be so; it names all keys that it cannot take.
    """
    if problems := list(_problems(scenario)):
        raise UserError(f"{scenario.name}: the sample driver cannot be so: {'; '.join(problems)}")
    device, firmware, driver = scenario.device[0], scenario.firmware, scenario.driver
    times = device_times(scenario)[0]
    return {
        "size_kib": device.blocks * device.block_kib,
        "block_kib": device.block_kib,
        "critical_kib": device.critical.objects * device.critical.object_bytes // KIB,
        "critical_setup_us": _us(device.critical.objects * device.critical.setup_ns),
        "dirty_kib_s": round(device.writes.mib_per_s * 1024) if device.writes else 0,
        "streams": device.max_dirty_streams,
        "precopy": int("PRE_COPY" in device.features),
        "p2p": int("P2P" in device.features),
        "lock": "fd" if driver.lock in ("none", "per_fd") else driver.lock,
        "lock_over": driver.lock_over,
        "engines": int(_engines(firmware)[0]),
        "save_mib_s": round(firmware.save_mib_per_s),
        "load_mib_s": round(firmware.load_mib_per_s),
        "command_us": round(firmware.save_command_us),
        "load_finish_us": _us(times.load_finish_ns),
        "chunk_kib": driver.chunk_mib * 1024,
        "chunks": driver.chunks,
        "epochs": driver.epochs,
        "initial": driver.initial,
        "data_size": {"left": 1, "full": 2}[driver.stop_copy_size],
        "info_v2": int(driver.reinit != "none"),
        "reinit": "priority" if driver.reinit == "priority" else "flush",
        "zero_end": int(driver.precopy_end == "0"),
        **_arcs(times),
    }


def _engines(firmware: Firmware) -> tuple[float, float]:
    """SAVEs and LOADs of the one device that run at full speed at once."""
    of_a_vf = firmware.engines_of_a_vf
    return min(firmware.engines_for_saves, of_a_vf), min(firmware.engines_for_loads, of_a_vf)


def _arcs(times: DeviceTimes) -> Parameters:
    """The times of arcs. The driver's quiesce_us is of an arc into a P2P state, which sim.device.arcs calls suspend."""
    return {
        "quiesce_us": _us(times.suspend_ns),
        "suspend_us": _us(times.quiesce_ns),
        "stop_us": _us(times.quiesce_ns),
        "resume_us": _us(times.resume_ns),
        "run_us": 0,
    }


def _us(time_ns: int) -> int:
    return round(time_ns / NS_PER_US)


def _problems(scenario: Scenario) -> Iterator[str]:
    """What the driver cannot be, by key."""
    driver, firmware = scenario.driver, scenario.firmware
    if len(scenario.device) > 1:
        yield "device: it must be one table, for its devices are alike"
    if len(scenario.devices) > 1:
        yield f"device.0.count = {len(scenario.devices)}: its engines are a device's own, and not a PF's"
    if driver.precopy != "incremental":
        yield f"driver.precopy = {driver.precopy}: it has incremental"
    if driver.reinit == "invalidate":
        yield "driver.reinit = invalidate: it has flush, priority and none"
    if firmware.service_cv:
        yield f"firmware.service_cv = {firmware.service_cv:g}: its commands do not vary; 0"
    saves, loads = _engines(firmware)
    if saves != int(saves):
        yield f"firmware.engines = {saves:g}: it has whole ones"
    if saves != loads:
        yield f"firmware.load_engines: it has as many for LOADs as for SAVEs, of which {saves:g} run at once"
    if firmware.save_command_us != firmware.load_command_us:
        yield "firmware.load_command_us: it has one time for both, save_command_us"
    for device in scenario.device:
        yield from _problems_of(device, scenario)


def _problems_of(device: Device, scenario: Scenario) -> Iterator[str]:
    if "PRE_COPY" in device.features:
        if device.stop_only_mib:
            yield "device.0.stop_only_mib: all of its state can be saved before the stop; 0, or no PRE_COPY"
        if scenario.driver.precopy_image != "chunks":
            yield "driver.precopy_image = whole: it saves in chunks"
    if device.writes and device.writes.pattern != "uniform":
        yield f"device.0.writes.pattern = {device.writes.pattern}: it writes anywhere, uniform"
    changes = device.reconfigurations
    if scenario.driver.epochs == "invalidate" and changes and changes.invalidates_share < 1:
        yield f"device.0.reconfigurations.invalidates_share = {changes.invalidates_share:g}: its epochs have 1"
    if device.critical.objects * device.critical.object_bytes < KIB:
        yield "device.0.critical: it has at least 1 KiB of critical data"
    if device.faults:
        yield "device.0.faults: its faults are set by its own parameter"
