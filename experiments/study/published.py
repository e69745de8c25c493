# SPDX-License-Identifier: GPL-2.0-or-later
"""Published figures against the means of the runs."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from experiments.runs.frame import COMPLETED, ms
from sim.scenario.tables import Published

COLUMNS = {
    "downtime_ms": "downtime_ns",
    "total_ms": "total_ns",
    "announce_and_start_ms": "phase_resume_ns",
    "src_saved_to_dst_loaded_ms": "stage_saved_to_loaded_0_ns",
}
"""The column of a published figure in the table of runs, if it is not the stage of the same name."""


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """A published figure against the mean of the runs. Milliseconds."""

    figure: str
    """The scenario's key; in a list, with the device's index: `device_save_ms.1`."""
    published_ms: float
    simulated_ms: float | None
    """None if no run was completed, or if the protocol has no such stage."""
    fitted: bool
    """True if a parameter was fitted to it; otherwise it is a prediction."""

    @property
    def what(self) -> str:
        """The figure in words."""
        return words(self.figure)

    @property
    def error(self) -> float | None:
        """Relative to the published figure."""
        return None if self.simulated_ms is None else self.simulated_ms / self.published_ms - 1


def words(figure: str) -> str:
    """A figure's key in words: `device_save_ms.1` is `device save 1`."""
    name, _, index = figure.partition(".")
    return f"{name.removesuffix('_ms').replace('_', ' ')} {index}".strip()


def held_against(published: Published, frame: pl.DataFrame) -> list[PublishedFigure]:
    """The published figures against the means of the completed runs under the same protocol."""
    runs = frame.filter(COMPLETED, protocol=published.protocol)
    return [
        PublishedFigure(figure, expected, _mean_ms(runs, figure), figure in published.fitted)
        for figure, expected in published.figures().items()
    ]


def _mean_ms(runs: pl.DataFrame, figure: str) -> float | None:
    """A published figure's mean over the runs; None if they do not have it."""
    name, _, index = figure.partition(".")
    columns = [COLUMNS.get(name, f"stage_{name.removesuffix('_ms')}_{index or 0}_ns")]
    if name == "load_waiting_mean_ms":
        columns = [column for column in runs.columns if column.startswith("stage_load_waiting_")]
    means = [runs[column].mean() for column in columns if column in runs.columns]
    known = [ms(mean) for mean in means if mean is not None]
    return sum(known) / len(known) if known else None
