# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 trace`: one run in virtual time, as a Perfetto trace and as a table of its spans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.commands.options import parsed
from experiments.report import tables
from experiments.report.tables import say
from experiments.runs.files import output_file
from experiments.runs.folder import OUT
from experiments.trace.traced_run import TRACE_SUFFIX, TracedRun, traced_run, write_spans, write_trace
from experiments.trace.tracks import Track
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind


def run_trace(
    scenario: str, protocol: str, seed: int, settings: Sequence[str], trace: str | None, spans: str | None
) -> int:
    """Run, write, print; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded, (chosen,) = parsed(scenario, [protocol], settings)
    default = OUT / f"{loaded.name}-{chosen.name}-{seed}{TRACE_SUFFIX}"
    trace_file, spans_file = output_files(trace, default, spans)
    run = traced_run(loaded, chosen, seed)
    console = tables.console()
    say(console, run.summary)
    write(console, run, trace_file, spans_file)
    return int(run.outcome.kind is OutcomeKind.FAILED)


def output_files(trace: str | None, default: Path, spans: str | None) -> tuple[Path, Path | None]:
    """Where to write the trace (what the user named, or the default) and the table of spans, if that is asked for.

    UserError, before the work, if one cannot be there.
    """
    for name, value in (("--trace", trace), ("--spans", spans)):
        if value == "":
            raise UserError(f"{name} '': must be the name of a file")
    files = output_file("--trace", trace or default), output_file("--spans", spans) if spans else None
    if files[1] is not None and files[1].is_file() and files[0].exists() and files[0].samefile(files[1]):
        raise UserError(f"--spans {spans}: is the file of the trace too; name another one")
    return files


def write(console: Console, run: TracedRun, trace_file: Path, spans_file: Path | None) -> None:
    """Write the files, and print what they are."""
    write_trace(run, trace_file)
    tracks = sum(isinstance(each, Track) for each in run.drawn)
    contents = f"{len(run.timeline)} spans on {tracks} tracks, {len(run.drawn) - tracks} counters"
    say(console, f"Trace: {trace_file} ({contents}); open it at https://ui.perfetto.dev")
    if spans_file is not None:
        write_spans(run, spans_file)
        say(console, f"Table of spans: {spans_file}")
