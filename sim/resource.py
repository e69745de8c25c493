# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers with a rate, and locks that record waiting.

A FifoServer knows a job's end when it is handed in: one timer a job, however long the queue. The firmware's command
slots share their speed among all commands in progress. Rates are bytes/s; times are nanoseconds of virtual time.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import operator
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from proto_v3.timeline import Resource, Timeline
from sim.clock import port as clock
from sim.clock.port import now_ns, sleep_until_ns
from sim.scenario.units import NS_PER_S

ROUNDING_NS = 1e-3
"""Rounding error of dividing an engine's time among commands; far below the clock's nanosecond."""


def duration_ns(size_bytes: int, bytes_per_s: float) -> int:
    """Time that `size_bytes` take at a rate."""
    return round(size_bytes * NS_PER_S / bytes_per_s)


async def spend(timeline: Timeline, resource: Resource, what: str, cost_ns: int) -> None:
    """Let `cost_ns` pass, and record them as work of the current task."""
    time = clock.current()
    start = time._now_ns
    await time._wakeup_at(start + cost_ns)
    timeline.work(resource, what, start)


def wake_up(timeline: Timeline, cost_ns: int) -> Coroutine[Any, Any, None]:
    """Let the time pass that a thread takes to run again after it waited."""
    return spend(timeline, Resource.FIXED, "wake-up", cost_ns)


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


class _Commands:
    """Commands in progress that are all served alike."""

    __slots__ = ("count", "heap", "served_ns", "speed")

    def __init__(self) -> None:
        # The service, in nanoseconds of full speed, of a command that has been there from the start. All of them are
        # served alike, so each ends when this has grown by its own service time.
        self.served_ns = 0.0
        self.speed = 1.0
        self.count = 0
        self.heap: list[tuple[float, int, _Command]] = []  # served_ns at its end, number


class CommandSlots:
    """The firmware's command slots: commands in progress share the engines, none waits for another to end.

    Each command runs at full speed while there are no more commands than engines; with more, all slow down alike
    (processor sharing). `engines` may be a fraction: the total speed of all commands, in units of one command's speed.
    The commands of one VF have a total speed of `of_a_vf` at most; what they leave, the others share.

    Why sharing: four loads handed to one PF at once took twice as long as one alone, all four of them (Maciej
    Szmigiero, 6240036b-f8b8-4592-8f80-21ee6d3eaa1e@maciej.szmigiero.name); in order of arrival the first two would have
    been quick. A command runs to its end even if its caller is cancelled: the firmware does not know of that.
    """

    def __init__(self, engines: float, of_a_vf: float = math.inf) -> None:
        self._engines = engines
        self._of_a_vf = of_a_vf if of_a_vf < engines else math.inf
        self._commands: dict[int, _Commands] = {}
        """By VF; all of them together if a VF cannot have less than the others."""
        self._settled_ns = 0
        self._number = 0
        self._timer: clock.Timer | None = None

    async def run(self, service_ns: int, vf: int = 0) -> None:
        """Run a command of a VF that takes `service_ns` at full speed.

        If a real timer woke the caller late, the command is credited with the time that it missed.
        """
        time = clock.current()
        self._settle(time._now_ns)
        if self._of_a_vf == math.inf:
            vf = 0
        commands = self._commands.get(vf)
        if commands is None:
            commands = self._commands[vf] = _Commands()
        command = _Command(asyncio.get_running_loop().create_future(), asyncio.current_task())
        self._number += 1
        commands.count += 1
        self._share()
        head_start_ns = time._take_late_ns() * commands.speed
        heapq.heappush(commands.heap, (commands.served_ns + service_ns - head_start_ns, self._number, command))
        self._set_timer(time)
        await command.done

    def _share(self) -> None:
        """Set the speeds: the same for all commands, at most 1; less for those of a VF with more than it may have."""
        queues = list(self._commands.values())
        if len(queues) > 1:
            queues.sort(key=_count, reverse=True)  # the VF with most is the first
        engines, count = self._engines, sum(map(_count, queues))
        for commands in queues:
            commands.speed = min(1.0, engines / count, self._of_a_vf / commands.count)
            engines -= commands.speed * commands.count
            count -= commands.count

    def _settle(self, now: int) -> None:
        for commands in self._commands.values():
            commands.served_ns += (now - self._settled_ns) * commands.speed
        self._settled_ns = now

    def _set_timer(self, time: clock.Time) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._commands:
            times_ns = [(of.heap[0][0] - of.served_ns) / of.speed for of in self._commands.values()]
            left_ns = math.ceil(min(times_ns) - ROUNDING_NS)
            self._timer = time.call_at_ns(self._settled_ns + max(0, left_ns), self._end, time)

    def _end(self, time: clock.Time) -> None:
        self._settle(time._now_ns)
        for vf, commands in list(self._commands.items()):
            while commands.heap and commands.heap[0][0] <= commands.served_ns + ROUNDING_NS:
                ends_ns, _, command = heapq.heappop(commands.heap)
                commands.count -= 1
                if not command.done.done():
                    time._was_late(command.task, max(0, round((commands.served_ns - ends_ns) / commands.speed)))
                    command.done.set_result(None)
            if not commands.heap:
                del self._commands[vf]
        self._share()
        self._set_timer(time)


_count = operator.attrgetter("count")


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


class Locks:
    """Mutexes that are held together, taken in this order. Cheaper than an AsyncExitStack for each record."""

    def __init__(self, locks: Sequence[AbstractAsyncContextManager[None]]) -> None:
        self._locks = locks

    async def __aenter__(self) -> None:
        for at, lock in enumerate(self._locks):
            try:
                await lock.__aenter__()
            except BaseException:
                await self._release(at)
                raise

    async def __aexit__(self, *_: object) -> None:
        await self._release(len(self._locks))

    async def _release(self, count: int) -> None:
        for lock in reversed(self._locks[:count]):
            await lock.__aexit__(None, None, None)


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
