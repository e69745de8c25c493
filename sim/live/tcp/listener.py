"""Where the target accepts connections: many at a time, for the first to connect may be the last to speak.

Anybody can connect, and send nothing, or rubbish. So each new connection has a task of its own that reads its preamble,
a deadline, and one of MAX_WAITING places. When all places are taken, the connection that was silent for longest is
closed to make room.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from proto_v3.errors import PeerProtocolError, UserError
from sim.live.io import MakePipe, Pipe, ended, set_done
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

MAX_WAITING = 64
"""Connections whose preamble is not complete yet."""
PATIENCE_S = 0.5
"""For so long a connection is never closed to make room."""
UNREAD_BYTES = 1 << 16


@dataclass(slots=True)
class Accepted:
    """A connection whose preamble was good."""

    pipe: Pipe
    name: str
    granted: Granted


class DataConnections:
    """Those of the session: how many it has, and which are there."""

    def __init__(self) -> None:
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when all are there."""
        self._count = 0
        self._token = NO_TOKEN
        self._accepted: dict[int, Accepted] = {}

    def expect(self, count: int, token: bytes) -> None:
        """Accept `count` connections that have the token; to be called before the source gets it."""
        self._count, self._token = count, token

    def check(self, preamble: Preamble) -> None:
        """PeerProtocolError if this is not one of those that are missing."""
        index = preamble.index
        if not self._count:
            raise PeerProtocolError("a data connection before any session")
        if not hmac.compare_digest(preamble.token, self._token):
            raise PeerProtocolError("a data connection without the session's token")
        if index >= self._count:
            raise PeerProtocolError(f"data connection {index}; there are {self._count}, counted from 0")
        if index in self._accepted:
            raise PeerProtocolError(f"data connection {index} a second time")
        if self.complete.done():
            raise PeerProtocolError(f"data connection {index} of a session that is given up")

    def add(self, index: int, connection: Accepted) -> None:
        """This one is there."""
        self._accepted[index] = connection
        if len(self._accepted) == self._count:
            self.complete.set_result(None)

    async def collect(self) -> list[Accepted]:
        """All of them in the order of their index, when they are there."""
        await self.complete
        return [self._accepted[index] for index in range(self._count)]

    def missing(self) -> str:
        """Which of them are not there yet."""
        indices = [str(index) for index in range(self._count) if index not in self._accepted]
        return ", ".join(indices[:8]) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


class Acceptor:
    """Accepts connections.

    The listening socket stays the caller's; every accepted connection belongs to `opened`.
    """

    def __init__(
        self,
        listener: socket.socket,
        opened: AsyncExitStack,
        *,
        io: MakePipe,
        tls: ssl.SSLContext | None,
        limit_s: float,
        rejected: Callable[[str], None],
    ) -> None:
        """`rejected` is called for each connection that is turned away, with the reason. Each one has `limit_s` seconds
        for its preamble."""
        self._listener = listener
        self._opened = opened
        self._io = io
        self._tls = tls
        self._limit_s = limit_s
        self._rejected = rejected
        self._waiting: dict[asyncio.Task[str], float] = {}
        """The tasks that read a preamble, oldest first, and when they began."""
        self.session: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        """The first connection that begins as a session, whenever it comes."""
        self.data = DataConnections()

    @contextlib.asynccontextmanager
    async def accepting(self) -> AsyncIterator[None]:
        """Accept connections meanwhile."""
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept_all())
        try:
            yield
        finally:
            for each in (self._accepting, self.session, self.data.complete):
                each.cancel()
            await asyncio.wait({self._accepting})
            for task in self._waiting:
                task.cancel()
            if self._waiting:
                await asyncio.wait(self._waiting)

    # --- accepting ----------------------------------------------------------------------------------------------------

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if len(self._waiting) >= MAX_WAITING:
                await self._make_room()
            await self._readable()
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # it was closed before it was accepted
                continue
            except OSError as error:  # no descriptors are left: nobody can connect any more
                for each in (self.session, self.data.complete):
                    if not each.done():
                        each.set_exception(error)
                        each.exception()  # perhaps nobody asks for it
                return
            sock.setblocking(False)
            task = loop.create_task(self._serve(sock, text_of(address)), name=text_of(address))
            self._waiting[task] = loop.time()
            task.add_done_callback(partial(self._served, sock))

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
        """Return when a place is free. If none becomes free in time, the oldest connection is closed."""
        oldest, since = next(iter(self._waiting.items()))
        patience_s = since + PATIENCE_S - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(self._waiting, timeout=max(0, patience_s), return_when=asyncio.FIRST_COMPLETED)
        if not done:
            oldest.cancel()
            await asyncio.wait({oldest})

    def _served(self, sock: socket.socket, task: asyncio.Task[str]) -> None:
        del self._waiting[task]
        if task.cancelled():
            sock.close()  # the task may never have begun
        why = "sent no preamble yet, and was closed to make room for others" if task.cancelled() else task.result()
        if why and not self._accepting.cancelling():
            self._rejected(f"{task.get_name()}: {why}")

    # --- one connection -----------------------------------------------------------------------------------------------

    async def _serve(self, sock: socket.socket, name: str) -> str:
        """Keep the connection, if it begins as it must; else close it, and return the reason."""
        try:
            async with AsyncExitStack() as unwanted:
                unwanted.callback(sock.close)
                pipe: TlsPipe | None = None
                async with asyncio.timeout(self._limit_s):
                    if self._tls is not None:
                        pipe = await TlsPipe.server(sock, self._tls, self._limit_s)
                        unwanted.push_async_callback(finish, pipe)
                    preamble = Preamble.of(await self._read_preamble(sock, pipe))
                if refusal := self._refusal(preamble):
                    await self._send_refusal(sock, pipe, refusal)
                    return refusal
                if preamble.role == Role.DATA:
                    self.data.check(preamble)
                self._keep(sock, pipe, name, preamble)
                unwanted.pop_all()
        except TimeoutError:
            return f"sent no complete preamble within {self._limit_s:g} s"
        except OSError as error:
            return reason(error)
        except (PeerProtocolError, UserError) as error:
            return str(error)
        return ""

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
        if preamble.role == Role.SESSION and self.session.done():
            return "another source is being served"
        return ""

    async def _send_refusal(self, sock: socket.socket, pipe: TlsPipe | None, why: str) -> None:
        """Send the reason, if the kernel takes it at once."""
        data = packed(Refuse(why=why))
        with contextlib.suppress(OSError):
            if pipe is None:
                sock.send(data)
                sock.recv(UNREAD_BYTES)  # closing a socket with unread bytes would be a reset, and the reason lost
            else:
                await pipe.send_all([memoryview(data)])

    def _keep(self, sock: socket.socket, pipe: Pipe | None, name: str, preamble: Preamble) -> None:
        is_data = preamble.role == Role.DATA
        granted = Granted.of(sock)
        if pipe is None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pipe = self._io(sock, f"data {preamble.index}" if is_data else "session")
        self._opened.push_async_callback(finish, pipe)
        connection = Accepted(pipe, name, granted)
        if is_data:
            self.data.add(preamble.index, connection)
        else:
            self.session.set_result(connection)
