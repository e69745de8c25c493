"""The target's half of the handshake: it takes connections in, and says whether it does what is asked for."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error
from sim.live.io import Io
from sim.live.tcp.handshake import (
    DEFAULT_LIMITS,
    DEFAULT_SOCKETS,
    Accept,
    Agreed,
    Deadline,
    Limits,
    Offer,
    answer_clock,
    boot_id,
    made_connections,
)
from sim.live.tcp.listener import Caller, Door
from sim.live.tcp.messages import Message, Talk
from sim.live.tcp.session import Session
from sim.live.tcp.sockets import TOKEN_BYTES, SocketSettings

Judge = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
"""Given the source's `run`: returns what is told in ACCEPT, or raises what becomes the refusal."""


def _nobody(_: str) -> None:
    """Who is told of rejected connections if the caller does not want to be."""


async def accept(
    listener: socket.socket,
    judge: Judge,
    *,
    io: Io,
    limits: Limits = DEFAULT_LIMITS,
    sockets: SocketSettings = DEFAULT_SOCKETS,
    tls: ssl.SSLContext | None = None,
    rejected: Callable[[str], None] = _nobody,
) -> Session:
    """Wait for a source, and set a session up with it.

    Connections that say nothing or rubbish do not end the wait; `rejected` is told of each. The first one that begins
    as a session does, however the handshake goes on. Raises what `judge` raised, having told it to the source if it is
    an OSError or an error of ours; PeerProtocolError or PeerFailedError for what the source did, OSError if it is gone
    or too slow, or if this host has no descriptors left. The listener stays open; to try again, call this again.
    """
    async with AsyncExitStack() as opened:
        door = Door(listener, opened, io=io, sockets=sockets, tls=tls, limit_s=limits.handshake_s, rejected=rejected)
        async with door:
            talk, agreed, found = await _agreed(door, await door.session(), judge, limits)
        connections = made_connections([(each.pipe, each.granted) for each in found], False, agreed.frame_bytes)
        session = Session(talk, connections, agreed, limits.silent_s)
        opened.pop_all()
    return session


async def _agreed(door: Door, caller: Caller, judge: Judge, limits: Limits) -> tuple[Talk, Agreed, list[Caller]]:
    talk = Talk(caller.pipe, "source", caller.name)
    deadline = Deadline(limits.handshake_s, f"the offer of {talk.peer}")
    try:
        async with deadline:
            offer = Offer.of(await talk.expect("offer"))
            if objection := offer.objection(limits):
                raise PeerProtocolError(objection)
            deadline.on("this side's own judgement of the offer")
            answer = await judge(offer.run) or {}
            accept = Accept(offer.frame_bytes, boot_id(), secrets.token_bytes(TOKEN_BYTES), answer)
            door.expect(offer.connections, accept.token)
            await talk.send("accept", **accept.fields())
            deadline.waits_for = lambda: f"data connections {door.missing()} of {offer.connections} of {talk.peer}"
            found, first = await _collected(door, talk, deadline)
            offset_ns, uncertainty_ns = await answer_clock(talk, first)
    except PeerFailedError:
        raise
    except Exception as error:
        ours = isinstance(error, (ProtoV3Error, OSError))
        await talk.refuse(str(error) if ours else "an error of its own")
        raise
    return talk, Agreed(offer.run, answer, offer.frame_bytes, offset_ns, uncertainty_ns), found


async def _collected(door: Door, talk: Talk, deadline: Deadline) -> tuple[list[Caller], Message]:
    """The data connections, and the source's first message after it was told that they are there."""
    loop = asyncio.get_running_loop()
    collecting = loop.create_task(door.data())
    listening = loop.create_task(talk.expect("clock", "begin"))  # meanwhile, so that the source's end is noticed
    try:
        await asyncio.wait({collecting, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            kind = (await listening)["kind"]
            raise PeerProtocolError(f"{kind.upper()} came where data connections were due")
        found = await collecting
        await talk.send("ready")
        deadline.on(f"the clock of {talk.peer}")
        return found, await listening
    finally:
        for task in (collecting, listening):
            task.cancel()
        await asyncio.wait({collecting, listening})
