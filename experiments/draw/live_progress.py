# SPDX-License-Identifier: GPL-2.0-or-later
"""The progress of a live run. On a terminal: phase, remaining bytes, what the guest writes, the rate of each stream.
Elsewhere: a line now and then."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.runs.progress import Clock, Pace
from sim.live.processes.report import Note, ProgressNote
from sim.scenario.units import MIB


class Progress:
    """A context around the runs; its `heard` is passed to them."""

    def __init__(
        self, stderr: Console, scenario: str, runs: int, *, quiet: bool = False, clock: Clock = time.monotonic
    ) -> None:
        self._live = Live(console=stderr, transient=True, auto_refresh=False)
        self._stderr = stderr
        self._shown = stderr.is_terminal and not quiet
        self._quiet = quiet
        self._pace = Pace(clock)
        self._scenario = scenario
        self._runs = runs
        self._run = 0
        self._protocol = ""
        self._before: ProgressNote | None = None

    def __enter__(self) -> Self:
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def begin(self, protocol: str) -> None:
        """Begin the next run."""
        self._run += 1
        self._protocol = protocol
        self._before = None
        self._draw("starting", [])

    def heard(self, note: Note) -> None:
        """Show a note of a process (sim.live.run.Watch), if it is one of progress."""
        if not isinstance(note, ProgressNote):
            return
        rates = {} if self._before is None else rates_mib_per_s(self._before, note)
        left = f"{note.remaining_bytes / MIB:.1f} MiB left"
        lines = [f"{left} of the devices", *(f"{name} {rate:.1f} MiB/s" for name, rate in rates.items())]
        self._before = note
        phase = f"{note.phase}, {note.at_ns / 1e9:.1f} s"
        self._draw(phase, lines)
        if not self._shown and not self._quiet and self._pace.due((self._run - 1) / self._runs):
            self._stderr.print(self._what(f"{phase}, {left}"), markup=False, highlight=False, soft_wrap=True)

    def _what(self, phase: str) -> str:
        return f"{self._scenario}, {self._protocol}, run {self._run} of {self._runs}: {phase}"

    def _draw(self, phase: str, lines: list[str]) -> None:
        if not self._shown:
            return
        shown = Table.grid()
        shown.add_row(Text(self._what(phase), "bold"))
        for line in lines:
            shown.add_row(Text(f"  {line}"))
        self._live.update(shown, refresh=True)


def rates_mib_per_s(before: ProgressNote, now: ProgressNote) -> dict[str, float]:
    """MiB/s between two notes: of the guest's writes, of the wire, and of each stream. Empty if no time passed."""
    elapsed_s = (now.at_ns - before.at_ns) / 1e9
    if elapsed_s <= 0:
        return {}
    sizes = {
        "the guest writes": now.written_bytes - before.written_bytes,
        "over the wire": now.wire_bytes - before.wire_bytes,
    }
    sizes |= {name: size - before.streams.get(name, 0) for name, size in now.streams.items()}
    return {name: size / MIB / elapsed_s for name, size in sizes.items()}
