# SPDX-License-Identifier: GPL-2.0-or-later
"""The decision for a scenario: what is run, and what comes of the runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from experiments.decision.bands import QUANTITIES, Brought, SampleBand, brought, cells
from experiments.decision.deciding import Index, bounded, has_indices, indices
from experiments.decision.ladder import Rung, rungs
from experiments.decision.verdict import Verdict, verdicts
from experiments.runs.pool import Cell
from sim.scenario.sample import Sample, draw
from sim.scenario.scenario import Scenario

SAMPLE_SEED = 0
FIRST_SEED = 1
"""Of the runs: each sample has one of its own, which all protocols share."""


@dataclass(frozen=True, slots=True)
class Study:
    """The runs of a decision."""

    scenario: Scenario
    rows: Sequence[Rung]
    samples: Sequence[Sample]
    cells: Sequence[Cell]
    """Sample by sample, each with all rows that are run."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of them."""

    scenario: Scenario
    samples: int
    rows: Sequence[Brought]
    indices: Mapping[str, Sequence[Index]]
    """By change: of the gain in percent, the largest first. Empty without SALib, or with too few samples."""
    verdicts: Sequence[Verdict]


def study(scenario: Scenario, count: int, changes: Collection[str] | None = None) -> Study:
    """The runs that decide on a scenario, over `count` samples of its ranges; on all changes, or on those named.

    A scenario without ranges has one sample, itself. UserError for a bad count or name, and for values of the ranges
    that do not go together.
    """
    rows = rungs(scenario, changes)
    samples = draw(scenario, count, SAMPLE_SEED)
    return Study(scenario, rows, samples, cells(rows, [each.scenario for each in samples], FIRST_SEED))


def decide(made: Study, runs: pl.DataFrame) -> Decision:
    """What the finished runs of a study say."""
    rows = brought(made.rows, runs)
    found: dict[str, list[Index]] = {}
    if has_indices():
        places = {key: [each.places[key] for each in made.samples] for key in made.samples[0].places}
        found = {
            row.rung.name: indices(places, bounded(row.gains_percent)) for row in rows if row.probability is not None
        }
    return Decision(made.scenario, len(made.samples), rows, found, list(verdicts(rows, found, made.samples)))


def rows_table(decision: Decision) -> pl.DataFrame:
    """One row a change, all numbers. Columns: change, where, protocol (empty: not run), nothing (why it is not run),
    needs; samples, failed, fewer_failures; probability; brings_percent and in_all_percent, and of each quantity its own
    value and what the change brings, as _median, _low, _high.

    A number that is infinite (a run did not complete) or unknown is null: `failed` says how many.
    """
    return pl.DataFrame([_row(row) for row in decision.rows], infer_schema_length=None).with_columns(
        pl.selectors.float().replace([float("inf"), float("-inf")], None)
    )


def _row(row: Brought) -> dict[str, Any]:
    change, rung = row.rung.change, row.rung
    told: dict[str, Any] = {
        "change": rung.name,
        "where": change.where if change else "",
        "protocol": rung.protocol if row.made else "",
        "nothing": rung.nothing,
        "needs": change.needs if change else "",
        "samples": row.samples,
        "failed": row.failed,
        "fewer_failures": row.fewer_failures if row.probability is not None else None,
        "probability": row.probability,
        **parts("brings_percent", row.brings_percent),
        **parts("in_all_percent", row.in_all_percent),
    }
    for name in QUANTITIES:
        told |= parts(name, row.levels.get(name)) | parts(f"{name}_brings", row.brings.get(name))
    return told


def parts(name: str, band: SampleBand | None) -> dict[str, float | None]:
    """A band as three columns."""
    return {f"{name}_{part}": None if band is None else getattr(band, part) for part in ("median", "low", "high")}


def indices_table(decision: Decision) -> pl.DataFrame:
    """Columns: change, parameter, first_order, half_width (of its 95 % interval)."""
    rows = [
        (change, each.key, each.first_order, each.half_width)
        for change, found in decision.indices.items()
        for each in found
    ]
    schema = {"change": pl.String, "parameter": pl.String, "first_order": pl.Float64, "half_width": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")
