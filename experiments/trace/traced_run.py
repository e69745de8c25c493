"""One run in virtual time with all that was recorded of it: its outcome, timeline and samples, as files and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from experiments.runs.folder import replacing
from experiments.trace.samples import Samples
from experiments.trace.tracks import Track, arranged
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


@dataclass(frozen=True, slots=True)
class TracedRun:
    """One run, and all that was recorded of it."""

    scenario: Scenario
    outcome: Outcome
    """How it ended, its downtime, its counters; times in ns."""
    timeline: Timeline
    """Every span of work, with its resource, start, end and cause."""
    samples: Samples
    """Bytes left, dirtied and sent, sampled during the run."""

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


def output_file(option: str, path: Path) -> Path:
    """`path`, whose folder is made. UserError, which names `option`, if there can be no file.

    To be called before the run: a mistake is then found before the work.
    """
    if not path.name or path.is_dir():
        raise UserError(f"{option} {path}: must be the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: its folder cannot be made: {error.strerror}") from error
    return path


def write_trace(run: TracedRun, path: Path) -> tuple[int, int]:
    """Write a Perfetto trace; returns the number of tracks and of counters in it."""
    from experiments.trace import perfetto

    outcome = run.outcome
    devices = {device.name: device.pf for device in run.scenario.devices}
    drawn = arranged(run.timeline, devices, run.samples.counters())
    causes = run.timeline.recorded().spans["cause"].tolist()
    with replacing(path) as new:
        perfetto.write_trace(
            new,
            f"{outcome.scenario} {outcome.protocol} seed {outcome.seed}",
            f"{run.summary}; digest {outcome.digest}",
            drawn,
            {span: cause for span, cause in enumerate(causes) if cause != NO_CAUSE},
        )
    tracks = sum(isinstance(each, Track) for each in drawn)
    return tracks, len(drawn) - tracks


def spans_table(run: TracedRun) -> pl.DataFrame:
    """One row a span, in the order in which they were recorded.

    Columns: run (SCENARIO/PROTOCOL/SEED), span (its number), resource, what, track, start_ns, end_ns, cause (the number
    of the span that it waited for, or null), on_critical_path.
    """
    outcome, recorded = run.outcome, run.timeline.recorded()
    spans = recorded.spans
    names = np.array(recorded.names, object)
    resources = np.array([resource.name.lower() for resource in Resource], object)
    critical = np.zeros(len(run.timeline), bool)
    if Mark.RESUMED in recorded.marks:
        critical[[span for span, _, _ in run.timeline.critical_spans()]] = True
    cause = pl.Series(spans["cause"])
    return pl.DataFrame(
        {
            "run": pl.repeat(f"{outcome.scenario}/{outcome.protocol}/{outcome.seed}", len(critical), eager=True),
            "span": np.arange(len(critical)),
            "resource": pl.Series(resources[spans["resource"]], dtype=pl.String),
            "what": pl.Series(names[spans["what"]], dtype=pl.String),
            "track": pl.Series(names[spans["track"]], dtype=pl.String),
            "start_ns": spans["start_ns"],
            "end_ns": spans["end_ns"],
            "cause": cause.set(cause == NO_CAUSE, None),
            "on_critical_path": critical,
        }
    )


def write_spans(frame: pl.DataFrame, path: Path) -> None:
    """Write the table of spans as Parquet."""
    with replacing(path) as new:
        frame.write_parquet(new, metadata={"schema_version": str(SPANS_SCHEMA_VERSION)})
