"""How the two sides agree, in messages of the session.

    source                                              target
    OFFER {frame_bytes, connections, boot_id, run} ->
                                                        <- ACCEPT {frame_bytes, boot_id, token, answer},
                                                           or REFUSE {why}
    data connections, each with the token ->
                                                        <- READY, when all are there
    CLOCK -> ... some times                             <- CLOCK {at_ns} ...
    BEGIN {offset_ns, uncertainty_ns} ->

Each side bounds all of it by a deadline of its own; whoever gives up says why, in a REFUSE, if the other one still
listens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from proto_v3.errors import PeerProtocolError, UserError
from sim.live.buffers import Buffers
from sim.live.io import Pipe
from sim.live.tcp.connection import Connection
from sim.live.tcp.messages import Message, Talk, field
from sim.live.tcp.sockets import TOKEN_BYTES, Granted, SocketSettings

PINGS = 20
MAX_PINGS = 1000
MAX_CONNECTIONS = 1024
MAX_FRAME_BYTES = 1 << 30
MAX_BOOT_ID_CHARS = 64
FREE_BYTES = 256 << 20
"""Of buffers that a session keeps free, at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side puts up with. UserError if it makes no sense."""

    handshake_s: float = 10.0
    """For all of the handshake, from its first connection on."""
    silent_s: float = 10.0
    """When the other side was silent for that long, it is given up."""
    frame_bytes: int = 1 << 20
    """The largest payload of a frame, either way: the source's is used if it is not above the target's."""
    connections: int = MAX_CONNECTIONS
    """At the target: data connections of a session, at most."""

    def __post_init__(self) -> None:
        for name in ("handshake_s", "silent_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {getattr(self, name)} must be above 0")
        for name, most in (("frame_bytes", MAX_FRAME_BYTES), ("connections", MAX_CONNECTIONS)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} = {getattr(self, name)} must be from 1 to {most}")


DEFAULT_LIMITS = Limits()
DEFAULT_SOCKETS = SocketSettings()


class Deadline:
    """Bounds a handshake, from when this is made. TimeoutError says what was waited for."""

    def __init__(self, limit_s: float, waits_for: str) -> None:
        self.waits_for: Callable[[], str] = lambda: waits_for
        self._limit_s = limit_s
        self._at = asyncio.get_running_loop().time() + limit_s

    def on(self, what: str) -> None:
        """What is waited for from now on."""
        self.waits_for = lambda: what

    async def __aenter__(self) -> Self:
        self._timeout = asyncio.timeout_at(self._at)
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise TimeoutError(f"waited for {self.waits_for()}: not there within {self._limit_s:g} s") from None


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the handshake gave, beside connections."""

    run: dict[str, Any]
    """The source's, about what is to be done."""
    answer: dict[str, Any]
    """The target's, to that."""
    frame_bytes: int
    peer_offset_ns: int
    """The other side's time.perf_counter_ns() minus this side's."""
    uncertainty_ns: int
    """How far that may be off, either way."""


# --- OFFER and ACCEPT -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """What the source asks for."""

    frame_bytes: int
    connections: int
    boot_id: str
    run: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """As they are told."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, message: Message) -> Offer:
        """PeerProtocolError if it is none."""
        return cls(
            field(message, "frame_bytes", int, 1),
            field(message, "connections", int),
            field(message, "boot_id", str, 0, MAX_BOOT_ID_CHARS),
            field(message, "run", dict),
        )

    def objection(self, limits: Limits) -> str:
        """What there is in it that this side does not put up with; nothing, if it can be accepted."""
        if not 1 <= self.connections <= limits.connections:
            return f"{self.connections} data connections are offered; 1 to {limits.connections} are allowed here"
        if self.frame_bytes > limits.frame_bytes:
            return f"frames of up to {self.frame_bytes} bytes are offered; up to {limits.frame_bytes} are allowed here"
        return ""


@dataclass(frozen=True, slots=True)
class Accept:
    """What the target answers."""

    frame_bytes: int
    boot_id: str
    token: bytes
    answer: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """As they are told."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, message: Message, offer: Offer) -> Accept:
        """PeerProtocolError if it is none, or none for this offer."""
        accept = cls(
            field(message, "frame_bytes", int),
            field(message, "boot_id", str, 0, MAX_BOOT_ID_CHARS),
            field(message, "token", bytes, TOKEN_BYTES, TOKEN_BYTES),
            field(message, "answer", dict),
        )
        if accept.frame_bytes != offer.frame_bytes:
            raise PeerProtocolError(f"ACCEPT has frame_bytes = {accept.frame_bytes}, which was not offered")
        return accept


def boot_id() -> str:
    """Equal on two sides that are one host, or that were copied from one. Nothing where Linux does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:MAX_BOOT_ID_CHARS]
    except OSError:
        return ""


# --- the clocks -------------------------------------------------------------------------------------------------------


async def measure_clock(talk: Talk, same_host: bool) -> tuple[int, int]:
    """At the source: the target's clock minus ours, and how far that may be off, from the quickest of some pings.

    The target's answer was made at some time within the round trip: so half of it bounds the error. On one host both
    have the same clock, and the offset is 0, unless a ping contradicts that (a virtual machine that was copied with its
    boot_id, or a container with a clock of its own).
    """
    quickest, offset = 2**63, 0
    for _ in range(PINGS):
        before = time.perf_counter_ns()
        await talk.send("clock")
        at = field(await talk.expect("clock"), "at_ns", int)
        after = time.perf_counter_ns()
        if after - before < quickest:
            quickest, offset = after - before, at - (before + after) // 2
    uncertainty = quickest // 2 + 1
    if same_host and abs(offset) <= uncertainty:
        offset = uncertainty = 0
    await talk.send("begin", offset_ns=offset, uncertainty_ns=uncertainty)
    return offset, uncertainty


async def answer_clock(talk: Talk, first: Message) -> tuple[int, int]:
    """At the target: the same two, as seen from here. `first` is the source's first message after READY."""
    message = first
    for _ in range(MAX_PINGS):
        if message["kind"] != "clock":
            break
        await talk.send("clock", at_ns=time.perf_counter_ns())
        message = await talk.expect("clock", "begin")
    if message["kind"] != "begin":
        raise PeerProtocolError(f"more than {MAX_PINGS} CLOCKs came, and no BEGIN")
    return -field(message, "offset_ns", int, -(2**62), 2**62), field(message, "uncertainty_ns", int, 0, 2**62)


# --- connections ------------------------------------------------------------------------------------------------------


def made_connections(found: Sequence[tuple[Pipe, Granted]], at_source: bool, frame_bytes: int) -> list[Connection]:
    """The session's data connections; they share a pool of buffers."""
    pool = Buffers(frame_bytes, keep=max(4, min(len(found) + 2, FREE_BYTES // frame_bytes)))
    return [Connection(pipe, index, at_source, granted, pool) for index, (pipe, granted) in enumerate(found)]
