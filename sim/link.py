"""The network between the two hosts: connections with a bounded buffer, each with a rate limit, on one shared link.

Both directions have the link's full bandwidth. A frame takes its place on its connection and on the link when it is
sent, is through when both are, and arrives half a round trip later. The buffer (TCP's send and receive buffers
together) counts the bytes that are sent and not yet received by the application; its room comes back half a round
trip after that.
"""

from __future__ import annotations

import asyncio
from collections import deque

from proto_v3.bell import Bell
from proto_v3.channel import Transport
from proto_v3.frames import Payload
from proto_v3.timeline import Resource, Timeline
from sim.clock import VirtualLoop, now_ns
from sim.resource import Pipe
from sim.schema import BYTES_PER_S_PER_GBIT, MIB
from sim.sections import Link


class _OneWay:
    """One direction of a connection."""

    def __init__(self, settings: Link, link: Pipe, loop: VirtualLoop, timeline: Timeline, name: str) -> None:
        self._link = link
        self._loop = loop
        self._connection = Pipe(settings.per_connection_gbit_per_s * BYTES_PER_S_PER_GBIT)
        self._buffer_bytes = round(settings.socket_buffer_mib * MIB)
        self._latency_ns = round(settings.round_trip_us * 500)
        self._timeline = timeline
        self._name = name
        self._in_flight_bytes = 0
        self._arrived: deque[tuple[bytes, Payload]] = deque()
        self._room = Bell()
        self._turn = asyncio.Lock()
        self._arrival = Bell()

    async def send(self, header: bytes, payload: Payload) -> None:
        size = len(header) + len(payload)
        # A frame that is larger than the buffer goes when the connection is empty.
        asked = now_ns()
        async with self._turn:  # a small frame does not overtake a large one that waits for room
            while self._in_flight_bytes and self._in_flight_bytes + size > self._buffer_bytes:
                await self._room.wait()
            self._in_flight_bytes += size
        start = now_ns()
        if start > asked:
            self._timeline.blocked(asked)
        through = max(self._connection.book(size, start)[1], self._link.book(size, start)[1])
        arrival = through + self._latency_ns
        span = self._timeline.span(Resource.LINK, "frame", start, arrival, track=self._name)
        self._loop.call_at_ns(arrival, self._arrive, header, payload, span)

    def _arrive(self, header: bytes, payload: Payload, span: int) -> None:
        self._arrived.append((header, payload))
        self._arrival.ring(by=span)

    async def recv(self) -> tuple[bytes, Payload]:
        while not self._arrived:
            await self._arrival.wait()
        header, payload = self._arrived.popleft()
        self._loop.call_later_ns(self._latency_ns, self._give_room, len(header) + len(payload))
        return header, payload

    def _give_room(self, size: int) -> None:
        self._in_flight_bytes -= size
        if self._room.waited_for:
            # A timer runs in the context of who set it: the span's cause is what the receiver did last.
            now = now_ns()
            span = self._timeline.span(Resource.LINK, "window update", now - self._latency_ns, now, track=self._name)
            self._room.ring(by=span)


class _End:
    """One end of a connection: sends one way, receives the other."""

    def __init__(self, out: _OneWay, into: _OneWay) -> None:
        self.send = out.send
        self.recv = into.recv


class NetworkLink:
    """The link; connections are made over it."""

    def __init__(self, settings: Link, loop: VirtualLoop, timeline: Timeline) -> None:
        self._settings = settings
        self._loop = loop
        self._timeline = timeline
        bytes_per_s = settings.gbit_per_s * BYTES_PER_S_PER_GBIT
        self._there, self._back = Pipe(bytes_per_s), Pipe(bytes_per_s)

    def connect(self, name: str) -> tuple[Transport, Transport]:
        """A new connection; returns the source's end and the target's."""
        there = _OneWay(self._settings, self._there, self._loop, self._timeline, name)
        back = _OneWay(self._settings, self._back, self._loop, self._timeline, f"{name} back")
        return _End(there, back), _End(back, there)
