# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 replay`: one run of a results folder made again, and compared with its row in the table of runs.

A folder of `compare` has one scenario, in its manifest; one of `decide` has the scenario that its machines are samples
of, each for the runs of one seed. A folder of `run` has several, and each run has settings and a
cell that names it. A run that raised an error raises it again, where it can be seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from experiments.commands.trace import output_files, write
from experiments.decision.machines import machine
from experiments.report import tables
from experiments.report.tables import say
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import MANIFEST, OUT, damaged, text_of
from experiments.trace.traced_run import TRACE_SUFFIX, traced_run
from proto_v3.errors import UserError
from proto_v3.text import clean
from sim.outcome import Outcome
from sim.scenario.file import from_dump
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS, NS_PER_S, did_you_mean

HOW = "must be FOLDER:PROTOCOL:SEED or FOLDER:CELL, as in results/mlx5-2vf:v2:1"
CAN_BE = "what can be made again are runs in virtual time, by `compare`, `decide` or `run`"
FOLDERS = (OUT, OUT / "run", OUT / "quick", Path("results"))
"""Where the name of a folder is looked up, in this order."""
MOST_OF_A_TEXT = 20_000
"""Characters of a text in a table."""
MOST_CHARS = 200
"""Of a trace's name."""
COLUMNS = {"protocol": pl.String, "seed": pl.Int64, "digest": pl.String, "outcome": pl.String}
CELL_COLUMNS = {"cell": pl.String, "base": pl.String, "settings": pl.List(pl.String)}
"""Of the runs of `proto-v3 run`."""
EXAMPLES = 5
"""Runs that an error message lists if no run, or more than one, fits the name."""


@dataclass(frozen=True, slots=True)
class Results:
    """A folder's runs, and how they were made."""

    folder: Path
    table: pl.DataFrame
    manifest: dict[str, Any]


def run_replay(run: str, trace: str | None, spans: str | None) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    folder, which = _parsed(run)
    read = read_results(folder)
    row = _row(read, which, run)
    scenario = _scenario(read, row)
    protocol = Protocol.parse(row["protocol"], scenario)
    name = _file_name("-".join([folder.resolve().name, *([row["cell"]] if len(which) == 1 else which)]))
    trace_file, spans_file = output_files(trace, OUT / f"{name}{TRACE_SUFFIX}", spans)
    again = traced_run(scenario, protocol, row["seed"])
    console = tables.console()
    same = _print(console, read, row, again.outcome)
    write(console, again, trace_file, spans_file)
    return 0 if same else 1


def _file_name(text: str) -> str:
    """The text as the name of a file in its folder: a cell or a protocol comes out of a table, and may be a path."""
    return re.sub(r"[^\w.-]", "_", text)[:MOST_CHARS]


# --- which run -------------------------------------------------------------------------------------------------------


def _parsed(run: str) -> tuple[Path, list[str]]:
    """The folder, and either [cell] or [protocol, seed]."""
    parts = run.split(":")
    tried = [":".join(parts[:-count]) for count in (1, 2) if len(parts) > count]
    for count, named in enumerate(tried, 1):  # the name of a folder can have a colon in it
        for folder in (Path(named), *(each / named for each in FOLDERS)):
            if named and folder.is_dir():
                return folder, parts[-count:]
    if not tried or "" in tried:
        raise UserError(f"{run!r}: {HOW}")
    known = sorted({clean(path.parent.name) for each in FOLDERS for path in each.glob(f"*/{MANIFEST}")})
    places = f"{', '.join(f'{each}/' for each in FOLDERS[:-1])} or {FOLDERS[-1]}/"
    hint = did_you_mean(tried[-1], known) or (f"; there are {', '.join(known)}" if known else "")
    raise UserError(f"{run}: {tried[-1]} is no folder, nor one in {places}{hint}")


def read_results(folder: Path) -> Results:
    """Read a folder of results. UserError if it has no runs that can be made again."""
    manifest = _manifest(folder)
    file = folder / "runs.parquet"
    if not file.exists():
        csv = "; there is runs.csv: make it again with --format parquet" if (folder / "runs.csv").exists() else ""
        raise UserError(f"{file}: there is no such file{csv}")
    table = results.read(file)
    swept = "bases" in manifest
    needed = COLUMNS | (CELL_COLUMNS if swept else {})
    if missing := sorted(needed.keys() - set(table.columns)):
        raise UserError(f"{file}: has no column {', '.join(missing)}")
    if wrong := sorted(name for name, kind in needed.items() if table.schema[name] != kind):
        raise UserError(f"{file}: column {wrong[0]} is of type {table.schema[wrong[0]]}; must be {needed[wrong[0]]}")
    if (table["seed"] < 0).any():
        raise UserError(f"{file}: column seed has negative numbers; a seed is a whole number from 0")
    return Results(folder, table.drop_nulls(["protocol", "seed", *(["cell", "base"] if swept else [])]), manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(text_of(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; a folder of results has one") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON: {clean(str(error))}") from error
    if isinstance(manifest, dict) and "live" in manifest:
        raise UserError(f"{folder}: holds live runs, and no live run can be repeated exactly; {CAN_BE}")
    if not isinstance(manifest, dict) or not any(isinstance(manifest.get(key), dict) for key in ("scenario", "bases")):
        raise UserError(f"{file}: has no scenario that its runs could be made from; {CAN_BE}")
    return manifest


def _row(read: Results, which: Sequence[str], run: str) -> dict[str, Any]:
    """The row of the one run that `which` names. UserError if there is none, or more than one."""
    cells = "cell" in read.table.columns
    if len(which) == 1:
        if not cells:
            raise UserError(f"{run}: the runs in {read.folder} have no cells: name one by FOLDER:PROTOCOL:SEED")
        found = read.table.filter(pl.col("cell").str.starts_with(which[0]))
    else:
        protocol, seed = which
        if not re.fullmatch(r"[0-9]{1,18}", seed):
            raise UserError(f"{run}: the seed {seed!r} must be a whole number; {HOW}")
        found = read.table.filter((pl.col("protocol") == protocol) & (pl.col("seed") == int(seed)))
    if found.height == 1:
        return {name: _cleaned(value) for name, value in found.row(0, named=True).items()}
    names = [_named(row) for row in (found if found.height else read.table).head(EXAMPLES).iter_rows(named=True)]
    few = ", ".join(names) + (", ..." if (found.height or read.table.height) > EXAMPLES else "")
    if found.height:
        raise UserError(f"{run}: {found.height} runs in {read.folder} fit this name: {few}; name one by its cell")
    raise UserError(f"{run}: no run in {read.folder} has this name; there are {few}")


def _named(row: dict[str, Any]) -> str:
    run = f"{row['protocol']}:{row['seed']}"
    return clean(f"{row['cell']} ({run})" if "cell" in row else run)


def _cleaned(value: Any) -> Any:
    """A value of a table; its texts are somebody else's."""
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return clean(value, MOST_OF_A_TEXT) if isinstance(value, str) else value


def _scenario(read: Results, row: dict[str, Any]) -> Scenario:
    file = str(read.folder / "manifest.json")
    if "bases" not in read.manifest:
        own = from_dump(read.manifest["scenario"], file)
        if "sample_seed" not in read.manifest:
            return own
        return machine(own, row["seed"], screening=read.manifest.get("sample_pieces") != 1)
    if not isinstance(read.manifest["bases"].get(row["base"]), dict):
        raise UserError(f"{file}: has no base {row['base']!r}, which cell {row['cell']} builds on")
    return from_dump(read.manifest["bases"][row["base"]], f"{file}, base {row['base']}", row["settings"] or [])


# --- is it the same? -------------------------------------------------------------------------------------------------


def _print(console: Console, read: Results, row: dict[str, Any], outcome: Outcome) -> bool:
    """Print both side by side; returns whether they are the same run, to the last span."""
    again = results.row(outcome)
    settings = [f"--set {setting}" for setting in row.get("settings") or []]
    named = " ".join([row.get("base") or outcome.scenario, *settings])
    shown = tables.plain_table(["", "in the table", "made again"])
    tables.add_row(shown, "outcome", row["outcome"] or "", again["outcome"])
    for name, unit, unit_ns in (("downtime", "ms", NS_PER_MS), ("total", "s", NS_PER_S)):
        pair = (each.get(f"{name}_ns") for each in (row, again))
        tables.add_row(
            shown, f"{name}, {unit}", *("" if not isinstance(ns, int) else f"{ns / unit_ns:.3f}" for ns in pair)
        )
    tables.add_row(shown, "digest", *((each["digest"] or "")[:16] for each in (row, again)))
    tables.print_table(console, f"{named}, {row['protocol']}, seed {row['seed']}", shown)
    say(console, f"Digest in the table: {row['digest'] or 'none: the run broke'}")
    say(console, f"Digest made again:   {again['digest']}")
    same = bool(row["digest"] == again["digest"])
    if same:
        say(console, "The same run, to the last span.")
    else:
        made_by, here = clean(str(read.manifest.get("git_revision", "unknown"))), manifest.git_revision()
        say(console, f"Not the same run: the table was made by revision {made_by}, and this is {here}.")
        for wrong in damaged(read.folder, read.manifest):
            say(console, f"{read.folder}: {wrong}")
    return same
