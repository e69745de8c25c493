# SPDX-License-Identifier: GPL-2.0-or-later
"""Published figures against the means of the runs, and against their band over what is plausible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
import polars as pl

from experiments.runs.frame import COMPLETED
from sim.scenario.tables import Published
from sim.scenario.units import NS_PER_MS

COLUMNS = {
    "downtime_ms": "downtime_ns",
    "total_ms": "total_ns",
    "announce_and_start_ms": "phase_resume_ns",
    "src_saved_to_dst_loaded_ms": "stage_saved_to_loaded_0_ns",
}
"""The column of a published figure in the table of runs, if it is not the stage of the same name."""
PERCENTILES = (5, 95)
"""The ends of a band."""
Kind = Literal["predicted", "sum", "fitted"]
KINDS: dict[Kind, str] = {
    "predicted": "predicted: nothing was fitted to the figure",
    "sum": "sum: of fitted figures, beside little else",
    "fitted": "fitted: a parameter was fitted to the figure",
}
"""What a figure says of the model, most first."""


@dataclass(frozen=True, slots=True)
class Band:
    """Where a figure is over samples of the scenario's ranges. Milliseconds."""

    low_ms: float
    """The 5th percentile."""
    high_ms: float
    """The 95th."""
    samples: int
    """How many samples completed."""


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """A published figure against the mean of the runs. Milliseconds."""

    figure: str
    """The scenario's key; in a list, with the device's index: `device_save_ms.1`."""
    published_ms: float
    simulated_ms: float | None
    """None if no run was completed, or if the protocol has no such stage."""
    kind: Kind
    """Whether a parameter was fitted to it, it is a sum of such figures, or it is a prediction."""
    band: Band | None = None
    """None if there are no samples, or if none has the figure."""

    @property
    def what(self) -> str:
        """The figure in words."""
        return words(self.figure)

    @property
    def fitted(self) -> bool:
        """Whether a parameter was fitted to it."""
        return self.kind == "fitted"

    @property
    def error(self) -> float | None:
        """Relative to the published figure."""
        return None if self.simulated_ms is None else self.simulated_ms / self.published_ms - 1

    @property
    def inside(self) -> bool | None:
        """Whether the published figure is inside the band; None without a band."""
        return None if self.band is None else self.band.low_ms <= self.published_ms <= self.band.high_ms


def words(figure: str) -> str:
    """A figure's key in words: `device_save_ms.1` is `device save 1`."""
    name, _, index = figure.partition(".")
    return f"{name.removesuffix('_ms').replace('_', ' ')} {index}".strip()


def held_against(
    published: Published, frame: pl.DataFrame, samples: pl.DataFrame | None = None
) -> list[PublishedFigure]:
    """The published figures against the means of the completed runs under the same protocol.

    `samples` are runs of samples of the scenario's ranges, one a sample; with them, each figure has its band.
    """
    runs = frame.filter(COMPLETED, protocol=published.protocol)
    sampled = None if samples is None else samples.filter(COMPLETED, protocol=published.protocol)
    held = []
    for figure, expected in published.figures().items():
        values = _values_ms(runs, figure)
        mean = sum(values) / len(values) if values else None
        band = None if sampled is None else _band(_values_ms(sampled, figure))
        held.append(PublishedFigure(figure, expected, mean, _kind(published, figure), band))
    return held


def median_and_worst(held: Sequence[PublishedFigure]) -> tuple[float, float] | None:
    """Of the absolute errors of the simulated ones, relative to what was published; None if none was simulated."""
    errors = [abs(one.error) for one in held if one.error is not None]
    return (median(errors), max(errors)) if errors else None


def _kind(published: Published, figure: str) -> Kind:
    if figure in published.fitted:
        return "fitted"
    return "sum" if figure in published.sums else "predicted"


def _band(values: Sequence[float]) -> Band | None:
    if not values:
        return None
    low, high = np.percentile(values, PERCENTILES)
    return Band(float(low), float(high), len(values))


def _values_ms(runs: pl.DataFrame, figure: str) -> list[float]:
    """A published figure in each of the runs that have it."""
    name, _, index = figure.partition(".")
    columns = [COLUMNS.get(name, f"stage_{name.removesuffix('_ms')}_{index or 0}_ns")]
    if name == "load_waiting_mean_ms":
        columns = [column for column in runs.columns if column.startswith("stage_load_waiting_")]
    known = [column for column in columns if column in runs.columns]
    if not known:
        return []
    values = runs.select(pl.mean_horizontal(pl.col(known).cast(pl.Float64)) / NS_PER_MS).to_series()
    return list(values.drop_nulls())
