# SPDX-License-Identifier: GPL-2.0-or-later
"""What both kinds of data fd share: those that are saved from a device (`sim/device/save`) and those that are loaded
into it (`sim/device/load`)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from proto_v3.notify import Notify
from proto_v3.timeline import Resource, Timeline
from proto_v3.vfio.device import BlocksFd, DataFd, DirtyBlocks, Ready
from proto_v3.vfio.uapi import PrecopyInfo, State, StreamFlags, StreamInfo
from proto_v3.wire.frames import Payload
from sim.clock.port import now_ns
from sim.device.firmware import VfFirmware
from sim.report import Counters, DriverMessage
from sim.resource import Lock, spend, wake_up
from sim.scenario.device import Fault
from sim.scenario.tables import Driver
from sim.scenario.times import DeviceTimes

DriverLock = AbstractAsyncContextManager[None]


class CopyModel(Protocol):
    """How long copies between kernel and user space take."""

    async def copy(self, size_bytes: int, call_ns: int, what: str) -> None:
        """Copy on the calling thread, with a fixed cost of `call_ns` before."""


def fails(code: int) -> OSError:
    """The error of a system call, with the kernel's text."""
    return OSError(code, os.strerror(code))


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What a device's driver and all of its streams use."""

    firmware: VfFirmware
    memory: CopyModel
    timeline: Timeline
    times: DeviceTimes
    call_ns: int
    new_lock: Callable[[Timeline], DriverLock] = Lock
    """Makes a mutex of the driver."""
    locks_in_read: bool = True
    """read() takes the lock that the scenario names. False in live mode, where the thread that copies takes it."""
    wake_up_ns: int = 0
    """What a thread takes to run again that waited in read() or poll(). 0 in live mode, where it takes its own time."""
    tables: bool = False
    """Records carry a table of their blocks and objects. True in live mode, where records are bytes."""


class DriverLog:
    """What the driver logs when something fails in it; not what fails in consequence."""

    def __init__(self) -> None:
        self.messages: list[DriverMessage] = []

    def add(self, text: str) -> None:
        """Log it, with the time."""
        self.messages.append(DriverMessage(now_ns(), text))


class Faults:
    """The failures that the scenario orders for one side of a device."""

    def __init__(self, faults: Sequence[Fault], log: DriverLog) -> None:
        self._faults = faults
        self._left = [fault.times for fault in faults]
        self._commands = 0
        self._log = log

    def _due(self, is_due: Callable[[Fault], bool]) -> Fault | None:
        """The first fault that is due and not used up; it counts as used once more from now on."""
        for at, fault in enumerate(self._faults):
            if self._left[at] and is_due(fault):
                self._left[at] -= 1
                return fault
        return None

    def of_arc(self, arc: str) -> Fault | None:
        """The fault of an arc that is about to be taken; it counts as used from now on."""
        fault = self._due(lambda fault: fault.arc == arc)
        if fault is not None:
            self._log.add(f"{arc} failed: {fault.errno}")
        return fault

    def of_command(self, command: str, what: str = "") -> OSError | None:
        """The error of a firmware command that just ended, None if it succeeded. The log has `what` it was for."""
        done = self._commands
        self._commands += 1
        fault = self._due(lambda fault: fault.command == command and done >= (fault.after or 0))
        if fault is None:
            return None
        self._log.add(f"firmware {command} {self._commands}{what}: {fault.errno}")
        return fails(getattr(errno, fault.errno))


@dataclass(frozen=True, slots=True)
class MigrationSession:
    """What the streams of one migration session share."""

    context: DriverContext
    driver: Driver
    dirty_streams: int
    """0: v2, in one stream."""
    flags: StreamFlags
    state_lock: DriverLock
    faults: Faults
    log: DriverLog
    device_state: Callable[[], State]
    """The state of the device, now."""
    fail: Callable[[], None]
    """v3: put the device into ERROR; every stream answers EIO from then on."""
    guest_resets: Callable[[], None]
    """The guest resets the device: the session is over."""


class PartOfSession:
    """What ends with a migration session."""

    def __init__(self) -> None:
        self._closed = 0  # the errno of every call once the session is over
        self._notify = Notify()

    def end(self, code: int = errno.ENODEV) -> None:
        """The session is over: every call fails with this error, also those that wait. One that failed before (EIO) is
        over when this says so (ENODEV)."""
        if not self._closed or code == errno.ENODEV:
            self._closed = code
        self._notify.notify()

    @property
    def over(self) -> bool:
        """Whether the session is over."""
        return self._closed != 0

    @property
    def error(self) -> OSError | None:
        """The error of every call, if the session is over."""
        return fails(self._closed) if self._closed else None

    def check_open(self) -> None:
        """Raise that error, if the session is over."""
        if self._closed:
            raise fails(self._closed)

    def ready_at_the_end(self) -> Ready:
        """v3: what poll() finds beside READABLE or WRITABLE once the session is over."""
        if not self._closed:
            return Ready.NOTHING
        return Ready.OVER | Ready.FAILED if self._closed == errno.EIO else Ready.OVER

    async def changed(self) -> None:
        """Wait until something changes that a call waits for, or the session is over."""
        await self._notify.wait()


class FdBuffer:
    """Bytes that the driver handed to the fd and the VMM has not read: always 0 in virtual time.

    In live mode they are in the data fd's socket (sim.live.fd.save).
    """

    @property
    def unread_bytes(self) -> int:
        """Bytes that the VMM has not read."""
        return 0

    @property
    def initial_bytes(self) -> int:
        """The first of them, which count as v2's initial_bytes."""
        return 0

    def add(self, size: int, initial_bytes: int) -> None:
        """The driver hands over `size` bytes; the first `initial_bytes` of them count as initial."""

    def make_all_initial(self) -> None:
        """Count all unread bytes as initial."""


class ReadOnlyFd(DataFd):
    """A data fd that is open for reading only."""

    @override
    async def write(self, payload: Payload, piece_bytes: int) -> None:
        raise fails(errno.EBADF)


class WriteOnlyFd(DataFd):
    """A data fd that is open for writing only."""

    @override
    async def read(self, max_bytes: int) -> Payload:
        raise fails(errno.EBADF)

    @override
    async def poll(self, timeout_ns: int | None = None) -> Ready:
        """v2's loaded fd: the drivers have no poll() for it, and so it is always ready."""
        return Ready.READABLE | Ready.WRITABLE


class WriteOnlyBlocksFd(WriteOnlyFd, BlocksFd):
    """A fd of addressable blocks that is open for writing only."""

    @override
    async def geometry(self) -> tuple[int, int]:
        raise fails(errno.EBADF)

    @override
    async def dirty_blocks(self) -> DirtyBlocks:
        raise fails(errno.EBADF)

    @override
    async def read_blocks(self, first: int, count: int) -> Payload:
        raise fails(errno.EBADF)


class SavedFd(PartOfSession, ReadOnlyFd):
    """A data fd that is read from: what all kinds share. Calls that a kind does not have fail as in the kernel."""

    nonblocking = False
    """O_NONBLOCK: read() does not wait while the device saves, but fails with EAGAIN."""
    ioctls: frozenset[int] = frozenset()
    """Those that the kind knows."""

    def __init__(self, session: MigrationSession) -> None:
        super().__init__()
        self.counters = Counters()
        self.buffer = FdBuffer()
        self.on_refused: Callable[[], None] = session.fail
        """Called when firmware refused a SAVE of this stream in pre-copy, which does not fail the session."""
        self._session = session
        self._context = session.context

    def held_bytes(self) -> tuple[int, int]:
        """Bytes that are saved and not read, and bytes that are being saved. Asking changes nothing."""
        return self.buffer.unread_bytes, 0

    def _is_refusal(self, error: OSError) -> bool:
        """Whether a SAVE that failed in pre-copy was refused: the device is in a state in which it cannot be saved. As
        mlx5 has it (MLX5_MIGF_STATE_PRE_COPY_ERROR, for firmware's BAD_RES_STATE, which is EINVAL)."""
        return self._session.driver.precopy == "incremental" and error.errno == errno.EINVAL

    def _count_read(self, size_bytes: int, asked_ns: int, ready_ns: int, locked_ns: int) -> None:
        """A read() of `size_bytes` ends now: it was called, had data, and had the lock at these times."""
        counters = self.counters
        counters.reads += 1
        counters.device_bytes += size_bytes
        counters.read_firmware_ns += ready_ns - asked_ns
        counters.read_lock_ns += locked_ns - ready_ns
        counters.read_copy_ns += now_ns() - locked_ns

    async def _woken(self) -> None:
        """A thread that slept in a call is woken."""
        self.counters.wakeups += 1
        if self._context.wake_up_ns:
            await wake_up(self._context.timeline, self._context.wake_up_ns)

    async def _call(self) -> None:
        """The fixed cost of a call that copies nothing."""
        await spend(self._context.timeline, Resource.COPY, "call", self._context.call_ns)

    @override
    def has_ioctl(self, number: int) -> bool:
        return number in self.ioctls

    @override
    async def close(self) -> None:
        pass

    @override
    async def precopy_info(self) -> PrecopyInfo:
        """v2's (sim.device.save_v2)."""
        raise fails(errno.ENOTTY)

    @override
    async def stream_info(self) -> StreamInfo:
        """v3's (sim.device.save_v3)."""
        raise fails(errno.ENOTTY)

    @override
    async def get_stream(self, index: int) -> DataFd:
        """The critical fd's (sim.device.save_v3)."""
        raise fails(errno.ENOTTY)
