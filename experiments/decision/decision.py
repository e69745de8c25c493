# SPDX-License-Identifier: GPL-2.0-or-later
"""The decision for a scenario: what is run, and what comes of the runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from experiments.decision.bands import QUANTITIES, Brought, SampleBand, brought, cells
from experiments.decision.deciding import LEAST_SPREAD_PERCENT, Index, bounded, has_indices, indices
from experiments.decision.ladder import Rung, rungs
from experiments.decision.machines import Downtimes, Machines, machines
from experiments.decision.verdict import Verdict, verdicts
from experiments.runs.frame import table
from experiments.runs.pool import Cell
from proto_v3.errors import UserError
from sim.outcome import Outcome
from sim.scenario.sample import Sample
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS


@dataclass(frozen=True, slots=True)
class Study:
    """The runs of a decision."""

    scenario: Scenario
    rows: Sequence[Rung]
    machines: Machines

    @property
    def cells(self) -> list[Cell]:
        """The runs, machine by machine."""
        return cells(self.rows, self.machines)

    @property
    def samples(self) -> list[Sample]:
        """The machines, in their order."""
        return list(self.machines.values())


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of them."""

    scenario: Scenario
    samples: int
    rows: Sequence[Brought]
    indices: Mapping[str, Sequence[Index]]
    """By change: of the gain in percent, the largest first. Empty without SALib, or with too few samples."""
    verdicts: Sequence[Verdict]


def study(
    scenario: Scenario,
    count: int,
    changes: Collection[str] | None = None,
    near_ms: float | None = None,
    downtimes: Downtimes | None = None,
    *,
    screening: bool = True,
) -> Study:
    """The runs that decide on a scenario, over `count` samples of its ranges; on all changes, or on those named.

    With `near_ms`, they are machines of about this downtime; `downtimes` runs those among which they are searched. With
    `screening`, they run in larger pieces. A scenario without ranges has one sample, itself. UserError for a bad count
    or name, for values of the ranges that do not go together, and if no machine completes.
    """
    rows = rungs(scenario, changes)
    chosen = machines(scenario, count, rows[0], near_ms, downtimes, screening=screening)
    if not chosen:
        raise UserError(f"{scenario.name}: no sample of its ranges completes a migration as it is")
    return Study(scenario, rows, chosen)


def decide(made: Study, runs: pl.DataFrame) -> Decision:
    """What the finished runs of a study say."""
    rows = brought(made.rows, runs)
    found: dict[str, list[Index]] = {}
    if has_indices():
        samples = made.samples
        places = {key: [each.places[key] for each in samples] for key in samples[0].places}
        varied = [row for row in rows if row.brings_percent and row.brings_percent.spread >= LEAST_SPREAD_PERCENT]
        found = {row.rung.name: indices(places, bounded(row.gains_percent)) for row in varied}
    return Decision(made.scenario, len(made.machines), rows, found, list(verdicts(rows, found, made.samples)))


SHORT = ("multifd", "chunks4", "v3-n1", "v3-n4")
"""The changes that `fit` tries; `decide` tries all."""


def what_brings(
    scenario: Scenario, count: int, near_ms: float | None, run: Callable[[Sequence[Cell]], Sequence[Outcome]]
) -> list[Brought]:
    """What the changes of SHORT bring to a fitted machine of this downtime, over `count` samples, or fewer.

    `run` makes runs, and returns their outcomes in the order of the cells.
    """

    def downtimes_ms(cells: Sequence[Cell]) -> list[float | None]:
        return [None if each.downtime_ns is None else each.downtime_ns / NS_PER_MS for each in run(cells)]

    made = study(scenario, count, SHORT, near_ms, downtimes_ms)
    return brought(made.rows, table(run(made.cells)))


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
