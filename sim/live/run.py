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
from proto_v3.migration import OutcomeKind
from proto_v3.timeline import Timeline
from sim.live import parts
from sim.live.clock import Delays
from sim.live.processes import Child, device_main, source_main, start, target_main
from sim.live.sockets import SocketSettings, listen
from sim.live.store import differences
from sim.live.vmm import PEER_ENDS_WITHIN_S, Run, Settings, check_size
from sim.outcome import DeviceMeasured, Measured, Outcome, completed, ended
from sim.protocol import Protocol
from sim.scenario import Scenario
from sim.stream import CriticalLoad, LoadCounts, ReadCounts

LOOPBACK = "127.0.0.1"
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

    def __call__(self, what: str, body: dict[str, Any]) -> None:
        if what == "running":
            self.ran.append((body["side"], body["running"], body["at_ns"]))
        if self.watch is not None:
            self.watch(what, body)


class _Side:
    """The two processes of a side."""

    def __init__(self, side: str, settings: Settings, heard: _Heard, main: Callable[..., None], *given: Any) -> None:
        vmm_end, device_end = socket.socketpair()
        self.side = side
        try:
            self.device = start(f"{side} device", device_main, heard, device_end, side, settings.loop)
            self.vmm = start(f"{side} VMM", main, heard, vmm_end, settings, *given)
        finally:
            vmm_end.close()
            device_end.close()

    @property
    def children(self) -> tuple[Child, Child]:
        return self.device, self.vmm

    async def result(self) -> dict[str, Any] | None:
        """What the VMM says at its end; None if it died before."""
        await asyncio.wait([self.vmm.result])
        return None if self.vmm.result.cancelled() else self.vmm.result.result()

    def deaths(self) -> list[str]:
        return [child.death for child in self.children if child.death]

    async def end(self) -> None:
        await asyncio.gather(*(child.end() for child in (self.vmm, self.device)))


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
    """Both sides on this machine. `started` is given the processes, while they run."""
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
        told = await _both(source, target, settings)
        deaths = [death for side in sides for death in side.deaths()]
    finally:
        listener.close()
        if beside is not None:
            beside.cancel()
        await asyncio.gather(*(side.end() for side in sides))
    return _result(scenario, protocol, seed, told, heard, deaths)


async def _both(source: _Side, target: _Side, settings: Settings) -> dict[str, dict[str, Any] | None]:
    """What both sides say at their ends. When one has ended, the other has a while to do so, too."""
    results = {side.side: asyncio.ensure_future(side.result()) for side in (source, target)}
    await asyncio.wait(results.values(), return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait(results.values(), timeout=settings.silent_s + 2 * PEER_ENDS_WITHIN_S)
    told = {}
    for name, result in results.items():
        told[name] = result.result() if result.done() else {"error": f"the {name} did not end, and was killed"}
        result.cancel()
    await asyncio.sleep(0)  # a death that caused it is known by now, too
    return told


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
        told = {"source": await source.result()}
        await asyncio.sleep(0)
        deaths = source.deaths()
    finally:
        await source.end()
    return _result(scenario, protocol, seed, told, heard, deaths)


async def serve_one(listener: socket.socket, settings: Settings, watch: Watch | None = None) -> dict[str, Any]:
    """The target's side of one migration: what came of it."""
    heard = _Heard(watch)
    side = _Side("target", settings, heard, target_main, listener)
    try:
        told = await side.result()
        await asyncio.sleep(0)
        deaths = side.deaths()
    finally:
        await side.end()
    return {**(told or {"error": "; ".join(deaths) or "the target VMM is gone"}), "deaths": deaths}


# --- what it was ------------------------------------------------------------------------------------------------------


def _result(
    scenario: Scenario,
    protocol: Protocol,
    seed: int,
    told: dict[str, dict[str, Any] | None],
    heard: _Heard,
    deaths: list[str],
) -> LiveResult:
    source = told["source"] or {}
    if source.get("user"):
        raise UserError(source["error"])
    target = source.get("peer") or told.get("target") or {}
    failures = _failures(source, target, deaths)
    nothing = Measured(scenario.name, protocol.name, seed, Timeline(lambda: 0), 0)
    if "timeline" not in source:
        runs_at = _runs_at(source, target)
        outcome = ended(
            replace(nothing, guest_runs_at=runs_at), OutcomeKind.FAILED, failures or "the source VMM is gone"
        )
        return LiveResult(outcome, ran=heard.ran, deaths=deaths)
    try:
        measured, timeline = _measured(scenario, protocol, seed, source, target)
        outcome = _outcome(measured, source, target, failures)
    except (PeerProtocolError, KeyError, TypeError, ValueError) as error:
        outcome = ended(nothing, OutcomeKind.FAILED, f"what the target measured cannot be read: {error!r}")
        return LiveResult(outcome, ran=heard.ran, deaths=deaths)
    return LiveResult(
        outcome,
        timeline,
        _delays(source, target),
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
    causes += [each["error"] for each in (source, target) if "error" in each]
    return "; ".join(dict.fromkeys(causes or [each["text"] for each in failures]))


def _outcome(measured: Measured, source: dict[str, Any], target: dict[str, Any], failures: str) -> Outcome:
    kind = source.get("kind")
    if kind == OutcomeKind.COMPLETED and not failures and target.get("whole"):
        return completed(measured)
    if kind is not None and not failures:
        return ended(measured, OutcomeKind(kind))
    if any(each["unsupported"] for each in source.get("failures", [])):
        return ended(measured, OutcomeKind.UNSUPPORTED, failures)
    return ended(measured, OutcomeKind.FAILED, failures)


def _runs_at(source: dict[str, Any], target: dict[str, Any]) -> str:
    """Where a guest runs that has its devices."""
    sides = {"source": source, "target": target}
    return ", ".join(name for name, told in sides.items() if told.get("running") and told.get("device"))


def _measured(
    scenario: Scenario, protocol: Protocol, seed: int, source: dict[str, Any], target: dict[str, Any]
) -> tuple[Measured, Timeline]:
    told = [side for side in (source, target) if side]
    exports = [side["timeline"] for side in told] + [side["device"]["timeline"] for side in told if side.get("device")]
    timeline = parts.merge([(export, 0) for export in exports], 0)
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
        late_looks=source.get("late_looks", 0),
        guest_runs_at=_runs_at(source, target),
    )
    return measured, timeline


def _devices(source: dict[str, Any], target: dict[str, Any]) -> list[DeviceMeasured]:
    here = (source.get("device") or {}).get("devices", [])
    there = (target.get("device") or {}).get("devices", [])
    digests = list(zip(source.get("digests", []), target.get("digests", []), strict=True))
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


def _delays(source: dict[str, Any], target: dict[str, Any]) -> dict[str, Delays]:
    told = {}
    for name, side in (("source", source), ("target", target)):
        if side:
            told[f"{name} VMM"] = Delays(**side["delays"])
        if side.get("device"):
            told[f"{name} device"] = Delays(**side["device"]["delays"])
    return told
