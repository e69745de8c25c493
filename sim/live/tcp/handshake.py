# SPDX-License-Identifier: GPL-2.0-or-later
"""How the two sides agree, in messages of the session.

    source                                              target
    OFFER {frame_bytes, connections, boot_id, run} ->
                                                        <- ACCEPT {boot_id, token}, or REFUSE {why}
    data connections, each with the token ->
                                                        <- CONNECTED, when all are there
    CLOCKREQUEST -> ... some times                      <- CLOCKREPLY {at_ns} ...
    BEGIN {offset_ns, uncertainty_ns} ->

Each side has a deadline for all of it. Who gives up sends the reason in a REFUSE, if the other side still listens. The
target hears several sources at once. The first one whose BEGIN comes gets the session, the others a REFUSE.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error, UserError, leaves
from sim.live.buffers import Buffers
from sim.live.io import MakePipe, Pipe
from sim.live.tcp.connection import Connection
from sim.live.tcp.deadline import Deadline, Waited
from sim.live.tcp.listener import Accepted, Acceptor, Caller
from sim.live.tcp.messages import (
    MAX_BOOT_ID_CHARS,
    Accept,
    Begin,
    ClockReply,
    ClockRequest,
    Connected,
    MessageStream,
    Offer,
    Run,
)
from sim.live.tcp.session import ClockOffset, Session
from sim.live.tcp.sockets import (
    TOKEN_BYTES,
    Address,
    Granted,
    Preamble,
    Resolved,
    Role,
    SocketSettings,
    dialled,
    finish,
    named,
    resolved,
    text_of,
)
from sim.live.tcp.tls import TlsPipe

CLOCK_REQUESTS = 20
MAX_CLOCK_REQUESTS = 1000
MAX_CONNECTIONS = 1024
MAX_FRAME_BYTES = 1 << 30
FREE_BYTES = 256 << 20
"""A session keeps at most this much in free buffers."""
DIALS = 32
"""Data connections that are set up at the same time."""
KERNEL_CHOICE = SocketSettings()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side accepts. UserError if a value makes no sense."""

    handshake_s: float = 10.0
    """For all of the handshake, from its first connection on."""
    silent_s: float = 10.0
    """A peer that was silent for that long is given up."""
    frame_bytes: int = 1 << 20
    """The largest payload of a frame, either way: the source's value is used if it is not above the target's."""

    def __post_init__(self) -> None:
        for name in ("handshake_s", "silent_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {getattr(self, name)} must be above 0")
        if not 1 <= self.frame_bytes <= MAX_FRAME_BYTES:
            raise UserError(f"frame_bytes = {self.frame_bytes} must be from 1 to {MAX_FRAME_BYTES}")


@dataclass(slots=True)
class Handshake:
    """How far a handshake is."""

    waits_for: Waited
    """What is waited for now."""
    stream: MessageStream | None = None
    """To the other side, once there is one."""

    def waited(self) -> str:
        """What is waited for now, in words."""
        return self.waits_for if isinstance(self.waits_for, str) else self.waits_for()


@asynccontextmanager
async def handshake(deadline: Deadline, waits_for: str) -> AsyncIterator[Handshake]:
    """Bound a handshake. If it fails here, the other side is sent the reason."""
    progress = Handshake(waits_for)
    try:
        async with deadline.waiting(progress.waited):
            yield progress
    except PeerFailedError:
        raise
    except Exception as error:
        ours = isinstance(error, (ProtoV3Error, OSError))
        if progress.stream is not None:
            await progress.stream.refuse(str(error) if ours else "an error of its own")
        raise


def begun(
    stream: MessageStream,
    connections: list[Connection],
    clock: ClockOffset,
    limits: Limits,
    run: Run,
    deadline: Deadline,
) -> Session:
    """The session that a handshake ends in. Its first stage may take as long as the handshake."""
    session = Session(stream, connections, clock, limits.silent_s, run, deadline)
    session.stage(limits.handshake_s)
    return session


def boot_id() -> str:
    """Equal on two sides that run on one host, or on a copy of one. Empty where there is no Linux to say it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:MAX_BOOT_ID_CHARS]
    except OSError:
        return ""


# --- the clocks -------------------------------------------------------------------------------------------------------


async def measure_clock(stream: MessageStream, same_host: bool) -> ClockOffset:
    """At the source: compare the clocks by some round trips, and use the shortest.

    The target read its clock at some time within the round trip, so half of it bounds the error. On one host both
    sides have the same clock, and the offset is 0, unless a round trip contradicts that (a virtual machine that was
    copied with its boot_id, or a container with a clock of its own).
    """
    shortest_ns, offset_ns = 2**63, 0
    for _ in range(CLOCK_REQUESTS):
        before = time.perf_counter_ns()
        await stream.send(ClockRequest())
        reply = await stream.expect(ClockReply)
        after = time.perf_counter_ns()
        if after - before < shortest_ns:
            shortest_ns, offset_ns = after - before, reply.at_ns - (before + after) // 2
    uncertainty_ns = shortest_ns // 2 + 1
    if same_host and abs(offset_ns) <= uncertainty_ns:
        offset_ns = uncertainty_ns = 0
    await stream.send(Begin(offset_ns=offset_ns, uncertainty_ns=uncertainty_ns))
    return ClockOffset(offset_ns, uncertainty_ns)


async def answer_clock(stream: MessageStream, first: ClockRequest | Begin) -> ClockOffset:
    """At the target: the same, as seen from here. `first` is the source's first message after CONNECTED."""
    message: ClockRequest | Begin = first
    for _ in range(MAX_CLOCK_REQUESTS):
        if isinstance(message, Begin):
            return ClockOffset(-message.offset_ns, message.uncertainty_ns)
        await stream.send(ClockReply(at_ns=time.perf_counter_ns()))
        message = await stream.expect(ClockRequest, Begin)
    raise PeerProtocolError(f"more than {MAX_CLOCK_REQUESTS} CLOCKREQUESTs came, and no BEGIN")


# --- connections ------------------------------------------------------------------------------------------------------


def make_connections(found: Sequence[tuple[Pipe, Granted]], at_source: bool, frame_bytes: int) -> list[Connection]:
    """The session's data connections; they share a pool of buffers."""
    pool = Buffers(frame_bytes, keep=min(len(found) + 2, FREE_BYTES // frame_bytes))
    return [Connection(pipe, index, at_source, granted, pool) for index, (pipe, granted) in enumerate(found)]


# --- the source: it opens every connection ----------------------------------------------------------------------------


async def connect(
    address: Address,
    run: Run,
    connections: int,
    *,
    io: MakePipe,
    limits: Limits,
    sockets: SocketSettings = KERNEL_CHOICE,
    tls: ssl.SSLContext | None = None,
) -> Session:
    """Set up a session, with this many data connections, with the target that listens at the address.

    The target is asked whether it takes part in `run`. Raises UserError for an argument that makes no sense,
    PeerFailedError if the target refuses, PeerProtocolError if it does not speak this protocol, OSError if it cannot be
    reached, is gone, or is too slow.
    """
    if not 1 <= connections <= MAX_CONNECTIONS:
        raise UserError(f"{connections} data connections; there must be from 1 to {MAX_CONNECTIONS}")
    offer = Offer(limits.frame_bytes, connections, boot_id(), run)
    peer = text_of(address)
    deadline = Deadline(limits.handshake_s)
    async with AsyncExitStack() as opened:
        dialler = _Dialler(address, opened, io, sockets, tls, limits.handshake_s)
        async with handshake(deadline, f"a connection to {peer}") as progress:
            stream = progress.stream = MessageStream(await dialler.first(), "target", peer)
            progress.waits_for = f"the answer of {stream.peer} to the offer"
            accept = await _offered(stream, offer, tls)
            progress.waits_for = f"data connections to {peer}"
            found = await dialler.rest(connections, accept.token)
            progress.waits_for = f"{stream.peer} to have all data connections"
            await stream.expect(Connected)
            progress.waits_for = f"the clock of {stream.peer}"
            clock = await measure_clock(stream, same_host=bool(offer.boot_id) and offer.boot_id == accept.boot_id)
        session = begun(stream, make_connections(found, True, limits.frame_bytes), clock, limits, run, deadline)
        opened.pop_all()
    return session


async def _offered(stream: MessageStream, offer: Offer, tls: ssl.SSLContext | None) -> Accept:
    try:
        await stream.send(offer)
        return await stream.expect(Accept)
    except ConnectionError as error:
        hint = "" if tls is None else "; perhaps it does not trust this side's certificate"
        raise ConnectionResetError(f"{error}{hint}") from error


@dataclass(slots=True)
class _Dialler:
    """Opens connections, each with its preamble."""

    address: Address
    opened: AsyncExitStack
    io: MakePipe
    sockets: SocketSettings
    tls: ssl.SSLContext | None
    limit_s: float
    to: Resolved | None = None
    """Which of the host's addresses answered."""

    async def first(self) -> Pipe:
        """The session's connection, with the kernel's own options."""
        error: OSError = OSError(f"{text_of(self.address)}: no such address")
        for to in await resolved(self.address):
            try:
                pipe, _ = await self._dial(to, Preamble(Role.SESSION), KERNEL_CHOICE)
            except OSError as why:
                error = why
            else:
                self.to = to
                return pipe
        raise named(text_of(self.address), error) from error

    async def rest(self, count: int, token: bytes) -> list[tuple[Pipe, Granted]]:
        """The data connections, at most DIALS at the same time."""
        places = asyncio.Semaphore(DIALS)

        async def dial(index: int) -> tuple[Pipe, Granted]:
            async with places:
                assert self.to is not None
                return await self._dial(self.to, Preamble(Role.DATA, index, token), self.sockets)

        try:
            async with asyncio.TaskGroup() as group:
                dialled = [group.create_task(dial(index)) for index in range(count)]
        except BaseExceptionGroup as group_error:
            raise next(leaves(group_error)) from None
        return [each.result() for each in dialled]

    async def _dial(self, to: Resolved, preamble: Preamble, sockets: SocketSettings) -> tuple[Pipe, Granted]:
        sock = await dialled(to, sockets)
        granted = Granted.of(sock)
        pipe: Pipe
        if self.tls is not None:
            pipe = await TlsPipe.client(sock, self.tls, self.address[0], self.limit_s)
        else:
            pipe = self.io(sock, preamble.role.name.lower())
        self.opened.push_async_callback(finish, pipe)
        await pipe.send_all([memoryview(preamble.pack())])
        return pipe, granted


# --- the target: it accepts connections, and accepts or refuses the offer ---------------------------------------------


@dataclass(frozen=True, slots=True)
class Needed:
    """What a run needs of the session."""

    connections: int
    """So many data connections, no more and no fewer."""
    frame_bytes: int
    """Frames with at the most this payload."""


Judge = Callable[[Run], Awaitable[Needed | None]]
"""Decides about what a source wants to run. Returns what that needs; None: whatever is offered."""


@asynccontextmanager
async def accepting(
    listener: socket.socket,
    judge: Judge,
    *,
    io: MakePipe,
    limits: Limits,
    tls: ssl.SSLContext | None = None,
    rejected: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Acceptor[Session]]:
    """Accept sources meanwhile; the first one whose handshake succeeds is the acceptor's session().

    Whoever fails before is turned away, and `rejected` is called with the reason: strangers that send nothing or
    rubbish, and sources whose offer is refused. An error that `judge` raises becomes the refusal. (The source gets the
    text if it is an OSError or an error of this project; any other error is raised by session().) Once the session is
    there, other sources get the answer that another one is being served, until the end, or until stop() is called.
    """

    async def meet(caller: Caller, connection: Accepted) -> Callable[[], Session]:
        stream = MessageStream(connection.pipe, "source", connection.name)
        async with handshake(caller.deadline, f"the offer of {stream.peer}") as progress:
            progress.stream = stream
            offer = await stream.expect(Offer)
            _check(offer, limits)
            progress.waits_for = "this side's own judgement of the offer"
            _check_needed(offer, await judge(offer.run))
            token = secrets.token_bytes(TOKEN_BYTES)
            caller.expect(offer.connections, token)
            await stream.send(Accept(boot_id=boot_id(), token=token))
            progress.waits_for = lambda: f"data connections {caller.missing()} of {offer.connections} of {stream.peer}"
            found, first = await _collected(caller, stream, progress)
            clock = await answer_clock(stream, first)
            acceptor.take_place(caller)

        def begin() -> Session:
            connections = make_connections([(each.pipe, each.granted) for each in found], False, offer.frame_bytes)
            return begun(stream, connections, clock, limits, offer.run, caller.deadline)

        return begin

    acceptor = Acceptor(listener, meet, io=io, tls=tls, limit_s=limits.handshake_s, rejected=rejected)
    async with acceptor.accepting():
        yield acceptor


async def accept(listener: socket.socket, judge: Judge, **settings: Any) -> Session:
    """Wait for a source, and set up a session with it; the arguments are those of accepting().

    Raises OSError if this host has no descriptors left. The listener stays open: to wait for another source, call this
    again.
    """
    async with accepting(listener, judge, **settings) as acceptor:
        return await acceptor.session()


def _check(offer: Offer, limits: Limits) -> None:
    """PeerProtocolError if this side does not accept the offer."""
    if not 1 <= offer.connections <= MAX_CONNECTIONS:
        raise PeerProtocolError(f"{offer.connections} data connections are offered; 1 to {MAX_CONNECTIONS} are allowed")
    if not 1 <= offer.frame_bytes <= limits.frame_bytes:
        raise PeerProtocolError(
            f"frames of up to {offer.frame_bytes} bytes are offered; 1 to {limits.frame_bytes} are allowed here"
        )


def _check_needed(offer: Offer, needed: Needed | None) -> None:
    """PeerProtocolError if the offer does not fit what is offered to be run: this side counts on it (memory)."""
    if needed is not None and offer.connections != needed.connections:
        raise PeerProtocolError(
            f"{offer.connections} data connections are offered; {offer.run.protocol} takes {needed.connections} with "
            "this scenario"
        )
    if needed is not None and offer.frame_bytes > needed.frame_bytes:
        raise PeerProtocolError(
            f"frames of up to {offer.frame_bytes} bytes are offered; with this scenario they have at the most "
            f"{needed.frame_bytes}"
        )


async def _collected(
    caller: Caller, stream: MessageStream, progress: Handshake
) -> tuple[list[Accepted], ClockRequest | Begin]:
    """The data connections, and the source's first message after CONNECTED."""
    loop = asyncio.get_running_loop()
    collecting = loop.create_task(caller.collect())
    # meanwhile, so that the source's end is noticed
    listening: asyncio.Task[ClockRequest | Begin] = loop.create_task(stream.expect(ClockRequest, Begin))
    try:
        await asyncio.wait({collecting, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            kind = (await listening).kind().upper()
            raise PeerProtocolError(f"the message {kind} came where data connections were due")
        found = await collecting
        await stream.send(Connected())
        progress.waits_for = f"the clock of {stream.peer}"
        return found, await listening
    finally:
        for task in (collecting, listening):
            task.cancel()
        await asyncio.wait({collecting, listening})
