"""Protocols by name: `v2` with what its users and drivers differ in, and `v3` with N dirty streams a device.

`v2` alone is v2 as the scenario sets it up. A suffix changes one setting of it: `v2-multifd`, `v2-reinit-flush`,
`v2-reinit-invalidate-ack-reusable-polls`. So one scenario can be run in all ways that are to be compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from proto_v3.errors import UserError
from sim.scenario import Scenario
from sim.schema import did_you_mean
from sim.sections import MAX_STREAMS

Changes = dict[str, dict[str, Any]]
"""Table, key, value."""

SUFFIXES: dict[str, Changes] = {
    "multifd": {"vmm": {"multifd": True, "multifd_device_state": True}},
    "single": {"vmm": {"multifd_device_state": False}},
    "reinit-flush": {"vmm": {"reinit": True}, "driver": {"reinit": "flush"}},
    "reinit-invalidate": {"vmm": {"reinit": True}, "driver": {"reinit": "invalidate"}},
    "no-reinit": {"vmm": {"reinit": False}},
    "ack-reusable": {"vmm": {"switchover_ack": "reusable"}},
    "no-ack": {"vmm": {"switchover_ack": "off"}},
    "ack": {"vmm": {"switchover_ack": "one_shot"}},
    "polls": {"vmm": {"precopy_user": "polls"}},
    "deduces": {"vmm": {"precopy_user": "deduces"}},
}
"""What may follow `v2`; the longer ones first where one begins like another."""
HELP = f"v2, v2 with any of {', '.join(f'-{name}' for name in SUFFIXES)}, v3, v3-n1 to v3-n{MAX_STREAMS}"


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol by its name."""

    name: str
    dirty_streams: int
    """0 for v2."""
    changes: Changes = field(default_factory=dict)
    """What the name sets otherwise than the scenario."""

    @classmethod
    def parse(cls, name: str, scenario: Scenario) -> Protocol:
        """UserError for a name that is none, or that the scenario cannot be run with."""
        if name == "v3":
            return cls(f"v3-n{scenario.v3.dirty_streams}", scenario.v3.dirty_streams)
        if match := re.fullmatch(r"v3-n([1-9][0-9]?)", name):
            if int(match[1]) <= MAX_STREAMS:
                return cls(name, int(match[1]))
        elif name == "v2" or name.startswith("v2-"):
            protocol = cls(name, 0, _changes(name))
            protocol.applied(scenario)
            return protocol
        raise UserError(f"unknown protocol {name!r}; there are {HELP}{did_you_mean(name, ['v2', 'v3'])}")

    def applied(self, scenario: Scenario) -> Scenario:
        """The scenario with what the name changes. UserError if it does not allow that."""
        tables = {table: getattr(scenario, table).model_dump() | keys for table, keys in self.changes.items()}
        if "vmm" in tables and tables["vmm"]["switchover_ack"] == "reusable" and not tables["vmm"]["reinit"]:
            raise UserError(
                f"protocol {self.name!r}: a reusable ack goes with REINIT only: add -reinit-flush or -reinit-invalidate"
            )
        return scenario.model_copy(
            update={table: type(getattr(scenario, table)).model_validate(keys) for table, keys in tables.items()}
        )


def _changes(name: str) -> Changes:
    changes: Changes = {}
    used: set[str] = set()
    rest = name.removeprefix("v2")
    while rest:
        suffix = next((each for each in SUFFIXES if re.match(rf"-{each}(-|$)", rest)), None)
        if suffix is None:
            raise UserError(
                f"unknown protocol {name!r}: {rest!r} is none of {', '.join(f'-{each}' for each in SUFFIXES)}"
            )
        if suffix in used:
            raise UserError(f"protocol {name!r}: -{suffix} is there twice")
        used.add(suffix)
        rest = rest.removeprefix(f"-{suffix}")
        for table, keys in SUFFIXES[suffix].items():
            for key, value in keys.items():
                if changes.setdefault(table, {}).setdefault(key, value) != value:
                    raise UserError(f"protocol {name!r}: -{suffix} contradicts what comes before it")
    return changes
