# SPDX-License-Identifier: GPL-2.0-or-later
"""What several test modules share: a scenario that is small, quick to run, and has round numbers to reckon with."""

from __future__ import annotations

import copy
import functools
import json
import tomllib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ParamSpec

from sim.clock.virtual import run
from sim.scenario.file import parse
from sim.scenario.scenario import Scenario

P = ParamSpec("P")

SMALL = """
name = "small"
description = "One device of 8 MiB and a little RAM"

[ram]
size_gib = 0.0625
nonzero_gib = 0.0078125
scan_gib_per_s = 8.0
send_gib_per_s = 2.0
dirty_mib_per_s = 0.0
working_set_mib = 1.0
sync_ms = 0.1
final_sync_ms = 0.1
final_scan_ms = 0.2

[[device]]
name = "dev"
features = ["STOP_COPY", "P2P", "PRE_COPY"]
max_dirty_streams = 16
state_mib = 8.0
stop_only_mib = 0.0
block_kib = 64
suspend_ms = 1.0
quiesce_ms = 2.0
config_load_ms = 3.0
critical = { objects = 4, object_kib = 4.0, setup_us = 100.0 }

[firmware]
engines = 2
save_mib_per_s = 1024.0
save_command_us = 10.0
load_mib_per_s = 2048.0
load_command_us = 10.0
load_finish_ms = 5.0
service_cv = 0.0

[driver]
chunk_mib = 1
chunks = 2
lock = "per_fd"
call_us = 1.0
precopy_image = "chunks"
initial = "critical"
stop_copy_size = "left"

[host]
copy_gib_per_s = 4.0
memory_gib_per_s = 16.0

[link]
gbit_per_s = 40.0
per_connection_gbit_per_s = 10.0
round_trip_us = 100.0
socket_buffer_mib = 4.0

[vmm]
setup_ms = 1.0
vcpu_stop_ms = 1.0
vcpu_start_ms = 1.0
downtime_limit_ms = 20.0
bandwidth_window_ms = 10.0
decision_interval_ms = 1.0
ram_budget_ms = 5.0
give_up_s = 2.0

[v3]
decision_interval_ms = 1.0
"""


def small_tables(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The small scenario's tables, with values put in at dotted keys (`device.0.state_mib`).

    None takes a key out. A number one past a list's end appends to it; tables on the way are made.
    """
    tables = tomllib.loads(SMALL)
    for dotted, value in copy.deepcopy(dict(changes or {})).items():  # one key may be put into another's value
        way: list[Any] = [int(part) if part.isdecimal() else part for part in dotted.split(".")]
        last = way.pop()
        place: Any = tables
        for part in way:
            place = place[part] if isinstance(place, list) else place.setdefault(part, {})
        if value is None:
            del place[last]
        elif isinstance(place, list) and last == len(place):
            place.append(value)
        else:
            place[last] = value
    return tables


def to_toml(tables: Mapping[str, Any]) -> str:
    """The tables as TOML text, one line a top-level key."""
    return "".join(f"{_toml(key)} = {_toml(value)}\n" for key, value in tables.items())


def _toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{_toml(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case bool() | str():
            return json.dumps(value)
        case _:
            return repr(value)


def with_p2p(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Devices with P2P added where there are several: without it they would be refused."""
    several = sum(device.get("count", 1) for device in devices) > 1
    return [each | {"features": sorted({*each["features"], "P2P"})} if several else each for each in devices]


def small_text(changes: Mapping[str, Any] | None = None) -> str:
    """The small scenario as TOML text, changed as `small_tables` does. It need not be valid."""
    return to_toml(small_tables(changes))


def small_scenario(changes: Mapping[str, Any] | None = None) -> Scenario:
    """The small scenario, changed as `small_tables` does: `small_scenario({"driver.lock": "device"})`."""
    return _parsed(small_text(changes))


@functools.cache
def _parsed(text: str) -> Scenario:
    """Nothing changes a scenario once it is read."""
    return parse(text, "small.toml")


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A decorator: run an async test in virtual time."""

    @functools.wraps(test)
    def in_virtual_time(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs))

    return in_virtual_time


# Everything at once: writes, reconfigurations, several devices, service times that vary, tasks that wait in crowds.
BUSY = small_scenario(
    {
        "device.0.count": 3,
        "device.0.critical": {"objects": 40, "object_kib": 4.0, "setup_us": 200.0},
        "device.0.writes": {"pattern": "hotspot", "mib_per_s": 100.0},
        "device.0.reconfigurations": {"poisson_per_s": 20.0, "objects_each": 8},
        "driver.lock": "global",
        "firmware.service_cv": 0.3,
        "ram.dirty_mib_per_s": 10.0,
    }
)

# Who gives up cancels tasks, which asyncio keeps in sets.
ENDS_EARLY: dict[str, dict[str, Any]] = {
    "cancelled": {"vmm.cancel_after_s": 0.012},
    "a target that fails": {"device.0.faults": [{"side": "target", "arc": "RESUMING -> STOP"}]},
    "a source that fails": {"device.0.faults": [{"side": "source", "arc": "PRE_COPY -> PRE_COPY_P2P"}]},
    "an ack too late": {"device.0.reconfigurations": {"during_stop_ms": [0.5]}},
}
