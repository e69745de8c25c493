# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 run`: make the missing runs of experiments; then write answer, figures and manifest."""

from __future__ import annotations

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
from experiments.runs import manifest
from experiments.runs.cluster import on_cluster
from experiments.runs.folder import OUT, ResultFolder, save_figure
from experiments.runs.plan import HALF_WIDTH, Plan
from experiments.runs.pool import Cell, Done, in_processes, made_once
from experiments.runs.progress import RunsProgress
from experiments.study.effects import outcome_counts
from experiments.study.experiment import NAMES, Answer, Experiment, Planned, find
from experiments.study.seeds import SeedRule, seeds_text
from experiments.study.sweep import Sweep
from proto_v3.errors import UserError
from proto_v3.text import clean
from sim.scenario.file import load


def run_experiments(
    names: Sequence[str],
    *,
    quick: bool,
    resume: bool,
    half_width: float,
    jobs: int | None,
    scheduler: str | None,
    settings: Sequence[str],
    as_json: bool = False,
    quiet: bool,
    out: str | None,
    force: bool,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written.

    `half_width`: of an interval in per cent, at which a setting gets no more seeds (experiments.study.seeds).
    """
    chosen = [find(name) for name in (NAMES if "all" in names else dict.fromkeys(names))]
    if out == "":
        raise UserError("--out '': must be the name of a folder")
    root = Path(out) if out else OUT / ("quick" if quick else "run")
    planned = [experiment.planned(quick, settings) for experiment in chosen]
    bases = dict.fromkeys(each.point.base for runs in planned for each in runs)
    tell_outside(*(load(base, settings) for base in bases))
    console, stderr, status, revision = tables.console(), Console(stderr=True), 0, manifest.git_revision()
    with ExitStack() as stack:
        sweeps = []
        for experiment, runs in zip(chosen, planned, strict=True):
            rule = SeedRule(experiment.values, half_width / 100)
            plan = plan_of(experiment, runs, quick, settings, rule.half_width)
            folder = stack.enter_context(ResultFolder(root / experiment.name, plan, force=force))
            sweeps.append(stack.enter_context(Sweep(experiment, runs, rule, folder, revision)))
        kept = [sweep.check(resume, force) for sweep in sweeps]
        for sweep, found in zip(sweeps, kept, strict=True):
            sweep.begin(found if resume else None, lambda line: say(stderr, line))
        try:
            _make(sweeps, jobs, scheduler, quiet)
        except KeyboardInterrupt:
            return _interrupted(root, stderr)
        output, told = Output(as_json, quiet), []
        summary = tables.plain_table(["question", "runs", "broken", "verdict", "where"])
        frames = [sweep.frame() for sweep in sweeps]
        answers = [
            answered(sweep.experiment, frame, sweep.folder, settings, sweep.rule, output)
            for sweep, frame in zip(sweeps, frames, strict=True)
        ]
        try:
            drawn = _draw(sweeps, frames, jobs)
        except KeyboardInterrupt:
            return _interrupted(root, stderr)
        for sweep, frame, answer, files in zip(sweeps, frames, answers, drawn, strict=True):
            figures = finished(sweep.experiment, answer, files, sweep.folder, output)
            sweep.end()
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


def _make(sweeps: Sequence[Sweep], jobs: int | None, scheduler: str | None, quiet: bool) -> None:
    """Make the runs of all sweeps, batch by batch, until none asks for more."""

    def make(cells: Sequence[Cell]) -> Done:
        return on_cluster(cells, scheduler) if scheduler else in_processes(cells, jobs)

    batch = 0
    while missing := [(sweep, run) for sweep in sweeps for run in sweep.missing()]:
        batch += 1
        cells = [run.cell for _, run in missing]
        with RunsProgress(len(cells), quiet=quiet) as progress:
            progress.begin(f"batch {batch}", len(cells))
            for at, outcome in made_once(cells, make):
                sweep, run = missing[at]
                sweep.add(run, outcome)
                progress.advance()


def _interrupted(root: Path, stderr: Console) -> int:
    say(stderr, f"interrupted: what was done is kept in {root}; go on with --resume")
    return INTERRUPTED


def _draw(sweeps: Sequence[Sweep], frames: Sequence[pl.DataFrame], jobs: int | None) -> list[list[str] | Exception]:
    """The figures of each sweep; in workers that are no forks, for a fork of a process with Polars can hang."""
    drawings = [
        Drawing(sweep.experiment, frame, sweep.folder.plan.line, sweep.folder.stage)
        for sweep, frame in zip(sweeps, frames, strict=True)
    ]
    return [drawn for _, drawn in sorted(in_processes(drawings, jobs, "spawn"), key=lambda each: each[0])]


def plan_of(
    experiment: Experiment,
    runs: Sequence[Planned],
    quick: bool,
    settings: Sequence[str] = (),
    half_width: float = HALF_WIDTH,
) -> Plan:
    """What the command makes. It names the command that makes this experiment alone, even if others are run with it."""
    return Plan(
        command=[
            *("proto-v3", "run", experiment.name, *(["--quick"] if quick else [])),
            *(["--half-width", f"{100 * half_width:g}"] if half_width != HALF_WIDTH else []),
            *_options(settings),
        ],
        of=[experiment.name],
        runs=len(runs),
        half_width=half_width,
        quick=quick,
        writes=("runs", "effects", "answer"),
    )


def _options(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def answered(
    experiment: Experiment,
    frame: pl.DataFrame,
    folder: ResultFolder,
    settings: Sequence[str],
    rule: SeedRule,
    output: Output,
) -> Answer:
    """Write tables and manifest; print the answer, which a figure must not cost. `settings` are those of --set."""
    what = {
        "experiment": experiment.name,
        "question": experiment.question,
        "quick": folder.plan.quick,
        "settings": list(settings),
        **rule.told(folder.plan.runs),
        "bases": {base: load(base).model_dump(mode="json") for base in frame["base"].unique(maintain_order=True)},
    }
    folder.write_table(frame, "runs", "parquet")
    folder.write_manifest(manifest.of_sweep(what, frame, folder.plan.command))
    answer = _answer(experiment, frame, settings)
    folder.write_table(answer.table, "effects", "parquet")
    if not output.as_json and not output.quiet:
        _print(tables.console(), experiment, answer, frame, folder)
    return answer


@dataclass(frozen=True, slots=True)
class Drawing:
    """The figures of a question, to be drawn by a worker."""

    experiment: Experiment
    frame: pl.DataFrame
    line: str
    """The command that made the runs."""
    stage: Path

    def make(self) -> list[str] | Exception:
        """Write them; returns the names of the files, or why there are none."""
        try:
            with own_settings():
                figures = self.experiment.figures(self.frame, self.line)
            return [file for name, figure in figures.items() for file in save_figure(figure, self.stage, name)]
        except Exception as error:  # of matplotlib, of the user's fonts, of a full disk
            return error

    def broken(self, reason: str) -> Exception:
        """Why there are none."""
        return UserError(reason)


def finished(
    experiment: Experiment,
    answer: Answer,
    drawn: list[str] | Exception,
    folder: ResultFolder,
    output: Output,
) -> list[str] | None:
    """Write the answer, and let the result replace an earlier one. Returns the names of the figures; None if they
    cannot be drawn."""
    files = output.drawn(lambda: _files(drawn))
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
    return figures


def _files(drawn: list[str] | Exception) -> list[Path]:
    if isinstance(drawn, Exception):
        raise drawn
    return list(map(Path, drawn))


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


def _told(sweep: Sweep, frame: pl.DataFrame, answer: Answer, broken: int) -> dict[str, Any]:
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
    say(console, seeds_text(frame))
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
