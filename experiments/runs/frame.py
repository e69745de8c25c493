"""A table of runs, read: which runs were completed, and plain numbers out of Polars' aggregates."""

from __future__ import annotations

import polars as pl

from experiments.runs.table import PATH_COLUMNS
from proto_v3.timeline import Resource
from proto_v3.vmm.migration import OutcomeKind

COMPLETED = pl.col("outcome") == OutcomeKind.COMPLETED.value
NS_PER_MS = 1e6


def protocols(frame: pl.DataFrame) -> list[str]:
    """In the order in which they were asked for."""
    return list(frame["protocol"].unique(maintain_order=True))


def completed_runs(frame: pl.DataFrame) -> pl.DataFrame:
    """The runs that were completed, protocol by protocol in the order of the whole table."""
    order = pl.Enum(protocols(frame))
    return frame.filter(COMPLETED).sort(pl.col("protocol").cast(order), maintain_order=True)


def path_shares(completed: pl.DataFrame, protocol: str) -> dict[Resource, float]:
    """Share of each resource in the downtime's critical path, over all of a protocol's runs."""
    runs = completed.filter(pl.col("protocol") == protocol)
    whole = number(runs["downtime_ns"].sum())
    return {
        resource: number(runs[column].sum()) / whole for resource, column in zip(Resource, PATH_COLUMNS, strict=True)
    }


def number(value: object) -> float:
    """What Polars gives for an aggregate, as the number that it is: its type says that it might be anything."""
    assert isinstance(value, (int, float))
    return float(value)


def ms(value: object) -> float:
    """Nanoseconds, as Polars gives them, in milliseconds."""
    return number(value) / NS_PER_MS
