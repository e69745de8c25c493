"""What the notebooks call to hold protocols against each other: effects on the downtime, judged, told as advice.

Effects are paired by seed; intervals are of 95 % (experiments.study.statistics).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from experiments.runs.frame import COMPLETED, protocols
from experiments.study.experiment import WORTH, effect_row, places
from experiments.study.statistics import Effect, effect
from proto_v3.errors import UserError

ENOUGH = 30
"""Seeds, to publish a number; with less, look only."""

Pairs = Sequence[tuple[str, str]]
"""What is compared: base and other, by their protocols' names."""


def seed_by_seed(frame: pl.DataFrame, pairs: Pairs, column: str = "downtime_ns") -> pl.DataFrame:
    """One row a seed: under each protocol, and the difference of each pair; ms, null where a run was not completed."""
    wide = frame.filter(COMPLETED).pivot(on="protocol", index="seed", values=column).sort("seed")
    named = [name for name in dict.fromkeys(name for pair in pairs for name in pair) if name in wide.columns]
    both = [(base, other) for base, other in pairs if base in named and other in named]
    return wide.select(
        "seed",
        *[(pl.col(name) / 1e6).round(1).alias(f"{name} ms") for name in named],
        *[((pl.col(other) - pl.col(base)) / 1e6).round(1).alias(f"{other} - {base} ms") for base, other in both],
    )


def verdict(told: Effect | None, base_done: int, other_done: int, worth: float = WORTH) -> str:
    """An effect on the downtime in a word; `worth` is the least change that is worth telling.

    `shorter` and `longer`: all of the ratio's interval is beyond it; `next to nothing`: all of it is within;
    `uncertain`: neither. Where no seed was completed under both: which of them completes.
    """
    if told is None:
        if base_done and other_done:
            return "uncertain"
        return (
            "neither completes"
            if not (base_done or other_done)
            else f"only {'base' if base_done else 'other'} completes"
        )
    ratio = told.ratio
    if ratio.high <= 1 - worth:
        return "shorter"
    if ratio.low >= 1 + worth:
        return "longer"
    return "next to nothing" if ratio.low > 1 - worth and ratio.high < 1 + worth else "uncertain"


def verdicts(frame: pl.DataFrame, pairs: Pairs, by: Sequence[str] = (), worth: float = WORTH) -> pl.DataFrame:
    """Each pair's effect on the downtime, paired by seed, with a verdict; one row a pair (and a place, by `by`).

    Columns: `by`, those of experiments.study.experiment.effect_row in ms, base_completed, other_completed (runs),
    verdict. Pairs of which a place has no runs are left out; UserError if that leaves none.
    """
    rows = []
    for at, some in places(frame, by) if by else [({}, frame)]:
        for base, other in pairs:
            of = {name: some.filter(pl.col("protocol") == name) for name in (base, other)}
            if any(each.is_empty() for each in of.values()):
                continue
            done = [each.filter(COMPLETED).height for each in of.values()]
            told = effect(some, "downtime_ns", base, other)
            rows.append(
                at
                | effect_row(told, base, other, 1e6, "ms")
                | {
                    "base_completed": done[0],
                    "other_completed": done[1],
                    "verdict": verdict(told, done[0], done[1], worth),
                }
            )
    if not rows:
        raise UserError(f"{_named(pairs)}: the runs have no such pair, only {', '.join(protocols(frame))}")
    table = pl.DataFrame(rows, infer_schema_length=None)
    return table.with_columns(pl.col("^(difference|ratio)_.*$").cast(pl.Float64))


def _named(pairs: Pairs) -> str:
    return ", ".join(f"{other} against {base}" for base, other in pairs)


def readable(table: pl.DataFrame) -> pl.DataFrame:
    """A table of verdicts for the eye: the difference in ms, the change in %, each with its interval."""
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


def where(table: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Verdicts counted: of each pair and verdict the places, the range of the change, and the places by name.

    Columns: base, other, verdict, places, from_percent, to_percent, where.
    """
    percent = (100 * (pl.col("ratio_mean") - 1)).round(1)
    return (
        table.group_by("base", "other", "verdict", maintain_order=True)
        .agg(
            pl.len().alias("places"),
            percent.min().alias("from_percent"),
            percent.max().alias("to_percent"),
            place(by).unique(maintain_order=True).str.join("; ").alias("where"),
        )
        .sort("base", "other", "places", descending=[False, False, True], maintain_order=True)
    )


def together(tables: Mapping[str, tuple[pl.DataFrame, Sequence[str]]]) -> pl.DataFrame:
    """Several tables of verdicts, each with the columns that name its places, as one of `where`; `of` says which."""
    return pl.concat(
        [where(table, by).select(pl.lit(name).alias("of"), pl.all()) for name, (table, by) in tables.items()]
    )


VERDICT_COLOURS = {"shorter": "#2171B5", "longer": "#882255", "next to nothing": "#999999", "uncertain": "#E69F00"}


def place(by: Sequence[str]) -> pl.Expr:
    """These columns as words."""
    words = [pl.col(name).cast(pl.String).str.strip_suffix(".0") for name in by]
    return pl.concat_str(words, separator=" ").str.strip_chars()


def advice(frame: pl.DataFrame, *, today: str, best: str, one: str, many: str, worth: float = WORTH) -> list[str]:
    """What to do for a device, in sentences, computed from the effects on its downtime.

    `today` is the protocol as it is used, `best` the best that exists, `one` and `many` are v3 with one dirty
    stream and with several. UserError if one of them was not run.
    """
    asked = {"exists": (today, best), "v3": (best, many), "streams": (one, many)}
    if missing := {name for pair in asked.values() for name in pair} - set(protocols(frame)):
        raise UserError(f"{', '.join(sorted(missing))}: not among the runs, which are {', '.join(protocols(frame))}")
    found = {what: _sentence(frame, *pair, worth) for what, pair in asked.items()}
    lines = [sentence for _, sentence in found.values()]
    for what, (word, _) in found.items():
        if what != "streams" or found["v3"][0] in ("shorter", "only other completes"):
            told = _IN_WORDS[what].get(word, f"{asked[what][1]} against {asked[what][0]}: take more seeds.")
            lines.append(told.format(today=today, best=best, one=one, many=many))
    for name in dict.fromkeys((today, best, one, many)):
        made = frame.filter(pl.col("protocol") == name)
        if done := made.filter(~COMPLETED).height:
            lines.append(
                f"But {name} does not complete {done} of {made.height} runs, and a downtime says nothing of these."
            )
    if (seeds := frame["seed"].n_unique()) < ENOUGH:
        lines.append(f"{seeds} seeds are enough to look, not to publish: take {ENOUGH}.")
    return lines


def _sentence(frame: pl.DataFrame, base: str, other: str, worth: float) -> tuple[str, str]:
    told = effect(frame, "downtime_ns", base, other)
    done = [frame.filter(COMPLETED & (pl.col("protocol") == name)).height for name in (base, other)]
    word = verdict(told, done[0], done[1], worth)
    words = told.told("ms", 1e6) if told else f"completed are {done[0]} and {done[1]} runs"
    return word, f"{other} against {base}: {words}: {word}."


_IN_WORDS = {
    "exists": {
        "shorter": "Take {best} before anything else: it exists, and it is shorter than {today}.",
        "longer": "Stay with {today}: {best} is longer here.",
        "next to nothing": "{best} brings next to nothing over {today}.",
        "only other completes": "Take {best}: {today} does not complete.",
        "only base completes": "Stay with {today}: {best} does not complete.",
        "neither completes": "Neither {today} nor {best} completes: too much is written, or the limit is too low.",
    },
    "v3": {
        "shorter": "v3 is worth a look for this device: {many} is shorter than {best}.",
        "longer": "Do not build v3 for this device: {many} is longer than {best}.",
        "next to nothing": "Do not build v3 for this device: {many} brings next to nothing over {best}.",
        "only other completes": "v3 is worth a look for this device: {best} does not complete.",
        "only base completes": "Do not build v3 for this device: {many} does not complete.",
        "neither completes": "Neither {best} nor {many} completes: nothing can be said.",
    },
    "streams": {
        "shorter": "Several dirty streams are part of that: {many} is shorter than {one}.",
        "longer": "One dirty stream is enough: {many} is longer than {one}.",
        "next to nothing": "One dirty stream is enough: {many} brings next to nothing over {one}.",
        "only other completes": "Several dirty streams are needed: {one} does not complete.",
        "only base completes": "One dirty stream is enough: {many} does not complete.",
    },
}
"""By the verdict."""
