"""Three ways of v3's streams over the wire: a connection each, one pool of connections, one for everything.

A *lane* carries one stream of one device; lane 0 of a device is the critical one. A lane keeps its order, and owes no
other lane anything. With a connection each, TCP does it all: a lane that is held back holds up nobody else.

Where lanes share connections, that has to be made. Frames of a lane may take any connection and are numbered; the
target puts them back in order, in memory that is bounded by credits: for each device, one for its critical lane and one
for all its dirty ones, so that a dirty lane that waits for its epoch uses up no room that the critical one needs.
Whoever receives never waits for a driver, and of what waits to be sent, critical frames go first.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from proto_v3.errors import PeerProtocolError
from proto_v3.notify import Notify
from proto_v3.timeline import cause, caused_by
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind

Work = tuple[Coroutine[Any, Any, None], str]
"""What a thread does, and the track it is drawn on."""
Hold = Callable[[int], None]
"""Told of so many bytes more that are in the target VMM's memory; less than 0: a driver took them."""


class Wire(enum.StrEnum):
    """How lanes map to connections, beside the first one, which has RAM and control."""

    STREAMS = "streams"  # a connection a lane
    POOL = "pool"  # all lanes share a pool
    ONE = "one"  # all lanes share the first connection


@dataclass(frozen=True, slots=True)
class Credits:
    """What a device's lanes may have sent that its driver at the target has not taken. Bytes."""

    critical_bytes: int
    dirty_bytes: int

    def of(self, lane: int) -> int:
        """Of the class that a lane is in."""
        return self.dirty_bytes if lane else self.critical_bytes


class OutStream(Protocol):
    """A lane at the source."""

    async def send(self, frame: Frame) -> None:
        """Return when a connection took it; waits for room, and for credit where there is one."""


class InStream(Protocol):
    """A lane at the target."""

    async def recv(self) -> Frame:
        """The lane's next frame."""

    async def done(self, frame: Frame) -> None:
        """The driver took what the frame brought."""


class OutStreams(Protocol):
    """All lanes at the source."""

    def lane(self, device: int, lane: int) -> OutStream:
        """One of them."""

    def work(self) -> list[Work]:
        """What has to run beside, until it is cancelled."""

    def credited(self, frame: Frame) -> bool:
        """A CREDIT came; False if there are none here."""


class InStreams(Protocol):
    """All lanes at the target."""

    def lane(self, device: int, lane: int) -> InStream:
        """One of them."""

    def work(self) -> list[Work]:
        """What has to run beside, until it is cancelled."""

    def arrived(self, frame: Frame) -> bool:
        """A frame came on the first connection; False if it is not a lane's."""


# --- a connection each ------------------------------------------------------------------------------------------------


class _OwnOut:
    def __init__(self, channel: Channel) -> None:
        self.send = channel.send


class _OwnIn:
    def __init__(self, channel: Channel, device: int, lane: int, hold: Hold) -> None:
        self._channel = channel
        self._of = (device, lane)
        self._hold = hold

    async def recv(self) -> Frame:
        frame = await self._channel.recv()
        if (frame.device, frame.stream) != self._of:
            raise PeerProtocolError(f"device {frame.device} stream {frame.stream} on the connection of another")
        self._hold(len(frame.payload))
        return frame

    async def done(self, frame: Frame) -> None:
        self._hold(-len(frame.payload))  # the connection's own window is all the credit that there is


class OwnConnections:
    """Connection 1 + device x lanes + lane."""

    def __init__(self, channels: Sequence[Channel], lanes: int) -> None:
        self._channels = channels
        self._lanes = lanes

    def _channel(self, device: int, lane: int) -> Channel:
        return self._channels[1 + device * self._lanes + lane]

    def work(self) -> list[Work]:
        """Nothing."""
        return []


class OwnOutStreams(OwnConnections):
    """See OutStreams."""

    def lane(self, device: int, lane: int) -> OutStream:
        """See OutStreams."""
        return _OwnOut(self._channel(device, lane))

    def credited(self, frame: Frame) -> bool:
        """There are no credits here."""
        return False


class OwnInStreams(OwnConnections):
    """See InStreams."""

    def __init__(self, channels: Sequence[Channel], lanes: int, hold: Hold) -> None:
        super().__init__(channels, lanes)
        self._hold = hold

    def lane(self, device: int, lane: int) -> InStream:
        """See InStreams."""
        return _OwnIn(self._channel(device, lane), device, lane, self._hold)

    def arrived(self, frame: Frame) -> bool:
        """No lane is on the first connection."""
        return False


# --- shared connections -----------------------------------------------------------------------------------------------


class _Credit:
    """What one class of a device's lanes may still send."""

    def __init__(self, size: int) -> None:
        self._all = self._left = size
        self._notify = Notify()

    async def take(self, size: int) -> None:
        """Wait for so much; a frame that is larger than all of it goes when nothing else is out."""
        while self._left < min(size, self._all):
            await self._notify.wait()
        self._left -= size

    def give(self, size: int) -> None:
        if self._left + size > self._all:
            raise PeerProtocolError(f"{size} bytes of credit came back, {self._all - self._left} were out")
        self._left += size
        self._notify.notify()


class _SharedOut:
    def __init__(self, lanes: SharedOutStreams, credit: _Credit, critical: bool) -> None:
        self._lanes = lanes
        self._credit = credit
        self._critical = critical
        self._place = 0

    async def send(self, frame: Frame) -> None:
        await self._credit.take(len(frame.payload))
        self._place += 1
        await self._lanes.carry(replace(frame, place=self._place), self._critical)


_Carried = tuple[Frame, asyncio.Future[int]]
"""A frame, and who is told when a connection took it."""


class SharedOutStreams:
    """See OutStreams: a connection that is free takes what comes next, critical frames first.

    Of several that are free, the one that has been for longest: else one socket would be filled before the next gets
    anything, and a bounded credit would keep a few of many connections busy.
    """

    def __init__(self, channels: Sequence[Channel], devices: int, credits: Credits) -> None:
        self._channels = channels
        self._credits = [[_Credit(credits.of(lane)) for lane in (0, 1)] for _ in range(devices)]
        self._critical: deque[_Carried] = deque()
        self._dirty: deque[_Carried] = deque()
        self._free: deque[asyncio.Future[tuple[_Carried, int]]] = deque()
        """Of the senders that wait for a frame, in the order in which they came to; with it comes what caused it."""

    def lane(self, device: int, lane: int) -> OutStream:
        """See OutStreams."""
        return _SharedOut(self, self._credits[device][lane > 0], critical=lane == 0)

    def work(self) -> list[Work]:
        """A sender a connection."""
        return [(self._send(channel), f"source pool {i}") for i, channel in enumerate(self._channels)]

    async def carry(self, frame: Frame, critical: bool) -> None:
        """Return when a connection took the frame."""
        sent: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        while self._free and self._free[0].done():  # it was cancelled
            self._free.popleft()
        if self._free:
            self._free.popleft().set_result(((frame, sent), cause()))
        else:
            (self._critical if critical else self._dirty).append((frame, sent))
        caused_by(await sent)

    async def _next(self) -> _Carried:
        """What a sender that is free is to send."""
        if waiting := self._critical or self._dirty:
            return waiting.popleft()
        turn: asyncio.Future[tuple[_Carried, int]] = asyncio.get_running_loop().create_future()
        self._free.append(turn)
        carried, caused = await turn
        caused_by(caused)
        return carried

    async def _send(self, channel: Channel) -> None:
        while True:
            frame, sent = await self._next()
            await channel.send(frame)
            if not sent.done():
                sent.set_result(cause())

    def credited(self, frame: Frame) -> bool:
        """See OutStreams."""
        if frame.device >= len(self._credits) or frame.stream > 1:
            return False
        self._credits[frame.device][frame.stream].give(frame.value)
        return True


MIN_FRAMES = 1024
LEAST_BYTES = 512
"""Of a frame, in the mean: a record has a block at the least, and a read() that is shorter is the record's last."""


class _Room:
    """What one class of a device's lanes has at the target, and what of its credit was not given back yet."""

    def __init__(self, size: int) -> None:
        self._all = size
        self._held = 0
        self._frames = 0
        self._taken = 0

    def put(self, size: int) -> None:
        if self._held and self._held + self._taken + size > self._all:
            raise PeerProtocolError(f"{size} bytes more than {self._held} came; the credit is {self._all}")
        if self._frames >= MIN_FRAMES + self._all // LEAST_BYTES:  # frames cost memory, too, even empty ones
            raise PeerProtocolError(f"{self._frames} frames wait, with {self._held} bytes: no sender needs so many")
        self._frames += 1
        self._held += size

    def take(self, size: int) -> int:
        """The driver took so much: how much credit to give back now. Not each time: a message costs."""
        self._frames -= 1
        self._held -= size
        self._taken += size
        if self._held and self._taken < self._all // 4:
            return 0
        back, self._taken = self._taken, 0
        return back


class _SharedIn:
    def __init__(self, lanes: SharedInStreams) -> None:
        self._lanes = lanes
        self._early: dict[int, Frame] = {}
        self._due = 1
        self._notify = Notify()

    def put(self, frame: Frame) -> None:
        if frame.place < self._due or frame.place in self._early:
            raise PeerProtocolError(f"frame {frame.place} of device {frame.device} stream {frame.stream} came again")
        self._early[frame.place] = frame
        self._notify.notify()

    async def recv(self) -> Frame:
        while self._due not in self._early:
            await self._notify.wait()
        self._due += 1
        return self._early.pop(self._due - 1)

    async def done(self, frame: Frame) -> None:
        await self._lanes.took(frame)


class SharedInStreams:
    """See InStreams. `first` is the first connection, on which credit goes back."""

    def __init__(
        self, first: Channel, channels: Sequence[Channel], devices: int, lanes: int, credits: Credits, hold: Hold
    ) -> None:
        self._first = first
        self._hold = hold
        self._channels = channels
        self._rooms = [[_Room(credits.of(lane)) for lane in (0, 1)] for _ in range(devices)]
        self._lanes = [[_SharedIn(self) for _ in range(lanes)] for _ in range(devices)]

    def lane(self, device: int, lane: int) -> InStream:
        """See InStreams."""
        return self._lanes[device][lane]

    def work(self) -> list[Work]:
        """A receiver a connection, but for the first one, which has one already."""
        others = [channel for channel in self._channels if channel is not self._first]
        return [(self._receive(channel), f"target pool {i}") for i, channel in enumerate(others)]

    async def _receive(self, channel: Channel) -> None:
        while True:
            frame = await channel.recv()
            if not self.arrived(frame):
                raise PeerProtocolError(f"{frame.kind.name} without a place on a shared connection")
            del frame  # its payload's memory is free once it is loaded

    def arrived(self, frame: Frame) -> bool:
        """See InStreams."""
        if not frame.place:
            return False
        if frame.device >= len(self._lanes) or frame.stream >= len(self._lanes[frame.device]):
            raise PeerProtocolError(f"there is no stream {frame.stream} of device {frame.device}")
        self._rooms[frame.device][frame.stream > 0].put(len(frame.payload))
        self._hold(len(frame.payload))
        self._lanes[frame.device][frame.stream].put(frame)
        return True

    async def took(self, frame: Frame) -> None:
        """The driver took what a frame brought."""
        self._hold(-len(frame.payload))
        critical_or_dirty = int(frame.stream > 0)
        back = self._rooms[frame.device][critical_or_dirty].take(len(frame.payload))
        if back:
            await self._first.send_control(Kind.CREDIT, frame.device, critical_or_dirty, back)
