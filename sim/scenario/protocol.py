# SPDX-License-Identifier: GPL-2.0-or-later
"""Protocols by name: `v2` and `v3`, with suffixes for the settings of VMM and driver.

`v2` alone is v2 as the scenario sets it up, and so is `v3`. A suffix changes one setting: `v2-multifd`,
`v2-reinit-invalidate-ack-reusable-polls`, `v3-n4`, `v3-blocks-n8-pool`. So one scenario can be run in all ways that are
compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from proto_v3.errors import UserError
from sim.scenario.scenario import Scenario, room_for_a_read
from sim.scenario.suffixes import HELP, SUFFIXES, Changes, in_words
from sim.scenario.units import did_you_mean


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol by its name."""

    name: str
    version: int  # 2 or 3
    changes: Changes  # settings of the name that replace the scenario's

    @classmethod
    def parse(cls, name: str, scenario: Scenario) -> Protocol:
        """The protocol of this name. UserError if there is none, or if the scenario cannot be run with it."""
        version = name[:2]
        if version not in SUFFIXES or name[2:3] not in ("", "-"):
            raise UserError(f"unknown protocol {name!r}; there are {HELP}{did_you_mean(name, list(SUFFIXES))}")
        if name == "v3":
            name = f"v3-n{scenario.v3.dirty_streams}"
        protocol = cls(name, int(version[1]), _changes(name, version))
        protocol.applied(scenario)  # it may refuse
        return protocol

    def applied(self, scenario: Scenario) -> AppliedScenario:
        """The scenario with what the name changes. UserError if it does not allow that."""
        tables = {table: getattr(scenario, table).model_dump() | keys for table, keys in self.changes.items()}
        if self.version == 2 or scenario.v3.target_knows == "v2":  # v3's source falls back
            for missing in _missing(tables.get("vmm") or scenario.vmm.model_dump()):
                raise UserError(f"protocol {self.name!r}: {missing}")
        if self.version == 3 and scenario.vmm.max_bandwidth_mib_per_s is not None:
            raise UserError(f"protocol {self.name!r}: vmm.max_bandwidth_mib_per_s limits v2 only: leave it out for v3")
        changed = {table: type(getattr(scenario, table)).model_validate(keys) for table, keys in tables.items()}
        applied = scenario.model_copy(update=changed)
        for problem in room_for_a_read(applied) if "v3" in changed else ():  # -pool and -one have credits
            raise UserError(f"protocol {self.name!r}: {problem}")
        return AppliedScenario(applied, self)


@dataclass(frozen=True, slots=True)
class AppliedScenario:
    """A scenario as a protocol runs it. Only Protocol.applied makes one, where a run or a bound begins."""

    scenario: Scenario  # with what the protocol's name changes
    protocol: Protocol


def _missing(vmm: dict[str, Any]) -> Iterator[str]:
    """What v2 is asked for and cannot do without another setting, in words."""
    if vmm["switchover_ack"] == "reusable" and not vmm["reinit"]:
        yield "a reusable ack goes with REINIT only: add -reinit-flush, -reinit-invalidate or -priority"
    if vmm["late_reinit"] == "retry" and vmm["switchover_ack"] != "reusable":
        yield "a retry (vmm.late_reinit) needs a reusable ack, whose last look finds a late REINIT: add -ack-reusable"
    if vmm["precopy_threads"] and vmm["multifd"] and vmm["multifd_load_threads"]:
        yield (
            f"vmm.multifd_load_threads = {vmm['multifd_load_threads']}: must be left out with a pre-copy thread a "
            "device (vmm.precopy_threads), for all devices are then loaded from the start on"
        )
    if vmm["early_save"] and not (vmm["multifd"] and vmm["multifd_device_state"]):
        yield "early save threads (vmm.early_save) are those of multifd for device state: add -multifd"


def _changes(name: str, version: str) -> Changes:
    changes: Changes = {}
    used: set[str] = set()
    suffixes = SUFFIXES[version]
    rest = name.removeprefix(version)
    while rest:
        suffix = next((each for each in suffixes if re.match(rf"-{each}(-|$)", rest)), None)
        if suffix is None:
            known, first = [f"-{each}" for each in suffixes], "-" + rest.lstrip("-").split("-")[0]
            hint = did_you_mean(rest, known) or did_you_mean(first, known)
            raise UserError(f"unknown protocol {name!r}: {rest!r} is none of {in_words(version)}{hint}")
        if suffix in used:
            raise UserError(f"protocol {name!r}: -{suffix} is there twice")
        used.add(suffix)
        rest = rest.removeprefix(f"-{suffix}")
        for table, keys in suffixes[suffix].changes.items():
            for key, value in keys.items():
                if changes.setdefault(table, {}).setdefault(key, value) != value:
                    raise UserError(f"protocol {name!r}: -{suffix} contradicts what comes before it")
    return changes
