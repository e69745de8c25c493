"""`proto-v3 compare`: the same devices migrated under each protocol, with the same seeds.

It prints tables, draws figures, and states in sentences what they show.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.options import parsed
from experiments.report import findings, tables
from experiments.report.tables import say
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED
from experiments.runs.pool import Cell, run_cells
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.scenario import Scenario


def run_compare(
    scenario: str,
    protocols: Sequence[str],
    seeds: Sequence[int],
    out: str | None,
    table_format: str,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded, chosen = parsed(scenario, protocols, settings)
    if out == "":
        raise UserError("--out '': must be the name of a folder")
    folder = ResultFolder(Path(out) if out else Path("results") / loaded.name)
    cells = [Cell(loaded, protocol, seed) for seed in seeds for protocol in chosen]
    outcomes, interrupted = run_cells(cells, jobs)
    console = tables.console()
    if not outcomes:
        say(console, "interrupted before the first run was done; nothing was written")
        return INTERRUPTED
    frame = results.table(outcomes)
    folder.write_table(frame, "runs", table_format)
    folder.write_json(manifest.of_scenario(loaded, scenario, command, frame, len(cells)), "manifest")
    other_table = "runs.parquet" if table_format == "csv" else "runs.csv"
    folder.remove("compare.png", "compare.svg", "critical.png", "critical.svg", other_table)
    if interrupted:
        say(console, f"interrupted: {len(outcomes)} of {len(cells)} runs were done and are kept in {folder.folder}")
        return INTERRUPTED
    figures = _draw(folder, loaded, frame, command)  # before anything is printed, which may go to `head`
    tables.print_tables(console, loaded, frame)
    for sentence in findings.findings(frame):
        console.print(f"- {sentence}", highlight=False, markup=False)
    drawn = ", ".join(str(path) for path in figures if path.suffix == ".png")
    say(console, f"\nFigure: {drawn} (and .svg)" if figures else "\nNo run was completed: nothing to draw.")
    say(console, f"Table and manifest: {folder.folder / f'runs.{table_format}'}, {folder.folder / 'manifest.json'}")
    return 1 if OutcomeKind.FAILED.value in frame["outcome"] else 0


def _draw(folder: ResultFolder, scenario: Scenario, frame: pl.DataFrame, command: Sequence[str]) -> list[Path]:
    if frame.filter(COMPLETED).is_empty():
        return []
    from experiments.draw import downtime as figures

    paths = folder.write_figure(figures.draw_downtime(scenario, frame, shlex.join(command)), "compare")
    if any(device.reconfigurations for device in scenario.devices):
        paths += folder.write_figure(figures.draw_critical(scenario, frame, shlex.join(command)), "critical")
    return paths
