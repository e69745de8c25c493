# SPDX-License-Identifier: GPL-2.0-or-later
"""What a comparison prints: its tables, each number computed from the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from experiments.report import findings
from experiments.report.tables import Heading, Section, outcomes
from experiments.runs.frame import PATH_COLUMNS, completed_runs, number, protocols
from experiments.study.effects import effect_table
from experiments.study.published import KINDS, PublishedFigure, held_against
from experiments.study.summaries import distributions
from proto_v3.timeline import PHASES, Resource
from sim.scenario.scenario import Scenario
from sim.scenario.tables import Published
from sim.scenario.units import MIB, NS_PER_MS, NS_PER_S

MOST_SEEDS = 20
"""With more, the table of each seed's downtime is only in JSON."""
PROTOCOL = Heading("protocol", "protocol")
Column = tuple[str, str, pl.Expr, str]
"""The name in JSON, the heading, the value over all completed runs of a protocol, and how it is formatted."""


def sections(scenario: Scenario, frame: pl.DataFrame) -> Iterator[Section]:
    """Outcomes, downtime, effects, phases, critical path, bytes, reads; published figures if there are any."""
    yield outcomes(frame)
    completed = completed_runs(frame)
    if completed.is_empty():
        return
    yield downtimes(frame)
    yield each_seed(completed)
    yield from effects(frame)
    yield from _means(completed)
    for published in scenario.published:
        held = held_against(published, frame)
        if held and published.protocol in protocols(completed):
            yield published_against_simulated(published, held)


def published_against_simulated(published: Published, held: Sequence[PublishedFigure]) -> Section:
    """Each published figure of a measurement against the mean of the runs."""
    name = published.case or published.protocol
    return Section(
        f"published {name}",
        f"Published against simulated ({name}), ms",
        f"{'; '.join(KINDS.values())}; -: not simulated; published: {published.citation}",
        [
            Heading("what", "what"),
            Heading("published_ms", "published", ".1f"),
            Heading("simulated_ms", "simulated", ".1f"),
            Heading("error_percent", "error %", "+.1f"),
            Heading("kind", "kind"),
        ],
        [
            {
                "what": one.what,
                "published_ms": one.published_ms,
                "simulated_ms": one.simulated_ms,
                "error_percent": None if one.error is None else 100 * one.error,
                "kind": one.kind,
            }
            for one in held
        ],
    )


# --- the downtimes ----------------------------------------------------------------------------------------------------


def downtimes(frame: pl.DataFrame) -> Section:
    """The distribution of each protocol's downtime."""
    names = ("mean", "low", "high", "least", "median", "p95", "p99", "most")
    return Section(
        "downtime",
        "Downtime, ms, over the seeds",
        "low, high: 95 % interval of the mean; p95, p99: percentiles of the completed runs, from 20 and 100 runs on; "
        "each seed: below, or in --json and distribution.png",
        [
            PROTOCOL,
            Heading("runs", "runs"),
            Heading("completed", "completed"),
            *(Heading(f"{name}_ms", name, ".1f") for name in names),
        ],
        distributions(frame).rows(named=True),
    )


def each_seed(completed: pl.DataFrame) -> Section:
    """The downtime of each seed, one row a seed."""
    wide = completed.with_columns(pl.col("downtime_ns") / NS_PER_MS).pivot(
        on="protocol", index="seed", values="downtime_ns"
    )
    named = protocols(completed)
    rows = [
        {"seed": row["seed"], **{f"{name}_ms": row[name] for name in named}}
        for row in wide.sort("seed").iter_rows(named=True)
    ]
    return Section(
        "seeds",
        "Downtime of each seed, ms",
        "a row is one seed: the same guest and firmware under each protocol; -: that run did not complete",
        [Heading("seed", "seed"), *(Heading(f"{name}_ms", name, ".1f") for name in named)],
        rows,
        most_rows=None if len(rows) <= MOST_SEEDS else 0,
    )


def effects(frame: pl.DataFrame) -> Iterator[Section]:
    """How the downtime differs between protocols, paired by seed."""
    pairs = findings.pairs(protocols(completed_runs(frame)))
    if not pairs:
        return
    rows = []
    for row in effect_table(frame.with_columns(all=pl.lit(0)), ["all"], pairs).iter_rows(named=True):
        parts = {name: row[name] for name in ("base", "other", "pairs", "lost")}
        for part in ("mean", "low", "high"):
            known = row["pairs"] > (0 if part == "mean" else 1)
            parts[f"difference_{part}_ms"] = row[f"difference_{part}_ms"] if known else None
            parts[f"change_{part}_percent"] = 100 * (row[f"ratio_{part}"] - 1) if known else None
        rows.append(parts)
    yield Section(
        "effects",
        "Differences of the downtime, paired by seed",
        "other minus base: mean; low, high: 95 % interval by bootstrap over the pairs, Student's for less than 10",
        [
            Heading("base", "base"),
            Heading("other", "other"),
            Heading("pairs", "pairs"),
            Heading("lost", "lost"),
            *(Heading(f"difference_{part}_ms", label, "+.1f") for part, label in _parts("ms")),
            *(Heading(f"change_{part}_percent", label, "+.1f") for part, label in _parts("%")),
        ],
        rows,
    )


def _parts(unit: str) -> list[tuple[str, str]]:
    return [("mean", f"mean {unit}"), ("low", "low"), ("high", "high")]


# --- means of each protocol -------------------------------------------------------------------------------------------


def _mean(column: str, unit: float = 1) -> pl.Expr:
    return pl.col(column).mean() / unit


PHASE_MEANS: list[Column] = [
    ("downtime_ms", "downtime", _mean("downtime_ns", NS_PER_MS), ".1f"),
    ("over_limit_ratio", "x limit", _mean("over_limit_ratio"), ".1f"),
    *[(f"{name}_ms", name, _mean(f"phase_{name}_ns", NS_PER_MS), ".1f") for name in PHASES],
]
_SHARES = [pl.col(column).sum() / pl.col("downtime_ns").sum() for column in PATH_COLUMNS]
CRITICAL_PATH: list[Column] = [
    (f"{resource.name.lower()}_percent", resource.name.lower(), 100 * share, ".1f")
    for resource, share in zip(Resource, _SHARES, strict=True)
]
UNEXPLAINED: Column = ("unexplained_percent", "unexplained", 100 * (1 - pl.sum_horizontal(_SHARES)), ".1f")
"""Of the critical path, in live runs only."""
TIME_AND_BYTES: list[Column] = [
    ("total_s", "total s", _mean("total_ns", NS_PER_S), ".2f"),
    ("wire_mib", "wire MiB", _mean("wire_bytes", MIB), ".1f"),
    ("device_mib", "device MiB", _mean("device_bytes", MIB), ".1f"),
    ("sent_again_mib", "sent again MiB", _mean("device_bytes_resent", MIB), ".1f"),
    ("setup_in_downtime_ms", "set-up in downtime ms", _mean("setup_in_downtime_ns", NS_PER_MS), ".1f"),
]
LATE_CRITICAL: list[Column] = [
    ("late_objects", "late objects", _mean("late_critical_objects"), ".1f"),
    ("late_new_objects", "of them new", _mean("late_reconfigured_objects"), ".1f"),
    ("lag_mean_ms", "lag ms", _mean("critical_lag_mean_ns", NS_PER_MS), ".0f"),
    ("lag_max_ms", "lag max ms", _mean("critical_lag_max_ns", NS_PER_MS), ".0f"),
    ("dropped_mib", "dropped MiB", _mean("device_bytes_dropped", MIB), ".1f"),
    ("wasted_mib", "in vain MiB", _mean("device_bytes_wasted", MIB), ".1f"),
    ("retries", "retries", _mean("retries"), ".2f"),
    ("paused_ms", "paused ms", _mean("retries_stopped_ns", NS_PER_MS), ".1f"),
]
_READ_PARTS = {part: pl.col(f"read_{part}_ns").sum() for part in ("firmware", "lock", "copy")}
_READING_NS = pl.sum_horizontal(_READ_PARTS.values())
READS: list[Column] = [
    ("calls", "calls", _mean("reads"), ".0f"),
    ("us_a_call", "us a call", _READING_NS / pl.max_horizontal(pl.col("reads").sum(), 1) / 1000, ".0f"),
    *[
        (f"{part}_percent", part, 100 * ns / pl.max_horizontal(_READING_NS, 1), ".0f")
        for part, ns in _READ_PARTS.items()
    ],
]
OVERHEAD: list[Column] = [
    ("connections", "connections", _mean("connections"), ".0f"),
    ("messages", "messages", _mean("messages"), ".0f"),
    ("wakeups", "wake-ups", _mean("wakeups"), ".0f"),
    ("reads", "read() calls", _mean("reads"), ".0f"),
    ("vmm_holds_mib", "VMM holds MiB", pl.col("peak_reorder_bytes").max() / MIB, ".1f"),
    ("driver_holds_mib", "driver holds MiB", pl.col("peak_held_bytes").max() / MIB, ".1f"),
]
PINNED: list[Column] = [
    ("pinned_chunks_mib", "source chunks MiB", pl.col("pinned_chunks_bytes").max() / MIB, ".1f"),
    ("pinned_images_mib", "source images MiB", pl.col("pinned_images_bytes").max() / MIB, ".1f"),
    ("pinned_target_mib", "target MiB", pl.col("pinned_target_bytes").max() / MIB, ".1f"),
]


def _means(completed: pl.DataFrame) -> Iterator[Section]:
    yield _section(
        completed,
        "phases",
        "Phases of the downtime, ms",
        "means over the completed runs; x limit: the downtime by its limit; the phases add up to the downtime",
        PHASE_MEANS,
    )
    yield _section(
        completed,
        "critical_path",
        "Critical path through the downtime, %",
        "what the downtime waited for: the share of each resource, over all completed runs",
        CRITICAL_PATH + [UNEXPLAINED] * (number(completed["path_unexplained_ns"].sum()) > 0),
    )
    yield _section(
        completed,
        "time_and_bytes",
        "Time and bytes, means of a run",
        "total: the whole migration; wire: all that was sent; device: the devices' state; sent again: more than once",
        TIME_AND_BYTES,
    )
    if number(completed["late_critical_objects"].sum()) or number(completed["critical_lag_max_ns"].sum()):
        yield _section(
            completed,
            "late_critical",
            "Critical data that came too late, means of a run",
            "late: loaded after the stop; lag: from a reconfiguration to its data at the target; paused: undone stops",
            LATE_CRITICAL,
        )
    yield _section(
        completed,
        "reads",
        "read(), means of a run",
        "firmware, lock, copy: the shares, %, of the time that read() waits for each",
        READS,
    )
    yield _section(
        completed,
        "overhead",
        "Overhead, means of a run",
        "holds: the most that waited in the target's memory, in any run",
        OVERHEAD,
    )
    yield _section(
        completed,
        "pinned",
        "Memory that firmware saves into and loads from, all devices",
        "chunks: of each stream, x (1 + N) a device with v3; images: saved whole before the stop; the most in any run",
        PINNED,
    )


def _section(completed: pl.DataFrame, key: str, title: str, legend: str, columns: Sequence[Column]) -> Section:
    """One row a protocol."""
    shown = [PROTOCOL, *(Heading(name, heading, how) for name, heading, _, how in columns)]
    values = completed.group_by("protocol", maintain_order=True).agg(value.alias(name) for name, _, value, _ in columns)
    return Section(key, title, legend, shown, values.rows(named=True))
