# SPDX-License-Identifier: GPL-2.0-or-later
"""A folder of results read back, whichever command made it, in whichever version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from experiments.runs.folder import MANIFEST, damaged
from experiments.runs.frame import read
from proto_v3.errors import UserError
from proto_v3.text import clean

SUMMARIES = {"effects": "what `run` computed", "validate": "published figures", "agree": "medians under both clocks"}
"""Tables beside the runs, each with what it has."""
PLACE = ("base", "settings", "scenario", "clock", "protocol")
"""Columns that say which runs are repeats of each other. Of a table, those that it has."""
OUTCOME = ("outcome", "reason", "note", "digest")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a folder has: its manifest, its runs if they are kept, and other tables by name."""

    folder: Path
    manifest: Mapping[str, Any]
    runs: pl.DataFrame | None
    summaries: Mapping[str, pl.DataFrame]


def read_folder(folder: Path) -> Kept:
    """Read it. UserError, in one line, if it is no folder of results or if a file in it is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name one that a command wrote its results into")
    file = folder / MANIFEST
    if not file.is_file():
        inside = sorted(clean(path.parent.name) for path in folder.glob(f"*/{MANIFEST}"))
        hint = f"; there are results in {', '.join(inside[:10])} inside it" if inside else ""
        raise UserError(f"{folder}: is no folder of results: it has no {MANIFEST}{hint}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {clean(str(error))}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{file}: is no manifest: it must be an object with keys")
    if wrong := [each for each in damaged(folder, manifest) if ".parquet" in each or ".csv" in each]:
        raise UserError(f"{folder}: {'; '.join(wrong)}")
    runs = _table(folder, "runs")
    summaries = {name: table for name in SUMMARIES if (table := _table(folder, name)) is not None}
    if runs is None and not summaries:
        raise UserError(
            f"{folder}: has neither runs.parquet, runs.csv nor validate.parquet: there is nothing to compare"
        )
    return Kept(folder, manifest, None if runs is None else _checked(runs, folder), summaries)


def _table(folder: Path, name: str) -> pl.DataFrame | None:
    """NAME.parquet or NAME.csv; None if there is neither."""
    if (parquet := folder / f"{name}.parquet").is_file():
        return read(parquet)
    if not (csv := folder / f"{name}.csv").is_file():
        return None
    try:
        return pl.read_csv(csv, infer_schema_length=None)
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UserError(f"{csv}: cannot be read as CSV: {clean(str(error))}") from error


def _checked(runs: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """The runs with texts for lists; nulls in texts are empty, as in CSV."""
    if missing := [name for name in ("protocol", "seed", "outcome") if name not in runs.columns]:
        raise UserError(f"{folder}: its table of runs has no column {', '.join(missing)}")
    if not runs.schema["seed"].is_integer():
        raise UserError(f"{folder}: its table of runs has a column seed that is no whole number")
    lists = [name for name, kind in runs.schema.items() if isinstance(kind, pl.List)]
    runs = runs.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(" ") for name in lists)
    texts = [name for name in (*PLACE, *OUTCOME) if name in runs.columns]
    return runs.with_columns(pl.col(texts).cast(pl.String).fill_null(""))
