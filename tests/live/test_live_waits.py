# SPDX-License-Identifier: GPL-2.0-or-later
"""A peer that stops at any step of the protocol, and goes on sending PINGs, or does not: both sides end, each says what
it waited for, no guest runs twice, and the next source is served.

Source and target are whole, each in a thread. Between them is one that carries their session up to the step.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import pytest

from proto_v3.vmm.migration import OutcomeKind
from proto_v3.wire.frames import Kind
from sim.live.fd.calls import Calls, Reply
from sim.live.plain import from_plain
from sim.live.processes.children import RESULT, send_report
from sim.live.processes.device_process import DeviceProcess
from sim.live.processes.remote_backend import RemoteBackend
from sim.live.processes.report import Note, RejectedNote, VmmReport, received_note
from sim.live.processes.settings import Settings
from sim.live.processes.vmm import VmmProcess, run_source, run_target
from sim.live.tcp.connection import HEAD
from sim.live.tcp.listener import BUSY
from sim.live.tcp.messages import Run
from sim.live.tcp.sockets import Preamble, Role, listen
from tests.build.live import live_scenario
from tests.build.wires import message

HANG_S = 120.0
"""Whoever takes longer never ends: not a bound on how long it may take."""


# --- the two sides ----------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """What a VMM reported, and the notes that it sent before."""

    report: VmmReport
    notes: list[Note]

    @property
    def words(self) -> str:
        told = [*(failure.text for failure in self.report.failures), self.report.reason]
        return "; ".join([*filter(None, told), *(note.why for note in self.notes if isinstance(note, RejectedNote))])


async def side(
    name: str,
    settings: Settings,
    migrate: Callable[..., Awaitable[VmmReport]],
    *args: Any,
    device: type[DeviceProcess] = DeviceProcess,
) -> Ended:
    """A VMM and its device process, in this thread, to their ends."""
    (vmm_end, device_end), (ours, theirs) = socket.socketpair(), socket.socketpair()
    reports: asyncio.Queue[VmmReport] = asyncio.Queue()
    notes: list[Note] = []

    async def heard(kind: str, body: dict[str, Any]) -> Reply:
        if kind == RESULT:
            reports.put_nowait(from_plain(VmmReport, body))
        else:
            notes.append(received_note(kind, body))
        return Reply()

    lifeline = Calls(ours, "VMM", heard)
    serving = asyncio.create_task(device(name).serve(device_end))
    devices = RemoteBackend(Calls(vmm_end, "device process"), name, settings.io)
    vmm = VmmProcess(name, settings, devices, Calls(theirs, "supervisor"))
    try:
        await send_report(vmm, migrate(vmm, *args))
        return Ended(await reports.get(), notes)
    finally:
        devices.release()
        for calls in (vmm.supervisor, lifeline):
            calls.close()
        await serving


def start(pool: Executor, *args: Any, **more: Any) -> asyncio.Future[Ended]:
    """A side, in a thread of its own: the clock of the model is the thread's."""
    return asyncio.get_running_loop().run_in_executor(pool, lambda: asyncio.run(side(*args, **more)))


# --- the one between them ---------------------------------------------------------------------------------------------

Address = tuple[str, int]


async def next_message(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The kind of the session's next message, and its bytes."""
    head = await reader.readexactly(4)
    body = await reader.readexactly(int.from_bytes(head, "big"))
    return msgpack.unpackb(body)["kind"], head + body


async def next_frame(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The same of a data connection's next frame."""
    head = await reader.readexactly(HEAD.size)
    _, header_bytes, payload_bytes, header = HEAD.unpack(head)
    payload = await reader.readexactly(payload_bytes)
    return Kind(msgpack.unpackb(header[:header_bytes])[0]).name, head + payload


@dataclass
class Between:
    """Carries what both sides send, up to one step, as `source start` or `target LOADED`. From there on all is lost.

    From then on each side gets a PING from time to time if `pings_s` is set, and does not learn that the other one
    closed a connection.
    """

    step: str
    target: Address
    pings_s: float | None
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    carrying: list[asyncio.Task[None]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection of the source's."""
        task = asyncio.current_task()
        assert task is not None
        self.carrying.append(task)
        there, here = await asyncio.open_connection(*self.target)
        with contextlib.suppress(OSError, EOFError):
            preamble = await reader.readexactly(32)
            here.write(preamble)
            is_session = Preamble.of(preamble).role == Role.SESSION
            after = next_message if is_session else next_frame
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry("source", reader, here, after))
                group.create_task(self._carry("target", there, writer, after))
                if is_session and self.pings_s is not None:
                    group.create_task(self._ping(writer, here))

    async def _carry(self, side: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, after: Any) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                name, data = await after(reader)
                if f"{side} {name}" == self.step:
                    self.reached.set()
                if not self.reached.is_set():
                    writer.write(data)
                    await writer.drain()
        if self.reached.is_set():
            await self.over.wait()
        writer.close()

    async def _ping(self, *writers: asyncio.StreamWriter) -> None:
        await self.reached.wait()
        while not self.over.is_set():
            for writer in writers:
                if not writer.is_closing():
                    writer.write(message("ping"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.pings_s):
                    await self.over.wait()


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A step at which the peer stops, and what comes of it."""

    protocol: str
    step: str
    source: str
    """In the source's words."""
    target: str
    """In the target's words; nothing if all was well for it."""
    guest: str = "source"
    """Where it runs."""
    kind: OutcomeKind | None = None
    """Of the source."""


LOST = "the target may run the guest, but did not say so (waited for the end of the migration"
NO_DATA = "waited for the source's data: not there within"
CASES = [
    Case("v2", "target accept", "waited for the answer of the target at", "waited for data"),
    Case("v2", "target connected", "to have all data connections: not there", "waited for the clock of the source"),
    Case("v2", "source begin", "waited for PREPARED of the target", "waited for the clock of the source"),
    Case("v2", "target prepared", "waited for PREPARED of the target", "waited for START of the source"),
    Case("v2", "source start", "waited for STARTED of the target", "waited for START of"),
    Case("v2", "target started", "waited for STARTED of the target", NO_DATA),
    Case("v2", "source RAM", LOST, NO_DATA, ""),
    Case("v2", "source END", LOST, NO_DATA, ""),
    Case("v2", "target RESUMED", LOST, "", "target"),
    Case("v2", "target result", "waited for RESULT of", "", "target", OutcomeKind.COMPLETED),
    Case("v2", "source bye", "", "", "target", OutcomeKind.COMPLETED),
    Case("v2-multifd", "source SYNC", LOST, NO_DATA, ""),
    Case("v2-multifd", "source PACKET", LOST, NO_DATA, ""),
    Case("v2-multifd", "target RESUMED", LOST, "", "target"),
    Case("v3-n2", "source HELLO", "did not answer HELLO", NO_DATA, kind=OutcomeKind.DID_NOT_CONVERGE),
    Case("v3-n2", "target HELLO", "did not answer HELLO", NO_DATA, kind=OutcomeKind.DID_NOT_CONVERGE),
    Case("v3-n2", "source EPOCH_SENT", "(epoch 1) was not loaded", NO_DATA, kind=OutcomeKind.DID_NOT_CONVERGE),
    Case("v3-n2", "target LOADED", "waited for the end of the migration", NO_DATA),
    Case("v3-n2", "source COMMIT", LOST, NO_DATA, ""),
    Case("v3-n2", "target RESUMED", LOST, "", "target"),
]
HANDSHAKE = ("target accept", "target connected", "source begin")
"""The target turns the source away, and waits for the next."""
SILENT = ("target accept", "target prepared", "source start", "target started", "target HELLO", "source COMMIT")
"""Steps after which silence has one outcome, whenever it is noticed."""
PATIENT = Settings(loop="asyncio")
AT_ONCE = 6
"""Cases that run beside each other: they wait, most of the time."""


async def meet(case: Case, pings: bool, limit_s: float, pool: Executor) -> tuple[Ended, Ended] | None:
    """How source and target ended, after the next source at the same listener was served. None if the step was never
    reached, or the migration was given up before: this machine is too slow for the limit."""
    silent_s = 2 * limit_s if pings else limit_s / 2
    short = Settings(handshake_s=limit_s, after_stop_s=limit_s, silent_s=silent_s, loop="asyncio")
    in_handshake = case.step in HANDSHAKE
    run = Run(live_scenario({"vmm.give_up_s": limit_s}).to_json(), case.protocol, 1)
    with listen(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        between = Between(case.step, address, limit_s / 8 if pings and not in_handshake else None)
        async with await asyncio.start_server(between.serve, "127.0.0.1", 0) as server:
            settings = replace(PATIENT, handshake_s=limit_s) if in_handshake else short
            target = start(pool, "target", settings, run_target, listener)
            source = await start(pool, "source", short, run_source, run, server.sockets[0].getsockname())
            reached = between.reached.is_set()
            next_run = Run(live_scenario().to_json(), case.protocol, 2)
            if reached and not in_handshake:
                await target
                again = start(pool, "target", PATIENT, run_target, listener)
                after = await start(pool, "source", PATIENT, run_source, next_run, address)
                assert (await again).report.whole
                assert after.report.kind is OutcomeKind.COMPLETED, after.words
            served = target.done()
            while not served:  # it waits for the next one; or, where the step was not reached, may have the first still
                settings = PATIENT if in_handshake else replace(PATIENT, handshake_s=limit_s)
                after = await start(pool, "source", settings, run_source, next_run, address)
                served = after.report.kind is OutcomeKind.COMPLETED or target.done()
            assert (await target).report.whole or not in_handshake
            between.over.set()
            between.reached.set()  # where it never was, the PINGs still wait for it
            await asyncio.gather(*between.carrying)
    in_time = case.guest != "target" or (await target).report.guest_runs
    return (source, await target) if reached and in_time else None


async def table(cases: Sequence[Case], pings: bool) -> list[tuple[Ended, Ended]]:
    """How both sides ended in each case."""
    places = asyncio.Semaphore(AT_ONCE)
    with ThreadPoolExecutor(4 * AT_ONCE) as pool:

        async def one(case: Case) -> tuple[Ended, Ended]:
            limit_s = 0.5
            async with places:
                while (found := await meet(case, pings, limit_s, pool)) is None:
                    limit_s *= 2
            return found

        async with asyncio.timeout(HANG_S):
            return await asyncio.gather(*map(one, cases))


@pytest.mark.parametrize("peer", ["PINGs", "silence"])
def test_a_peer_that_stops_ends_the_session_of_the_other_side(peer: str) -> None:
    cases = [case for case in CASES if peer == "PINGs" or case.step in SILENT]
    for case, (source, target) in zip(cases, asyncio.run(table(cases, peer == "PINGs")), strict=True):
        told = f"{case}\n{source.words}\n{target.words}"
        assert source.report.kind is case.kind or (peer == "silence" and source.report.kind is None), told
        handed_over = target.report.guest_runs and case.step not in HANDSHAKE  # there the next source's guest runs
        assert (source.report.guest_runs, handed_over) == (case.guest == "source", case.guest == "target"), told
        for ended, due in ((source, case.source), (target, case.target)):
            also = {"PINGs": [], "silence": ["the other side sent nothing for"]}[peer]
            also += [BUSY] if case.step in HANDSHAKE else []  # the next source may be through before its time is over
            assert any(words in ended.words for words in (due, *also)), told
            assert due or not ended.report.failures, told


def test_while_one_source_is_served_another_is_told_so_at_once_and_served_afterwards() -> None:
    """The first one stops, and sends PINGs; the place is its own until its time is over."""

    async def main() -> None:
        settings = Settings(handshake_s=1.0, loop="asyncio")
        run = Run(live_scenario().to_json(), "v2", 1)
        with listen(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(3) as pool:
            address = listener.getsockname()
            between = Between("source start", address, 0.1)
            async with await asyncio.start_server(between.serve, "127.0.0.1", 0) as server:
                target = start(pool, "target", settings, run_target, listener)
                first = start(pool, "source", settings, run_source, run, server.sockets[0].getsockname())
                await between.reached.wait()
                other = await start(pool, "source", PATIENT, run_source, run, address)
                assert f"refuses: {BUSY}" in other.words
                assert not first.done()
                between.over.set()
                await asyncio.gather(first, target, *between.carrying)

    asyncio.run(main())


class NeverStops(DeviceProcess):
    """Its guest does not answer the order to stop."""

    async def _do_guest(self, what: str) -> Reply:
        if what == "stop":
            await asyncio.Event().wait()
        return await super()._do_guest(what)


def test_a_call_that_does_not_return_ends_with_the_session_and_the_guest_runs_on() -> None:
    async def main() -> tuple[Ended, Ended]:
        settings = Settings(after_stop_s=0.5, loop="asyncio")
        run = Run(live_scenario({"vmm.give_up_s": 0.5}).to_json(), "v3-n2", 1)
        with listen(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as pool:
            target = start(pool, "target", PATIENT, run_target, listener)
            source = start(pool, "source", settings, run_source, run, listener.getsockname(), device=NeverStops)
            return await source, await target

    source, target = asyncio.run(main())
    assert "waited for the end of the migration, in stopping: not there within 1 s" in source.words
    assert source.report.guest_runs
    assert not target.report.guest_runs
