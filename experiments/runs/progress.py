# SPDX-License-Identifier: GPL-2.0-or-later
"""How far the runs of a command are, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SOON_S, LATE_S, STEP = 2.0, 30.0, 0.1
"""A line comes after LATE_S; sooner, but not before SOON_S, if this share of the whole was done since the last one."""
Clock = Callable[[], float]


class Pace:
    """When a line is due."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.began_s = self._last_s = clock()
        self._share = 0.0

    def due(self, share: float) -> bool:
        """Whether a line is due now that this share of the whole is done. If so, it is printed."""
        waited_s = self._clock() - self._last_s
        due = waited_s >= LATE_S or (waited_s >= SOON_S and share >= self._share + STEP - 1e-9)
        if due:
            self._last_s, self._share = self._clock(), share
        return due

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return self._clock() - self.began_s


class RunsProgress:
    """A context around runs, which are made in one part or in several."""

    def __init__(
        self, total: int, *, quiet: bool = False, stderr: Console | None = None, clock: Clock = time.monotonic
    ) -> None:
        """`total` is the number of all runs."""
        self._stderr = Console(stderr=True) if stderr is None else stderr
        self._quiet = quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        disable = quiet or not self._stderr.is_terminal
        self._bar = Bar(*columns, console=self._stderr, transient=True, disable=disable)
        self._whole = self._bar.add_task("all", total=total, visible=False)
        self._part = self._whole
        self._name, self._runs, self._done = "runs", total, 0
        self._total, self._done_of_all, self._made = total, 0, 0
        self._pace = Pace(clock)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def begin(self, name: str, runs: int, done: int = 0) -> None:
        """Begin a part of so many runs, some of which need not be made."""
        if self._part != self._whole:
            self._bar.remove_task(self._part)
        self._name, self._runs, self._done = name, runs, done
        self._done_of_all += done
        self._part = self._bar.add_task(name, total=runs, completed=done)
        self._bar.update(self._whole, completed=self._done_of_all, visible=runs < self._total)

    def advance(self) -> None:
        """One more run is made."""
        self._done += 1
        self._done_of_all += 1
        self._made += 1
        self._bar.advance(self._part)
        self._bar.advance(self._whole)
        if self._quiet or self._stderr.is_terminal or self._done_of_all == self._total:
            return
        if self._pace.due(self._done_of_all / self._total):
            self._stderr.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        elapsed_s = self._pace.elapsed_s
        left_s = elapsed_s / self._made * (self._total - self._done_of_all)
        of_all = f" ({self._done_of_all} of all {self._total})" if self._runs < self._total else ""
        return f"{self._name}: {self._done} of {self._runs}{of_all}, {_time(elapsed_s)}, about {_time(left_s)} left"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
