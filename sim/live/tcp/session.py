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

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error
from proto_v3.wire.channel import Transport
from sim.live.tcp.connection import Connection, Trace, connection_error
from sim.live.tcp.handshake import ClockOffset
from sim.live.tcp.message_stream import MAX_MESSAGE_BYTES, M, MessageStream, RawMessage
from sim.live.tcp.messages import Failed, Message, Ping, printable
from sim.live.tcp.sockets import Granted

MAX_UNREAD = 256
"""Messages that came and that nobody asked for yet."""
BEATS = 4
"""PINGs within the time after which silence is the end."""


class Session:
    """One end of it. To be made in a running loop, and closed in the same."""

    def __init__(
        self, stream: MessageStream, connections: Sequence[Connection], peer_clock: ClockOffset, silent_s: float
    ) -> None:
        self.channels: list[Transport] = list(connections)
        self.peer_clock = peer_clock
        self.peer = stream.address
        self._stream = stream
        self._connections = connections
        self._silent_s = silent_s
        self._loop = asyncio.get_running_loop()
        self._cause: Exception | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._unread: deque[RawMessage] = deque()
        self._unreceived_bytes = 0
        self._receiver: asyncio.Future[None] | None = None
        self._in_turn = asyncio.Lock()
        stream.handshake_done()
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

    async def send_message(self, message: Message) -> None:
        """Send a message. ConnectionError if the other side is gone, LocalProtocolError if the message is too long, or
        has a value that msgpack does not know."""
        if self._cause is not None:
            raise connection_error(self._cause)
        try:
            await self._stream.send(message)
        except ConnectionError as error:
            raise connection_error(self._cause or error) from error

    async def receive_message(self, *kinds: type[M]) -> M:
        """Wait for the next message, which must be one of these. If that is cancelled, no message is lost.

        PeerFailedError if the other side sent FAILED, PeerProtocolError if it sent another message or a wrong one,
        ConnectionError if it is gone. Messages that it sent before it went are received first.
        """
        async with self._in_turn:
            while not self._unread:
                if self._cause is not None:
                    if isinstance(self._cause, ProtoV3Error):
                        raise type(self._cause)(*self._cause.args)
                    raise connection_error(self._cause)
                self._receiver = self._loop.create_future()
                await self._receiver
            message = self._unread.popleft()
            self._unreceived_bytes -= message.size_bytes
        if message.kind == Failed.kind():
            raise PeerFailedError(f"{self._stream.peer} failed: {printable(message.read_as(Failed).why)}")
        return message.read_as(*kinds)

    async def _listen(self) -> None:
        stream = self._stream
        try:
            while True:
                message = await stream.recv()
                if message.kind == Ping.kind():
                    continue
                room = MAX_MESSAGE_BYTES - self._unreceived_bytes
                if self._unread and (message.size_bytes > room or len(self._unread) >= MAX_UNREAD):
                    raise PeerProtocolError(f"{stream.peer} sends more messages than are received")
                self._unread.append(message)
                self._unreceived_bytes += message.size_bytes
                self._wake()
        except PeerProtocolError as error:
            self._fail(error)
        except OSError as error:
            self._session_lost(error)

    def _wake(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    # --- the other side's life ----------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Count beats without a word, not time: while this process is stopped itself, nothing is missed."""
        heard, missed = self._stream.received_bytes, 0
        ping: asyncio.Task[None] | None = None
        while self._cause is None:
            if ping is None or ping.done():  # one that the other side does not take holds up nothing
                ping = self._start(self._ping())
            await asyncio.sleep(self._silent_s / BEATS)
            missed = 0 if self._stream.received_bytes > heard else missed + 1
            heard = self._stream.received_bytes
            if missed >= BEATS:
                self._fail(ConnectionError(f"the other side said nothing for {self._silent_s:g} s"))

    async def _ping(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._stream.send(Ping())

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
        self._stream.pipe.close()
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
        await self._stream.pipe.wait_closed()
        for connection in self._connections:
            await connection.wait_closed()
