# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread's wake-up: what it takes, where, and how often."""

from __future__ import annotations

import asyncio

import pytest

from proto_v3.notify import Notify
from proto_v3.timeline import Timeline
from proto_v3.wire.frames import EMPTY
from sim.clock import virtual
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import VirtualLoop
from sim.host.link import NetworkLink
from sim.run import VirtualRun
from tests.build.runs import kept_run, run
from tests.build.scenario import small_scenario

WAKE_UP_US = 30.0
WAKE_UP_NS = 30_000


def wake_ups(kept: VirtualRun) -> int:
    """Spans of wake-ups on the timeline; each takes WAKE_UP_NS."""
    recorded = kept.timeline.recorded()
    if "wake-up" not in recorded.names:
        return 0
    of_them = recorded.spans["what"] == recorded.names.index("wake-up")
    took_ns = (recorded.spans["end_ns"] - recorded.spans["start_ns"])[of_them]
    assert (took_ns == WAKE_UP_NS).all()
    return int(of_them.sum())


def test_a_receiver_that_waited_takes_it_and_one_that_finds_data_does_not() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        settings = small_scenario({"link.round_trip_us": 100.0}).link
        here, there = NetworkLink(settings, loop, Timeline(now_ns), WAKE_UP_NS).connect("connection")
        times = []

        async def receive() -> None:
            for _ in range(3):
                await there.recv()
                times.append(now_ns())

        receiving = asyncio.create_task(receive())
        await here.send(b"1", EMPTY)
        await here.send(b"2", EMPTY)  # there when the receiver has woken
        await sleep_ns(1_000_000)
        await here.send(b"3", EMPTY)
        await receiving
        return times

    byte_ns, half_a_round_trip_ns = 1, 50_000  # a byte at 10 Gbit/s, to the nanosecond
    first = byte_ns + half_a_round_trip_ns + WAKE_UP_NS
    assert virtual.run(main()) == [first, first, 1_000_000 + first]


def test_a_notify_lets_who_waited_take_it() -> None:
    async def main() -> int:
        notify = Notify(lambda: sleep_ns(WAKE_UP_NS))
        waiting = asyncio.create_task(notify.wait())
        await sleep_ns(10)
        notify.notify()
        await waiting
        return now_ns()

    assert virtual.run(main()) == 10 + WAKE_UP_NS


@pytest.mark.parametrize("protocol", ["v2", "v3-n1", "v3-n2", "v3-blocks-n2"])
def test_the_wake_ups_that_a_run_counts_are_those_that_take_time(protocol: str) -> None:
    scenario = small_scenario(
        {"host.wake_up_us": WAKE_UP_US, "device.0.stop_only_mib": 4.0, "vmm.downtime_limit_ms": 100.0}
    )
    outcome, kept = kept_run(scenario, protocol)
    assert outcome.counters.wakeups > 10
    # One may be cancelled in its wake-up, when the migration is over.
    assert outcome.counters.wakeups - 2 <= wake_ups(kept) <= outcome.counters.wakeups


@pytest.mark.parametrize("protocol", ["v2-multifd", "v3-n2-pool", "v3-n2-one"])
def test_threads_that_hand_frames_to_one_another_take_more_of_them(protocol: str) -> None:
    scenario = small_scenario(
        {"host.wake_up_us": WAKE_UP_US, "device.0.stop_only_mib": 4.0, "vmm.downtime_limit_ms": 100.0}
    )
    outcome, kept = kept_run(scenario, protocol)
    assert wake_ups(kept) > outcome.counters.wakeups


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n2", "v3-n2-pool", "v3-blocks-n2"])
def test_a_run_is_longer_by_them_and_its_path_is_explained(protocol: str) -> None:
    changes = {"device.0.stop_only_mib": 8.0, "vmm.downtime_limit_ms": 200.0}
    plain = run(small_scenario(changes), protocol)
    outcome, kept = kept_run(small_scenario(changes | {"host.wake_up_us": 1000.0}), protocol)
    assert plain.downtime_ns is not None
    assert outcome.downtime_ns is not None
    assert outcome.downtime_ns > plain.downtime_ns + 1_000_000
    assert kept.timeline.critical_path_ns()["unexplained"] == 0
    assert "wake-up" in {step.what for step in kept.timeline.critical_path()}
