# SPDX-License-Identifier: GPL-2.0-or-later
"""A v2 user on a v3 device sees v2: the same timeline, span by span, as on a device that knows v2 only.

The tests of v2 themselves run on devices that know v3, and once more on devices that were opted in and out again:
tests/conftest.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from proto_v3.vmm.migration import OutcomeKind, Side, Source
from proto_v3.vmm.v2 import V2Options
from proto_v3.vmm.v2_source import V2Source
from proto_v3.vmm.v3 import V3Options
from proto_v3.wire.channel import Channel
from sim.device.driver import SimDriver
from sim.host import vmms
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.protocol import Protocol
from tests.build.hosts import KINDS
from tests.build.scenario import small_scenario

PROTOCOLS = [
    *("v2", "v2-multifd", "v2-ack", "v2-polls", "v2-reinit-flush", "v2-reinit-invalidate-ack"),
    "v2-multifd-reinit-flush-ack-reusable-polls",
]
BUSY = {
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 200.0},
    "device.0.reconfigurations": {"poisson_per_s": 200.0, "objects_each": 2},
}


def outcome(name: str, changes: dict[str, Any], seed: int = 3) -> Outcome:
    scenario = small_scenario(BUSY | changes)
    return simulate(scenario, Protocol.parse(name, scenario), seed)


@pytest.mark.rule("v3.2.3")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_v2_is_the_same_on_a_device_that_knows_v3(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_v2 = outcome(name, KINDS[kind] | {"device.0.max_dirty_streams": 0})
    of_v3 = outcome(name, KINDS[kind] | {"device.0.max_dirty_streams": 16})
    assert of_v3 == of_v2
    set_state = SimDriver.set_state
    opted: set[SimDriver] = set()

    async def in_and_out(self: SimDriver, target: Any) -> Any:
        if self not in opted:
            opted.add(self)
            await self.set_streams(4)
            await self.set_streams(0)
        return await set_state(self, target)

    monkeypatch.setattr(SimDriver, "set_state", in_and_out)
    assert outcome(name, KINDS[kind] | {"device.0.max_dirty_streams": 16}) == of_v2
    assert len(opted) == 2


def test_and_what_was_compared_is_not_all_failures() -> None:
    outcomes = [outcome(name, KINDS[kind]) for name in PROTOCOLS for kind in KINDS]
    assert sum(each.kind is OutcomeKind.COMPLETED for each in outcomes) > len(outcomes) / 2
    assert len({each.digest for each in outcomes}) > len(PROTOCOLS)


@pytest.mark.rule("v3.12.2")
@pytest.mark.parametrize("name", ["v2", "v2-multifd"])
def test_a_source_that_falls_back_says_so_and_runs_v2_a_round_trip_later(name: str) -> None:
    changes = {"vmm.multifd": name == "v2-multifd"}
    scenario = small_scenario(changes | {"v3.target_knows": "v2"})  # an idle device: nothing hangs on the moment
    fell_back = simulate(scenario, Protocol.parse("v3-n4", scenario), 1)
    asked_for = simulate(scenario, Protocol.parse("v2", scenario), 1)
    assert fell_back.note == "the target knows v2 only: fell back to it"
    assert asked_for.note == ""
    assert fell_back.kind is asked_for.kind is OutcomeKind.COMPLETED
    assert fell_back.downtime_ns == asked_for.downtime_ns
    assert fell_back.phases_ns == pytest.approx(asked_for.phases_ns, abs=10), "rounding to the nanosecond"
    assert fell_back.total_ns is not None
    assert asked_for.total_ns is not None
    assert 100_000 < fell_back.total_ns - asked_for.total_ns < 101_000, "the HELLOs: a round trip, and a few bytes"


@pytest.mark.rule("v3.12.3")
def test_a_source_that_says_no_hello_is_taken_for_one_of_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target knows v3, and waits for a HELLO."""
    scenario = small_scenario({"v3.target_knows": "v3"})
    of_v2 = simulate(scenario, Protocol.parse("v2", scenario), 1)

    async def knows_v2_only(
        side: Side, channels: Sequence[Channel], v3: V3Options, v2: V2Options
    ) -> tuple[Source, str]:
        return V2Source(side, channels, v2), ""

    monkeypatch.setattr(vmms, "negotiated_source", knows_v2_only)
    taken = simulate(scenario, Protocol.parse("v3-n4", scenario), 1)
    assert taken.kind is OutcomeKind.COMPLETED
    assert taken.downtime_ns == of_v2.downtime_ns
    assert taken.counters.device_bytes == of_v2.counters.device_bytes
