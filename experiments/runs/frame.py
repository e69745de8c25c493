"""Reading a table of runs: the completed ones, and plain numbers out of Polars' aggregates."""

from __future__ import annotations

import polars as pl

from experiments.runs.table import PATH_COLUMNS
from proto_v3.timeline import Resource
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.units import NS_PER_MS

COMPLETED = pl.col("outcome") == OutcomeKind.COMPLETED.value


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
