"""Servers with a rate, and locks that account for waiting.

A server is first come, first served, so its end times are known when work is handed in: one timer a job, however long
the queue. Rates are bytes/s; times are nanoseconds of virtual time.
"""

from __future__ import annotations

import asyncio
import heapq

from proto_v3.timeline import Resource, Timeline, cause, caused_by
from sim.clock import now_ns, sleep_until_ns
from sim.scenario import NS_PER_S


def duration_ns(size_bytes: int, bytes_per_s: float) -> int:
    """How long so many bytes take at a rate."""
    return round(size_bytes * NS_PER_S / bytes_per_s)


class Pipe:
    """One server, in order of arrival: memory, a link, a connection."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_ns = 0

    def book(self, size_bytes: int, now: int) -> tuple[int, int]:
        """Take the next place for so many bytes; returns when they start and when they are through."""
        start = max(now, self._free_ns)
        self._free_ns = start + duration_ns(size_bytes, self.bytes_per_s)
        return start, self._free_ns


class Engines:
    """Several equal servers with one queue: the firmware's engines.

    A command that was handed in runs to its end even if its caller is cancelled: the firmware knows nothing of it.
    """

    def __init__(self, count: int) -> None:
        self._free_ns = [0] * count

    def book(self, service_ns: int, now: int) -> tuple[int, int]:
        """Take the next free engine; returns when the command starts and ends."""
        start = max(now, self._free_ns[0])
        heapq.heapreplace(self._free_ns, start + service_ns)
        return start, start + service_ns


class Memory:
    """Copies between kernel and user space: each thread at its own rate, all of them within the memory's."""

    def __init__(self, copy_bytes_per_s: float, memory_bytes_per_s: float, timeline: Timeline) -> None:
        self._copy_bytes_per_s = copy_bytes_per_s
        self._memory = Pipe(memory_bytes_per_s)
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


class Bell:
    """Wakes all who wait for a change; what rang it becomes the cause of their going on.

    To be used as `while not there_is_something: await bell.wait()`.
    """

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[int]] = []

    @property
    def waited_for(self) -> bool:
        """Whether anybody waits."""
        return any(not waiter.done() for waiter in self._waiters)

    def ring(self, by: int | None = None) -> None:
        """Wake all. `by` is the span that is the cause; the current task's cursor if it is left out."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(cause() if by is None else by)

    async def wait(self) -> None:
        """Wait for the next ring."""
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        caused_by(await waiter)
