"""Every message of the session, with its fields and their bounds.

They may come from another host: `sim.live.plain` checks types and bounds, and PeerProtocolError names the field that is
wrong. How a message becomes bytes: `message_stream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from sim.live.plain import Within
from sim.live.tcp.sockets import TOKEN_BYTES

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
