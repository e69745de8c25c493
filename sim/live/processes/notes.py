"""Notes that the processes of a live run send to their supervisor while they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from sim.live.fd.calls import Calls
from sim.live.plain import from_plain, to_plain


@dataclass(frozen=True, slots=True)
class GuestNote:
    """A guest is about to run, or has stopped."""

    side: str
    runs: bool
    at_ns: int
    """On time.perf_counter_ns() there."""


@dataclass(frozen=True, slots=True)
class SessionNote:
    """A target has accepted a source."""

    peer: str
    protocol: str
    scenario: str


@dataclass(frozen=True, slots=True)
class RejectedNote:
    """A target has turned a caller away."""

    why: str


@dataclass(frozen=True, slots=True)
class ProgressNote:
    """How far a source is."""

    at_ns: int
    """Since time 0."""
    phase: str
    remaining_bytes: int
    """Of the devices."""
    written_bytes: int
    """By the guest to the devices."""
    wire_bytes: int
    streams: dict[str, int]
    """Bytes read from each data fd, by its name."""


Note = GuestNote | SessionNote | RejectedNote | ProgressNote
KINDS: dict[str, type[Note]] = {kind.__name__: kind for kind in get_args(Note)}


def send(supervisor: Calls, note: Note) -> None:
    """Send a note; nothing answers it."""
    supervisor.note(type(note).__name__, **to_plain(note))


def received(name: str, body: object) -> Note:
    """The note that was sent."""
    return from_plain(KINDS[name], body)
