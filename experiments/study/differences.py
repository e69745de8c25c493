# SPDX-License-Identifier: GPL-2.0-or-later
"""How two tables of runs differ: place by place, seed by seed.

A place is one protocol in one scenario, under one clock. Its runs are repeats that differ in the seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from experiments.runs.frame import COMPLETED, PATH_COLUMNS, PHASE_COLUMNS
from experiments.runs.kept import PLACE
from experiments.study.effects import Measure, places
from experiments.study.statistics import Interval, difference
from sim.scenario.units import MIB

DOWNTIME = Measure("downtime", "downtime_ns")
MEASURES = (
    DOWNTIME,
    Measure("total", "total_ns"),
    *(Measure(f"phase {column[6:-3]}", column) for column in PHASE_COLUMNS),
    *(Measure(f"path {column[5:-3]}", column) for column in (*PATH_COLUMNS, "path_unexplained_ns")),
    Measure("set-up in downtime", "setup_in_downtime_ns"),
    Measure("critical lag, mean", "critical_lag_mean_ns"),
    Measure("critical lag, longest", "critical_lag_max_ns"),
    Measure("bytes on the wire", "wire_bytes", MIB, "MiB"),
    Measure("bytes of the devices", "device_bytes", MIB, "MiB"),
    Measure("bytes sent again", "device_bytes_resent", MIB, "MiB"),
)
SAME = "the same"
TINY = 0.05
"""Tables show one digit after the point."""
NOT_COMPARED = ("cell", "clock", "io", "loop")
"""Columns that do not say what a run did."""


@dataclass(frozen=True, slots=True)
class Change:
    """A measure of a place, in both tables."""

    place: str
    measure: Measure
    means: tuple[float, float]
    """In A and B; so are medians and counts (of runs)."""
    medians: tuple[float, float]
    counts: tuple[int, int]
    paired: bool
    """By seed: all is of the seeds that were completed in both."""
    difference: Interval
    """Mean of B minus mean of A; without an interval if a side has less than two values."""

    @property
    def has_interval(self) -> bool:
        """Whether there are two values at least on each side."""
        return (self.difference.count if self.paired else min(self.counts)) > 1

    @property
    def is_shown(self) -> bool:
        """Whether 0 is not in the interval."""
        return self.has_interval and 0 not in self.difference

    @property
    def is_tiny(self) -> bool:
        """Whether rounding hides it: all of it is less than TINY ms or MiB."""
        return max(abs(self.difference.low), abs(self.difference.high)) < TINY

    @property
    def word(self) -> str:
        """How B is against A."""
        if self.difference.low == self.difference.high == 0:
            return SAME
        if not self.has_interval:
            return "too few runs for an interval"
        if self.is_tiny:
            return f"less than {TINY:g} ms"
        if not self.is_shown:
            return "no difference is shown"
        return "more in B" if self.difference.mean > 0 else "less in B"


@dataclass(frozen=True)
class Compared:
    """Two tables of runs, side by side."""

    a: pl.DataFrame
    b: pl.DataFrame
    by: list[str]
    """The columns that name a place."""
    same_scenario: bool
    clocks: tuple[str, str] = ("", "")
    """Of A and B, if each has one clock, and these are compared."""

    @classmethod
    def of(cls, a: pl.DataFrame, b: pl.DataFrame) -> Compared:
        """Tables of one scenario and one clock each are compared by protocol, whatever these are.

        Where one table has a clock, the other is in virtual time. Where one is of a sweep, the other is compared with
        the runs in it that no setting changes.
        """
        if ("clock" in a.columns) != ("clock" in b.columns):
            a, b = (each if "clock" in each.columns else each.with_columns(clock=pl.lit("virtual")) for each in (a, b))
        if ("settings" in a.columns) != ("settings" in b.columns):
            a, b = (each.filter(settings="") if "settings" in each.columns else each for each in (a, b))
        by = [name for name in PLACE if name in a.columns and name in b.columns]
        same_scenario, clocks = True, ("", "")
        if "base" not in by and "scenario" in by and a["scenario"].n_unique() == b["scenario"].n_unique() == 1:
            same_scenario = a["scenario"][0] == b["scenario"][0]
            by.remove("scenario")
        if "clock" in by and a["clock"].n_unique() == b["clock"].n_unique() == 1:
            by.remove("clock")
            clocks = (a["clock"][0], b["clock"][0])
        a, b = (table.unique([*by, "seed"], keep="first", maintain_order=True) for table in (a, b))
        return cls(a, b, by, same_scenario, clocks)

    def changes(self, measures: Sequence[Measure]) -> Iterator[Change]:
        """For each place that both have, each measure that both have, of the completed runs.

        They are paired by the seeds that both have, if the scenario is the same and there are two such seeds, or no
        others.
        """
        in_b = {tuple(at.values()): runs for at, runs in places(self.b, self.by)}
        for at, of_a in places(self.a, self.by):
            of_b = in_b.get(tuple(at.values()))
            if of_b is None:
                continue
            seeds = set(of_a["seed"]), set(of_b["seed"])
            paired = self.same_scenario and (len(seeds[0] & seeds[1]) > 1 or seeds[0] == seeds[1])
            for measure in measures:
                if measure.column in of_a.columns and measure.column in of_b.columns:
                    found = _change(_name(at), measure, of_a, of_b, paired)
                    if found is not None:
                        yield found

    @cached_property
    def outcomes(self) -> list[dict[str, Any]]:
        """Each run that ended otherwise in B: place, seed, outcome and reason in both."""
        texts = [name for name in ("outcome", "reason") if name in self.a.columns and name in self.b.columns]
        both = self._both(texts)
        other = both.filter(pl.col("outcome") != pl.col("outcome_b"))
        return [
            {"place": _name({name: row[name] for name in self.by}), "seed": row["seed"]}
            | {"a": row["outcome"], "b": row["outcome_b"]}
            | {"a_reason": row.get("reason", ""), "b_reason": row.get("reason_b", "")}
            for row in other.iter_rows(named=True)
        ]

    @cached_property
    def only(self) -> tuple[int, int]:
        """How many runs are only in A, and only in B."""
        key = [*self.by, "seed"]
        return self.a.join(self.b, on=key, how="anti").height, self.b.join(self.a, on=key, how="anti").height

    @property
    def in_both(self) -> int:
        """How many runs are in both tables."""
        return self._both([]).height

    @cached_property
    def same_runs(self) -> int:
        """How many runs are the same in all columns that both tables have."""
        left_out = {*NOT_COMPARED, *_labels(self.a), *self.by, "seed", *([] if self.same_scenario else ["scenario"])}
        columns = [name for name in self.a.columns if name in self.b.columns and name not in left_out]
        same = [pl.col(name).eq_missing(pl.col(f"{name}_b")) for name in columns]
        return self._both(columns).filter(pl.all_horizontal(same)).height

    @property
    def same(self) -> bool:
        """Whether both have the same runs, and no others."""
        return self.only == (0, 0) and self.same_runs == self.in_both

    @property
    def places(self) -> int:
        """How many places A has."""
        return self.a.select(self.by).n_unique()

    def _both(self, columns: Sequence[str]) -> pl.DataFrame:
        """The runs that are in both tables; a column of B ends in `_b`, and has the type of A's."""
        key = [*self.by, "seed"]
        kinds = {name: self.a.schema[name] for name in [*key, *columns]}
        kinds |= {name: pl.String() for name, kind in kinds.items() if kind == pl.Null}
        a = self.a.select(pl.col(name).cast(kind, strict=False) for name, kind in kinds.items())
        b = self.b.select(pl.col(name).cast(kind, strict=False) for name, kind in kinds.items())
        return a.join(b.rename({name: f"{name}_b" for name in columns}), on=key, how="inner", maintain_order="left")


def _change(place: str, measure: Measure, of_a: pl.DataFrame, of_b: pl.DataFrame, paired: bool) -> Change | None:
    values = [
        runs.filter(COMPLETED).select("seed", pl.col(measure.column).cast(pl.Float64, strict=False)).drop_nulls()
        for runs in (of_a, of_b)
    ]
    if paired:
        values = [each.join(other, on="seed", how="semi").sort("seed") for each, other in (values, reversed(values))]
    before, after = (each[measure.column].to_numpy() / measure.scale for each in values)
    if not len(before) or not len(after):
        return None
    return Change(
        place,
        measure,
        (float(before.mean()), float(after.mean())),
        (float(np.median(before)), float(np.median(after))),
        (len(before), len(after)),
        paired,
        difference(before, after, paired=paired),
    )


def _labels(sweep: pl.DataFrame) -> list[str]:
    """The columns in which a question says what it made a run for: two of its parts may ask for the same run."""
    at = sweep.columns.index("settings") if "settings" in sweep.columns else len(sweep.columns)
    return [name for name in sweep.columns[at:] if not name.startswith("stage_")]


def _name(at: dict[str, Any]) -> str:
    return " ".join(str(value) for value in at.values() if value)


# --- other tables -----------------------------------------------------------------------------------------------------

COUNTS = ("pairs", "lost", "runs", "completed", "counted", "samples", "inside")
"""Whole numbers and switches of a table of effects that are computed; others say what a row is about, as texts do."""
END = re.compile(r"(^|_)(low|high)(_|$)")
"""The columns of an interval's ends."""


def side_by_side(a: pl.DataFrame, b: pl.DataFrame, factors: Sequence[str]) -> list[dict[str, Any]]:
    """Each number of two tables of effects that differs, or that only one of them has.

    Rows belong together if their texts and `factors` are equal, and in the order of the tables if several are. A row:
    place (what it is about), value (the column), a, b; a_low, a_high, b_low, b_high if the column has an interval.
    """
    shared = [name for name in a.columns if name in b.columns]
    numbers = [name for name in shared if all(_is_computed(name, table, factors) for table in (a, b))]
    in_a, in_b = (_by_key(table, [name for name in shared if name not in numbers]) for table in (a, b))
    rows = []
    for key in dict.fromkeys([*in_a, *in_b]):
        for name in numbers:
            low, high = (_end(name, end) for end in ("low", "high"))
            values = [[side.get(key, {}).get(each) for each in (name, low, high)] for side in (in_a, in_b)]
            if values[0] != values[1] and not END.search(name):
                sides = [f"{side}{end}" for side in "ab" for end in ("", "_low", "_high")]
                rows.append({"place": key[0], "value": name, **dict(zip(sides, values[0] + values[1], strict=True))})
    return rows


def _end(name: str, end: str) -> str:
    """The column of an end of the interval of this column, if it has one."""
    if name.startswith("simulated_"):
        return name.replace("simulated", f"simulated_{end}")
    return name.replace("mean", end) if "mean" in name else f"{name}_{end}"


def _is_computed(name: str, table: pl.DataFrame, factors: Sequence[str]) -> bool:
    kind = table.schema[name]
    return name not in factors and (kind.is_float() or (kind != pl.String and name in COUNTS))


def _by_key(table: pl.DataFrame, keys: Sequence[str]) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows, each under its key in words, and its number among those with the same words."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    times: Counter[str] = Counter()
    for row in table.iter_rows(named=True):
        known = [(name, row[name]) for name in keys if row[name] not in (None, "")]
        words = " ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in known)
        found[words, times[words]] = {name: None if _nan(value) else value for name, value in row.items()}
        times[words] += 1
    return found


def _nan(value: object) -> bool:
    return isinstance(value, float) and value != value
