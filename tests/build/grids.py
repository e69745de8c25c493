"""Experiments' grids in tests: their runs, really made."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from experiments.runs import frame as results
from experiments.runs.pool import run_cell
from experiments.study.experiment import Planned


def table_of(planned: Iterable[Planned]) -> pl.DataFrame:
    """The table of these runs, as a sweep writes it."""
    rows = [results.row(run_cell(each.cell)) | each.columns() for each in planned]
    return pl.DataFrame(rows, infer_schema_length=None)
