"""The session's messages: u32 length (big endian) | msgpack map with a "kind".

They come from another host, so every length and count is looked at before it is believed: msgpack makes a list as long
as an array says that it is, and one byte on the wire can become sixty in memory. Large things are to be told as bytes.
"""

from __future__ import annotations

import asyncio
import struct
from reprlib import repr as short
from typing import Any, TypeVar

import msgpack

from proto_v3.errors import LocalProtocolError, PeerFailedError, PeerProtocolError
from sim.live.io import Pipe, fill
from sim.live.tcp.sockets import reason

MAX_HANDSHAKE_BYTES = 1 << 20
MAX_HANDSHAKE_ITEMS = 10_000
MAX_MESSAGE_BYTES = 64 << 20
"""After the handshake: results travel in messages, with timelines."""
MAX_MESSAGE_ITEMS = 1 << 20
"""Values, keys and containers in a message, nested ones included."""
MAX_KIND_CHARS = 32
MAX_WHY_CHARS = 2000
PIECE_BYTES = 1 << 18
"""Memory for a message is taken as it comes, not as it is promised."""
_LENGTH = struct.Struct("!I")

Message = dict[str, Any]
T = TypeVar("T")


def printable(text: str) -> str:
    """Words of the other side's, to be shown: bounded, and without anything that a terminal would act on."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text[:MAX_WHY_CHARS])


def packed(message: Message, max_bytes: int = MAX_MESSAGE_BYTES, max_items: int = MAX_MESSAGE_ITEMS) -> bytes:
    """A message as it goes over the wire. LocalProtocolError if it cannot, or if the other side would not take it."""
    kind = message["kind"]
    try:
        body: bytes = msgpack.packb(message)
        _check_items(body, max_items)
    except Exception as error:  # msgpack raises several unrelated types
        raise LocalProtocolError(f"{kind} cannot be told: {error}") from error
    if len(body) > max_bytes:
        raise LocalProtocolError(f"{kind} would be a message of {len(body)} bytes; at most {max_bytes} are allowed")
    return _LENGTH.pack(len(body)) + body


def unpacked(body: bytes | bytearray, max_items: int) -> Message:
    """The message in these bytes. PeerProtocolError for whatever is wrong with it."""
    _check_items(body, max_items)
    size = len(body)
    try:
        message = msgpack.unpackb(
            body, max_str_len=size, max_bin_len=size, max_array_len=max_items, max_map_len=max_items, max_ext_len=0
        )
    except Exception as error:  # msgpack raises several unrelated types on bad input
        raise PeerProtocolError(f"a message that is not msgpack: {printable(str(error))}") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise PeerProtocolError(f"a message that is not a map with names: {printable(short(message))}")
    kind = message.get("kind")
    if not isinstance(kind, str) or not 0 < len(kind) <= MAX_KIND_CHARS:
        raise PeerProtocolError(f"a message of the kind {printable(short(kind))}")
    return message


# What a value's first byte says, by the msgpack specification: how many bytes behind it are skipped, or how wide the
# number is that says how many.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED |= {first: 1 << (first & 3) for first in range(0xCC, 0xD4)}
_FIXED |= dict.fromkeys((*range(0x80), *range(0xE0, 0x100)), 0)
_FIXED |= {first: first & 31 for first in range(0xA0, 0xC0)}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Width of the count, and values for each that it counts."""


def _check_items(body: bytes | bytearray, most: int) -> None:
    """PeerProtocolError unless the body is one value, of allowed types, of at most so many values."""
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
        if due > most:
            raise PeerProtocolError(f"a message of more than {most} values")
    if at != size:
        raise PeerProtocolError(f"a message of {size} bytes whose value is {at} bytes long")


def field(message: Message, name: str, kind: type[T], least: int = 0, most: int = 2**63 - 1) -> T:
    """A field of a message. An int must lie within the bounds, anything else be as long as they say.

    PeerProtocolError if it is missing, or anything else.
    """
    value = message.get(name)
    said = f"{printable(message['kind']).upper()}: {name} = {printable(short(value))}"
    if type(value) is not kind:
        raise PeerProtocolError(f"{said} must be {kind.__name__}")
    size = value if isinstance(value, int) else len(value)  # type: ignore[arg-type]  # str, bytes, list or dict
    if not least <= size <= most:
        what = "" if isinstance(value, int) else "of a length "
        raise PeerProtocolError(f"{said} must be {what}from {least} to {most}")
    return value


class Talk:
    """Messages over one connection: one who sends at a time, and one who receives."""

    def __init__(self, pipe: Pipe, side: str, address: str) -> None:
        """`side` is what the other one is: source or target."""
        self.pipe = pipe
        self.address = address
        self.peer = f"the {side} at {address}"
        self.heard_bytes = 0
        """Grows whenever anything comes."""
        self._max_bytes = MAX_HANDSHAKE_BYTES
        self._max_items = MAX_HANDSHAKE_ITEMS

    def handshake_done(self) -> None:
        """From now on messages may be long."""
        self._max_bytes = MAX_MESSAGE_BYTES
        self._max_items = MAX_MESSAGE_ITEMS

    async def send(self, kind: str, **fields: Any) -> None:
        """Send a message, whole even if the caller is cancelled. ConnectionError if the connection is gone."""
        data = packed({"kind": kind, **fields}, self._max_bytes, self._max_items)
        try:
            await self.pipe.send_all([memoryview(data)])
        except OSError as error:
            raise self._lost(error) from error

    async def recv(self) -> Message:
        """The next message. ConnectionError if the connection is gone. A caller that is cancelled ends the talk."""
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

    async def expect(self, *kinds: str) -> Message:
        """The next of a handshake. PeerFailedError if the other side refuses, PeerProtocolError if it is another."""
        message = await self.recv()
        if message["kind"] == "refuse":
            raise PeerFailedError(f"{self.peer} refuses: {printable(field(message, 'why', str))}")
        if message["kind"] not in kinds:
            due = " or ".join(kinds).upper()
            raise PeerProtocolError(f"{printable(message['kind']).upper()} came where {due} was due")
        return message

    async def refuse(self, why: str, limit_s: float = 1.0) -> None:
        """Say why this side ends the handshake, if the other one listens."""
        try:
            async with asyncio.timeout(limit_s):
                await self.send("refuse", why=printable(why))
        except (OSError, LocalProtocolError):
            return

    async def _fill(self, view: memoryview) -> None:
        try:
            await fill(self.pipe, view)
        except OSError as error:
            raise self._lost(error) from error
        self.heard_bytes += len(view)

    def _lost(self, error: OSError) -> ConnectionError:
        return ConnectionResetError(f"session with {self.peer}: {reason(error)}")
