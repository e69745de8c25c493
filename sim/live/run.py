# SPDX-License-Identifier: GPL-2.0-or-later
"""A live run: scenario + protocol + seed -> outcome, on this machine or with a target on another.

This is the supervisor: it starts the processes of its side, receives their notes and reports, and leaves no process
behind, whatever happens.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proto_v3.errors import UserError
from sim.live.limits import check_lock
from sim.live.processes.children import HANGS, Child, device_main, start, vmm_main
from sim.live.processes.files import check_files
from sim.live.processes.memory import check_memory
from sim.live.processes.report import GuestNote, Note, SessionNote, VmmReport
from sim.live.processes.settings import Settings
from sim.live.processes.vmm import run_source, run_target
from sim.live.result import LiveResult, SideEnd, result
from sim.live.tcp.messages import Run
from sim.live.tcp.sockets import LOOPBACK, listen
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.scenario import Scenario

ENDS_AFTER = 4
"""When one side has ended, the other one has ENDS_AFTER x silent_s to end, too."""
UNCONNECTED_S = 0.2
"""Seconds the target may still take to report an error after the source died before connecting."""
Watch = Callable[[Note], None]
"""Called with each note of a process, while the processes run."""
Started = Callable[[Sequence[Child]], Awaitable[None]]
"""Called with the processes, while they run."""


@dataclass(slots=True)
class Notes:
    """What the processes sent on their lifelines."""

    watch: Watch | None
    ran: list[GuestNote] = field(default_factory=list)
    session: bool = False
    """The target has accepted a source."""

    def __call__(self, note: Note) -> None:
        """Take the next note."""
        self.session |= isinstance(note, SessionNote)
        if isinstance(note, GuestNote):
            self.ran.append(note)
        if self.watch is not None:
            self.watch(note)


class RunningSide:
    """The processes of a side: a VMM, and a device process if its devices are simulated."""

    def __init__(self, side: str, settings: Settings, vmm: Child, device: Child | None = None) -> None:
        self.side = side
        self.vmm = vmm
        self.device = device
        self._settings = settings
        for child in self.children:
            child.watch(settings)

    @property
    def children(self) -> list[Child]:
        """All of them."""
        return [self.vmm] if self.device is None else [self.device, self.vmm]

    async def report(self) -> VmmReport | None:
        """What the VMM reports at its end; None if it died before."""
        await asyncio.wait([self.vmm.result])
        return None if self.vmm.result.cancelled() else self.vmm.result.result()

    async def deaths(self, report: VmmReport | None) -> list[str]:
        """Which of them died before their work was done, in words. If the VMM lost its device process, that is dead, or
        hangs and will be killed: wait until it is known here, too."""
        if self.device is not None and report is not None and report.device_gone:
            await asyncio.wait([self.device.ended], timeout=2 * HANGS * self._settings.silent_s)
        return [child.death for child in self.children if child.death]

    async def answers(self) -> None:
        """Wait until the VMM answers a ping, or is dead: killed as it hangs, perhaps."""
        either: list[asyncio.Future[Any]] = [self.vmm.lifeline.begin("ping"), self.vmm.ended]
        limit_s = ENDS_AFTER * self._settings.silent_s
        await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)

    async def end(self) -> None:
        """Let both end. If this is cancelled, they are killed."""
        try:
            await asyncio.gather(*(child.end() for child in self.children))
        finally:
            self.bury()

    def bury(self) -> None:
        """Kill those that live, and free what belongs to them. May be called again."""
        for child in self.children:
            child.bury()


MakeSide = Callable[..., RunningSide]
"""Starts the processes of a side: of this name, with these settings and notes; then run_source or run_target, and what
it takes beside the VMM."""


def simulated_side(side: str, settings: Settings, notes: Notes, *migrate: Any) -> RunningSide:
    """A VMM and a device process."""
    vmm_end, device_end = socket.socketpair()
    with vmm_end, device_end:
        device = start(f"{side} device", device_main, notes, device_end, side, settings.loop)
        try:
            vmm = start(f"{side} VMM", vmm_main, notes, vmm_end, side, settings, *migrate)
        except BaseException:
            device.bury()
            raise
    return RunningSide(side, settings, vmm, device)


def applied(scenario: Scenario, protocol: Protocol, settings: Settings) -> AppliedScenario:
    """The scenario as the protocol runs it. UserError if that cannot be run live."""
    if not sys.platform.startswith("linux"):
        raise UserError("live mode needs Linux: timerfd, eventfd, memfd, descriptors passed over UNIX sockets")
    run_as = protocol.applied(scenario)
    check_lock(run_as.scenario)
    check_files(run_as)
    check_memory(run_as, settings.max_state_bytes, settings.tls is not None)
    return run_as


async def run_here(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    watch: Watch | None = None,
    started: Started | None = None,
) -> LiveResult:
    """Run both sides on this machine. `started` is called with the processes, while they run; its errors are raised."""
    run_as = applied(scenario, protocol, settings)
    run, notes = Run(scenario.to_json(), protocol.name, seed), Notes(watch)
    ends = await both_sides(simulated_side, simulated_side, run, settings, notes, started)
    return result(run_as, seed, ends, notes.ran)


async def both_sides(
    make_source: MakeSide,
    make_target: MakeSide,
    run: Run,
    settings: Settings,
    notes: Notes,
    started: Started | None = None,
) -> dict[str, SideEnd]:
    """Run both sides on this machine; returns how each of them ended."""
    listener = listen((LOOPBACK, 0))
    sides: list[RunningSide] = []
    beside: asyncio.Future[None] | None = None
    try:
        target = make_target("target", replace(settings, once=True), notes, run_target, listener)
        sides.append(target)
        source = make_source("source", settings, notes, run_source, run, listener.getsockname()[:2])
        sides.append(source)
        listener.close()  # the target has it
        if started is not None:
            beside = asyncio.ensure_future(started([*source.children, *target.children]))
        ends = await _both(source, target, notes, settings)
    finally:
        listener.close()
        if beside is not None:
            beside.cancel()
        try:
            await asyncio.gather(*(side.end() for side in sides))
        finally:
            for side in sides:
                side.bury()
    if beside is not None and beside.done() and not beside.cancelled():
        beside.result()
    return ends


async def _both(source: RunningSide, target: RunningSide, notes: Notes, settings: Settings) -> dict[str, SideEnd]:
    """How both sides ended. When one has ended, the other has a time limit to end, too."""
    tasks = {side: asyncio.ensure_future(side.report()) for side in (source, target)}
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        unconnected = tasks[source].done() and not notes.session  # the target waits for any source
        await asyncio.wait(tasks.values(), timeout=UNCONNECTED_S if unconnected else ENDS_AFTER * settings.silent_s)
        if unconnected and not tasks[target].done():
            await target.answers()  # or it hangs, and that is why no source came to it
        ends = {}
        for side, task in tasks.items():
            report = task.result() if task.done() else None
            deaths = await side.deaths(report)
            if not task.done() and not unconnected:
                deaths = deaths or [f"the {side.vmm.name} (process {side.vmm.pid}) did not end, and was killed"]
            ends[side.side] = SideEnd(report, deaths)
    finally:
        for task in tasks.values():
            task.cancel()
    return ends


async def run_to(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    address: tuple[str, int],
    watch: Watch | None = None,
) -> LiveResult:
    """Run the source's side here; the target's is where `serve_one` listens at this address."""
    run_as = applied(scenario, protocol, settings)
    run, notes = Run(scenario.to_json(), protocol.name, seed), Notes(watch)
    ends = {"source": await one_side(simulated_side("source", settings, notes, run_source, run, address))}
    return result(run_as, seed, ends, notes.ran)


async def serve_one(listener: socket.socket, settings: Settings, watch: Watch | None = None) -> SideEnd:
    """Run the target's side of one migration; returns how it ended."""
    return await one_side(simulated_side("target", settings, Notes(watch), run_target, listener))


async def one_side(side: RunningSide) -> SideEnd:
    """Wait for the end of a side whose other side is elsewhere; returns how it ended."""
    try:
        report = await side.report()
        return SideEnd(report, await side.deaths(report))
    finally:
        await side.end()
