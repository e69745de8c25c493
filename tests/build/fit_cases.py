# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine whose numbers are known, and the logs of its migration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.scenario.scenario import Scenario
from tests.build.qemu_log import NEW, TimedRun, write_logs
from tests.build.scenario import small_scenario, small_tables

FIRST = {
    "device.0.name": "first",
    "device.0.state_mib": 24.0,
    "device.0.stop_only_mib": 24.0,
    "device.0.suspend_ms": 11.0,
    "device.0.quiesce_ms": 13.0,
    "device.0.resume_ms": 17.0,
    "device.0.config_load_ms": 19.0,
    "device.0.block_kib": 4,
    "driver.chunk_mib": 8,
    "firmware.load_finish_ms": 60.0,
    "firmware.save_mib_per_s": 400.0,
    "firmware.load_mib_per_s": 200.0,
    "vmm.vcpu_stop_ms": 7.0,
    "vmm.vcpu_start_ms": 5.0,
    "vmm.setup_ms": 23.0,
    "vmm.other_load_ms": 9.0,
    "vmm.downtime_limit_ms": 250.0,
    "vmm.bandwidth_gbit_per_s": 8.0,
    "ram.sync_ms": 1.5,
    "ram.final_sync_ms": 2.5,
}
SECOND = {
    "name": "second",
    "suspend_ms": 29.0,
    "quiesce_ms": 31.0,
    "resume_ms": 37.0,
    "config_load_ms": 41.0,
    "state_mib": 40.0,
    "stop_only_mib": 40.0,
}
"""Each time is another one, so that none is taken for another."""


def known_scenario(changes: Mapping[str, Any] | None = None) -> Scenario:
    """Two devices that differ in everything."""
    of_second = {key: value for key, value in (changes or {}).items() if key.startswith("device.1.")}
    tables = {**FIRST, **{key: value for key, value in (changes or {}).items() if key not in of_second}}
    second = copy.deepcopy(small_tables(tables)["device"][0]) | SECOND
    second |= {key.removeprefix("device.1."): value for key, value in of_second.items()}
    return small_scenario({**tables, "device.1": second})


def known_logs(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    protocol: str = "v2",
    version: str = NEW,
    offset_us: int = 0,
    seed: int = 1,
) -> tuple[str, str, TimedRun]:
    """The names of the source's and the target's log, and the run that they are of."""
    run = TimedRun(known_scenario(changes), protocol, seed)
    run.run()
    return *write_logs(run, folder, version, offset_us), run
