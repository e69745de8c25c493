# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever fails, is cut or is killed, at every event of a small migration: never two run the guest, never a device is
lost, always an end.

What is exhaustive (`disturbed` says what an event is, and what is done at one), in each of `MIGRATIONS`: each call
fails, at its start and at its return; in some, each call of a device hangs there. Each connection is cut (one for all
that carry the same), all of them are, and each side is killed: before every callback of the loop, and between the calls
in it, where it says every="event"; at the start and the return of every call in the others. One thing is done a run.
The tests cut and kill at every sixth of these events, in the last third of a run at every other one; `make faults` at
all.

Left out: reset() and start_vcpus() do not fail, for no protocol has a way out of that. A device that refuses to be
opted out of streams stays so; its guest runs all the same.

The guest runs at one side at the end, but for two cases. What is said last may be lost with the first connection, and
then nobody can know: the source stays stopped, its devices keep their state, the outcome says so. And a side that was
killed took its guest with it, if that was its to run. No run ends because a peer counts as lost (10 s): a side that
fails says so, and its connections are closed when it ends.

What v2 cannot do: END does not say that all was loaded. With multifd it even overtakes what is on other connections: if
one of them is lost then, a target that has END fails, or the source does after it said END, and stays stopped though
the first connection is whole. v3's target has all when COMMIT comes, and runs whatever happens to the connections.

To run one case alone: python -m tests.proto_v3.test_every_event NAME EVENT WHAT, as in `v3-n2 137 "cut 1"`. Without
arguments: all of them.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from proto_v3.vfio.uapi import State
from proto_v3.vmm.device_calls import RETURNS_WITHIN_S
from proto_v3.vmm.migration import ASKS_HUNG_S, OutcomeKind, Source, Target
from proto_v3.vmm.return_path import ReturnPath
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Kind
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import ns
from tests.build.disturbed import CALLBACK, HAND_OVER, NOT_YET, Disturbed, Event, Fault
from tests.build.scenario import small_scenario

SMALL: dict[str, Any] = {
    "ram.size_gib": 0.002,
    "ram.nonzero_gib": 0.0005,
    "ram.dirty_mib_per_s": 10.0,
    "device.0.state_mib": 0.25,
    "device.0.suspend_ms": 0.02,
    "device.0.critical.objects": 2,
    "device.0.writes": {"pattern": "sequential", "mib_per_s": 20.0},
    "device.0.reconfigurations": {"at_s": [0.0015], "during_stop_ms": [0.95]},
    "vmm.bandwidth_gbit_per_s": 10.0,
    "vmm.bandwidth_window_ms": 1.0,
    "vmm.downtime_limit_ms": 60.0,
    "vmm.give_up_s": 0.2,
    "vmm.read_mib": 0.125,
    "link.socket_buffer_mib": 0.125,
    "v3.critical_credit_mib": 0.125,
    "v3.dirty_credit_mib": 0.125,
    "v3.pool_connections": 2,
}
"""Four blocks, a reconfiguration in pre-copy and one while the vCPUs stop; so little room that sends wait for it."""
CREDIT = {"v3.dirty_credit_mib": 1.0}
"""For more than one connection can hold: the next one takes it."""
NO_LATE_ONE = {"device.0.reconfigurations": {"at_s": [0.0015]}}
SECOND = {"name": "second", "features": ["STOP_COPY", "P2P"]}
TWO = {"device.1": small_scenario(SMALL).device[0].model_dump(exclude_unset=True) | SECOND}
"""The second one has no pre-copy: its session begins when the first one's is being drained."""
TWO_ALIKE = {"device.0.count": 2}
"""The second one has pre-copy, too."""
CANCELLED = {"vmm.bandwidth_gbit_per_s": 1e-5, "vmm.cancel_after_s": 0.004}


@dataclass(frozen=True)
class Migration:
    """A migration that is small, and how it ends where nothing is done to it."""

    protocol: str
    changes: dict[str, Any] = field(default_factory=dict)
    connections: int = 1
    """That it uses."""
    cut_alone: int | None = None
    """How many of them are cut one by one, from the first on; the others are as the last of these. None: all."""
    ends: OutcomeKind = OutcomeKind.COMPLETED
    hangs: bool = False
    """Each call of a device is made to hang, too."""
    every: str = "call"
    """Its connections are cut, and its sides are killed, at every `event`, or at every `call`: start and return."""

    @functools.cached_property
    def scenario(self) -> Scenario:
        return small_scenario(SMALL | self.changes)

    def run(self, *faults: Fault) -> Disturbed:
        return Disturbed(self.scenario, Protocol.parse(self.protocol, self.scenario), faults)

    @functools.cached_property
    def events(self) -> list[Event]:
        """From 1: there is none at 0."""
        run = self.run()
        run.go()
        return [Event("none"), *run.events]

    @property
    def all_done(self) -> list[str]:
        """What is done to it."""
        cuts = [f"cut {at}" for at in range(self.connections if self.cut_alone is None else self.cut_alone)]
        hang = ["hang"] if self.hangs else []
        return [*hang, "fail", "kill source", "kill target", *cuts, *(["cut all"] if self.connections > 1 else [])]

    def numbers(self, done: str) -> list[int]:
        """Of the events at which this is done; not where it would be the same at the event before."""
        numbered = list(zip(range(1, len(self.events)), self.events[1:], self.events, strict=False))
        if done in ("fail", "hang"):
            return [at for at, event, _ in numbered if Fault(at, done).can_be_done_at(event)]
        if self.every == "call":
            return [at for at, event, before in numbered if event.call and not begins_at_once(event, before)]
        return [at for at, event, before in numbered if event == CALLBACK or begins_at_once(event, before)]


def some(numbers: Sequence[int], done: str) -> list[int]:
    """Of what is cut or killed every sixth one, each kind at others; of the last third every other one."""
    if done in ("fail", "hang"):
        return list(numbers)
    late, first = len(numbers) * 2 // 3, sum(map(ord, done))
    return [*numbers[first % 6 : late : 6], *numbers[late + first % 2 :: 2]]


def begins_at_once(event: Event, before: Event) -> bool:
    """The call begins in the callback in which another one returned, and not where the callback begins."""
    return event.when == "starts" and before.when == "returns"


MIGRATIONS: dict[str, Migration] = {
    "v2": Migration("v2", every="event"),
    "v2-multifd": Migration("v2-multifd", connections=3, cut_alone=2, every="event"),
    "v2-ack": Migration("v2-reinit-flush-ack-reusable", NO_LATE_ONE),
    "v2-priority": Migration("v2-priority-ack-reusable", NO_LATE_ONE),
    "v2-priority-late-ack": Migration("v2-priority-ack-reusable", ends=OutcomeKind.FAILED),
    "v2-late-ack": Migration("v2-reinit-flush-ack-reusable", ends=OutcomeKind.FAILED),
    "v2-cancelled": Migration("v2", CANCELLED, hangs=True, ends=OutcomeKind.CANCELLED),
    "v2-two": Migration("v2", TWO),
    "v2-multifd-two": Migration("v2-multifd", TWO, hangs=True, connections=3, cut_alone=2),
    "v2-early-two": Migration("v2-multifd-early", TWO_ALIKE, hangs=True, connections=3, cut_alone=2),
    "v2-parallel": Migration("v2-multifd-early-parallel-stop", TWO_ALIKE, connections=3, cut_alone=2),
    "v2-parallel-one": Migration("v2-parallel-stop", TWO),
    "v3-n1-parallel": Migration("v3-n1-parallel-stop", TWO_ALIKE, hangs=True, connections=5, cut_alone=2),
    "v2-threads": Migration("v2-threads", TWO, hangs=True),
    "v2-multifd-threads": Migration("v2-multifd-threads", TWO_ALIKE, hangs=True, connections=3, cut_alone=2),
    "v2-best-retry": Migration(
        "v2-multifd-early-threads-parallel-stop-parts-reinit-flush-ack-reusable-retry",
        {"vmm.precopy_idle_ms": 0.3},
        connections=3,
        cut_alone=2,
    ),
    "v2-retry": Migration("v2-reinit-flush-ack-reusable-retry", hangs=True),
    "v3-n2": Migration("v3-n2", connections=4, cut_alone=3, every="event"),
    "v3-n2-pool": Migration("v3-n2-pool", CREDIT, connections=3, cut_alone=2),
    "v3-n2-one": Migration("v3-n2-one", hangs=True),
    "v3-n1-retry": Migration("v3-n1-retry", connections=3),
    "v3-n1-multifd": Migration("v3-n1-multifd", connections=5),
    "v3-blocks-n2": Migration("v3-blocks-n2", hangs=True, connections=4, cut_alone=3),
    "v3-n2-invalidate": Migration("v3-n2-invalidate", connections=4, cut_alone=0),
    "v3-n2-cancelled": Migration("v3-n2", CANCELLED, connections=4, cut_alone=2, ends=OutcomeKind.CANCELLED),
    "v3-n1-one-two": Migration("v3-n1-one", TWO),
    "fallback": Migration("v3-n2", {"v3.target_knows": "v2"}),
}
CASES = [(name, done) for name, migration in MIGRATIONS.items() for done in migration.all_done]


@pytest.fixture(autouse=True, scope="module")
def _collected_by_hand() -> Iterator[None]:
    """Runs leave cycles, which are collected after every 32 runs."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.rule("v2.vmm.12", "v2.vmm.14", "v3.2.4", "v3.8.1", "v3.8.3")
@pytest.mark.parametrize(("name", "done"), CASES)
def test_never_two_run_never_a_device_is_lost_always_an_end(name: str, done: str) -> None:
    migration = MIGRATIONS[name]
    ends, wrong = all_judged(name, done, some(migration.numbers(done), done))
    if wrong:
        pytest.fail(
            "\n".join([f"{len(wrong)} complaints about {sum(ends.values())} runs:", *wrong[:20]]), pytrace=False
        )
    assert set(ends) - {"nowhere"} == may_run_at(migration, done), f"not all of the ends were seen: {ends}"
    assert "nowhere" in ends or done != "kill source"


def all_judged(name: str, done: str, numbers: Sequence[int]) -> tuple[Counter[str], list[str]]:
    """Where the guest runs at the ends of these runs, and what is wrong with them."""
    migration = MIGRATIONS[name]
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for count, at in enumerate(numbers):
        if count % 32 == 0:
            gc.collect()
        where, complaints = judged(migration, at, done)
        ends[where] += 1
        wrong += [f'{name} {at} "{done}", at {migration.events[at]}: {complaint}' for complaint in complaints]
    return ends, wrong


def may_run_at(migration: Migration, done: str) -> set[str]:
    """Where the guest runs at the end of some of the runs."""
    sides = {"source", "target"} if migration.ends is OutcomeKind.COMPLETED else {"source"}
    return sides - {done.removeprefix("kill ")}


# --- what must hold of a run -----------------------------------------------------------------------------------------


def judged(migration: Migration, at: int, done: str) -> tuple[str, list[str]]:
    """Where the guest runs at the end, and what is wrong."""
    run = migration.run(Fault(at, done))
    try:
        outcome = run.go()
    except (Exception, BaseExceptionGroup) as error:
        return "nowhere", [*run.wrong, f"{type(error).__name__}: {error}"]
    where = " and ".join(run.guest_runs_at()) or "nowhere"
    return where, [*run.wrong, *complaints(run, outcome, where)]


def complaints(run: Disturbed, outcome: Outcome, where: str) -> Iterator[str]:
    if all(fault.hit is NOT_YET for fault in run.faults):
        yield "there was no such event"
        return
    if run.ended_ns > ns(1000) and not run.hangs:
        yield f"it ended after {run.ended_ns} ns: a peer counted as lost"
    if run.stuck and not run.hangs:
        yield from run.stuck.values()
    yield from about_the_reason(run, outcome)
    yield from about_a_call_that_hangs(run, outcome)
    for side in {"source", "target"} - run.dead:
        for driver in run.drivers_of(side):
            if driver._state is State.ERROR and not killed_as_it_hung(run, side):
                yield f"{side}'s {driver.name} is left in ERROR"
    if where == "source":
        yield from about_a_guest_at_the_source(run, outcome)
    elif where == "target":
        yield from about_a_guest_at_the_target(run, outcome)
    else:
        yield from about_a_guest_that_does_not_run(run, outcome)


def does(run: Disturbed, *what: str) -> bool:
    """Whether this was done."""
    return any(fault.does in what for fault in run.faults if fault.hit is not NOT_YET)


def about_a_call_that_hangs(run: Disturbed, outcome: Outcome) -> Iterator[str]:
    """Before the stop, the source gives up or is cancelled in time, and names the call if it held up anything."""
    if run.hangs != {"source"} or run.guest_was_stopped or len(run.faults) > 1:
        return
    settings, (fault,) = run.scenario.switchover_settings(), run.faults
    closes_ns = ns(RETURNS_WITHIN_S * 1000) if fault.hit.call == "set_state" else 0  # it may be the one that closes
    if outcome.kind is OutcomeKind.DID_NOT_CONVERGE:
        closes_ns += ns(ASKS_HUNG_S * 1000)
    if outcome.kind not in (OutcomeKind.DID_NOT_CONVERGE, OutcomeKind.CANCELLED):
        yield f"it ended as {outcome.kind}: {outcome.reason!r}"
    if run.ended_ns > min(settings.give_up_ns, settings.cancel_ns or settings.give_up_ns) + ns(10) + closes_ns:
        yield f"it ended after {run.ended_ns} ns, which is too late"
    named = fault.hit.call == "poll" or "has not returned for 0." in outcome.reason
    if outcome.kind is OutcomeKind.DID_NOT_CONVERGE and not named:
        yield f"the reason does not name the call: {outcome.reason!r}"


def killed_as_it_hung(run: Disturbed, side: str) -> bool:
    """The target's thread waits in a call for ever: it ends with its process, and the kernel closes its devices."""
    return side == "target" and side in run.hangs


def about_the_reason(run: Disturbed, outcome: Outcome) -> Iterator[str]:
    """It tells what was done, and not only that the peer failed."""
    told = {
        "fail": ("Input/output error", "made to fail", "was cut"),
        "hang": ("has not returned", "did not return"),
        "cut": ("was cut",),
        "kill": ("was cut", "killed"),
    }
    due = ["its ack comes too late", *(text for fault in run.faults for text in told[fault.does])]
    if outcome.kind is OutcomeKind.FAILED and not any(each in outcome.reason for each in due):
        yield f"the reason is {outcome.reason!r}"


def about_a_guest_at_the_source(run: Disturbed, outcome: Outcome) -> Iterator[str]:
    if outcome.kind is OutcomeKind.COMPLETED:
        yield "COMPLETED, but the guest runs at the source"
    yield from about_devices_that_go_on(run, "source")
    if run.source_resets and not any(fault.hit.call == "set_state" for fault in run.faults):
        yield "a device of the source was reset: its state is lost"
    if any(state._stopped_ns is not None for state in run.states):
        yield "the guest runs, but its devices are stopped"
    if "target" not in run.dead | run.hangs:
        yield from about_devices_that_go_on(run, "target")


def about_a_guest_at_the_target(run: Disturbed, outcome: Outcome) -> Iterator[str]:
    if "source" not in run.dead and Kind.RESUMED not in run.heard["source"] and not is_lost_and_told(run, outcome):
        yield f"the source does not know that the target may run: {outcome.reason!r}"
    yield from about_devices_that_go_on(run, "target")
    for driver, image, state in zip(run.drivers, run.images, run.states, strict=True):
        if image.differences(state):
            yield f"{driver.name} is not as it was when it stopped: {image.differences(state)}"


def about_a_guest_that_does_not_run(run: Disturbed, outcome: Outcome) -> Iterator[str]:
    if "target" not in run.dead | run.hangs:
        yield from about_devices_that_go_on(run, "target")
        if not HAND_OVER.isdisjoint(run.heard["target"]) and not does(run, "fail") and not hands_over_early(run):
            yield "the target had COMMIT or END, and does not run"
    if "source" in run.dead:
        return
    if outcome.kind is OutcomeKind.COMPLETED:
        if "target" not in run.dead or Kind.RESUMED not in run.heard["source"]:
            yield "COMPLETED, but the guest runs nowhere"
        return
    cut_off = does(run, "kill") or any(
        fault.done in ("cut 0", "cut all") or fault.hit.port == "connection 0" for fault in run.faults
    )
    if not cut_off and not hands_over_early(run) and not run.hangs:
        yield "the guest runs nowhere, though the two can talk"
    if not is_lost_and_told(run, outcome):
        yield f"the guest runs nowhere, and the source says only {outcome.reason!r}"
    for driver in run.drivers:
        if driver._state not in (State.STOP_COPY, State.STOP) or run.source_resets:
            yield f"the source's {driver.name} has lost its state: it is in {driver._state.name}"


def hands_over_early(run: Disturbed) -> bool:
    """END comes before all that the target needs."""
    return "multifd" in run._applied.protocol.name


def is_lost_and_told(run: Disturbed, outcome: Outcome) -> bool:
    return "source: the target may run the guest" in outcome.reason and not HAND_OVER.isdisjoint(run.said["source"])


def about_devices_that_go_on(run: Disturbed, side: str) -> Iterator[str]:
    """As they were before the migration: running, no session open, users of v2."""
    cannot_opt_out = any((fault.hit.call, fault.told) == ("set_streams", (0,)) for fault in run.faults)
    for driver in run.drivers_of(side):
        if driver._state is not State.RUNNING:
            yield f"{side}'s {driver.name} is left in {driver._state.name}"
        if driver._saving or driver._loading:
            yield f"{side}'s {driver.name} has a session open"
        if (driver._dirty_streams or driver._stream_flags) and not cannot_opt_out:
            yield f"{side}'s {driver.name} is opted in to streams"


# --- that the watch sees what it should ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIGRATIONS)
def test_a_run_is_the_same_when_it_is_watched(name: str) -> None:
    migration = MIGRATIONS[name]
    run = migration.run()
    outcome = run.go()
    unwatched = simulate(migration.scenario, Protocol.parse(migration.protocol, migration.scenario), 1)
    assert run.timeline.digest() == unwatched.digest
    assert (outcome.kind, outcome.reason) == (unwatched.kind, unwatched.reason)
    assert outcome.kind is migration.ends
    assert not run.wrong


@pytest.mark.rule("v3.10.2")
@pytest.mark.parametrize("name", MIGRATIONS)
def test_the_events_are_those_of_a_whole_migration(name: str) -> None:
    migration = MIGRATIONS[name]
    run = migration.run()
    run.go()
    epochs = 3 - (migration.changes == NO_LATE_ONE or migration.ends is OutcomeKind.CANCELLED)
    assert {state.epoch for state in run.states} == {epochs}
    assert sum(int(state.version.sum()) for state in run.states) > 0, "there were no writes"
    assert run.source is not None
    assert run.source.counters.retries == ("retry" in name)
    assert 140 < len(run.events) < 1000
    assert sum(event == CALLBACK for event in run.events) > len(run.events) / 3
    assert {(event.side, event.call) for event in run.events} > CALLS
    assert len(run.timeline.recorded().blocked["start_ns"]) > 0 or name == "v3-blocks-n2", "no send waited for room"
    for side, call in (("source", "send"), ("target", "recv")):
        used = {event.port for event in run.events if (event.side, event.call) == (side, call)}
        assert len(used) == migration.connections


CALLS = {
    *(("source", call) for call in ("send", "set_state", "set_up", "take", "read", "stop_copy_bytes")),
    *(("target", call) for call in ("recv", "set_state", "load", "write")),
}


async def does_nothing(*_: Any) -> None:
    """In place of what a side should do."""


async def resets(source: Source) -> None:
    """In place of Source.recover."""
    for device in source.side.devices:
        await device.reset()
    await source.side.machine.start_vcpus()


async def waits(*_: Any) -> None:
    """In place of what should end."""
    await asyncio.Event().wait()


TELL = Channel.send_control


async def tells_no_failure(channel: Channel, kind: Kind, *more: int, **named: int) -> None:
    """In place of Channel.send_control."""
    if kind is not Kind.FAILED:
        await TELL(channel, kind, *more, **named)


WRONG: list[tuple[type, str, Any, str, str]] = [
    (Source, "handed_over", False, "cut 0", "both sides run the guest"),
    (Source, "handed_over", False, "cut 0", "the source starts the guest after it said COMMIT or END"),
    (Source, "recover", does_nothing, "cut 0", "the guest runs nowhere, and the source says only"),
    (Source, "recover", resets, "kill target", "its state is lost"),
    (Source, "recover", waits, "cut 0", "a peer counted as lost"),
    (ReturnPath, "reached", waits, "cut all", "waits for ever in "),
    (Target, "cancelled", does_nothing, "cut 0", "left in RESUMING"),
    (Target, "resume_guest", does_nothing, "kill source", "the target had COMMIT or END, and does not run"),
    (Channel, "send_control", tells_no_failure, "fail", "the guest runs nowhere, though the two can talk"),
]


@pytest.mark.parametrize("name", ["v2", "v3-n2-one"])
@pytest.mark.parametrize(("where", "what", "instead", "done", "due"), WRONG)
def test_code_that_is_wrong_is_complained_about(
    name: str, where: type, what: str, instead: Any, done: str, due: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = MIGRATIONS[name]
    events = migration.numbers(done)
    monkeypatch.setattr(where, what, instead)
    assert any(due in each for at in reversed(events) for each in judged(migration, at, done)[1])


def main() -> None:
    """One case, and what is wrong with it; or all of them."""
    if len(sys.argv) == 1:
        found = 0
        for name, done in CASES:
            ends, wrong = all_judged(name, done, MIGRATIONS[name].numbers(done))
            found += len(wrong)
            print(f"{name}: {done!r} at {sum(ends.values())} events, {len(wrong)} complaints", *wrong, sep="\n    ")
        sys.exit(1 if found else 0)
    name, at, done = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    migration = MIGRATIONS[name]
    print(f"{name}: {done!r} at event {at} of {len(migration.events) - 1}, {migration.events[at]}")
    run = migration.run(Fault(at, done))
    print(run.go())
    print("the guest runs at", run.guest_runs_at(), "at the end, after", run.ended_ns, "ns")
    print("\n".join(judged(migration, at, done)[1]) or "nothing is wrong")


if __name__ == "__main__":
    main()
