"""What both kinds of data fd share: the one that is saved from a device (`sim/device/save`) and the one loaded into it
(`sim/device/load`)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from proto_v3.notify import Notify
from proto_v3.timeline import Resource, Timeline
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import PrecopyInfo, StreamInfo
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns, sleep_ns
from sim.device.firmware import FirmwareModel
from sim.resource import Lock
from sim.scenario.tables import Driver, Fault

DriverLock = AbstractAsyncContextManager[None]


class CopyModel(Protocol):
    """What copying between kernel and user space takes."""

    async def copy(self, size_bytes: int, call_ns: int, what: str) -> None:
        """Copy on the calling thread, with a fixed cost of `call_ns` before."""


def fails(code: int) -> OSError:
    """The error that a system call gives."""
    return OSError(code, os.strerror(code))


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What every stream of a device uses."""

    firmware: FirmwareModel
    memory: CopyModel
    timeline: Timeline
    call_ns: int
    new_lock: Callable[[Timeline], DriverLock] = Lock
    """Makes a mutex of the driver."""
    locks_in_read: bool = True
    """read() takes the lock that the scenario says. Not in live mode, where whoever copies takes it."""
    tables: bool = False
    """Records have bytes, and tell in a table which blocks and objects they hold: in live mode."""


class Faults:
    """What the scenario has fail on one side of a device, each as often as it says."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._left = [fault for fault in faults for _ in range(fault.times)]
        self._commands = 0

    def of_arc(self, arc: str) -> Fault | None:
        """The fault of an arc that is about to be taken, used up with it."""
        fault = next((fault for fault in self._left if fault.arc == arc), None)
        if fault is not None:
            self._left.remove(fault)
        return fault

    def of_command(self, command: str) -> OSError | None:
        """The error of a command of the firmware that was just made."""
        done = self._commands
        self._commands += 1
        fault = next((fault for fault in self._left if fault.command == command and done >= (fault.after or 0)), None)
        if fault is None:
            return None
        self._left.remove(fault)
        return fails(getattr(errno, fault.errno))


@dataclass(frozen=True, slots=True)
class MigrationSession:
    """What the streams of one migration session share."""

    around: DriverContext
    driver: Driver
    state_lock: DriverLock
    faults: Faults
    fail: Callable[[], None]
    """v3: the device cannot go on: it is in ERROR from now on, and every stream answers EIO."""


@dataclass(slots=True)
class ReadCounts:
    """What reading one stream took: calls that gave data, their bytes, and where their time went."""

    calls: int = 0
    bytes: int = 0
    firmware_ns: int = 0
    lock_ns: int = 0
    copy_ns: int = 0
    wakeups: int = 0
    """Calls of read() or poll() that had to wait, and were woken."""
    dropped_bytes: int = 0
    """Saved, and dropped before anybody read them: by REINIT or an epoch, policy `invalidate`."""

    def add(self, size: int, asked_ns: int, ready_ns: int, locked_ns: int) -> None:
        """A read() of so many bytes is over: when it was called, when it had data, and when it had the lock."""
        self.calls += 1
        self.bytes += size
        self.firmware_ns += ready_ns - asked_ns
        self.lock_ns += locked_ns - ready_ns
        self.copy_ns += now_ns() - locked_ns


class FdBuffer:
    """What was taken from a stream, and is not read yet: nothing, if whoever takes it reads it.

    In live mode it is what is in the data fd's socket (sim.live.fd.save).
    """

    unread_bytes = 0
    initial_bytes = 0
    """Of these, what counts as v2's initial_bytes."""

    def took(self, size: int, initial_bytes: int) -> None:
        """So many bytes were taken; up to the so manieth of them, they are initial."""

    def all_initial(self) -> None:
        """What is unread counts as initial from now on."""


class SavedFd:
    """A data fd that is read from: what all kinds share. Calls that a kind does not have answer as the kernel would."""

    def __init__(self, session: MigrationSession) -> None:
        self.reads = ReadCounts()
        self.outlet = FdBuffer()
        self._session = session
        self._around = session.around
        self._closed = 0  # the errno that every call gets, if any
        self._notify = Notify()

    def end_session(self, code: int = errno.ENODEV) -> None:
        """The session is over: every call gets this error, whoever waits too."""
        self._closed = self._closed or code
        self._notify.notify()

    @property
    def over(self) -> bool:
        """Whether the session is over."""
        return self._closed != 0

    def held_bytes(self) -> tuple[int, int]:
        """What is saved and not read yet, and what is being saved. To ask changes nothing."""
        return self.outlet.unread_bytes, 0

    def _check_open(self) -> None:
        if self._closed:
            raise fails(self._closed)

    async def _call(self) -> None:
        """The fixed cost of a call that copies nothing."""
        start = now_ns()
        await sleep_ns(self._around.call_ns)
        self._around.timeline.work(Resource.COPY, "call", start)

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        """EBADF, as for any fd that is open for reading only."""
        raise fails(errno.EBADF)

    async def close(self) -> None:
        """See proto_v3.vfio.device.DataFd."""

    async def precopy_info(self) -> PrecopyInfo:
        """v2's (sim.device.save_v2)."""
        raise fails(errno.ENOTTY)

    async def stream_info(self) -> StreamInfo:
        """v3's (sim.device.save_v3)."""
        raise fails(errno.ENOTTY)

    async def get_stream(self, index: int) -> DataFd:
        """The critical fd's (sim.device.save_v3)."""
        raise fails(errno.ENOTTY)


@dataclass(slots=True)
class LoadCounts:
    """What loading one device took, beside the bytes."""

    peak_held_bytes: int = 0
    """The most that the driver held at once: records that were coming in, waiting for their epoch or being loaded."""
    overtaken_bytes: int = 0
    """v3: of blocks that were dropped on arrival, for a later epoch had made them invalid."""
    undone_bytes: int = 0
    """v3: of blocks that were loaded, and that a later epoch made invalid."""
    stale_bytes: int = 0
    """v3, blocks: that were dropped on arrival, for a newer version was there."""


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
