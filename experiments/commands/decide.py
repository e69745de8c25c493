# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 decide`: what to change first, and what it brings, over all plausible machines of a kind."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.options import out_folder, tell_outside
from experiments.decision.bands import run_rows
from experiments.decision.decision import Decision, Study, decide, indices_table, rows_table, study
from experiments.decision.ladder import rungs
from experiments.decision.machines import SAMPLE_SEED, check_count
from experiments.report.decision import conclusion, sections
from experiments.report.tables import Output
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, in_processes, made_once
from experiments.runs.progress import RunsProgress
from experiments.runs.resume import RunStore, put_aside, read, remove
from proto_v3.errors import UserError
from sim.scenario.file import load
from sim.scenario.screening import PIECES
from sim.scenario.units import NS_PER_MS

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
    near_ms: float | None = None,
    screening: bool = True,
    resume: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written.

    `near_ms`: of all plausible machines those that have about this downtime as they are. With `screening` they run in
    larger pieces.
    """
    loaded = load(scenario, settings)
    check_count(loaded, samples, near_ms)
    tell_outside(loaded)
    rows = run_rows(rungs(loaded, changes or None))
    plan = Plan(command, [scenario], len(rows) * (samples if loaded.ranges else 1), writes=WRITES)
    output = Output(as_json, quiet)
    with ResultFolder(out_folder(out, f"decide-{loaded.name}"), plan, force=force) as folder:
        kept = folder.folder / KEPT
        try:
            with _Runs(kept, jobs, resume=resume, quiet=quiet, force=force) as made:
                planned = study(loaded, samples, changes or None, near_ms, made.downtimes_ms, screening=screening)
                runs = made.table(planned.cells)
        except KeyboardInterrupt:
            output.say(f"interrupted: what was done is kept in {kept}; go on with --resume", always=True)
            return INTERRUPTED
        decision = decide(planned, runs)
        how_made = manifest.of_scenario(loaded, scenario, command, runs, runs.height)
        how_made |= {"samples": len(planned.machines), "sample_seed": SAMPLE_SEED, "near_ms": near_ms}
        how_made["sample_pieces"] = PIECES if screening else 1
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


class _Runs:
    """Makes runs, and keeps them in a file beside the result until that is whole. Those that are kept of an interrupted
    command are not made again if it is to go on."""

    def __init__(self, kept: Path, jobs: int | None, *, resume: bool, quiet: bool, force: bool) -> None:
        self._jobs, self._quiet, revision = jobs, quiet, manifest.git_revision()
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
        self._rows = {key: json.loads(row) for key, row in found.rows.items()} if resume else {}
        self._store = RunStore(kept, revision)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__()

    def table(self, cells: Sequence[Cell]) -> pl.DataFrame:
        """The table of these runs, in their order."""
        keys = _keys(cells)
        missing = [at for at, key in enumerate(keys) if key not in self._rows]
        with RunsProgress(len(keys), quiet=self._quiet) as progress:
            progress.begin("runs", len(keys), len(keys) - len(missing))
            to_make = [cells[at] for at in missing]
            for at, outcome in made_once(to_make, lambda some: in_processes(some, self._jobs)):
                row = {name: value for name, value in results.row(outcome).items() if not name.startswith("stage_")}
                self._rows[keys[missing[at]]] = row
                self._store.add(keys[missing[at]], row)
                progress.advance()
        return pl.DataFrame([self._rows[key] for key in keys], infer_schema_length=None)

    def downtimes_ms(self, cells: Sequence[Cell]) -> list[float | None]:
        """Of each of these runs; None: it did not complete."""
        return [None if each is None else each / NS_PER_MS for each in self.table(cells)["downtime_ns"]]


def _keys(cells: Sequence[Cell]) -> list[str]:
    """What each run is kept as: of its machine, its protocol and its seed."""
    scenarios = {id(each.scenario): each.scenario for each in cells}
    digests = {at: hashlib.sha256(each.model_dump_json().encode()).hexdigest()[:16] for at, each in scenarios.items()}
    return [f"{digests[id(each.scenario)]} {each.protocol.name} {each.seed}" for each in cells]


def _values(planned: Study) -> pl.DataFrame:
    """What each sample has of the keys with a range; `seed` is that of its runs."""
    rows: list[dict[str, Any]] = [
        {"seed": seed, **{key: str(value) if isinstance(value, list) else value for key, value in each.values.items()}}
        for seed, each in planned.machines.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _draw(folder: ResultFolder, decision: Decision, command: Sequence[str]) -> list[Path]:
    from experiments.draw.decision import draw_decision

    return folder.write_figure(draw_decision(decision, shlex.join(command)), "decide")
