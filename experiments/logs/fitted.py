# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario of a machine: what its logs tell, over the scenario that it extends, as the text of a TOML file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.logs.clocks import Clocks
from experiments.logs.cmdline import QemuSettings
from experiments.logs.device_quantities import critical_quantities, device_quantities
from experiments.logs.driver import Calls
from experiments.logs.machine_quantities import machine_quantities
from experiments.logs.pair import Pair
from experiments.logs.quantity import Certainty, LogQuantity
from experiments.logs.rates import rate_quantities
from experiments.logs.waterfall import Waterfall
from proto_v3.errors import UserError
from sim.scenario import toml
from sim.scenario.device import Device
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.tables import Published

Values = dict[str, tuple[Any, str]]
"""By dotted key: value and source."""
PART_OF_MEASURED = (
    "firmware.state_command_ms_per_vf",
    "firmware.state_command_us_per_vector",
    "firmware.state_command_us_per_pf_vector",
    "firmware.load_finish_us_per_vector",
    "vmm.config_load_us_per_vector",
)
"""What the base adds to each device's times. Measured times have it in them, so it is 0 here."""
POSITIVE = ("state_mib", "_per_s")
"""The ends of keys that may not be 0."""
DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
WHOLE = "downtime_ms"
"""What is measured of the whole, and no key is fitted to."""
NO_UPPER = 8.0
"""Where neither the logs nor the base have a bound, a range ends at this many times the value. Ours."""


@dataclass(slots=True)
class Fit:
    """What came of it."""

    quantities: list[LogQuantity]
    values: Values = field(default_factory=dict)
    ranges: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By key: low, high, why; or as the base has it."""

    def set(self, key: str, value: Any, source: str) -> None:
        """Set a key that no log tells."""
        self.values[key] = value, source


def quantities_of(
    pair: Pair, clocks: Clocks, fall: Waterfall, base: Scenario, settings: QemuSettings, calls: Calls
) -> list[LogQuantity]:
    """All that the logs tell. `base` is the scenario that is extended."""
    return [
        *_of_devices(pair, base),
        *machine_quantities(pair, clocks, fall, settings, base),
        *rate_quantities(pair, clocks, calls, base),
    ]


def fitted(pair: Pair, base: Scenario, names: Sequence[str], quantities: Sequence[LogQuantity]) -> Fit:
    """The keys of a scenario that extends `base`, with devices called `names`.

    UserError if the base has more devices than the logs, or if there are not as many names.
    """
    count = len(pair.devices)
    if len(names) != count or len(set(names)) < count:
        raise UserError(f"--rename {','.join(names)}: must be {count} different names, one a device")
    if len(base.device) > count:
        raise UserError(
            f"--extends {base.name}: has {len(base.device)} tables of devices, the logs have {count} devices"
        )
    for name in names:
        if not DEVICE_NAME.fullmatch(name):
            raise UserError(f"--rename {name}: must be letters, digits, '.', '_' and '-', 32 at most")
    fit = Fit(list(quantities))
    for at, name in enumerate(names):
        fit.set(f"device.{at}.name", name, "measured: a device of the logs, called so here")
    fit.values |= {each.key: (each.value, each.source) for each in quantities if each.value is not None}
    for each in quantities:
        if each.kind is Certainty.BOUNDED:
            _range(fit, each, base)
    _agree(fit, pair, base)
    _whole_devices(fit, base, count)
    return fit


def _of_devices(pair: Pair, base: Scenario) -> Iterator[LogQuantity]:
    initial = None
    for at, (here, there) in enumerate(pair.devices):
        template = base.device[min(at, len(base.device) - 1)]
        yield from device_quantities(pair, at, template)
        first = here.reports[0] if here.reports else None
        initial = initial or (first is not None and first.initial_bytes and first.dirty_bytes)
        if initial:
            yield from critical_quantities(f"device.{at}.", here, there, template)


def _agree(fit: Fit, pair: Pair, base: Scenario) -> None:
    """What the schema wants to fit together."""
    known = parameters(base)
    for key in PART_OF_MEASURED:
        if known.get(key):
            fit.set(key, 0.0, "measured: it is in the devices' own times")
    size_gib = fit.values.get("ram.size_gib", (base.ram.size_gib, ""))[0]
    if "ram.nonzero_gib" not in fit.values and base.ram.nonzero_gib > size_gib:
        fit.set("ram.nonzero_gib", size_gib, "assumed: no more than the guest has")
    if "ram.working_set_mib" not in fit.values and base.ram.working_set_mib > size_gib * 1024:
        fit.set("ram.working_set_mib", size_gib * 1024, "assumed: no more than the guest has")
    for at in range(len(pair.devices)):
        template = base.device[min(at, len(base.device) - 1)]
        if template.count != 1:
            fit.set(f"device.{at}.count", 1, "measured: a device of the logs")
        state, only = (fit.values.get(f"device.{at}.{key}", (None, ""))[0] for key in ("state_mib", "stop_only_mib"))
        if state is not None and only is None and template.stop_only_mib > state:
            fit.set(f"device.{at}.stop_only_mib", state, "assumed: all of it, as of the base's devices")
            only = state
        if state is not None and only is not None:
            _leave_room(fit, at, template, state, only)
        at_s, objects = f"device.{at}.reconfigurations.at_s", f"device.{at}.critical.objects"
        if at_s in fit.values and not fit.values.get(objects, (template.critical.objects, ""))[0]:
            fit.set(objects, 1, "measured: REINIT, so there is critical data; how much, is not known")
            fit.set(f"device.{at}.critical.object_kib", 1.0, "assumed: how large it is, the logs do not tell")


def _leave_room(fit: Fit, at: int, template: Device, state_mib: float, only_mib: float) -> None:
    """What is saved after the stop only is no more than the state; where the guest writes, a block less."""
    state, stop_only, writes = (f"device.{at}.{key}" for key in ("state_mib", "stop_only_mib", "writes.mib_per_s"))
    room_mib = fit.values.get(f"device.{at}.block_kib", (template.block_kib, ""))[0] / 1024
    if not fit.values.get(writes, (template.writes.mib_per_s if template.writes else 0.0, ""))[0]:
        room_mib = 0.0
    elif only_mib > state_mib - room_mib:
        room_mib = 0.0
        fit.set(writes, 0.0, "assumed: nothing is left that they could dirty")
        fit.ranges.pop(writes, None)
    most_mib = max(only_mib, min(state_mib - room_mib, fit.ranges.get(stop_only, {}).get("high", only_mib)))
    for key, end, bound in ((stop_only, "high", most_mib), (state, "low", most_mib + room_mib)):
        own = fit.ranges.get(key)
        if own is not None:
            own[end] = min(own[end], bound) if end == "high" else max(own[end], bound)
            if own["low"] >= own["high"]:
                del fit.ranges[key]


def _range(fit: Fit, each: LogQuantity, base: Scenario) -> None:
    """The bounds of a quantity as the range of its key; a side that has none takes the base's."""
    own = base.ranges.get(each.key)
    low, high, value = each.low, each.high, each.value
    if low is None:
        low = own.low if own is not None and own.of is None and own.low is not None and own.low <= value else 0.0
    if high is None:
        high = own.high if own is not None and own.of is None and own.high is not None else value * NO_UPPER
        high = max(high, value)
    if (low == 0 and each.low is None) or each.key.endswith(POSITIVE):
        low = max(low, value / NO_UPPER)
    low, high = min(low, value), max(high, value)
    if low < high:
        why = f"{each.how}" + (
            "" if each.low is not None and each.high is not None else "; the other end is the base's"
        )
        wide = {"log": True} if low > 0 and each.key.endswith("_per_s") else {}
        fit.ranges[each.key] = {"low": low, "high": high, **wide, "why": why}


def _whole_devices(fit: Fit, base: Scenario, count: int) -> None:
    """A device beyond those of the base has each key of its last one, and the range of it."""
    last = len(base.device) - 1
    known = parameters(base)
    for key, value in known.items():
        table, _, rest = key.partition(f"device.{last}.")
        if table or not rest:
            continue
        for at in range(last + 1, count):
            own = f"device.{at}.{rest}"
            if own in fit.values:
                continue
            fit.set(own, value, base.sources.get(key, "assumed: as the base's device"))
            if key in base.ranges and base.ranges[key].of is None:
                fit.ranges[own] = base.ranges[key].model_dump(exclude_unset=True)


# --- the text ---------------------------------------------------------------------------------------------------------

HEAD = """\
# A machine as the logs of one of its migrations show it. What they do not tell is as in {base}; [sources] says which.
# With this file as FILE:
#   proto-v3 scenarios FILE   all values, with their sources and ranges
#   proto-v3 compare FILE     run it
#   proto-v3 validate FILE    hold it against what the logs measured ([[published]])
"""


def figures(
    fall: Waterfall, quantities: Iterable[LogQuantity], devices: int, *, multifd: bool, one_sided: bool
) -> dict[str, Any]:
    """What was measured of the downtime, as `[[published]]` has it: ms, in lists one value a device.

    The stop and the configs, to which keys are fitted, and the whole. Saves and loads are left out: in the logs they
    contain waits for one another, for RAM, and for the other side, and RAM's have what the devices' turns took. By
    multifd several devices' configs are, too: a simulated one has the wait for the others in it, and in the logs it has
    not. `one_sided`: of the whole downtime the logs tell the least only, so it is left out.
    """
    known = {each.key for each in quantities if each.value is not None}
    ms = {step.stage: round(step.ms, 3) for step in fall.steps if step.ms > 0}
    told: dict[str, Any] = {}
    if "stage_stop_0_ns" in ms and "vmm.vcpu_stop_ms" in known:
        told["stop_ms"] = ms["stage_stop_0_ns"]
    if devices == 1 or not multifd:
        configs = [ms.get(f"stage_config_load_{at}_ns") for at in range(devices)]
        if all(configs):
            told["config_load_ms"] = configs
    if fall.downtime_ms and not one_sided:
        told[WHOLE] = round(fall.downtime_ms, 3)
    return told


def scenario_text(name: str, description: str, fit: Fit, base: Scenario, measured: Mapping[str, Any]) -> str:
    """The TOML file. It stands by itself: what the logs do not tell is in it as the base has it, with its range.

    `measured`: the figures that the logs tell; `proto-v3 validate` holds runs against them. To all but the whole
    downtime values were fitted.
    """
    known = parameters(base)
    values = {key: (value, base.sources.get(key, f"assumed: as in {base.name}")) for key, value in known.items()}
    values |= fit.values
    ranges = {
        key: each.model_dump(exclude_unset=True)
        for key, each in base.ranges.items()
        if key not in fit.values and each.of not in fit.values
    }
    ranges |= fit.ranges
    tables: dict[str, Any] = {"device": []}
    for key in sorted(values, key=_place):
        tables = toml.put(tables, key.split("."), values[key][0])
    lines = [
        HEAD.format(base=base.name),
        *_lines({"name": name, "description": description}),
    ]
    for table, inner in sorted(tables.items()):
        for one in inner if isinstance(inner, list) else [inner]:
            lines += ["", f"[[{table}]]" if isinstance(inner, list) else f"[{table}]", *_lines(one)]
            for below, keys in one.items():
                if isinstance(keys, dict):
                    lines += ["", f"[{table}.{below}]", *_lines(keys)]
    if measured:
        each = Published.model_validate({"citation": "x", **measured}).figures()
        about = {"citation": "the logs of one migration of this machine, read by proto-v3 fit"}
        used = {"fitted": [key for key in each if key != WHOLE]}
        lines += ["", "[[published]]", *_lines({**about, **used, **measured})]
    lines += ["", "[sources]", *(f"{_toml(key)} = {_toml(source)}" for key, (_, source) in _sorted(values))]
    lines += ["", "[ranges]"]
    for key, each in _sorted(ranges):
        lines.append(f"{_toml(key)} = {{ {', '.join(f'{name} = {_toml(value)}' for name, value in each.items())} }}")
    return "\n".join(lines) + "\n"


def _place(key: str) -> tuple[int, str]:
    """Devices by their number: a list is filled from its begin."""
    part = key.split(".")
    return (int(part[1]) if part[0] == "device" else -1), key


def _sorted(table: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return sorted(table.items(), key=lambda item: _place(item[0]))


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict)]


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
