# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the target accepts connections: many at a time, for the first to connect may be the last to speak.

Anybody can connect, and send nothing, or rubbish, or stop in the middle of a handshake. So each new connection has a
task of its own that reads its preamble and, for a session, goes through the handshake; it has a deadline, and one of
MAX_WAITING places. When all places are taken, one is taken away: from a connection that sent no preamble yet if there
is one, and of these from the one that is silent for longest. The session itself belongs to nobody until one handshake
has succeeded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from proto_v3.errors import PeerProtocolError, ProtoV3Error
from sim.live.io import MakePipe, Pipe, ended, set_done
from sim.live.tcp.deadline import Deadline
from sim.live.tcp.messages import Refuse, packed
from sim.live.tcp.sockets import (
    MAGIC,
    NO_TOKEN,
    PREAMBLE_BYTES,
    WIRE_VERSION,
    Granted,
    Preamble,
    Role,
    finish,
    reason,
    text_of,
)
from sim.live.tcp.tls import TlsPipe

MAX_WAITING = 32
"""Connections whose preamble, or whose handshake as a session, is not complete yet."""
PATIENCE_S = 0.5
"""For so long a connection is never closed to make room."""
BUSY = "another source is being served"
UNREAD_BYTES = 1 << 16


@dataclass(slots=True)
class Accepted:
    """A connection whose preamble was good."""

    pipe: Pipe
    name: str
    granted: Granted


class Caller:
    """A connection whose handshake is not complete yet; and, if it is a session's, those that carry its data."""

    def __init__(self, sock: socket.socket, name: str, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.sock = sock
        self.name = name
        self.deadline = Deadline(limit_s)
        self.since = loop.time()
        self.opened = AsyncExitStack()
        """What is to be closed if it is turned away."""
        self.connection: Accepted | None = None
        """The session's; None before its preamble is there."""
        self._complete: asyncio.Future[None] = loop.create_future()
        """Done when all data connections are there."""
        self._count = 0
        self._token = NO_TOKEN
        self._accepted: dict[int, Accepted] = {}

    def expect(self, count: int, token: bytes) -> None:
        """Accept `count` data connections that have the token; to be called before the source gets it."""
        self._count, self._token = count, token

    def expects(self, preamble: Preamble) -> bool:
        """Whether this preamble has its token."""
        return self._count > 0 and hmac.compare_digest(preamble.token, self._token)

    def add(self, index: int, connection: Accepted) -> None:
        """This data connection is there. PeerProtocolError if it is not one of those that are missing."""
        if index >= self._count:
            raise PeerProtocolError(f"data connection {index}; there are {self._count}, counted from 0")
        if index in self._accepted:
            raise PeerProtocolError(f"data connection {index} a second time")
        self._accepted[index] = connection
        self.opened.push_async_callback(finish, connection.pipe)
        if len(self._accepted) == self._count:
            set_done(self._complete)

    async def collect(self) -> list[Accepted]:
        """All data connections in the order of their index, when they are there."""
        await self._complete
        return [self._accepted[index] for index in range(self._count)]

    def missing(self) -> str:
        """Which of them are not there yet."""
        indices = [str(index) for index in range(self._count) if index not in self._accepted]
        return ", ".join(indices[:8]) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


S = TypeVar("S")


class Acceptor(Generic[S]):
    """Accepts connections. The listening socket stays the caller's."""

    def __init__(
        self,
        listener: socket.socket,
        meet: Callable[[Caller, Accepted], Awaitable[Callable[[], S]]],
        *,
        io: MakePipe,
        tls: ssl.SSLContext | None,
        limit_s: float,
        rejected: Callable[[str], None],
    ) -> None:
        """`meet` goes through the handshake on a session's connection, calls take_place() at its end, and returns what
        makes the session. It raises an OSError or an error of this project to turn the session away; any other error
        ends session().

        `rejected` is called for each connection that is turned away, with the reason. Each one has `limit_s` seconds
        for its preamble and its handshake.
        """
        self._listener = listener
        self._meet = meet
        self._io = io
        self._tls = tls
        self._limit_s = limit_s
        self._rejected = rejected
        self._callers: dict[asyncio.Task[str], Caller] = {}
        """Those that are not through yet, oldest first."""
        self._taken = False
        self._begin: asyncio.Future[Callable[[], S]] = asyncio.get_running_loop().create_future()
        self._session_opened = AsyncExitStack()
        """The connections of the session, until somebody has it."""

    @contextlib.asynccontextmanager
    async def accepting(self) -> AsyncIterator[None]:
        """Accept connections meanwhile."""
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept_all())
        try:
            yield
        finally:
            self.stop()
            self._begin.cancel()
            for task in self._callers:
                task.cancel()
            await asyncio.wait({self._accepting, *self._callers})
            await self._session_opened.aclose()

    def stop(self) -> None:
        """Accept nobody any more: who connects from now on waits in the listening socket."""
        self._accepting.cancel()

    async def session(self) -> S:
        """The session of the first source whose handshake succeeds. To be called once."""
        session = (await self._begin)()
        self._session_opened.pop_all()
        return session

    def take_place(self, caller: Caller) -> None:
        """The caller's handshake succeeded: turn all other sources away. ProtoV3Error if another one was first."""
        if self._taken or self._begin.done():
            raise ProtoV3Error(BUSY)
        self._taken = True
        for other in self._callers.values():
            if other is not caller and other.connection is not None:
                other.deadline.end(ProtoV3Error(BUSY))

    # --- accepting ----------------------------------------------------------------------------------------------------

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while len(self._callers) >= MAX_WAITING:
                await self._make_room()
            await self._readable()
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # it was closed before it was accepted
                continue
            except OSError as error:  # no descriptors are left: nobody can connect any more
                self.give_up(error)
                return
            sock.setblocking(False)
            caller = Caller(sock, text_of(address), self._limit_s)
            task = loop.create_task(self._serve(caller), name=caller.name)
            self._callers[task] = caller
            task.add_done_callback(self._served)

    def give_up(self, error: BaseException) -> None:
        """Wait for no session any more: session() raises this error."""
        if not self._begin.done():
            self._begin.set_exception(error)
            self._begin.exception()  # perhaps nobody asks for it

    async def _readable(self) -> None:
        """Return when somebody connects. (loop.sock_accept() would lose a connection if it is cancelled just then.)"""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._listener.fileno(), set_done, ready)
        try:
            await ready
        finally:
            loop.remove_reader(self._listener.fileno())

    async def _make_room(self) -> None:
        """Wait until a place may be free; or take one away from somebody who had it for long enough."""
        now = asyncio.get_running_loop().time()
        due = [each for each in self._callers.items() if each[1].since + PATIENCE_S <= now]
        if not due:
            patience_s = min(caller.since for caller in self._callers.values()) + PATIENCE_S - now
            await asyncio.wait(self._callers, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            return
        task, caller = min(due, key=lambda each: (each[1].connection is not None, each[1].since))
        what = "sent no preamble yet" if caller.connection is None else "did not complete its handshake yet"
        caller.deadline.end(ProtoV3Error(f"{what}, and was closed to make room for others"))
        await asyncio.wait({task})

    def _served(self, task: asyncio.Task[str]) -> None:
        caller = self._callers.pop(task)
        if task.cancelled():
            caller.sock.close()  # the task may never have begun
        elif (error := task.exception()) is not None:  # a bug
            self.give_up(error)
        elif (why := task.result()) and not self._accepting.cancelling():
            self._rejected(f"{caller.name}: {why}")

    # --- one connection -----------------------------------------------------------------------------------------------

    async def _serve(self, caller: Caller) -> str:
        """Keep the connection, if it begins as it must; else close it, and return the reason."""
        async with caller.opened:
            caller.opened.callback(caller.sock.close)
            try:
                await self._hear(caller)
            except OSError as error:
                return reason(error)
            except ProtoV3Error as error:
                return str(error)
            finally:
                caller.expect(0, NO_TOKEN)
        return ""

    async def _hear(self, caller: Caller) -> None:
        sock, pipe = caller.sock, None
        async with caller.deadline.waiting("a complete preamble"):
            if self._tls is not None:
                pipe = await TlsPipe.server(sock, self._tls, self._limit_s)
                caller.opened.push_async_callback(finish, pipe)
            preamble = Preamble.of(await self._read_preamble(sock, pipe))
        if refusal := self._refusal(preamble):
            await self._send_refusal(sock, pipe, refusal)
            raise ProtoV3Error(refusal)
        if preamble.role == Role.DATA:
            self._owner(preamble).add(preamble.index, self._kept(caller, pipe, f"data {preamble.index}"))
            caller.opened.pop_all()
        else:
            caller.connection = self._kept(caller, pipe, "session")
            caller.opened.push_async_callback(finish, caller.connection.pipe)
            begin = await self._meet(caller, caller.connection)
            self._session_opened = caller.opened.pop_all()
            self._begin.set_result(begin)

    def _owner(self, preamble: Preamble) -> Caller:
        """Whose data connection this is. PeerProtocolError if it is nobody's."""
        for caller in self._callers.values():
            if caller.expects(preamble):
                return caller
        begun = self._taken or any(caller.connection is not None for caller in self._callers.values())
        what = "without the session's token" if begun else "before any session"
        raise PeerProtocolError(f"a data connection {what}")

    async def _read_preamble(self, sock: socket.socket, pipe: TlsPipe | None) -> bytearray:
        """The first bytes; returns early if it is clear that they are no preamble. ConnectionError if they end."""
        loop = asyncio.get_running_loop()
        data = bytearray(PREAMBLE_BYTES)
        view, at = memoryview(data), 0
        while at < PREAMBLE_BYTES:
            rest = view[at:]
            size = await (loop.sock_recv_into(sock, rest) if pipe is None else pipe.recv(rest))
            if not size:
                raise ended()
            at += size
            if not MAGIC.startswith(data[: min(at, len(MAGIC))]):
                break
        return data

    def _refusal(self, preamble: Preamble) -> str:
        """Why this is turned away although it is a connection of this program: then its owner gets the reason, too."""
        if preamble.version != WIRE_VERSION:
            return (
                f"the source speaks wire version {preamble.version}, this target version {WIRE_VERSION}; "
                "both must run the same version of this program"
            )
        return BUSY if preamble.role == Role.SESSION and self._taken else ""

    async def _send_refusal(self, sock: socket.socket, pipe: TlsPipe | None, why: str) -> None:
        """Send the reason, if the kernel takes it at once."""
        data = packed(Refuse(why=why))
        with contextlib.suppress(OSError):
            if pipe is None:
                sock.send(data)
                sock.recv(UNREAD_BYTES)  # closing a socket with unread bytes would be a reset, and the reason lost
            else:
                await pipe.send_all([memoryview(data)])

    def _kept(self, caller: Caller, pipe: Pipe | None, name: str) -> Accepted:
        """The connection, ready for use; `name` is for its threads."""
        granted = Granted.of(caller.sock)
        if pipe is None:
            caller.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pipe = self._io(caller.sock, name)
        return Accepted(pipe, caller.name, granted)
