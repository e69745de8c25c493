"""Every message of the session, with its fields and their bounds.

They may come from another host. So the types are checked strictly, and PeerProtocolError names the field that is wrong.
How a message becomes bytes: `message_stream`.
"""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as short
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proto_v3.errors import PeerProtocolError
from sim.live.tcp.sockets import TOKEN_BYTES

MAX_WHY_CHARS = 2000
MAX_BOOT_ID_CHARS = 64
MAX_SCENARIO_CHARS = 256 << 10
MAX_PROTOCOL_CHARS = 200
MAX_TIME_NS = 2**62

BootId = Annotated[str, Field(max_length=MAX_BOOT_ID_CHARS)]
Time = Annotated[int, Field(ge=-MAX_TIME_NS, le=MAX_TIME_NS)]
Size = Annotated[int, Field(ge=0, lt=2**63)]


def printable(text: str) -> str:
    """Text of the other side, to be shown: cut to MAX_WHY_CHARS, and without characters that a terminal acts on."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text[:MAX_WHY_CHARS])


class Message(BaseModel):
    """A message. Its kind on the wire is the name of the class, in lower case."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def kind(cls) -> str:
        """What the wire calls it."""
        return cls.__name__.lower()

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """The message with these fields. PeerProtocolError names the first field that is missing, unknown or wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            value = f" = {short(fields[name])}" if name in fields else ""
            raise PeerProtocolError(printable(f"{cls.kind().upper()}: {name}{value}: {first['msg']}")) from None


# --- the handshake ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What is run: the source decides it, and offers it to the target."""

    scenario: str
    """As JSON."""
    protocol: str
    seed: int


class Offer(Message):
    """Source: what it asks for."""

    frame_bytes: Size
    """The largest payload of a frame, either way."""
    connections: Size
    """Data connections."""
    boot_id: BootId
    scenario: Annotated[str, Field(max_length=MAX_SCENARIO_CHARS)]
    protocol: Annotated[str, Field(max_length=MAX_PROTOCOL_CHARS)]
    seed: Size

    @property
    def run(self) -> Run:
        """What is to be run."""
        return Run(self.scenario, self.protocol, self.seed)


class Accept(Message):
    """Target: the offer is accepted."""

    boot_id: BootId
    token: Annotated[bytes, Field(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    """Each data connection begins with it."""


class Refuse(Message):
    """Either side: the handshake is over."""

    why: str


class Connected(Message):
    """Target: all data connections are there."""


class ClockRequest(Message):
    """Source: what is the time at the target?"""


class ClockReply(Message):
    """Target: its time.perf_counter_ns()."""

    at_ns: Time


class Begin(Message):
    """Source: the session begins."""

    offset_ns: Time
    """The target's time.perf_counter_ns() minus the source's."""
    uncertainty_ns: Annotated[int, Field(ge=0, le=MAX_TIME_NS)]
    """How far that may be off, either way."""


# --- the session ------------------------------------------------------------------------------------------------------


class Ping(Message):
    """Either side: it lives."""


class Failed(Message):
    """Either side: it failed. The other side's receive_message() raises PeerFailedError with the reason."""

    why: str


class Prepared(Message):
    """Target: its device process has the memory."""


class Start(Message):
    """Source: when the run's time 0 is."""

    zero_ns: Time
    """On the target's time.perf_counter_ns()."""


class Started(Message):
    """Target: it runs on that time, too."""


class Result(Message):
    """Target: what it measured. The receiver checks the report."""

    report: Any


class Bye(Message):
    """Source: it wants nothing more."""
