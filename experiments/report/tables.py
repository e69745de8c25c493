"""What a comparison says, in tables for a terminal. Every number is computed from the runs."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.runs.frame import completed_runs, ms, number, path_shares, protocols
from experiments.runs.table import PHASE_COLUMNS
from experiments.study.published import PublishedFigure, held_against
from proto_v3.timeline import PHASES, Resource
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

WORDS = ("outcome", "reason", "note", "protocol", "source")
"""Columns that are not of numbers."""


def console() -> Console:
    """For tables on stdout: as wide as the terminal, or wide enough for them where there is none."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


def print_tables(console: Console, scenario: Scenario, frame: pl.DataFrame) -> None:
    """Outcomes, downtime and phases; the critical path; bytes and reads; published figures if there are any."""
    seeds = frame["seed"].n_unique()
    print_table(console, f"{scenario.name}: {scenario.description}", outcomes_table(frame))
    completed = completed_runs(frame)
    if completed.is_empty():
        return
    print_table(console, f"Downtime and its phases, ms (means over {seeds} seed(s), which add up)", _phases(completed))
    print_table(console, "Critical path through the downtime: share of each resource, %", _critical_path(completed))
    print_table(console, "Time and bytes, means a run", _bytes(completed))
    if number(completed["late_critical_objects"].sum()) or number(completed["critical_lag_max_ns"].sum()):
        print_table(
            console,
            "Critical data that came too late, what was saved or sent in vain, and retries: means a completed run",
            _critical(completed),
        )
    print_table(console, "read(), means a run, and where its time goes, %", _reads(completed))
    print_table(console, "Overhead, means a run, and the most that waited in the target's memory", _overhead(completed))
    for published in scenario.published:
        held = held_against(published, frame)
        if held and published.protocol in protocols(completed):
            print_table(console, f"Published against simulated ({published.protocol}), ms", _held(held))
            console.print(f"Published: {published.citation}", highlight=False, markup=False)


def print_table(console: Console, title: str, table: Table) -> None:
    """A table under its title."""
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def outcomes_table(frame: pl.DataFrame) -> Table:
    """How the runs of each protocol ended, and what there is to say of it."""
    table = plain_table(["protocol", "runs", "outcome", "reason"])
    counted = frame.group_by("protocol", "outcome", "reason", "note", maintain_order=True).len()
    for protocol, outcome, reason, note, runs in counted.iter_rows():
        add_row(table, protocol, str(runs), outcome, "; ".join(filter(None, [reason, note])))
    return table


def _phases(completed: pl.DataFrame) -> Table:
    table = plain_table(["protocol", "downtime", "least", "most", *PHASES])
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        downtime = runs["downtime_ns"]
        least, most = ms(downtime.min()), ms(downtime.max())
        phases = [f"{ms(runs[column].mean()):.1f}" for column in PHASE_COLUMNS]
        add_row(table, protocol, f"{ms(downtime.mean()):.1f}", f"{least:.1f}", f"{most:.1f}", *phases)
    return table


def _critical_path(completed: pl.DataFrame) -> Table:
    unexplained = number(completed["path_unexplained_ns"].sum()) > 0  # in live runs only
    columns = [resource.name.lower() for resource in Resource] + ["unexplained"] * unexplained
    table = plain_table(["protocol", *columns])
    for protocol in protocols(completed):
        shares = path_shares(completed, protocol)
        left = [f"{100 * (1 - sum(shares.values())):.1f}"] * unexplained
        add_row(table, protocol, *[f"{100 * shares[resource]:.1f}" for resource in Resource], *left)
    return table


def _bytes(completed: pl.DataFrame) -> Table:
    table = plain_table(["protocol", "total s", "wire MiB", "device MiB", "sent again MiB", "set-up in downtime ms"])
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        add_row(
            table,
            protocol,
            f"{ms(runs['total_ns'].mean()) / 1000:.2f}",
            *[f"{number(runs[c].mean()) / MIB:.1f}" for c in ("wire_bytes", "device_bytes", "device_bytes_resent")],
            f"{ms(runs['setup_in_downtime_ns'].mean()):.1f}",
        )
    return table


def _critical(completed: pl.DataFrame) -> Table:
    table = plain_table(
        [
            "protocol",
            "late objects",
            "of them new",
            "lag ms",
            "lag max ms",
            "dropped MiB",
            "in vain MiB",
            "retries",
            "paused ms",
        ]
    )
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        add_row(
            table,
            protocol,
            f"{number(runs['late_critical_objects'].mean()):.1f}",
            f"{number(runs['late_reconfigured_objects'].mean()):.1f}",
            f"{ms(runs['critical_lag_mean_ns'].mean()):.0f}",
            f"{ms(runs['critical_lag_max_ns'].mean()):.0f}",
            f"{number(runs['device_bytes_dropped'].mean()) / MIB:.1f}",
            f"{number(runs['device_bytes_wasted'].mean()) / MIB:.1f}",
            f"{number(runs['retries'].mean()):.2f}",
            f"{ms(runs['retries_stopped_ns'].mean()):.1f}",
        )
    return table


def _overhead(completed: pl.DataFrame) -> Table:
    """What a protocol takes beside the bytes."""
    table = plain_table(
        ["protocol", "connections", "messages", "wake-ups", "read() calls", "VMM holds MiB", "driver holds MiB"]
    )
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        counts = [f"{number(runs[c].mean()):.0f}" for c in ("connections", "messages", "wakeups", "reads")]
        peaks = [f"{number(runs[c].max()) / MIB:.1f}" for c in ("peak_reorder_bytes", "peak_held_bytes")]
        add_row(table, protocol, *counts, *peaks)
    return table


def _reads(completed: pl.DataFrame) -> Table:
    table = plain_table(["protocol", "calls", "us a call", "firmware", "lock", "copy"])
    for protocol in protocols(completed):
        runs = completed.filter(pl.col("protocol") == protocol)
        calls = number(runs["reads"].sum())
        parts = [number(runs[f"read_{part}_ns"].sum()) for part in ("firmware", "lock", "copy")]
        shares = [f"{100 * part / max(sum(parts), 1):.0f}" for part in parts]
        mean_us = sum(parts) / max(calls, 1) / 1000
        add_row(table, protocol, f"{number(runs['reads'].mean()):.0f}", f"{mean_us:.0f}", *shares)
    return table


def _held(held: Sequence[PublishedFigure]) -> Table:
    table = plain_table(["what", "published", "simulated", "error", "used to fit"])
    for one in held:
        add_row(table, *cells(one))
    return table


def cells(held: PublishedFigure) -> tuple[str, str, str, str, str]:
    """The cells of a table: what, published, simulated, error, whether used to fit."""
    simulated, error = "not simulated", ""
    if held.simulated_ms is not None and held.error is not None:
        simulated, error = f"{held.simulated_ms:.1f}", f"{100 * held.error:+.1f} %"
    return held.what, f"{held.published_ms:.1f}", simulated, error, "yes" if held.fitted else "no"


def add_row(table: Table, *cells: str) -> None:
    """A row of plain text: a reason may have brackets, which are no markup."""
    table.add_row(*map(Text, cells))


def plain_table(columns: Sequence[str]) -> Table:
    """Columns of numbers, but for the first and for words."""
    table = Table(box=None, header_style="", pad_edge=False, padding=(0, 1))
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at and column not in WORDS else "left")
    return table


def say(console: Console, line: str) -> None:
    """A line as it is: with paths that can be copied, and brackets that are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
