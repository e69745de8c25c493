# SPDX-License-Identifier: GPL-2.0-or-later
"""Which runs are equal by construction: one canonical form of what a run reads of its scenario.

Two runs with the same form and the same seed do the same to the last span; what differs between them is no part of
either, such as the keys of multifd where there is none. Each rule here says why. What is equal by chance, as two
policies for an event that did not come, is no rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from sim.host.vmms import connections
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.scenario import NO_PARAMETERS, Scenario
from sim.scenario.tables import V3

MULTIFD_KEYS = ("early_save", "multifd_")
V2_KEYS = (
    *("decision_interval_ms", "device_buffer_gib_per_s", "late_reinit", "max_retries", "precopy_user", "reinit"),
    *("switchover_ack", "write_kib"),
)
"""Of the table vmm, by their beginnings."""
V3_KEYS = tuple(key for key in V3.model_fields if key != "decision_interval_ms")  # which v2's stop rule may read


def same_run(scenario: Scenario, protocol: Protocol) -> str:
    """A fingerprint that two runs with the same seed have in common if they are equal by construction."""
    applied = protocol.applied(scenario)
    form = applied.scenario.model_dump(exclude=set(NO_PARAMETERS))
    for table, beginnings in _unread(applied):
        for tables in form[table] if isinstance(form[table], list) else [form[table]]:
            for key in [key for key in tables if key.startswith(beginnings)]:
                del tables[key]
    form["driver"]["lock"] = _lock(applied)
    form["firmware"]["engines"] = _engines(applied)
    if connections(applied) == 1:  # no frame waits for the link that does not wait for its connection as long
        form["link"]["gbit_per_s"] = form["link"]["per_connection_gbit_per_s"]
    text = json.dumps([protocol.version, _plain(form)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _unread(applied: AppliedScenario) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The keys that nothing in the run reads, by table, as the beginnings of their names."""
    scenario = applied.scenario
    own = scenario.driver.reinit == "priority"  # which says how the driver saves, whatever happens
    if applied.protocol.version == 2:
        if scenario.vmm.pieces_at_once == 1:  # else screening looks at the room of v3's connections
            yield "v3", V3_KEYS
        yield "driver", ("epochs",)
        yield "device", ("max_dirty_streams",)
    elif not _may_fall_back(scenario):
        yield "vmm", V2_KEYS
        yield "driver", () if own else ("reinit",)
    if not scenario.vmm.multifd:
        yield "vmm", MULTIFD_KEYS
    if not _may_report_epochs(scenario):  # there is nothing to be told of
        yield "vmm", ("late_reinit", "max_retries", "reinit")
        yield "v3", ("late_epoch", "max_retries")
        yield "driver", ("epochs",) if own else ("epochs", "reinit")


def _may_fall_back(scenario: Scenario) -> bool:
    """Whether v3 may find no v3 at the target, or in a device."""
    v3 = scenario.v3
    offered = [device.max_dirty_streams for device in scenario.device]
    return v3.target_knows == "v2" or v3.target_max_dirty_streams is not None or 0 in offered


def _may_report_epochs(scenario: Scenario) -> bool:
    """Whether a device may have new critical data while it is saved."""
    if scenario.driver.precopy != "incremental" or not scenario.driver.precopy_info_v2:
        return True
    for device in scenario.device:
        told = device.reconfigurations
        if device.guest_resets_at_s or device.faults:
            return True
        if told is not None and (told.poisson_per_s or told.at_s or told.during_stop_ms):
            return True
    return False


def _lock(applied: AppliedScenario) -> str:
    """The lock of a copy. Each data fd has one reader, but if it is of blocks. A lock that nobody waits for takes no
    time: v2 has one thread that calls a device, but for a thread that reads it before the stop. `device` is the mutex
    that other calls take, too, and `global` is not."""
    scenario, driver = applied.scenario, applied.scenario.driver
    if driver.lock_over != "copy" or (applied.protocol.version == 3 and scenario.v3.blocks):
        return driver.lock
    one_thread = applied.protocol.version == 2 and not scenario.vmm.precopy_threads and len(scenario.devices) == 1
    return "per_fd" if driver.lock == "none" or one_thread else driver.lock


def _engines(applied: AppliedScenario) -> float:
    """The engines of a PF that can be busy: each stream of a device has one command at a time."""
    scenario, firmware = applied.scenario, applied.scenario.firmware
    shared = (firmware.save_engines, firmware.load_engines, firmware.vf_engines) == (None, None, None)
    if not shared or (applied.protocol.version == 3 and scenario.v3.blocks):
        return firmware.engines
    streams = 1 if applied.protocol.version == 2 else 1 + scenario.v3.dirty_streams
    pfs = [device.pf for device in scenario.devices]
    return min(firmware.engines, float(max(map(pfs.count, pfs)) * streams))


def _plain(value: Any) -> Any:
    """The same for 1 and 1.0."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return float(value) if type(value) is int else value
