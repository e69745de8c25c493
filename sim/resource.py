# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers with a rate, and locks that record waiting.

A FifoServer knows a job's end when it is handed in: one timer a job, however long the queue. The firmware's command
slots share their speed among all commands in progress. Rates are bytes/s; times are nanoseconds of virtual time.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from typing import Any, NamedTuple

from proto_v3.timeline import Resource, Timeline
from sim.clock import port as clock
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.scenario.units import NS_PER_S

ROUNDING_NS = 1e-3
"""Rounding error of dividing an engine's time among commands; far below the clock's nanosecond."""


def duration_ns(size_bytes: int, bytes_per_s: float) -> int:
    """Time that `size_bytes` take at a rate."""
    return round(size_bytes * NS_PER_S / bytes_per_s)


async def spend(timeline: Timeline, resource: Resource, what: str, cost_ns: int) -> None:
    """Let `cost_ns` pass, and record them as work of the current task."""
    start = now_ns()
    await sleep_ns(cost_ns)
    timeline.work(resource, what, start)


class FifoServer:
    """One server, first come, first served: memory, a link, a connection."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_ns = 0

    def book(self, size_bytes: int, now: int) -> tuple[int, int]:
        """Put a job of `size_bytes` into the queue at `now`; returns the times of its start and its end."""
        start = max(now, self._free_ns)
        self._free_ns = start + duration_ns(size_bytes, self.bytes_per_s)
        return start, self._free_ns


class _Command(NamedTuple):
    """A command in progress: the future that its end sets, and the task that waits for it."""

    done: asyncio.Future[None]
    task: asyncio.Task[Any] | None


class CommandSlots:
    """The firmware's command slots: commands in progress share the engines, none waits for another to end.

    Each command runs at full speed while there are no more commands than engines; with more, all slow down alike
    (processor sharing). `engines` may be a fraction: the total speed of all commands, in units of one command's speed.

    Why sharing: four loads handed to one PF at once took twice as long as one alone, all four of them (Maciej
    Szmigiero, 6240036b-f8b8-4592-8f80-21ee6d3eaa1e@maciej.szmigiero.name); in order of arrival the first two would have
    been quick. A command runs to its end even if its caller is cancelled: the firmware does not know of that.
    """

    def __init__(self, engines: float) -> None:
        self._engines = engines
        # The service, in nanoseconds of full speed, of a command that has been there from the start. All commands in
        # progress are served alike, so each ends when this has grown by its own service time.
        self._served_ns = 0.0
        self._settled_ns = 0
        self._commands: list[tuple[float, int, _Command]] = []  # a heap: served_ns at its end, number
        self._number = 0
        self._timer: clock.Timer | None = None

    async def run(self, service_ns: int) -> None:
        """Run a command that takes `service_ns` at full speed.

        If a real timer woke the caller late, the command is credited with the time that it missed.
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
            self._served_ns = 0.0  # no command compares with older values: start anew, and keep the numbers small
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
        _, end = self._memory.book(size_bytes, start + call_ns)
        await sleep_until_ns(max(end, start + call_ns + duration_ns(size_bytes, self._copy_bytes_per_s)))
        self._timeline.work(Resource.COPY, what, start)


class Lock:
    """A mutex of the driver, first come, first served. Waiting for it is recorded as Resource.LOCK."""

    def __init__(self, timeline: Timeline) -> None:
        self._lock = asyncio.Lock()
        self._timeline = timeline

    async def __aenter__(self) -> None:
        # A free lock may still be due to an earlier waiter: only the clock shows whether this task waited.
        start = now_ns()
        await self._lock.acquire()
        if now_ns() > start:
            self._timeline.work(Resource.LOCK, "lock wait", start)

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
