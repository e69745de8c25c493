"""The critical path through one run's downtime, as tables."""

from __future__ import annotations

import polars as pl

from proto_v3.timeline import Mark, Resource, Timeline

TOLD_MS = 0.5
"""A stretch of a critical path that is shorter is not drawn."""


def steps(timeline: Timeline) -> pl.DataFrame:
    """The critical path through a downtime, one row a step, in order of time.

    Columns: from_ms (since the order to stop the vCPUs), takes_ms, resource, what, track. The steps tile the downtime.
    """
    begin = timeline.marks[Mark.STOP_ORDERED]
    return pl.DataFrame(
        [
            {
                "from_ms": (step.start_ns - begin) / 1e6,
                "takes_ms": (step.end_ns - step.start_ns) / 1e6,
                "resource": step.resource.name,
                "what": step.what,
                "track": step.track,
            }
            for step in timeline.critical_path()
        ]
    )


def stretches(timeline: Timeline) -> pl.DataFrame:
    """As `steps`, those that follow each other on one track and resource put together; `steps` counts them."""
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
