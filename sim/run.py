# SPDX-License-Identifier: GPL-2.0-or-later
"""A run: scenario + protocol + seed -> outcome, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import Context
from typing import Any, TypeVar

from proto_v3.errors import ProtoV3Error, leaves
from proto_v3.timeline import Timeline, on_track
from proto_v3.vmm.migration import GivenUpError, OutcomeKind, Side, Source, Target
from proto_v3.wire.channel import Channel
from sim.clock import virtual
from sim.clock.port import now_ns
from sim.clock.stuck import WaitingTask
from sim.clock.virtual import VirtualLoop
from sim.host.host import HostResources, device_report, devices_at_source, devices_at_target, seeds
from sim.host.link import ClosedError, NetworkLink
from sim.host.machine import GuestHere, MachineModel
from sim.host.spread import SIDES, of_host
from sim.host.vmms import connections, make_source, make_target, side_report
from sim.outcome import Outcome, RunReport, compared, completed, ended, failed
from sim.report import Counters, Failure, failure
from sim.scenario import screening
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.scenario import Scenario

T = TypeVar("T")

PEER_ENDS_WITHIN_S = 30.0
"""Virtual seconds that a side may take to end after the other side failed and closed its connections."""


def simulate(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    *,
    keep: Callable[[Timeline], None] | None = None,
    watch: Callable[[VirtualRun], Coroutine[Any, Any, None]] | None = None,
) -> Outcome:
    """Run one migration to its end. `keep` is called with the timeline.

    `watch` runs beside the migration until that ends. It may sleep and read the run's attributes. It must change
    and record nothing; the run is then the same with it.
    """
    applied = protocol.applied(scenario)
    run = VirtualRun(applied, seed)
    outcome = Context().run(lambda: virtual.run(run.outcome(watch)))  # without the caller's cause and track
    if keep is not None:
        keep(run.timeline)
    return compared(outcome, applied)


class VirtualRun:
    """One migration in virtual time. Its public attributes exist from the start of outcome()."""

    def __init__(self, applied: AppliedScenario, seed: int) -> None:
        self._applied = applied
        self.scenario = applied.scenario
        self._seed = seed

    async def outcome(self, watch: Callable[[VirtualRun], Coroutine[Any, Any, None]] | None = None) -> Outcome:
        """Run it to its end. `watch` as in simulate()."""
        scenario = self.scenario
        self.timeline = timeline = Timeline(now_ns)
        guest_seed, source_seed, target_seed = seeds(self._seed)
        here, there = (of_host(scenario, self._seed, side) for side in SIDES)
        self._here = devices_at_source(scenario, guest_seed, HostResources(here, source_seed, timeline))
        self._there = devices_at_target(scenario, HostResources(there, target_seed, timeline))
        self.drivers, self.states = [driver for driver, _ in self._here], [state for _, state in self._here]
        self.drivers_at_target = [driver for driver, _ in self._there]
        self.images = [image for _, image in self._there]
        settings = scenario.switchover_settings()
        wake_up_ns = scenario.host.wake_up_ns
        self.machines = {
            "source": MachineModel(here, GuestHere(self.states), timeline, running=True, wake_up_ns=wake_up_ns),
            "target": MachineModel(there, GuestHere([]), timeline, running=False, wake_up_ns=wake_up_ns),
        }
        self.counters = {"source": Counters(), "target": Counters()}
        self.resets: list[str] = []
        source_side = Side(
            self.machines["source"], self.drivers, settings, timeline, self.counters["source"], self.resets
        )
        target_side = Side(self.machines["target"], self.drivers_at_target, settings, timeline, self.counters["target"])
        self.channels, self.channels_there = self._connect()
        self.source: Source | None = None
        self.target: Target | None = None
        self.note = self.reason = ""
        self.sides: dict[str, Side] = {}
        self.stuck: dict[str, str] = {}
        """By side: what it waited for when the run was ended, in words."""
        watching = None if watch is None else asyncio.create_task(watch(self), name="watch")
        try:
            kind, failures = await self._both(
                self._run_source(source_side, self.channels), self._run_target(target_side, self.channels_there)
            )
        finally:
            if watching is not None:
                watching.cancel()
        return self._outcome(kind, failures)

    async def _run_source(self, side: Side, channels: Sequence[Channel]) -> OutcomeKind:
        self.sides["source"] = side
        try:
            self.source, self.note = await make_source(side, channels, self._applied)
        except GivenUpError as end:
            self.reason = str(end) if end.kind is OutcomeKind.DID_NOT_CONVERGE else ""
            return end.kind
        kind = await self.source.run()
        self.reason = self.source.reason
        self.note = "; ".join(filter(None, [self.note, self.source.note]))
        return kind

    async def _run_target(self, side: Side, channels: Sequence[Channel]) -> bool:
        self.sides["target"] = side
        self.target = await make_target(side, channels, self._applied)
        return self.target is not None and await self.target.run()

    async def _both(
        self, source: Coroutine[Any, Any, OutcomeKind], target: Coroutine[Any, Any, bool]
    ) -> tuple[OutcomeKind | None, list[Failure]]:
        """Run both sides to their ends; returns how the migration ended, and the errors. Bugs are raised."""
        tasks = [
            asyncio.create_task(on_own_track(source, "source"), name="source"),
            asyncio.create_task(on_own_track(target, "target"), name="target"),
        ]
        ended_ns: dict[str, int] = {}
        for task in tasks:
            task.add_done_callback(lambda task: ended_ns.setdefault(task.get_name(), now_ns()))
        self._loop().call_when_stuck(lambda: self._nothing_happens(tasks))
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:  # one side failed, and has ended; the other one then ends by itself, or is cancelled
            self.link.close()
            _, pending = await asyncio.wait(pending, timeout=PEER_ENDS_WITHIN_S)
        self._kill(pending)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failures = []
        for task, result in zip(tasks, results, strict=True):
            for error in leaves(result) if isinstance(result, BaseException) else ():
                if isinstance(error, (OSError, ProtoV3Error)):
                    failures.append(failure(task.get_name(), error, ended_ns[task.get_name()], (ClosedError,)))
                elif not isinstance(error, asyncio.CancelledError):
                    raise error
        sent = results[0]
        if isinstance(sent, OutcomeKind):
            if sent is not OutcomeKind.COMPLETED and all(failure.echo for failure in failures):
                failures = []  # a target that was given up learns it late
            self.note = "; ".join(filter(None, [self.note, *self.stuck.values()]))
            return sent, failures
        return None, [*failures, *(Failure(side, why, now_ns()) for side, why in self.stuck.items())]

    def _nothing_happens(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """A VMM waits without a limit for what never happens. End the connections, as a user does who waits no longer.
        A side that does not end then is killed."""
        self._note_stuck([task for task in tasks if not task.done()])
        self.link.close()
        self._loop().call_when_stuck(lambda: self._kill(tasks))

    def _kill(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        tasks = [task for task in tasks if not task.done()]
        self._note_stuck(tasks)
        for task in tasks:
            task.cancel()

    def _note_stuck(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """The calls that do not return of the sides that have not ended; or, if there is none, where they wait."""
        sides = [task.get_name() for task in tasks if task.get_name() in self.sides]
        hung = {side: call for side in sides if (call := self.sides[side].calls.hung(poll=True))}
        if not hung and not self.stuck:
            hung = {task.get_name(): f"waits for ever in {WaitingTask.of(task).places[0]}" for task in tasks}
        for side, why in hung.items():
            self.stuck.setdefault(side, f"{side}: {why}")

    def _loop(self) -> VirtualLoop:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return loop

    def _connect(self) -> tuple[list[Channel], list[Channel]]:
        wake_up_ns, part_bytes = self.scenario.host.wake_up_ns, screening.part_bytes(self.scenario)
        self.link = NetworkLink(self.scenario.link, self._loop(), self.timeline, wake_up_ns, part_bytes)
        ends = [self.link.connect(f"connection {i}") for i in range(connections(self._applied))]
        return [Channel(here) for here, _ in ends], [Channel(there) for _, there in ends]

    def _outcome(self, kind: OutcomeKind | None, failures: Sequence[Failure]) -> Outcome:
        """The outcome: `kind` as the source returned it, or the errors of both sides."""
        if failures:
            return failed(self._report(), failures)
        assert kind is not None
        if kind is OutcomeKind.COMPLETED:
            return completed(self._report())
        return ended(self._report(), kind, self.reason)

    def _report(self) -> RunReport:
        devices = zip(self._here, self._there, strict=True)
        differences = {driver.name: image.differences(state) for (driver, state), (_, image) in devices}
        here, there = ([device_report(*device) for device in side] for side in (self._here, self._there))
        self.counters["source"].wakeups = self.link.wakeups
        return RunReport(
            self.scenario.name,
            self._applied.protocol.name,
            self._seed,
            self.timeline,
            side_report("source", self.counters["source"], self.channels, now_ns(), here, self.resets),
            side_report("target", self.counters["target"], self.channels_there, now_ns(), there, []),
            self.note,
            guest_runs_at=", ".join(side for side, machine in self.machines.items() if machine.running),
            differences=[f"{name}: {difference}" for name, difference in differences.items() if difference],
        )


async def on_own_track(work: Coroutine[Any, Any, T], track: str) -> T:
    """Do the work, with its spans on this track."""
    on_track(track)
    return await work
