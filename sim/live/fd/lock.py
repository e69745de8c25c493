"""A real mutex of the driver: taken by threads while they copy, and by tasks of the loop.

It is first come, first served, as in virtual time. Otherwise a thread that copies piece after piece would take it again
before a waiting task has woken up. Waiting for it is recorded as Resource.LOCK.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from proto_v3.timeline import Resource, Timeline
from sim.clock.port import now_ns


class Mutex:
    """Mutual exclusion of threads, first come, first served. Any thread may release it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of what follows; never held for long
        self._held = False
        self._queue: deque[Callable[[], None]] = deque()

    def take(self, granted: Callable[[], None]) -> bool:
        """True if it was free: the caller has it. Otherwise `granted` is called, by the thread that hands it over."""
        with self._guard:
            if self._held:
                self._queue.append(granted)
                return False
            self._held = True
            return True

    def give_up(self, granted: Callable[[], None]) -> None:
        """Stop waiting. If it is too late for that, `granted` is or was called all the same."""
        with self._guard, contextlib.suppress(ValueError):
            self._queue.remove(granted)

    def release(self) -> None:
        """Hand it over to the longest waiter, if there is one."""
        with self._guard:
            self._held = bool(self._queue)
            granted = self._queue.popleft() if self._queue else None
        if granted is not None:
            granted()

    def __enter__(self) -> None:
        mine = threading.Lock()
        mine.acquire()
        if not self.take(mine.release):
            mine.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RealLock:
    """An asyncio lock over a `mutex` that threads take, too; records waiting as sim.resource.Lock does."""

    def __init__(self, timeline: Timeline) -> None:
        self.mutex = Mutex()
        self._timeline = timeline

    async def __aenter__(self) -> None:
        start_ns = now_ns()
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()

        def have() -> None:
            if mine.cancelled():  # in the meantime
                self.mutex.release()
            else:
                mine.set_result(None)

        def granted() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to end
                loop.call_soon_threadsafe(have)

        if self.mutex.take(granted):
            return
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self.mutex.release()
            else:
                self.mutex.give_up(granted)
            raise
        self._timeline.work(Resource.LOCK, "lock wait", start_ns)

    async def __aexit__(self, *_: object) -> None:
        self.mutex.release()
