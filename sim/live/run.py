"""A live run: scenario + protocol + seed -> outcome, on this machine or with a target on another.

It supervises: starts the processes of its side, hears what they say, and sees to it that none is left, whatever
happens. What they measured becomes the same outcome as in virtual time.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from proto_v3.errors import PeerProtocolError, UserError
from proto_v3.timeline import Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.live import merge_timelines
from sim.live.fd.store import differences
from sim.live.plain import from_plain
from sim.live.processes.children import HANGS, Child, device_main, source_main, start, target_main
from sim.live.processes.report import ProcessReport, StreamReport, VmmReport
from sim.live.processes.vmm import Settings, check_size
from sim.live.real_time import Delays
from sim.live.tcp.messages import Run
from sim.live.tcp.sockets import Granted, listen
from sim.outcome import Outcome, RunReport, completed, ended, with_bound
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.scenario import Scenario
from sim.theory.downtime_bound import lower_bound

LOOPBACK = "127.0.0.1"
ENDS_AFTER = 4
"""When one side has ended, the other one may take so many times the silence that is put up with."""
VAIN_S = 0.2
"""A target to which no source came, when the source is dead: if it notices something, it is by then."""
Watch = Callable[[str, dict[str, Any]], None]
"""Told of what the processes say while they run: `progress`, `running`, `session`, `rejected`."""


@dataclass(frozen=True, slots=True)
class LiveResult:
    """A live run's outcome, and what only a live run has to tell."""

    outcome: Outcome
    timeline: Timeline | None = None
    """Of all four processes, where all could tell theirs."""
    delays: dict[str, Delays] = field(default_factory=dict)
    """By process: what was asked of its timers, and how late they were."""
    cpu_ns: dict[str, int] = field(default_factory=dict)
    """By process: CPU time from time 0 to its end, the comparison of the states not counted."""
    streams: list[StreamReport] = field(default_factory=list)
    """Of each data fd that the source read."""
    clock_uncertainty_ns: int = 0
    """How far the clocks of two hosts may be apart; 0 on one."""
    sockets: list[Granted] = field(default_factory=list)
    """What the kernel granted each connection."""
    ran: list[tuple[str, bool, int]] = field(default_factory=list)
    """When a guest began to run or had stopped: side, which, and perf_counter_ns() there."""
    deaths: list[str] = field(default_factory=list)
    """Processes that died before their work was done."""


@dataclass(frozen=True, slots=True)
class SideEnd:
    """How a side ended."""

    report: VmmReport | None
    """None if its VMM died before."""
    deaths: list[str]
    """Which of its processes died, and how."""


@dataclass(slots=True)
class _Heard:
    """What the processes said on their lifelines."""

    watch: Watch | None
    ran: list[tuple[str, bool, int]] = field(default_factory=list)
    session: bool = False
    """The target took a source in."""

    def __call__(self, what: str, body: dict[str, Any]) -> None:
        self.session |= what == "session"
        if what == "running":
            self.ran.append((body["side"], body["running"], body["at_ns"]))
        if self.watch is not None:
            self.watch(what, body)


class _Side:
    """The two processes of a side."""

    def __init__(self, side: str, settings: Settings, heard: _Heard, main: Callable[..., None], *given: Any) -> None:
        vmm_end, device_end = socket.socketpair()
        self.side = side
        self._settings = settings
        try:
            self.device = start(f"{side} device", device_main, heard, device_end, side, settings.loop)
            try:
                self.vmm = start(f"{side} VMM", main, heard, vmm_end, settings, *given)
            except BaseException:
                self.device.bury()
                raise
        finally:
            vmm_end.close()
            device_end.close()
        for child in self.children:
            child.watch(settings)

    @property
    def children(self) -> tuple[Child, Child]:
        return self.device, self.vmm

    async def report(self) -> VmmReport | None:
        """What the VMM reports at its end; None if it died before."""
        await asyncio.wait([self.vmm.result])
        return None if self.vmm.result.cancelled() else self.vmm.result.result()

    async def deaths(self, report: VmmReport | None) -> list[str]:
        """Which of them died before their work was done. A device process that its VMM lost is dead, or will be killed
        for it hangs; that is waited for, as it may be known here a little later."""
        if report is not None and report.device_gone:
            await asyncio.wait([self.device.ended], timeout=2 * HANGS * self._settings.silent_s)
        return [child.death for child in self.children if child.death]

    async def end(self) -> None:
        """Nothing is left of them when this returns; also when it is cancelled, for they are killed then."""
        try:
            await asyncio.gather(*(child.end() for child in self.children))
        finally:
            self.bury()

    def bury(self) -> None:
        """See Child."""
        for child in self.children:
            child.bury()


def applied(scenario: Scenario, protocol: Protocol, settings: Settings) -> AppliedScenario:
    """The scenario as the protocol runs it. UserError if that cannot be run live."""
    if not sys.platform.startswith("linux"):
        raise UserError("live mode needs Linux: timerfd, eventfd, memfd, descriptors passed over UNIX sockets")
    what = protocol.applied(scenario)
    check_size(what.scenario, settings.max_state_bytes)
    return what


async def run_here(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    watch: Watch | None = None,
    started: Callable[[Sequence[Child]], Awaitable[None]] | None = None,
) -> LiveResult:
    """Both sides on this machine. `started` is given the processes, while they run; an error of its own is raised."""
    what = applied(scenario, protocol, settings)
    heard = _Heard(watch)
    run = Run(scenario.to_json(), protocol.name, seed)
    listener = listen((LOOPBACK, 0))
    sides: list[_Side] = []
    beside: asyncio.Future[None] | None = None
    try:
        target = _Side("target", settings, heard, target_main, listener)
        sides.append(target)
        source = _Side("source", settings, heard, source_main, run, listener.getsockname()[:2])
        sides.append(source)
        listener.close()  # the target has it
        if started is not None:
            beside = asyncio.ensure_future(started([*source.children, *target.children]))
        ends = await _both(source, target, heard, settings)
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
    return _result(what, seed, ends, heard)


async def _both(source: _Side, target: _Side, heard: _Heard, settings: Settings) -> dict[str, SideEnd]:
    """How both sides ended. When one has, the other has a while to do so, too."""
    results = {side: asyncio.ensure_future(side.report()) for side in (source, target)}
    try:
        await asyncio.wait(results.values(), return_when=asyncio.FIRST_COMPLETED)
        waits_in_vain = results[source].done() and not heard.session  # for any source, as a target does
        await asyncio.wait(results.values(), timeout=VAIN_S if waits_in_vain else ENDS_AFTER * settings.silent_s)
        ends = {}
        for side, result in results.items():
            report = result.result() if result.done() else None
            deaths = await side.deaths(report)
            if not result.done() and not waits_in_vain:
                deaths = deaths or [f"the {side.vmm.name} (process {side.vmm.pid}) did not end, and was killed"]
            ends[side.side] = SideEnd(report, deaths)
    finally:
        for result in results.values():
            result.cancel()
    return ends


async def run_to(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    address: tuple[str, int],
    watch: Watch | None = None,
) -> LiveResult:
    """The source's side here, the target's where somebody listens (`serve_one`)."""
    what = applied(scenario, protocol, settings)
    heard = _Heard(watch)
    source = _Side("source", settings, heard, source_main, Run(scenario.to_json(), protocol.name, seed), address)
    try:
        report = await source.report()
        ends = {"source": SideEnd(report, await source.deaths(report))}
    finally:
        await source.end()
    return _result(what, seed, ends, heard)


async def serve_one(listener: socket.socket, settings: Settings, watch: Watch | None = None) -> SideEnd:
    """The target's side of one migration, and how it ended."""
    heard = _Heard(watch)
    side = _Side("target", settings, heard, target_main, listener)
    try:
        report = await side.report()
        return SideEnd(report, await side.deaths(report))
    finally:
        await side.end()


# --- the outcome ------------------------------------------------------------------------------------------------------


def _result(what: AppliedScenario, seed: int, ends: dict[str, SideEnd], heard: _Heard) -> LiveResult:
    source = ends["source"].report
    if source is not None and source.user_error:
        raise UserError(source.failures[0].text)
    deaths = [death for end in ends.values() for death in end.deaths]
    unread = ""
    try:
        target = _target_report(ends)
    except PeerProtocolError as error:
        target, unread = None, _unread(error)
    runs_at, guest = _guest(ends, target, heard)
    nothing = RunReport(what.scenario.name, what.protocol.name, seed, Timeline(lambda: 0), guest_runs_at=runs_at)

    def failed(why: str) -> LiveResult:
        return LiveResult(ended(nothing, OutcomeKind.FAILED, why), ran=heard.ran, deaths=deaths)

    if unread:
        return failed("; ".join([*deaths, unread]))
    if source is None or source.measured is None:
        why = _failures([source, target], deaths) or "the source VMM is gone"
        return failed(f"{why}; {guest}")
    try:
        run = _run_report(what.scenario, nothing, source, target)
        outcome = _outcome(run, source, target, deaths, guest)
    except (PeerProtocolError, KeyError, ValueError) as error:
        return failed("; ".join([*deaths, _unread(error)]))
    processes = _processes(source, target)
    return LiveResult(
        with_bound(outcome, lower_bound(what)),
        run.timeline,
        {name: process.delays for name, process in processes.items()},
        {name: process.cpu_ns for name, process in processes.items()},
        [stream for stream in source.measured.streams if stream.counters.device_bytes],
        source.clock_uncertainty_ns,
        source.sockets,
        heard.ran,
        deaths,
    )


def _unread(error: Exception) -> str:
    return f"what the target measured cannot be read: {error!r}"


def _target_report(ends: dict[str, SideEnd]) -> VmmReport | None:
    """As the source received it, or else as the supervisor did. PeerProtocolError if it is malformed."""
    source = ends["source"].report
    if source is not None and source.peer is not None:
        return from_plain(VmmReport, source.peer)
    return ends["target"].report if "target" in ends else None


def _failures(reports: Sequence[VmmReport | None], deaths: Sequence[str] = ()) -> str:
    """What went wrong, in words; what only echoes it is left out where the cause is known."""
    failures = [failure for report in reports if report is not None for failure in report.failures]
    causes = [*deaths, *(failure.text for failure in failures if not failure.echo)]
    return "; ".join(dict.fromkeys(causes or [failure.text for failure in failures]))


def _outcome(run: RunReport, source: VmmReport, target: VmmReport | None, deaths: list[str], guest: str) -> Outcome:
    whole = source.kind is OutcomeKind.COMPLETED and target is not None and target.whole
    if whole and target is not None and source.digests and target.digests and not _failures([source, target]):
        notes = [run.note] if run.note else []
        return completed(replace(run, note="; ".join(notes + [f"when all was done, {each}" for each in deaths])))
    failures = _failures([source, target], deaths)
    if source.kind is not None and source.kind is not OutcomeKind.COMPLETED and not failures:
        return ended(run, source.kind)
    if any(failure.unsupported for failure in source.failures):
        return ended(run, OutcomeKind.UNSUPPORTED, failures)
    return ended(run, OutcomeKind.FAILED, f"{failures or 'the target did not say how it ended'}; {guest}")


def _guest(ends: dict[str, SideEnd], target: VmmReport | None, heard: _Heard) -> tuple[str, str]:
    """Where a guest runs that has its devices, if one does; and, in words, what became of it."""
    source, there = ends["source"].report, ends.get("target")
    runs = {name: vmm for name, vmm in (("source", source), ("target", target)) if vmm is not None and vmm.guest_runs}
    if len(runs) > 1:
        return ", ".join(runs), "two guests run"
    for side, vmm in runs.items():
        words = f"the guest runs {'on at the source' if side == 'source' else 'at the target'}"
        if vmm.has_devices and not (side in ends and ends[side].deaths):
            return side, words
        return "", f"{words}, without its devices"
    if there is not None and there.report is None and ("target", True) in {each[:2] for each in heard.ran}:
        return "", "the guest ran at the target, and is gone with its VMM"
    if source is None:
        return "", "the guest is gone with the source VMM"
    if source.kind is OutcomeKind.COMPLETED:  # the target said RESUMED, and nothing after that
        return "", "the guest ran at the target, which was not heard of since"
    return "", "the guest is stopped at the source"


def _run_report(scenario: Scenario, run: RunReport, source: VmmReport, target: VmmReport | None) -> RunReport:
    """`run` with what both sides measured. PeerProtocolError or ValueError if that is malformed."""
    processes = list(_processes(source, target).items())
    processes.sort(key=lambda named: named[0].endswith("device"))  # stable: the VMMs come first
    return replace(
        run,
        timeline=merge_timelines.merge(process.timeline for _, process in processes),
        source=source.side,
        target=target.side if target is not None else None,
        note=source.note,
        differences=_differences(scenario, source.digests, target.digests if target is not None else []),
    )


def _differences(scenario: Scenario, source: list[bytes], target: list[bytes]) -> list[str]:
    """Where the devices' states differ; nothing if one side's devices were gone by then. ValueError if malformed."""
    if not source or not target:
        return []
    devices = zip(scenario.devices, source, target, strict=True)
    texts = {device.name: differences(here, there, device.blocks) for device, here, there in devices}
    return [f"{name}: {text}" for name, text in texts.items() if text]


def _processes(source: VmmReport, target: VmmReport | None) -> dict[str, ProcessReport]:
    """What each process measured of itself, by its name."""
    processes = {}
    for name, report in (("source", source), ("target", target)):
        if report is not None and report.measured is not None:
            processes[f"{name} VMM"] = report.measured.vmm
            if report.measured.device is not None:
                processes[f"{name} device"] = report.measured.device
    return processes
