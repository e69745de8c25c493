# SPDX-License-Identifier: GPL-2.0-or-later
"""However a command ends: what was done is kept, the exit status tells how, and no process is left."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from experiments.commands import report
from experiments.runs import interrupt
from tests.build.cli import CLI, HUNG_S, all_end, of_session, proto_v3, started
from tests.build.scenario import small_text

ROOT = Path(__file__).resolve().parents[2]
PATIENT = {"device.0.stop_only_mib": 8.0, "vmm.bandwidth_gbit_per_s": 0.1, "vmm.give_up_s": 1800.0}
"""A run of minutes: the VMM waits for half an hour for state that can only be saved when it is stopped."""


@pytest.fixture(autouse=True)
def signals_that_are_not_ignored() -> Iterator[None]:
    """Whoever runs the tests may ignore them, as `nohup` does; a command would go on ignoring them."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def write_scenario(folder: Path, changes: dict[str, object] | None = None) -> str:
    (folder / "mine.toml").write_text(small_text(changes), encoding="utf-8")
    return "mine.toml"


def wait_for_work(process: subprocess.Popen[str], seconds: float) -> None:
    """Until the processes beside the first one of the session have computed for so long, after the kernel's books
    (proc(5), utime and stime)."""
    done = 0.0
    while process.poll() is None and done < seconds:
        ticks = 0
        for each in set(of_session(process.pid)) - {process.pid}:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        done = ticks / os.sysconf("SC_CLK_TCK")
        time.sleep(0.02)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_signal_keeps_the_runs_that_were_done(tmp_path: Path, number: signal.Signals, send: object) -> None:
    """A terminal's Ctrl-C goes to the whole group, as what systemd sends; `kill` to one process."""
    assert callable(send)
    with started(tmp_path, "compare", write_scenario(tmp_path), "--seeds", "3000", "--jobs", "2", "--out", "o") as run:
        wait_for_work(run, 0.5)  # a run takes about 20 ms
        send(run.pid, number)
        send(run.pid, number)  # as `timeout` does it
        stdout, stderr = run.communicate(timeout=HUNG_S)
        assert all_end(run.pid)
    assert run.returncode == 128 + number, stderr
    assert "Traceback" not in stdout + stderr
    manifest = json.loads((tmp_path / "o/manifest.json").read_text())
    table = pl.read_parquet(tmp_path / "o/runs.parquet")
    assert manifest["complete"] is False
    assert 0 < manifest["runs"] == table.height < manifest["runs_planned"] == 12000
    assert f"interrupted: {table.height} of 12000 runs were done" in stdout + stderr
    assert set(table["outcome"]) == {"COMPLETED"}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_before_the_first_run_is_done_leaves_nothing(tmp_path: Path, jobs: str) -> None:
    scenario = write_scenario(tmp_path, PATIENT)
    with started(tmp_path, "compare", scenario, "--seeds", "2", "--jobs", jobs, "--out", "o") as run:
        while run.poll() is None and not (tmp_path / "o").exists():
            time.sleep(0.02)
        if jobs == "2":
            wait_for_work(run, 0.2)
        os.kill(run.pid, signal.SIGTERM)
        stdout, stderr = run.communicate(timeout=HUNG_S)
        assert all_end(run.pid)
    assert run.returncode == 143, stderr
    assert "Traceback" not in stdout + stderr
    assert "nothing was written" in stdout + stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compare", "script"])
def test_no_worker_outlives_a_command_that_is_killed(tmp_path: Path, how: str) -> None:
    """Its workers are in the middle of runs of minutes; a script's are started in another way."""
    scenario = write_scenario(tmp_path, PATIENT)
    script = f"from experiments import api; api.compare({scenario!r}, 'v2', 4, jobs=2)"
    command = [*CLI, "compare", scenario, "--jobs", "2"] if how == "compare" else [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, env=environment) as process:
        wait_for_work(process, 0.2 if how == "compare" else 2.0)  # a script's workers import first
        assert len(of_session(process.pid)) >= 3
        process.kill()
        process.wait()
        assert all_end(process.pid)


def sent(monkeypatch: pytest.MonkeyPatch, folder: Path, *numbers: signal.Signals) -> subprocess.CompletedProcess[str]:
    """A command that gets these signals, one at once after the other."""

    def run_report(*arguments: object) -> int:
        for number in numbers:
            signal.raise_signal(number)
        return 0

    monkeypatch.setattr(report, "run_report", run_report)
    return proto_v3(folder, "report")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_exit_status_is_128_and_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    done = sent(monkeypatch, tmp_path, number)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "proto-v3: interrupted\n")
    assert signal.getsignal(number) is before


def test_a_command_under_nohup_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert sent(monkeypatch, tmp_path, signal.SIGHUP).returncode == 0
        assert sent(monkeypatch, tmp_path, signal.SIGHUP, signal.SIGTERM).returncode == 143
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_does_not_disturb_the_cleaning_up() -> None:
    cleaned = []
    with interrupt.raised():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(interrupt.exit_status())
    assert cleaned == [143]


# --- standard output --------------------------------------------------------------------------------------------------

FULL = "proto-v3: error: standard output cannot be written: No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "status", "stderr"),
    [("| true", 0, ""), (">&-", 0, ""), ("<&- >&- 2>&-", 0, ""), (">/dev/full", 1, FULL), ("2>/dev/full >&2", 1, "")],
)
def test_whatever_happens_to_its_output_a_command_writes_its_files(
    tmp_path: Path, where: str, status: int, stderr: str
) -> None:
    command = shlex.join([*CLI, "trace", write_scenario(tmp_path), "--protocol", "v2", "--trace", "t"])
    script = f"set -o pipefail; {command} {where}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", stderr)
    assert (tmp_path / "t").stat().st_size > 0


@pytest.mark.parametrize(
    ("where", "status", "stderr"),
    [("--help | true", 0, ""), ("scenarios | true", 0, ""), ("--help >/dev/full", 1, FULL)],
)
def test_a_reader_that_has_seen_enough_is_no_error(where: str, status: int, stderr: str) -> None:
    script = f"set -o pipefail; {shlex.join(CLI)} {where}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", stderr)


def test_what_the_locale_cannot_write_is_replaced(tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path, {"description": "von der Größe 1 µs"})
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [*CLI, "scenarios", scenario]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"von der Gr??e 1 ?s" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_full_disk_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    def write_bytes(path: Path, content: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    done = proto_v3(tmp_path, "compare", write_scenario(tmp_path), "--protocols", "v2", "--seeds", "1", "--out", "o")
    assert done.returncode == status
    assert "Downtime" in done.stdout, "the result is printed all the same"
    assert done.stderr.splitlines()[-1] == f"proto-v3: error: o/runs.parquet: cannot be written: {os.strerror(number)}"
