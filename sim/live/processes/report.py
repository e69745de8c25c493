"""What the processes of a live run report at their end, to each other, to the other host and to their supervisor.

It goes over sockets as `sim.live.plain` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from proto_v3.vmm.migration import OutcomeKind
from sim.live.real_time import Delays
from sim.live.tcp.sockets import Granted
from sim.report import Counters, DeviceReport, SideReport


@dataclass(frozen=True, slots=True)
class Failure:
    """An error in a process."""

    text: str
    echo: bool
    """It only says that another process failed, or is gone."""
    unsupported: bool


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """What a process measured of itself."""

    timeline: dict[str, Any]
    """As ProcessTimeline.export() returns it. merge_timelines.merge() checks it."""
    delays: Delays
    cpu_ns: int
    """CPU time from time 0 to its end, without the comparison of the states."""


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
    """What a VMM process and its device process measured of a migration."""

    side: SideReport
    vmm: ProcessReport
    device: ProcessReport | None
    """None if the device process was gone by then."""
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
    """The device process is gone, or does not answer."""
    measured: Measured | None = None
    """None if it failed before there was anything to measure."""
    digests: list[bytes] = field(default_factory=list)
    """Of each device's state, after a completed migration; empty if the devices were gone by then."""
    whole: bool = False
    """Target: it took everything in, and runs the guest."""
    kind: OutcomeKind | None = None
    """Source: how the migration ended; None if it failed."""
    note: str = ""
    """Source."""
    peer: dict[str, Any] | None = None
    """Source: what the target reported, a VmmReport; as it was received, not checked. None if nothing was received."""
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
        """Whether the device process was there at the end."""
        return not self.device_gone if self.measured is None else self.measured.device is not None
