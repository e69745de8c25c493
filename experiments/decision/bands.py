# SPDX-License-Identifier: GPL-2.0-or-later
"""What each change brings on top of those above it, over samples: medians, bands, and how probably it is worth making.

All protocols are run on the same samples with the same seeds, and a gain is taken within each sample. A run that does
not complete is never left out of the downtime: it counts as longer than any that does. So a change that lets it
complete brings more than any number, one that makes it fail brings less, and one that leaves it failing brings 0.
Everything else than the downtime is of the runs that completed, and gains of the pairs that both did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from experiments.decision.ladder import Rung
from experiments.runs.frame import COMPLETED
from experiments.runs.pool import Cell
from experiments.study.claims import WORTH
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.protocol import Protocol
from sim.scenario.sample import Sample

Floats: TypeAlias = npt.NDArray[np.float64]
BAND = (0.05, 0.95)
"""The percentiles of a band."""
MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class DecisionQuantity:
    """Something that a change may bring less of."""

    label: str
    columns: tuple[str, ...]
    """Of the table of runs; they are added."""
    scale: float
    digits: int = 0
    """Shown behind the point."""


DOWNTIME = "downtime_ms"
LAG = "critical_lag_s"
PINNED = ("pinned_chunks_bytes", "pinned_images_bytes", "pinned_target_bytes")
QUANTITIES = {
    DOWNTIME: DecisionQuantity("downtime, ms", ("downtime_ns",), 1e6),
    "stop_ms": DecisionQuantity("stop, ms", ("phase_stop_ns",), 1e6, 1),
    "critical_lag_s": DecisionQuantity("lag, s", ("critical_lag_max_ns",), 1e9, 2),
    "total_s": DecisionQuantity("total, s", ("total_ns",), 1e9, 2),
    "again_mib": DecisionQuantity("again, MiB", ("device_bytes_resent",), MIB),
    "pinned_mib": DecisionQuantity("pinned, MiB", PINNED, MIB),
}
"""By name, which ends in the unit. In each, less is better."""


@dataclass(frozen=True, slots=True)
class SampleBand:
    """A median with its band. An end is infinite where runs that do not complete reach it."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """From low to high; 0 where both are infinite alike."""
        return 0.0 if self.low == self.high else self.high - self.low

    @classmethod
    def of(cls, values: npt.ArrayLike) -> SampleBand | None:
        """Of values of which those that are no number are left out; None if nothing is left.

        Each of the three is one of the values, so that infinite ones need no arithmetic.
        """
        array = np.asarray(values, dtype=float)
        array = array[~np.isnan(array)]
        if not len(array):
            return None
        low, middle, high = np.quantile(array, [BAND[0], 0.5, BAND[1]], method="inverted_cdf")
        return cls(float(middle), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Brought:
    """A row: what it is like with a change and all above it, and what the change brings on top of the row above."""

    rung: Rung
    samples: int = 0
    """0: it was not run."""
    failed: int = 0
    """Runs that did not complete, however they ended."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """How they ended."""
    levels: Mapping[str, SampleBand | None] = field(default_factory=dict)
    """By quantity."""
    brings: Mapping[str, SampleBand | None] = field(default_factory=dict)
    """By quantity: how much less than in the row above, in the same sample; below 0: more."""
    brings_percent: SampleBand | None = None
    """Of the downtime of the row above."""
    in_all_ms: SampleBand | None = None
    """How much less downtime than in the first row."""
    in_all_percent: SampleBand | None = None
    """The same, of the downtime of the first row."""
    fewer_failures: int = 0
    """Than in the row above."""
    probability: float | None = None
    """In which part of the samples it brings more than WORTH of the downtime. None: it is the first row."""
    gains_percent: Floats = field(default_factory=lambda: np.empty(0))
    """In each sample; infinite where one of the two does not complete."""

    @property
    def made(self) -> bool:
        """Whether it was run."""
        return self.samples > 0


def cells(rows: Sequence[Rung], machines: Mapping[int, Sample]) -> list[Cell]:
    """The runs of all rows, machine by machine; `machines` has each by the seed of its runs."""
    return [
        Cell(machine.scenario, Protocol.parse(row.protocol, machine.scenario), seed)
        for seed, machine in machines.items()
        for row in run_rows(rows)
    ]


def run_rows(rows: Sequence[Rung]) -> list[Rung]:
    """Those that are run."""
    return [row for row in rows if not row.nothing]


def brought(rows: Sequence[Rung], runs: pl.DataFrame) -> list[Brought]:
    """What each row brings. `runs` has one run a row and sample, paired by `seed`.

    A row is held against the row above it; v3's first one against the best v2 (`best`), for nobody would make a change
    that makes it worse, and in its critical lag against the v2 with the least, which other changes were made for. A
    protocol that this scenario's devices or VMM do not support is no row to stand on: those below it are held against
    the one above it.
    """
    found: list[Brought] = []
    made: list[Mapping[str, Floats]] = []
    only_v2 = True
    for row in rows:
        own = runs.filter(protocol=row.protocol).sort("seed")
        if row.nothing or own.is_empty():
            found.append(Brought(row))
            continue
        outcomes = dict(own["outcome"].value_counts(sort=True).iter_rows())
        if outcomes.keys() == {OutcomeKind.UNSUPPORTED.value}:
            found.append(Brought(_refused(row, own), outcomes=outcomes))
            continue
        values = _values(own)
        failed = own.filter(~COMPLETED).height
        if not made:
            none = SampleBand(0.0, 0.0, 0.0)
            of_all: dict[str, Any] = {"in_all_ms": none, "in_all_percent": none}
        else:
            first = made[0]
            above = made[-1]
            if only_v2 and row.protocol.startswith("v3"):
                above = best(made) | {LAG: best(made, LAG)[LAG]}
            gains = gains_percent(above[DOWNTIME], values[DOWNTIME])
            of_all = {
                "brings": _bands({name: less(above[name], values[name]) for name in QUANTITIES}),
                "brings_percent": SampleBand.of(gains),
                "in_all_ms": SampleBand.of(less(first[DOWNTIME], values[DOWNTIME])),
                "in_all_percent": SampleBand.of(gains_percent(first[DOWNTIME], values[DOWNTIME])),
                "fewer_failures": int(np.isinf(above[DOWNTIME]).sum()) - failed,
                "probability": float(np.mean(gains > 100 * WORTH)),
                "gains_percent": gains,
            }
        found.append(Brought(row, own.height, failed, outcomes, _bands(values), **of_all))
        only_v2 = only_v2 and row.protocol.startswith("v2")
        made.append(values)
    return found


def best(rows: Sequence[Mapping[str, Floats]], of: str = DOWNTIME) -> dict[str, Floats]:
    """The best of several rows, in each sample: of those that complete there, the row with the least median of a
    quantity.

    A run that does not complete is longer than any other in the medians; of equal ones the last row counts. It is no
    least of all rows in each sample: that would be less than any of them by the runs' spread alone.
    """
    downtimes = np.array([row[DOWNTIME] for row in rows])
    done = np.isfinite(downtimes)
    values = np.array([np.where(np.isfinite(row[of]), row[of], np.inf) for row in rows])
    medians = np.quantile(values, 0.5, axis=1, method="inverted_cdf")
    order = sorted(range(len(rows)), key=lambda at: (medians[at], -at))
    chosen = np.array(order)[done[order].argmax(axis=0)]
    return {name: np.array([row[name] for row in rows])[chosen, np.arange(downtimes.shape[1])] for name in QUANTITIES}


def less(above: Floats, there: Floats) -> Floats:
    """How much less it is than above, in each sample; 0 where neither completes."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(above) & np.isinf(there), 0.0, above - there)


def gains_percent(above: Floats, there: Floats) -> Floats:
    """The same of a downtime, in percent of that above; 0 where that is 0."""
    whole = np.where(np.isfinite(above) & (above > 0), above, 1.0)
    return np.where(above == 0, 0.0, 100 * less(above, there) / whole)


def _refused(row: Rung, runs: pl.DataFrame) -> Rung:
    return Rung(row.name, row.protocol, row.change, f"not supported: {runs['reason'][0]}")


def _values(runs: pl.DataFrame) -> dict[str, Floats]:
    """Each quantity in each sample. Where a run did not complete, the downtime is infinite, all else no number."""
    done = runs["outcome"].to_numpy() == OutcomeKind.COMPLETED.value
    return {
        name: np.where(
            done,
            sum(runs[column].cast(pl.Float64).fill_null(np.nan).to_numpy() for column in quantity.columns)
            / quantity.scale,
            np.inf if name == DOWNTIME else np.nan,
        )
        for name, quantity in QUANTITIES.items()
    }


def _bands(values: Mapping[str, Floats]) -> dict[str, SampleBand | None]:
    return {name: SampleBand.of(array) for name, array in values.items()}
