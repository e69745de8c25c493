# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 compare`: the same devices migrated under each protocol, with the same seeds.

It states in sentences what the runs show, prints tables, and draws figures.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.finish import CommandResults, finish
from experiments.commands.options import out_folder, parsed
from experiments.report import comparison, findings
from experiments.report.tables import Output
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, run_cells
from sim.scenario.scenario import Scenario

WRITES = ("runs", "compare", "distribution", "critical")
"""Its files, without their suffixes."""


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
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded, chosen = parsed(scenario, protocols, settings)
    cells = [Cell(loaded, protocol, seed) for seed in seeds for protocol in chosen]
    plan = Plan(command, [scenario], len(cells), writes=WRITES)
    with ResultFolder(out_folder(out, loaded.name), plan, force=force) as folder:
        outcomes, interrupted = run_cells(cells, jobs, quiet=quiet)
        output = Output(as_json, quiet)
        if not outcomes:
            output.say("interrupted before the first run was done; nothing was written", always=True)
            return INTERRUPTED
        frame = results.table(outcomes)
        found = CommandResults(
            "compare",
            loaded.name,
            f"{loaded.name}: {loaded.description}",
            frame,
            len(cells),
            manifest.of_scenario(loaded, scenario, command, frame, len(cells)),
            lambda: findings.conclusion(frame),
            lambda: list(comparison.sections(loaded, frame)),
            lambda: _draw(folder, loaded, frame, command),
        )
        return finish(folder, found, output, table_format, interrupted=interrupted)


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
