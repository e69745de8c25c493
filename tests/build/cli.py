# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, run in this process: much sooner than in one of its own, which some tests are about."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from click.testing import CliRunner

from experiments.cli import main

CLI = [sys.executable, "-m", "experiments.cli"]
"""In a process of its own."""
Popen = subprocess.Popen[str]


def proto_v3(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder of the test's, to its end."""
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["proto-v3", *arguments]):
        done = CliRunner(env=environment).invoke(main, arguments, prog_name="proto-v3")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess([*CLI, *arguments], done.exit_code, done.stdout, done.stderr)


# --- in a process of its own -----------------------------------------------------------------------------------------

HUNG_S = 60
"""Longer than anything takes here, to fail instead of waiting for ever. Nothing is judged by its speed."""


@contextlib.contextmanager
def started(folder: Path, *arguments: str, before: Callable[[], object] | None = None) -> Iterator[Popen]:
    """The command in a session of its own, of which nothing is left afterwards. `before` is called in it first."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*CLI, *arguments]
    with subprocess.Popen(command, cwd=folder, start_new_session=True, preexec_fn=before, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            for each in of_session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


def of_session(session: int) -> list[int]:
    """The processes of a session that live (proc(5)). An ended one stays a zombie for as long as init likes."""
    found = []
    for each in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, _, its_session = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(each))
    return found


def all_end(session: int) -> bool:
    """Wait until no process of a session is left."""
    until = time.monotonic() + HUNG_S
    while of_session(session) and time.monotonic() < until:
        time.sleep(0.01)
    return not of_session(session)
