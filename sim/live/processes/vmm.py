# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM process: one side of a migration by the code of `proto_v3`, against its devices and a peer over TCP.

The source decides what is run: its offer to the target carries scenario, protocol and seed. Time 0 is the same moment
at both, as far as their clocks are known to each other. At the end the source has what both sides measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pydantic
from typing_extensions import override

from proto_v3.errors import PeerProtocolError, ProtoV3Error, UserError, leaves
from proto_v3.text import clean
from proto_v3.timeline import Mark, on_track
from proto_v3.vmm.migration import GivenUpError, OutcomeKind, Side, Source, Target
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Kind
from sim.clock import port as clock
from sim.host.machine import MachineModel
from sim.host.spread import of_host
from sim.host.vmms import connections, make_source, make_target, side_report
from sim.live.fd.calls import Calls
from sim.live.io import IO
from sim.live.merge_timelines import ProcessTimeline
from sim.live.plain import to_plain
from sim.live.processes.backend import DeviceBackend
from sim.live.processes.files import check_files
from sim.live.processes.memory import check_memory, within
from sim.live.processes.peer_report import peer_report
from sim.live.processes.report import (
    GuestNote,
    Measured,
    ProcessReport,
    ProgressNote,
    RejectedNote,
    SessionNote,
    VmmReport,
    send_note,
)
from sim.live.processes.settings import Settings, frame_bytes, socket_settings
from sim.live.real_time import RealTime
from sim.live.tcp.connection import Connection
from sim.live.tcp.handshake import KERNEL_CHOICE, Needed, accepting, connect
from sim.live.tcp.messages import Bye, Prepared, Result, Run, Start, Started
from sim.live.tcp.session import Session
from sim.live.tcp.tls import tls_client, tls_server
from sim.report import Counters, Failure, failure
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

HEAD_START_NS = 50_000_000
"""From the moment at which both sides agree on time 0 until time 0."""
MAX_FRAME_BYTES = 1 << 30
"""That a target receives."""
PROGRESS_S = 0.25
"""Between progress notes."""
RECOVERS = 2
"""A device that does not answer is given up RECOVERS x silent_s after the end of the migration's time limit."""


class VmmProcess:
    """What a source and a target process have in common."""

    def __init__(self, side: str, settings: Settings, devices: DeviceBackend, supervisor: Calls) -> None:
        self.side = side
        self.settings = settings
        self.devices = devices
        self.supervisor = supervisor
        self.io = IO[settings.io]
        self.machine: LiveMachine | None = None
        self.channels: list[Channel] = []
        self.counters = Counters()
        self.resets: list[str] = []

    def prepare(self, run: Run) -> None:
        """Set what is run. UserError if the scenario or the protocol is not valid."""
        self.run = run
        self.devices.check(run)
        scenario = Scenario.model_validate_json(run.scenario)
        applied, max_bytes = Protocol.parse(run.protocol, scenario).applied(scenario), self.settings.max_state_bytes
        tls = self.settings.tls is not None
        check_files(applied)
        check_memory(applied, max_bytes, tls)
        most_s = self.settings.max_give_up_s
        if applied.scenario.vmm.give_up_s > most_s:
            raise UserError(
                f"vmm.give_up_s = {applied.scenario.vmm.give_up_s:g}: a live run takes at most {most_s:g} s"
            )
        self.applied = within(applied, max_bytes, tls) if self.side == "target" else applied
        self.scenario = of_host(self.applied.scenario, run.seed, self.side)

    def begin(self, zero_ns: int, session: Session) -> Side:
        """Time 0 is fixed: make this side's machine, devices and channels."""
        self.time = RealTime(zero_ns)
        clock.use(self.time)
        self.timeline = ProcessTimeline(self.time.now_ns)
        session.trace(self.timeline)
        on_track(self.side)
        settings = self.scenario.switchover_settings()
        devices = self.devices.begin(self.scenario, self.timeline)
        self.machine = LiveMachine(
            self.scenario,
            self.devices.guest,
            self.timeline,
            running=self.side == "source",
            ram=self.devices.ram(self.scenario, self.timeline),
            on_run=self._guest_runs,
        )
        self.channels = [Channel(transport) for transport in session.channels]
        bounded = partial(session.waiting, self.doing)
        return Side(self.machine, devices, settings, self.timeline, self.counters, self.resets, bounded)

    def doing(self) -> str:
        """What the migration is waited for, in words."""
        return f"the end of the migration, in {_phase(self.timeline)}" if self.side == "source" else "the source's data"

    def _guest_runs(self, runs: bool) -> None:
        send_note(self.supervisor, GuestNote(self.side, runs, time.perf_counter_ns()))

    @contextlib.contextmanager
    def migrating(self, session: Session) -> Iterator[None]:
        """The stage of the migration: its steps end in time, whatever the other side or a device does, or does not.

        What comes after the steps, to get the guest back, has time until the session's connections are closed, and as
        long again; then a device that does not answer is given up.
        """
        limit_s = self.scenario.vmm.give_up_s + self.settings.after_stop_s
        session.stage(limit_s)
        why = f"did not do what was asked of it within {limit_s:g} s"
        recover_s = RECOVERS * self.settings.silent_s
        overdue = asyncio.get_running_loop().call_later(limit_s + recover_s, self.devices.close, why)
        try:
            yield
        finally:
            overdue.cancel()

    async def beat(self) -> None:
        """Give the devices up when they have not answered for `silent_s` seconds."""
        await self.devices.beat(self.settings.handshake_s, self.settings.silent_s)

    async def measured(self) -> Measured:
        """What this side measured, at its end."""
        vmm = ProcessReport(self.timeline.export(), self.time.delays(), self.time.cpu_ns, self.time.user_ns)
        ended_ns = self.time.now_ns()
        streams = self.devices.streams()
        try:
            report = await self.devices.collect()
        except OSError:
            return Measured(
                side_report(self.side, self.counters, self.channels, ended_ns, [], self.resets), vmm, None, streams
            )
        side = side_report(self.side, self.counters, self.channels, ended_ns, report.devices, self.resets)
        return Measured(side, vmm, report.process, streams)

    async def digests(self, failures: list[Failure]) -> list[bytes]:
        """Of the devices' states, at the end of a completed migration. An error is added to the failures."""
        try:
            return await self.devices.digests()
        except OSError as error:
            failures.append(self.failure(error))
            return []

    @property
    def guest_runs(self) -> bool:
        """The guest, here. Before this side has begun, it runs at the source."""
        return self.side == "source" if self.machine is None else self.machine.running

    def failure(self, error: BaseException) -> Failure:
        """An error, for whoever reads the report."""
        told = failure(self.side, error, 0 if self.machine is None else self.time.now_ns(), (ConnectionError,))
        device_gone = self.devices.gone and isinstance(error, OSError) and error.errno == errno.ENODEV
        return replace(told, echo=told.echo or device_gone)


# --- its guest --------------------------------------------------------------------------------------------------------


class LiveMachine(MachineModel):
    """A VMM's guest. `on_run` is called with whether it runs: before it starts, and after it has stopped."""

    def __init__(self, *args: Any, on_run: Callable[[bool], None], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._on_run = on_run
        on_run(self.running)

    @override
    async def stop_vcpus(self) -> None:
        await super().stop_vcpus()
        self._on_run(False)

    @override
    async def start_vcpus(self) -> None:
        self._on_run(True)
        try:
            await super().start_vcpus()
        finally:
            if not self.running:
                self._on_run(False)


# --- the source -------------------------------------------------------------------------------------------------------


async def run_source(vmm: VmmProcess, run: Run, address: tuple[str, int]) -> VmmReport:
    """Migrate to the target that listens at this address; returns what both sides report."""
    vmm.prepare(run)
    tls = vmm.settings.tls
    context = None if tls is None else tls_client(tls.cert, tls.key, tls.ca)
    await vmm.devices.init(vmm.scenario, run.seed)
    session = await connect(
        address,
        run,
        connections(vmm.applied),
        io=vmm.io,
        limits=vmm.settings.limits(frame_bytes(vmm.scenario)),
        sockets=KERNEL_CHOICE if run.drivers else socket_settings(vmm.scenario),  # real devices have a real network
        tls=context,
    )
    try:
        return await _migrate(vmm, session)
    except (OSError, ProtoV3Error) as error:
        await session.send_failed(error)
        raise
    finally:
        await session.close()


async def _migrate(vmm: VmmProcess, session: Session) -> VmmReport:
    await session.receive_message(Prepared)  # it has its devices, and their memory
    zero_ns = time.perf_counter_ns() + HEAD_START_NS
    session.stage(vmm.settings.handshake_s)
    await session.send_message(Start(zero_ns=zero_ns + session.peer_clock.offset_ns))
    side = vmm.begin(zero_ns, session)
    async with session.waiting(f"the source's {vmm.devices.where}"):
        await vmm.devices.start(zero_ns)
    await session.receive_message(Started)
    await clock.sleep_ns(max(0, -clock.now_ns()))
    source: Source | None = None
    note, reason, kind, failures = "", "", None, []
    with vmm.migrating(session), _progress(vmm):
        try:
            async with side.bounded():
                source, note = await make_source(side, vmm.channels, vmm.applied)
            kind = await source.run()
            reason = source.reason
            note = "; ".join(filter(None, [note, source.note]))
        except GivenUpError as end:
            kind, reason = end.kind, str(end) if end.kind is OutcomeKind.DID_NOT_CONVERGE else ""
        except (OSError, ProtoV3Error, ExceptionGroup) as error:
            failures = [vmm.failure(each) for each in leaves(error)]
            if source is None or not source.handed_over:
                await _cancel(vmm)
    session.stage(vmm.settings.silent_s if failures else vmm.settings.after_stop_s)
    measured, peer = await vmm.measured(), await _peer_report(vmm, session, kind, failures)
    report = VmmReport(
        vmm.guest_runs,
        failures,
        measured=measured,
        digests=await vmm.digests(failures) if kind is OutcomeKind.COMPLETED else [],
        kind=kind,
        note=note,
        reason=reason,
        peer=peer,
        clock_uncertainty_ns=session.peer_clock.uncertainty_ns,
        sockets=session.sockets,
    )
    with contextlib.suppress(OSError, ProtoV3Error):
        await session.send_message(Bye())
    return report


async def _cancel(vmm: VmmProcess) -> None:
    """Send CANCEL, as this side failed. Source.run() sends it last of all, and not at all if its own devices cannot be
    reset. A second one does no harm."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(vmm.settings.silent_s):
            await vmm.channels[0].send_control(Kind.CANCEL)


async def _peer_report(
    vmm: VmmProcess, session: Session, kind: OutcomeKind | None, failures: list[Failure]
) -> VmmReport | None:
    """What the target reports; None if it cannot, or not in time. That is a failure if the guest is there now. A report
    that is malformed is one in any case."""
    try:
        report = (await session.receive_message(Result)).report
        return peer_report(report, vmm.scenario, vmm.time.now_ns(), vmm.devices.comparison)
    except (OSError, ProtoV3Error) as error:
        if kind is OutcomeKind.COMPLETED or isinstance(error, PeerProtocolError):
            failures.append(vmm.failure(error))
        return None


@contextlib.contextmanager
def _progress(vmm: VmmProcess) -> Iterator[None]:
    """Send the supervisor progress notes meanwhile, if the settings ask for them."""
    notes = asyncio.create_task(_send_progress(vmm)) if vmm.settings.progress else None
    try:
        yield
    finally:
        if notes is not None:
            notes.cancel()


async def _send_progress(vmm: VmmProcess) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        with contextlib.suppress(OSError):
            left_bytes, written_bytes = await vmm.devices.progress()
            note = ProgressNote(
                at_ns=vmm.time.now_ns(),
                phase=_phase(vmm.timeline),
                remaining_bytes=left_bytes,
                written_bytes=written_bytes,
                wire_bytes=sum(channel.bytes_sent for channel in vmm.channels),
                streams={stream.name: stream.counters.device_bytes for stream in vmm.devices.streams()},
            )
            send_note(vmm.supervisor, note)


def _phase(timeline: ProcessTimeline) -> str:
    marks = timeline.marks
    if Mark.DRAINED in marks:
        return "loading"
    if Mark.STOPPED in marks:
        return "stop-copy"
    return "stopping" if Mark.STOP_ORDERED in marks else "pre-copy"


# --- the target -------------------------------------------------------------------------------------------------------


async def run_target(vmm: VmmProcess, listener: socket.socket) -> VmmReport:
    """Accept one migration; returns what this side reports."""
    tls = vmm.settings.tls
    context: ssl.SSLContext | None = None if tls is None else tls_server(tls.cert, tls.key, tls.ca)

    refused: list[Exception] = []

    async def check(run: Run) -> Needed:
        try:
            vmm.prepare(run)
        except (ProtoV3Error, pydantic.ValidationError) as error:
            if isinstance(error, pydantic.ValidationError):
                first = error.errors()[0]
                what = first["msg"].removeprefix("Value error, ")  # of a check of the whole, which names its keys
                where = "".join(f"{part}." for part in first["loc"])[:-1]
                why = f"{where}: {what}" if where else what
                error = PeerProtocolError(clean(f"the offer's scenario is not valid: {why}"))
            refused.append(error)
            raise error from None
        return Needed(connections(vmm.applied), frame_bytes(vmm.scenario))

    def turned_away(why: str) -> None:
        send_note(vmm.supervisor, RejectedNote(why))
        if vmm.settings.once and refused:
            acceptor.give_up(refused[0])

    limits = vmm.settings.limits(MAX_FRAME_BYTES)
    async with accepting(listener, check, io=vmm.io, limits=limits, tls=context, rejected=turned_away) as acceptor:
        session = await acceptor.session()
        session.lost.add_done_callback(lambda _: acceptor.stop())
        try:
            vmm.prepare(session.run)
            send_note(vmm.supervisor, SessionNote(session.peer, vmm.run.protocol, vmm.scenario.name))
            return await _receive(vmm, session, acceptor.stop)
        except (OSError, ProtoV3Error) as error:
            await session.send_failed(error)
            raise
        finally:
            await session.close()


async def _receive(vmm: VmmProcess, session: Session, free: Callable[[], None]) -> VmmReport:
    """`free` is called before the source gets its last message: it may come again at once."""
    async with session.waiting(f"the target's {vmm.devices.where}"):
        await vmm.devices.init(vmm.scenario, vmm.run.seed)
    session.stage(vmm.settings.handshake_s)
    await session.send_message(Prepared())
    zero_ns = (await session.receive_message(Start)).zero_ns
    if abs(zero_ns - time.perf_counter_ns()) > 10_000_000_000:
        raise PeerProtocolError(f"time 0 is said to be at {zero_ns!r}, which is not about now")
    side = vmm.begin(zero_ns, session)
    async with session.waiting(f"the target's {vmm.devices.where}"):
        await vmm.devices.start(zero_ns)
    await session.send_message(Started())
    target: Target | None = None
    whole, failures = False, []
    with vmm.migrating(session):
        try:
            async with side.bounded():
                target = await make_target(side, vmm.channels, vmm.applied)
            if target is not None:
                whole = await target.run()
        except (OSError, ProtoV3Error, ExceptionGroup) as error:
            failures = [vmm.failure(each) for each in leaves(error)]
            if side.machine.running:
                _hang_up(session)
    session.stage(vmm.settings.after_stop_s)
    if not whole:
        session.trace(None)  # what the source still sends is of no interest
    drains = [] if whole else [asyncio.create_task(_drain(channel)) for channel in vmm.channels]
    measured = await vmm.measured()
    digests = await vmm.digests(failures) if whole else []
    report = VmmReport(vmm.guest_runs, failures, measured=measured, digests=digests, whole=whole)
    free()
    with contextlib.suppress(OSError, ProtoV3Error):
        await session.send_message(Result(report=to_plain(report)))
        await session.receive_message(Bye)
    for drain in drains:
        drain.cancel()
    return report


async def _drain(channel: Channel) -> None:
    """Receive and drop frames: the source sends CANCEL behind other frames, and waits for room for them."""
    with contextlib.suppress(OSError, ProtoV3Error):
        while True:
            await channel.recv()


def _hang_up(session: Session) -> None:
    """End the connections: this side failed with its guest running, so it sends neither FAILED nor RESUMED, and the
    source must not wait for them."""
    for channel in session.channels:
        if isinstance(channel, Connection):
            channel.end(ConnectionAbortedError("this side failed"))
