"""The critical path through one run's downtime, as tables."""

from __future__ import annotations

import polars as pl

from proto_v3.timeline import Mark, Resource, Timeline
from sim.scenario.units import NS_PER_MS

LEAST_DRAWN_MS = 0.5
"""A shorter stretch of a critical path is not drawn."""


def steps(timeline: Timeline) -> pl.DataFrame:
    """The critical path through the downtime of one run: one row a step, in the order of time.

    Columns: from_ms (since the order to stop the vCPUs), takes_ms, resource, what, track. The steps tile the downtime:
    their times add up to it.
    """
    begin = timeline.marks[Mark.STOP_ORDERED]
    return pl.DataFrame(
        [
            {
                "from_ms": (step.start_ns - begin) / NS_PER_MS,
                "takes_ms": (step.end_ns - step.start_ns) / NS_PER_MS,
                "resource": step.resource.name,
                "what": step.what,
                "track": step.track,
            }
            for step in timeline.critical_path()
        ]
    )


def stretches(timeline: Timeline) -> pl.DataFrame:
    """As `steps`, with consecutive steps on the same track and resource joined into one row.

    Columns: from_ms, takes_ms, resource, what (the different ones, separated by commas), track, steps (how many were
    joined).
    """
    kind = pl.when(pl.col("resource") == Resource.COPY.name).then(pl.lit("")).otherwise(pl.col("what"))
    return (
        steps(timeline)
        .with_columns(at=pl.struct("resource", "track", kind).rle_id())
        .group_by("at", maintain_order=True)
        .agg(
            pl.col("from_ms").first().round(2),
            pl.col("takes_ms").sum().round(2),
            pl.col("resource").first(),
            pl.col("what").unique(maintain_order=True).str.join(", "),
            pl.col("track").first(),
            pl.len().alias("steps"),
        )
        .drop("at")
    )
