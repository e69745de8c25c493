# SPDX-License-Identifier: GPL-2.0-or-later
"""Protocols compared: downtimes seed by seed, and effects with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Figure, Line2D, own_settings
from experiments.draw.panels import MADE_BY
from experiments.runs import frame
from experiments.runs.frame import COMPLETED
from experiments.study.claims import WORTH
from experiments.study.verdicts import place
from sim.scenario.units import NS_PER_MS

VERDICT_COLOURS = {"shorter": "#2171B5", "longer": "#882255", "next to nothing": "#999999", "uncertain": "#E69F00"}


@own_settings()
def draw_seeds(
    runs: pl.DataFrame,
    protocols: Sequence[str] | None = None,
    made_by: str = MADE_BY,
    question: str = "Is the order the same for every seed?",
) -> Figure:
    """The downtime of each seed under each protocol (ms), one row a seed; of a table of runs of one place."""
    named = protocols or frame.protocols(runs)
    seeds = sorted(runs["seed"].unique())
    figure, (axis,) = panels.sheet(
        question,
        "a row is one seed: the same guest and firmware under each protocol; a run that was not completed has no mark",
        made_by,
        (1, 1),
        (10, 0.17 * len(seeds) + 2.4),
    )
    for at, seed in enumerate(seeds):
        of_seed = runs.filter(COMPLETED & (pl.col("seed") == seed) & pl.col("protocol").is_in(named))
        if of_seed.is_empty():
            continue
        downtime = dict(of_seed.select("protocol", pl.col("downtime_ns") / NS_PER_MS).iter_rows())
        axis.plot([min(downtime.values()), max(downtime.values())], [at, at], color="#CCCCCC", linewidth=1, zorder=1)
        for name, value in downtime.items():
            look = style.protocol(name)
            axis.plot([value], [at], look.marker, color=look.colour, markersize=6, zorder=2)
    panels.dress(axis, "", "downtime, ms", "seed")
    axis.set_yticks(range(len(seeds)), [str(seed) for seed in seeds])
    axis.set_xlim(left=0)
    panels.legend(figure, named)
    return figure


@own_settings()
def draw_changes(
    verdicts: pl.DataFrame,
    by: Sequence[str] = (),
    made_by: str = MADE_BY,
    question: str = "What changes the downtime?",
    worth: float = WORTH,
) -> Figure:
    """A table of `verdicts` as changes of the downtime (%) with their 95 % intervals; one panel a pair.

    `by` are the columns that name its places. A grey band shows `worth`, the least relative change that matters.
    """
    named = list(verdicts.select("base", "other").unique(maintain_order=True).iter_rows())
    rows = [verdicts.filter((pl.col("base") == base) & (pl.col("other") == other)) for base, other in named]
    figure, axes = panels.sheet(
        question,
        f"change of the downtime, %, with its 95 % interval; grey band: less than {100 * worth:.0f} %; x: no seed was "
        "completed under both",
        made_by,
        (1, len(named)),
        (max(7.0, 4.6 * len(named)), 0.27 * max(each.height for each in rows) + 2.6),
    )
    for axis, (base, other), some in zip(axes, named, rows, strict=True):
        axis.axvspan(-100 * worth, 100 * worth, color="#EEEEEE", zorder=0)
        axis.axvline(0, color="black", linewidth=0.8)
        for at, row in enumerate(some.iter_rows(named=True)):
            if row["ratio_mean"] is None:
                axis.text(0, at, f"x {row['verdict']}", fontsize=7, va="center", ha="center")
                continue
            mean, low, high = (100 * (row[f"ratio_{part}"] - 1) for part in ("mean", "low", "high"))
            colour = VERDICT_COLOURS[row["verdict"]]
            axis.plot([low, high], [at, at], color=colour, linewidth=3, alpha=0.5)
            axis.plot([mean], [at], "o", color=colour, markersize=5)
            axis.annotate(f"{mean:+.1f}", (mean, at), (0, 4), textcoords="offset points", fontsize=6.5, ha="center")
        panels.dress(axis, f"{other}\nagainst {base}", "change of the downtime, %", "")
        axis.set_yticks(range(some.height), some.select(place(by)).to_series() if by else [""] * some.height)
        axis.set_ylim(some.height - 0.3, -0.7)
        axis.margins(x=0.12)
    handles = [Line2D([], [], color=colour, marker="o", label=word) for word, colour in VERDICT_COLOURS.items()]
    panels.handles_below(figure, handles, 4)
    return figure
