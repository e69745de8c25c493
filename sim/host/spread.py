# SPDX-License-Identifier: GPL-2.0-or-later
"""How a host's fixed times vary from run to run: each part of a host has one factor a run, of mean 1.

The factors hang on the seed, the host and the part alone: protocols that are compared have the same ones. They are
drawn from a stream of their own, so that nothing else moves.
"""

from __future__ import annotations

import enum
import math

import numpy as np

from sim.scenario.scenario import Scenario
from sim.scenario.units import Table

SIDES = ("source", "target")
SPAWN_KEY = 3
"""Of the seed's child for the factors. Before it are those of the guest and the two hosts (sim.host.host.seeds)."""


class HostPart(enum.Enum):
    """A part of a host that has a factor of its own: the keys of the scenario that it multiplies, by their table."""

    SET_UP = (("vmm", ("setup_ms",)),)
    VCPUS = (("vmm", ("vcpu_stop_ms", "vcpu_start_ms")),)
    RAM = (("ram", ("sync_ms", "final_sync_ms", "final_scan_ms")),)
    STATES = (
        ("device", ("suspend_ms", "quiesce_ms", "resume_ms")),
        ("firmware", ("state_command_ms_per_vf", "state_command_us_per_vector", "state_command_us_per_pf_vector")),
    )
    CONFIG = (("device", ("config_load_ms",)), ("vmm", ("config_load_us_per_vector", "other_load_ms")))


def factors(spread_cv: float, seed: int, side: str) -> dict[HostPart, float]:
    """The factors of a host in the run with this seed: lognormal, with mean 1 and this coefficient of variation."""
    variance = math.log1p(spread_cv**2)
    of_hosts = np.random.SeedSequence(seed, spawn_key=(SPAWN_KEY,)).spawn(len(SIDES))
    rng = np.random.default_rng(of_hosts[SIDES.index(side)])
    return {part: float(rng.lognormal(-variance / 2, math.sqrt(variance))) for part in HostPart}


def of_host(scenario: Scenario, seed: int, side: str) -> Scenario:
    """The scenario as one host has it in the run with this seed."""
    if not scenario.host.spread_cv:
        return scenario
    for part, factor in factors(scenario.host.spread_cv, seed, side).items():
        for name, keys in part.value:
            table = getattr(scenario, name)
            slower = [_slower(one, keys, factor) for one in table] if name == "device" else _slower(table, keys, factor)
            scenario = scenario.model_copy(update={name: slower})
    return scenario


def _slower(table: Table, keys: tuple[str, ...], factor: float) -> Table:
    return table.model_copy(update={key: getattr(table, key) * factor for key in keys})
