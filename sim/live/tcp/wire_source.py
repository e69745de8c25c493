"""The source's half of the handshake: it opens every connection."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from proto_v3.errors import PeerFailedError, ProtoV3Error, UserError, leaves
from sim.live.io import Io, Pipe
from sim.live.tcp.handshake import (
    DEFAULT_LIMITS,
    DEFAULT_SOCKETS,
    MAX_CONNECTIONS,
    Accept,
    Agreed,
    Deadline,
    Limits,
    Offer,
    boot_id,
    made_connections,
    measure_clock,
)
from sim.live.tcp.messages import Talk
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
"""Data connections that are set up at a time."""


async def connect(
    address: Address,
    run: dict[str, Any],
    connections: int,
    *,
    io: Io,
    limits: Limits = DEFAULT_LIMITS,
    sockets: SocketSettings = DEFAULT_SOCKETS,
    tls: ssl.SSLContext | None = None,
) -> Session:
    """Set a session up, with so many data connections, with the target that listens at the address.

    `run` is for the target's judge: what msgpack can carry, below 1 MiB. Raises UserError for an argument that makes no
    sense, PeerFailedError if the target refuses, PeerProtocolError if it does not speak this protocol, OSError if it
    cannot be reached, is gone, or is too slow.
    """
    if not 1 <= connections <= MAX_CONNECTIONS:
        raise UserError(f"{connections} data connections; there must be from 1 to {MAX_CONNECTIONS}")
    offer = Offer(limits.frame_bytes, connections, boot_id(), run)
    async with AsyncExitStack() as opened:
        dialler = _Dialler(address, opened, io, sockets, tls, limits.handshake_s)
        session = await _session(dialler, offer, limits)
        opened.pop_all()
    return session


async def _session(dialler: _Dialler, offer: Offer, limits: Limits) -> Session:
    peer = text_of(dialler.address)
    deadline = Deadline(limits.handshake_s, f"a connection to {peer}")
    async with deadline:
        pipe = await dialler.first()
    talk = Talk(pipe, "target", peer)
    try:
        async with deadline:
            deadline.on(f"the answer of {talk.peer} to the offer")
            await talk.send("offer", **offer.fields())
            try:
                accept = Accept.of(await talk.expect("accept"), offer)
            except ConnectionError as error:
                hint = "" if dialler.tls is None else "; perhaps it does not trust this side's certificate"
                raise ConnectionResetError(f"{error}{hint}") from error
            deadline.on(f"data connections to {peer}")
            found = await dialler.rest(offer.connections, accept.token)
            deadline.on(f"{talk.peer} to have all data connections")
            await talk.expect("ready")
            deadline.on(f"the clock of {talk.peer}")
            same_host = bool(offer.boot_id) and offer.boot_id == accept.boot_id
            offset_ns, uncertainty_ns = await measure_clock(talk, same_host)
    except PeerFailedError:
        raise
    except (ProtoV3Error, OSError) as error:
        await talk.refuse(str(error))
        raise
    agreed = Agreed(offer.run, accept.answer, offer.frame_bytes, offset_ns, uncertainty_ns)
    return Session(talk, made_connections(found, True, offer.frame_bytes), agreed, limits.silent_s)


@dataclass(slots=True)
class _Dialler:
    """Opens connections, each with its preamble."""

    address: Address
    opened: AsyncExitStack
    io: Io
    sockets: SocketSettings
    tls: ssl.SSLContext | None
    limit_s: float
    to: Resolved | None = None
    """Which of the host's addresses answered."""

    async def first(self) -> Pipe:
        """The session's; it has the kernel's own settings."""
        error: OSError = OSError(f"{text_of(self.address)}: no such address")
        for to in await resolved(self.address):
            try:
                pipe, _ = await self._dial(to, Preamble(Role.SESSION), DEFAULT_SOCKETS)
            except OSError as why:
                error = why
            else:
                self.to = to
                return pipe
        raise named(text_of(self.address), error) from error

    async def rest(self, count: int, token: bytes) -> list[tuple[Pipe, Granted]]:
        """The data connections, some at a time."""
        found: dict[int, tuple[Pipe, Granted]] = {}
        left = iter(range(count))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(count, DIALS)):
                    group.create_task(self._some(left, token, found))
        except BaseExceptionGroup as group_error:
            raise next(leaves(group_error)) from None
        return [found[index] for index in range(count)]

    async def _some(self, left: Iterator[int], token: bytes, found: dict[int, tuple[Pipe, Granted]]) -> None:
        for index in left:
            if self.to is not None:
                found[index] = await self._dial(self.to, Preamble(Role.DATA, index, token), self.sockets)

    async def _dial(self, to: Resolved, preamble: Preamble, sockets: SocketSettings) -> tuple[Pipe, Granted]:
        sock = await dialled(to, sockets)
        granted = Granted.of(sock)
        pipe: Pipe
        if self.tls is not None:
            pipe = await TlsPipe.client(sock, self.tls, self.address[0], self.limit_s)
        else:
            pipe = self.io.pipe(sock, preamble.role.name.lower())
        self.opened.push_async_callback(finish, pipe)
        await pipe.send_all([memoryview(preamble.pack())])
        return pipe, granted
