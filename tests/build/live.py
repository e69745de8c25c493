# SPDX-License-Identifier: GPL-2.0-or-later
"""Live runs for tests: a scenario that is through in a tenth of a second, and what is to be seen of its processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from sim.live.processes.children import Child
from sim.live.processes.report import GuestNote, Note
from sim.live.processes.settings import Settings
from sim.live.result import LiveResult, SideEnd
from sim.live.run import run_here, run_to, serve_one
from sim.live.tcp.sockets import listen
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.scenario import small_scenario

PROCESSES = ("source VMM", "source device", "target VMM", "target device")
PROTOCOLS = ("v2", "v2-multifd", "v3-n2", "v3-n2-pool", "v3-blocks")
HANG_S = 120.0
"""A run that takes longer never ends: not a bound on how long it may take."""


def live_scenario(changes: Mapping[str, Any] | None = None) -> Scenario:
    """About 50 ms of pre-copy and 25 ms of downtime, whatever the protocol; the guest writes all the while."""
    quick = {
        "ram.size_gib": 0.0078125,
        "ram.nonzero_gib": 0.001953125,
        "device.0.state_mib": 4.0,
        "device.0.stop_only_mib": 1.0,
        "device.0.writes": {"pattern": "uniform", "mib_per_s": 20.0},
        "vmm.downtime_limit_ms": 500.0,
        "vmm.give_up_s": 20.0,
    }
    return small_scenario({**quick, **(changes or {})})


@dataclass(slots=True)
class Seen:
    """What a supervisor's caller sees of a run: when guests ran, and when processes were gone."""

    children: dict[str, Child] = field(default_factory=dict)
    gone_ns: dict[str, int] = field(default_factory=dict)
    _running: list[tuple[str, bool]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def watch(self, note: Note) -> None:
        """To be given to run_here()."""
        if isinstance(note, GuestNote):
            self._running.append((note.side, note.runs))
            self._news.set()

    def know(self, children: Sequence[Child]) -> None:
        """These are the run's processes."""
        for child in children:
            self.children[child.name] = child
            child.ended.add_done_callback(lambda _, name=child.name: self._gone(name))

    def _gone(self, name: str) -> None:
        self.gone_ns[name] = time.perf_counter_ns()

    async def until(self, side: str, running: bool) -> None:
        """Until the guest of that side was said to run, or not to run."""
        while (side, running) not in self._running:
            self._news.clear()
            await self._news.wait()

    def intervals_ns(self, result: LiveResult) -> dict[str, list[tuple[int, int]]]:
        """When the guest of each side ran at most: from when it was about to, to when it was said to have stopped, or
        its VMM was gone."""
        ran: dict[str, list[tuple[int, int]]] = {"source": [], "target": []}
        since: dict[str, int | None] = {"source": None, "target": None}
        for note in result.ran:
            side, running, at_ns = note.side, note.runs, note.at_ns
            begun = since[side]
            if running and begun is None:
                since[side] = at_ns
            elif not running and begun is not None:
                ran[side].append((begun, at_ns))
                since[side] = None
        for side, begun in since.items():
            if begun is not None:
                ran[side].append((begun, self.gone_ns[f"{side} VMM"]))
        return ran


Act = Callable[[Seen], Coroutine[Any, Any, None]]
"""What is done to the processes while they run."""


async def live_run(
    protocol: str,
    act: Act | None = None,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[LiveResult, Seen]:
    """A run to its end, in which `act` takes part."""
    scenario, seen = live_scenario(changes), Seen()

    async def started(children: Sequence[Child]) -> None:
        seen.know(children)
        if act is not None:
            await act(seen)

    async with asyncio.timeout(HANG_S):
        result = await run_here(
            scenario,
            Protocol.parse(protocol, scenario),
            seed,
            settings or Settings(),
            watch=seen.watch,
            started=started,
        )
    return result, seen


async def two_hosts(
    protocol: str,
    act: Act,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[LiveResult, SideEnd]:
    """A run whose sides have a supervisor each, as on two hosts: what the source's and the target's have to tell.

    `act` finds the processes by their names (`children_of`).
    """
    scenario, seen, settings = live_scenario(changes), Seen(), settings or Settings()
    with closing(listen(("127.0.0.1", 0))) as listener:
        async with asyncio.timeout(HANG_S), asyncio.TaskGroup() as group:
            serving = group.create_task(serve_one(listener, settings, seen.watch))
            acting = group.create_task(act(seen))
            address = listener.getsockname()[:2]
            result = await run_to(scenario, Protocol.parse(protocol, scenario), seed, settings, address, seen.watch)
            end = await serving
            acting.cancel()
    return result, end


def hit(child: Child, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; whether there was somebody to get it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, number)
        return True
    return False


# --- what is left -----------------------------------------------------------------------------------------------------


def open_fds() -> dict[int, str]:
    """This process's descriptors, and what each is of; sockets and pipes have their numbers in it."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def stat(pid: int) -> tuple[str, str, int] | None:
    """Name, state and parent of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
    return name, rest[0], int(rest[1])


def children_of(parent: int) -> dict[int, tuple[str, str, int]]:
    """All processes that have this parent, zombies included."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (told := stat(int(name))) is not None and told[2] == parent:
            found[int(name)] = told
    return found


def fork_server() -> int:
    """The number of the process that forks this one's children."""
    return int(vars(forkserver._forkserver)["_forkserver_pid"])


# --- a supervisor in a process of its own -----------------------------------------------------------------------------


async def supervise() -> None:
    """Runs, one after the other; says which processes are below this one when the first one has begun."""
    said = False

    async def act(seen: Seen) -> None:
        nonlocal said
        if not said:
            tracker = vars(resource_tracker._resource_tracker)["_pid"]
            below = {"fork server": fork_server(), "tracker": tracker}
            print(json.dumps(below | {name: child.pid for name, child in seen.children.items()}))
        said = True

    while True:
        for protocol in PROTOCOLS:
            await live_run(protocol, act)


if __name__ == "__main__":
    try:
        asyncio.run(supervise())
    except KeyboardInterrupt:
        sys.exit(130)
