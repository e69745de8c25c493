# SPDX-License-Identifier: GPL-2.0-or-later
"""benchmarks/real_read.py around its guest: the job that it gives, the table that it makes of what is printed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from experiments.questions.kernel_read import grid
from kernel.build import Kernel
from kernel.cache import UnavailableError
from kernel.guest import CommandOutcome, UserModeLinux

FILE = Path(__file__).resolve().parents[2] / "benchmarks/real_read.py"
QUICK = ["--quick", "--rounds", "2"]
COUNTED = (
    *("elapsed_ns", "bytes", "reads", "voluntary_switches", "involuntary_switches", "cpu_ns"),
    *("commands", "command_ns", "copy_ns", "lock_wait_ns", "commands_at_once"),
)


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def real_read(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; signals stay as they are."""
    module = load(FILE)
    monkeypatch.setattr(module, "stop_on_signals", lambda: None)
    monkeypatch.setattr(module.build, "get", lambda kinds: [Kernel(Path("/7.3.4-1-config"))])
    monkeypatch.setattr(module.guest, "standard_modules", lambda kernel: [])
    return module


def guest_that(tells: Callable[[dict[str, Any]], Sequence[str]], status: int = 0) -> Callable[..., CommandOutcome]:
    """A guest.run() that prints these lines about its job, in pieces that end anywhere."""

    def run(guest: UserModeLinux, command: Sequence[str], output: Callable[[bytes], None]) -> CommandOutcome:
        job, reader = Path(command[2]), Path(command[3])
        assert reader.stat().st_mode & 0o100
        text = "".join(f"{line}\n" for line in tells(json.loads(job.read_text()))).encode()
        for at in range(0, len(text), 1000):
            output(text[at : at + 1000])
        return CommandOutcome(status, (), "")

    return run


def rows_of(job: dict[str, Any]) -> list[str]:
    rows = [
        {"row": {**how["case"], "round": number, **dict.fromkeys(COUNTED, 1_000_000)}}
        for number in range(job["rounds"])
        for setting in job["settings"]
        for how in setting["reads"]
    ]
    return [json.dumps(line) for line in [{"kernel": {"release": "7.3.4", "cpus": 2}}, *rows]]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_table_of_a_measurement_is_one_that_the_question_reads(
    real_read: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(real_read.guest, "run", guest_that(rows_of))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grid, "clone", lambda: None)
    assert real_read.main([*QUICK, "--out", str(grid.MEASURED)]) == 0
    found = grid.measured()
    assert found is not None
    assert {grid.case_of(row) for row in found.runs.iter_rows(named=True)} == set(grid.cases(quick=True))
    assert found.runs["round"].unique().sort().to_list() == [0, 1]
    assert found.manifest["guest"]["release"] == "7.3.4"
    assert found.manifest["guest"]["package"] == "7.3.4-1"
    assert found.manifest["complete"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_guest_that_fails_leaves_no_table_and_says_why(
    real_read: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_read.guest, "run", guest_that(lambda job: ["OSError: read(): gone"], status=1))
    assert real_read.main([*QUICK, "--out", str(tmp_path / "out")]) == 1
    assert "OSError: read(): gone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_kernel_it_is_skipped_in_a_line(
    real_read: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(kinds: Sequence[str]) -> list[Kernel]:
        raise UnavailableError("no such source")

    monkeypatch.setattr(real_read.build, "get", none)
    assert real_read.main([*QUICK, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "real_read: skipped: no such source\n"


LOCK_STAT = """\
lock_stat version 0.4
-----------------------------------------------------------------------------------------------------------
                              class name    con-bounces    contentions   waittime-min   waittime-max waittime-total
-----------------------------------------------------------------------------------------------------------

                       &dev->device_lock:             2             40           1.50          20.00         300.25
                       -----------------
                       &dev->device_lock             40          [<000000006012>] sample_lock+0x1/0x2
                    &dev->state_mutex/1:             1              1           9.00           9.00           9.00
                       &stream->own_lock:             0              1           2.00           2.00           2.00
"""


def test_the_waits_of_the_drivers_locks_are_found_in_lock_stat() -> None:
    guest_part = load(FILE.with_name("real_read_guest.py"))
    assert guest_part.waited_ns(LOCK_STAT) == 302_250
