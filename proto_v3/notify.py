"""Waiting for a change, in a way that the timeline can follow."""

from __future__ import annotations

import asyncio

from proto_v3.timeline import cause, caused_by


class Notify:
    """Wakes all who wait for a change; what rang it becomes the cause of their going on.

    To be used as `while not there_is_something: await notify.wait()`.
    """

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[int]] = []

    @property
    def waited_for(self) -> bool:
        """Whether anybody waits."""
        return any(not waiter.done() for waiter in self._waiters)

    def notify(self, by: int | None = None) -> None:
        """Wake all. `by` is the span that is the cause; the current task's cursor if it is left out."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(cause() if by is None else by)

    async def wait(self) -> None:
        """Wait for the next ring."""
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            caused_by(await waiter)
        except asyncio.CancelledError:  # also at a timeout: else it would be kept until the next ring, if there is one
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            raise
