# SPDX-License-Identifier: GPL-2.0-or-later
"""Starting processes from a server that has all imports: multiprocessing's forkserver, and work-arounds for it.

multiprocessing has no interface for what these need: the environment and the signal mask of the server, a child that
does not import the caller's main module, and a server that ends when its supervisor is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any

from proto_v3.errors import UserError

PRELOAD = ["sim.live.processes.preload"]
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",  # each further heap for threads would be memory that nothing needs
    "OPENBLAS_NUM_THREADS": "1",  # its threads would do nothing, in each process
    "PYTHONSAFEPATH": "1",  # the server is `python -c`: nothing is to be imported from the user's folder
}
"""Of the processes, where the user has not set it; not of the caller's other children."""
SERVER_FOLDER = "PROTO_V3_SERVER_FOLDER"
"""Tells the server where its socket is."""
TEMPORARY_BYTES = 71
"""The longest name of a folder for temporary files in which the server's socket can be. Linux: `sun_path` has 107
bytes; here `/proto-v3-XXXXXXXX/listener-XXXXXXXX` is added."""
KILLING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that kill a process of a run, but not the server."""
PR_SET_PDEATHSIG = 1
"""Linux, include/uapi/linux/prctl.h."""


def start_process(name: str, main: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a process that runs `main(*args)`. Sockets in `args` are passed to it."""
    _free_unused_memory()
    process = _context().Process(target=main, args=args, name=name, daemon=True)
    with _without_main_module():
        process.start()
    return process


def end_with_server(*, killed: bool = True) -> None:
    """In a child: be killed by what kills a process; and, if `killed`, when the server ends, which ends when its
    supervisor does.

    A child that hangs does not see its lifeline close, so the kernel has to end it. The server ends when no process can
    ask it for children any more. Each child inherits the descriptor for asking, and so has to close it.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, KILLING)
    server = vars(forkserver._forkserver)
    if server.get("_forkserver_alive_fd") is not None:
        os.close(server["_forkserver_alive_fd"])
        server["_forkserver_alive_fd"] = None
    if not killed:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the server ended before prctl()


def _context() -> ForkServerContext:
    """The context, with a running server. Its children inherit the signal mask and the environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with _signals_blocked():
        resource_tracker.ensure_running()  # first: else the server starts it, which unblocks SIGINT
    with _signals_blocked(), _environment({SERVER_FOLDER: _folder()}):
        forkserver.ensure_running()
    return context


def _folder() -> str:
    """A folder for the server's socket. UserError if no folder for temporary files has a short name."""
    config = vars(multiprocessing.current_process())["_config"]
    if "tempdir" not in config:
        try:
            inside = filter(_can_have_the_socket, (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"))
            config["tempdir"] = tempfile.mkdtemp(prefix="proto-v3-", dir=next(inside))
        except (StopIteration, OSError) as error:
            raise UserError(
                "a live run needs a folder for temporary files that can be written and whose name has at most "
                f"{TEMPORARY_BYTES} bytes, and there is none; name one with TMPDIR=FOLDER"
            ) from error
        remove_at_exit(config["tempdir"])
    return str(config["tempdir"])


def remove_at_exit(folder: str) -> None:
    """Both the supervisor and the server do so: either may be killed."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _can_have_the_socket(folder: str) -> bool:
    return len(os.fsencode(folder)) <= TEMPORARY_BYTES and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What ends a command, and goes to its whole process group, is for the supervisor alone."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *KILLING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    missing = {name: value for name, value in (ENVIRONMENT | more).items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """A child would import the caller's main module, however long that takes, and needs nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _free_unused_memory() -> None:
    """glibc keeps the memory that an earlier run's timeline took. Other C libraries have no malloc_trim()."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
