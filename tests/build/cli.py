"""The command line, run in this process: much sooner than in one of its own, which some tests are about."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from unittest import mock

from click.testing import CliRunner

from experiments.cli import main

CLI = [sys.executable, "-m", "experiments.cli"]
"""In a process of its own."""


def proto_v3(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder of the test's, to its end."""
    with contextlib.chdir(folder), mock.patch.object(sys, "argv", ["proto-v3", *arguments]):
        done = CliRunner(env=environment).invoke(main, arguments, prog_name="proto-v3")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess([*CLI, *arguments], done.exit_code, done.stdout, done.stderr)
