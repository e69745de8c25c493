"""What both kinds of data fd share: the one that is saved from a device (`sim/save`) and the one loaded into it
(`sim/load`)."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from proto_v3.timeline import Timeline
from sim.firmware import FirmwareModel
from sim.resource import Memory

DriverLock = AbstractAsyncContextManager[None]


def fails(code: int) -> OSError:
    """The error that a system call gives."""
    return OSError(code, os.strerror(code))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every stream of a device uses."""

    firmware: FirmwareModel
    memory: Memory
    timeline: Timeline
    call_ns: int


@dataclass(slots=True)
class ReadCounts:
    """What reading one stream took: calls that gave data, their bytes, and where their time went."""

    calls: int = 0
    bytes: int = 0
    firmware_ns: int = 0
    lock_ns: int = 0
    copy_ns: int = 0
    dropped_bytes: int = 0
    """Saved, and dropped before anybody read them (REINIT, policy `invalidate`)."""


@dataclass(frozen=True, slots=True)
class CriticalLoad:
    """Critical objects that were loaded at the target."""

    epoch: int
    complete: bool
    """These were the last ones of the epoch."""
    objects: int
    reconfigured: int
    """Of these, as the guest made them new; the others as they were from the start."""
    bytes: int
    start_ns: int
    end_ns: int
