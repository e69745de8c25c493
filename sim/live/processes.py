"""The processes of a live run: started from a server that has all imports, watched, and ended whatever happens.

Each child holds one end of a socket, its lifeline: what it has to say goes over it, and when the other end is closed,
by whatever death, the child ends itself. So nothing is left over, whoever is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from typing import Any

from proto_v3.errors import ProtoV3Error, UserError
from sim.live.calls import Answer, Calls
from sim.live.device_process import DeviceProcess
from sim.live.vmm import Run, Settings, Vmm, run_source, run_target

COMM_CHARS = 15
"""Linux, TASK_COMM_LEN less its end: what `ps -o comm`, `top` and `perf` show."""
PRELOAD = ["sim.live.processes"]
ENDS_WITHIN_S = 5.0
"""A child whose work is over, before it is killed."""

Note = Callable[[str, dict[str, Any]], None]


def _context() -> multiprocessing.context.ForkServerContext:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that would do nothing, in each process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclass(slots=True)
class Child:
    """A process of the run, as its supervisor sees it."""

    name: str
    process: ForkServerProcess
    lifeline: Calls
    result: asyncio.Future[dict[str, Any]]
    """What it says at its end, where it has something to say; cancelled if it dies before."""
    ended: asyncio.Future[int]
    """Its exit status, less than 0 for a signal."""
    _pid: int = field(default=0)

    @property
    def pid(self) -> int:
        """Its number."""
        return self._pid

    @property
    def death(self) -> str:
        """How it died, in words; nothing if it ended by itself, or lives."""
        status = self.ended.result() if self.ended.done() else 0
        if status < 0:
            return f"the {self.name} (process {self._pid}) was killed by {signal.Signals(-status).name}"
        return f"the {self.name} (process {self._pid}) ended with status {status}" if status else ""

    async def end(self) -> None:
        """Let it end, and see to it that it does."""
        self.lifeline.close()
        try:
            async with asyncio.timeout(ENDS_WITHIN_S):
                await asyncio.shield(self.ended)
        except TimeoutError:
            self.process.kill()
            await self.ended
        self.process.close()


def start(name: str, main: Callable[..., None], heard: Note, *given: Any) -> Child:
    """Start a process that runs `main(name, lifeline, *given)`; sockets among what is given are handed over.

    `heard` is told what it notes on its lifeline.
    """
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    process = _context().Process(target=main, args=(name, theirs, *given), name=name, daemon=True)
    process.start()
    theirs.close()
    result: asyncio.Future[dict[str, Any]] = loop.create_future()
    ended: asyncio.Future[int] = loop.create_future()

    async def handle(what: str, body: dict[str, Any]) -> Answer:
        if what == "result":
            if not result.done():
                result.set_result(body)
        else:
            heard(what, body)
        return Answer()

    lifeline = Calls(ours, name, handle)
    sentinel = process.sentinel

    def gone() -> None:
        loop.remove_reader(sentinel)
        process.join()
        ended.set_result(process.exitcode or 0)

    loop.add_reader(sentinel, gone)
    assert process.pid is not None
    child = Child(name, process, lifeline, result, ended, process.pid)
    ended.add_done_callback(lambda _: loop.call_soon(_no_result, lifeline, result))
    return child


def _no_result(lifeline: Calls, result: asyncio.Future[dict[str, Any]]) -> None:
    """The process is dead; what it said before is still to be heard."""
    lifeline.gone.add_done_callback(lambda _: result.cancel())


# --- what runs in them ------------------------------------------------------------------------------------------------


def _be(name: str, loop: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Be a process of that name: run the work to its end, and leave nothing behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's, who then closes the lifeline
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name.replace(" ", "-")[:COMM_CHARS])
    status = 1
    try:
        if loop == "uvloop":
            import uvloop

            uvloop.run(work())
        else:
            asyncio.run(work())
        status = 0
    except Exception:  # a bug of ours: to be seen
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # not held up by a thread that blocks in a read


async def _until_gone(lifeline: Calls, work: Awaitable[None]) -> None:
    """Do the work, for as long as somebody is there to see it."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task, lifeline.gone], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()


def device_main(name: str, lifeline: socket.socket, control: socket.socket, side: str, loop: str) -> None:
    """A device process."""

    async def work() -> None:
        device = DeviceProcess(side)
        await _until_gone(Calls(lifeline, "supervisor"), device.serve(control))

    _be(name, loop, work)


def source_main(
    name: str, lifeline: socket.socket, control: socket.socket, settings: Settings, run: Run, address: tuple[str, int]
) -> None:
    """A source VMM."""

    async def work() -> None:
        supervisor = Calls(lifeline, "supervisor")
        vmm = Vmm("source", settings, Calls(control, "device process"), supervisor)
        await _until_gone(supervisor, _tell_result(supervisor, run_source(vmm, run, address)))

    _be(name, settings.loop, work)


def target_main(
    name: str, lifeline: socket.socket, control: socket.socket, settings: Settings, listener: socket.socket
) -> None:
    """A target VMM."""

    async def work() -> None:
        supervisor = Calls(lifeline, "supervisor")
        vmm = Vmm("target", settings, Calls(control, "device process"), supervisor)

        def rejected(why: str) -> None:
            supervisor.note("rejected", why=why)

        await _until_gone(supervisor, _tell_result(supervisor, run_target(vmm, listener, rejected)))

    _be(name, settings.loop, work)


async def _tell_result(supervisor: Calls, work: Awaitable[dict[str, Any]]) -> None:
    """Tell the supervisor what came of it; an error in words."""
    try:
        told = await work
    except (OSError, ProtoV3Error) as error:
        told = {"error": str(error), "user": isinstance(error, UserError)}
    await supervisor.told("result", **told)
