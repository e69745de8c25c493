# SPDX-License-Identifier: GPL-2.0-or-later
"""v3: a guest that reconfigures its device faster than the target sets it up, and a stop that does not wait for it."""

from __future__ import annotations

from typing import Any

import pytest

from sim.outcome import Outcome, OutcomeKind
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.units import NS_PER_MS
from tests.build.scenario import small_scenario

EVERY_MS = 20
SETUP_MS = 30
RESTLESS: dict[str, Any] = {
    "device.0.reconfigurations": {"at_s": [at * EVERY_MS / 1000 for at in range(1, 150)], "objects_each": 1},
    "device.0.critical": {"objects": 4, "object_kib": 4.0, "setup_us": SETUP_MS * 1000.0},
    "vmm.downtime_limit_ms": 100.0,
    "vmm.give_up_s": 2.0,
}
"""A new epoch every 20 ms, where one takes 30 ms to set up: the device is never ready."""


def moved(protocol: str, **changes: Any) -> Outcome:
    scenario = small_scenario(RESTLESS | {key.replace("__", "."): value for key, value in changes.items()})
    return simulate(scenario, Protocol.parse(protocol, scenario), 1)


@pytest.mark.rule("v3.6.9")
@pytest.mark.parametrize("protocol", ["v3-n1", "v3-n2-retry", "v3-blocks-n2"])
def test_without_a_limit_a_restless_guest_is_never_stopped(protocol: str) -> None:
    outcome = moved(protocol)
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert "critical data of dev (epoch " in outcome.reason
    assert outcome.note == ""


@pytest.mark.rule("v3.6.9")
@pytest.mark.parametrize("protocol", ["v3-n1", "v3-n2-retry", "v3-blocks-n2"])
@pytest.mark.parametrize("after_ms", [300.0, 600.0])
def test_with_one_it_is_stopped_after_that_time_and_the_set_up_is_in_the_downtime(
    protocol: str, after_ms: float
) -> None:
    outcome = moved(protocol, v3__force_after_ms=after_ms)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.note.startswith("stopped by force: the critical data of dev was not loaded; ")
    assert "the largest part of the critical path is critical set-up" in outcome.note
    assert outcome.counters.late_final_checks == 1
    assert outcome.counters.retries == 0
    assert outcome.downtime_ns is not None
    assert outcome.total_ns is not None
    assert outcome.downtime_ns > SETUP_MS * NS_PER_MS, "what was late was set up then"
    assert after_ms * NS_PER_MS < outcome.total_ns < (after_ms + 1000) * NS_PER_MS


@pytest.mark.rule("v3.6.9")
def test_a_guest_that_gives_the_target_time_is_stopped_when_it_is_ready_whatever_the_limit() -> None:
    calm = {"device.0.reconfigurations": {"at_s": [0.02], "objects_each": 1}}
    runs = []
    for limit in ({}, {"v3.force_after_ms": 1900.0}):
        scenario = small_scenario(RESTLESS | calm | limit)
        runs.append(simulate(scenario, Protocol.parse("v3-n2", scenario), 1))
    assert [run.kind for run in runs] == [OutcomeKind.COMPLETED] * 2
    assert runs[0].digest == runs[1].digest
    assert not any("force" in run.note for run in runs)


def test_what_does_not_fit_is_not_stopped_by_force_either() -> None:
    """The limit is for readiness. How long a guest may stand still remains the downtime limit's."""
    busy = {"pattern": "uniform", "mib_per_s": 500.0}
    outcome = moved("v3-n1", v3__force_after_ms=300.0, vmm__downtime_limit_ms=0.1, device__0__writes=busy)
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
