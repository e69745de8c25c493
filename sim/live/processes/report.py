# SPDX-License-Identifier: GPL-2.0-or-later
"""What the processes of a live run send: notes to their supervisor while they run, and reports at their end.

A report goes to the other processes, to the other host and to the supervisor. `sim.live.plain` makes what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from proto_v3.vmm.migration import OutcomeKind
from sim.live.fd.calls import Calls
from sim.live.plain import from_plain, to_plain
from sim.live.real_time import Delays
from sim.live.tcp.sockets import Granted
from sim.report import Counters, DeviceReport, Failure, SideReport

# --- notes ------------------------------------------------------------------------------------------------------------


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
NOTES: dict[str, type[Note]] = {kind.__name__: kind for kind in get_args(Note)}


def send_note(supervisor: Calls, note: Note) -> None:
    """Send a note; nothing answers it."""
    supervisor.note(type(note).__name__, **to_plain(note))


def received_note(name: str, body: object) -> Note:
    """The note that was sent."""
    return from_plain(NOTES[name], body)


# --- reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """What a process measured of itself."""

    timeline: dict[str, Any]
    """As ProcessTimeline.export() returns it. merge_timelines.merge() checks it."""
    delays: Delays
    cpu_ns: int
    """CPU time from time 0 to its end, without the comparison of the states."""
    user_ns: int
    """Of that, what was spent outside of the kernel."""


@dataclass(frozen=True, slots=True)
class DevicesReport:
    """What was measured of a VMM's devices."""

    devices: list[DeviceReport]
    process: ProcessReport | None
    """Of their process; None if they have none of their own."""


@dataclass(frozen=True, slots=True)
class DeviceProcessReport:
    """What a device process answers to `collect`."""

    process: ProcessReport
    devices: list[DeviceReport]


@dataclass(frozen=True, slots=True)
class Digests:
    """What a device process answers to `digests`: one entry a device (sim.live.fd.store)."""

    digests: list[bytes]


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a VMM counted at one data fd, of which it has the other end."""

    name: str
    counters: Counters


@dataclass(frozen=True, slots=True)
class Measured:
    """What a VMM process, and its device process if it has one, measured of a migration."""

    side: SideReport
    vmm: ProcessReport
    device: ProcessReport | None
    """None if the device process was gone by then, or if there is none: the devices are the kernel's."""
    streams: list[StreamReport]


@dataclass(frozen=True, slots=True)
class VmmReport:
    """How a VMM process ended."""

    guest_runs: bool
    """Its guest, here."""
    failures: list[Failure]
    user_error: bool = False
    """The only failure is an error of the user's."""
    device_gone: bool = False
    """The devices are gone, or do not answer."""
    put_back: list[str] = field(default_factory=list)
    """Devices of the kernel: what was not to be expected when they were left as they were found, in words."""
    measured: Measured | None = None
    """None if it failed before there was anything to measure."""
    digests: list[bytes] = field(default_factory=list)
    """Of each device's state, after a completed migration (comparison.py); empty if the devices were gone by then."""
    whole: bool = False
    """Target: it took everything in, and runs the guest."""
    kind: OutcomeKind | None = None
    """Source: how the migration ended; None if it failed."""
    note: str = ""
    """Source."""
    reason: str = ""
    """Source: why the migration was given up in pre-copy."""
    peer: VmmReport | None = None
    """Source: what the target reported (peer_report.py). None if nothing was received, or it is malformed."""
    clock_uncertainty_ns: int = 0
    """Source: how far the clocks of the two hosts may be apart."""
    sockets: list[Granted] = field(default_factory=list)
    """Source: what the kernel granted each connection."""

    @property
    def side(self) -> SideReport | None:
        """What its side knows."""
        return None if self.measured is None else self.measured.side

    @property
    def has_devices(self) -> bool:
        """Whether the devices were there at the end."""
        return not self.device_gone if self.measured is None else bool(self.measured.side.devices)
