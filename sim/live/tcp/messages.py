# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages of the session: their fields with their bounds, and how they go over a connection.

    u32 length (big endian) | msgpack map of the fields and a "kind"

They may come from another host, so every length and count is checked before it is believed: msgpack allocates a list as
long as an array claims to be, and one byte on the wire can become sixty in memory. Large data must be sent as bytes.
The kind comes first, and only a message that is due is received: each kind has a largest size, and each side of a
session sends its messages once, in their order. `sim.live.plain` checks types and bounds of the fields, and cleans
texts; PeerProtocolError names the field that is wrong.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgpack

from proto_v3.errors import LocalProtocolError, PeerFailedError, PeerProtocolError
from proto_v3.text import clean
from sim.live.io import Pipe, fill
from sim.live.plain import MAX_TEXT_CHARS, Within, from_plain, to_plain
from sim.live.tcp.sockets import TOKEN_BYTES, reason

MAX_SHORT_BYTES = 1 << 10
"""Of a message with a few numbers."""
MAX_WHY_BYTES = 16 << 10
MAX_OFFER_BYTES = 1 << 20
MAX_RESULT_BYTES = 64 << 20
"""A result has timelines in it."""
MAX_ITEMS = 64
"""Values, keys and containers in a message, nested ones included."""
MAX_RESULT_ITEMS = 1 << 18
MAX_KIND_CHARS = 32
HEAD_BYTES = 64
"""Has the kind."""
PIECE_BYTES = 1 << 18
"""Memory for a message is allocated as its bytes come, not as its length claims."""
_LENGTH = struct.Struct("!I")

MAX_BOOT_ID_CHARS = 64
MAX_SCENARIO_CHARS = 256 << 10
MAX_DRIVERS_CHARS = 8 << 10
MAX_TIME_NS = 2**62

BootId = Annotated[str, Within(0, MAX_BOOT_ID_CHARS)]
Time = Annotated[int, Within(-MAX_TIME_NS, MAX_TIME_NS)]
Size = Annotated[int, Within(0, 2**63 - 1)]


@dataclass(frozen=True, slots=True)
class Message:
    """A message. Its kind on the wire is the name of the class, in lower case."""

    max_bytes: ClassVar[int] = MAX_SHORT_BYTES
    max_items: ClassVar[int] = MAX_ITEMS

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
    drivers: Annotated[str, Within(0, MAX_DRIVERS_CHARS)] = ""
    """Of devices of the kernel: the driver of each, separated by commas. Empty: the devices are simulated."""


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """Source: what it asks for."""

    max_bytes: ClassVar[int] = MAX_OFFER_BYTES
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

    max_bytes: ClassVar[int] = MAX_WHY_BYTES
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

    max_bytes: ClassVar[int] = MAX_WHY_BYTES
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

    max_bytes: ClassVar[int] = MAX_RESULT_BYTES
    max_items: ClassVar[int] = MAX_RESULT_ITEMS
    report: Any


class Bye(Message):
    """Source: it wants nothing more."""


ORDER: dict[str, tuple[type[Message], ...]] = {"source": (Start, Bye), "target": (Prepared, Started, Result)}
"""What each side may send in a session, each once and in this order; PING and FAILED at any time."""


# --- as bytes ---------------------------------------------------------------------------------------------------------


M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class RawMessage(Generic[M]):
    """A message that was due, as it came: nothing of it is decoded yet."""

    kind: type[M]
    body: bytes | bytearray

    def read(self) -> M:
        """The message. PeerProtocolError for whatever is wrong with it."""
        return from_plain(self.kind, unpacked(self.body, self.kind.max_items))


def not_due(kind: str, due: Sequence[type[Message]]) -> PeerProtocolError:
    """The error of a message that came where others were due."""
    others = " or ".join(each.kind().upper() for each in due) or "none"
    return PeerProtocolError(f"the message {clean(kind.upper())} came where {others} was due")


def packed(message: Message) -> bytes:
    """A message as it goes over the wire. LocalProtocolError if it cannot, or if the other side would not take it."""
    kind = message.kind()
    try:
        body: bytes = msgpack.packb({"kind": kind, **to_plain(message)})
        _check_items(body, message.max_items)
    except Exception as error:  # msgpack raises several unrelated types
        raise LocalProtocolError(f"{kind} cannot be sent: {error}") from error
    if len(body) > message.max_bytes:
        raise LocalProtocolError(
            f"{kind} would be a message of {len(body)} bytes; at most {message.max_bytes} are allowed"
        )
    return _LENGTH.pack(len(body)) + body


def kind_of(head: bytes | bytearray) -> str:
    """The kind of the message that begins with these bytes. PeerProtocolError if they are the beginning of none."""
    nothing = dict.fromkeys(("max_array_len", "max_map_len", "max_bin_len", "max_ext_len"), 0)
    unpacker = msgpack.Unpacker(max_str_len=MAX_KIND_CHARS, **nothing)
    unpacker.feed(head)
    try:
        unpacker.read_map_header()
        first, kind = unpacker.unpack(), unpacker.unpack()
    except Exception as error:  # msgpack raises several unrelated types on bad input
        raise PeerProtocolError(f"a message that does not begin with its kind: {short(bytes(head))}") from error
    if first != "kind" or not isinstance(kind, str) or not kind:
        raise PeerProtocolError(f"a message of the kind {short(kind)}")
    return kind


def unpacked(body: bytes | bytearray, max_items: int) -> dict[str, Any]:
    """The fields of the message in these bytes, without its kind. PeerProtocolError for whatever is wrong with it."""
    _check_items(body, max_items)
    size = len(body)
    try:
        fields = msgpack.unpackb(
            body, max_str_len=size, max_bin_len=size, max_array_len=max_items, max_map_len=max_items, max_ext_len=0
        )
    except Exception as error:  # msgpack raises several unrelated types on bad input
        why = clean(str(error)) or type(error).__name__
        raise PeerProtocolError(f"a message that is not msgpack: {why}") from error
    if not isinstance(fields, dict):
        raise PeerProtocolError(f"a message that is not a map: {short(fields)}")
    fields.pop("kind", None)
    return fields


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
        self._next = ORDER[side]
        """What the other side may still send in the session."""

    async def send(self, message: Message) -> None:
        """Send a message, whole even if the caller is cancelled. ConnectionError if the connection is gone."""
        data = packed(message)
        try:
            await self.pipe.send_all([memoryview(data)])
        except OSError as error:
            raise self._lost(error) from error

    async def recv(self) -> RawMessage[Any]:
        """The next message of the session. ConnectionError if the connection is gone, PeerProtocolError if it is not
        due. If the caller is cancelled, nobody may receive any more."""
        message = await self._recv(*self._next, Ping, Failed, Refuse)
        if message.kind in self._next:
            self._next = self._next[self._next.index(message.kind) + 1 :]
        return message

    async def expect(self, *kinds: type[M]) -> M:
        """The next message of a handshake, which must be one of these.

        PeerFailedError if the other side refuses, PeerProtocolError if it is another one.
        """
        raw: RawMessage[Any] = await self._recv(*kinds, Refuse)
        message = raw.read()
        if isinstance(message, Refuse):
            raise PeerFailedError(f"{self.peer} refuses: {message.why}")
        read: M = message
        return read

    async def _recv(self, *due: type[M]) -> RawMessage[M]:
        """The next message, if it is one of these and not too large; of others, only the head is received."""
        prefix = bytearray(_LENGTH.size)
        await self._fill(memoryview(prefix))
        (size,) = _LENGTH.unpack(prefix)
        if not 1 <= size <= MAX_RESULT_BYTES:
            raise PeerProtocolError(f"a message of {size} bytes; 1 to {MAX_RESULT_BYTES} are allowed")
        body = bytearray(min(size, HEAD_BYTES))
        await self._fill(memoryview(body))
        name = kind_of(body)
        kind = next((each for each in due if each.kind() == name), None)
        if kind is None:
            raise not_due(name, [each for each in due if each not in (Ping, Failed, Refuse)])
        if size > kind.max_bytes:
            raise PeerProtocolError(f"{name.upper()} of {size} bytes; at most {kind.max_bytes} are allowed")
        while len(body) < size:
            piece = bytearray(min(PIECE_BYTES, size - len(body)))
            await self._fill(memoryview(piece))
            body += piece
        return RawMessage(kind, body)

    async def refuse(self, why: str, limit_s: float = 1.0) -> None:
        """Send the reason for which this side ends the handshake, if the other side takes it soon."""
        try:
            async with asyncio.timeout(limit_s):
                await self.send(Refuse(clean(why, MAX_TEXT_CHARS)))
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
