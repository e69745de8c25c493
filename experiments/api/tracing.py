"""One run, step by step: tables and files."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from experiments.trace import path as critical_path
from experiments.trace import traced_run
from experiments.trace.traced_run import TracedRun
from proto_v3.errors import UserError
from proto_v3.timeline import Timeline


def steps(run: TracedRun) -> pl.DataFrame:
    """The critical path through the downtime of a run: one row a step, in the order of time.

    Columns: from_ms (since the order to stop the vCPUs), takes_ms, resource, what, track. The steps tile the downtime:
    their times add up to it. UserError if the run was not completed.
    """
    return critical_path.steps(completed_timeline(run))


def stretches(run: TracedRun) -> pl.DataFrame:
    """As `steps`, with consecutive steps on the same track and resource joined into one row.

    Columns: from_ms, takes_ms, resource, what (the different ones, separated by commas), track, steps (how many were
    joined). UserError if the run was not completed.
    """
    return critical_path.stretches(completed_timeline(run))


def spans(run: TracedRun) -> pl.DataFrame:
    """Every span of work of a run: one row a span, in the order in which they were recorded.

    Columns: run (SCENARIO/PROTOCOL/SEED), span (its number), resource, what, track, start_ns, end_ns, cause (the number
    of the span that it waited for, or null), on_critical_path.
    """
    return traced_run.spans_table(run)


def write_trace(run: TracedRun, path: str | os.PathLike[str]) -> Path:
    """Write a run as a trace for https://ui.perfetto.dev; returns the file. UserError if it cannot be written."""
    file = traced_run.output_file("path", Path(path))
    traced_run.write_trace(run, file)
    return file


def write_spans(run: TracedRun, path: str | os.PathLike[str]) -> Path:
    """Write the table of `spans` as Parquet; returns the file. UserError if it cannot be written."""
    file = traced_run.output_file("path", Path(path))
    traced_run.write_spans(spans(run), file)
    return file


def completed_timeline(run: TracedRun) -> Timeline:
    """A run's timeline. UserError if the run was not completed: it has no downtime."""
    if run.outcome.downtime_ns is None:
        raise UserError(f"{run.summary}: there is no downtime to look into")
    return run.timeline
