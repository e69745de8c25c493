"""The source's half of the handshake: it opens every connection."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass

from proto_v3.errors import UserError, leaves
from sim.live.io import MakePipe, Pipe
from sim.live.tcp.handshake import (
    MAX_CONNECTIONS,
    Limits,
    boot_id,
    handshake,
    make_connections,
    measure_clock,
)
from sim.live.tcp.message_stream import MessageStream
from sim.live.tcp.messages import Accept, Connected, Offer, Run
from sim.live.tcp.session import Session
from sim.live.tcp.sockets import (
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

DIALS = 32
"""Data connections that are set up at the same time."""
KERNEL_CHOICE = SocketSettings()


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
    async with AsyncExitStack() as opened:
        dialler = _Dialler(address, opened, io, sockets, tls, limits.handshake_s)
        async with handshake(limits.handshake_s, f"a connection to {peer}") as progress:
            stream = progress.stream = MessageStream(await dialler.first(), "target", peer)
            progress.wait_for(f"the answer of {stream.peer} to the offer")
            accept = await _offered(stream, offer, tls)
            progress.wait_for(f"data connections to {peer}")
            found = await dialler.rest(connections, accept.token)
            progress.wait_for(f"{stream.peer} to have all data connections")
            await stream.expect(Connected)
            progress.wait_for(f"the clock of {stream.peer}")
            clock = await measure_clock(stream, same_host=bool(offer.boot_id) and offer.boot_id == accept.boot_id)
        session = Session(stream, make_connections(found, True, limits.frame_bytes), clock, limits.silent_s)
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
