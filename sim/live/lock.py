"""A mutex of the driver as a real one: taken by threads while they copy, and by calls of the loop.

Waiting for it is recorded as Resource.LOCK, as in virtual time.
"""

from __future__ import annotations

import asyncio
import threading

from proto_v3.timeline import Resource, Timeline
from sim.clock import now_ns


class RealLock:
    """See sim.resource.Lock. `mutex` is what a thread takes."""

    def __init__(self, timeline: Timeline) -> None:
        self.mutex = threading.Lock()
        self._timeline = timeline

    async def __aenter__(self) -> None:
        if self.mutex.acquire(blocking=False):
            return
        start_ns = now_ns()
        taking = asyncio.get_running_loop().run_in_executor(None, self.mutex.acquire)
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda _: self.mutex.release())  # it comes all the same
            raise
        self._timeline.work(Resource.LOCK, "lock wait", start_ns)

    async def __aexit__(self, *_: object) -> None:
        self.mutex.release()
