"""A VMM process: one side of a migration by the code of `proto_v3`, against a device process and a peer over TCP.

The source decides what is run: its offer to the target carries scenario, protocol and seed. Time 0 is the same moment
at both, as far as their clocks are known to each other. At the end the source has what both sides measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error, UserError, leaves
from proto_v3.timeline import Mark, on_track
from proto_v3.vmm.migration import OutcomeKind, Side, Source, Target, UnsupportedError
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Kind
from sim.clock import port as clock
from sim.host.machine import ZERO_PAGE_BYTES, MachineModel
from sim.host.vmms import connections, make_source, make_target, side_report
from sim.live.fd.calls import Calls
from sim.live.fd.remote import RemoteDevice
from sim.live.fd.remote_fd import Devices
from sim.live.io import IO
from sim.live.merge_timelines import ProcessTimeline
from sim.live.plain import from_plain, to_plain
from sim.live.processes.report import (
    DeviceProcessReport,
    Digests,
    Failure,
    Measured,
    ProcessReport,
    StreamReport,
    VmmReport,
)
from sim.live.real_time import RealTime
from sim.live.tcp.connection import Connection
from sim.live.tcp.handshake import Limits
from sim.live.tcp.messages import Bye, Failed, Prepared, Result, Run, Start, Started
from sim.live.tcp.session import Session
from sim.live.tcp.sockets import SocketSettings
from sim.live.tcp.tls import tls_client, tls_server
from sim.live.tcp.wire_source import connect
from sim.live.tcp.wire_target import accept
from sim.report import Counters
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import GIB, MIB, NS_PER_S, PAGE_BYTES

HEAD_START_NS = 50_000_000
"""From the moment that time 0 is agreed on to time 0."""
PROGRESS_S = 0.25
BEATS = 4
"""Pings within the time after which a process that does not answer is given up."""
FRAME_SLACK_BYTES = 128 << 10
"""Of a frame beside the data: a record's header. Versions of addressable blocks, 8 bytes for 1 KiB at the most, too."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files with this side's certificate and key, and with the certificates that it trusts."""

    cert: str
    key: str
    ca: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How the processes of a side are run."""

    io: str = "threads"
    loop: str = "uvloop"
    tls: Tls | None = None
    silent_s: float = 10.0
    handshake_s: float = 30.0
    after_stop_s: float = 120.0
    """A migration that lasts longer than vmm.give_up_s and this is ended, wherever it is."""
    progress: bool = False
    """Somebody watches."""
    max_state_bytes: int = 4 * GIB
    """Of all devices together: a target makes no more."""


class GuestThere:
    """See sim.host.machine.Guest: the guest writes to its devices in the device process."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def order_stop(self) -> None:
        """See sim.host.machine.Guest."""
        await self._calls.call("guest", what="order_stop")

    async def stop(self) -> None:
        """See sim.host.machine.Guest."""
        await self._calls.call("guest", what="stop")

    async def start(self) -> None:
        """See sim.host.machine.Guest."""
        await self._calls.call("guest", what="start")


class LiveMachine(MachineModel):
    """A guest that says when it runs and when not, to whoever supervises the process."""

    def __init__(self, *given: Any, told: Callable[[bool], None], **named: Any) -> None:
        super().__init__(*given, **named)
        self._told = told
        told(self.running)

    async def stop_vcpus(self) -> None:
        """See proto_v3.vmm.machine.Machine."""
        await super().stop_vcpus()
        self._told(False)

    async def start_vcpus(self) -> None:
        """See proto_v3.vmm.machine.Machine; said before it is so."""
        self._told(True)
        await super().start_vcpus()


class Pages:
    """Pages of RAM: bytes of which only the number matters. Memory that is never written takes none."""

    def __init__(self) -> None:
        self._zeros = memoryview(b"")

    def __call__(self, size_bytes: int) -> memoryview:
        """So many bytes."""
        if size_bytes > len(self._zeros):
            self._zeros = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return self._zeros[:size_bytes]


class VmmProcess:
    """What both sides are made of."""

    def __init__(self, side: str, settings: Settings, device: Calls, supervisor: Calls) -> None:
        self.side = side
        self.settings = settings
        self.device = device
        self.supervisor = supervisor
        self.io = IO[settings.io]
        self.machine: LiveMachine | None = None
        self.channels: list[Channel] = []
        self.counters = Counters()

    def prepare(self, run: Run) -> None:
        """Take note of what is run. UserError for a scenario or protocol that is none."""
        self.run = run
        scenario = Scenario.model_validate_json(run.scenario)
        self.applied = Protocol.parse(run.protocol, scenario).applied(scenario)
        self.scenario = self.applied.scenario
        check_size(self.scenario, self.settings.max_state_bytes)

    def begin(self, zero_ns: int, session: Session) -> Side:
        """Time 0 is fixed: make what runs on it."""
        self.time = RealTime(zero_ns)
        clock.use(self.time)
        self.timeline = ProcessTimeline(self.time.now_ns)
        session.trace(self.timeline)
        self.device.trace(self.timeline, self.side)
        on_track(self.side)
        settings = self.scenario.switchover_settings()
        self.devices = Devices(self.device, self.side, self.settings.io, self.timeline, settings.read_bytes)
        remote = [RemoteDevice(i, spec.name, self.devices) for i, spec in enumerate(self.scenario.devices)]
        self.machine = LiveMachine(
            self.scenario,
            GuestThere(self.device),
            self.timeline,
            running=self.side == "source",
            pages=Pages(),
            told=self._running,
        )
        self.channels = [Channel(transport) for transport in session.channels]
        return Side(self.machine, remote, settings, self.timeline, self.counters)

    def _running(self, running: bool) -> None:
        self.supervisor.note("running", side=self.side, running=running, at_ns=time.perf_counter_ns())

    async def watched(
        self, work: Coroutine[Any, Any, Any], left: Callable[[], dict[str, Any]], session: Session
    ) -> Any:
        """Do it; tell the supervisor how it goes. A peer that gets nowhere ends it."""
        beside = [asyncio.create_task(self._limit(session))]
        if self.settings.progress:
            beside.append(asyncio.create_task(self._watch(left)))
        try:
            return await work
        finally:
            for task in beside:
                task.cancel()

    async def beat(self) -> None:
        """See to it that the device process answers, all the time; one that hangs is as good as gone."""
        silent_s = self.settings.silent_s
        if await unanswered(self.device, max(self.settings.handshake_s, silent_s), silent_s):
            self.device.close(f"does not answer for {silent_s:g} s")

    async def _limit(self, session: Session) -> None:
        """A peer may be there and yet get nowhere; what waits for it must end."""
        limit_s = self.scenario.vmm.give_up_s + self.settings.after_stop_s
        await asyncio.sleep(limit_s)
        session.give_up(f"the migration did not end within {limit_s:g} s")

    async def _watch(self, left: Callable[[], dict[str, Any]]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            with contextlib.suppress(OSError):
                told = (await self.device.call("progress")).body if self.side == "source" else {}
                self.supervisor.note("progress", side=self.side, at_ns=self.time.now_ns(), **left(), **told)

    async def measured(self) -> Measured:
        """What this side measured, at its end."""
        vmm = ProcessReport(self.timeline.export(), self.time.delays(), self.time.cpu_ns)
        ended_ns = self.time.now_ns()
        streams = [StreamReport(fd.name, fd.counters) for fd in self.devices.fds]
        try:
            report = from_plain(DeviceProcessReport, (await self.device.call("collect")).body)
        except OSError:
            return Measured(side_report(self.side, self.counters, self.channels, ended_ns, []), vmm, None, streams)
        side = side_report(self.side, self.counters, self.channels, ended_ns, report.devices)
        return Measured(side, vmm, report.process, streams)

    async def digests(self, failures: list[Failure]) -> list[bytes]:
        """Of the devices' states, at the end of a completed migration. An error is added to the failures."""
        try:
            return from_plain(Digests, (await self.device.call("digests")).body).digests
        except OSError as error:
            failures.append(self.failure(error))
            return []

    @property
    def guest_runs(self) -> bool:
        """The guest, here. Before this side has begun, it runs at the source."""
        return self.side == "source" if self.machine is None else self.machine.running

    def failure(self, error: BaseException) -> Failure:
        """An error, for whoever reads the report."""
        device_gone = self.device.gone.done() and isinstance(error, OSError) and error.errno == errno.ENODEV
        echo = device_gone or isinstance(error, PeerFailedError | ConnectionError)
        return Failure(str(error) or type(error).__name__, echo, isinstance(error, UnsupportedError))


async def unanswered(calls: Calls, first_s: float, silent_s: float) -> bool:
    """Ping the other process until it is gone (False), or did not answer for that long (True); or for `first_s`, if it
    never did yet.

    Counts beats without an answer, not time: while this process is stopped itself, nothing is missed.
    """
    asked, missed, limit = calls.begin("ping"), 0, max(1, round(BEATS * first_s / silent_s))
    while missed < limit:
        await asyncio.wait([calls.gone], timeout=silent_s / BEATS)
        if calls.gone.done():
            return False
        missed += 1
        if asked.done():
            asked, missed, limit = calls.begin("ping"), 0, BEATS
    return True


def check_size(scenario: Scenario, most_bytes: int) -> None:
    """UserError for more state than live mode, or this target, takes: it is held in memory."""
    state = sum(device.blocks * device.block_bytes for device in scenario.devices)
    if state > most_bytes:
        raise UserError(
            f"device.state_mib: {state // MIB} MiB in all; a live run holds them in memory, and takes at most "
            f"{most_bytes // MIB} MiB (--max-state-mib)"
        )


def frame_bytes(scenario: Scenario) -> int:
    """The largest payload that a source sends."""
    ram_scan = scenario.ram.scan_bytes_per_s * scenario.vmm.ram_budget_ns / NS_PER_S / PAGE_BYTES * ZERO_PAGE_BYTES
    block = max(device.block_bytes for device in scenario.devices)
    largest = max(scenario.vmm.read_bytes, scenario.ram.frame_bytes, ram_scan, block)
    return round(largest * (1 + 1 / 128)) + FRAME_SLACK_BYTES


def socket_settings(scenario: Scenario) -> SocketSettings:
    """What the scenario says of a connection, as options of a socket: the kernel's pacing, and its buffers."""
    link = scenario.link
    return SocketSettings(
        buffer_bytes=link.socket_buffer_bytes // 2,  # sender's and receiver's together
        max_rate_bytes_per_s=round(link.per_connection_bytes_per_s),
    )


# --- the source -------------------------------------------------------------------------------------------------------


async def run_source(vmm: VmmProcess, run: Run, address: tuple[str, int]) -> VmmReport:
    """Migrate to the target that listens there; what both sides measured, and how it ended."""
    vmm.prepare(run)
    tls = vmm.settings.tls
    context = None if tls is None else tls_client(tls.cert, tls.key, tls.ca)
    await vmm.device.call("init", scenario=vmm.scenario.to_json(), seed=run.seed)
    session = await connect(
        address,
        run,
        connections(vmm.applied),
        io=vmm.io,
        limits=_limits(vmm.settings, frame_bytes(vmm.scenario)),
        sockets=socket_settings(vmm.scenario),
        tls=context,
    )
    try:
        return await _migrate(vmm, session)
    finally:
        await session.close()


def _limits(settings: Settings, largest: int) -> Limits:
    return Limits(handshake_s=settings.handshake_s, silent_s=settings.silent_s, frame_bytes=largest)


async def _migrate(vmm: VmmProcess, session: Session) -> VmmReport:
    await session.receive_message(Prepared)  # its device process has the memory
    zero_ns = time.perf_counter_ns() + HEAD_START_NS
    await session.send_message(Start(zero_ns=zero_ns + session.peer_clock.offset_ns))
    side = vmm.begin(zero_ns, session)
    await vmm.device.call("start", zero_ns=zero_ns)
    await session.receive_message(Started)
    await clock.sleep_ns(max(0, -clock.now_ns()))
    source: Source | None = None
    note, kind, failures = "", None, []
    try:
        source, note = await make_source(side, vmm.channels, vmm.applied)
        kind = await vmm.watched(source.run(), lambda: _source_progress(vmm), session)
    except (OSError, ProtoV3Error, ExceptionGroup) as error:
        failures = [vmm.failure(each) for each in leaves(error)]
        if source is None or not source.handed_over:
            await _cancel(vmm)
    measured, peer = await vmm.measured(), await _peer_report(vmm, session, failures)
    report = VmmReport(
        vmm.guest_runs,
        failures,
        measured=measured,
        digests=await vmm.digests(failures) if kind is OutcomeKind.COMPLETED else [],
        kind=kind,
        note=note,
        peer=peer,
        clock_uncertainty_ns=session.peer_clock.uncertainty_ns,
        sockets=session.sockets,
    )
    with contextlib.suppress(OSError, ProtoV3Error):
        await session.send_message(Bye())
    return report


async def _cancel(vmm: VmmProcess) -> None:
    """This side failed. Source.run() says so last of all, and not if its own devices cannot be reset; a target that
    hears of it twice does not mind."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(vmm.settings.silent_s):
            await vmm.channels[0].send_control(Kind.CANCEL)


async def _peer_report(vmm: VmmProcess, session: Session, failures: Sequence[Failure]) -> dict[str, Any] | None:
    """What the target reports; None if it cannot, or not soon after this side sent that it failed."""
    try:
        async with asyncio.timeout(vmm.settings.silent_s if failures else None):
            report = (await session.receive_message(Result)).report
            return report if isinstance(report, dict) else None
    except (OSError, TimeoutError, ProtoV3Error):
        return None


def _source_progress(vmm: VmmProcess) -> dict[str, Any]:
    return {
        "phase": _phase(vmm.timeline),
        "wire_bytes": sum(channel.bytes_sent for channel in vmm.channels),
        "streams": [[fd.name, fd.counters.device_bytes] for fd in vmm.devices.fds],
    }


def _phase(timeline: ProcessTimeline) -> str:
    marks = timeline.marks
    if Mark.DRAINED in marks:
        return "loading"
    if Mark.STOPPED in marks:
        return "stop-copy"
    return "stopping" if Mark.STOP_ORDERED in marks else "pre-copy"


# --- the target -------------------------------------------------------------------------------------------------------


async def run_target(vmm: VmmProcess, listener: socket.socket, rejected: Callable[[str], None]) -> VmmReport:
    """Take one migration in; what this side measured, and how it ended."""
    tls = vmm.settings.tls
    context: ssl.SSLContext | None = None if tls is None else tls_server(tls.cert, tls.key, tls.ca)

    async def judge(run: Run) -> None:
        try:
            vmm.prepare(run)
        except pydantic.ValidationError as error:
            raise PeerProtocolError(f"the offer's scenario is none: {error.errors()[0]['msg']}") from error

    session = await accept(
        listener,
        judge,
        io=vmm.io,
        limits=_limits(vmm.settings, 1 << 30),
        tls=context,
        rejected=rejected,
    )
    try:
        vmm.supervisor.note("session", peer=session.peer, protocol=vmm.run.protocol, scenario=vmm.scenario.name)
        return await _take_in(vmm, session)
    except (OSError, ProtoV3Error) as error:
        with contextlib.suppress(OSError, ProtoV3Error):
            await session.send_message(Failed(why=str(error)))
        raise
    finally:
        await session.close()


async def _take_in(vmm: VmmProcess, session: Session) -> VmmReport:
    await vmm.device.call("init", scenario=vmm.scenario.to_json(), seed=vmm.run.seed)
    await session.send_message(Prepared())
    zero_ns = (await session.receive_message(Start)).zero_ns
    if abs(zero_ns - time.perf_counter_ns()) > 10_000_000_000:
        raise PeerProtocolError(f"time 0 is said to be at {zero_ns!r}, which is not about now")
    side = vmm.begin(zero_ns, session)
    await vmm.device.call("start", zero_ns=zero_ns)
    await session.send_message(Started())
    target: Target | None = None
    whole, failures = False, []
    try:
        target = await make_target(side, vmm.channels, vmm.applied)
        if target is not None:
            whole = await vmm.watched(target.run(), lambda: _target_progress(vmm), session)
    except (OSError, ProtoV3Error, ExceptionGroup) as error:
        failures = [vmm.failure(each) for each in leaves(error)]
        if side.machine.running:
            _hang_up(session)
    drains = [] if whole else [asyncio.create_task(_drain(channel)) for channel in vmm.channels]
    measured = await vmm.measured()
    digests = await vmm.digests(failures) if whole else []
    report = VmmReport(vmm.guest_runs, failures, measured=measured, digests=digests, whole=whole)
    with contextlib.suppress(OSError, ProtoV3Error):
        await session.send_message(Result(report=to_plain(report)))
        await session.receive_message(Bye)
    for drain in drains:
        drain.cancel()
    return report


async def _drain(channel: Channel) -> None:
    """This side wants nothing more; but the source says CANCEL behind what it has sent, and waits for room for it."""
    with contextlib.suppress(OSError, ProtoV3Error):
        while True:
            await channel.recv()


def _hang_up(session: Session) -> None:
    """This side failed with its guest running, so it did not say FAILED, and will not say RESUMED either: the source is
    not to wait for that."""
    for channel in session.channels:
        if isinstance(channel, Connection):
            channel.end(ConnectionAbortedError("this side failed"))


def _target_progress(vmm: VmmProcess) -> dict[str, Any]:
    return {"phase": "loading" if Mark.TRANSFERRED in vmm.timeline.marks else "receiving"}
