# SPDX-License-Identifier: GPL-2.0-or-later
"""Protocols compared pair by pair: the effect on the downtime, and a verdict in a word.

Effects are paired by seed; intervals are of 95 % (experiments.study.statistics).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from experiments.runs.frame import COMPLETED, protocols
from experiments.study.claims import WORTH
from experiments.study.effects import effect_row, places
from experiments.study.statistics import Effect, effect
from proto_v3.errors import UserError

Pairs = Sequence[tuple[str, str]]
"""What is compared: base and other, by their protocols' names."""


def seed_by_seed(runs: pl.DataFrame, pairs: Pairs, column: str = "downtime_ns") -> pl.DataFrame:
    """One row a seed: `column` (ns in the table of runs) under each protocol, and the difference of each pair.

    Columns: seed, `PROTOCOL ms` for each protocol of the pairs, `OTHER - BASE ms` for each pair; null where a run was
    not completed. Protocols that were not run are left out.
    """
    wide = runs.filter(COMPLETED).pivot(on="protocol", index="seed", values=column).sort("seed")
    named = [name for name in dict.fromkeys(name for pair in pairs for name in pair) if name in wide.columns]
    both = [(base, other) for base, other in pairs if base in named and other in named]
    return wide.select(
        "seed",
        *[(pl.col(name) / 1e6).round(1).alias(f"{name} ms") for name in named],
        *[((pl.col(other) - pl.col(base)) / 1e6).round(1).alias(f"{other} - {base} ms") for base, other in both],
    )


def verdict(change: Effect | None, base_completed: int, other_completed: int, worth: float = WORTH) -> str:
    """An effect on the downtime, in one of the words of verdicts(). Without an effect: which of the two completes."""
    if change is None:
        match bool(base_completed), bool(other_completed):
            case True, True:
                return "uncertain"
            case False, False:
                return "neither completes"
            case base, _:
                return f"only {'base' if base else 'other'} completes"
    ratio = change.ratio
    if ratio.high <= 1 - worth:
        return "shorter"
    if ratio.low >= 1 + worth:
        return "longer"
    return "next to nothing" if ratio.low > 1 - worth and ratio.high < 1 + worth else "uncertain"


def verdicts(runs: pl.DataFrame, pairs: Pairs, by: Sequence[str] = (), worth: float = WORTH) -> pl.DataFrame:
    """The effect of each pair (base, other) on the downtime, paired by seed, with a verdict in a word.

    One row a pair; with `by`, one row a pair and a place, where a place is a value of these columns. `worth` is the
    least relative change of the downtime that matters. The words: `shorter` or `longer` (all of the ratio's interval is
    beyond `worth`), `next to nothing` (all of it is within), `uncertain` (neither), `only base completes`,
    `only other completes`, `neither completes`.

    Columns: `by`, base, other, difference_{mean,low,high}_ms, ratio_{mean,low,high}, pairs (seeds completed under
    both), lost (seeds that were not), base_completed, other_completed (runs), verdict. A place without runs of a pair
    is left out; UserError if that leaves nothing.
    """
    rows = []
    for at, some in places(runs, by) if by else [({}, runs)]:
        for base, other in pairs:
            of = {name: some.filter(pl.col("protocol") == name) for name in (base, other)}
            if any(each.is_empty() for each in of.values()):
                continue
            done = [each.filter(COMPLETED).height for each in of.values()]
            change = effect(some, "downtime_ns", base, other)
            completed = {"base_completed": done[0], "other_completed": done[1]}
            word = {"verdict": verdict(change, done[0], done[1], worth)}
            rows.append(at | effect_row(change, base, other) | completed | word)
    if not rows:
        named = ", ".join(f"{other} against {base}" for base, other in pairs)
        raise UserError(f"{named}: the runs have no such pair, only {', '.join(protocols(runs))}")
    table = pl.DataFrame(rows, infer_schema_length=None)
    return table.with_columns(pl.col("^(difference|ratio)_.*$").cast(pl.Float64))


def readable(table: pl.DataFrame) -> pl.DataFrame:
    """A table of `verdicts`, rounded to be read.

    Columns: the places', base, other, {mean,low,high}_ms (the difference), {mean,low,high}_percent (the change), pairs,
    verdict.
    """
    factors = table.columns[: table.columns.index("base")]
    return table.select(
        *factors,
        "base",
        "other",
        *[pl.col(f"difference_{part}_ms").round(1).alias(f"{part}_ms") for part in ("mean", "low", "high")],
        *[(100 * (pl.col(f"ratio_{part}") - 1)).round(1).alias(f"{part}_percent") for part in ("mean", "low", "high")],
        "pairs",
        "verdict",
    )


def count_verdicts(tables: Mapping[str, tuple[pl.DataFrame, Sequence[str]]]) -> pl.DataFrame:
    """Of several tables of `verdicts`: at how many places there is which verdict, and at which.

    `tables` has each table, with the columns that name its places, under the name that column `of` shows. Columns: of,
    base, other, verdict, places, from_percent, to_percent (range of the mean change of the downtime), where.
    """
    percent = (100 * (pl.col("ratio_mean") - 1)).round(1)
    return pl.concat(
        table.group_by("base", "other", "verdict", maintain_order=True)
        .agg(
            pl.len().alias("places"),
            percent.min().alias("from_percent"),
            percent.max().alias("to_percent"),
            place(by).unique(maintain_order=True).str.join("; ").alias("where"),
        )
        .sort("base", "other", "places", descending=[False, False, True], maintain_order=True)
        .select(pl.lit(name).alias("of"), pl.all())
        for name, (table, by) in tables.items()
    )


def place(by: Sequence[str]) -> pl.Expr:
    """The values of these columns as one text."""
    words = [pl.col(name).cast(pl.String).str.strip_suffix(".0") for name in by]
    return pl.concat_str(words, separator=" ").str.strip_chars()
