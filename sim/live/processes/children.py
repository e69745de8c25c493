"""The processes of a live run: started from a server that has all imports, watched, and ended whatever happens.

Each child holds one end of a socket, its lifeline: what it has to say goes over it, and when the other end is closed,
by whatever death, the child ends itself. So nothing is left over, whoever is killed. A child that hangs is killed: by
its supervisor, to whose pings it does not answer; or, when that one is dead, by the kernel, for the server that forked
the child ends with its supervisor, and no child outlives the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any

from proto_v3.errors import ProtoV3Error, UserError
from sim.live.fd.calls import Calls, Reply
from sim.live.plain import from_plain, to_plain
from sim.live.processes.device_process import DeviceProcess
from sim.live.processes.report import VmmReport
from sim.live.processes.vmm import Settings, VmmProcess, run_source, run_target, unanswered
from sim.live.tcp.messages import Run

COMM_CHARS = 15
"""Linux, TASK_COMM_LEN less its end: what `ps -o comm`, `top` and `perf` show."""
PRELOAD = ["sim.live.processes.preload"]
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",  # a heap for each of many threads would be memory that none needs
    "OPENBLAS_NUM_THREADS": "1",  # threads that would do nothing, in each process
    "PYTHONSAFEPATH": "1",  # the server is `python -c`: what is in the user's folder is not to be imported
}
"""Of the processes, where the user has not set it; not of the caller's other children."""
ENDS_WITHIN_S = 5.0
"""A child whose work is over, before it is killed."""
HANGS = 2
"""A child that does not answer is killed after so many times the silence that the others put up with: they are to find
out by themselves."""
PR_SET_PDEATHSIG = 1
"""Linux, include/uapi/linux/prctl.h."""

Note = Callable[[str, dict[str, Any]], None]


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # first: the fork server would start it, and that unblocks SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is the supervisor's alone
    own = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if own[name] is None})
    try:
        forkserver.ensure_running()  # it inherits all that, and its children
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in (name for name, value in own.items() if value is None):
            del os.environ[name]
    return context


@dataclass(slots=True)
class Child:
    """A process of the run, as its supervisor sees it."""

    name: str
    process: ForkServerProcess
    lifeline: Calls
    result: asyncio.Future[VmmReport]
    """What a VMM process reports at its end; cancelled if it dies before."""
    ended: asyncio.Future[int]
    """Its exit status, less than 0 for a signal."""
    _pid: int = field(default=0)
    _hung: str = ""
    _watching: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its number."""
        return self._pid

    def watch(self, settings: Settings) -> None:
        """See to it that it answers, from now on; one that hangs is killed."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(settings))

    async def _watch(self, settings: Settings) -> None:
        silent_s = HANGS * settings.silent_s
        if await unanswered(self.lifeline, max(settings.handshake_s, silent_s), silent_s) and not self.ended.done():
            self._hung = f"the {self.name} (process {self._pid}) did not answer, and was killed"
            self.process.kill()

    @property
    def death(self) -> str:
        """How it died, in words; nothing if it ended by itself, or lives."""
        if self._hung:
            return self._hung
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
            await asyncio.shield(self.ended)
        finally:
            self.bury()

    def bury(self) -> None:
        """Nothing is left of it when this returns: it is killed if it lives. May be called again."""
        if self._watching is not None:
            self._watching.cancel()
        self.lifeline.close()
        if not self.ended.done():  # who waits for that was cancelled
            self.ended.get_loop().remove_reader(self.process.sentinel)
            self.process.kill()
            self.process.join()
            self.ended.set_result(self.process.exitcode or 0)
        self.process.close()


def start(name: str, main: Callable[..., None], heard: Note, *given: Any) -> Child:
    """Start a process that runs `main(name, lifeline, *given)`; sockets among what is given are handed over.

    `heard` is told what it notes on its lifeline.
    """
    loop = asyncio.get_running_loop()
    with contextlib.suppress(AttributeError):  # not glibc, which keeps what an earlier run's timeline took
        ctypes.CDLL(None).malloc_trim(0)
    ours, theirs = socket.socketpair()
    caller = sys.modules["__main__"]
    try:
        process = _context().Process(target=main, args=(name, theirs, *given), name=name, daemon=True)
        # A child would import the caller's main module, whatever that takes, and needs nothing of it.
        sys.modules["__main__"] = ModuleType("__main__")
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        sys.modules["__main__"] = caller
        theirs.close()
    result: asyncio.Future[VmmReport] = loop.create_future()
    ended: asyncio.Future[int] = loop.create_future()

    async def handle(what: str, body: dict[str, Any]) -> Reply:
        if what == "result":
            if not result.done():
                result.set_result(from_plain(VmmReport, body))
        else:
            heard(what, body)
        return Reply()

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


def _no_result(lifeline: Calls, result: asyncio.Future[VmmReport]) -> None:
    """The process is dead; what it said before is still to be heard."""
    lifeline.gone.add_done_callback(lambda _: result.cancel())


# --- what runs in them ------------------------------------------------------------------------------------------------


def _be(name: str, loop: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Be a process of that name: run the work to its end, and leave nothing behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's, who then closes the lifeline
    _end_with_parent()
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name.replace(" ", "-")[:COMM_CHARS])

    async def or_die() -> None:
        asyncio.get_running_loop().set_exception_handler(_die)
        await work()
        os._exit(0)  # at once: what a loop cleans up goes with the process, and a thread that blocks would hold it up

    try:
        if loop == "uvloop":
            import uvloop

            uvloop.run(or_die())
        else:
            asyncio.run(or_die())
    except Exception:  # a bug of ours: to be seen
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _die(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A callback or task failed, and nobody waits for it: a bug of ours; better a dead process than one that hangs."""
    loop.default_exception_handler(context)
    if context.get("exception") is not None:
        sys.stderr.flush()
        os._exit(1)


def _end_with_parent() -> None:
    """Be killed when the server ends, which ends with its supervisor: one that hangs does not see its lifeline close.

    The server ends when nobody can ask it for children any more; each child could, if it did not close that end.
    """
    server = vars(forkserver._forkserver)
    if server.get("_forkserver_alive_fd") is not None:
        os.close(server["_forkserver_alive_fd"])
        server["_forkserver_alive_fd"] = None
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it ended before


async def _until_gone(lifeline: Calls, work: Awaitable[None]) -> None:
    """Do the work, for as long as somebody is there to see it."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task, lifeline.gone], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()


async def _answer(name: str, body: dict[str, Any]) -> Reply:
    """What a supervisor asks is whether one lives."""
    return Reply()


def device_main(name: str, lifeline: socket.socket, control: socket.socket, side: str, loop: str) -> None:
    """A device process."""

    async def work() -> None:
        device = DeviceProcess(side)
        await _until_gone(Calls(lifeline, "supervisor", _answer), device.serve(control))

    _be(name, loop, work)


def source_main(
    name: str, lifeline: socket.socket, control: socket.socket, settings: Settings, run: Run, address: tuple[str, int]
) -> None:
    """A source VMM."""

    async def work() -> None:
        supervisor = Calls(lifeline, "supervisor", _answer)
        vmm = VmmProcess("source", settings, Calls(control, "device process"), supervisor)
        await _until_gone(supervisor, _report(vmm, run_source(vmm, run, address)))

    _be(name, settings.loop, work)


def target_main(
    name: str, lifeline: socket.socket, control: socket.socket, settings: Settings, listener: socket.socket
) -> None:
    """A target VMM."""

    async def work() -> None:
        supervisor = Calls(lifeline, "supervisor", _answer)
        vmm = VmmProcess("target", settings, Calls(control, "device process"), supervisor)

        def rejected(why: str) -> None:
            supervisor.note("rejected", why=why)

        await _until_gone(supervisor, _report(vmm, run_target(vmm, listener, rejected)))

    _be(name, settings.loop, work)


async def _report(vmm: VmmProcess, work: Awaitable[VmmReport]) -> None:
    """Send the supervisor the report of the migration, or of the error that came before it."""
    beating = asyncio.ensure_future(vmm.beat())
    try:
        report = await work
    except (OSError, ProtoV3Error) as error:
        report = VmmReport(vmm.guest_runs, [vmm.failure(error)], user_error=isinstance(error, UserError))
    beating.cancel()
    report = replace(report, device_gone=vmm.device.gone.done())
    await vmm.supervisor.send_note("result", **to_plain(report))
