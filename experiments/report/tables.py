# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command prints of its results: the conclusion, then tables with a legend each; or one JSON document."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.runs.folder import MANIFEST
from experiments.runs.frame import number
from proto_v3.errors import UserError
from proto_v3.text import clean
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.units import NS_PER_MS

WORDS = ("outcome", "reason", "note", "protocol", "source", "verdict", "where")
"""Columns of text, not of numbers."""
NO_VALUE = "-"


class Heading(NamedTuple):
    """A column of a section: its name in JSON, which ends in the unit; its text; the format of its numbers."""

    name: str
    text: str
    how: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A table under its title, with a legend that says what its columns are."""

    key: str
    """Its name in JSON."""
    title: str
    legend: str
    columns: Sequence[Heading]
    rows: Sequence[Mapping[str, Any]]
    """Each has a value for every column, None where there is none."""
    most_rows: int | None = None
    """As many are printed; JSON has all."""

    def print(self, console: Console) -> None:
        """Print it."""
        table = plain_table([column.text for column in self.columns])
        for column, shown in zip(self.columns, table.columns, strict=True):
            if any(isinstance(row[column.name], str) for row in self.rows):
                shown.justify = "left"
        for row in self.rows[: self.most_rows]:
            add_row(table, *(_cell(row[column.name], column.how) for column in self.columns))
        console.print(Text(f"\n{self.title}", style="bold"))
        if self.legend:
            console.print(Text(self.legend, style="italic"))
        if self.rows:
            console.print(table)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{column.name: _plain(row[column.name]) for column in self.columns} for row in self.rows]
        return {"title": self.title, "legend": self.legend, "rows": rows}


@dataclass(frozen=True, slots=True)
class Output:
    """Where the results of a command go: all of them in words and tables, in one JSON document, or the conclusion."""

    as_json: bool = False
    quiet: bool = False

    def results(
        self, about: Mapping[str, Any], title: str, conclusion: Sequence[str], sections: Sequence[Section]
    ) -> None:
        """Print them. `about` is what JSON says of the results as a whole, such as their folder."""
        if self.as_json:
            tables = {section.key: section.plain() for section in sections}
            document = {**about, "conclusion": list(conclusion), "tables": tables}
            self.document(document)
            return
        shown = console()
        if not self.quiet:
            shown.print(Text(f"\n{title}", style="bold"))
        for sentence in conclusion:
            shown.print(f"- {sentence}", highlight=False, markup=False)
        for section in sections:
            if section.most_rows != 0 and not self.quiet:
                section.print(shown)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print a JSON document, which has all that there is to print."""
        console().out(json.dumps(value, indent=2, allow_nan=False), highlight=False)

    def drawn(self, draw: Callable[[], Sequence[Path]]) -> list[str] | None:
        """Draw figures; returns the names of their files. None if that fails: one line on stderr says why.

        It comes after the tables, which a figure must not cost.
        """
        try:
            return [path.name for path in draw()]
        except Exception as error:  # of matplotlib, of the user's fonts, of a full disk
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            print(f"proto-v3: error: no figure: {name}{clean(str(error))}", file=sys.stderr)
            return None

    def files(self, folder: Path, tables: Sequence[str], figures: Sequence[str] | None, why_there: str = "") -> None:
        """Say where they are; `figures` as `drawn` returns them."""
        if figures is not None:
            drawn = ", ".join(str(folder / name) for name in figures if name.endswith(".png"))
            self.say(f"\nFigure: {drawn} (and .svg)" if figures else "\nNo run was completed: nothing to draw.")
        kept = ", ".join(str(folder / name) for name in (*tables, MANIFEST))
        self.say(f"Tables and manifest: {kept}{why_there}", always=bool(why_there))

    def say(self, line: str, *, always: bool = False) -> None:
        """Print a line that is no result, such as where files are: beside JSON on stderr; if quiet, only `always`."""
        if self.quiet and not always:
            return
        if self.as_json:
            print(line.strip(), file=sys.stderr)
        else:
            say(console(), line)


def _cell(value: object, how: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NO_VALUE
    return format(value, how)


def _plain(value: object) -> object:
    """A value that JSON has: null for no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


IN_VAIN = {
    "stopped_in_vain_ns": (
        Heading("stopped_in_vain_ms", "in vain, ms", ".1f"),
        pl.col("stopped_in_vain_ns").mean() / NS_PER_MS,
    ),
    "devices_reset_under_guest": (Heading("devices_reset", "reset", ".1f"), pl.col("devices_reset_under_guest").mean()),
}
"""By column of the table of runs: what a run cost the guest and led to nothing."""


def outcomes(frame: pl.DataFrame, by: Sequence[str] = ("protocol",), title: str = "How the runs ended") -> Section:
    """How the runs of each protocol ended, with the reason and a note; one row if only numbers differ. And what a run
    cost the guest in vain, if any did."""
    costs = [cost for name, cost in IN_VAIN.items() if name in frame.columns and number(frame[name].sum())]
    alike = [pl.col(name).str.replace_all(r"\d[\d.]*", "#").alias(f"{name} alike") for name in ("reason", "note")]
    values = {heading.name: value for heading, value in costs}
    counted = (
        frame.group_by(*by, "outcome", *alike, maintain_order=True)
        .agg(pl.col("reason").first(), pl.col("note").first(), pl.len().alias("runs"), **values)
        .select(*by, "outcome", "reason", "note", "runs", *values)
    )
    rows = [
        row | {"reason": "; ".join(filter(None, [row["reason"], row["note"]]))} for row in counted.iter_rows(named=True)
    ]
    words = [Heading(name, name) for name in (*by, "runs", "outcome", "reason")]
    columns = [*words[:-1], *(heading for heading, _ in costs), words[-1]]
    legend = "reason: why a run did not complete, and notes; numbers of the first of several"
    if costs:
        legend += "; in vain: how long the guest stood still for nothing, mean; reset: devices reset under it, mean"
    return Section("outcomes", title, legend, columns, rows)


def parameter_rows(scenario: Scenario) -> Iterator[tuple[str, str, str, str, str]]:
    """Each parameter that the scenario sets: its key, its value as text, its source; its range and the reason, or two
    empty texts."""
    for key, value in parameters(scenario).items():
        each = scenario.ranges.get(key)
        source = scenario.sources.get(key, "not stated")
        yield key, value_text(value), source, each.words if each else "", each.why if each else ""


def value_text(value: object) -> str:
    """A parameter's value in a table."""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- printing ---------------------------------------------------------------------------------------------------------


def console() -> Console:
    """A console for stdout: as wide as the terminal; 120 columns where there is none."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def print_table(console: Console, title: str, table: Table) -> None:
    """Print a table under its title."""
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text: brackets in a reason are no markup."""
    table.add_row(*map(Text, cells))


def plain_table(columns: Sequence[str]) -> Table:
    """A table without lines; columns of numbers, except the first and those of WORDS, are right-aligned.

    On a narrow terminal what does not fit goes on in the next line: nothing is cut.
    """
    table = Table(box=None, header_style="", pad_edge=False, padding=(0, 1))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at and column not in WORDS else "left", overflow="fold")
    return table


def say(console: Console, line: str) -> None:
    """Print a line as it is: paths stay copyable, brackets are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
