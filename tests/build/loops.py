# SPDX-License-Identifier: GPL-2.0-or-later
"""Event loops of the operating system, and a check that what ran on one leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from sim.live.io import IO

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
WAYS = [(loop, io) for loop in LOOPS for io in IO]
"""Every loop with every way of waiting for bytes."""


def open_fds() -> dict[str, str]:
    """This process's descriptors, but for /dev/null, of which libuv keeps one in reserve once it needs to."""
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: what for fd, what in fds.items() if what != "/dev/null"}


def _threads() -> set[threading.Thread]:
    """But for those that the loop keeps for whoever has something for a thread to do."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith(("asyncio_", "uvloop_"))}


def _tasks() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def run(
    main: Callable[[], Coroutine[Any, Any, None]], loop: str = "uvloop", *, tasks_end_at_once: bool = False
) -> None:
    """Run it, and check that it leaves no descriptor, task, thread or complaint behind."""
    complaints: list[dict[str, Any]] = []
    threads = _threads()

    async def checked() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        before = open_fds()
        await main()
        assert not tasks_end_at_once or not _tasks(), _tasks()
        for _ in range(500):  # what was cancelled or closed ends in the loop's next turns, a thread a little later
            if not _tasks() and len(open_fds()) <= len(before) and not _threads() - threads:
                break
            await asyncio.sleep(0.01)
        assert not _tasks(), _tasks()
        assert len(open_fds()) <= len(before), sorted(open_fds().items() - before.items())
        assert not _threads() - threads, _threads() - threads

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(checked())
    assert not complaints, complaints
