"""`proto-v3 run`: make the missing runs of experiments; then write answer, figures and manifest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.progress import Progress, TaskID

from experiments import INTERRUPTED
from experiments.draw.canvas import own_settings
from experiments.report import tables
from experiments.report.tables import say
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.cluster import on_cluster
from experiments.runs.folder import ResultFolder
from experiments.runs.pool import in_processes, progress_bar
from experiments.runs.resume import RunStore
from experiments.study.effects import outcome_counts
from experiments.study.experiment import NAMES, Answer, Experiment, Planned, find
from proto_v3.errors import UserError
from sim.scenario.file import load

KEPT = "runs.sqlite"
"""The finished runs, beside the results until all are done."""


def run_experiments(
    names: Sequence[str],
    *,
    quick: bool,
    resume: bool,
    jobs: int | None,
    scheduler: str | None,
    out: str | None,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    chosen = [find(name) for name in (NAMES if "all" in names else dict.fromkeys(names))]
    root = Path(out) if out else Path("results/quick" if quick else "results")
    planned = [list({each.key: each for each in experiment.planned(quick)}.values()) for experiment in chosen]
    sweeps = [
        _Sweep(experiment, runs, ResultFolder(root / experiment.name), jobs, scheduler)
        for experiment, runs in zip(chosen, planned, strict=True)
    ]
    for sweep in sweeps if resume else ():
        sweep.check()
    console, status = tables.console(), 0
    with progress_bar() as progress:
        whole = progress.add_task("all", total=sum(map(len, planned)), visible=len(chosen) > 1)
        for sweep in sweeps:
            try:
                frame = sweep.rows(resume, progress, whole)
            except KeyboardInterrupt:
                progress.stop()
                say(Console(stderr=True), f"interrupted: what was done is kept in {root}; go on with --resume")
                return INTERRUPTED
            answer, figures = write(sweep.experiment, frame, sweep.folder, quick=quick)
            sweep.forget()
            _print(console, sweep.experiment, answer, frame, figures)
            status = max(status, int((frame["digest"] == "").any()))
    return status


@dataclass(frozen=True, slots=True)
class _Sweep:
    experiment: Experiment
    planned: Sequence[Planned]
    folder: ResultFolder
    jobs: int | None
    scheduler: str | None

    @property
    def kept(self) -> Path:
        """The file of the finished runs."""
        return self.folder.folder / KEPT

    def rows(self, resume: bool, progress: Progress, whole: TaskID) -> pl.DataFrame:
        """All rows, in the order of the grid; with `resume`, those that exist already are not made again."""
        if not resume:
            self.forget()
        revision = manifest.git_revision()
        with RunStore(self.kept, revision) as store:
            done = self._done(store, revision) if resume else {}
            if not store.fits:  # nothing in it is needed, or _done() would have refused it
                store.begin_anew()
            missing = [each for each in self.planned if each.key not in done]
            cells = [each.cell for each in missing]
            bar = progress.add_task(self.experiment.name, total=len(self.planned), completed=len(done))
            progress.advance(whole, len(done))
            made = on_cluster(cells, self.scheduler) if self.scheduler else in_processes(cells, self.jobs)
            for at, outcome in made:
                row = results.row(outcome) | missing[at].columns()
                store.add(missing[at].key, row)
                done[missing[at].key] = row
                progress.advance(bar)
                progress.advance(whole)
            progress.remove_task(bar)
        return pl.DataFrame([done[each.key] for each in self.planned], infer_schema_length=None)

    def check(self) -> None:
        """UserError if the kept runs cannot be used: to be called before the sweeps that come first are run."""
        if self.kept.exists():
            revision = manifest.git_revision()
            with RunStore(self.kept, revision) as store:
                self._done(store, revision)

    def _done(self, store: RunStore, revision: str) -> dict[str, dict[str, Any]]:
        keys = {each.key for each in self.planned}
        done = store.rows(keys)
        if done and not store.fits:
            raise UserError(
                f"--resume: the runs in {self.kept} were made by another version ({store.made_by}); "
                "leave --resume out to make all of them again"
            )
        return _finished(self.folder.folder, keys, revision) | done

    def forget(self) -> None:
        """Remove the kept runs."""
        self.kept.unlink(missing_ok=True)


def _finished(folder: Path, keys: set[str], revision: str) -> dict[str, dict[str, Any]]:
    """The rows of a sweep that was finished, if this version made it."""
    try:
        if json.loads((folder / "manifest.json").read_text())["git_revision"] != revision:
            return {}
        frame = pl.read_parquet(folder / "runs.parquet")
        return {row["cell"]: row for row in frame.iter_rows(named=True) if row["cell"] in keys}
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        return {}


def write(
    experiment: Experiment, frame: pl.DataFrame, folder: ResultFolder, *, quick: bool
) -> tuple[Answer, list[Path]]:
    """Write the table of runs, the answer with its table, the figures and the manifest.

    They name the command that makes this experiment alone, even if others were run with it.
    """
    command = ["proto-v3", "run", experiment.name, *(["--quick"] if quick else [])]
    what = {
        "experiment": experiment.name,
        "question": experiment.question,
        "quick": quick,
        "bases": {base: load(base).model_dump(mode="json") for base in frame["base"].unique(maintain_order=True)},
    }
    folder.write_table(frame, "runs", "parquet")
    folder.write_json(manifest.of_sweep(what, frame, command), "manifest")
    answer = experiment.answer(frame)
    folder.write_table(answer.table, "effects", "parquet")
    with own_settings():
        figures = experiment.figures(frame, shlex.join(command))
    as_json = {
        "experiment": experiment.name,
        "question": experiment.question,
        "answer": answer.answer,
        "limit": answer.limit,
        "details": list(answer.details),
        "findings": [asdict(finding) for finding in answer.findings],
        "figures": list(figures),  # the most important one first
    }
    folder.write_json(as_json, "answer")
    return answer, [path for name, figure in figures.items() for path in folder.write_figure(figure, name)]


def _print(
    console: Console, experiment: Experiment, answer: Answer, frame: pl.DataFrame, figures: Sequence[Path]
) -> None:
    say(console, f"\n{experiment.name}: {experiment.question}")
    say(console, f"{frame.height} runs: {outcome_counts(frame)}")
    for sentence in (answer.answer, f"Limit: {answer.limit}", *answer.details):
        say(console, f"- {sentence}")
    for finding in answer.findings:
        say(console, f"- {finding.claim} {finding.verdict}: {finding.why}")
    broken = frame.filter(pl.col("digest") == "")
    for row in broken.head(3).iter_rows(named=True):
        say(console, f"a run broke (cell {row['cell']}): {row['reason'].strip().splitlines()[-1]}")
    for path in figures:
        if path.suffix == ".png":
            say(console, f"Figure: {path} (and .svg)")
