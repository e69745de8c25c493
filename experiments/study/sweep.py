# SPDX-License-Identifier: GPL-2.0-or-later
"""The runs of one question: each is kept as soon as it is made, until the grid asks for no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import polars as pl

from experiments.runs import frame as results
from experiments.runs.folder import MANIFEST, ResultFolder, damaged, read_manifest
from experiments.runs.resume import KeptRuns, RunStore, put_aside, read, remove
from experiments.study.experiment import Experiment, Planned
from experiments.study.seeds import SeedRule
from proto_v3.errors import UserError
from proto_v3.text import clean
from sim.outcome import Outcome

KEPT = "runs.sqlite"
"""The finished runs, beside the results until all are done."""


class Sweep:
    """The runs of one question. `begin` opens the file that they are kept in; use it with `with`."""

    def __init__(
        self, experiment: Experiment, planned: Sequence[Planned], rule: SeedRule, folder: ResultFolder, revision: str
    ) -> None:
        """`planned`: all that the grid can ask for. `revision`: of the code that runs."""
        self.experiment = experiment
        self.rule = rule
        self.folder = folder
        self._planned = planned
        self._keys = {each.key for each in planned}
        self._revision = revision
        self._kept = folder.folder / KEPT
        self._columns = {"outcome", *(name for value in rule.values for name in value)}
        self._done: dict[str, dict[str, Any]] = {}
        """Of each row what the rule reads of it."""
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def check(self, resume: bool, force: bool) -> KeptRuns:
        """The kept runs. UserError if some would be lost: to be called before anything is run."""
        kept = read(self._kept, self._revision)
        more = (kept.rows.keys() | kept.others.keys()) - self._keys
        if more and not force:
            raise UserError(
                f"{self._kept}: keeps {len(more)} runs of an interrupted sweep that this command does not make; "
                "--force removes them, --out names another folder"
            )
        if (lost := kept.rows.keys() & self._keys) and not resume and not force:
            raise UserError(
                f"{self._kept}: keeps {len(lost)} runs of an interrupted sweep; "
                "--resume goes on with them, --force makes all of them again"
            )
        others = [version for cell, version in kept.others.items() if cell in self._keys]
        if others and resume:
            raise UserError(
                f"--resume: the runs in {self._kept} were made by another version ({others[0]}); "
                "leave --resume out to make all of them again"
            )
        return kept

    def begin(self, kept: KeptRuns | None, tell: Callable[[str], None]) -> None:
        """Begin: with the runs that need not be made again, of a finished sweep and of an interrupted one; None: with
        none. `tell` gets a line about what is damaged."""
        if kept is None:
            remove(self._kept)
        aside = put_aside(self._kept) if kept is not None and kept.problem else None
        self._store = self._cleanup.enter_context(RunStore(self._kept, self._revision))
        if kept is None:
            return
        finished = _finished(self.folder.folder, self._revision, tell)
        self._store.add_json(finished | kept.rows if aside else finished)
        rows = {cell: row for cell, row in (finished | kept.rows).items() if cell in self._keys}
        self._done = {cell: self._told(json.loads(row)) for cell, row in rows.items()}
        if aside:
            tell(f"{self._kept}: {kept.problem}; {len(kept.rows)} are used, the file is now {aside}")
            tell(f"{self.experiment.name}: {len(self.missing())} runs are made")

    def missing(self) -> list[Planned]:
        """The runs that the grid asks for by now, and that are not made."""
        asked = self.rule.of_grid(self._planned, self._done)
        return [each for each in self._planned if each.key in asked and each.key not in self._done]

    def add(self, run: Planned, outcome: Outcome) -> None:
        """Keep a run."""
        row = results.row(outcome) | run.columns()
        self._store.add(run.key, row)
        self._done[run.key] = self._told(row)

    def _told(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in self._columns}

    def frame(self) -> pl.DataFrame:
        """The table of all runs that the grid asks for, in its order; with how many seeds each point has, and why."""
        kept = read(self._kept, self._revision)
        asked = self.rule.of_grid(self._planned, self._done)
        if missing := asked.keys() - kept.rows.keys():
            raise UserError(f"{self._kept}: lacks {len(missing)} runs ({kept.problem}); make them with --resume")
        rows = [
            json.loads(kept.rows[cell]) | {"seeds": seeds.number, "seeds_because": seeds.because}
            for cell, seeds in asked.items()
        ]
        return pl.DataFrame(rows, infer_schema_length=None)

    def end(self) -> None:
        """The result is written: nothing need be kept beside it."""
        self._cleanup.close()
        remove(self._kept)


def _finished(folder: Path, revision: str, tell: Callable[[str], None]) -> dict[str, str]:
    """The rows of a sweep that was finished, as JSON by cell, if this version made it, and if they are as they were
    written."""
    made = read_manifest(folder / MANIFEST)
    if made.get("git_revision") != revision:
        return {}
    try:
        if wrong := damaged(folder, made):
            raise ValueError("; ".join(wrong))
        frame = results.read(folder / "runs.parquet")
        return {row["cell"]: json.dumps(row) for row in frame.iter_rows(named=True)}
    except (OSError, ValueError, KeyError, UserError) as error:
        tell(f"{folder}: {clean(str(error))}: all of its runs are made again")
        return {}
