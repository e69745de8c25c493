# SPDX-License-Identifier: GPL-2.0-or-later
"""A small migration under watch, in which something is done at an event, or at several: a call fails or never returns,
a connection is cut, a side is killed.

An *event* is each callback of the virtual loop, before it runs, and each call over a port (device, data fd, machine,
RAM, transport), when it starts and when it returns. Events are numbered from 1, alike in each run up to the first one
at which something is done. What is done:

    fail          the call fails, before it does anything or after it did it all: EIO, or a transport's reset
    hang          a device's call never returns, before it does anything or after it did it all
    cut N         connection N is cut, as by a TCP reset: what is on its way is lost, both ends learn of it
    cut all       all connections at once
    kill source   as by SIGKILL: all its connections are cut, and no call of it does anything, or returns, any more
    kill target   the same for the target
"""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import os
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from proto_v3.timeline import Timeline
from proto_v3.vmm.migration import OutcomeKind, Side
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Kind, decode
from sim.clock import virtual
from sim.clock.port import now_ns
from sim.clock.virtual import VirtualLoop
from sim.device.driver import SimDriver
from sim.outcome import Outcome, RunReport, ended
from sim.report import Failure
from sim.run import VirtualRun
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import ns

HAND_OVER = {Kind.COMMIT, Kind.END}


@dataclass(frozen=True, slots=True)
class Event:
    """Where a run is."""

    when: str
    """`callback`, `starts` or `returns`."""
    side: str = ""
    port: str = ""
    call: str = ""

    def __str__(self) -> str:
        return f"{self.side}: {self.port}.{self.call}() {self.when}" if self.call else self.when


CALLBACK = Event("callback")
NOT_YET = Event("not yet")
NO_WAY_OUT = ("reset", "start_vcpus")
"""Calls that do not fail: no protocol has a way out of that."""


@functools.cache
def _start_and_return(side: str, port: str, call: str) -> tuple[Event, Event]:
    return Event("starts", side, port, call), Event("returns", side, port, call)


@dataclass(slots=True)
class Fault:
    """What is done, and at which event."""

    at: int
    done: str
    hit: Event = NOT_YET
    """Where it was done."""
    told: Any = None
    """The call's arguments, or its result."""

    @property
    def does(self) -> str:
        """`fail`, `hang`, `cut` or `kill`."""
        return self.done.split()[0]

    def can_be_done_at(self, event: Event) -> bool:
        """A call fails, or one of a device hangs; reset() and start_vcpus() do neither."""
        match self.does:
            case "fail":
                return bool(event.call) and event.call not in NO_WAY_OUT
            case "hang":
                return event.port not in ("", "machine", "ram") and event.call not in (*NO_WAY_OUT, "send", "recv")
            case _:
                return True


class Callbacks(deque[Any]):
    """The loop's callbacks that are ready; the run is told before each one."""

    run: Disturbed | None = None

    def popleft(self) -> Any:
        if self.run is not None:
            self.run.event(CALLBACK)
        return super().popleft()


class Loop(VirtualLoop):
    def __init__(self, limit_ns: int | None = None) -> None:
        super().__init__(limit_ns)
        self._ready = Callbacks()


class Port:
    """What a side has a device, an fd, a machine, RAM or a transport as: each call of it is two events."""

    def __init__(self, run: Disturbed, side: str, name: str, inner: Any) -> None:
        self._run, self._side, self._name, self._inner = run, side, name, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name == "ram":
            value = Port(self._run, self._side, "ram", value)
        elif inspect.iscoroutinefunction(value):
            value = functools.partial(self._call, value, *_start_and_return(self._side, self._name, name))
        else:
            return value
        setattr(self, name, value)
        return value

    async def _call(self, method: Callable[..., Any], starts: Event, returns: Event, *args: Any) -> Any:
        run = self._run
        await run.call(starts, args)
        try:
            result = await method(*args)
        except Exception:
            run.check_alive(self._side)
            raise
        await run.call(returns, result)
        if hasattr(result, "poll"):
            return Port(run, self._side, f"{self._name}'s fd", result)
        return result


class Disturbed(VirtualRun):
    """A run with faults. One that cannot be done at its event is done at the next one at which it can."""

    def __init__(self, scenario: Scenario, protocol: Protocol, faults: Sequence[Fault] = ()) -> None:
        super().__init__(protocol.applied(scenario), 1)
        self.faults = faults
        self.count = 0
        self.events: list[Event] = []
        """All of them, where nothing is done."""
        self.dead: set[str] = set()
        """Sides that were killed."""
        self.hangs: set[str] = set()
        """Sides that have a call that never returns."""
        self._hangs_now = False
        self.said: dict[str, list[Kind]] = {"source": [], "target": []}
        """In frames without payload."""
        self.heard: dict[str, list[Kind]] = {"source": [], "target": []}
        self.source_resets = 0
        self.guest_was_stopped = False
        self.wrong: list[str] = []
        self.ended_ns = 0
        self.failures: list[Failure] = []
        self._tasks: dict[str, asyncio.Task[Any] | None] = {}

    def go(self) -> Outcome:
        """The run, from its start to its end."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(virtual, "VirtualLoop", Loop)
            return virtual.run(self._watched_outcome(), limit_ns=ns(60_000))

    def guest_runs_at(self) -> list[str]:
        """On which sides that live."""
        return [side for side, machine in self.machines.items() if machine.running and side not in self.dead]

    def drivers_of(self, side: str) -> list[SimDriver]:
        return self.drivers if side == "source" else self.drivers_at_target

    # --- the run, with ports between each side and the world --------------------------------------------------------

    async def _watched_outcome(self) -> Outcome:
        ready = asyncio.get_running_loop()._ready
        ready.run = self
        outcome = await self.outcome()
        ready.run = None
        return outcome

    async def _run_source(self, side: Side, channels: Sequence[Channel]) -> OutcomeKind:
        return await super()._run_source(self._watched("source", side, channels), channels)

    async def _run_target(self, side: Side, channels: Sequence[Channel]) -> bool:
        return await super()._run_target(self._watched("target", side, channels), channels)

    def _watched(self, name: str, side: Side, channels: Sequence[Channel]) -> Side:
        self._tasks[name] = asyncio.current_task()
        for channel in channels:
            channel._transport = Port(self, name, channel._transport.name, channel._transport)
        devices = [Port(self, name, device.name, device) for device in side.devices]
        return replace(side, machine=Port(self, name, "machine", side.machine), devices=devices)

    async def _both(
        self, source: Coroutine[Any, Any, OutcomeKind], target: Coroutine[Any, Any, bool]
    ) -> tuple[OutcomeKind | None, list[Failure]]:
        outcome, self.failures = await super()._both(source, target)
        if not self.dead | self.hangs:  # the kernel ends the sessions of a process that is gone
            left = asyncio.all_tasks() - {asyncio.current_task()}
            self.wrong += [f"{task.get_name()} is left at work" for task in left]
        self.ended_ns = now_ns()
        if outcome is None and not self.failures:
            self.failures = [Failure("target", "the source was killed, and the target did not fail", now_ns())]
        return outcome, self.failures

    def _outcome(self, kind: OutcomeKind | None, failures: Sequence[Failure]) -> Outcome:
        if kind is OutcomeKind.COMPLETED and not failures:
            return ended(self._report(), kind)
        return super()._outcome(kind, failures)

    def _report(self) -> RunReport:
        # No figures: they take time.
        return RunReport(self.scenario.name, self._applied.protocol.name, 1, Timeline(now_ns))

    # --- events -----------------------------------------------------------------------------------------------------

    def event(self, event: Event, told: Any = None) -> None:
        """Something happens: `told` are a call's arguments, or its result."""
        if event is not CALLBACK:
            self.check_alive(event.side)
            self._look(event, told)
        self.count += 1
        if not self.faults:
            self.events.append(event)
        for fault in self.faults:
            if fault.hit is NOT_YET and self.count >= fault.at and fault.can_be_done_at(event):
                fault.hit, fault.told = event, told
                self._disturb(fault, event)
                self.check_alive(event.side)
                break  # one at an event

    async def call(self, event: Event, told: Any) -> None:
        """A call starts or returns; it may hang there."""
        self.event(event, told)
        if self._hangs_now:
            self._hangs_now = False
            self.hangs.add(event.side)
            await asyncio.Event().wait()

    def check_alive(self, side: str) -> None:
        """One that was killed does nothing any more."""
        if side in self.dead:
            raise asyncio.CancelledError

    def _look(self, event: Event, told: Any) -> None:
        match event.call, event.when:
            case "send", "starts" if not len(told[1]):
                self.said[event.side].append(decode(*told).kind)
            case "recv", "returns" if not len(told[1]):
                self.heard[event.side].append(decode(*told).kind)
            case "stop_vcpus", "starts":
                self.guest_was_stopped = True
            case "reset", "starts":
                self.source_resets += event.side == "source"
            case "start_vcpus", "starts":
                self._look_who_starts(event.side)
            case "start_vcpus", "returns":
                if len(self.guest_runs_at()) > 1:
                    self.wrong.append("both sides run the guest")

    def _look_who_starts(self, side: str) -> None:
        """By what it said and heard, be the other one quick or slow."""
        if side == "target" and HAND_OVER.isdisjoint(self.heard["target"]):
            self.wrong.append("the target starts the guest without COMMIT or END")
        handed_over = not HAND_OVER.isdisjoint(self.said["source"]) and Kind.FAILED not in self.heard["source"]
        if side == "source" and handed_over:
            self.wrong.append("the source starts the guest after it said COMMIT or END")

    def _disturb(self, fault: Fault, event: Event) -> None:
        match fault.done.split():
            case ["fail"] if event.call in ("send", "recv"):
                raise ConnectionResetError(errno.ECONNRESET, "made to fail")
            case ["fail"]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case ["hang"]:
                self._hangs_now = True
            case ["cut", which]:
                self._cut(which)
            case ["kill", side]:
                self.dead.add(side)
                self._cut("all")
                task = self._tasks.get(side)  # none, if it has not begun: its first call is its last
                if task is not None:
                    task.cancel()

    def _cut(self, which: str) -> None:
        for channel in self.channels if which == "all" else [self.channels[int(which)]]:
            channel._transport.cut()
