# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables that sum up a table of runs, rounded to be read: downtimes, critical paths, bounds, read(), scaling.

Intervals are of 95 %, by the bootstrap over seeds (experiments.study.statistics).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from experiments.runs.frame import COMPLETED, PATH, PHASE_COLUMNS, completed_runs, number, path_shares, protocols
from experiments.study.effects import places
from experiments.study.statistics import interval, percentile, usl
from proto_v3.timeline import PHASES
from sim.outcome import FAR_OVER, over_limit
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import GIB, MIB, NS_PER_MS, NS_PER_S
from sim.theory.downtime_bound import lower_bound

DISTRIBUTION = ("mean_ms", "low_ms", "high_ms", "least_ms", "median_ms", "p95_ms", "p99_ms", "most_ms")


def downtimes(runs: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """The mean downtime of each protocol, with its interval; with `by`, for each value of these columns.

    Columns: `by`, protocol, runs, completed (runs), downtime_ms, low_ms, high_ms, total_s (mean of the whole
    migration). Where no run was completed the times are null.
    """
    rows = []
    for at, some in places(runs, [*by, "protocol"]):
        done = some.filter(COMPLETED)
        row: dict[str, Any] = at | {"runs": some.height, "completed": done.height}
        if done.height:
            mean = interval(done["downtime_ns"].to_numpy() / NS_PER_MS)
            row |= {"downtime_ms": round(mean.mean, 1), "low_ms": round(mean.low, 1), "high_ms": round(mean.high, 1)}
            row |= {"total_s": round(number(done["total_ns"].mean()) / NS_PER_S, 2)}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def distributions(runs: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """The distribution of each protocol's downtime; with `by`, for each value of these columns.

    Columns: `by`, protocol, runs, completed (runs), mean_ms, low_ms and high_ms (the mean's 95 % interval; null for one
    run), least_ms, median_ms, p95_ms, p99_ms, most_ms. A percentile is null where there are too few completed runs: the
    95th needs 20, the 99th 100. Where no run was completed all are null.
    """
    rows = []
    for at, some in places(runs, [*by, "protocol"]):
        values = some.filter(COMPLETED)["downtime_ns"].to_numpy() / NS_PER_MS
        row: dict[str, Any] = at | {"runs": some.height, "completed": len(values)}
        row |= dict.fromkeys(DISTRIBUTION)
        if len(values):
            mean = interval(values)
            row["mean_ms"] = mean.mean
            if len(values) > 1:
                row |= {"low_ms": mean.low, "high_ms": mean.high}
            row |= {"least_ms": values.min(), "median_ms": np.median(values), "most_ms": values.max()}
            row |= {"p95_ms": percentile(values, 95), "p99_ms": percentile(values, 99)}
        rows.append(row)
    columns = dict.fromkeys(DISTRIBUTION, pl.Float64)
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides=columns).with_columns(
        pl.col(*columns).round(3)
    )


def far_over_limit(runs: pl.DataFrame, protocol: str) -> str:
    """Which runs of a protocol were far over their downtime limit, and what took them there in the mean; in words.

    Empty if none was.
    """
    done = runs.filter(COMPLETED & (pl.col("protocol") == protocol))
    far = done.filter(pl.col("over_limit_ratio") > FAR_OVER) if "over_limit_ratio" in runs.columns else done.clear()
    if far.is_empty():
        return ""
    mean = {name: number(far[name].mean()) for name in ("downtime_ns", "downtime_limit_ns", *PHASE_COLUMNS)}
    path = {part: number(far[f"path_{part}_ns"].mean()) for part in PATH}
    phases = {name: mean[column] for name, column in zip(PHASES, PHASE_COLUMNS, strict=True)}
    words = over_limit(mean["downtime_ns"], mean["downtime_limit_ns"], phases, path)
    return f"{far.height} of {done.height} completed runs are far over their downtime limit, in the mean {words}"


def resource_shares(runs: pl.DataFrame) -> pl.DataFrame:
    """The share of each resource in the critical path through the downtime, over all completed runs.

    One row a protocol. Columns: protocol, RESOURCE_percent for each resource; they sum to 100.
    """
    done = completed_runs(runs)
    return pl.DataFrame(
        [
            {"protocol": name}
            | {f"{each.name.lower()}_percent": round(100 * share, 1) for each, share in path_shares(done, name).items()}
            for name in protocols(done)
        ]
    )


def bounds(scenario: Scenario, protocol_names: Sequence[str]) -> pl.DataFrame:
    """The least mean downtime that scenario and protocol allow, by theory; no run is made.

    One row a protocol. Columns: protocol, bound_ms (the largest of the others), set_by (its resource), RESOURCE_ms for
    each resource by itself. UserError for an unknown protocol.
    """
    rows = []
    for name in protocol_names:
        protocol = Protocol.parse(name, scenario)
        least = lower_bound(protocol.applied(scenario))
        row = {"protocol": protocol.name, "bound_ms": round(least.total_ns / NS_PER_MS, 1), "set_by": least.resource}
        rows.append(row | {f"{resource}_ms": round(ns / NS_PER_MS, 1) for resource, ns in least.by_resource_ns.items()})
    return pl.DataFrame(rows)


def above_bound(runs: pl.DataFrame) -> pl.DataFrame:
    """How far the completed runs are above their lower bound.

    One row a protocol that has a bound. Columns: protocol, bound_ms, set_by (a resource), ratio, ratio_low, ratio_high
    (of the downtime to the bound), over_ms (their difference, in the mean).
    """
    rows = []
    for name in protocols(completed_runs(runs)):
        done = runs.filter(COMPLETED & (pl.col("protocol") == name)).drop_nulls("bound_ratio")
        if done.is_empty():
            continue
        ratio = interval(done["bound_ratio"].to_numpy())
        over = interval(((done["downtime_ns"] - done["bound_ns"]) / NS_PER_MS).to_numpy())
        rows.append(
            {
                "protocol": name,
                "bound_ms": round(number(done["bound_ns"].mean()) / NS_PER_MS, 1),
                "set_by": done["bound_by"][0],
                "ratio": round(ratio.mean, 3),
                "ratio_low": round(ratio.low, 3),
                "ratio_high": round(ratio.high, 3),
                "over_ms": round(over.mean, 1),
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def read_times(runs: pl.DataFrame, by: Sequence[str] = ("protocol",)) -> pl.DataFrame:
    """What a read() waits for, over the completed runs of each value of the columns `by`.

    Columns: `by`, reads (calls a run), us_a_read, firmware_percent, lock_percent, copy_percent (of the time in read()).
    """
    rows = []
    for at, some in places(runs.filter(COMPLETED), by):
        parts = {part: number(some[f"read_{part}_ns"].sum()) for part in ("firmware", "lock", "copy")}
        whole, calls = max(1.0, sum(parts.values())), max(1.0, number(some["reads"].sum()))
        shares = {f"{part}_percent": round(100 * value / whole, 1) for part, value in parts.items()}
        rows.append(at | {"reads": round(calls / some.height), "us_a_read": round(whole / calls / 1e3, 1)} | shares)
    return pl.DataFrame(rows, infer_schema_length=None)


def scaling_laws(runs: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """The Universal Scalability Law, fitted to the throughput of `read_scaling` against N, for each value of `by`.

    Columns: `by`, n (how many different N), one_gib_per_s, contention_percent, coherency_percent, best_n (null if the
    throughput never falls), r_squared (null if the law has as many parameters as there are N). Places with less than
    three different N are left out.
    """
    rows = []
    for at, some in places(runs.filter(COMPLETED), by):
        if (ns := some["streams"].n_unique()) < 3:
            continue
        gib = sum(device.state_mib for device in load(some["base"][0]).devices) * MIB / GIB
        moved_ns = (some["phase_drain_ns"] + some["phase_transfer_ns"]).to_numpy()
        law = usl(some["streams"].to_numpy(), gib * NS_PER_S / moved_ns)
        best = round(law.best_n) if law.best_n < 10 * number(some["streams"].max()) else None
        percent = {f"{name}_percent": round(100 * getattr(law, name), 2) for name in ("contention", "coherency")}
        row = at | {"n": ns, "one_gib_per_s": round(law.rate, 3)} | percent
        rows.append(row | {"best_n": best, "r_squared": round(law.r_squared, 4) if ns > 3 else None})
    return pl.DataFrame(rows, infer_schema_length=None)
