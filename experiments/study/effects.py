# SPDX-License-Identifier: GPL-2.0-or-later
"""Protocols compared over the places of a grid: rows for a table of effects, and words for a sentence.

A *place* is a set of values of the swept columns, with its runs. Unless a function says otherwise, `scale` units of a
column make one `unit`: nanoseconds are shown in ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl

from experiments.runs.frame import COMPLETED
from experiments.study.statistics import Effect, Interval, effect, interval

NOT_BOTH = "no seed was completed under both"
Place = dict[str, Any]
"""The values of the swept columns, by column."""


class Measure(NamedTuple):
    """A column of the table of runs, as tables and figures show it."""

    label: str
    column: str
    scale: float = 1e6
    unit: str = "ms"


def places(frame: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[Place, pl.DataFrame]]:
    """Each place of the grid, by these columns, with its runs, in the order of the table."""
    for key, runs in frame.group_by(*by, maintain_order=True):
        yield dict(zip(by, key, strict=True)), runs


def mean(runs: pl.DataFrame, column: str, scale: float = 1e6, **where: Any) -> Interval | None:
    """The mean of a column over the completed runs `where` columns have these values; None if there is no such run."""
    values = runs.filter(COMPLETED, **where)[column].drop_nulls()
    return interval(values.to_numpy() / scale) if len(values) else None


def effect_row(found: Effect | None, base: str, other: str, scale: float = 1e6, unit: str = "ms") -> dict[str, Any]:
    """A row of a table of effects; nulls if there is no effect."""
    row: dict[str, Any] = {"base": base, "other": other}
    for name, of in (("difference", found and found.difference), ("ratio", found and found.ratio)):
        by, suffix = (scale, f"_{unit}") if name == "difference" else (1.0, "")
        for part in ("mean", "low", "high"):
            row[f"{name}_{part}{suffix}"] = getattr(of, part) / by if of else None
    return row | {"pairs": found.pairs if found else 0, "lost": found.lost if found else None}


def effect_table(
    frame: pl.DataFrame, by: Sequence[str], pairs: Iterable[tuple[str, str]], column: str = "downtime_ns"
) -> pl.DataFrame:
    """A row for each place and each pair (base, other) of protocols that were run there; the column is in ns, the row
    in ms."""
    pairs = list(pairs)
    return table(
        at | effect_row(effect(runs, column, *pair), *pair)
        for at, runs in places(frame, by)
        for pair in pairs
        if set(pair) <= set(runs["protocol"])
    )


def table(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table; a column that a row lacks is null there."""
    return pl.DataFrame(list(rows), infer_schema_length=None)


# --- words ------------------------------------------------------------------------------------------------------------


def effect_text(found: Effect | None, digits: int = 1) -> str:
    """Difference, ratio, intervals and pairs of an effect on a column in ns, in ms; or that there is none."""
    return found.text("ms", 1e6, digits) if found else NOT_BOTH


def compared_text(runs: pl.DataFrame, base: str, other: str, column: str = "downtime_ns", digits: int = 1) -> str:
    """What `other` does to a column in ns against `base`, in ms."""
    return effect_text(effect(runs, column, base, other), digits)


def change_text(difference: Interval, digits: int = 1) -> str:
    """A difference of a column in ns, in ms: `-12.3 ms (95 % interval -12.8 to -11.9)`."""
    return difference.per(1e6).text("ms", digits, "+")


def outcome_counts(runs: pl.DataFrame) -> str:
    """How many runs ended in which way: `3 FAILED, 2 DID_NOT_CONVERGE`."""
    return ", ".join(f"{count} {kind}" for kind, count in runs["outcome"].value_counts(sort=True).iter_rows())


def incomplete(frame: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[Place, str]]:
    """Each place where not all runs were completed, with `3 FAILED, 2 DID_NOT_CONVERGE of 30`."""
    for at, runs in places(frame, by):
        others = runs.filter(~COMPLETED)
        if others.height:
            yield at, f"{outcome_counts(others)} of {runs.height}"


def sentence(start: str, parts: Sequence[str], end: str = ".", separator: str = "; ") -> list[str]:
    """One sentence that lists `parts`, or none if there are no parts."""
    return [f"{start}{separator.join(parts)}{end}"] if parts else []
