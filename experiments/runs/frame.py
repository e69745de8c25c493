# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of runs: made from outcomes, one row a run, units in the column names; and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl

from proto_v3.errors import UserError
from proto_v3.text import clean
from proto_v3.timeline import PHASES, Resource
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.report import Counters
from sim.scenario.units import NS_PER_MS

COMPLETED = pl.col("outcome") == OutcomeKind.COMPLETED.value
PHASE_COLUMNS = [f"phase_{name}_ns" for name in PHASES]
PATH_COLUMNS = [f"path_{resource.name.lower()}_ns" for resource in Resource]
PATH = [*(resource.name.lower() for resource in Resource), "unexplained"]
_SPREAD: dict[str, Callable[[Any], dict[str, Any]]] = {
    "kind": lambda kind: {"outcome": kind.value},
    "phases_ns": lambda phases: {f"phase_{name}_ns": phases.get(name) for name in PHASES},
    "critical_path_ns": lambda path: {f"path_{name}_ns": path.get(name) for name in PATH},
    "counters": Counters.columns,
    "stages": lambda stages: {f"stage_{each.name}_{each.index}_ns": each.end_ns - each.start_ns for each in stages},
}
"""Fields of Outcome that are not one column of the same name."""


def row(outcome: Outcome) -> dict[str, Any]:
    """One run as a flat row; times are whole nanoseconds, null where the migration was not completed.

    The columns are the fields of Outcome and of its Counters, in their order.
    """
    flat: dict[str, Any] = {}
    for each in fields(outcome):
        value = getattr(outcome, each.name)
        flat |= _SPREAD[each.name](value) if each.name in _SPREAD else {each.name: value}
    return flat


def table(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """The runs as a table."""
    return pl.DataFrame([row(outcome) for outcome in outcomes], infer_schema_length=None)


def read(file: Path) -> pl.DataFrame:
    """A table that was written as Parquet. UserError if it cannot be read; FileNotFoundError if it is not there."""
    try:
        return pl.read_parquet(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {clean(str(error))}") from error


def protocols(frame: pl.DataFrame) -> list[str]:
    """The protocols, in the order of the table."""
    return list(frame["protocol"].unique(maintain_order=True))


def completed_runs(frame: pl.DataFrame) -> pl.DataFrame:
    """The runs that were completed, protocol by protocol in the order of the whole table."""
    order = pl.Enum(protocols(frame))
    return frame.filter(COMPLETED).sort(pl.col("protocol").cast(order), maintain_order=True)


def completed_text(runs: pl.DataFrame) -> str:
    """How many runs were completed: `27 of 30`."""
    return f"{runs.filter(COMPLETED).height} of {runs.height}"


def path_shares(completed: pl.DataFrame, protocol: str) -> dict[Resource, float]:
    """The share of each resource in the critical path of the downtime, over all runs of a protocol."""
    runs = completed.filter(pl.col("protocol") == protocol)
    whole = number(runs["downtime_ns"].sum())
    return {
        resource: number(runs[column].sum()) / whole for resource, column in zip(Resource, PATH_COLUMNS, strict=True)
    }


def number(value: object) -> float:
    """An aggregate of Polars as a float; the type that Polars declares could be anything."""
    assert isinstance(value, (int, float))
    return float(value)


def ms(value: object) -> float:
    """An aggregate of Polars in nanoseconds, as milliseconds."""
    return number(value) / NS_PER_MS
