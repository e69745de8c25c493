# SPDX-License-Identifier: GPL-2.0-or-later
"""A data connection: frames over TCP, in both directions.

    u16 magic | u16 header bytes | u32 payload bytes | header | payload      (big endian)

A frame is sent in one call, from where its payload lies. It is received in two: the first gets what is before the
payload and a little of it, the second the rest, right into the buffer that the caller gets. Nothing else copies a
payload, and nothing looks into it.
"""

from __future__ import annotations

import asyncio
import struct

from typing_extensions import override

from proto_v3.errors import LocalProtocolError, PeerProtocolError
from proto_v3.timeline import Resource
from proto_v3.wire.channel import Transport
from proto_v3.wire.frames import MAX_HEADER_BYTES, Payload
from sim.live.buffers import Buffers, as_view
from sim.live.io import Pipe
from sim.live.merge_timelines import LATEST, MAX_SPANS, ProcessTimeline
from sim.live.tcp.sockets import Granted, reason

FRAME_MAGIC = 0x5633
_PREFIX = struct.Struct("!HHI")
PREFIX_BYTES = _PREFIX.size
AHEAD_BYTES = 4096
"""The most that the first call receives: several frames, if they have no payload."""
SMALL_BYTES = 64 << 10
"""A payload of up to this size gets memory of its own, and so does one that would leave half of a buffer of the pool
empty: as many bytes may be kept as agreed on, and not as many buffers."""
HELD_UP_NS = 1_000_000
"""A send that takes longer waited for the other side."""

Received = tuple[bytes, memoryview]


class Frames:
    """The received bytes of a connection, cut into frames. It says where the next bytes go, and does no I/O."""

    def __init__(self, pool: Buffers) -> None:
        self._pool = pool
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._start = 0
        self._stop = 0
        self._header = b""
        self._payload: memoryview | None = None
        """Of the frame that is being received, once its length is known."""
        self._received = 0
        """Bytes of that payload."""

    def take(self) -> Received | None:
        """The next frame; None if it is not complete. PeerProtocolError if the bytes are no frame."""
        payload = self._parse()
        if payload is None or self._received < len(payload):
            return None
        self._payload = None
        return self._header, payload

    def room(self) -> memoryview:
        """Where the next bytes go."""
        if self._payload is not None:
            return self._payload[self._received :]
        size = self._stop - self._start
        if size == 0 or self._start + PREFIX_BYTES + MAX_HEADER_BYTES > AHEAD_BYTES:
            self._ahead[:size] = self._ahead[self._start : self._stop]
            self._start, self._stop = 0, size
        return self._ahead[self._stop :]

    def received(self, size: int) -> memoryview | None:
        """Called with the number of bytes that were received there, 0 at the end of the stream. Returns where the next
        bytes go, or None if a frame is complete."""
        if not size:
            inside = " in the middle of a frame" if self._payload is not None or self._start < self._stop else ""
            raise ConnectionResetError(f"the other side closed the connection{inside}")
        if self._payload is not None:
            self._received += size
        else:
            self._stop += size
        payload = self._parse()
        return None if payload is not None and self._received == len(payload) else self.room()

    def _parse(self) -> memoryview | None:
        """The payload of the frame that is being received, complete or not; None while its length is not known."""
        size = self._stop - self._start
        if self._payload is not None or size < PREFIX_BYTES:
            return self._payload
        magic, header_bytes, payload_bytes = _PREFIX.unpack_from(self._ahead, self._start)
        if magic != FRAME_MAGIC:
            raise PeerProtocolError(f"a frame begins with {FRAME_MAGIC:#06x}, not with {magic:#06x}")
        if not 1 <= header_bytes <= MAX_HEADER_BYTES:
            raise PeerProtocolError(f"a header of {header_bytes} bytes; 1 to {MAX_HEADER_BYTES} are allowed")
        if payload_bytes > self._pool.size_bytes:
            raise PeerProtocolError(
                f"a payload of {payload_bytes} bytes; at most {self._pool.size_bytes} were agreed on"
            )
        if size < PREFIX_BYTES + header_bytes:
            return None
        at = self._start + PREFIX_BYTES
        self._header = bytes(self._ahead[at : at + header_bytes])
        at += header_bytes
        if payload_bytes > max(SMALL_BYTES, self._pool.size_bytes // 2):
            payload = self._pool.take()[:payload_bytes]
        else:
            payload = memoryview(bytearray(payload_bytes))
        self._received = min(payload_bytes, self._stop - at)
        payload[: self._received] = self._ahead[at : at + self._received]
        self._start = at + self._received
        self._payload = payload
        return payload


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
        self._frames = Frames(pool)
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
        head = memoryview(_PREFIX.pack(FRAME_MAGIC, len(header), len(view)) + header)
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
            if self._wrong is not None:
                raise PeerProtocolError(str(self._wrong))
            while self._receiving is not None or (frame := self._frames.take()) is None:
                await self._feed()
        except OSError as error:
            raise self._error(error) from error
        except PeerProtocolError as error:
            if self._wrong is None:
                self._wrong = PeerProtocolError(f"{self._name}: {error}")
                self.pipe.close()
            raise PeerProtocolError(str(self._wrong)) from None
        return frame

    async def _feed(self) -> None:
        """Return when a frame is complete. If the caller is cancelled, receiving goes on."""
        if self._receiving is None:
            self._receiving = self.pipe.feed(self._frames.room(), self._frames.received)
        try:
            if self._receiving.done():
                await asyncio.sleep(0)  # let other tasks run
            await asyncio.shield(self._receiving)
        finally:
            if self._receiving.done():
                self._receiving = None

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
