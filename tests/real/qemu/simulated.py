# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's VMMs on the simulated device, as a case of QEMU's sets them, in virtual time."""

from __future__ import annotations

import copy
from typing import Any

from tests.build.call_log import LoggedRun
from tests.build.scenario import small_scenario, small_tables
from tests.real.qemu.cases import Act, Case
from tests.real.qemu.migrate import Record
from tests.real.qemu.project import protocol_of, settings_of

CRITICAL = {"objects": 16, "object_kib": 4.0, "setup_us": 100.0}
"""64 KiB, as the sample driver has by default."""
EARLY_S, SEEN_S, LATE_MS = 0.2, 0.15, 0.5
"""When the guest reconfigures the device: while the initial data is read at a low rate; when it was all read, and
RAM is still sent; and after the order to stop."""
CANCEL_S = 0.05
"""Before anything is decided."""


def tables_of(case: Case) -> dict[str, Any]:
    """What the case changes in the small scenario. RAM takes some 0.3 s, so that nothing is decided before."""
    driver = case.driver
    features = ["STOP_COPY", *["P2P"][: driver.get("p2p", 1)], *["PRE_COPY"][: driver.get("precopy", 1)]]
    device: dict[str, Any] = {
        "device.0.state_mib": driver["size_kib"] / 1024,
        "device.0.features": features,
        "device.0.critical": CRITICAL,
        "ram.size_gib": 1.0,
        "ram.nonzero_gib": 0.5,
        "driver.precopy_image": "whole",
        "driver.initial": "image",
        "driver.chunk_mib": 8,
    }
    if case.act is Act.CANCEL_PRECOPY:
        device["vmm.cancel_after_s"] = CANCEL_S
    elif "save_mib_s" in driver:
        device["driver.precopy_image"] = "chunks"
        device["firmware.save_mib_per_s"] = float(driver["save_mib_s"])
        device["firmware.engines"] = 1
        device["driver.chunk_mib"] = 1
    if case.late_reinit:
        device["device.0.reconfigurations"] = {"during_stop_ms": [LATE_MS], "objects_each": 1}
    elif "reinit_at" in driver:
        at_s = EARLY_S if "save_mib_s" in driver else SEEN_S
        device["device.0.reconfigurations"] = {"at_s": [at_s], "objects_each": 1}
    return {**settings_of(case), **device}


def migrate(case: Case, version: str) -> Record:
    """Simulate the case, as under this version of QEMU."""
    changes = tables_of(case)
    first = small_tables(changes)["device"][0]
    for index in range(1, case.devices):
        changes[f"device.{index}"] = copy.deepcopy(first) | {"name": f"dev{index}"}
    protocol = protocol_of(case, version)
    run = LoggedRun(small_scenario(changes), protocol)
    outcome = run.run()
    record = Record(case.name, protocol, protocol, "simulated", {}, outcome.kind.lower(), outcome.reason)
    running = {side: machine.running for side, machine in run.machines.items()}
    record.source_status, record.target_status = (
        "running" if running[side] else "stopped" for side in ("source", "target")
    )
    record.calls = run.log.calls
    return record
