# SPDX-License-Identifier: GPL-2.0-or-later
"""One deadline for everything that one side of a session waits for, from its first byte to its last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from proto_v3.errors import ProtoV3Error

Waited = str | Callable[[], str]
"""What is waited for, in words."""


def again(error: Exception) -> Exception:
    """A new error of the same kind and with the same text, for one of several tasks that wait."""
    return type(error)(*error.args)


class Deadline:
    """When the waits of this side end: at a time that is set anew for each stage, or all at once by end().

    What the other side sends does not prolong it.
    """

    def __init__(self, limit_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._waits: set[asyncio.Timeout] = set()
        self._cause: Exception | None = None
        self.set(limit_s)

    def set(self, limit_s: float) -> None:
        """A new stage begins, and may take this time."""
        self._limit_s = limit_s
        self._until = self._loop.time() + limit_s
        self._move(self._until)

    def end(self, cause: Exception) -> None:
        """End all waits now, and each later one at once: they raise an error like this."""
        if self._cause is None:
            self._cause = cause
            self._move(self._loop.time())

    def _move(self, until: float) -> None:
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(until)

    @asynccontextmanager
    async def waiting(self, waits_for: Waited) -> AsyncIterator[None]:
        """Bound what the body waits for. TimeoutError says what that was; after end(), the error is that of end()."""
        if self._cause is not None:
            raise again(self._cause)
        wait = asyncio.timeout_at(self._until)
        try:
            async with wait:
                self._waits.add(wait)
                yield
        except (OSError, ProtoV3Error, ExceptionGroup) as error:
            if not wait.expired():
                raise
            if self._cause is not None:
                raise again(self._cause) from error
            what = waits_for if isinstance(waits_for, str) else waits_for()
            raise TimeoutError(f"waited for {what}: not there within {self._limit_s:g} s") from error
        finally:
            self._waits.discard(wait)
