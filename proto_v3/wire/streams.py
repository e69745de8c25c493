# SPDX-License-Identifier: GPL-2.0-or-later
"""How v3's streams share the connections: one connection each, a pool of connections, or the first one for all.

A *wire stream* carries one stream of one device, or what one thread reads of its blocks. Its index is 0 for the
device's critical stream, and 1 or more for the dirty ones. A wire stream keeps its order. There is no order between two
wire streams. With a connection each, TCP does all of this: a stream that is held up holds up no other.

Where wire streams share connections, this module does it. A frame may take any of the connections. Frames are numbered
in each wire stream, and the target puts them back in order. The memory for that is bounded by credit, by this
invariant: for each device, and for each of the classes critical and dirty,

    sent <= granted

`sent` counts payload bytes from the start; `granted` is the target's credit and all bytes that it gave back since. The
target gives credit back when its driver took the bytes. So the target holds at most the credit, in whatever order the
frames arrive. Each class has its own credit: a dirty stream that waits for its epoch uses no room that critical data
needs. The task that receives never waits for a driver, and of the frames that wait to be sent, critical ones go first.

Both ways implement one interface, OutStreams at the source and InStreams at the target.
"""

from __future__ import annotations

import abc
import asyncio
import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from proto_v3.errors import PeerProtocolError
from proto_v3.notify import Notify, Woken
from proto_v3.timeline import Work, cause, caused_by
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind

OnHeld = Callable[[int], None]
"""Called with the change of bytes held in the target VMM's memory: positive when received, negative when the driver
took them."""


class Wire(enum.StrEnum):
    """Which connections the wire streams use. The first connection always has RAM and control."""

    STREAMS = "streams"  # a connection for each wire stream
    POOL = "pool"  # all wire streams share a pool
    ONE = "one"  # all wire streams share the first connection


@dataclass(frozen=True, slots=True)
class Credits:
    """The most payload bytes of one device that may be sent and not yet taken by its driver at the target."""

    critical_bytes: int
    dirty_bytes: int

    def of(self, index: int) -> int:
        """Bytes of the class that wire stream `index` belongs to."""
        return self.dirty_bytes if index else self.critical_bytes


class OutStream(Protocol):
    """A wire stream at the source."""

    async def send(self, frame: Frame) -> None:
        """Return when a connection took the frame. Waits for room, and for credit where there is one."""


class InStream(Protocol):
    """A wire stream at the target."""

    async def recv(self) -> Frame:
        """The stream's next frame. PeerProtocolError if it belongs to another stream."""

    async def done(self, frame: Frame) -> None:
        """The driver took the frame's payload: give its room back."""


class OutStreams(abc.ABC):
    """All wire streams at the source."""

    @abc.abstractmethod
    def stream(self, device: int, index: int) -> OutStream:
        """Wire stream `index` of a device."""

    def work(self) -> list[Work]:
        """Tasks that must run beside, until they are cancelled."""
        return []

    def credited(self, frame: Frame) -> bool:
        """Take a CREDIT frame. False if no credit is used, or there is no such device or class."""
        return False


class InStreams(abc.ABC):
    """All wire streams at the target."""

    @abc.abstractmethod
    def stream(self, device: int, index: int) -> InStream:
        """Wire stream `index` of a device."""

    def work(self) -> list[Work]:
        """Tasks that must run beside, until they are cancelled."""
        return []

    def arrived(self, frame: Frame) -> bool:
        """Take a frame that came on the first connection. False if it does not belong to a wire stream."""
        return False


# --- a connection each ------------------------------------------------------------------------------------------------


class OwnOutStreams(OutStreams):
    """Each wire stream is the channel of its own connection. `streams`: wire streams of each device."""

    def __init__(self, channels: Sequence[Channel], streams: int) -> None:
        self._channels = channels
        self._streams = streams

    @override
    def stream(self, device: int, index: int) -> OutStream:
        return self._channels[1 + device * self._streams + index]


class _OwnIn(InStream):
    def __init__(self, channel: Channel, device: int, index: int, on_held: OnHeld) -> None:
        self._channel = channel
        self._expected = (device, index)
        self._on_held = on_held

    @override
    async def recv(self) -> Frame:
        frame = await self._channel.recv()
        if (frame.device, frame.stream) != self._expected:
            raise PeerProtocolError(f"device {frame.device} stream {frame.stream} on the connection of another")
        self._on_held(len(frame.payload))
        return frame

    @override
    async def done(self, frame: Frame) -> None:
        self._on_held(-len(frame.payload))  # the connection's own window is all the credit that there is


class OwnInStreams(InStreams):
    """Each wire stream has a connection of its own. `streams`: wire streams of each device."""

    def __init__(self, channels: Sequence[Channel], streams: int, on_held: OnHeld) -> None:
        self._channels = channels
        self._streams = streams
        self._on_held = on_held

    @override
    def stream(self, device: int, index: int) -> InStream:
        return _OwnIn(self._channels[1 + device * self._streams + index], device, index, self._on_held)


# --- shared connections -----------------------------------------------------------------------------------------------


class _Credit:
    """Keeps sent <= granted, for one class of one device, at the source.

    The exception: a frame larger than the whole credit is sent when all that was sent before was given back.
    """

    def __init__(self, size: int, woken: Woken | None) -> None:
        self._size = size
        self._sent = 0
        self._granted = size
        self._notify = Notify(woken)

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may be sent, and count them as sent."""
        while self._sent + min(size, self._size) > self._granted:
            await self._notify.wait()
        self._sent += size

    def give(self, size: int) -> None:
        outstanding = self._sent + self._size - self._granted
        if size > outstanding:
            raise PeerProtocolError(f"{size} bytes of credit came back, {outstanding} were out")
        self._granted += size
        self._notify.notify()


class _SharedOut(OutStream):
    def __init__(self, streams: SharedOutStreams, credit: _Credit, critical: bool) -> None:
        self._streams = streams
        self._credit = credit
        self._critical = critical
        self._place = 0

    @override
    async def send(self, frame: Frame) -> None:
        await self._credit.take(len(frame.payload))
        self._place += 1
        await self._streams.carry(frame._replace(place=self._place), self._critical)


_Carried = tuple[Frame, asyncio.Future[int]]
"""A frame, and the future that is done, with the cause, when a connection took the frame."""


class SharedOutStreams(OutStreams):
    """A free connection takes the next frame, critical frames first. Invariant: sent <= granted, see the module.

    Of several free connections, the frame goes to the one that has been free for longest. Otherwise one socket would be
    filled before the next gets anything, and a bounded credit would keep only a few of many connections busy.
    """

    def __init__(self, channels: Sequence[Channel], devices: int, credits: Credits, woken: Woken | None = None) -> None:
        """`woken`: of the threads that wait for credit, for a connection, or for a frame to send."""
        self._channels = channels
        self._woken = woken
        self._credits = [[_Credit(credits.of(index), woken) for index in (0, 1)] for _ in range(devices)]
        self._critical: deque[_Carried] = deque()
        self._dirty: deque[_Carried] = deque()
        self._free: deque[asyncio.Future[tuple[_Carried, int]]] = deque()
        """Senders that wait for a frame, the one that has waited longest first. Each gets a frame and its cause."""

    @override
    def stream(self, device: int, index: int) -> OutStream:
        return _SharedOut(self, self._credits[device][index > 0], critical=index == 0)

    @override
    def work(self) -> list[Work]:
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
        await self._wake_up()

    async def _next(self) -> _Carried:
        """The next frame for a free sender."""
        if waiting := self._critical or self._dirty:
            return waiting.popleft()
        turn: asyncio.Future[tuple[_Carried, int]] = asyncio.get_running_loop().create_future()
        self._free.append(turn)
        carried, caused = await turn
        caused_by(caused)
        await self._wake_up()
        return carried

    async def _wake_up(self) -> None:
        if self._woken is not None:
            await self._woken()

    async def _send(self, channel: Channel) -> None:
        while True:
            frame, sent = await self._next()
            await channel.send(frame)
            if not sent.done():
                sent.set_result(cause())

    @override
    def credited(self, frame: Frame) -> bool:
        if frame.device >= len(self._credits) or frame.stream > 1:
            return False
        self._credits[frame.device][frame.stream].give(frame.value)
        return True


MIN_FRAMES = 1024
LEAST_BYTES = 512
"""A frame's payload, on average: a record has at least one block, and a shorter read() is the record's last one."""


def most_frames(size_bytes: int) -> int:
    """The most frames that may wait with a room of `size_bytes`: frames cost memory, too, even empty ones."""
    return MIN_FRAMES + size_bytes // LEAST_BYTES


class _Room:
    """Checks sent <= granted, for one class of one device, at the target: held + not given back <= credit.

    The exception is that of _Credit: a frame larger than the credit is accepted when nothing is held.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = 0
        self._frames = 0
        self._taken = 0  # bytes that the driver took, whose credit was not given back yet

    def put(self, size: int) -> None:
        if self._held and self._held + self._taken + size > self._size:
            raise PeerProtocolError(f"{size} bytes more than {self._held} came; the credit is {self._size}")
        if self._frames >= most_frames(self._size):
            raise PeerProtocolError(f"{self._frames} frames wait, with {self._held} bytes: no sender needs so many")
        self._frames += 1
        self._held += size

    def take(self, size: int) -> int:
        """The driver took `size` bytes. Returns the credit to give back now: 0 most times, as each message costs."""
        self._frames -= 1
        self._held -= size
        self._taken += size
        if self._held and self._taken < self._size // 4:
            return 0
        back, self._taken = self._taken, 0
        return back


class _SharedIn(InStream):
    def __init__(self, streams: SharedInStreams, woken: Woken | None) -> None:
        self._streams = streams
        self._early: dict[int, Frame] = {}
        self._due = 1
        self._notify = Notify(woken)

    def put(self, frame: Frame) -> None:
        if frame.place < self._due or frame.place in self._early:
            raise PeerProtocolError(f"frame {frame.place} of device {frame.device} stream {frame.stream} came again")
        self._early[frame.place] = frame
        self._notify.notify()

    @override
    async def recv(self) -> Frame:
        while self._due not in self._early:
            await self._notify.wait()
        self._due += 1
        return self._early.pop(self._due - 1)

    @override
    async def done(self, frame: Frame) -> None:
        await self._streams.taken(frame)


class SharedInStreams(InStreams):
    """Puts the frames of shared connections back in order. Invariant: sent <= granted, see the module.

    Credit goes back on the connection `first`. `streams`: wire streams of each device.
    """

    def __init__(
        self,
        first: Channel,
        channels: Sequence[Channel],
        devices: int,
        streams: int,
        credits: Credits,
        on_held: OnHeld,
        woken: Woken | None = None,
    ) -> None:
        """`woken`: of the threads that wait for a frame of their stream."""
        self._first = first
        self._on_held = on_held
        self._channels = channels
        self._rooms = [[_Room(credits.of(index)) for index in (0, 1)] for _ in range(devices)]
        self._streams = [[_SharedIn(self, woken) for _ in range(streams)] for _ in range(devices)]

    @override
    def stream(self, device: int, index: int) -> InStream:
        return self._streams[device][index]

    @override
    def work(self) -> list[Work]:
        others = [channel for channel in self._channels if channel is not self._first]  # the first has a reader already
        return [(self._receive(channel), f"target pool {i}") for i, channel in enumerate(others)]

    async def _receive(self, channel: Channel) -> None:
        while True:
            frame = await channel.recv()
            if not self.arrived(frame):
                raise PeerProtocolError(f"{frame.kind.name} without a place on a shared connection")
            del frame  # its payload's memory is free once it is loaded

    @override
    def arrived(self, frame: Frame) -> bool:
        if not frame.place:
            return False
        if frame.device >= len(self._streams) or frame.stream >= len(self._streams[frame.device]):
            raise PeerProtocolError(f"there is no stream {frame.stream} of device {frame.device}")
        self._rooms[frame.device][frame.stream > 0].put(len(frame.payload))
        self._on_held(len(frame.payload))
        self._streams[frame.device][frame.stream].put(frame)
        return True

    async def taken(self, frame: Frame) -> None:
        """The driver took the frame's payload: give credit back, if it is worth a message."""
        self._on_held(-len(frame.payload))
        critical_or_dirty = int(frame.stream > 0)
        back = self._rooms[frame.device][critical_or_dirty].take(len(frame.payload))
        if back:
            await self._first.send_control(Kind.CREDIT, frame.device, critical_or_dirty, back)
