# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario of a real run: the VMM's policy as a scenario file has it, and the devices as the kernel has them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from proto_v3.errors import UserError
from proto_v3.vfio.uapi import Feature, FeatureMigDataSize, FeatureMigStreams, MigrationFlags
from sim.real.ioctl import get_feature
from sim.real.sysfs import DeviceEntry
from sim.real.vfio import OpenDevices
from sim.scenario.device import Device
from sim.scenario.file import find_base, load, parse
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.units import KIB, MIB

BASE = "real"
"""The scenario without --scenario: scenarios/base/real.toml."""
FEATURES = (MigrationFlags.STOP_COPY, MigrationFlags.P2P, MigrationFlags.PRE_COPY)


@dataclass(frozen=True, slots=True)
class ProbedDevice:
    """What a device says of itself."""

    entry: DeviceEntry
    flags: MigrationFlags
    dirty_streams: int
    """v3: the most; 0: it knows v2 only."""
    image_bytes: int
    """MIG_DATA_SIZE; 0 if it does not say."""


def probed(entries: Sequence[DeviceEntry], way: str | None) -> tuple[list[ProbedDevice], str]:
    """What the devices say, and by which way they were opened, in words. UserError if one cannot be opened, or does not
    migrate. Nothing is changed in them but what opening a device changes (a PCI device is reset)."""
    found = []
    with OpenDevices(entries, way) as devices:
        for opened in devices.devices:
            flags, streams, image_bytes = opened.migration_flags(), 0, 0
            with contextlib.suppress(OSError):  # ENOTTY: it has no several streams
                streams = get_feature(opened.fd, Feature.MIG_STREAMS, FeatureMigStreams).dirty_streams
            with contextlib.suppress(OSError):
                image_bytes = get_feature(opened.fd, Feature.MIG_DATA_SIZE, FeatureMigDataSize).stop_copy_length
            found.append(ProbedDevice(opened.entry, flags, streams, image_bytes))
        return found, devices.space.way


USED = re.compile(r"(ram|vmm|v3)\..*|device\.\d+\.(reconfigurations\..*|critical\.objects|config_load_ms)")
"""The keys of a scenario that a real run uses."""


def check_used(settings: Sequence[str]) -> None:
    """UserError for a KEY=VALUE of `--set` that changes nothing in a real run."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if not USED.fullmatch(key):
            raise UserError(
                f"--set {key}: a real run has its own; it takes ram, vmm and v3, and of a device reconfigurations, "
                "critical.objects and config_load_ms"
            )


def loaded(named: str | None, settings: Sequence[str]) -> Scenario:
    """The scenario of this name or file, or BASE, with `--set`'s KEY=VALUE put in. UserError as sim.scenario.file."""
    if named is not None:
        return load(named, settings)
    path = find_base(BASE)
    return parse(path.read_text(encoding="utf-8"), str(path), settings)


def of_devices(scenario: Scenario, devices: Sequence[ProbedDevice]) -> Scenario:
    """The scenario with these devices in place of its own. Of its own, only reconfigurations and config_load_ms stay,
    by position; the last one stands for all after it."""
    own = scenario.devices
    made = [
        _device(own[min(at, len(own) - 1)], at, device, numbered=len(devices) > 1) for at, device in enumerate(devices)
    ]
    chosen = scenario.model_copy(update={"device": made, "published": []})
    known = parameters(chosen)  # a key that the devices' own tables do not have needs no source
    sources = {key: text for key, text in scenario.sources.items() if key in known}
    ranges = {key: each for key, each in scenario.ranges.items() if not key.startswith("device.")}
    return chosen.model_copy(update={"sources": sources, "ranges": ranges})


def _device(own: Device, at: int, device: ProbedDevice, *, numbered: bool) -> Device:
    driver = device.entry.driver[:28]
    size_kib = max(1, -(-device.image_bytes // KIB))
    return own.model_copy(
        update={
            "name": f"{driver}{at}" if numbered else driver,
            "count": 1,
            "features": [flag.name for flag in FEATURES if flag in device.flags],
            "max_dirty_streams": min(64, device.dirty_streams),
            "state_mib": size_kib * KIB / MIB,
            "stop_only_mib": 0.0,
            "block_kib": 64,
            "writes": None,
            "faults": [],
        }
    )


def check_alike(source: Sequence[DeviceEntry], target: Sequence[DeviceEntry]) -> None:
    """UserError unless the devices of both sides have the same drivers, one by one, and none is on both sides."""
    here, there = [entry.driver for entry in source], [entry.driver for entry in target]
    if here != there:
        raise UserError(
            f"--to: the source's devices have the drivers {', '.join(here)}, the target's {', '.join(there)}"
        )
    both = [entry.name for entry in [*source, *target]]
    for name in both:
        if both.count(name) > 1:
            raise UserError(f"{name}: is named twice; each device is the source or the target of one migration")
