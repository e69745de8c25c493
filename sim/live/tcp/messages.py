"""The messages of the session: their fields with their bounds, and how they go over a connection.

    u32 length (big endian) | msgpack map of the fields and a "kind"

They may come from another host, so every length and count is checked before it is believed: msgpack allocates a list as
long as an array claims to be, and one byte on the wire can become sixty in memory. Large data must be sent as bytes.
`sim.live.plain` checks types and bounds of the fields; PeerProtocolError names the field that is wrong.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from reprlib import repr as short
from typing import Annotated, Any, TypeVar

import msgpack

from proto_v3.errors import LocalProtocolError, PeerFailedError, PeerProtocolError
from sim.live.io import Pipe, fill
from sim.live.plain import Within, from_plain, to_plain
from sim.live.tcp.sockets import TOKEN_BYTES, reason

MAX_HANDSHAKE_BYTES = 1 << 20
MAX_HANDSHAKE_ITEMS = 10_000
MAX_MESSAGE_BYTES = 64 << 20
"""After the handshake: results travel in messages, with timelines."""
MAX_MESSAGE_ITEMS = 1 << 20
"""Values, keys and containers in a message, nested ones included."""
MAX_KIND_CHARS = 32
PIECE_BYTES = 1 << 18
"""Memory for a message is allocated as its bytes come, not as its length claims."""
_LENGTH = struct.Struct("!I")

MAX_WHY_CHARS = 2000
MAX_BOOT_ID_CHARS = 64
MAX_SCENARIO_CHARS = 256 << 10
MAX_TIME_NS = 2**62

BootId = Annotated[str, Within(0, MAX_BOOT_ID_CHARS)]
Time = Annotated[int, Within(-MAX_TIME_NS, MAX_TIME_NS)]
Size = Annotated[int, Within(0, 2**63 - 1)]


def printable(text: str) -> str:
    """Text of the other side, to be shown: cut to MAX_WHY_CHARS, and without characters that a terminal acts on."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text[:MAX_WHY_CHARS])


@dataclass(frozen=True, slots=True)
class Message:
    """A message. Its kind on the wire is the name of the class, in lower case."""

    @classmethod
    def kind(cls) -> str:
        """What the wire calls it."""
        return cls.__name__.lower()


# --- the handshake ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What is run: the source decides it, and offers it to the target."""

    scenario: Annotated[str, Within(0, MAX_SCENARIO_CHARS)]
    """As JSON."""
    protocol: str
    seed: Size


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """Source: what it asks for."""

    frame_bytes: Size
    """The largest payload of a frame, either way."""
    connections: Size
    """Data connections."""
    boot_id: BootId
    run: Run


@dataclass(frozen=True, slots=True)
class Accept(Message):
    """Target: the offer is accepted."""

    boot_id: BootId
    token: Annotated[bytes, Within(TOKEN_BYTES, TOKEN_BYTES)]
    """Each data connection begins with it."""


@dataclass(frozen=True, slots=True)
class Refuse(Message):
    """Either side: the handshake is over."""

    why: str


class Connected(Message):
    """Target: all data connections are there."""


class ClockRequest(Message):
    """Source: what is the time at the target?"""


@dataclass(frozen=True, slots=True)
class ClockReply(Message):
    """Target: its time.perf_counter_ns()."""

    at_ns: Time


@dataclass(frozen=True, slots=True)
class Begin(Message):
    """Source: the session begins."""

    offset_ns: Time
    """The target's time.perf_counter_ns() minus the source's."""
    uncertainty_ns: Annotated[int, Within(0, MAX_TIME_NS)]
    """How far that may be off, either way."""


# --- the session ------------------------------------------------------------------------------------------------------


class Ping(Message):
    """Either side: it lives."""


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """Either side: it failed. The other side's receive_message() raises PeerFailedError with the reason."""

    why: str


class Prepared(Message):
    """Target: its device process has the memory."""


@dataclass(frozen=True, slots=True)
class Start(Message):
    """Source: when the run's time 0 is."""

    zero_ns: Time
    """On the target's time.perf_counter_ns()."""


class Started(Message):
    """Target: it runs on that time, too."""


@dataclass(frozen=True, slots=True)
class Result(Message):
    """Target: what it measured. The receiver checks the report."""

    report: Any


class Bye(Message):
    """Source: it wants nothing more."""


# --- as bytes ---------------------------------------------------------------------------------------------------------


M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message whose fields are not checked yet."""

    kind: str
    fields: dict[str, Any]
    size_bytes: int

    def read_as(self, *kinds: type[M]) -> M:
        """The message, which must be one of these. PeerProtocolError if it is not, or has a field that is wrong."""
        for each in kinds:
            if self.kind == each.kind():
                return from_plain(each, self.fields)
        due = " or ".join(each.kind().upper() for each in kinds)
        raise PeerProtocolError(f"the message {printable(self.kind).upper()} came where {due} was due")


def packed(message: Message, max_bytes: int = MAX_MESSAGE_BYTES, max_items: int = MAX_MESSAGE_ITEMS) -> bytes:
    """A message as it goes over the wire. LocalProtocolError if it cannot, or if the other side would not take it."""
    kind = message.kind()
    try:
        body: bytes = msgpack.packb({"kind": kind, **to_plain(message)})
        _check_items(body, max_items)
    except Exception as error:  # msgpack raises several unrelated types
        raise LocalProtocolError(f"{kind} cannot be sent: {error}") from error
    if len(body) > max_bytes:
        raise LocalProtocolError(f"{kind} would be a message of {len(body)} bytes; at most {max_bytes} are allowed")
    return _LENGTH.pack(len(body)) + body


def unpacked(body: bytes | bytearray, max_items: int) -> RawMessage:
    """The message in these bytes. PeerProtocolError for whatever is wrong with it."""
    _check_items(body, max_items)
    size = len(body)
    try:
        fields = msgpack.unpackb(
            body, max_str_len=size, max_bin_len=size, max_array_len=max_items, max_map_len=max_items, max_ext_len=0
        )
    except Exception as error:  # msgpack raises several unrelated types on bad input
        raise PeerProtocolError(f"a message that is not msgpack: {printable(str(error))}") from error
    if not isinstance(fields, dict):
        raise PeerProtocolError(f"a message that is not a map: {printable(short(fields))}")
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or not 0 < len(kind) <= MAX_KIND_CHARS:
        raise PeerProtocolError(f"a message of the kind {printable(short(kind))}")
    return RawMessage(kind, fields, size)


# What the first byte of a value says, by the msgpack specification: how many bytes follow it, or how wide the number is
# that gives their count.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED |= {first: 1 << (first & 3) for first in range(0xCC, 0xD4)}
_FIXED |= dict.fromkeys((*range(0x80), *range(0xE0, 0x100)), 0)
_FIXED |= {first: first & 31 for first in range(0xA0, 0xC0)}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Width of the count, and values for each that it counts."""


def _check_items(body: bytes | bytearray, max_items: int) -> None:
    """PeerProtocolError unless the body is one value, of allowed types, that has at most `max_items` values in all."""
    at, due, size = 0, 1, len(body)
    seen = 0
    while seen < due:
        if at >= size:
            raise PeerProtocolError("a message that ends too early")
        first = body[at]
        at += 1
        seen += 1
        if (skip := _FIXED.get(first)) is not None:
            at += skip
        elif (width := _SIZED.get(first)) is not None:
            at += width + int.from_bytes(body[at : at + width], "big")
        elif first < 0xA0:
            due += (first & 15) * (1 if first & 0x10 else 2)
        elif first in _CONTAINERS:
            width, each = _CONTAINERS[first]
            due += int.from_bytes(body[at : at + width], "big") * each
            at += width
        else:
            raise PeerProtocolError(f"a message with a value of type {first:#x}, which is not allowed")
        if due > max_items:
            raise PeerProtocolError(f"a message of more than {max_items} values")
    if at != size:
        raise PeerProtocolError(f"a message of {size} bytes whose value is {at} bytes long")


class MessageStream:
    """Messages over one connection, for one sender and one receiver at a time."""

    def __init__(self, pipe: Pipe, side: str, address: str) -> None:
        """`side` is what the other one is: source or target."""
        self.pipe = pipe
        self.address = address
        self.peer = f"the {side} at {address}"
        self.received_bytes = 0
        """Grows whenever bytes come, of a message that is not complete too."""
        self._max_bytes = MAX_HANDSHAKE_BYTES
        self._max_items = MAX_HANDSHAKE_ITEMS

    def handshake_done(self) -> None:
        """From now on messages may be long."""
        self._max_bytes = MAX_MESSAGE_BYTES
        self._max_items = MAX_MESSAGE_ITEMS

    async def send(self, message: Message) -> None:
        """Send a message, whole even if the caller is cancelled. ConnectionError if the connection is gone."""
        data = packed(message, self._max_bytes, self._max_items)
        try:
            await self.pipe.send_all([memoryview(data)])
        except OSError as error:
            raise self._lost(error) from error

    async def recv(self) -> RawMessage:
        """The next message. ConnectionError if the connection is gone. If the caller is cancelled, nobody may receive
        any more."""
        prefix = bytearray(_LENGTH.size)
        await self._fill(memoryview(prefix))
        (size,) = _LENGTH.unpack(prefix)
        if not 1 <= size <= self._max_bytes:
            raise PeerProtocolError(f"a message of {size} bytes; 1 to {self._max_bytes} are allowed")
        body = bytearray()
        while len(body) < size:
            piece = bytearray(min(PIECE_BYTES, size - len(body)))
            await self._fill(memoryview(piece))
            body += piece
        return unpacked(body, self._max_items)

    async def expect(self, *kinds: type[M]) -> M:
        """The next message of a handshake, which must be one of these.

        PeerFailedError if the other side refuses, PeerProtocolError if it is another one.
        """
        message = await self.recv()
        if message.kind == Refuse.kind():
            raise PeerFailedError(f"{self.peer} refuses: {printable(message.read_as(Refuse).why)}")
        return message.read_as(*kinds)

    async def refuse(self, why: str, limit_s: float = 1.0) -> None:
        """Send the reason for which this side ends the handshake, if the other side takes it soon."""
        try:
            async with asyncio.timeout(limit_s):
                await self.send(Refuse(printable(why)))
        except (OSError, LocalProtocolError):
            return

    async def _fill(self, view: memoryview) -> None:
        try:
            await fill(self.pipe, view)
        except OSError as error:
            raise self._lost(error) from error
        self.received_bytes += len(view)

    def _lost(self, error: OSError) -> ConnectionError:
        return ConnectionResetError(f"session with {self.peer}: {reason(error)}")
