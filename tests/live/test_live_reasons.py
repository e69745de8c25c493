# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a live run failed is said in the words that it has in virtual time, also where the target is on another host."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from tests.build.live import Seen, live_run, live_scenario, two_hosts
from tests.build.runs import run

STAYS = "; the guest runs on at the source"
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("v2", {"side": "target", "command": "LOAD", "errno": "ENOMEM"}, "target, dev: write()"),
    ("v2-multifd", {"side": "target", "arc": "RESUMING -> STOP", "errno": "EBUSY"}, "target, dev: RESUMING -> STOP"),
    ("v3-n2", {"side": "target", "command": "LOAD", "errno": "EINVAL"}, "target, dev: write()"),
    ("v3-n2", {"side": "source", "arc": "RUNNING -> PRE_COPY", "leaves": "ERROR"}, "source, dev: RUNNING -> PRE_COPY"),
]


@pytest.mark.parametrize(("protocol", "fault", "told"), CASES)
def test_the_reason_is_that_of_virtual_time_and_where_the_guest_runs(
    protocol: str, fault: dict[str, Any], told: str
) -> None:
    changes = {"device.0.faults": [fault]}
    result, _ = asyncio.run(live_run(protocol, changes=changes))
    check(result.outcome, run(live_scenario(changes), protocol), told)


@pytest.mark.parametrize("protocol", ["v2", "v3-blocks"])
def test_a_save_that_fails_is_the_first_cause_whichever_call_it_ends(protocol: str) -> None:
    fault = {"side": "source", "command": "SAVE", "after": 1, "errno": "ETIMEDOUT"}
    result, _ = asyncio.run(live_run(protocol, changes={"device.0.faults": [fault]}))
    call = r"source, dev( stream \d)?: \S+ failed: (ENODEV|EIO) \([^)]*\); this left it in (PRE_COPY|ERROR)"
    reset = r"(; source, dev was reset under the guest, and what the guest had in it is lost \([^)]*\))?"
    assert re.fullmatch(f"{call}; first cause: firmware SAVE 2: ETIMEDOUT{reset}{STAYS}", result.outcome.reason)
    assert result.outcome.counters.devices_reset_under_guest == protocol.startswith("v3")


def check(live: Outcome, virtual: Outcome, told: str) -> None:
    assert live.kind is virtual.kind is OutcomeKind.FAILED
    assert virtual.reason.startswith(f"{told} failed: E")
    assert live.reason == virtual.reason + STAYS
    assert live.counters.devices_reset_under_guest == virtual.counters.devices_reset_under_guest
    if "->" in told:  # whether a LOAD fails before the stop is a matter of time
        assert (live.counters.stopped_in_vain_ns > 0) == (virtual.counters.stopped_in_vain_ns > 0)


def test_a_target_on_another_host_tells_it_too() -> None:
    protocol, fault, told = CASES[2]
    changes = {"device.0.faults": [fault]}

    async def nothing(_: Seen) -> None:
        pass

    result, _ = asyncio.run(two_hosts(protocol, nothing, changes=changes))
    check(result.outcome, run(live_scenario(changes), protocol), told)
