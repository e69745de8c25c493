"""The target's half of the handshake: it accepts connections, and accepts or refuses the source's offer."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from proto_v3.errors import PeerProtocolError
from sim.live.io import MakePipe
from sim.live.tcp.handshake import (
    MAX_CONNECTIONS,
    Handshake,
    Limits,
    answer_clock,
    boot_id,
    handshake,
    make_connections,
)
from sim.live.tcp.listener import Accepted, Acceptor
from sim.live.tcp.message_stream import MessageStream
from sim.live.tcp.messages import Accept, Begin, ClockRequest, Connected, Offer, Run
from sim.live.tcp.session import Session
from sim.live.tcp.sockets import TOKEN_BYTES

Judge = Callable[[Run], Awaitable[None]]
"""Decides about what the source wants to run: the error that it raises becomes the refusal."""


def _ignore(_: str) -> None:
    pass


async def accept(
    listener: socket.socket,
    judge: Judge,
    *,
    io: MakePipe,
    limits: Limits,
    tls: ssl.SSLContext | None = None,
    rejected: Callable[[str], None] = _ignore,
) -> Session:
    """Wait for a source, and set up a session with it.

    Connections that send nothing or rubbish do not end the wait; `rejected` is called with the reason for each. The
    first connection that begins as a session ends it, whether the handshake succeeds or not. Raises what `judge` raised
    (the source gets the text if it is an OSError or an error of this project), PeerProtocolError or PeerFailedError for
    what the source did, OSError if the source is gone or too slow, or if this host has no descriptors left. The
    listener stays open: to wait for another source, call this again.
    """
    async with AsyncExitStack() as opened:
        acceptor = Acceptor(listener, opened, io=io, tls=tls, limit_s=limits.handshake_s, rejected=rejected)
        async with acceptor:
            first_connection = await acceptor.session()
            stream = MessageStream(first_connection.pipe, "source", first_connection.name)
            async with handshake(limits.handshake_s, f"the offer of {stream.peer}") as progress:
                progress.stream = stream
                offer = await stream.expect(Offer)
                _check(offer, limits)
                progress.wait_for("this side's own judgement of the offer")
                await judge(offer.run)
                token = secrets.token_bytes(TOKEN_BYTES)
                acceptor.expect(offer.connections, token)
                await stream.send(Accept(boot_id=boot_id(), token=token))
                progress.waits_for = lambda: (
                    f"data connections {acceptor.missing()} of {offer.connections} of {stream.peer}"
                )
                found, first = await _collected(acceptor, stream, progress)
                clock = await answer_clock(stream, first)
        connections = make_connections([(each.pipe, each.granted) for each in found], False, offer.frame_bytes)
        session = Session(stream, connections, clock, limits.silent_s)
        opened.pop_all()
    return session


def _check(offer: Offer, limits: Limits) -> None:
    """PeerProtocolError if this side does not accept the offer."""
    if not 1 <= offer.connections <= MAX_CONNECTIONS:
        raise PeerProtocolError(f"{offer.connections} data connections are offered; 1 to {MAX_CONNECTIONS} are allowed")
    if not 1 <= offer.frame_bytes <= limits.frame_bytes:
        raise PeerProtocolError(
            f"frames of up to {offer.frame_bytes} bytes are offered; 1 to {limits.frame_bytes} are allowed here"
        )


async def _collected(
    acceptor: Acceptor, stream: MessageStream, progress: Handshake
) -> tuple[list[Accepted], ClockRequest | Begin]:
    """The data connections, and the source's first message after CONNECTED."""
    loop = asyncio.get_running_loop()
    collecting = loop.create_task(acceptor.data())
    # meanwhile, so that the source's end is noticed
    listening: asyncio.Task[ClockRequest | Begin] = loop.create_task(stream.expect(ClockRequest, Begin))
    try:
        await asyncio.wait({collecting, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            kind = (await listening).kind().upper()
            raise PeerProtocolError(f"the message {kind} came where data connections were due")
        found = await collecting
        await stream.send(Connected())
        progress.wait_for(f"the clock of {stream.peer}")
        return found, await listening
    finally:
        for task in (collecting, listening):
            task.cancel()
        await asyncio.wait({collecting, listening})
