# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 scenarios`: which scenarios there are, what they assume, and how far that may be off."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from experiments.commands.options import tell_outside
from experiments.report.tables import Output, console, parameter_rows
from sim.scenario.file import bases, find_base, load
from sim.scenario.ranges import without_range
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.shipped import shipped


def list_scenarios(*, as_json: bool = False) -> None:
    """Print the names and descriptions of all shipped scenarios."""
    descriptions = {name: load(str(path)).description for name, path in shipped().items()}
    if as_json:
        rows = [{"name": name, "description": words} for name, words in descriptions.items()]
        Output(as_json).document({"scenarios": rows})
        return
    table = _table("name", "what")
    for name, words in descriptions.items():
        table.add_row(name, Text(words))
    console().print(table)


def show_scenario(name: str, settings: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Print every parameter that a scenario, or a set of values that files extend, or a KEY=VALUE of `settings` sets,
    with its source, its range and the reason of that; and which parameters have no range although they are assumed,
    fitted or derived."""
    path = str(find_base(name))
    scenario = load(path, settings)
    tell_outside(scenario)
    extended = [path.stem for path in bases(path)]
    points = without_range(scenario.ranges, scenario.sources, parameters(scenario))
    if as_json:
        Output(as_json).document(_document(scenario, extended, points))
        return
    shown = console()
    shown.print(Text(f"{scenario.name}: {scenario.description}\n", style="bold"))
    if extended:
        shown.print(Text(f"Extends {', which extends '.join(extended)}.\n"))
    table = _table("parameter", "value", "source; other plausible values, and why" if scenario.ranges else "source")
    table.columns[1].justify = "right"
    for key, value, source, words, why in parameter_rows(scenario):
        table.add_row(key, value, Text(f"{source}\n{words}: {why}" if why else source, overflow="fold"))
    shown.print(table)
    if points:
        which = f"Assumed, fitted or derived, and without a range ({len(points)}): {', '.join(points)}."
        shown.print(Text("\n" + textwrap.fill(which, shown.width, break_long_words=False, break_on_hyphens=False)))


def _document(scenario: Scenario, extended: Sequence[str], points: Sequence[str]) -> dict[str, Any]:
    rows = [
        {
            "parameter": key,
            "value": value,
            "source": scenario.sources.get(key),
            "range": scenario.ranges[key].model_dump(exclude_unset=True) if key in scenario.ranges else None,
        }
        for key, value in parameters(scenario).items()
    ]
    about = {"name": scenario.name, "description": scenario.description, "extends": list(extended)}
    return {**about, "parameters": rows, "without_range": list(points)}


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column in ("name", "parameter", "value"), overflow="fold")
    return table
