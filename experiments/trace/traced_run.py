# SPDX-License-Identifier: GPL-2.0-or-later
"""One run in virtual time with all that was recorded of it: its outcome, timeline and samples, as files and tables."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from experiments.runs.files import output_file, replacing
from experiments.trace.samples import Samples
from experiments.trace.tracks import Counter, Track, arranged
from proto_v3.errors import UserError
from proto_v3.timeline import NO_CAUSE, Mark, Resource, Timeline
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS, NS_PER_S

TRACE_SUFFIX = ".perfetto-trace"
SPANS_SCHEMA_VERSION = 1
"""Of the table of spans. It grows when a column changes its meaning."""


@dataclass(frozen=True)
class TracedRun:
    """One run, and all that was recorded of it."""

    scenario: Scenario
    outcome: Outcome
    """How it ended, its downtime, its counters; times in ns."""
    timeline: Timeline
    """Every span of work, with its resource, start, end and cause."""
    samples: Samples
    """Bytes left, dirtied and sent, sampled during the run."""

    @cached_property
    def drawn(self) -> list[Track | Counter]:
        """All tracks and counters of its trace, in the order in which they are drawn."""
        devices = {device.name: device.pf for device in self.scenario.devices}
        return arranged(self.timeline, devices, self.samples.counters())

    @property
    def summary(self) -> str:
        """The run and its main figures, in one line."""
        outcome = self.outcome
        line = f"{outcome.scenario}, {outcome.protocol}, seed {outcome.seed}: {outcome.kind.value}"
        if outcome.downtime_ns is not None:
            line += f", downtime {outcome.downtime_ns / NS_PER_MS:.3f} ms"
        if outcome.total_ns is not None:
            line += f", {outcome.total_ns / NS_PER_S:.3f} s in all"
        return line + (f" ({outcome.reason})" if outcome.reason else "")


def traced_run(scenario: Scenario, protocol: Protocol, seed: int) -> TracedRun:
    """Make one run, and keep its timeline and samples."""
    timelines: list[Timeline] = []
    samples = Samples()
    outcome = simulate(scenario, protocol, seed, keep=timelines.append, watch=samples.watch)
    return TracedRun(scenario, outcome, timelines[0], samples)


def steps(run: TracedRun) -> pl.DataFrame:
    """The critical path through the downtime of a run: one row a step, in the order of time.

    Columns: from_ms (since the order to stop the vCPUs), takes_ms, resource, what, track. The steps tile the downtime:
    their times add up to it. UserError if the run was not completed.
    """
    if run.outcome.downtime_ns is None:
        raise UserError(f"{run.summary}: there is no downtime to look into")
    begin = run.timeline.marks[Mark.STOP_ORDERED]
    return pl.DataFrame(
        [
            {
                "from_ms": (step.start_ns - begin) / NS_PER_MS,
                "takes_ms": (step.end_ns - step.start_ns) / NS_PER_MS,
                "resource": step.resource.name,
                "what": step.what,
                "track": step.track,
            }
            for step in run.timeline.critical_path()
        ]
    )


def stretches(run: TracedRun) -> pl.DataFrame:
    """As `steps`, with consecutive steps on the same track and resource joined into one row.

    Columns: from_ms, takes_ms, resource, what (the different ones, separated by commas), track, steps (how many were
    joined). UserError if the run was not completed.
    """
    kind = pl.when(pl.col("resource") == Resource.COPY.name).then(pl.lit("")).otherwise(pl.col("what"))
    return (
        steps(run)
        .with_columns(at=pl.struct("resource", "track", kind).rle_id())
        .group_by("at", maintain_order=True)
        .agg(
            pl.col("from_ms").first().round(2),
            pl.col("takes_ms").sum().round(2),
            pl.col("resource").first(),
            pl.col("what").unique(maintain_order=True).str.join(", "),
            pl.col("track").first(),
            pl.len().alias("steps"),
        )
        .drop("at")
    )


def spans(run: TracedRun) -> pl.DataFrame:
    """Every span of work of a run: one row a span, in the order in which they were recorded.

    Columns: run (SCENARIO/PROTOCOL/SEED), span (its number), resource, what, track, start_ns, end_ns, cause (the number
    of the span that it waited for, or null), on_critical_path.
    """
    outcome, recorded = run.outcome, run.timeline.recorded()
    table = recorded.spans
    names = np.array(recorded.names, object)
    resources = np.array([resource.name.lower() for resource in Resource], object)
    critical = np.zeros(len(run.timeline), bool)
    if Mark.RESUMED in recorded.marks:
        critical[[span for span, _, _ in run.timeline.critical_spans()]] = True
    cause = pl.Series(table["cause"])
    return pl.DataFrame(
        {
            "run": pl.repeat(f"{outcome.scenario}/{outcome.protocol}/{outcome.seed}", len(critical), eager=True),
            "span": np.arange(len(critical)),
            "resource": pl.Series(resources[table["resource"]], dtype=pl.String),
            "what": pl.Series(names[table["what"]], dtype=pl.String),
            "track": pl.Series(names[table["track"]], dtype=pl.String),
            "start_ns": table["start_ns"],
            "end_ns": table["end_ns"],
            "cause": cause.set(cause == NO_CAUSE, None),
            "on_critical_path": critical,
        }
    )


def write_trace(run: TracedRun, path: str | os.PathLike[str]) -> Path:
    """Write a run as a trace for https://ui.perfetto.dev; returns the file. UserError if it cannot be written."""
    from experiments.trace import perfetto

    file, outcome = output_file("path", path), run.outcome
    title = f"{outcome.scenario} {outcome.protocol} seed {outcome.seed}"
    causes = enumerate(run.timeline.recorded().spans["cause"].tolist())
    waited_for = {span: cause for span, cause in causes if cause != NO_CAUSE}
    with replacing(file) as new:
        perfetto.write_trace(new, title, f"{run.summary}; digest {outcome.digest}", run.drawn, waited_for)
    return file


def write_spans(run: TracedRun, path: str | os.PathLike[str]) -> Path:
    """Write the table of `spans` as Parquet; returns the file. UserError if it cannot be written."""
    file = output_file("path", path)
    with replacing(file) as new:
        content = io.BytesIO()  # Polars takes not every name of a file
        spans(run).write_parquet(content, metadata={"schema_version": str(SPANS_SCHEMA_VERSION)})
        new.write_bytes(content.getbuffer())
    return file
