# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole migrations in virtual time: how they ended, and what they were made of."""

from __future__ import annotations

from sim.clock import virtual
from sim.outcome import Outcome
from sim.run import VirtualRun, simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario


def run(scenario: Scenario, name: str, seed: int = 1) -> Outcome:
    """How the protocol of this name migrates it."""
    return simulate(scenario, Protocol.parse(name, scenario), seed)


def prepared(scenario: Scenario, name: str, seed: int = 1) -> VirtualRun:
    """A run that has not begun."""
    protocol = Protocol.parse(name, scenario)
    return VirtualRun(protocol.applied(scenario), seed)


def kept_run(scenario: Scenario, name: str, seed: int = 1) -> tuple[Outcome, VirtualRun]:
    """The outcome, and what the run was made of: devices, images, timeline."""
    kept = prepared(scenario, name, seed)
    return virtual.run(kept.outcome()), kept
