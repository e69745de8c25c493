# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest is booted, from outside: output, status, time-out, signals. Skipped where the cache has no kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kernel import build, guest
from kernel.build import PROJECT
from kernel.guest import CommandOutcome, GuestError, Module, UserModeLinux

KERNEL = build.cached("um")
if KERNEL is None:
    pytest.skip("no kernel in the cache: make kernel", allow_module_level=True)

pytestmark = pytest.mark.slow


def boot(*command: str, timeout_s: float = 60.0, modules: tuple[Module, ...] = ()) -> tuple[CommandOutcome, str]:
    assert KERNEL is not None
    output = bytearray()
    outcome = guest.run(UserModeLinux(KERNEL, modules, timeout_s=timeout_s), command, output.extend)
    return outcome, output.decode()


def guests() -> list[Path]:
    """The processes, in /proc, of guests whose root is in this process's temporary folder."""
    mine = f"uml_dir={tempfile.gettempdir()}/proto-v3-guest-".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mine in (path / "cmdline").read_bytes():
                found.append(path)
    return found


def memory_folders() -> list[Path]:
    """Where the guests have their memory."""
    variables = [(path / "environ").read_bytes().split(b"\0") for path in guests()]
    return [Path(each[7:].decode()) for every in variables for each in every if each.startswith(b"TMPDIR=")]


def folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("proto-v3-guest-*"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests of other tests, and of other people, are not looked at."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_the_output_and_the_status_are_the_commands() -> None:
    outcome, output = boot("sh", "-c", "echo to stdout; echo to stderr >&2; exit 7")
    assert output == "to stdout\nto stderr\n"
    assert (outcome.status, outcome.complaints, outcome.ok) == (7, (), False)


def test_all_of_a_long_output_arrives() -> None:
    _, output = boot("seq", "1", "100000")
    assert output == "".join(f"{number}\n" for number in range(1, 100001))


def test_output_comes_while_the_command_runs() -> None:
    command = [sys.executable, "-m", "kernel.guest", "--", "sh", "-c", "echo first; sleep 1000"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_after_a_signal_no_process_is_left(number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "kernel.guest", "--", "sh", "-c", "echo up; while :; do :; done"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        used = [*memory_folders(), *folders()]
        assert len(used) >= 2
        assert all(path.is_dir() for path in used)
        process.send_signal(number)
        assert process.wait(30) == status
    end = time.monotonic() + 30
    while guests():
        assert time.monotonic() < end
        time.sleep(0.05)
    if number is not signal.SIGKILL:
        assert not any(path.exists() for path in used)


def test_one_that_takes_too_long_is_killed() -> None:
    with pytest.raises(TimeoutError, match="killed after 3 s"):
        boot("sleep", "1000", timeout_s=3)
    assert guests() == folders() == []


def test_one_that_ends_before_its_command_is_told_with_its_console() -> None:
    with pytest.raises(GuestError, match="the guest ended before its command did"):
        boot("/busybox", "halt", "-f")
    assert guests() == folders() == []


def test_a_module_that_cannot_be_loaded_is_told() -> None:
    outcome, output = boot("true", modules=(Module(Path("/usr/no-such-module.ko")),))
    assert outcome.status == guest.GUEST_FAILED
    assert "no-such-module.ko" in output


def test_a_complaint_of_the_kernel_is_a_failure() -> None:
    outcome, _ = boot("sh", "-c", "echo 'WARNING: somebody made this up' > /dev/kmsg")
    assert outcome.status == 0
    assert len(outcome.complaints) == 1
    assert not outcome.ok


def test_the_guest_writes_to_the_folder_that_it_is_given(tmp_path: Path) -> None:
    out = tmp_path / "out, and a space"
    script = f"echo written > '{out}/file'; cat /proc/mounts"
    done = subprocess.run(
        [sys.executable, "-m", "kernel.guest", "--cpus", "1", "--out", str(out), "--", "sh", "-c", script],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert (out / "file").read_text() == "written\n"
