# SPDX-License-Identifier: GPL-2.0-or-later
"""How far the runs of a command are: lines now and then where there is no terminal, on a clock of the test's."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from experiments.draw.live_progress import Progress as LiveProgress
from experiments.runs.progress import RunsProgress
from sim.live.processes.report import ProgressNote


class Clock:
    """Seconds, as the test says."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def lines(total: int, a_run_s: float, *, quiet: bool = False, done: int = 0, parts: int = 1) -> list[str]:
    """What is printed while so many runs are made, `done` of them before."""
    screen, clock = io.StringIO(), Clock()
    with RunsProgress(total, quiet=quiet, stderr=Console(file=screen), clock=clock) as progress:
        for part in range(parts):
            progress.begin(f"part{part}", total // parts, done)
            for _ in range(total // parts - done):
                clock.now_s += a_run_s
                progress.advance()
    return screen.getvalue().splitlines()


def test_a_short_command_prints_no_line() -> None:
    assert lines(40, 0.04) == []


def test_there_is_a_line_each_tenth() -> None:
    told = lines(1000, 0.1)
    assert told[0] == "part0: 100 of 1000, 10 s, about 90 s left"
    assert [line.split()[1] for line in told] == [str(each) for each in range(100, 1000, 100)]


def test_there_are_not_more_lines_than_one_in_two_seconds() -> None:
    assert [line.split()[1] for line in lines(100, 0.06)] == ["34", "68"]


def test_a_long_command_prints_a_line_every_half_minute() -> None:
    told = lines(1000, 4)
    assert told[0] == "part0: 8 of 1000, 32 s, about 66 min left"
    assert len(told) == 125 - 1


def test_runs_that_were_there_before_do_not_make_the_rest_look_short() -> None:
    assert lines(100, 1, done=90, parts=1)[0] == "part0: 92 of 100, 2 s, about 8 s left"


def test_the_parts_of_a_whole_are_told_with_it() -> None:
    told = lines(100, 1, parts=2)
    assert told[0] == "part0: 10 of 50 (10 of all 100), 10 s, about 90 s left"
    assert told[5] == "part1: 10 of 50 (60 of all 100), 60 s, about 40 s left"


def test_quiet_is_quiet() -> None:
    assert lines(1000, 4, quiet=True) == []


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_bar_unless_quiet(quiet: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with RunsProgress(4, quiet=quiet, stderr=console) as progress:
        progress.begin("mine", 4)
        progress.advance()
    assert ("mine" in screen.getvalue()) is not quiet


def test_a_live_run_prints_a_line_now_and_then() -> None:
    screen, clock = io.StringIO(), Clock()
    with LiveProgress(Console(file=screen), "mine", 2, clock=clock) as progress:
        progress.begin("v2")
        for _ in range(61):
            clock.now_s += 1
            progress.heard(ProgressNote(round(clock.now_s * 1e9), "transfer", 5 << 20, 0, 0, {}))
        progress.begin("v3-n2")
    assert screen.getvalue().splitlines() == [
        "mine, v2, run 1 of 2: transfer, 130.0 s, 5.0 MiB left",
        "mine, v2, run 1 of 2: transfer, 160.0 s, 5.0 MiB left",
    ]
