# SPDX-License-Identifier: GPL-2.0-or-later
"""The end that `compare`, `live` and `real` share: files are written, results are printed, figures are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from experiments import INTERRUPTED
from experiments.report.tables import Output, Section
from experiments.runs.folder import ResultFolder
from proto_v3.vmm.migration import OutcomeKind


@dataclass(frozen=True, slots=True)
class CommandResults:
    """What a command's runs came to."""

    command: str
    scenario: str
    """Its name."""
    title: str
    frame: pl.DataFrame
    """The runs that were done, one row each."""
    planned: int
    """The number of runs that were asked for."""
    manifest: dict[str, Any]
    conclusion: Callable[[], Sequence[str]]
    """Sentences. Called only if no run is missing, as the next two."""
    sections: Callable[[], Sequence[Section]]
    """Tables."""
    draw: Callable[[], Sequence[Path]]
    """Draws the figures, and returns their files."""


def finish(
    folder: ResultFolder, results: CommandResults, output: Output, table_format: str, *, interrupted: bool
) -> int:
    """Write, print, draw; returns the exit status.

    After Ctrl-C the runs that were done are written, and nothing else.
    """
    try:
        folder.write_table(results.frame, "runs", table_format)
        folder.write_manifest(results.manifest)
    finally:  # the results are printed if the disk is full, too
        if not interrupted:
            about = {"command": results.command, "scenario": results.scenario, "folder": str(folder.folder)}
            output.results(about, results.title, results.conclusion(), results.sections())
    if interrupted:
        folder.commit()
        done = f"{results.frame.height} of {results.planned} runs were done and are kept in {folder.folder}"
        output.say(f"interrupted: {done}{folder.why_there}", always=True)
        return INTERRUPTED
    drawn = output.drawn(results.draw)
    folder.commit()
    output.files(folder.folder, [f"runs.{table_format}"], drawn, folder.why_there)
    return 1 if OutcomeKind.FAILED.value in results.frame["outcome"] or drawn is None else 0
