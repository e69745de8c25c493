"""`proto-v3 trace`: one run in virtual time, as a Perfetto trace and as a table of its spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console

from experiments.report import tables
from experiments.report.tables import say
from experiments.runs.folder import replacing
from experiments.trace.samples import Samples
from experiments.trace.tracks import Track, arranged
from proto_v3.errors import UserError
from proto_v3.timeline import NO_CAUSE, Mark, Recorded, Resource, Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

OUT = Path("out")
TRACE_SUFFIX = ".perfetto-trace"
SPANS_SCHEMA_VERSION = 1
"""Of the table of spans; grows when a column changes its meaning."""
NS_PER_MS, NS_PER_S = 1e6, 1e9


@dataclass(frozen=True, slots=True)
class Traced:
    """A run, and what was seen of it."""

    scenario: Scenario
    outcome: Outcome
    timeline: Timeline
    samples: Samples

    @property
    def recorded(self) -> Recorded:
        """What the timeline holds."""
        return self.timeline.recorded()


def run_trace(
    scenario_name: str,
    protocol_name: str,
    seed: int,
    settings: Sequence[str],
    out: str | None,
    spans: str | None,
) -> int:
    """Run, write, print; returns the exit status. UserError for bad input, before anything is run or written."""
    scenario = load(scenario_name, settings)
    protocol = Protocol.parse(protocol_name, scenario)
    trace_file = place("--out", out, OUT / f"{scenario.name}-{protocol.name}-{seed}{TRACE_SUFFIX}")
    spans_file = place("--spans", spans)
    traced = made(scenario, protocol, seed)
    console = tables.console()
    say(console, told(traced.outcome))
    write(console, traced, trace_file, spans_file)
    return int(traced.outcome.kind is OutcomeKind.FAILED)


def made(scenario: Scenario, protocol: Protocol, seed: int) -> Traced:
    """Make the run."""
    kept: list[Timeline] = []
    samples = Samples()
    outcome = simulate(scenario, protocol, seed, keep=kept.append, watch=samples.watch)
    return Traced(scenario, outcome, kept[0], samples)


def write(console: Console, traced: Traced, trace_file: Path | None, spans_file: Path | None) -> None:
    """Write what is asked for, and say what it is."""
    if trace_file is not None:
        tracks, counters = write_trace(traced, trace_file)
        spans = f"{len(traced.timeline)} spans on {tracks} tracks, {counters} counters"
        say(console, f"Trace: {trace_file} ({spans}); open it at https://ui.perfetto.dev")
    if spans_file is not None:
        write_spans(spans_table(traced), spans_file)
        say(console, f"Table of spans: {spans_file}")


def place(option: str, named: str | None, unless_named: Path | None = None) -> Path | None:
    """Where a file is to be written; its folder is made. UserError, before the work, if it cannot be there."""
    if named is None and unless_named is None:
        return None
    path = Path(named) if named is not None else unless_named
    assert path is not None
    if named == "" or path.is_dir():
        raise UserError(f"{option} {named or repr(named)}: must be the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: its folder cannot be made: {error.strerror}") from error
    return path


def told(outcome: Outcome) -> str:
    """A run and its main figures, in a line."""
    line = f"{outcome.scenario}, {outcome.protocol}, seed {outcome.seed}: {outcome.kind.value}"
    if outcome.downtime_ns is not None:
        line += f", downtime {outcome.downtime_ns / NS_PER_MS:.3f} ms"
    if outcome.total_ns is not None:
        line += f", {outcome.total_ns / NS_PER_S:.3f} s in all"
    return line + (f" ({outcome.reason})" if outcome.reason else "")


# --- the trace -------------------------------------------------------------------------------------------------------


def write_trace(traced: Traced, path: Path) -> tuple[int, int]:
    """Write the trace; how many tracks and counters are in it."""
    from experiments.trace.perfetto import write_trace as write_file

    outcome = traced.outcome
    devices = {device.name: device.pf for device in traced.scenario.devices}
    drawn = arranged(traced.timeline, devices, traced.samples.counters())
    causes = traced.recorded.spans["cause"].tolist()
    with replacing(path) as new:
        write_file(
            new,
            f"{outcome.scenario} {outcome.protocol} seed {outcome.seed}",
            f"{told(outcome)}; digest {outcome.digest}",
            drawn,
            {span: cause for span, cause in enumerate(causes) if cause != NO_CAUSE},
        )
    tracks = sum(isinstance(each, Track) for each in drawn)
    return tracks, len(drawn) - tracks


# --- the table of spans ----------------------------------------------------------------------------------------------


def spans_table(traced: Traced) -> pl.DataFrame:
    """One row a span, in the order in which they were recorded. A span's cause is another one's number, or null."""
    outcome, recorded = traced.outcome, traced.recorded
    spans = recorded.spans
    names = np.array(recorded.names, object)
    resources = np.array([resource.name.lower() for resource in Resource], object)
    critical = np.zeros(len(traced.timeline), bool)
    if Mark.RESUMED in recorded.marks:
        critical[[span for span, _, _ in traced.timeline.critical_spans()]] = True
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
    """Write the table as Parquet."""
    with replacing(path) as new:
        frame.write_parquet(new, metadata={"schema_version": str(SPANS_SCHEMA_VERSION)})
