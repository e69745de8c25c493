# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario of a real run: devices of the kernel in place of a file's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto_v3.vfio.uapi import MigrationFlags
from sim.real.scenario import ProbedDevice, of_devices
from sim.real.sysfs import DeviceEntry
from sim.scenario.file import load
from sim.scenario.scenario import Scenario
from sim.scenario.shipped import shipped

FLAGS = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.parametrize("count", [1, 3])
def test_any_scenario_with_such_devices_is_one_that_a_vmm_process_reads(name: str, count: int) -> None:
    entry = DeviceEntry("0000:3b:00.2", Path("/sys"), "mlx5_vfio_pci", "mlx5_vfio_pci", None, None)
    scenario = of_devices(load(name), [ProbedDevice(entry, FLAGS, 8, 3 << 20)] * count)
    assert Scenario.model_validate_json(scenario.to_json()) == scenario
    assert [device.state_mib for device in scenario.devices] == [3.0] * count
    assert [device.features for device in scenario.devices] == [["STOP_COPY", "PRE_COPY"]] * count
