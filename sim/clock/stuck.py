# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs that would never end: the errors, and their report of where each task waits."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sim.clock.port import ClockError


class CodePlace(NamedTuple):
    """A line of code at which a task waits."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(Path(self.file).parts[-2:])}:{self.line})"


class WaitingTask(NamedTuple):
    """An unfinished task: its name, its awaits (innermost first), and the name of the task it waits for, if any."""

    name: str
    places: tuple[CodePlace, ...]
    awaits: str | None

    @classmethod
    def of(cls, task: asyncio.Task[Any]) -> WaitingTask:
        """Where a task waits."""
        awaited = getattr(task, "_fut_waiter", None)
        awaits = awaited.get_name() if isinstance(awaited, asyncio.Task) else None
        return cls(task.get_name(), _await_chain(task.get_coro()), awaits)

    def __str__(self) -> str:
        where = ", called from ".join(map(str, self.places)) or "an unknown place"
        return f"{self.name} waits in {where}" + (f", for task {self.awaits}" if self.awaits else "")


class StuckError(ClockError):
    """A run that would never end. `waiting` lists the unfinished ones of `tasks`."""

    def __init__(self, reason: str, tasks: Iterable[asyncio.Task[Any]]) -> None:
        self.waiting = [WaitingTask.of(task) for task in tasks if not task.done()]
        super().__init__("\n  ".join([reason, *map(str, self.waiting)]))


class DeadlockError(StuckError):
    """No callback is ready and no timer is set, but the main task is not done."""


class TimeLimitError(StuckError):
    """Virtual time would pass the loop's limit, or callbacks continue without end at one instant."""


def _await_chain(awaited: object) -> tuple[CodePlace, ...]:
    """Where a suspended coroutine waits, innermost await first."""
    places = []
    while awaited is not None:
        for frame_name, next_name in (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")):
            if hasattr(awaited, frame_name):
                frame, awaited = getattr(awaited, frame_name), getattr(awaited, next_name)
                if frame is not None:
                    places.append(CodePlace(frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno))
                break
        else:
            # The objects that `async for` and `__await__` put in between do not show what they drive. The garbage
            # collector does. Anything else is a future, or foreign, and the end of the chain.
            hides = type(awaited).__name__ in ("async_generator_asend", "async_generator_athrow", "coroutine_wrapper")
            awaited = gc.get_referents(awaited)[0] if hides else None
    return tuple(reversed(places))
