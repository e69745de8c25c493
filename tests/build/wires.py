# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions for tests: pairs of real ones, and peers that follow the protocol up to where a test wants them not to."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgpack

from proto_v3.errors import PeerFailedError, PeerProtocolError, UserError
from sim.live.io import IO
from sim.live.tcp.connection import FRAME_MAGIC
from sim.live.tcp.handshake import Judge, Limits, accept, connect
from sim.live.tcp.messages import ORDER, Run
from sim.live.tcp.session import Session
from sim.live.tcp.sockets import Preamble, Role, SocketSettings, listen, text_of
from tests.build import loops

LOCAL = ("127.0.0.1", 0)
PLAIN = SocketSettings()
RUN = Run("{}", "v2", 1)
PATIENT = Limits(handshake_s=60, silent_s=60)
"""For tests that must not depend on how fast this machine is."""


class TurnedAwayError(Exception):
    """A target turned a source away with this reason, and waits for another one."""


ALLOWED = (OSError, PeerProtocolError, PeerFailedError, UserError, TurnedAwayError)
"""What a peer may bring about, whatever it does."""


def run(loop: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it; a session that ended leaves no task."""
    loops.run(main, loop, tasks_end_at_once=True)


async def agree(_: Run) -> None:
    pass


@asynccontextmanager
async def listening(sockets: SocketSettings = PLAIN) -> AsyncIterator[tuple[socket.socket, tuple[str, int]]]:
    listener = listen(LOCAL)
    sockets.apply(listener)  # what is accepted inherits them
    try:
        yield listener, listener.getsockname()
    finally:
        listener.close()


@asynccontextmanager
async def pair(
    io: str,
    connections: int = 2,
    limits: Limits = PATIENT,
    *,
    sockets: SocketSettings = PLAIN,
    **more: Any,
) -> AsyncIterator[tuple[Session, Session]]:
    """Source and target of a session."""
    async with listening(sockets) as (listener, address):
        accepting = asyncio.create_task(
            accept(
                listener, more.get("judge", agree), io=IO[io], limits=limits, tls=more.get("server_tls"),
            )
        )  # fmt: skip
        source = await connect(
            address, more.get("run", RUN), connections, io=IO[io], limits=limits, sockets=sockets,
            tls=more.get("client_tls"),
        )  # fmt: skip
        target = await accepting
        try:
            yield source, target
        finally:
            await source.close()
            await target.close()


async def refused(judge: Judge, io: str, limits: Limits, source: Callable[[tuple[str, int]], Awaitable[Any]]) -> Any:
    """What a source gets from a target that refuses it, and what the target says of it: it waits for another source."""
    said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with listening() as (listener, address):
        accepting = asyncio.create_task(accept(listener, judge, io=IO[io], limits=limits, rejected=said.set_result))
        result = await outcome(source(address))
        why = (await said).split(": ", 1)[1]
        assert not accepting.done()
        accepting.cancel()
        await asyncio.wait({accepting})
    return result, why


async def outcome(work: Awaitable[Any]) -> Any:
    """Its result, or its error."""
    try:
        return await work
    except Exception as error:
        return error


# --- peers that need not be honest ------------------------------------------------------------------------------------

Change = Callable[[str, bytes], bytes | None]
"""Given a stage and what belongs there: what is sent instead; None to fall silent."""


class SilentError(Exception):
    """The peer stops talking here, with all its connections open."""


def frame(header: bytes, payload: bytes) -> bytes:
    sizes = FRAME_MAGIC.to_bytes(2, "big") + len(header).to_bytes(2, "big") + len(payload).to_bytes(4, "big")
    return sizes + header.ljust(64, b"\0") + payload


def message(kind: str, **fields: Any) -> bytes:
    body: bytes = msgpack.packb({"kind": kind, **fields})
    return len(body).to_bytes(4, "big") + body


async def read_message(reader: asyncio.StreamReader) -> dict[str, Any]:
    size = int.from_bytes(await reader.readexactly(4), "big")
    fields: dict[str, Any] = msgpack.unpackb(await reader.readexactly(size))
    return fields


class Peer:
    """The connections of one that follows a script, and what it changes of that."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self.writers: list[asyncio.StreamWriter] = []
        self.name = ""
        """The address of its first connection."""

    async def send(self, stage: str, writer: asyncio.StreamWriter, data: bytes) -> None:
        changed = self._change(stage, data)
        if changed is None:
            raise SilentError
        writer.write(changed)
        await writer.drain()

    async def follow(self, script: Coroutine[Any, Any, None], over: asyncio.Event) -> None:
        """Follow the script as far as the other side lets it; if it falls silent, keep still until all is over."""
        try:
            await script
        except SilentError:
            await over.wait()
        except (OSError, EOFError, ValueError, KeyError, msgpack.UnpackException):
            pass  # the other side ended it, which is its right
        finally:
            for writer in self.writers:
                writer.close()
            for writer in self.writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


OFFER = {
    "frame_bytes": 1 << 16,
    "connections": 2,
    "boot_id": "",
    "run": {"scenario": "{}", "protocol": "v2", "seed": 1, "drivers": ""},
}
ACCEPT = {
    "boot_id": "",
    "token": bytes(range(16)),
}
FRAMES = [(b"h", b""), (b"hd", b"payload"), (b"\x00" * 64, bytes(5000)), (b"x", b"y" * (1 << 16))]


class SourcePeer(Peer):
    """A source."""

    async def script(self, address: tuple[str, int]) -> None:
        reader, session = await self._dial(address)
        await self.send("preamble", session, Preamble(Role.SESSION).pack())
        await self.send("offer", session, message("offer", **OFFER))
        token = (await read_message(reader))["token"]
        data = []
        for index in range(2):
            _, writer = await self._dial(address)
            await self.send(f"data preamble {index}", writer, Preamble(Role.DATA, index, token).pack())
            data.append(writer)
        if (await read_message(reader))["kind"] != "connected":
            return
        for _ in range(2):
            await self.send("clock", session, message("clockrequest"))
            await read_message(reader)
        await self.send("begin", session, message("begin", offset_ns=-5, uncertainty_ns=7))
        await talk(self, session, data, [message("start", zero_ns=1), message("bye")])

    async def _dial(self, address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*address)
        self.writers.append(writer)
        self.name = self.name or text_of(writer.get_extra_info("sockname"))
        return reader, writer


class TargetPeer(Peer):
    """A target."""

    at_ns = 5

    async def script(self, listener: socket.socket) -> None:
        reader, session = await self._take(listener)
        await reader.readexactly(32)
        offer = await read_message(reader)
        fields = {**ACCEPT, "boot_id": offer["boot_id"]}
        await self.send("accept", session, message("accept", **fields))
        data = []
        for _ in range(2):
            opening, writer = await self._take(listener)
            await opening.readexactly(32)
            data.append(writer)
        await self.send("connected", session, message("connected"))
        while (await read_message(reader))["kind"] == "clockrequest":
            await self.send("clock", session, message("clockreply", at_ns=self.at_ns))
        result = message("result", report={"rows": [1, 2], "column": bytes(100)})
        await talk(self, session, data, [message("prepared"), message("started"), result])

    async def _take(self, listener: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        listener.setblocking(False)
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        reader, writer = await asyncio.open_connection(sock=sock)
        self.writers.append(writer)
        return reader, writer


async def talk(
    peer: Peer, session: asyncio.StreamWriter, data: list[asyncio.StreamWriter], messages: list[bytes]
) -> None:
    """What a side may say once the session stands. `messages`: all that it sends, in their order."""
    await peer.send("ping", session, message("ping"))
    for index, writer in enumerate(data):
        for number, (header, payload) in enumerate(FRAMES):
            await peer.send(f"frame {index} {number}", writer, frame(header, payload))
    for each in messages[:-1]:
        await peer.send("message", session, each)
    await peer.send("last", session, messages[-1])


STAGES = [
    "ping", *(f"frame {index} {number}" for index in range(2) for number in range(len(FRAMES))), "message", "last",
]  # fmt: skip
SOURCE_STAGES = ["preamble", "offer", "data preamble 0", "data preamble 1", "clock", "begin", *STAGES]
TARGET_STAGES = ["accept", "connected", "clock", *STAGES]


async def met_by_target(io: str, change: Change, limits: Limits) -> list[Any]:
    """What a target goes through with such a source: its session's errors, or why there was none."""
    async with listening() as (listener, address):
        over = asyncio.Event()
        peer = SourcePeer(change)
        turned_away: list[str] = []
        accepting = asyncio.create_task(accept(listener, agree, io=IO[io], limits=limits, rejected=turned_away.append))
        following = asyncio.create_task(peer.follow(peer.script(address), over))
        while not accepting.done():
            for text in turned_away:
                if text.startswith(f"{peer.name}: "):  # its session: the target waits for another, as it should
                    accepting.cancel()
                    over.set()
                    await asyncio.wait({accepting, following})
                    return [TurnedAwayError(text)]
            await asyncio.wait({accepting}, timeout=0.002)
        return await _met(following, accepting, over)


async def met_by_source(io: str, change: Change, limits: Limits) -> list[Any]:
    """What a source goes through with such a target."""
    async with listening() as (listener, address):
        over = asyncio.Event()
        peer = TargetPeer(change)
        following = asyncio.create_task(peer.follow(peer.script(listener), over))
        connecting = asyncio.create_task(connect(address, RUN, 2, io=IO[io], limits=limits))
        return await _met(following, connecting, over)


async def _met(following: asyncio.Task[None], meeting: asyncio.Task[Session], over: asyncio.Event) -> list[Any]:
    found: list[Any] = list(await asyncio.gather(meeting, return_exceptions=True))
    session = found[0]
    try:
        if isinstance(session, Session):
            found = list(await asyncio.gather(_receive_messages(session), *map(_receive_all, session.channels)))
    finally:
        over.set()
        if isinstance(session, Session):
            await session.close()
        following.cancel()  # it may wait for somebody to connect
        await asyncio.wait({following})
    return found


async def _receive_messages(session: Session) -> Any:
    kinds: tuple[type[Any], ...] = (*ORDER["source"], *ORDER["target"])
    while not isinstance(result := await outcome(session.receive_message(*kinds)), Exception):
        pass
    return result


async def _receive_all(channel: Any) -> Any:
    while not isinstance(result := await outcome(channel.recv()), Exception):
        pass
    return result


# --- what may happen to bytes -----------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The bytes, changed somehow."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 2, 4, 8, 100]))
    match rng.randrange(9):
        case 0:
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + rng.randbytes(rng.choice([1, 3, 100])) + data[at:]
        case 3:
            return data[:at] + data[end:]
        case 4:
            return data[:end] + data[at:]
        case 5:
            return data[:at] + b"\xff" * (end - at) + data[end:]
        case 6:
            return data + data
        case 7:
            return rng.randbytes(rng.choice([1, 31, 32, 33, 5000]))
        case _:
            return _other_message(rng, data)


ODD = [
    None, True, -1, 0, 1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), "", "x", "\x1b[2J" * 9,
    "y" * 70_000, b"", b"z" * 15, bytes(17), [], [1] * 20_000, {}, {"a": {}}, {1: 2}, [[[[]]]],
    msgpack.ExtType(5, b"e"), msgpack.Timestamp(1, 2),
]  # fmt: skip


def _other_message(rng: random.Random, data: bytes) -> bytes:
    """If it is a message: with another value, another name or a name less."""
    try:
        fields = msgpack.unpackb(data[4:])
        name = rng.choice(sorted(fields))
    except (ValueError, TypeError, AttributeError, IndexError, msgpack.UnpackException):
        return data[::-1]
    match rng.randrange(4):
        case 0:
            del fields[name]
        case 1:
            fields[rng.choice([1, b"kind", "more"])] = fields[name]
        case _:
            fields[name] = rng.choice(ODD)
    body: bytes = msgpack.packb(fields)
    return len(body).to_bytes(4, "big") + body
