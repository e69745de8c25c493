"""Figures of the notebooks: critical paths as stairs, downtimes seed by seed, effects with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.draw.downtime import downtime as downtime_figure
from experiments.runs.frame import COMPLETED
from experiments.study.advice import VERDICT_COLOURS, place
from experiments.study.experiment import WORTH
from experiments.trace.path import TOLD_MS, stretches
from proto_v3.timeline import Resource, Timeline
from sim.scenario.scenario import Scenario


def staircase(question: str, timelines: Mapping[str, Timeline], made_by: str) -> Figure:
    """The critical path of one run of each protocol as a staircase: each step down is another track or resource."""
    told = {name: stretches(timeline).filter(pl.col("takes_ms") >= TOLD_MS) for name, timeline in timelines.items()}
    rows = [path.height for path in told.values()]
    figure, axes = charts.sheet(
        question,
        f"one run each; what takes less than {TOLD_MS:g} ms is left out, and what happens beside it is not on the path",
        made_by,
        (len(told), 1),
        (10, 0.19 * sum(rows) + 0.8 * len(told) + 1.3),
    )
    if grid := axes[0].get_gridspec():
        grid.set_height_ratios(rows)
    most = max(timeline.downtime_ns for timeline in timelines.values()) / 1e6
    for axis, (name, path) in zip(axes, told.items(), strict=True):
        for at, (from_ms, takes_ms, resource, what, track, _) in enumerate(path.iter_rows()):
            look = style.RESOURCES[Resource[resource]]
            axis.barh(
                at, takes_ms, left=from_ms, height=0.9, color=look.colour, hatch=look.hatch, edgecolor="white", lw=0
            )
            axis.text(from_ms + takes_ms, at, f" {takes_ms:.1f} {what} ({track})", fontsize=7, va="center")
        charts.dress(axis, f"{name}: {timelines[name].downtime_ns / 1e6:.1f} ms", "ms since the order to stop", "")
        axis.set_ylim(path.height, -1)
        axis.set_yticks([])
        axis.set_xlim(0, 1.3 * most)
    looks = style.RESOURCES.values()
    handles = [Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=look.label) for look in looks]
    charts.handles_below(figure, handles, 4)
    return figure


def waterfall(scenario: Scenario, frame: pl.DataFrame, made_by: str) -> Figure:
    """The downtime's phases and critical path (experiments.draw.downtime.downtime); one that says so if nothing
    completed."""
    if frame.filter(COMPLETED).height:
        return downtime_figure(scenario, frame, made_by)
    figure, (axis,) = charts.sheet("Where does the downtime go?", "", made_by, (1, 1), (9, 2))
    axis.text(0.5, 0.5, "no run was completed: there is no downtime", ha="center", transform=axis.transAxes)
    axis.axis("off")
    return figure


def dumbbells(question: str, frame: pl.DataFrame, named: Sequence[str], made_by: str) -> Figure:
    """The downtime of each seed under each protocol, one row a seed: is the order the same in every row?"""
    seeds = sorted(frame["seed"].unique())
    figure, (axis,) = charts.sheet(
        question,
        "a row is one seed: the same guest and firmware under each protocol; a run that was not completed has no mark",
        made_by,
        (1, 1),
        (10, 0.17 * len(seeds) + 2.4),
    )
    for at, seed in enumerate(seeds):
        of_seed = frame.filter(COMPLETED & (pl.col("seed") == seed) & pl.col("protocol").is_in(named))
        if of_seed.is_empty():
            continue
        downtime = dict(of_seed.select("protocol", pl.col("downtime_ns") / 1e6).iter_rows())
        axis.plot([min(downtime.values()), max(downtime.values())], [at, at], color="#CCCCCC", linewidth=1, zorder=1)
        for name, value in downtime.items():
            look = style.protocol(name)
            axis.plot([value], [at], look.marker, color=look.colour, markersize=6, zorder=2)
    charts.dress(axis, "", "downtime, ms", "seed")
    axis.set_yticks(range(len(seeds)), [str(seed) for seed in seeds])
    axis.set_xlim(left=0)
    charts.legend(figure, named)
    return figure


def forest(question: str, table: pl.DataFrame, by: Sequence[str], made_by: str) -> Figure:
    """Each row of a table of verdicts as the change of the downtime with its interval; one panel a pair."""
    named = list(table.select("base", "other").unique(maintain_order=True).iter_rows())
    rows = [table.filter((pl.col("base") == base) & (pl.col("other") == other)) for base, other in named]
    figure, axes = charts.sheet(
        question,
        f"change of the downtime, %, with its 95 % interval; grey band: less than {100 * WORTH:.0f} %; x: no seed was "
        "completed under both",
        made_by,
        (1, len(named)),
        (max(7.0, 4.6 * len(named)), 0.27 * max(each.height for each in rows) + 2.6),
    )
    for axis, (base, other), some in zip(axes, named, rows, strict=True):
        axis.axvspan(-100 * WORTH, 100 * WORTH, color="#EEEEEE", zorder=0)
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
        charts.dress(axis, f"{other}\nagainst {base}", "change of the downtime, %", "")
        axis.set_yticks(range(some.height), some.select(place(by)).to_series())
        axis.set_ylim(some.height - 0.3, -0.7)
        axis.margins(x=0.12)
    handles = [Line2D([], [], color=colour, marker="o", label=word) for word, colour in VERDICT_COLOURS.items()]
    charts.handles_below(figure, handles, 4)
    return figure
