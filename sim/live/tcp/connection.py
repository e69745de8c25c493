# SPDX-License-Identifier: GPL-2.0-or-later
"""A data connection: frames over TCP, in both directions.

    u16 magic | u16 header bytes | u32 payload bytes | header, filled up to 64 bytes | payload      (big endian)

A frame is sent in one call, from where its payload lies. All before the payload has one size, so each call that
receives knows how many bytes it needs; the payload comes right into the buffer that the caller gets. Nothing else
copies a payload, and nothing looks into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque

from typing_extensions import override

from proto_v3.errors import LocalProtocolError, PeerProtocolError
from proto_v3.timeline import Resource
from proto_v3.wire.channel import Transport
from proto_v3.wire.frames import MAX_HEADER_BYTES, Payload
from sim.live.buffers import Buffers, as_view
from sim.live.io import Pipe, Views, received
from sim.live.merge_timelines import LATEST, MAX_SPANS, ProcessTimeline
from sim.live.tcp.sockets import Granted, reason

FRAME_MAGIC = 0x5633
HEAD = struct.Struct(f"!HHI{MAX_HEADER_BYTES}s")
SMALL_BYTES = 64 << 10
"""A payload of up to this size gets memory of its own, and so does one that would leave half of a buffer of the pool
empty: as many bytes may be kept as agreed on, and not as many buffers."""
HELD_UP_NS = 1_000_000
"""A send that takes longer waited for the other side."""

Received = tuple[bytes, memoryview]


def next_frame(pool: Buffers, frames: deque[Received]) -> Views:
    """Where the bytes of the next frame go; it is appended to `frames`. PeerProtocolError if the bytes are no frame."""
    head = memoryview(bytearray(HEAD.size))
    yield head
    magic, header_bytes, payload_bytes, header = HEAD.unpack(head)
    if magic != FRAME_MAGIC:
        raise PeerProtocolError(f"a frame begins with {FRAME_MAGIC:#06x}, not with {magic:#06x}")
    if not 1 <= header_bytes <= MAX_HEADER_BYTES:
        raise PeerProtocolError(f"a header of {header_bytes} bytes; 1 to {MAX_HEADER_BYTES} are allowed")
    if payload_bytes > pool.size_bytes:
        raise PeerProtocolError(f"a payload of {payload_bytes} bytes; at most {pool.size_bytes} were agreed on")
    if payload_bytes > max(SMALL_BYTES, pool.size_bytes // 2):
        payload = pool.take()[:payload_bytes]
    else:
        payload = memoryview(bytearray(payload_bytes))
    if payload_bytes:
        yield payload
    frames.append((header[:header_bytes], payload))


class Connection(Transport):
    """One data connection of a session, for one task in each direction at a time.

    If a task is cancelled, the stream of frames stays whole: a frame that is being sent is completed before any other;
    a frame that is being received goes to the next recv().
    """

    def __init__(self, pipe: Pipe, index: int, at_source: bool, granted: Granted, pool: Buffers) -> None:
        self.pipe = pipe
        self.granted = granted
        self.trace: ProcessTimeline | None = None
        self.cause: Exception | None = None
        """Why the session ended this connection, if it did."""
        self._name = f"data connection {index}"
        self._at_source = at_source
        self._out, self._in = f"to target {index}", f"to source {index}"
        if not at_source:
            self._out, self._in = self._in, self._out
        self._pool = pool
        self._sent = 0
        self._received = 0
        self._frames: deque[Received] = deque()
        """The one that was received and not taken, because a caller was cancelled."""
        self._receiving: asyncio.Future[None] | None = None
        self._in_turn = asyncio.Lock()
        self._wrong: PeerProtocolError | None = None

    # --- sending ------------------------------------------------------------------------------------------------------

    @override
    async def send(self, header: bytes, payload: Payload) -> None:
        view = as_view(payload)
        if not 1 <= len(header) <= MAX_HEADER_BYTES or len(view) > self._pool.size_bytes:
            allowed = f"at most {MAX_HEADER_BYTES} + {self._pool.size_bytes} are allowed"
            raise LocalProtocolError(f"{self._name}: a frame of {len(header)} + {len(view)} bytes; {allowed}")
        if self._wrong is not None:
            raise ConnectionAbortedError(f"given up: {self._wrong}")
        head = memoryview(HEAD.pack(FRAME_MAGIC, len(header), len(view), header))
        self._sent += 1
        trace, start_ns = self.trace, 0
        if trace is not None:
            start_ns = trace.now_ns()
            trace.sent(self._out, self._sent)
        try:
            await self.pipe.send_all([head, view] if len(view) else [head])
        except OSError as error:
            raise self._error(error) from error
        if trace is not None and trace.now_ns() - start_ns > HELD_UP_NS:
            trace.blocked(start_ns)
            trace.waited_for(Resource.LINK, "room in connection", f"{self._out} room", LATEST, start_ns)

    def _error(self, error: OSError) -> ConnectionError:
        if self.cause is not None:
            return connection_error(self.cause)
        return ConnectionResetError(f"{self._name}: {reason(error)}")

    # --- receiving ----------------------------------------------------------------------------------------------------

    @override
    async def recv(self) -> tuple[bytes, Payload]:
        """The next header and payload. ConnectionError when the connection is gone; PeerProtocolError if the bytes are
        no frame, and the connection is closed then; or if more came than a timeline has room for."""
        trace = self.trace
        start_ns = 0
        if trace is not None:
            start_ns = trace.now_ns()
            trace.sent(f"{self._in} room", self._received + 1)
        if self._received >= MAX_SPANS or (trace is not None and not self._at_source and trace.full):
            raise PeerProtocolError(f"{self._name}: more frames and records came than the {MAX_SPANS} that are taken")
        async with self._in_turn:
            header, payload = await self._next()
            self._received += 1
            count = self._received
        if trace is not None:
            trace.waited_for(Resource.LINK, "frame", self._in, count, start_ns)
        return header, payload

    async def _next(self) -> Received:
        try:
            while not self._frames:
                if self._wrong is not None:
                    raise PeerProtocolError(str(self._wrong))
                await self._feed()
        except OSError as error:
            raise self._error(error) from error
        return self._frames.popleft()

    async def _feed(self) -> None:
        """Return when a frame is complete, or wrong. If the caller is cancelled, receiving goes on."""
        if self._receiving is None:
            self._receiving = self.pipe.feed(next_frame(self._pool, self._frames))
        try:
            with contextlib.suppress(PeerProtocolError):
                await received(self._receiving)
        finally:
            if self._receiving.done():
                error = self._receiving.exception()  # also if the caller is cancelled, and will not raise it
                self._receiving = None
                if isinstance(error, PeerProtocolError):
                    self._wrong = PeerProtocolError(f"{self._name}: {error}")
                    self.pipe.close()

    # --- its end ------------------------------------------------------------------------------------------------------

    def end(self, cause: Exception) -> None:
        """Close it; every task that waits gets ConnectionError with this reason."""
        if self.cause is None:
            self.cause = cause
        self.pipe.close()

    async def wait_closed(self) -> None:
        """After end(): return when its descriptors are closed."""
        await self.pipe.wait_closed()


def connection_error(cause: Exception) -> ConnectionError:
    """A new error with the same text, for one of several tasks that wait."""
    if isinstance(cause, ConnectionError):
        return type(cause)(*cause.args)
    return ConnectionAbortedError(f"given up: {cause}")
