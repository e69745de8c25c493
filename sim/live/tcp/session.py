# SPDX-License-Identifier: GPL-2.0-or-later
"""What source VMM and target VMM have after the handshake: data connections, and messages.

Each side sends a PING from time to time. A side that receives nothing for `silent_s` seconds gives up, and closes all
connections. (TCP by itself would wait for many minutes.)

A side that receives PINGs alone gives up too: each stage of the session has a time limit, and all waits of this side
end when it is over. They also end when the session does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error
from proto_v3.text import clean
from proto_v3.wire.channel import Transport
from sim.live.io import set_done
from sim.live.merge_timelines import ProcessTimeline
from sim.live.plain import MAX_TEXT_CHARS
from sim.live.tcp.connection import Connection, connection_error
from sim.live.tcp.deadline import Deadline, Waited, again
from sim.live.tcp.messages import Failed, M, Message, MessageStream, Ping, RawMessage, Refuse, Run, not_due
from sim.live.tcp.sockets import Granted

BEATS = 4
"""PINGs in `silent_s` seconds."""
FAREWELL_S = 1.0
"""How long the other side may take to receive why this one failed."""


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The other side's time.perf_counter_ns() minus this side's, and how far that may be off, either way."""

    offset_ns: int
    uncertainty_ns: int


class Session:
    """One end of the session. It is made in a running event loop, and must be closed in the same one."""

    def __init__(
        self,
        stream: MessageStream,
        connections: Sequence[Connection],
        peer_clock: ClockOffset,
        silent_s: float,
        run: Run,
        deadline: Deadline,
    ) -> None:
        """`run` is what both sides agreed on; `deadline` is the one that the handshake had."""
        self.channels: list[Transport] = list(connections)
        self.peer_clock = peer_clock
        self.peer = stream.address
        self.run = run
        self._deadline = deadline
        self._overdue: asyncio.TimerHandle | None = None
        self._stream = stream
        self._connections = connections
        self._silent_s = silent_s
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        """Done when this session is over, or the connection of its messages is gone."""
        self._cause: Exception | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._queue: deque[RawMessage[Any]] = deque()
        """What was received, and no caller has asked for yet: as bytes, each kind once (messages.ORDER)."""
        self._receiver: asyncio.Future[None] | None = None
        self._receiving = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._listen())
        self._beating = self._start(self._beat())
        self._closing: asyncio.Task[None] | None = None

    @property
    def sockets(self) -> list[Granted]:
        """What the kernel granted each data connection."""
        return [connection.granted for connection in self._connections]

    def trace(self, timeline: ProcessTimeline | None) -> None:
        """From now on, record in this timeline which frames are sent, and which are waited for; None: in none."""
        for connection in self._connections:
            connection.trace = timeline

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- its time limit -----------------------------------------------------------------------------------------------

    def stage(self, limit_s: float) -> None:
        """A new stage begins: what waits in this session ends in `limit_s` seconds, whatever the other side sends.

        It gets an error then, and can still send the reason. `silent_s` later all connections are closed.
        """
        self._deadline.set(limit_s)
        if self._overdue is not None:
            self._overdue.cancel()
        late = ConnectionAbortedError(f"the time limit of {limit_s:g} s is over")
        self._overdue = self._loop.call_later(limit_s + self._silent_s, self._fail, late)

    def waiting(self, waits_for: Waited) -> AbstractAsyncContextManager[None]:
        """Bound what the body waits for by the time limit of the stage, and by the session's end."""
        return self._deadline.waiting(waits_for)

    # --- messages -----------------------------------------------------------------------------------------------------

    async def send_message(self, message: Message) -> None:
        """Send a message. ConnectionError if the other side is gone, LocalProtocolError if the message is too long, or
        has a value that msgpack does not know."""
        if self._cause is not None:
            raise connection_error(self._cause)
        try:
            async with self.waiting(f"{self._stream.peer} to take {message.kind().upper()}"):
                await self._stream.send(message)
        except ConnectionError as error:
            raise connection_error(self._cause or error) from error

    async def send_failed(self, error: BaseException) -> None:
        """Send the reason for which this side gives up, if the other side takes it soon."""
        with contextlib.suppress(OSError, ProtoV3Error):
            async with asyncio.timeout(FAREWELL_S):
                await self._stream.send(Failed(why=clean(str(error), MAX_TEXT_CHARS)))

    async def receive_message(self, *kinds: type[M]) -> M:
        """Wait for the next message, which must be one of these. If that is cancelled, no message is lost.

        PeerFailedError if the other side sent FAILED, PeerProtocolError if it sent another message or a wrong one,
        TimeoutError if the stage's time limit is over, ConnectionError if the other side is gone. Messages that it sent
        before it went are received first.
        """
        due = " or ".join(kind.kind().upper() for kind in kinds)
        async with self._receiving:
            while not self._queue:
                if self._cause is not None:
                    raise again(self._cause)
                self._receiver = self._loop.create_future()
                async with self.waiting(f"{due} of {self._stream.peer}"):
                    await self._receiver
            raw = self._queue.popleft()
        if raw.kind not in (Failed, Refuse, *kinds):
            raise not_due(raw.kind.kind(), kinds)
        message = raw.read()
        if isinstance(message, Failed):
            raise PeerFailedError(f"{self._stream.peer} failed: {message.why}")
        if isinstance(message, Refuse):  # it gave the place to another source, while BEGIN was on its way
            raise PeerFailedError(f"{self._stream.peer} refuses: {message.why}")
        read: M = message
        return read

    async def _listen(self) -> None:
        stream = self._stream
        try:
            while True:
                message = await stream.recv()
                if message.kind is Ping:
                    continue
                if any(each.kind is message.kind for each in self._queue):  # a second FAILED
                    raise PeerProtocolError(f"{stream.peer} sends {message.kind.kind().upper()} a second time")
                self._queue.append(message)
                self._wake()
        except PeerProtocolError as error:
            self._fail(error)
        except OSError as error:
            self._session_lost(error)

    def _wake(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    # --- whether the other side lives ---------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Count beats in which nothing was received, not time: while this process itself is stopped, none is missed."""
        received, missed = self._stream.received_bytes, 0
        ping: asyncio.Task[None] | None = None
        while self._cause is None:
            if ping is None or ping.done():  # a PING that the other side does not receive holds up nothing
                ping = self._start(self._ping())
            await asyncio.sleep(self._silent_s / BEATS)
            missed = 0 if self._stream.received_bytes > received else missed + 1
            received = self._stream.received_bytes
            if missed >= BEATS:
                self._fail(ConnectionError(f"the other side sent nothing for {self._silent_s:g} s"))

    async def _ping(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._stream.send(Ping())

    def _session_lost(self, error: Exception) -> None:
        """Frames on their way may still be wanted: the data connections end by themselves, or after `silent_s`."""
        if self._cause is None:
            self._cause = error
            self._grace = self._loop.call_later(self._silent_s, self._fail, error)
            set_done(self.lost)
            self._wake()

    def _fail(self, cause: Exception) -> None:
        """Close all connections; every task that waits gets the cause."""
        if self._cause is None:
            self._cause = cause
        self._stream.pipe.close()
        for connection in self._connections:
            connection.end(self._cause)
        self._deadline.end(self._cause)
        set_done(self.lost)
        self._wake()

    async def close(self) -> None:
        """Close all connections; return when no task and no descriptor of the session is left. May be called again."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._fail(ConnectionAbortedError("this side closed the session"))
        for timer in (self._grace, self._overdue):
            if timer is not None:
                timer.cancel()
        self._beating.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._stream.pipe.wait_closed()
        for connection in self._connections:
            await connection.wait_closed()
