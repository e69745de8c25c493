# SPDX-License-Identifier: GPL-2.0-or-later
"""The port of the clock that the model runs on: virtual (sim.clock.virtual) or real time (sim.live.real_time).

All times are integer nanoseconds since the run began.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from proto_v3.errors import ProtoV3Error

Callback = Callable[..., object]


class ClockError(ProtoV3Error):
    """Base of the virtual clock's errors."""


class LoopStateError(ClockError, RuntimeError):
    """The loop is closed or running when it must not be, or no virtual loop is running."""


class Timer(Protocol):
    """A callback that will run at a time."""

    def cancel(self) -> None:
        """Keep the callback from running."""


class Time(Protocol):
    """A clock that the model runs on."""

    @property
    def _now_ns(self) -> int:
        """Nanoseconds since the run began."""

    def _wakeup_at(self, when_ns: int) -> asyncio.Future[None]:
        """A future that is done at `when_ns`."""

    def call_at_ns(self, when_ns: int, callback: Callback, *args: Any) -> Timer:
        """Run the callback at `when_ns`."""

    def _take_late_ns(self) -> int:
        """How late the last timer woke the current task, in ns. Returned once, then 0. Virtual timers are never late.

        The caller subtracts it from its next delay, so that lateness does not add up.
        """

    def _was_late(self, task: asyncio.Task[Any] | None, late_ns: int) -> None:
        """Record that a timer wakes this task `late_ns` late."""


class _Running(threading.local):
    """Holds the clock of this thread: the virtual loop while one runs, or the one set by `use`.

    asyncio.get_running_loop would do, but makes a system call on Python 3.11: a tenth of the cost of a `sleep_ns`.
    """

    clock: Time

    def __getattr__(self, name: str) -> NoReturn:
        raise LoopStateError("no virtual event loop is running in this thread")


running = _Running()


def use(time: Time) -> None:
    """Run the model on this clock in this thread from now on. Live mode calls it once in each process."""
    running.clock = time


def current() -> Time:
    """The clock of this thread. LoopStateError if there is none."""
    return running.clock


def now_ns() -> int:
    """The time of this thread's clock, in nanoseconds."""
    return running.clock._now_ns


async def sleep_ns(delay_ns: int) -> None:
    """Wait for `delay_ns` nanoseconds; if 0, until all ready callbacks have run. ValueError if negative."""
    loop = running.clock
    await loop._wakeup_at(loop._now_ns + delay_ns)


async def sleep_until_ns(when_ns: int) -> None:
    """Wait until the time is `when_ns` nanoseconds. ValueError if that is past."""
    await running.clock._wakeup_at(when_ns)
