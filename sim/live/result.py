# SPDX-License-Identifier: GPL-2.0-or-later
"""The result of a live run, computed from what its processes reported and how they died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from proto_v3.errors import PeerProtocolError, UserError
from proto_v3.timeline import Mark, Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.live import merge_timelines
from sim.live.processes.comparison import BLOCK_BY_BLOCK, StateComparison
from sim.live.processes.report import GuestNote, ProcessReport, StreamReport, VmmReport
from sim.live.real_time import Delays
from sim.live.tcp.sockets import Granted
from sim.outcome import Outcome, RunReport, compared, completed, ended, held_against_limit, reason_of
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class LiveResult:
    """A live run's outcome, and what only a live run measures."""

    outcome: Outcome
    timeline: Timeline | None = None
    """Of all processes that could report theirs."""
    delays: dict[str, Delays] = field(default_factory=dict)
    """By process: the delays that its timers were set to, and how late they were."""
    cpu_ns: dict[str, int] = field(default_factory=dict)
    """By process: CPU time from time 0 to its end, without the comparison of the states."""
    user_ns: dict[str, int] = field(default_factory=dict)
    """By process: of that, what was spent outside of the kernel."""
    streams: list[StreamReport] = field(default_factory=list)
    """Of each data fd that the source read."""
    clock_uncertainty_ns: int = 0
    """How far the clocks of two hosts may be apart; 0 on one."""
    sockets: list[Granted] = field(default_factory=list)
    """What the kernel granted each connection."""
    ran: list[GuestNote] = field(default_factory=list)
    """When a guest was about to run or had stopped."""
    deaths: list[str] = field(default_factory=list)
    """Processes that died before their work was done."""


@dataclass(frozen=True, slots=True)
class SideEnd:
    """How a side ended."""

    report: VmmReport | None
    """None if its VMM died before."""
    deaths: list[str]
    """Which of its processes died, and how."""


def not_run(scenario: Scenario, protocol: Protocol, seed: int, why: str) -> LiveResult:
    """The result of a run that could not be made."""
    return LiveResult(
        ended(RunReport(scenario.name, protocol.name, seed, Timeline(lambda: 0)), OutcomeKind.FAILED, why)
    )


def result(
    applied: AppliedScenario,
    seed: int,
    ends: dict[str, SideEnd],
    ran: list[GuestNote],
    comparison: StateComparison = BLOCK_BY_BLOCK,
    *,
    simulated: bool = True,
) -> LiveResult:
    """The result of a run that ended like this. `ends`: by side, the target's only if it ran here.

    `simulated`: the devices are those of the scenario, so that the downtime has a bound. UserError if that is what the
    source reports.
    """
    source = ends["source"].report
    if source is not None and source.user_error:
        raise UserError(source.failures[0].text)
    deaths = [death for end in ends.values() for death in end.deaths]
    target = _target_report(ends)
    runs_at, guest = _guest(ends, target, ran)
    nothing = RunReport(applied.scenario.name, applied.protocol.name, seed, Timeline(lambda: 0), guest_runs_at=runs_at)

    def failed(why: str) -> LiveResult:
        return LiveResult(ended(nothing, OutcomeKind.FAILED, why), ran=ran, deaths=deaths)

    if source is None or source.measured is None:
        why = _failures(nothing, [source, target], deaths) or "the source VMM is gone"
        return failed(f"{why}; {guest}")
    try:
        run = _run_report(applied.scenario, nothing, source, target, comparison)
        outcome = _outcome(run, source, target, deaths, guest)
    except (PeerProtocolError, ValueError) as error:
        return failed("; ".join([*deaths, f"what the target measured cannot be read: {error}"]))
    processes = _processes(source, target)
    return LiveResult(
        compared(outcome, applied) if simulated else held_against_limit(outcome, applied),
        run.timeline,
        {name: process.delays for name, process in processes.items()},
        {name: process.cpu_ns for name, process in processes.items()},
        {name: process.user_ns for name, process in processes.items()},
        [stream for stream in source.measured.streams if stream.counters.device_bytes],
        source.clock_uncertainty_ns,
        source.sockets,
        ran,
        deaths,
    )


def _target_report(ends: dict[str, SideEnd]) -> VmmReport | None:
    """As the source received it, or else as the supervisor did."""
    source = ends["source"].report
    if source is not None and source.peer is not None:
        return source.peer
    return ends["target"].report if "target" in ends else None


def _failures(run: RunReport, reports: Sequence[VmmReport | None], deaths: Sequence[str]) -> str:
    """Deaths and errors in words. Echoes are left out if their cause is known."""
    failures = [failure for report in reports if report is not None for failure in report.failures]
    causes = [failure for failure in failures if not (failure.echo and deaths)]
    return "; ".join(filter(None, [*deaths, reason_of(run, causes)]))


def _outcome(run: RunReport, source: VmmReport, target: VmmReport | None, deaths: list[str], guest: str) -> Outcome:
    whole = source.kind is OutcomeKind.COMPLETED and target is not None and target.whole
    if whole and target is not None and source.digests and target.digests and not _failures(run, [source, target], []):
        _check_marks(run.timeline)
        notes = [run.note] if run.note else []
        return completed(replace(run, note="; ".join(notes + [f"when all was done, {each}" for each in deaths])))
    failures = _failures(run, [source, target], deaths)
    if source.kind is not None and source.kind is not OutcomeKind.COMPLETED and not failures:
        return ended(run, source.kind, source.reason)
    if any(failure.unsupported for failure in source.failures):
        return ended(run, OutcomeKind.UNSUPPORTED, failures)
    return ended(run, OutcomeKind.FAILED, failures or "the target did not say how it ended", guest)


def _check_marks(timeline: Timeline) -> None:
    """PeerProtocolError unless the timeline has the downtime's phases: half of the marks come from the target."""
    missing = [mark for mark in Mark if mark not in timeline.marks]
    if missing:
        raise PeerProtocolError(f"the timelines have no mark {', '.join(missing)}")
    if timeline.downtime_ns < 0:
        raise PeerProtocolError(f"the guest resumed {-timeline.downtime_ns} ns before it was to stop")


def _guest(ends: dict[str, SideEnd], target: VmmReport | None, ran: list[GuestNote]) -> tuple[str, str]:
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
    if there is not None and there.report is None and any(note.side == "target" and note.runs for note in ran):
        return "", "the guest ran at the target, and is gone with its VMM"
    if source is None:
        return "", "the guest is gone with the source VMM"
    if source.kind is OutcomeKind.COMPLETED:  # the target said RESUMED, and nothing after that
        return "", "the guest ran at the target, which was not heard of since"
    return "", "the guest is stopped at the source"


def _run_report(
    scenario: Scenario, run: RunReport, source: VmmReport, target: VmmReport | None, comparison: StateComparison
) -> RunReport:
    """`run` with what both sides measured. PeerProtocolError or ValueError if that is malformed."""
    processes = list(_processes(source, target).items())
    processes.sort(key=lambda named: named[0].endswith("device"))  # stable: the VMMs come first
    return replace(
        run,
        timeline=merge_timelines.merge(process.timeline for _, process in processes),
        source=source.side,
        target=target.side if target is not None else None,
        note=source.note,
        differences=_differences(scenario, source.digests, target.digests if target is not None else [], comparison),
    )


def _differences(
    scenario: Scenario, source: list[bytes], target: list[bytes], comparison: StateComparison
) -> list[str]:
    """Where the devices' states differ; nothing if one side's devices were gone by then. ValueError if malformed."""
    if not source or not target:
        return []
    devices = zip(scenario.devices, source, target, strict=True)
    texts = {device.name: comparison.difference(device, here, there) for device, here, there in devices}
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
