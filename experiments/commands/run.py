# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 run`: make the missing runs of experiments; then write answer, figures and manifest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.options import tell_outside
from experiments.draw.canvas import own_settings
from experiments.report import tables
from experiments.report.answers import QUICK, told_as_quick
from experiments.report.tables import Output, say
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.cluster import on_cluster
from experiments.runs.folder import MANIFEST, OUT, ResultFolder, damaged, read_manifest
from experiments.runs.plan import Plan
from experiments.runs.pool import in_processes
from experiments.runs.progress import RunsProgress
from experiments.runs.resume import KeptRuns, RunStore, put_aside, read, remove
from experiments.study.effects import outcome_counts
from experiments.study.experiment import NAMES, Answer, Experiment, Planned, find
from proto_v3.errors import UserError
from proto_v3.text import clean
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
    settings: Sequence[str],
    as_json: bool = False,
    quiet: bool,
    out: str | None,
    force: bool,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    chosen = [find(name) for name in (NAMES if "all" in names else dict.fromkeys(names))]
    if out == "":
        raise UserError("--out '': must be the name of a folder")
    root = Path(out) if out else OUT / ("quick" if quick else "run")
    planned = [list({each.key: each for each in experiment.planned(quick, settings)}.values()) for experiment in chosen]
    bases = dict.fromkeys(each.point.base for runs in planned for each in runs)
    tell_outside(*(load(base, settings) for base in bases))
    console, stderr, status, revision = tables.console(), Console(stderr=True), 0, manifest.git_revision()
    with ExitStack() as stack:
        sweeps = []
        for experiment, runs in zip(chosen, planned, strict=True):
            plan = plan_of(experiment, runs, quick, settings)
            folder = stack.enter_context(ResultFolder(root / experiment.name, plan, force=force))
            sweeps.append(_Sweep(experiment, runs, folder, jobs, scheduler, revision))
        kept = [sweep.check(resume, force) for sweep in sweeps]
        progress = stack.enter_context(RunsProgress(sum(map(len, planned)), quiet=quiet))
        output, told = Output(as_json, quiet), []
        summary = tables.plain_table(["question", "runs", "broken", "verdict", "where"])
        for sweep, found in zip(sweeps, kept, strict=True):
            try:
                frame = sweep.rows(sweep.done(found, stderr) if resume else {}, progress)
            except KeyboardInterrupt:
                progress.stop()
                say(stderr, f"interrupted: what was done is kept in {root}; go on with --resume")
                return INTERRUPTED
            answer, figures = write(sweep.experiment, frame, sweep.folder, settings, output)
            remove(sweep.kept)
            for name in figures or ():
                output.say(f"Figure: {sweep.folder.folder / name}.png (and .svg)")
            if sweep.folder.why_there:
                output.say(f"The result is in {sweep.folder.folder}{sweep.folder.why_there}", always=True)
            broken = frame.filter(pl.col("digest") == "").height
            told.append(_told(sweep, frame, answer, broken))
            counts = (str(frame.height), str(broken))
            tables.add_row(summary, sweep.experiment.name, *counts, _verdicts(answer), str(sweep.folder.folder))
            status = max(status, int(broken > 0 or figures is None))
    if as_json:
        output.document({"command": "run", "quick": quick, "settings": list(settings), "questions": told})
        return status
    how = ["quick: coarse grids, few repeats, wide intervals"] if quick else []
    how += [shlex.join(_options(settings))] if settings else []
    tables.print_table(console, "; ".join(["What was asked", *how]), summary)
    return status


def plan_of(experiment: Experiment, runs: Sequence[Planned], quick: bool, settings: Sequence[str] = ()) -> Plan:
    """What the command makes. It names the command that makes this experiment alone, even if others are run with it."""
    return Plan(
        command=["proto-v3", "run", experiment.name, *(["--quick"] if quick else []), *_options(settings)],
        of=[experiment.name],
        runs=len(runs),
        quick=quick,
        writes=("runs", "effects", "answer"),
    )


def _options(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@dataclass(frozen=True, slots=True)
class _Sweep:
    experiment: Experiment
    planned: Sequence[Planned]
    folder: ResultFolder
    jobs: int | None
    scheduler: str | None
    revision: str
    """Of the code that runs."""

    @property
    def kept(self) -> Path:
        """The file of the finished runs."""
        return self.folder.folder / KEPT

    @property
    def keys(self) -> set[str]:
        """Of all planned runs."""
        return {each.key for each in self.planned}

    def check(self, resume: bool, force: bool) -> KeptRuns:
        """The kept runs. UserError if some would be lost: to be called before the sweeps that come first are run."""
        kept = read(self.kept, self.revision)
        more = (kept.rows.keys() | kept.others.keys()) - self.keys
        if more and not force:
            raise UserError(
                f"{self.kept}: keeps {len(more)} runs of an interrupted sweep that this command does not make; "
                "--force removes them, --out names another folder"
            )
        if (lost := kept.rows.keys() & self.keys) and not resume and not force:
            raise UserError(
                f"{self.kept}: keeps {len(lost)} runs of an interrupted sweep; "
                "--resume goes on with them, --force makes all of them again"
            )
        others = [version for cell, version in kept.others.items() if cell in self.keys]
        if others and resume:
            raise UserError(
                f"--resume: the runs in {self.kept} were made by another version ({others[0]}); "
                "leave --resume out to make all of them again"
            )
        return kept

    def done(self, kept: KeptRuns, stderr: Console) -> dict[str, dict[str, Any]]:
        """The rows that need not be made again, of a finished sweep and of an interrupted one. Damage is told."""
        if kept.problem:
            aside = put_aside(self.kept)
            with RunStore(self.kept, self.revision) as store:
                store.add_json(kept.rows)
            say(stderr, f"{self.kept}: {kept.problem}; {len(kept.rows)} are used, the file is now {aside}")
        rows = _finished(self.folder.folder, self.revision, stderr)
        rows |= {cell: json.loads(row) for cell, row in kept.rows.items()}
        found = {cell: row for cell, row in rows.items() if cell in self.keys}
        if kept.problem:
            say(stderr, f"{self.experiment.name}: {len(self.planned) - len(found)} runs are made")
        return found

    def rows(self, done: dict[str, dict[str, Any]], progress: RunsProgress) -> pl.DataFrame:
        """All rows, in the order of the grid; those of `done` are not made again."""
        if not done:
            remove(self.kept)
        with RunStore(self.kept, self.revision) as store:
            missing = [each for each in self.planned if each.key not in done]
            cells = [each.cell for each in missing]
            progress.begin(self.experiment.name, len(self.planned), len(done))
            made = on_cluster(cells, self.scheduler) if self.scheduler else in_processes(cells, self.jobs)
            for at, outcome in made:
                row = results.row(outcome) | missing[at].columns()
                store.add(missing[at].key, row)
                done[missing[at].key] = row
                progress.advance()
        return pl.DataFrame([done[each.key] for each in self.planned], infer_schema_length=None)


def _finished(folder: Path, revision: str, stderr: Console) -> dict[str, dict[str, Any]]:
    """The rows of a sweep that was finished, if this version made it, and if they are as they were written."""
    made = read_manifest(folder / MANIFEST)
    if made.get("git_revision") != revision:
        return {}
    try:
        if wrong := damaged(folder, made):
            raise ValueError("; ".join(wrong))
        frame = results.read(folder / "runs.parquet")
        return {row["cell"]: row for row in frame.iter_rows(named=True)}
    except (OSError, ValueError, KeyError, UserError) as error:
        say(stderr, f"{folder}: {clean(str(error))}: all of its runs are made again")
        return {}


def write(
    experiment: Experiment,
    frame: pl.DataFrame,
    folder: ResultFolder,
    settings: Sequence[str] = (),
    output: Output = Output(quiet=True),  # noqa: B008 it cannot be changed
) -> tuple[Answer, list[str] | None]:
    """Write tables and manifest, print the answer, draw the figures, write the answer.

    `settings` are those of --set. Returns the answer, and the names of the figures; None if they cannot be drawn.
    """
    what = {
        "experiment": experiment.name,
        "question": experiment.question,
        "quick": folder.plan.quick,
        "settings": list(settings),
        "bases": {base: load(base).model_dump(mode="json") for base in frame["base"].unique(maintain_order=True)},
    }
    folder.write_table(frame, "runs", "parquet")
    folder.write_manifest(manifest.of_sweep(what, frame, folder.plan.command))
    answer = _answer(experiment, frame, settings)
    folder.write_table(answer.table, "effects", "parquet")
    if not output.as_json and not output.quiet:
        _print(tables.console(), experiment, answer, frame, folder)
    files = output.drawn(lambda: _draw(experiment, frame, folder))
    figures = None if files is None else list(dict.fromkeys(Path(name).stem for name in files))
    as_json = {
        "experiment": experiment.name,
        "question": experiment.question,
        "quick": folder.plan.quick,
        "answer": answer.answer,
        "limit": answer.limit,
        "details": list(answer.details),
        "findings": [asdict(finding) for finding in answer.findings],
        "figures": figures or [],  # the most important one first
    }
    folder.write_json(as_json, "answer")
    folder.commit()
    return answer, figures


def _answer(experiment: Experiment, frame: pl.DataFrame, settings: Sequence[str]) -> Answer:
    """The answer; it says with which settings, and is no answer where these leave nothing to compare."""
    if not settings:
        return experiment.answer(frame)
    made_with = shlex.join(_options(settings))
    try:
        answer = experiment.answer(frame)
    except Exception as error:  # a question reckons with runs that its own grid gives
        why = f"{outcome_counts(frame)}; {type(error).__name__}: {clean(str(error))}"
        raise UserError(f"{made_with}: {experiment.name} cannot be answered from such runs: {why}") from error
    changed = f"All runs were made with {made_with}: this is not the question as it was asked."
    return replace(answer, limit=f"{changed} {answer.limit}")


def _draw(experiment: Experiment, frame: pl.DataFrame, folder: ResultFolder) -> list[Path]:
    with own_settings():
        figures = experiment.figures(frame, folder.plan.line)
    return [path for name, figure in figures.items() for path in folder.write_figure(figure, name)]


def _told(sweep: _Sweep, frame: pl.DataFrame, answer: Answer, broken: int) -> dict[str, Any]:
    """For JSON: a question and its answer."""
    return {
        "experiment": sweep.experiment.name,
        "question": sweep.experiment.question,
        "runs": frame.height,
        "broken": broken,
        "outcomes": dict(frame["outcome"].value_counts(sort=True).iter_rows()),
        "answer": answer.answer,
        "limit": answer.limit,
        "details": list(answer.details),
        "findings": [asdict(finding) for finding in answer.findings],
        "effects": answer.table.fill_nan(None).to_dicts(),
        "folder": str(sweep.folder.folder),
    }


def _verdicts(answer: Answer) -> str:
    """The verdict on each claim that a question is about: `C1 supported, C4 under conditions`."""
    return ", ".join(f"{finding.claim} {finding.verdict}" for finding in answer.findings) or "no claim"


def _print(
    console: Console,
    experiment: Experiment,
    answer: Answer,
    frame: pl.DataFrame,
    folder: ResultFolder,
) -> None:
    say(console, f"\n{experiment.name}: {experiment.question}")
    say(console, f"{frame.height} runs: {outcome_counts(frame)}")
    if folder.plan.quick:
        say(console, QUICK)
    for sentence in (answer.answer, f"Limit: {answer.limit}", *answer.details):
        say(console, f"- {sentence}")
    for finding in answer.findings:
        verdict = told_as_quick(finding.verdict, folder.plan.quick)
        say(console, f"- {finding.claim} {verdict}: {finding.why}")
    broken = frame.filter(pl.col("digest") == "")
    for row in broken.head(3).iter_rows(named=True):
        say(console, f"a run broke (cell {row['cell']}): {row['reason'].strip().splitlines()[-1]}")
