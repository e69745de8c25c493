"""The progress of a live run on a terminal: phase, remaining bytes, what the guest writes, the rate of each stream."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sim.scenario.units import MIB


class Progress:
    """A context around the runs; its `heard` is passed to them."""

    def __init__(self, stderr: Console, scenario: str, runs: int) -> None:
        self._live = Live(console=stderr, transient=True, auto_refresh=False)
        self._shown = stderr.is_terminal
        self._scenario = scenario
        self._runs = runs
        self._run = 0
        self._protocol = ""
        self._before: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, protocol: str) -> None:
        """Begin the next run."""
        self._run += 1
        self._protocol = protocol
        self._before = {}
        self._draw("starting", [])

    def heard(self, what: str, report: dict[str, Any]) -> None:
        """Show what a process reports (sim.live.run.Watch)."""
        if what != "progress" or report["side"] != "source":
            return
        rates = rates_mib_per_s(self._before, report)
        lines = [f"{report['left_bytes'] / MIB:.1f} MiB left of the devices"] if "left_bytes" in report else []
        lines += [f"{name} {rate:.1f} MiB/s" for name, rate in rates.items()]
        self._before = report
        self._draw(f"{report['phase']}, {report['at_ns'] / 1e9:.1f} s", lines)

    def _draw(self, phase: str, lines: list[str]) -> None:
        if not self._shown:
            return
        shown = Table.grid()
        shown.add_row(Text(f"{self._scenario}, {self._protocol}, run {self._run} of {self._runs}: {phase}", "bold"))
        for line in lines:
            shown.add_row(Text(f"  {line}"))
        self._live.update(shown, refresh=True)


def rates_mib_per_s(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """MiB/s since the last report: of the guest's writes, of the wire, and of each stream."""
    elapsed_s = (now["at_ns"] - before.get("at_ns", 0)) / 1e9
    if not before or elapsed_s <= 0:
        return {}
    rates = {}
    for key, name in (("written_bytes", "the guest writes"), ("wire_bytes", "over the wire")):
        if key in now and key in before:
            rates[name] = (now[key] - before[key]) / MIB / elapsed_s
    read = dict(map(tuple, before.get("streams", [])))
    for name, size in now.get("streams", []):
        rates[name] = (size - read.get(name, 0)) / MIB / elapsed_s
    return rates
