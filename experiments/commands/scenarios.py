# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 scenarios`: which scenarios there are, and what they assume."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.report.tables import parameter_rows
from sim.scenario.file import bases, load
from sim.scenario.shipped import shipped


def list_scenarios() -> None:
    """Print the names and descriptions of all shipped scenarios."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    for name, path in shipped().items():
        table.add_row(name, Text(load(str(path)).description))
    Console().print(table)


def show_scenario(name: str, settings: Sequence[str] = ()) -> None:
    """Print every parameter that the scenario or a KEY=VALUE of `settings` sets, with its source."""
    scenario = load(name, settings)
    console = Console()
    console.print(Text(f"{scenario.name}: {scenario.description}\n", style="bold"))
    if extended := bases(name):
        console.print(Text(f"Extends {', which extends '.join(path.stem for path in extended)}.\n"))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("parameter", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source")
    for key, value, source in parameter_rows(scenario):
        table.add_row(key, value, Text(source, overflow="fold"))
    console.print(table)
