# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a change, so that the timeline can follow the cause."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from proto_v3.timeline import cause, caused_by

Woken = Callable[[], Awaitable[None]]
"""Awaited by a thread that waited, when it is woken: what it takes until it runs again."""


class Notify:
    """Wakes all tasks that wait for a change. The span that notified becomes the cause of what they do next.

    Use: `while not condition: await notify.wait()`.
    """

    def __init__(self, woken: Woken | None = None) -> None:
        """`woken`: of the threads that wait here; None: they run again at once."""
        self._waiters: list[asyncio.Future[int]] = []
        self._woken = woken
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waited_for(self) -> bool:
        """Whether any task waits."""
        return any(not waiter.done() for waiter in self._waiters)

    def notify(self, by: int | None = None) -> None:
        """Wake all waiting tasks. `by`: the span that is the cause; by default the current task's cursor."""
        if not self._waiters:
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(cause() if by is None else by)

    async def wait(self) -> None:
        """Wait for the next notify()."""
        if self._loop is None:  # asked once: on Python 3.11 it is a system call
            self._loop = asyncio.get_running_loop()
        # Of asyncio's own class, which it awaits faster than one of a loop's create_future(); nobody else sees it.
        waiter: asyncio.Future[int] = asyncio.Future(loop=self._loop)
        self._waiters.append(waiter)
        try:
            caused_by(await waiter)
        except asyncio.CancelledError:  # also a timeout; else the waiter would stay until the next notify()
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            raise
        if self._woken is not None:
            await self._woken()
