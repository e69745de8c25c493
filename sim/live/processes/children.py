# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes of a live run: started, watched, and ended whatever happens.

Each child holds one end of a socket, its lifeline. It sends its notes and its report over it. When the other end is
closed, because the supervisor is done or dead, the child ends itself. So no process is left, whichever one is killed. A
child that hangs is killed: by its supervisor, whose pings it does not answer; or, if the supervisor is dead, by the
kernel (fork_server).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from typing import Any

from proto_v3.errors import ProtoV3Error, UserError
from sim.live.fd.calls import Calls, Reply
from sim.live.plain import from_plain, to_plain
from sim.live.processes.device_process import DeviceProcess
from sim.live.processes.files import allow_files
from sim.live.processes.fork_server import end_with_server, start_process
from sim.live.processes.remote_backend import RemoteBackend
from sim.live.processes.report import Note, VmmReport, received_note
from sim.live.processes.settings import Settings
from sim.live.processes.vmm import VmmProcess

RESULT = "result"
"""The last message of a VMM process on its lifeline: its VmmReport."""
COMM_CHARS = 15
"""Linux, TASK_COMM_LEN without its end: what `ps -o comm`, `top` and `perf` show."""
ENDS_WITHIN_S = 5.0
HANGS = 2
"""A silent child is killed after HANGS x silent_s, late enough for its peers to notice first."""


@dataclass(slots=True)
class Child:
    """A process of the run, in its supervisor."""

    name: str
    process: ForkServerProcess
    lifeline: Calls
    result: asyncio.Future[VmmReport]
    """What a VMM process reports at its end; cancelled if it dies before."""
    ended: asyncio.Future[int]
    """Its exit status, less than 0 for a signal."""
    pid: int
    ends_within_s: float = ENDS_WITHIN_S
    """When its work is over, it is killed after this time."""
    _hung: str = ""
    _watching: asyncio.Task[None] | None = None

    def watch(self, settings: Settings) -> None:
        """Ping it from now on, and kill it if it does not answer."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(settings))

    async def _watch(self, settings: Settings) -> None:
        silent_s = HANGS * settings.silent_s
        if await self.lifeline.unanswered(settings.handshake_s, silent_s) and not self.ended.done():
            self._hung = f"the {self.name} (process {self.pid}) did not answer, and was killed"
            self.process.kill()

    @property
    def death(self) -> str:
        """How it died, in words; empty if it ended by itself, or lives."""
        if self._hung:
            return self._hung
        status = self.ended.result() if self.ended.done() else 0
        if status < 0:
            return f"the {self.name} (process {self.pid}) was killed by {signal.Signals(-status).name}"
        return f"the {self.name} (process {self.pid}) ended with status {status}" if status else ""

    async def end(self) -> None:
        """Ask it to end by closing its lifeline; kill it if it does not end soon."""
        self.lifeline.close()
        try:
            async with asyncio.timeout(self.ends_within_s):
                await asyncio.shield(self.ended)
        except TimeoutError:
            self.process.kill()
            await asyncio.shield(self.ended)
        finally:
            self.bury()

    def bury(self) -> None:
        """Kill it if it lives, and free what belongs to it. May be called again."""
        if self._watching is not None:
            self._watching.cancel()
        self.lifeline.close()
        if not self.ended.done():  # the task that waited for the end was cancelled
            self.ended.get_loop().remove_reader(self.process.sentinel)
            self.process.kill()
            self.process.join()
            self.ended.set_result(self.process.exitcode or 0)
        self.process.close()


def start(name: str, main: Callable[..., None], on_note: Callable[[Note], None], *args: Any) -> Child:
    """Start a process that runs `main(name, lifeline, *args)`. Sockets in `args` are passed to it.

    `on_note` is called with each note that it sends on its lifeline.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = start_process(name, main, name, theirs, *args)
        except BaseException:
            ours.close()
            raise
    loop = asyncio.get_running_loop()
    result: asyncio.Future[VmmReport] = loop.create_future()
    ended: asyncio.Future[int] = loop.create_future()

    async def handle(kind: str, body: dict[str, Any]) -> Reply:
        if kind != RESULT:
            on_note(received_note(kind, body))
        elif not result.done():
            result.set_result(from_plain(VmmReport, body))
        return Reply()

    lifeline = Calls(ours, name, handle)
    sentinel = process.sentinel

    def gone() -> None:
        loop.remove_reader(sentinel)
        process.join()
        ended.set_result(process.exitcode or 0)

    def no_result() -> None:  # what it sent before its end is still read
        lifeline.gone.add_done_callback(lambda _: result.cancel())

    loop.add_reader(sentinel, gone)
    ended.add_done_callback(lambda _: loop.call_soon(no_result))
    assert process.pid is not None
    return Child(name, process, lifeline, result, ended, process.pid)


# --- what runs in them ------------------------------------------------------------------------------------------------


def be(name: str, loop: str, work: Callable[[], Coroutine[Any, Any, None]], *, killed: bool = True) -> None:
    """Run the work to its end as a process of that name, then end the process.

    `killed`: the kernel may kill it when its supervisor is killed. If not, `work` must end when the lifeline closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's, who then closes the lifeline
    end_with_server(killed=killed)
    allow_files()
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name.replace(" ", "-")[:COMM_CHARS])

    async def or_die() -> None:
        asyncio.get_running_loop().set_exception_handler(_die)
        await work()
        os._exit(0)  # at once: the process takes the loop with it, and a thread that blocks would delay it

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
    """A callback or task failed that nothing waits for. That is a bug: end the process, for it might hang."""
    loop.default_exception_handler(context)
    if context.get("exception") is not None:
        sys.stderr.flush()
        os._exit(1)


async def until_gone(lifeline: Calls, work: Awaitable[None]) -> asyncio.Future[None]:
    """Do the work, until the supervisor is gone. Returns the task that does it, which is not done then."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task, lifeline.gone], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return task


async def answer_ping(name: str, body: dict[str, Any]) -> Reply:
    """The supervisor only pings."""
    return Reply()


def device_main(name: str, lifeline: socket.socket, control: socket.socket, side: str, loop: str) -> None:
    """A device process."""

    async def work() -> None:
        device = DeviceProcess(side)
        await until_gone(Calls(lifeline, "supervisor", answer_ping), device.serve(control))

    be(name, loop, work)


def vmm_main(
    name: str,
    lifeline: socket.socket,
    control: socket.socket,
    side: str,
    settings: Settings,
    migrate: Callable[..., Awaitable[VmmReport]],
    *args: Any,
) -> None:
    """A VMM process; `migrate` is run_source or run_target, and `args` are what it takes beside the VMM."""

    async def work() -> None:
        supervisor = Calls(lifeline, "supervisor", answer_ping)
        devices = RemoteBackend(Calls(control, "device process"), side, settings.io)
        vmm = VmmProcess(side, settings, devices, supervisor)
        await until_gone(supervisor, send_report(vmm, migrate(vmm, *args)))

    be(name, settings.loop, work)


async def send_report(vmm: VmmProcess, work: Awaitable[VmmReport]) -> None:
    """Send the supervisor the report of the migration, or of the error that came before it, once the devices are left
    as they were found."""
    beating = asyncio.ensure_future(vmm.beat())
    try:
        report = await work
    except (OSError, ProtoV3Error) as error:
        report = VmmReport(vmm.guest_runs, [vmm.failure(error)], user_error=isinstance(error, UserError))
    beating.cancel()
    gone = vmm.devices.gone
    report = replace(report, device_gone=gone, put_back=await vmm.devices.put_back())
    await vmm.supervisor.send_note(RESULT, **to_plain(report))
