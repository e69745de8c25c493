"""How the two sides agree, in messages of the session.

    source                                              target
    OFFER {frame_bytes, connections, boot_id, run} ->
                                                        <- ACCEPT {boot_id, token}, or REFUSE {why}
    data connections, each with the token ->
                                                        <- CONNECTED, when all are there
    CLOCKREQUEST -> ... some times                      <- CLOCKREPLY {at_ns} ...
    BEGIN {offset_ns, uncertainty_ns} ->

Each side has a deadline for all of it. Who gives up sends the reason in a REFUSE, if the other side still listens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from proto_v3.errors import PeerFailedError, PeerProtocolError, ProtoV3Error, UserError
from sim.live.buffers import Buffers
from sim.live.io import Pipe
from sim.live.tcp.connection import Connection
from sim.live.tcp.message_stream import MessageStream
from sim.live.tcp.messages import MAX_BOOT_ID_CHARS, Begin, ClockReply, ClockRequest
from sim.live.tcp.sockets import Granted

CLOCK_REQUESTS = 20
MAX_CLOCK_REQUESTS = 1000
MAX_CONNECTIONS = 1024
MAX_FRAME_BYTES = 1 << 30
FREE_BYTES = 256 << 20
"""A session keeps at most this much in free buffers."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side accepts. UserError if a value makes no sense."""

    handshake_s: float = 10.0
    """For all of the handshake, from its first connection on."""
    silent_s: float = 10.0
    """A peer that was silent for that long is given up."""
    frame_bytes: int = 1 << 20
    """The largest payload of a frame, either way: the source's value is used if it is not above the target's."""

    def __post_init__(self) -> None:
        for name in ("handshake_s", "silent_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {getattr(self, name)} must be above 0")
        if not 1 <= self.frame_bytes <= MAX_FRAME_BYTES:
            raise UserError(f"frame_bytes = {self.frame_bytes} must be from 1 to {MAX_FRAME_BYTES}")


@dataclass(slots=True)
class Handshake:
    """How far a handshake is."""

    waits_for: Callable[[], str]
    """Says what is waited for now."""
    stream: MessageStream | None = None
    """To the other side, once there is one."""

    def wait_for(self, what: str) -> None:
        """From now on, this is waited for."""
        self.waits_for = lambda: what


@asynccontextmanager
async def handshake(limit_s: float, waits_for: str) -> AsyncIterator[Handshake]:
    """Bound a handshake; TimeoutError says what was waited for. If it fails here, the other side is sent the reason."""
    progress = Handshake(lambda: waits_for)
    try:
        try:
            async with asyncio.timeout(limit_s) as timeout:
                yield progress
        except TimeoutError:
            if timeout.expired():
                raise TimeoutError(f"waited for {progress.waits_for()}: not there within {limit_s:g} s") from None
            raise
    except PeerFailedError:
        raise
    except Exception as error:
        ours = isinstance(error, (ProtoV3Error, OSError))
        if progress.stream is not None:
            await progress.stream.refuse(str(error) if ours else "an error of its own")
        raise


def boot_id() -> str:
    """Equal on two sides that run on one host, or on a copy of one. Empty where there is no Linux to say it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:MAX_BOOT_ID_CHARS]
    except OSError:
        return ""


# --- the clocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The other side's time.perf_counter_ns() minus this side's, and how far that may be off, either way."""

    offset_ns: int
    uncertainty_ns: int


async def measure_clock(stream: MessageStream, same_host: bool) -> ClockOffset:
    """At the source: compare the clocks by some round trips, and use the shortest.

    The target read its clock at some time within the round trip, so half of it bounds the error. On one host both
    sides have the same clock, and the offset is 0, unless a round trip contradicts that (a virtual machine that was
    copied with its boot_id, or a container with a clock of its own).
    """
    shortest_ns, offset_ns = 2**63, 0
    for _ in range(CLOCK_REQUESTS):
        before = time.perf_counter_ns()
        await stream.send(ClockRequest())
        reply = await stream.expect(ClockReply)
        after = time.perf_counter_ns()
        if after - before < shortest_ns:
            shortest_ns, offset_ns = after - before, reply.at_ns - (before + after) // 2
    uncertainty_ns = shortest_ns // 2 + 1
    if same_host and abs(offset_ns) <= uncertainty_ns:
        offset_ns = uncertainty_ns = 0
    await stream.send(Begin(offset_ns=offset_ns, uncertainty_ns=uncertainty_ns))
    return ClockOffset(offset_ns, uncertainty_ns)


async def answer_clock(stream: MessageStream, first: ClockRequest | Begin) -> ClockOffset:
    """At the target: the same, as seen from here. `first` is the source's first message after CONNECTED."""
    message: ClockRequest | Begin = first
    for _ in range(MAX_CLOCK_REQUESTS):
        if isinstance(message, Begin):
            return ClockOffset(-message.offset_ns, message.uncertainty_ns)
        await stream.send(ClockReply(at_ns=time.perf_counter_ns()))
        message = await stream.expect(ClockRequest, Begin)
    raise PeerProtocolError(f"more than {MAX_CLOCK_REQUESTS} CLOCKREQUESTs came, and no BEGIN")


# --- connections ------------------------------------------------------------------------------------------------------


def make_connections(found: Sequence[tuple[Pipe, Granted]], at_source: bool, frame_bytes: int) -> list[Connection]:
    """The session's data connections; they share a pool of buffers."""
    pool = Buffers(frame_bytes, keep=max(4, min(len(found) + 2, FREE_BYTES // frame_bytes)))
    return [Connection(pipe, index, at_source, granted, pool) for index, (pipe, granted) in enumerate(found)]
