"""Tables for a terminal: of a comparison, each number computed from the runs; and of a scenario's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.runs.frame import PATH_COLUMNS, PHASE_COLUMNS, completed_runs, number, protocols
from experiments.study.published import PublishedFigure, held_against
from proto_v3.timeline import PHASES, Resource
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.units import MIB, NS_PER_MS, NS_PER_S

WORDS = ("outcome", "reason", "note", "protocol", "source")
"""Columns of text, not of numbers."""

Column = tuple[str, pl.Expr, str]
"""A heading with its unit, the value over all completed runs of a protocol, and how the value is formatted."""


def _mean(column: str, unit: float = 1) -> pl.Expr:
    return pl.col(column).mean() / unit


# --- the tables -------------------------------------------------------------------------------------------------------

DOWNTIME: list[Column] = [
    ("downtime", _mean("downtime_ns", NS_PER_MS), ".1f"),
    ("least", pl.col("downtime_ns").min() / NS_PER_MS, ".1f"),
    ("most", pl.col("downtime_ns").max() / NS_PER_MS, ".1f"),
    *[(name, _mean(column, NS_PER_MS), ".1f") for name, column in zip(PHASES, PHASE_COLUMNS, strict=True)],
]
_SHARES = [pl.col(column).sum() / pl.col("downtime_ns").sum() for column in PATH_COLUMNS]
CRITICAL_PATH: list[Column] = [
    (resource.name.lower(), 100 * share, ".1f") for resource, share in zip(Resource, _SHARES, strict=True)
]
UNEXPLAINED: Column = ("unexplained", 100 * (1 - pl.sum_horizontal(_SHARES)), ".1f")
"""Of the critical path, in live runs only."""
TIME_AND_BYTES: list[Column] = [
    ("total s", _mean("total_ns", NS_PER_S), ".2f"),
    ("wire MiB", _mean("wire_bytes", MIB), ".1f"),
    ("device MiB", _mean("device_bytes", MIB), ".1f"),
    ("sent again MiB", _mean("device_bytes_resent", MIB), ".1f"),
    ("set-up in downtime ms", _mean("setup_in_downtime_ns", NS_PER_MS), ".1f"),
]
LATE_CRITICAL: list[Column] = [
    ("late objects", _mean("late_critical_objects"), ".1f"),
    ("of them new", _mean("late_reconfigured_objects"), ".1f"),
    ("lag ms", _mean("critical_lag_mean_ns", NS_PER_MS), ".0f"),
    ("lag max ms", _mean("critical_lag_max_ns", NS_PER_MS), ".0f"),
    ("dropped MiB", _mean("device_bytes_dropped", MIB), ".1f"),
    ("in vain MiB", _mean("device_bytes_wasted", MIB), ".1f"),
    ("retries", _mean("retries"), ".2f"),
    ("paused ms", _mean("retries_stopped_ns", NS_PER_MS), ".1f"),
]
_READ_PARTS = {part: pl.col(f"read_{part}_ns").sum() for part in ("firmware", "lock", "copy")}
_READING_NS = pl.sum_horizontal(_READ_PARTS.values())
READS: list[Column] = [
    ("calls", _mean("reads"), ".0f"),
    ("us a call", _READING_NS / pl.max_horizontal(pl.col("reads").sum(), 1) / 1000, ".0f"),
    *[(part, 100 * ns / pl.max_horizontal(_READING_NS, 1), ".0f") for part, ns in _READ_PARTS.items()],
]
OVERHEAD: list[Column] = [
    ("connections", _mean("connections"), ".0f"),
    ("messages", _mean("messages"), ".0f"),
    ("wake-ups", _mean("wakeups"), ".0f"),
    ("read() calls", _mean("reads"), ".0f"),
    ("VMM holds MiB", pl.col("peak_reorder_bytes").max() / MIB, ".1f"),
    ("driver holds MiB", pl.col("peak_held_bytes").max() / MIB, ".1f"),
]


def print_tables(console: Console, scenario: Scenario, frame: pl.DataFrame) -> None:
    """Outcomes, downtime and phases; the critical path; bytes and reads; published figures if there are any."""
    seeds = frame["seed"].n_unique()
    print_table(console, f"{scenario.name}: {scenario.description}", outcomes_table(frame))
    completed = completed_runs(frame)
    if completed.is_empty():
        return
    unexplained = [UNEXPLAINED] * (number(completed["path_unexplained_ns"].sum()) > 0)
    shown = {
        f"Downtime and its phases, ms (means over {seeds} seed(s), which add up)": DOWNTIME,
        "Critical path through the downtime: share of each resource, %": CRITICAL_PATH + unexplained,
        "Time and bytes, means a run": TIME_AND_BYTES,
    }
    if number(completed["late_critical_objects"].sum()) or number(completed["critical_lag_max_ns"].sum()):
        title = "Critical data that came too late, what was saved or sent in vain, and retries: means a completed run"
        shown[title] = LATE_CRITICAL
    shown["read(), means a run, and where its time goes, %"] = READS
    shown["Overhead, means a run, and the most that waited in the target's memory"] = OVERHEAD
    for title, columns in shown.items():
        print_table(console, title, _by_protocol(completed, columns))
    for published in scenario.published:
        held = held_against(published, frame)
        if held and published.protocol in protocols(completed):
            print_table(console, f"Published against simulated ({published.protocol}), ms", _held(held))
            console.print(f"Published: {published.citation}", highlight=False, markup=False)


def _by_protocol(completed: pl.DataFrame, columns: Sequence[Column]) -> Table:
    """One row a protocol."""
    table = plain_table(["protocol", *(label for label, _, _ in columns)])
    values = completed.group_by("protocol", maintain_order=True).agg(value.alias(label) for label, value, _ in columns)
    for name, *row in values.iter_rows():
        add_row(table, name, *[format(value, how) for value, (_, _, how) in zip(row, columns, strict=True)])
    return table


def outcomes_table(frame: pl.DataFrame) -> Table:
    """How the runs of each protocol ended, with the reason and a note."""
    table = plain_table(["protocol", "runs", "outcome", "reason"])
    counted = frame.group_by("protocol", "outcome", "reason", "note", maintain_order=True).len()
    for protocol, outcome, reason, note, runs in counted.iter_rows():
        add_row(table, protocol, str(runs), outcome, "; ".join(filter(None, [reason, note])))
    return table


def _held(held: Sequence[PublishedFigure]) -> Table:
    table = plain_table(["what", "published", "simulated", "error", "used to fit"])
    for one in held:
        add_row(table, *cells(one))
    return table


def cells(held: PublishedFigure) -> tuple[str, str, str, str, str]:
    """The cells of a row: what, published, simulated, error, whether it was used to fit."""
    simulated, error = "not simulated", ""
    if held.simulated_ms is not None and held.error is not None:
        simulated, error = f"{held.simulated_ms:.1f}", f"{100 * held.error:+.1f} %"
    return held.what, f"{held.published_ms:.1f}", simulated, error, "yes" if held.fitted else "no"


def parameter_rows(scenario: Scenario) -> Iterator[tuple[str, str, str]]:
    """Each parameter that the scenario sets: its key, its value as text, its source."""
    for key, value in parameters(scenario).items():
        yield key, value_text(value), scenario.sources.get(key, "not stated")


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
    """A table without lines; columns of numbers, except the first and those of WORDS, are right-aligned."""
    table = Table(box=None, header_style="", pad_edge=False, padding=(0, 1))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at and column not in WORDS else "left")
    return table


def say(console: Console, line: str) -> None:
    """Print a line as it is: paths stay copyable, brackets are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
