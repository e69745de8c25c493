# SPDX-License-Identifier: GPL-2.0-or-later
"""What each side of a run knows at its end: one record, the same in virtual time, live, and over the wire.

A new counter takes two lines: a field of `Counters` (or of proto_v3's `VmmCounters`, if a VMM counts it), and the line
that counts. The totals of a run, its row in a table and live's messages are made from the fields.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from proto_v3.errors import PeerFailedError, UserError
from proto_v3.vmm.device_calls import DeviceCallError
from proto_v3.vmm.migration import UnsupportedError, VmmCounters


def _in_column(name: str) -> Any:
    """A counter that is a part of a column: the column is the sum of its parts."""
    return field(default=0, metadata={"column": name})


@dataclass(slots=True)
class Counters(VmmCounters):
    """Everything that is counted. Whoever counts has an object of its own: a VMM, a data fd, a session of a driver.

    The names are columns of the table of runs, in this order; their ends are the units. Of several objects the values
    are added; of a peak the largest is taken.
    """

    peak_held_bytes: int = 0
    """The most that one target driver held: records that came in, waited for their epoch, or were loading."""
    pinned_chunks_bytes: int = 0
    """Source: the chunks that firmware saves into, of all devices: `driver.chunks` of `driver.chunk_mib` for each
    stream, so x (1 + N) in v3. Of addressable blocks, the most that was being read at once."""
    pinned_images_bytes: int = 0
    """Source: the images that were saved whole, before the stop: the most that each stream held, of all devices."""
    pinned_target_bytes: int = 0
    """Target: what firmware loads from, of all devices: for each stream its longest record, which the driver holds when
    its last byte came. Of addressable blocks, the most that was being written at once."""
    send_blocked_ns: int = 0
    """Of a completed run: how long full connections held up sends in the downtime, summed over connections."""
    wire_bytes: int = 0
    """Sent by the source."""
    device_bytes: int = 0
    """Read from the devices."""
    device_bytes_resent: int = 0
    """Of a completed run: read beyond one copy of the devices' state. What was dirtied again, and records' headers."""
    device_bytes_dropped: int = 0
    """Saved by the devices, and dropped before anybody read them (REINIT or an epoch, policy `invalidate`)."""
    overtaken_bytes: int = _in_column("device_bytes_wasted")
    """v3: of blocks that the target's driver dropped on arrival, because a later epoch had made them invalid."""
    undone_bytes: int = _in_column("device_bytes_wasted")
    """v3: of blocks that were loaded, and that a later epoch made invalid."""
    stale_bytes: int = _in_column("device_bytes_wasted")
    """v3, addressable blocks: dropped on arrival, because a newer version was there."""
    connections: int = 0
    """Made by the source, the main channel included."""
    messages: int = 0
    """Frames without payload, both ways."""
    wakeups: int = 0
    """Waits in read(), poll(), send() and recv() that ended, of both VMMs. Live: of read() and poll() only."""
    reads: int = 0
    """Calls of read() that returned data."""
    read_firmware_ns: int = 0
    """Time in these calls until there was data."""
    read_lock_ns: int = 0
    """Then, until the driver's lock was taken."""
    read_copy_ns: int = 0
    """Then, until the data was copied."""

    def columns(self) -> dict[str, int]:
        """The values by the columns of the table."""
        values: dict[str, int] = {}
        for each in fields(self):
            column = each.metadata.get("column", each.name)
            values[column] = values.get(column, 0) + getattr(self, each.name)
        return values

    @classmethod
    def total(cls, parts: Iterable[Counters]) -> Counters:
        """All parts together: the sum, or of a `peak_` the largest."""
        whole = cls()
        for part in parts:
            for each in fields(cls):
                before, value = getattr(whole, each.name), getattr(part, each.name)
                setattr(whole, each.name, max(before, value) if each.name.startswith("peak_") else before + value)
        return whole


@dataclass(frozen=True, slots=True)
class CriticalLoad:
    """Critical objects that were loaded at the target."""

    epoch: int
    complete: bool
    """These were the last ones of the epoch."""
    objects: int
    reconfigured: int
    """How many of them the guest made new during the migration; the others are of the initial data."""
    bytes: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class DriverMessage:
    """What a driver logs when something fails in it, as a kernel does. The VMM sees an errno only."""

    at_ns: int
    text: str


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What one side's driver knows of a device."""

    name: str
    needed_bytes: int
    """One copy of its state: blocks and critical objects."""
    counters: Counters
    critical_loads: list[CriticalLoad] = field(default_factory=list)
    """Target: in order of time, of all sessions."""
    reconfigurations_ns: list[int] = field(default_factory=list)
    """Source: when the guest reconfigured it, ascending; the first one began epoch 2."""
    log: list[DriverMessage] = field(default_factory=list)
    """What failed first, in order of time; not what failed in consequence."""


@dataclass(frozen=True, slots=True)
class SideReport:
    """What one side knows: its VMM, and its devices in the order of the scenario."""

    ended_ns: int
    """When it ended, on the run's clock."""
    counters: Counters
    """Of the VMM."""
    devices: list[DeviceReport] = field(default_factory=list)
    """Empty, live, if the device process was gone by then."""
    resets: list[str] = field(default_factory=list)
    """Source: each device that was reset under the guest, and why, in words."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error at one side."""

    side: str
    text: str
    at_ns: int
    """Of a failed call its time, else when the side ended."""
    echo: bool = False
    """It only says that another side or process failed, or is gone."""
    unsupported: bool = False
    device: str = ""
    """The device of which a call failed; empty: it was no call on a device."""
    cause: str = ""
    """What the device said besides the errno."""
    lost: bool = False
    """A connection is lost."""


def failure(side: str, error: BaseException, now_ns: int, echoes: tuple[type[BaseException], ...]) -> Failure:
    """A single error that a side raised. By PeerFailedError and `echoes` it learns that another side failed."""
    if isinstance(error, DeviceCallError):
        return Failure(side, f"{side}, {error}", error.at_ns, device=error.device, cause=error.cause)
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno and error.strerror:
        text = f"{error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
    if not isinstance(error, (UnsupportedError, UserError)):
        text = f"{side}: {text}"
    return Failure(
        side,
        text,
        now_ns,
        echo=isinstance(error, (PeerFailedError, *echoes)),
        unsupported=isinstance(error, UnsupportedError),
        lost=isinstance(error, ConnectionError),
    )
