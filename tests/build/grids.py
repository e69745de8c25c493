# SPDX-License-Identifier: GPL-2.0-or-later
"""Experiments' grids in tests: their runs, really made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from experiments.commands import run as sweep
from experiments.report.tables import Output
from experiments.runs import frame as results
from experiments.runs.folder import ResultFolder
from experiments.runs.pool import run_cell
from experiments.study.experiment import Experiment, Planned
from experiments.study.seeds import SeedRule


def table_of(planned: Iterable[Planned]) -> pl.DataFrame:
    """The table of these runs, as a sweep writes it."""
    rows = [results.row(run_cell(each.cell)) | each.columns() for each in planned]
    return pl.DataFrame(rows, infer_schema_length=None)


def write_quick(experiment: Experiment, planned: Sequence[Planned], folder: Path) -> None:
    """Make these runs, and write what `proto-v3 run --quick` writes of them."""
    frame, rule, output = table_of(planned), SeedRule(experiment.values), Output(quiet=True)
    with ResultFolder(folder, sweep.plan_of(experiment, planned, quick=True)) as results:
        answer = sweep.answered(experiment, frame, results, [], rule, output)
        drawing = sweep.Drawing(experiment, frame, results.plan.line, results.stage)
        sweep.finished(experiment, answer, drawing.make(), results, output)
