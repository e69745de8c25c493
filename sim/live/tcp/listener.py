"""Where the target takes connections in: several at a time, for the first to come may be the last to speak.

Anybody can connect, say nothing, or say rubbish. So each connection has a task of its own that reads its preamble, a
deadline, and a place among so many; when all places are taken, the one that was silent for longest makes room.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from proto_v3.errors import PeerProtocolError, UserError
from sim.live.io import Io, Pipe, ended
from sim.live.tcp.message_stream import packed
from sim.live.tcp.messages import Refuse
from sim.live.tcp.sockets import (
    MAGIC,
    NO_TOKEN,
    PREAMBLE_BYTES,
    WIRE_VERSION,
    Granted,
    Preamble,
    Role,
    SocketSettings,
    finish,
    reason,
    text_of,
)
from sim.live.tcp.tls import TlsPipe

MAX_WAITING = 64
"""Connections whose preamble is not there yet."""
LEFT_BYTES = 1 << 16
PATIENCE_S = 0.5
"""No connection has to make room earlier."""


@dataclass(slots=True)
class Caller:
    """A connection whose preamble was good."""

    pipe: Pipe
    name: str
    granted: Granted


class Door:
    """To be used as a context. The listener stays the caller's, and every connection handed on belongs to `opened`."""

    def __init__(
        self,
        listener: socket.socket,
        opened: AsyncExitStack,
        *,
        io: Io,
        sockets: SocketSettings,
        tls: ssl.SSLContext | None,
        limit_s: float,
        rejected: Callable[[str], None],
    ) -> None:
        """`rejected` is told of each connection that was turned away, and why; each has `limit_s` for its preamble."""
        self._listener = listener
        self._opened = opened
        self._io = io
        self._sockets = sockets
        self._tls = tls
        self._limit_s = limit_s
        self._rejected = rejected
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[asyncio.Task[None], float] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._session: asyncio.Future[Caller] = self._loop.create_future()
        self._all: asyncio.Future[None] = self._loop.create_future()
        self._data: dict[int, Caller] = {}
        self._due = 0
        self._token = NO_TOKEN
        self._pause: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._knock)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._listener.fileno())
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        for each in (self._session, self._all):
            each.cancel()
        tasks = {*self._waiting, *self._leaving}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def session(self) -> Caller:
        """The first connection that begins as a session, whenever it comes."""
        return await self._session

    def expect(self, count: int, token: bytes) -> None:
        """Let so many data connections in that know the token; to be called before the source is told it."""
        self._due, self._token = count, token

    async def data(self) -> list[Caller]:
        """The session's data connections, when all have come; in the order of their index."""
        await self._all
        return [self._data[index] for index in range(self._due)]

    def missing(self) -> str:
        """Which data connections have not come."""
        left = [str(index) for index in range(self._due) if index not in self._data]
        return ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")

    # --- who comes in -------------------------------------------------------------------------------------------------

    def _knock(self) -> None:
        if len(self._waiting) >= MAX_WAITING and not self._made_room():
            return
        try:
            sock, address = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # gone before it was taken
            return
        except OSError as error:  # out of descriptors: nobody can come any more
            self._loop.remove_reader(self._listener.fileno())
            for each in (self._session, self._all):
                if not each.done():
                    each.set_exception(error)
                    each.exception()  # it may be that nobody asks
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._greet(sock, text_of(address)))
        self._waiting[task] = self._loop.time()
        task.add_done_callback(lambda task: self._left(task, sock))

    def _made_room(self) -> bool:
        oldest, since = next(iter(self._waiting.items()))
        patience = since + PATIENCE_S - self._loop.time()
        if patience <= 0:
            del self._waiting[oldest]
            self._leaving.add(oldest)
            oldest.cancel()
            return True
        if self._pause is None:
            self._loop.remove_reader(self._listener.fileno())
            self._pause = self._loop.call_later(patience, self._go_on)
        return False

    def _go_on(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            self._loop.add_reader(self._listener.fileno(), self._knock)

    def _left(self, task: asyncio.Task[None], sock: socket.socket) -> None:
        if task.cancelled():
            sock.close()  # it may never have begun
        self._waiting.pop(task, None)
        self._leaving.discard(task)
        self._go_on()

    # --- what it says -------------------------------------------------------------------------------------------------

    async def _greet(self, sock: socket.socket, name: str) -> None:
        pipe: TlsPipe | None = None
        taken = False
        try:
            async with asyncio.timeout(self._limit_s):
                if self._tls is not None:
                    pipe = await TlsPipe.server(sock, self._tls, self._limit_s)
                preamble = Preamble.of(await self._begin(sock, pipe))
            self._judge(preamble)
            self._take(sock, pipe, name, preamble)
            taken = True
        except asyncio.CancelledError:
            if asyncio.current_task() in self._leaving:
                self._rejected(f"{name}: said nothing yet, and had to make room for others")
            raise
        except TimeoutError:
            self._rejected(f"{name}: said nothing that a connection begins with for {self._limit_s:g} s")
        except _TurnedAwayError as error:
            await self._say(sock, pipe, str(error))
            self._rejected(f"{name}: {error}")
        except OSError as error:
            self._rejected(f"{name}: {reason(error)}")
        except (PeerProtocolError, UserError) as error:
            self._rejected(f"{name}: {error}")
        finally:
            if not taken:
                if pipe is not None:
                    await finish(pipe)
                sock.close()

    async def _begin(self, sock: socket.socket, pipe: TlsPipe | None) -> bytearray:
        """The first bytes; they end early, with ConnectionError, where it is clear that they are no preamble."""
        data = bytearray(PREAMBLE_BYTES)
        view, at = memoryview(data), 0
        while at < PREAMBLE_BYTES:
            left = view[at:]
            got = await (self._loop.sock_recv_into(sock, left) if pipe is None else pipe.recv(left))
            if not got:
                raise ended()
            at += got
            if not MAGIC.startswith(data[: min(at, len(MAGIC))]):
                break
        return data

    def _judge(self, preamble: Preamble) -> None:
        """Raise what there is to say against it."""
        if preamble.version != WIRE_VERSION:
            raise _TurnedAwayError(
                f"the source speaks wire version {preamble.version}, this target version {WIRE_VERSION}; "
                "both must run the same version of this program"
            )
        if preamble.role == Role.SESSION:
            if self._session.done():
                raise _TurnedAwayError("another source is being served")
        elif not self._due:
            raise PeerProtocolError("a data connection before any session")
        elif not hmac.compare_digest(preamble.token, self._token):
            raise PeerProtocolError("a data connection without the session's token")
        elif preamble.index >= self._due:
            raise PeerProtocolError(f"data connection {preamble.index}; there are {self._due}, counted from 0")
        elif preamble.index in self._data:
            raise PeerProtocolError(f"data connection {preamble.index} a second time")
        elif self._all.done():
            raise PeerProtocolError(f"data connection {preamble.index} of a session that is given up")

    def _take(self, sock: socket.socket, pipe: Pipe | None, name: str, preamble: Preamble) -> None:
        data = preamble.role == Role.DATA
        if pipe is None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if data:
            self._sockets.size(sock)
            self._sockets.pace(sock)
        granted = Granted.of(sock)
        if pipe is None:
            pipe = self._io.pipe(sock, f"data {preamble.index}" if data else "session")
        self._opened.push_async_callback(finish, pipe)
        caller = Caller(pipe, name, granted)
        if not data:
            self._session.set_result(caller)
            return
        self._data[preamble.index] = caller
        if len(self._data) == self._due:
            self._all.set_result(None)

    async def _say(self, sock: socket.socket, pipe: TlsPipe | None, why: str) -> None:
        """Tell the other side, if that is possible at once."""
        data = packed(Refuse(why=why))
        with contextlib.suppress(OSError):
            if pipe is None:
                sock.send(data)
                sock.recv(LEFT_BYTES)  # what is left unread when it is closed would make that a reset
            else:
                await pipe.send_all([memoryview(data)])


class _TurnedAwayError(PeerProtocolError):
    """A connection of ours by its preamble, so that its owner is told."""
