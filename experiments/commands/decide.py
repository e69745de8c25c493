# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 decide`: what to change first, and what it brings, over all plausible machines of a kind."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.options import out_folder, tell_outside
from experiments.decision.decision import SAMPLE_SEED, Decision, Study, decide, indices_table, rows_table, study
from experiments.report.decision import conclusion, sections
from experiments.report.tables import Output
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan
from experiments.runs.pool import in_processes
from experiments.runs.progress import RunsProgress
from experiments.runs.resume import RunStore, put_aside, read, remove
from proto_v3.errors import UserError
from sim.scenario.file import load

WRITES = ("runs", "samples", "decide", "indices")
"""Its files, without their suffixes."""
KEPT = "runs.sqlite"
"""The finished runs, beside the results until all are done."""


def run_decide(
    scenario: str,
    samples: int,
    changes: Sequence[str],
    out: str | None,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
    *,
    resume: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded = load(scenario, settings)
    tell_outside(loaded)
    planned = study(loaded, samples, changes or None)
    plan = Plan(command, [scenario], len(planned.cells), writes=WRITES)
    output = Output(as_json, quiet)
    with ResultFolder(out_folder(out, f"decide-{loaded.name}"), plan, force=force) as folder:
        kept = folder.folder / KEPT
        try:
            runs = _runs(planned, kept, jobs, resume=resume, quiet=quiet, force=force)
        except KeyboardInterrupt:
            output.say(f"interrupted: what was done is kept in {kept}; go on with --resume", always=True)
            return INTERRUPTED
        decision = decide(planned, runs)
        how_made = manifest.of_scenario(loaded, scenario, command, runs, len(planned.cells))
        how_made |= {"samples": len(planned.samples), "sample_seed": SAMPLE_SEED}
        try:
            folder.write_table(runs, "runs", "parquet")
            folder.write_table(_values(planned), "samples", "parquet")
            folder.write_table(rows_table(decision), "decide", "parquet")
            folder.write_table(indices_table(decision), "indices", "parquet")
            folder.write_manifest(how_made)
        finally:  # the results are printed if the disk is full, too
            output.results(
                {"command": "decide", "scenario": loaded.name, "folder": str(folder.folder)},
                f"{loaded.name}: {loaded.description}",
                list(conclusion(decision)),
                list(sections(decision)),
            )
        drawn = output.drawn(lambda: _draw(folder, decision, command))
        folder.commit()
        remove(kept)
    output.files(folder.folder, [f"{name}.parquet" for name in WRITES], drawn, folder.why_there)
    return 1 if drawn is None else 0


def _runs(planned: Study, kept: Path, jobs: int | None, *, resume: bool, quiet: bool, force: bool) -> pl.DataFrame:
    """The table of all runs; those that are kept of an interrupted command are not made again if it is to go on."""
    revision = manifest.git_revision()
    found = read(kept, revision)
    if found.problem:
        put_aside(kept)
    elif found.rows and not resume and not force:
        raise UserError(
            f"{kept}: keeps {len(found.rows)} runs of an interrupted command; --resume goes on with them, --force "
            "makes all of them again"
        )
    if not resume:
        remove(kept)
    rows = {key: json.loads(row) for key, row in found.rows.items()} if resume else {}
    keys = _keys(planned)
    missing = [at for at, key in enumerate(keys) if key not in rows]
    with RunStore(kept, revision) as store, RunsProgress(len(keys), quiet=quiet) as progress:
        progress.begin("runs", len(keys), len(keys) - len(missing))
        for at, outcome in in_processes([planned.cells[at] for at in missing], jobs):
            key = keys[missing[at]]
            rows[key] = {name: value for name, value in results.row(outcome).items() if not name.startswith("stage_")}
            store.add(key, rows[key])
            progress.advance()
    return pl.DataFrame([rows[key] for key in keys], infer_schema_length=None)


def _keys(planned: Study) -> list[str]:
    """What each run is kept as: of its sample's scenario, its protocol and its seed."""
    digests = {
        id(each.scenario): hashlib.sha256(each.scenario.model_dump_json().encode()).hexdigest()[:16]
        for each in planned.cells
    }
    return [f"{digests[id(each.scenario)]} {each.protocol.name} {each.seed}" for each in planned.cells]


def _values(planned: Study) -> pl.DataFrame:
    """What each sample has of the keys with a range; `seed` is that of its runs."""
    rows: list[dict[str, Any]] = [
        {"seed": seed, **{key: str(value) if isinstance(value, list) else value for key, value in each.values.items()}}
        for seed, each in enumerate(planned.samples, planned.cells[0].seed)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _draw(folder: ResultFolder, decision: Decision, command: Sequence[str]) -> list[Path]:
    from experiments.draw.decision import draw_decision

    return folder.write_figure(draw_decision(decision, shlex.join(command)), "decide")
