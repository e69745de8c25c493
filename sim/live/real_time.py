# SPDX-License-Identifier: GPL-2.0-or-later
"""Real time for the model: the kernel's timers, set to the nanosecond, and a record of how late they were.

uvloop's timers are whole milliseconds. So one timerfd is set to the next deadline in absolute time, and waited for
through the event loop. perf_counter_ns() is CLOCK_MONOTONIC on Linux, which is the timerfd's clock too.

A timer wakes its task late, by some 100 us, or by more on a busy machine. The next sleep of the task is shorter by that
much. So its deadlines are those of a clock that is never late, and lateness does not add up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from typing_extensions import override

from sim.clock.port import Time
from sim.live.io import set_done
from sim.scenario.units import NS_PER_S

_TFD_NONBLOCK, _TFD_CLOEXEC, _TFD_TIMER_ABSTIME = os.O_NONBLOCK, os.O_CLOEXEC, 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


_libc = ctypes.CDLL(None, use_errno=True)


def _timerfd() -> int:
    """A timerfd on CLOCK_MONOTONIC (Python has os.timerfd_create since 3.13)."""
    number: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
    if number < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return number


def _set(timerfd: int, at_ns: int) -> None:
    spec = _Itimerspec(_Timespec(0, 0), _Timespec(*divmod(max(1, at_ns), NS_PER_S)))
    if _libc.timerfd_settime(timerfd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd_settime")


def _user_ns() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_utime * NS_PER_S)


class RealTimer:
    """A timer: `callback` runs after `asked_ns` nanoseconds; it is None once the timer is cancelled.

    It is not derived from sim.clock.port.Timer, whose instances have no slots.
    """

    __slots__ = ("asked_ns", "callback")

    def __init__(self, callback: Callable[[], object], asked_ns: int) -> None:
        self.callback: Callable[[], object] | None = callback
        self.asked_ns = asked_ns

    def cancel(self) -> None:
        """Keep the callback from running."""
        self.callback = None


@dataclass(frozen=True, slots=True)
class Delays:
    """The timers of a process that fired: the delays asked for, and how late they were, in nanoseconds."""

    count: int
    asked_ns: int
    """The sum of all delays asked for."""
    late_median_ns: int
    late_p99_ns: int
    late_max_ns: int


class RealTime(Time):
    """Real time, in nanoseconds since `zero_ns` of perf_counter_ns()."""

    def __init__(self, zero_ns: int | None = None) -> None:
        """`zero_ns`: None is now. Must be made in a running event loop."""
        self.zero_ns = time.perf_counter_ns() if zero_ns is None else zero_ns
        self._loop = asyncio.get_running_loop()
        self._timers: list[tuple[int, int, RealTimer]] = []
        self._number = 0
        self._timerfd = _timerfd()
        self._set_to = 0
        self._loop.add_reader(self._timerfd, self._fire)
        self._late: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()
        self._asked_ns = 0
        self._cpu_began_ns = time.process_time_ns()
        self._user_began_ns = _user_ns()
        self._lateness_ns = array("q")

    @property
    def _now_ns(self) -> int:
        return time.perf_counter_ns() - self.zero_ns

    def now_ns(self) -> int:
        """The time, for a timeline."""
        return time.perf_counter_ns() - self.zero_ns

    @override
    def call_at_ns(self, when_ns: int, callback: Callable[..., object], *args: Any) -> RealTimer:
        timer = RealTimer(lambda: callback(*args), max(0, when_ns - self._now_ns))
        self._number += 1
        heappush(self._timers, (when_ns, self._number, timer))
        self._set_timer()
        return timer

    def _wakeup_at(self, when_ns: int) -> asyncio.Future[None]:
        task = asyncio.current_task()
        when_ns -= self._take_late_ns()
        done: asyncio.Future[None] = self._loop.create_future()
        now = self._now_ns
        if when_ns <= now:
            # Its time has passed already, because the task was late before. The sleep ends now, and the rest of the
            # lateness is kept. Other tasks run first, or a task that is far behind would keep them all waiting.
            self._was_late(task, now - when_ns)
            self._loop.call_soon(set_done, done)
            return done

        def wake() -> None:
            if not done.done():
                self._was_late(task, self._now_ns - when_ns)
                done.set_result(None)

        self.call_at_ns(when_ns, wake)
        return done

    def _take_late_ns(self) -> int:
        task = asyncio.current_task()
        return 0 if task is None else self._late.pop(task, 0)

    def _was_late(self, task: asyncio.Task[Any] | None, late_ns: int) -> None:
        if task is not None and late_ns > 0:
            self._late[task] = late_ns

    def _set_timer(self) -> None:
        if self._timerfd >= 0 and self._timers and self._timers[0][0] + self.zero_ns != self._set_to:
            self._set_to = self._timers[0][0] + self.zero_ns
            if self._set_to <= time.perf_counter_ns():
                self._loop.call_soon(self._fire)
            else:
                _set(self._timerfd, self._set_to)

    def _fire(self) -> None:
        if self._timerfd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            os.read(self._timerfd, 8)
        self._set_to = 0
        try:
            while self._timers and self._timers[0][0] <= (now := self._now_ns):
                when_ns, _, timer = heappop(self._timers)
                if timer.callback is not None:
                    self._asked_ns += timer.asked_ns
                    self._lateness_ns.append(now - when_ns)
                    timer.callback()
        finally:
            self._set_timer()

    @property
    def cpu_ns(self) -> int:
        """CPU time that all threads of the process took since this object was made."""
        return time.process_time_ns() - self._cpu_began_ns

    @property
    def user_ns(self) -> int:
        """Of cpu_ns, what was spent outside of the kernel: the interpreter, nearly all of it."""
        return _user_ns() - self._user_began_ns

    def delays(self) -> Delays:
        """The timers that fired so far."""
        late = np.array(self._lateness_ns, np.int64)
        if not len(late):
            return Delays(0, 0, 0, 0, 0)
        median, p99 = (int(at) for at in np.percentile(late, [50, 99]))
        return Delays(len(late), self._asked_ns, median, p99, int(late.max()))

    def close(self) -> None:
        """Let no timer fire any more. May be called again."""
        if self._timerfd >= 0:
            self._loop.remove_reader(self._timerfd)
            os.close(self._timerfd)
            self._timerfd = -1
