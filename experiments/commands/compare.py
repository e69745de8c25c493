"""`proto-v3 compare`: the same devices migrated under each protocol, with the same seeds.

It states in sentences what the runs show, prints tables, and draws figures.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.options import parsed
from experiments.report import comparison, findings, tables
from experiments.report.tables import Output, say
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED
from experiments.runs.pool import Cell, run_cells
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.scenario import Scenario

FIGURES = [f"{name}.{suffix}" for name in ("compare", "distribution", "critical") for suffix in ("png", "svg")]


def run_compare(
    scenario: str,
    protocols: Sequence[str],
    seeds: Sequence[int],
    out: str | None,
    table_format: str,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
    *,
    as_json: bool = False,
    quiet: bool = False,
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
    folder.remove(*FIGURES, other_table)
    if interrupted:
        say(console, f"interrupted: {len(outcomes)} of {len(cells)} runs were done and are kept in {folder.folder}")
        return INTERRUPTED
    output = Output(as_json, quiet)
    output.results(
        {"command": "compare", "scenario": loaded.name, "folder": str(folder.folder)},
        f"{loaded.name}: {loaded.description}",
        findings.conclusion(frame),
        list(comparison.sections(loaded, frame)),
    )
    drawn = output.drawn(lambda: _draw(folder, loaded, frame, command))
    output.say(f"Table and manifest: {folder.folder / f'runs.{table_format}'}, {folder.folder / 'manifest.json'}")
    return 1 if OutcomeKind.FAILED.value in frame["outcome"] or not drawn else 0


def _draw(folder: ResultFolder, scenario: Scenario, frame: pl.DataFrame, command: Sequence[str]) -> list[Path]:
    if frame.filter(COMPLETED).is_empty():
        return []
    from experiments.draw import distribution
    from experiments.draw import downtime as figures

    paths = folder.write_figure(figures.draw_downtime(scenario, frame, shlex.join(command)), "compare")
    paths += folder.write_figure(distribution.draw_distribution(scenario, frame, shlex.join(command)), "distribution")
    if any(device.reconfigurations for device in scenario.devices):
        paths += folder.write_figure(figures.draw_critical(scenario, frame, shlex.join(command)), "critical")
    return paths
