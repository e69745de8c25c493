"""The clock that the model runs on, as a port: the virtual one (sim.clock.virtual) or real time (sim.live.real_time).

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
    """The loop is closed, stopped or running when it must not be, or no virtual loop is running."""


class Timer(Protocol):
    """A callback that is to run at a time."""

    def cancel(self) -> None:
        """Keep it from running."""


class Time(Protocol):
    """A clock that the model runs on: a VirtualLoop, or the real time of live mode (sim.live.real_time)."""

    @property
    def _now_ns(self) -> int:
        """Nanoseconds since the run began."""

    def _wakeup_at(self, when_ns: int) -> asyncio.Future[None]:
        """A future that is done at that time."""

    def call_at_ns(self, when_ns: int, callback: Callback, *args: Any) -> Timer:
        """Run the callback at that time."""

    def _take_late_ns(self) -> int:
        """How late the current task was woken by its last timer, told once: real timers are late, virtual ones never.

        Whoever has a next deadline takes it off, so that what is late does not add up.
        """

    def _was_late(self, task: asyncio.Task[Any] | None, late_ns: int) -> None:
        """A task is woken so late."""


class _Running(threading.local):
    """Has the clock of this thread: the virtual loop while one runs, or one that was set by `use`.

    asyncio.get_running_loop would do, but makes a system call on Python 3.11: a tenth of the cost of a `sleep_ns`.
    """

    clock: Time

    def __getattr__(self, name: str) -> NoReturn:
        raise LoopStateError("no virtual event loop is running in this thread")


running = _Running()


def use(time: Time) -> None:
    """Let the model run on another clock in this thread from now on: live mode does it, once a process."""
    running.clock = time


def current() -> Time:
    """The clock of this thread. LoopStateError if there is none."""
    return running.clock


def now_ns() -> int:
    """The time in nanoseconds, of the clock that runs."""
    return running.clock._now_ns


async def sleep_ns(delay_ns: int) -> None:
    """Wait for `delay_ns` nanoseconds; if 0, until all that is ready has run. ValueError if negative."""
    loop = running.clock
    await loop._wakeup_at(loop._now_ns + delay_ns)


async def sleep_until_ns(when_ns: int) -> None:
    """Wait until the time is `when_ns` nanoseconds. ValueError if that is past."""
    await running.clock._wakeup_at(when_ns)
