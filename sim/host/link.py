# SPDX-License-Identifier: GPL-2.0-or-later
"""The network between the two hosts: connections with a bounded buffer, each with a rate limit, on one shared link.

Both directions have the link's full bandwidth. A frame that is sent takes its place on its connection and on the link.
It has left when both have carried it, and arrives half a round trip later. The buffer (TCP's send and receive buffers
together) counts the bytes that are sent and not yet received by the application. Its room comes back half a round trip
after they are received.

A connection can be cut, as by a TCP reset. Both ends learn of it at once, and frames that were not received are lost.
When a side ends, all connections are closed: frames that were sent still arrive.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque

from proto_v3.notify import Notify
from proto_v3.timeline import NO_CAUSE, Resource, Timeline, cause, caused_by
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns
from sim.clock.virtual import VirtualLoop
from sim.resource import FifoServer, wake_up
from sim.scenario.tables import Link


class ClosedError(ConnectionResetError):
    """A side has ended, and closed its connections."""


class _OneWay:
    """One direction of a connection."""

    def __init__(
        self,
        settings: Link,
        link: FifoServer,
        loop: VirtualLoop,
        timeline: Timeline,
        name: str,
        wake_up_ns: int,
        part_bytes: int | None,
    ) -> None:
        self._part_bytes = part_bytes
        self._link = link
        self._loop = loop
        self._connection = FifoServer(settings.per_connection_bytes_per_s)
        self._buffer_bytes = settings.socket_buffer_bytes
        self._latency_ns = settings.latency_ns
        self._timeline = timeline
        self._name = name
        self._wake_up_ns = wake_up_ns
        self._in_flight_bytes = 0
        self._arrived: deque[tuple[bytes, Payload]] = deque()
        self._room = Notify()
        self._turn = asyncio.Lock()
        self._in_turn = 0  # sends that wait for their turn or for room
        self._turn_given_by = NO_CAUSE
        self._arrival = Notify()
        self._gone: ConnectionResetError | None = None
        self.last_arrival_ns = 0
        self.wakeups = 0  # waits in send() and recv() that ended

    async def send(self, header: bytes, payload: Payload) -> None:
        size = len(header) + len(payload)
        # A frame that is larger than the buffer goes when the connection is empty.
        start = now_ns()
        left = size
        if self._in_turn or self._gone is not None or not self._has_room(size):
            left = await self._wait_for_room(size, start)
            if now_ns() > start:
                self._timeline.blocked(start)
                start = now_ns()
        arrival = self._take(left, start) + self._latency_ns
        self._turn_given_by = cause()
        span = self._timeline.span(Resource.LINK, "frame", start, arrival, track=self._name)
        self._loop.call_at_ns(arrival, self._arrive, header, payload, span)
        self.last_arrival_ns = arrival

    def _take(self, size: int, now: int) -> int:
        """Put bytes on their way; returns when connection and link have carried them."""
        self._in_flight_bytes += size
        return max(self._connection.book(size, now)[1], self._link.book(size, now)[1])

    def _has_room(self, size: int) -> bool:
        return not self._in_flight_bytes or self._in_flight_bytes + size <= self._buffer_bytes

    async def _wait_for_room(self, size: int, asked: int) -> int:
        """Wait until there is room for a frame, or its last part; returns its bytes that are not on their way yet."""
        left = size
        self._in_turn += 1
        try:
            async with self._turn:  # a small frame does not overtake a large one that waits for room
                if now_ns() > asked:
                    caused_by(self._turn_given_by)
                self._check_there()
                while not self._has_room(left):
                    left -= self._take_parts(left)
                    await self._room.wait()
                    self.wakeups += 1
                    if self._wake_up_ns:
                        await wake_up(self._timeline, self._wake_up_ns)
                    self._check_there()
        except BaseException:  # what went of it is lost, and holds no room
            self._in_flight_bytes -= size - left
            raise
        finally:
            self._in_turn -= 1
        return left

    def _take_parts(self, size: int) -> int:
        """Put the parts of a frame on their way that there is room for; returns how many bytes these are."""
        if self._part_bytes is None or size > self._buffer_bytes:
            return 0
        room = self._buffer_bytes - self._in_flight_bytes
        parts = room - room % self._part_bytes
        if parts > 0:
            self._take(parts, now_ns())
        return max(0, parts)

    def _arrive(self, header: bytes, payload: Payload, span: int) -> None:
        if self._gone is None:
            self._arrived.append((header, payload))
            self._arrival.notify(by=span)

    async def recv(self) -> tuple[bytes, Payload]:
        while not self._arrived:
            self._check_there()
            await self._arrival.wait()
            self.wakeups += 1
            if self._wake_up_ns:
                await wake_up(self._timeline, self._wake_up_ns)
        header, payload = self._arrived.popleft()
        self._loop.call_later_ns(self._latency_ns, self._give_room, len(header) + len(payload))
        return header, payload

    def _give_room(self, size: int) -> None:
        self._in_flight_bytes -= size
        if self._room.waited_for:
            # A timer runs in the context of who set it: the span's cause is what the receiver did last.
            now = now_ns()
            span = self._timeline.span(Resource.LINK, "window update", now - self._latency_ns, now, track=self._name)
            self._room.notify(by=span)

    def go(self, error: ConnectionResetError, *, lost: bool) -> None:
        """Nothing can be sent any more. Frames that have arrived can be received, unless they are `lost`."""
        if lost:
            self._arrived.clear()
        self._gone = self._gone or error
        self._room.notify()
        self._arrival.notify()

    def _check_there(self) -> None:
        if self._gone is not None:
            raise type(self._gone)(*self._gone.args)


class ConnectionEnd:
    """One end of a connection (proto_v3.wire.channel.Transport): sends one way, receives the other."""

    def __init__(self, name: str, out: _OneWay, into: _OneWay) -> None:
        self.name = name
        self.send = out.send
        self.recv = into.recv
        self._ways = (out, into)

    def cut(self) -> None:
        """Reset the connection at both ends at once: frames that are on their way or not received are lost.

        Every send() and recv() that waits or is called later raises ConnectionResetError.
        """
        for way in self._ways:
            way.go(ConnectionResetError(errno.ECONNRESET, f"{self.name} was cut"), lost=True)


class NetworkLink:
    """The link; connections are made over it."""

    def __init__(
        self,
        settings: Link,
        loop: VirtualLoop,
        timeline: Timeline,
        wake_up_ns: int = 0,
        part_bytes: int | None = None,
    ) -> None:
        """`wake_up_ns`: what a thread takes to run again that waited for data or for room. `part_bytes`: a frame goes
        in parts of this size as room becomes free for them; None: as a whole."""
        self._settings = settings
        self._part_bytes = part_bytes
        self._wake_up_ns = wake_up_ns
        self._loop = loop
        self._timeline = timeline
        self._there, self._back = FifoServer(settings.bytes_per_s), FifoServer(settings.bytes_per_s)
        self._ways: list[_OneWay] = []

    @property
    def wakeups(self) -> int:
        """Of both hosts: waits in send() and recv() that ended."""
        return sum(way.wakeups for way in self._ways)

    def connect(self, name: str) -> tuple[ConnectionEnd, ConnectionEnd]:
        """A new connection; returns the source's end and the target's."""
        ways = [("", self._there), (" back", self._back)]
        there, back = (
            _OneWay(self._settings, link, self._loop, self._timeline, name + way, self._wake_up_ns, self._part_bytes)
            for way, link in ways
        )
        self._ways += [there, back]
        return ConnectionEnd(name, there, back), ConnectionEnd(name, back, there)

    def close(self) -> None:
        """A side has ended, and with it all connections. The other side learns it when sent frames have arrived."""
        latest_ns = max((way.last_arrival_ns for way in self._ways), default=0)
        self._loop.call_at_ns(max(latest_ns, now_ns()), self._closed)

    def _closed(self) -> None:
        for way in self._ways:
            way.go(ClosedError(errno.ECONNRESET, "the other side closed the connection"), lost=False)
