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
from sim.device.stream import CriticalLoad, LoadCounts, ReadCounts
from sim.live import merge_timelines
from sim.live.fd.store import differences
from sim.live.processes.children import HANGS, Child, device_main, source_main, start, target_main
from sim.live.processes.vmm import Settings, check_size
from sim.live.real_time import Delays
from sim.live.tcp.messages import Run
from sim.live.tcp.sockets import SocketSettings, listen
from sim.outcome import DeviceMeasured, Measured, Outcome, completed, ended, with_bound
from sim.scenario.protocol import Protocol
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
    streams: list[tuple[str, ReadCounts]] = field(default_factory=list)
    """Of each data fd, as its VMM read it."""
    clock_uncertainty_ns: int = 0
    """How far the clocks of two hosts may be apart; 0 on one."""
    sockets: list[dict[str, int]] = field(default_factory=list)
    """What the kernel gave each connection."""
    ran: list[tuple[str, bool, int]] = field(default_factory=list)
    """When a guest began to run or had stopped: side, which, and perf_counter_ns() there."""
    deaths: list[str] = field(default_factory=list)
    """Processes that died before their work was done."""


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

    async def result(self) -> dict[str, Any] | None:
        """What the VMM says at its end; None if it died before."""
        await asyncio.wait([self.vmm.result])
        return None if self.vmm.result.cancelled() else self.vmm.result.result()

    async def deaths(self, told: dict[str, Any] | None) -> list[str]:
        """Which of them died before their work was done. A device process that its VMM lost is dead, or will be killed
        for it hangs; that is waited for, as it may be known here a little later."""
        if told is not None and told["device_gone"]:
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


def check(scenario: Scenario, protocol: Protocol, settings: Settings) -> None:
    """UserError for what cannot be run live."""
    if not sys.platform.startswith("linux"):
        raise UserError("live mode needs Linux: timerfd, eventfd, memfd, descriptors passed over UNIX sockets")
    check_size(protocol.applied(scenario), settings.max_state_bytes)


async def run_here(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    settings: Settings,
    watch: Watch | None = None,
    started: Callable[[Sequence[Child]], Awaitable[None]] | None = None,
) -> LiveResult:
    """Both sides on this machine. `started` is given the processes, while they run; an error of its own is raised."""
    check(scenario, protocol, settings)
    heard = _Heard(watch)
    run = Run(scenario.told(), protocol.name, seed)
    listener = listen((LOOPBACK, 0), SocketSettings())
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
    return _result(scenario, protocol, seed, ends, heard)


async def _both(source: _Side, target: _Side, heard: _Heard, settings: Settings) -> dict[str, _End]:
    """How both sides ended. When one has, the other has a while to do so, too."""
    results = {side: asyncio.ensure_future(side.result()) for side in (source, target)}
    try:
        await asyncio.wait(results.values(), return_when=asyncio.FIRST_COMPLETED)
        waits_in_vain = results[source].done() and not heard.session  # for any source, as a target does
        await asyncio.wait(results.values(), timeout=VAIN_S if waits_in_vain else ENDS_AFTER * settings.silent_s)
        ends = {}
        for side, result in results.items():
            told = result.result() if result.done() else None
            deaths = await side.deaths(told)
            if not result.done() and not waits_in_vain:
                deaths = deaths or [f"the {side.vmm.name} (process {side.vmm.pid}) did not end, and was killed"]
            ends[side.side] = _End(told, deaths)
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
    check(scenario, protocol, settings)
    heard = _Heard(watch)
    source = _Side("source", settings, heard, source_main, Run(scenario.told(), protocol.name, seed), address)
    try:
        told = await source.result()
        ends = {"source": _End(told, await source.deaths(told))}
    finally:
        await source.end()
    return _result(scenario, protocol, seed, ends, heard)


async def serve_one(listener: socket.socket, settings: Settings, watch: Watch | None = None) -> dict[str, Any]:
    """The target's side of one migration: what came of it."""
    heard = _Heard(watch)
    side = _Side("target", settings, heard, target_main, listener)
    try:
        told = await side.result()
        deaths = await side.deaths(told)
    finally:
        await side.end()
    return {**(told or {"error": "; ".join(deaths) or "the target VMM is gone"}), "deaths": deaths}


# --- what it was ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _End:
    """How a side ended."""

    told: dict[str, Any] | None
    """What its VMM said; None if that died before."""
    deaths: list[str]


def _result(scenario: Scenario, protocol: Protocol, seed: int, ends: dict[str, _End], heard: _Heard) -> LiveResult:
    source = ends["source"].told or {}
    if source.get("user"):
        raise UserError(source["error"])
    deaths = [death for end in ends.values() for death in end.deaths]
    target = source.get("peer") or (ends["target"].told if "target" in ends else None) or {}
    nothing = Measured(scenario.name, protocol.name, seed, Timeline(lambda: 0), 0)
    try:
        runs_at, guest = _guest(ends, target, heard)
        nothing = replace(nothing, guest_runs_at=runs_at)
        if "timeline" not in source:
            why = _failures(source, target, deaths) or "the source VMM is gone"
            return LiveResult(ended(nothing, OutcomeKind.FAILED, f"{why}; {guest}"), ran=heard.ran, deaths=deaths)
        measured, timeline = _measured(scenario, protocol, seed, source, target if "timeline" in target else {})
        outcome = _outcome(replace(measured, guest_runs_at=runs_at), source, target, deaths, guest)
    except (PeerProtocolError, KeyError, TypeError, ValueError) as error:
        why = "; ".join([*deaths, f"what the target measured cannot be read: {error!r}"])
        return LiveResult(ended(nothing, OutcomeKind.FAILED, why), ran=heard.ran, deaths=deaths)
    there = target if "timeline" in target else {}
    return LiveResult(
        with_bound(outcome, lower_bound(protocol.applied(scenario), protocol)),
        timeline,
        {name: Delays(**told) for name, told in _by_process(source, there, "delays").items()},
        _by_process(source, there, "cpu_ns"),
        [(name, ReadCounts(**counts)) for name, counts in source["reads"] if ReadCounts(**counts).bytes],
        source.get("peer_uncertainty_ns", 0),
        source.get("sockets", []),
        heard.ran,
        deaths,
    )


def _failures(source: dict[str, Any], target: dict[str, Any], deaths: list[str]) -> str:
    """What went wrong, in words; what only echoes it is left out where the cause is known."""
    failures = [*source.get("failures", []), *target.get("failures", [])]
    causes = deaths + [each["text"] for each in failures if not each["echo"]]
    return "; ".join(dict.fromkeys(causes or [each["text"] for each in failures]))


def _outcome(
    measured: Measured, source: dict[str, Any], target: dict[str, Any], deaths: list[str], guest: str
) -> Outcome:
    kind = source.get("kind")
    failures = _failures(source, target, [])
    whole = kind == OutcomeKind.COMPLETED and target.get("whole") and source["digests"] and target["digests"]
    if whole and not failures:
        notes = [measured.note] if measured.note else []
        return completed(replace(measured, note="; ".join(notes + [f"when all was done, {each}" for each in deaths])))
    failures = _failures(source, target, deaths)
    if kind is not None and kind != OutcomeKind.COMPLETED and not failures:
        return ended(measured, OutcomeKind(kind))
    if any(each["unsupported"] for each in source.get("failures", [])):
        return ended(measured, OutcomeKind.UNSUPPORTED, failures)
    return ended(measured, OutcomeKind.FAILED, f"{failures or 'the target did not say how it ended'}; {guest}")


def _guest(ends: dict[str, _End], target: dict[str, Any], heard: _Heard) -> tuple[str, str]:
    """Where a guest runs that has its devices, if one does; and, in words, what became of it."""
    source, there = ends["source"].told, ends.get("target")
    sides = {"source": source or {"running": False}, "target": {"running": False, **target}}
    runs = {side: told for side, told in sides.items() if told.get("running", True)}  # before all else, at the source
    if len(runs) > 1:
        return ", ".join(runs), "two guests run"
    for side, told in runs.items():
        words = f"the guest runs {'on at the source' if side == 'source' else 'at the target'}"
        if told.get("device", not told.get("device_gone")) and not (side in ends and ends[side].deaths):
            return side, words
        return "", f"{words}, without its devices"
    if there is not None and there.told is None and ("target", True) in {each[:2] for each in heard.ran}:
        return "", "the guest ran at the target, and is gone with its VMM"
    if source is None:
        return "", "the guest is gone with the source VMM"
    if source.get("kind") == OutcomeKind.COMPLETED:  # the target said RESUMED, and nothing after that
        return "", "the guest ran at the target, which was not heard of since"
    return "", "the guest is stopped at the source"


def _measured(
    scenario: Scenario, protocol: Protocol, seed: int, source: dict[str, Any], target: dict[str, Any]
) -> tuple[Measured, Timeline]:
    told = [side for side in (source, target) if side]
    exports = [side["timeline"] for side in told] + [side["device"]["timeline"] for side in told if side.get("device")]
    timeline = merge_timelines.merge([(export, 0) for export in exports], 0)
    measured = Measured(
        scenario=scenario.name,
        protocol=protocol.name,
        seed=seed,
        timeline=timeline,
        ended_ns=max(side["ended_ns"] for side in told),
        devices=_devices(source, target),
        wire_bytes=source["wire_bytes"],
        connections=source["connections"],
        messages=sum(side["messages"] for side in told),
        peak_reorder_bytes=target.get("peak_reorder_bytes", 0),
        note=source["note"],
        retries=source.get("retries", 0),
        retries_stopped_ns=source.get("retries_stopped_ns", 0),
        late_final_checks=source.get("late_final_checks", 0),
    )
    return measured, timeline


def _devices(source: dict[str, Any], target: dict[str, Any]) -> list[DeviceMeasured]:
    here = (source.get("device") or {}).get("devices", [])
    there = (target.get("device") or {}).get("devices", [])
    both = source.get("digests") and target.get("digests")  # not if one side's devices were gone by then
    digests = list(zip(source["digests"], target["digests"], strict=True)) if both else []
    devices = []
    for at, device in enumerate(here):
        loaded = there[at] if at < len(there) else {"loads": [], "critical_loads": []}
        devices.append(
            DeviceMeasured(
                name=device["name"],
                needed_bytes=device["needed_bytes"],
                reads=[ReadCounts(**counts) for counts in device["reads"]],
                loads=[LoadCounts(**counts) for counts in loaded["loads"]],
                critical_loads=[CriticalLoad(**load) for load in loaded["critical_loads"]],
                reconfigurations_ns=device["reconfigurations_ns"],
                difference=differences(*digests[at], device["blocks"]) if digests else "",
            )
        )
    return devices


def _by_process(source: dict[str, Any], target: dict[str, Any], what: str) -> dict[str, Any]:
    """What all processes told of themselves under one name."""
    told = {}
    for name, side in (("source", source), ("target", target)):
        if side:
            told[f"{name} VMM"] = side[what]
        if side.get("device"):
            told[f"{name} device"] = side["device"][what]
    return told
