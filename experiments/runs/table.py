"""Results as tables: one row a run, units in the column names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from proto_v3.timeline import PHASES, Resource
from sim.outcome import Outcome

PHASE_COLUMNS = [f"phase_{name}_ns" for name in PHASES]
PATH_COLUMNS = [f"path_{resource.name.lower()}_ns" for resource in Resource]


def row(outcome: Outcome) -> dict[str, Any]:
    """One run as a flat row; times are whole nanoseconds, null where the migration was not completed."""
    flat: dict[str, Any] = {
        "scenario": outcome.scenario,
        "protocol": outcome.protocol,
        "seed": outcome.seed,
        "outcome": outcome.kind.value,
        "reason": outcome.reason,
        "note": outcome.note,
        "downtime_ns": outcome.downtime_ns,
        "total_ns": outcome.total_ns,
        "bound_ns": outcome.bound_ns,
        "bound_by": outcome.bound_by,
        "bound_ratio": _bound_ratio(outcome),
    }
    flat |= {f"phase_{name}_ns": outcome.phases_ns.get(name) for name in PHASES}
    flat |= {f"path_{name.name.lower()}_ns": outcome.critical_path_ns.get(name.name.lower()) for name in Resource}
    flat["path_unexplained_ns"] = outcome.critical_path_ns.get("unexplained")
    for name in (
        "guest_runs_at",
        "setup_in_downtime_ns",
        "late_critical_objects",
        "late_reconfigured_objects",
        "late_critical_bytes",
        "critical_lag_mean_ns",
        "critical_lag_max_ns",
        "retries",
        "retries_stopped_ns",
        "late_final_checks",
        "peak_reorder_bytes",
        "peak_held_bytes",
        "send_blocked_ns",
        "wire_bytes",
        "device_bytes",
        "device_bytes_resent",
        "device_bytes_dropped",
        "device_bytes_wasted",
        "connections",
        "messages",
        "wakeups",
        "reads",
        "read_firmware_ns",
        "read_lock_ns",
        "read_copy_ns",
        "digest",
    ):
        flat[name] = getattr(outcome, name)
    return flat | {f"stage_{stage.name}_{stage.index}_ns": stage.end_ns - stage.start_ns for stage in outcome.stages}


def _bound_ratio(outcome: Outcome) -> float | None:
    """How far the downtime is above what it is at the least; None where either is not there, or that is 0."""
    if outcome.downtime_ns is None or not outcome.bound_ns:
        return None
    return outcome.downtime_ns / outcome.bound_ns


def table(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """The runs as a table."""
    return pl.DataFrame([row(outcome) for outcome in outcomes], infer_schema_length=None)
