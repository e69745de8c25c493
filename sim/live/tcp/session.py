"""What source VMM and target VMM have once they agreed: data connections, and a session to talk over.

The session tells each side that the other one lives: each sends a PING every now and then, and one that hears nothing
for a while gives up, and ends all connections. (TCP by itself would wait for many minutes.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

from proto_v3.errors import LocalProtocolError, PeerFailedError, PeerProtocolError, ProtoV3Error
from proto_v3.wire.channel import Transport
from sim.live.tcp.connection import Connection, Trace, connection_error
from sim.live.tcp.handshake import Agreed
from sim.live.tcp.messages import MAX_KIND_CHARS, MAX_MESSAGE_BYTES, Message, Talk, field, printable
from sim.live.tcp.sockets import Granted

MAX_UNHEARD = 256
"""Messages that came and that nobody asked for yet."""
BEATS = 4
"""PINGs within the time after which silence is the end."""
PING = "ping"


class Session:
    """One end of it. To be made in a running loop, and closed in the same."""

    def __init__(self, talk: Talk, connections: Sequence[Connection], agreed: Agreed, silent_s: float) -> None:
        self.channels: list[Transport] = list(connections)
        self.run = agreed.run
        self.answer = agreed.answer
        self.frame_bytes = agreed.frame_bytes
        self.peer_offset_ns = agreed.peer_offset_ns
        self.uncertainty_ns = agreed.uncertainty_ns
        self.peer = talk.address
        self._talk = talk
        self._connections = connections
        self._silent_s = silent_s
        self._loop = asyncio.get_running_loop()
        self._cause: Exception | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._unheard: deque[tuple[Message, int]] = deque()
        self._unheard_bytes = 0
        self._hearer: asyncio.Future[None] | None = None
        self._in_turn = asyncio.Lock()
        talk.handshake_done()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._listen())
        self._beating = self._start(self._beat())
        self._closing: asyncio.Task[None] | None = None

    @property
    def sockets(self) -> list[Granted]:
        """What the kernel gave each data connection."""
        return [connection.granted for connection in self._connections]

    def trace(self, timeline: Trace | None) -> None:
        """Record in this timeline, from now on, which frames were sent, and which were waited for."""
        for connection in self._connections:
            connection.trace = timeline

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- talking ------------------------------------------------------------------------------------------------------

    async def tell(self, kind: str, /, **fields: Any) -> None:
        """Send a message; "failed" with a `why` is what the other side's hear() raises as PeerFailedError.

        ConnectionError if the other side is gone. LocalProtocolError if the message is none, or too long.
        """
        if kind == PING or not 0 < len(kind) <= MAX_KIND_CHARS or "kind" in fields:
            raise LocalProtocolError(f"{kind!r} is no kind of message to be told")
        if self._cause is not None:
            raise connection_error(self._cause)
        try:
            await self._talk.send(kind, **fields)
        except ConnectionError as error:
            raise connection_error(self._cause or error) from error

    async def hear(self, *kinds: str) -> Message:
        """Wait for the next message, which must be of one of these kinds. It is lost to nobody if that is cancelled.

        PeerFailedError if the other side says that it failed, PeerProtocolError if it says something else,
        ConnectionError if it is gone. What it said before that is heard first.
        """
        async with self._in_turn:
            while not self._unheard:
                if self._cause is not None:
                    if isinstance(self._cause, ProtoV3Error):
                        raise type(self._cause)(*self._cause.args)
                    raise connection_error(self._cause)
                self._hearer = self._loop.create_future()
                await self._hearer
            message, size = self._unheard.popleft()
            self._unheard_bytes -= size
        kind = message["kind"]
        if kind == "failed" and kind not in kinds:
            raise PeerFailedError(f"{self._talk.peer} failed: {printable(field(message, 'why', str))}")
        if kind not in kinds:
            due = " or ".join(kinds)
            raise PeerProtocolError(f"the message {printable(repr(kind))} came where {due} was due")
        return message

    async def _listen(self) -> None:
        talk = self._talk
        try:
            while True:
                before = talk.heard_bytes
                message = await talk.recv()
                if message["kind"] == PING:
                    continue
                size = talk.heard_bytes - before
                room = MAX_MESSAGE_BYTES - self._unheard_bytes
                if self._unheard and (size > room or len(self._unheard) >= MAX_UNHEARD):
                    raise PeerProtocolError(f"{talk.peer} says more than anybody asked for")
                self._unheard.append((message, size))
                self._unheard_bytes += size
                self._wake()
        except PeerProtocolError as error:
            self._fail(error)
        except OSError as error:
            self._session_lost(error)

    def _wake(self) -> None:
        if self._hearer is not None and not self._hearer.done():
            self._hearer.set_result(None)

    # --- the other side's life ----------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Count beats without a word, not time: while this process is stopped itself, nothing is missed."""
        heard, missed = self._talk.heard_bytes, 0
        ping: asyncio.Task[None] | None = None
        while self._cause is None:
            if ping is None or ping.done():  # one that the other side does not take holds up nothing
                ping = self._start(self._ping())
            await asyncio.sleep(self._silent_s / BEATS)
            missed = 0 if self._talk.heard_bytes > heard else missed + 1
            heard = self._talk.heard_bytes
            if missed >= BEATS:
                self._fail(ConnectionError(f"the other side said nothing for {self._silent_s:g} s"))

    async def _ping(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._talk.send(PING)

    def _session_lost(self, error: Exception) -> None:
        """What is on its way on the data connections may still be wanted: they end by themselves, or soon."""
        if self._cause is None:
            self._cause = error
            self._grace = self._loop.call_later(self._silent_s, self._fail, error)
            self._wake()

    def _fail(self, cause: Exception) -> None:
        """End all connections; whoever waits for anything is told the cause."""
        if self._cause is None:
            self._cause = cause
        self._talk.pipe.close()
        for connection in self._connections:
            connection.end(self._cause)
        self._wake()

    def give_up(self, why: str) -> None:
        """End all connections; whoever waits for anything here is told why, as a ConnectionError."""
        self._fail(ConnectionAbortedError(why))

    async def close(self) -> None:
        """End all connections, and return when nothing is left of the session. May be called again."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._fail(ConnectionAbortedError("this side closed the session"))
        if self._grace is not None:
            self._grace.cancel()
        self._beating.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._talk.pipe.wait_closed()
        for connection in self._connections:
            await connection.wait_closed()
