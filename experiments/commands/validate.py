"""`proto-v3 validate`: published migrations, simulated: the error of each figure, and how the cases differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.options import out_folder
from experiments.report import tables
from experiments.report.tables import say, value_text
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, run_cells
from experiments.study.published import PublishedFigure, held_against
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.file import bases, changes, find, load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.shipped import shipped

BANDS = (0.10, 0.15)
"""Relative errors: within the first they are small, beyond the second too large."""
HELD_CONSTANT = ("firmware", "driver", "device", "host", "link", "vmm")
"""The scenario's tables that describe a machine. A case is weaker evidence if it differs from its base in them."""
HEADINGS = ["protocol", "published", "simulated", "error", "used to fit", "outside"]
COLUMNS = {
    "scenario": pl.String,
    "case": pl.String,
    "protocol": pl.String,
    "figure": pl.String,
    "published_ms": pl.Float64,
    "simulated_ms": pl.Float64,
    "error": pl.Float64,
    "fitted": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A published figure, compared with the mean of the runs."""

    scenario: str
    case: str
    """The name of the measurement; the scenario's if it has none."""
    protocol: str
    held: PublishedFigure

    def within(self, band: float) -> bool:
        """Whether the error is at most `band`; False if the figure was not simulated."""
        return self.held.error is not None and abs(self.held.error) <= band


def run_validate(
    names: Sequence[str],
    seeds: Sequence[int],
    out: str | None,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
    *,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    cases = _cases(names, settings)
    cells = [
        Cell(scenario, Protocol.parse(protocol, scenario), seed)
        for scenario in cases.values()
        for protocol in _protocols(scenario)
        for seed in seeds
    ]
    called = [scenario.name for scenario in cases.values()]
    plan = Plan(command, called, len(cells), seeds, {each.protocol.name for each in cells}, writes=["validate"])
    with ResultFolder(out_folder(out, "validate"), plan, force=force) as folder:
        outcomes, interrupted = run_cells(cells, jobs, quiet=quiet)
        console = tables.console()
        if interrupted:
            say(console, f"interrupted: {len(outcomes)} of {len(cells)} runs were done; nothing was written")
            return INTERRUPTED
        runs = results.table(outcomes)
        rows = [
            Row(scenario.name, published.case or scenario.name, published.protocol, held)
            for scenario in cases.values()
            for published in scenario.published
            for held in held_against(published, runs.filter(scenario=scenario.name))
        ]
        drawn = _write(folder, tidy(rows), manifest.of_cases(cases, command, runs, len(cells)))
    for name, scenario in () if quiet else cases.items():
        _print_case(console, scenario, runs, [row for row in rows if row.scenario == scenario.name])
        _print_differences(console, name, scenario, settings)
    if settings:
        say(console, f"\nWith {', '.join(f'--set {each}' for each in settings)}: not the machines that were measured.")
    _print_summary(console, rows)
    failed = OutcomeKind.FAILED.value in runs["outcome"]
    status = 1 if failed or not all(row.within(BANDS[-1]) for row in rows) else 0
    if quiet:
        return status
    figure = f"Figure: {folder.folder / 'validate.png'} (and .svg)"
    say(console, f"\n{figure}" if drawn else "\nNo run was completed: nothing to draw.")
    files = f"{folder.folder / 'validate.parquet'}, {folder.folder / 'manifest.json'}"
    say(console, f"Table and manifest: {files}{folder.why_there}")
    return status


def _cases(names: Sequence[str], settings: Sequence[str]) -> dict[str, Scenario]:
    """The scenarios by the name or file that the user gave: a scenario's or a case's; without any, all with figures."""
    by_case: dict[str, list[str]] = {}
    if set(names) - set(shipped()):
        for name in shipped():
            for published in load(name).published:
                by_case.setdefault(published.case or name, []).append(name)
    for name in names:
        if name not in by_case:
            find(name, by_case)
    chosen = dict.fromkeys(each for name in names or shipped() for each in by_case.get(name, [name]))
    if not names:
        chosen = {name: None for name in chosen if _protocols(load(name))}
    cases = {name: load(name, settings, keep_published=True) for name in chosen}
    without = [name for name, scenario in cases.items() if not _protocols(scenario)]
    if without:
        raise UserError(f"{', '.join(without)}: no published figures to compare the runs with ([[published]])")
    called = [scenario.name for scenario in cases.values()]
    if len(set(names)) < len(names) or len(set(called)) < len(called):
        raise UserError(f"{', '.join(names)}: two cases have the same name")
    return cases


def _protocols(scenario: Scenario) -> list[str]:
    """The protocols that have published figures."""
    return list(dict.fromkeys(published.protocol for published in scenario.published if published.figures()))


# --- files -----------------------------------------------------------------------------------------------------------


def tidy(rows: Sequence[Row]) -> pl.DataFrame:
    """One row a figure; null if it was not simulated."""
    values = [
        (row.scenario, row.case, row.protocol, one.figure, one.published_ms, one.simulated_ms, one.error, one.fitted)
        for row, one in ((row, row.held) for row in rows)
    ]
    return pl.DataFrame(values, schema=COLUMNS, orient="row")


def _write(folder: ResultFolder, frame: pl.DataFrame, how_made: dict[str, Any]) -> bool:
    """Write all files; returns whether there is something to draw."""
    folder.write_table(frame, "validate", "parquet")
    folder.write_manifest(how_made)
    drawn = not frame["simulated_ms"].is_null().all()
    if drawn:
        from experiments.draw import validate as figures_validate

        figure = figures_validate.published_against_simulated(frame, BANDS, len(how_made["seeds"]), how_made["command"])
        folder.write_figure(figure, "validate")
    folder.commit()
    return drawn


# --- printing --------------------------------------------------------------------------------------------------------


def _print_case(console: Console, scenario: Scenario, runs: pl.DataFrame, rows: Sequence[Row]) -> None:
    table = tables.plain_table(["what, ms", *HEADINGS])
    for row in rows:
        tables.add_row(table, row.held.what, *_cells(row))
    tables.print_table(console, f"{scenario.name}: {scenario.description}", table)
    for published in scenario.published:
        say(console, f"Published ({published.case or scenario.name}, {published.protocol}): {published.citation}")
    frame = runs.filter(scenario=scenario.name)
    if frame.filter(~COMPLETED).height:
        tables.outcomes(frame, title=f"{scenario.name}: not all runs were completed").print(console)


def _cells(row: Row) -> list[str]:
    """Under HEADINGS; the last is the widest band that the figure is outside of."""
    outside = [band for band in BANDS if not row.within(band)]
    return [row.protocol, *tables.cells(row.held)[1:], f"{100 * outside[-1]:.0f} %" if outside else ""]


def _print_differences(console: Console, name: str, scenario: Scenario, settings: Sequence[str]) -> None:
    """The parameters that differ from the file at the bottom of what the case extends."""
    extended = bases(name)
    if not extended:
        say(console, f"{scenario.name} extends nothing: all parameters are its own.")
        return
    table = tables.plain_table(["parameter", "base", "here", "source"])
    for key, (there, here) in changes(name, settings).items():
        if key.partition(".")[0] in HELD_CONSTANT and there is not None:
            tables.add_row(table, key, value_text(there), value_text(here), scenario.sources.get(key, "not stated"))
    if table.row_count:
        tables.print_table(console, f"{scenario.name}: what had to differ from {extended[-1].stem}", table)
    else:
        say(console, f"{scenario.name}: nothing had to differ from {extended[-1].stem}.")


def _print_summary(console: Console, rows: Sequence[Row]) -> None:
    table = tables.plain_table(["downtime, ms", *HEADINGS])
    for row in rows:
        if row.held.figure == "downtime_ms":
            tables.add_row(table, row.scenario, *_cells(row))
    if table.row_count:
        tables.print_table(console, "The downtimes of all cases", table)
    table = tables.plain_table(["", "figures", *[f"within {100 * band:.0f} %" for band in BANDS]])
    for kind, some in (
        ("predicted", [row for row in rows if not row.held.fitted]),
        ("fitted", [row for row in rows if row.held.fitted]),
        ("all", rows),
    ):
        within = [sum(row.within(band) for row in some) for band in BANDS]
        tables.add_row(table, kind, str(len(some)), *map(str, within))
    tables.print_table(console, "How many of the published figures come out", table)
