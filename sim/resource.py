"""Servers with a rate, and locks that account for waiting.

A pipe is first come, first served, so its end times are known when work is handed in: one timer a job, however long the
queue. The firmware shares what it has among all commands in progress. Rates are bytes/s; times are nanoseconds of
virtual time.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from typing import Any, NamedTuple

from proto_v3.timeline import Resource, Timeline
from sim.clock import port as clock
from sim.clock.port import now_ns, sleep_until_ns
from sim.scenario.units import NS_PER_S

ROUNDING_NS = 1e-3
"""Of the division of an engine's time among commands; far below the clock's nanosecond."""


def duration_ns(size_bytes: int, bytes_per_s: float) -> int:
    """How long so many bytes take at a rate."""
    return round(size_bytes * NS_PER_S / bytes_per_s)


class FifoServer:
    """One server, in order of arrival: memory, a link, a connection."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_ns = 0

    def book(self, size_bytes: int, now: int) -> tuple[int, int]:
        """Take the next place for so many bytes; returns when they start and when they are through."""
        start = max(now, self._free_ns)
        self._free_ns = start + duration_ns(size_bytes, self.bytes_per_s)
        return start, self._free_ns


class _Command(NamedTuple):
    """A command in progress: what is done at its end, and the task that waits for it."""

    done: asyncio.Future[None]
    task: asyncio.Task[Any] | None


class CommandSlots:
    """The firmware's engines: commands in progress share them, none waits for another to end.

    Each command runs at full speed while there are no more commands than engines, and all slow down alike beyond that
    (processor sharing). `engines` may be a fraction: it says how many times one command's speed all of them reach.

    Why sharing: four loads handed to one PF at once took twice as long as one alone, all four of them (Maciej
    Szmigiero, 6240036b-f8b8-4592-8f80-21ee6d3eaa1e@maciej.szmigiero.name); in order of arrival the first two would have
    been quick. A command that was handed in runs to its end even if its caller is cancelled: the firmware knows nothing
    of it.
    """

    def __init__(self, engines: float) -> None:
        self._engines = engines
        # What a command would have got that was there from the start, in nanoseconds of full speed. All that are in
        # progress get the same, so each is through when this has grown by its own service time.
        self._served_ns = 0.0
        self._settled_ns = 0
        self._commands: list[tuple[float, int, _Command]] = []  # a heap: ends at, number, whose
        self._number = 0
        self._timer: clock.Timer | None = None

    async def run(self, service_ns: int) -> None:
        """Run a command that takes `service_ns` at full speed.

        One that is handed in late, because a real timer woke its caller late, is as far as if it had been in time.
        """
        time = clock.current()
        self._settle(time._now_ns)
        command = _Command(asyncio.get_running_loop().create_future(), asyncio.current_task())
        self._number += 1
        head_start_ns = time._take_late_ns() * self._speed(len(self._commands) + 1)
        heapq.heappush(self._commands, (self._served_ns + service_ns - head_start_ns, self._number, command))
        self._set_timer(time)
        await command.done

    def _speed(self, commands: int) -> float:
        return min(1.0, self._engines / commands)

    def _settle(self, now: int) -> None:
        if self._commands:
            self._served_ns += (now - self._settled_ns) * self._speed(len(self._commands))
        else:
            self._served_ns = 0.0  # nobody compares with what was before: start anew, and keep the numbers small
        self._settled_ns = now

    def _set_timer(self, time: clock.Time) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._commands:
            speed = self._speed(len(self._commands))
            left_ns = math.ceil((self._commands[0][0] - self._served_ns) / speed - ROUNDING_NS)
            self._timer = time.call_at_ns(self._settled_ns + max(0, left_ns), self._end, time)

    def _end(self, time: clock.Time) -> None:
        self._settle(time._now_ns)
        speed = self._speed(len(self._commands))
        while self._commands and self._commands[0][0] <= self._served_ns + ROUNDING_NS:
            ends_ns, _, command = heapq.heappop(self._commands)
            if not command.done.done():
                time._was_late(command.task, max(0, round((self._served_ns - ends_ns) / speed)))
                command.done.set_result(None)
        self._set_timer(time)


class Memory:
    """Copies between kernel and user space: each thread at its own rate, all of them within the memory's."""

    def __init__(self, copy_bytes_per_s: float, memory_bytes_per_s: float, timeline: Timeline) -> None:
        self._copy_bytes_per_s = copy_bytes_per_s
        self._memory = FifoServer(memory_bytes_per_s)
        self._timeline = timeline

    async def copy(self, size_bytes: int, call_ns: int, what: str) -> None:
        """Copy on the calling thread, with a fixed cost of `call_ns` before."""
        start = now_ns()
        _, through = self._memory.book(size_bytes, start + call_ns)
        await sleep_until_ns(max(through, start + call_ns + duration_ns(size_bytes, self._copy_bytes_per_s)))
        self._timeline.work(Resource.COPY, what, start)


class Lock:
    """A mutex of the driver, first come, first served. Waiting for it is recorded as Resource.LOCK."""

    def __init__(self, timeline: Timeline) -> None:
        self._lock = asyncio.Lock()
        self._timeline = timeline

    async def __aenter__(self) -> None:
        # A lock that is free may still be promised to somebody who waits: only the clock tells whether this one waited.
        start = now_ns()
        await self._lock.acquire()
        if now_ns() > start:
            self._timeline.work(Resource.LOCK, "lock wait", start)

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
