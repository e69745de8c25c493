# SPDX-License-Identifier: GPL-2.0-or-later
"""From two logs to a machine: its scenario, and its migration's downtime beside the simulated one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.logs.clocks import Clocks, aligned
from experiments.logs.cmdline import QemuSettings, read_settings
from experiments.logs.driver import LOAD, RESUME, SAVE, SUSPEND, Calls, of_migration, read_calls
from experiments.logs.fitted import Fit, figures, fitted, quantities_of, scenario_text
from experiments.logs.pair import Pair, read_pair
from experiments.logs.quantity import Certainty, LogQuantity
from experiments.logs.rates import LOAD_KEY, SAVE_KEY
from experiments.logs.waterfall import Waterfall, waterfall
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import find_base, load, parse
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import MAX_NAME, Scenario
from sim.scenario.units import BYTES_PER_S_PER_GBIT, NS_PER_MS

AS_IT_WAS = "v2"
"""The protocol of QEMU; the scenario says whether with multifd, and with which ack."""
SEED = 1
CLOSE = 0.05
"""A simulated downtime whose phases are this near to the real ones is explained. Ours."""
MORE = 1.5
"""How much more bandwidth than what is left needs is given where the simulated guest would not be stopped. Ours."""
ANONYMOUS = "vf"
STOP_ONLY = ".stop_only_mib"


@dataclass(frozen=True, slots=True)
class FittedMachine:
    """What two logs tell."""

    scenario: Scenario
    text: str
    """The scenario's file."""
    quantities: Sequence[LogQuantity]
    waterfall: Waterfall
    clocks: Clocks
    simulated: Outcome
    """One run of the scenario, as the real migration was set."""
    notes: Sequence[str]


def machine_of(
    source: str,
    target: str,
    *,
    name: str = "fit",
    extends: str = "mlx5",
    cmdline: Sequence[str] = (),
    driver: Sequence[str] = (),
    migration: int | None = None,
    rename: Sequence[str] = (),
) -> FittedMachine:
    """Read the logs and fit a scenario to them. What they do not tell is as in the one that it `extends`.

    `cmdline`: what QEMU was told, or files with it. `driver`: files with the times of the driver's functions.
    `migration`: its number in each log, from 1; None: the last one that completed. `rename`: what devices are called;
    by default `vf0`, `vf1`. UserError for input that is wrong, with what would be right.
    """
    if source == target:
        raise UserError(f"{source}: is both the source's and the target's log; they must be two")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-_.")[:MAX_NAME] or "fit"
    base = load(str(find_base(extends)))
    settings = read_settings(cmdline)
    pair = read_pair(source, target, migration)
    calls, of_driver = _of_migration(driver, pair)
    _tell_bytes(pair, settings)
    clocks = aligned(pair)
    fall = waterfall(pair, clocks)
    names = list(rename) or [f"{ANONYMOUS}{at}" for at in range(len(pair.devices))]
    found = quantities_of(pair, clocks, fall, base, settings, calls)
    notes = [*pair.notes, *_notes(pair, fall), *filter(None, [of_driver])]
    if not settings.precopy_tracking:
        notes.append("x-pre-copy-dirty-page-tracking is off: all RAM was sent again when the guest was stopped.")
    description = _described(pair, clocks, fall)
    multifd = pair.source.multifd or pair.target.multifd
    measured = figures(fall, found, len(pair.devices), multifd=multifd, one_sided=clocks.one_sided)
    tried: list[_Made] = []
    for each in _explanations(found, base):
        tried.append(_made(name, description, pair, base, names, each, measured))
        if _off(tried[0].outcome, fall) <= CLOSE * (fall.downtime_ms or 0.0):
            break
    best = min(tried, key=lambda each: _off(each.outcome, fall))
    if best is not tried[0]:
        others_ms = [each.downtime_ms for each in tried if each is not best]
        notes.append(
            "The logs do not tell whether save or load is slow, or what of a device could have moved before the stop. "
            f"The values that give {best.downtime_ms:.1f} ms are taken; by others it would be {min(others_ms):.1f} to "
            f"{max(others_ms):.1f} ms."
        )
    if best.stops_late:
        notes.append("The simulated guest would not have been stopped: vmm.bandwidth_gbit_per_s is set so that it is.")
    return FittedMachine(best.scenario, best.text, best.fit.quantities, fall, clocks, best.outcome, notes)


def _of_migration(driver: Sequence[str], pair: Pair) -> tuple[Calls, str]:
    """What the driver did in this migration: it saves and is stopped at the source, loads and starts at the target."""
    source, target = ((side.begin_us * 1000, side.end_us * 1000) for side in (pair.source, pair.target))
    return of_migration(read_calls(driver, source), {SUSPEND: source, SAVE: source, LOAD: target, RESUME: target})


@dataclass(frozen=True, slots=True)
class _Made:
    """A scenario of these logs, and a run of it."""

    fit: Fit
    text: str
    scenario: Scenario
    outcome: Outcome
    stops_late: bool

    @property
    def downtime_ms(self) -> float:
        return (self.outcome.downtime_ns or 0) / NS_PER_MS


def _made(
    name: str,
    description: str,
    pair: Pair,
    base: Scenario,
    names: Sequence[str],
    found: Sequence[LogQuantity],
    measured: Mapping[str, Any],
) -> _Made:
    fit = fitted(pair, base, names, found)
    text = scenario_text(name, description, fit, base, measured)
    scenario = parse(text, "what the logs and --cmdline tell")
    outcome = _simulated(scenario)
    stops_late = outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    if stops_late:
        _let_it_stop(fit, pair, scenario)
        text = scenario_text(name, description, fit, base, measured)
        scenario = parse(text, "what the logs and --cmdline tell")
        outcome = _simulated(scenario)
    return _Made(fit, text, scenario, outcome, stops_late)


def _explanations(found: Sequence[LogQuantity], base: Scenario) -> list[list[LogQuantity]]:
    """The quantities as they are. Where the single channel does not tell whether save or load is slow, the two others
    that are possible; and each of them with no more that only a stopped device gives than the devices say."""
    bounds = {each.key: each for each in found if each.kind is Certainty.BOUNDED}
    rates: list[dict[str, Any]] = [{}]
    if SAVE_KEY in bounds and LOAD_KEY in bounds:
        fast = {SAVE_KEY: max(base.firmware.save_mib_per_s, bounds[SAVE_KEY].low or 0.0)}
        rates += [fast, fast | {LOAD_KEY: bounds[LOAD_KEY].low or bounds[LOAD_KEY].value}]
    least = {
        key: each.low for key, each in bounds.items() if key.endswith(STOP_ONLY) and each.low not in (None, each.value)
    }
    return [
        [replace(each, value=round(changed[each.key], 6)) if each.key in changed else each for each in found]
        for stop_only in ([{}, least] if least else [{}])
        for changed in (each | stop_only for each in rates)
    ]


def _off(outcome: Outcome, fall: Waterfall) -> float:
    """How far a simulated downtime is from the real one, summed over its phases, ms; where that is not known, 0.

    Transfer and load are taken together: when the last byte came, a log does not show.
    """
    if outcome.downtime_ns is None:
        return math.inf
    if fall.downtime_ms is None:
        return 0.0
    off = {name: fall.phases_ms[name] - took / NS_PER_MS for name, took in outcome.phases_ns.items()}
    off["load"] += off.pop("transfer")
    return sum(abs(each) for each in off.values())


def _tell_bytes(pair: Pair, settings: QemuSettings) -> None:
    """Each device's part of what query-migrate says of all, where multifd shows packets only."""
    packets = sum(len(there.pieces) for _, there in pair.devices)
    if settings.vfio_bytes is not None and pair.source.multifd and packets:
        for here, there in pair.devices:
            here.told_bytes = settings.vfio_bytes * len(there.pieces) // packets


def _simulated(scenario: Scenario) -> Outcome:
    return simulate(scenario, Protocol.parse(AS_IT_WAS, scenario), SEED)


def _let_it_stop(fit: Fit, pair: Pair, scenario: Scenario) -> None:
    """Give a bandwidth at which what is left fits, as it did for the real guest."""
    left = sum(device.whole_bytes for device in scenario.devices) + scenario.ram.working_set_mib * (1 << 20)
    left = max(left, pair.source.decided[1] if pair.source.decided else 0)
    rate = MORE * left / (scenario.vmm.downtime_limit_ms / 1000)
    fit.set(
        "vmm.bandwidth_gbit_per_s",
        round(rate / BYTES_PER_S_PER_GBIT, 6),
        "fitted: what is left of RAM and devices fits the downtime limit, as it did: the guest was stopped",
    )


def _notes(pair: Pair, fall: Waterfall) -> list[str]:
    notes = []
    if not pair.traced:
        notes.append("There are QMP events only: sizes and rates cannot be told; stops and resumes can.")
    if fall.downtime_ms is None:
        notes.append("The end of the downtime is not in the target's log: it may be cut.")
    if pair.traced and "src-vm-stopped" not in pair.source.marks:
        notes.append("vmstate_downtime_checkpoint is not in the source's log: the phases are less sharp.")
    return notes


def _described(pair: Pair, clocks: Clocks, fall: Waterfall) -> str:
    count = len(pair.devices)
    least = "at least " if clocks.one_sided else ""
    took = f", {least}{fall.downtime_ms:.1f} ms of downtime" if fall.downtime_ms is not None else ""
    devices, them = ("devices", "them") if count > 1 else ("device", "it")
    return f"{count} VFIO {devices}, as the logs of one migration show {them}{took}"
