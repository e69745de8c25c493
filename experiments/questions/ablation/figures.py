"""The figures of ablation: a waterfall a case, from v2's level down to v3's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.draw import panels as charts
from experiments.draw import style
from experiments.questions.ablation.grid import (
    BUSY,
    CASE,
    CASES,
    IDLE,
    N_FDS,
    N_FDS_ONE_CONNECTION,
    RECONFIGURED,
    STEPS,
    TWO_FDS,
    TWO_FDS_ONE_CONNECTION,
)
from experiments.runs.frame import COMPLETED
from experiments.study.statistics import Effect, Interval, interval

Steps = Sequence[tuple[str, Effect | None]]
Cases = Mapping[str, tuple[pl.DataFrame, Mapping[str, Steps]]]
"""By case: its runs, and by column what each step does."""
SHORTER, LONGER, NIL = "#999999", "#D55E00", "white"
WITH_CRITICAL = (RECONFIGURED, BUSY)
CROSSED = (("downtime", "downtime_ns"), ("set-up in the downtime", "setup_in_downtime_ns"), ("drain", "phase_drain_ns"))
LINES = (
    (BUSY, (TWO_FDS, N_FDS), style.wire("", "reconfigured, a connection a stream")),
    (IDLE, (TWO_FDS, N_FDS), style.Style("#777777", "", "never reconfigured", "o", (0, (6, 2)))),
    (
        BUSY,
        (TWO_FDS_ONE_CONNECTION, N_FDS_ONE_CONNECTION),
        style.wire("-one", "reconfigured, one connection"),
    ),
)
"""Case, protocols with N = 1 and 4, look."""


def figures(frame: pl.DataFrame, cases: Cases, command: str) -> Mapping[str, Figure]:
    """Downtime step by step; set-up and lag; what N does with and without reconfigurations."""
    return {
        "ablation": downtime(cases, command),
        "ablation_critical": critical(cases, command),
        "ablation_crossed": crossed(frame, command),
    }


def downtime(cases: Cases, command: str) -> Figure:
    """A waterfall for each case."""
    rows = -(-max(1, len(cases)) // 2)
    figure, axes = charts.sheet(
        "What does each step from v2 to v3 bring to the downtime?",
        f"{_seeds(cases)} seeds; each step against the one before, paired by seed, in ms; black: its 95 % interval",
        command,
        (rows, 2),
        (13, 0.8 + 3.1 * rows),
    )
    told = {case.name: case.told for case in CASES}
    for axis, (name, (runs, by_column)) in zip(axes, cases.items(), strict=False):
        waterfall(axis, runs, by_column["downtime_ns"], "downtime_ns")
        charts.dress(axis, f"{name}: {told.get(name, '')}", "downtime, ms", "")
    for axis in axes[len(cases) :]:
        axis.set_axis_off()
    _legend(figure)
    return figure


def critical(cases: Cases, command: str) -> Figure:
    """The same for set-up in the downtime and the longest lag, where there is critical data to speak of."""
    known = {name: cases[name] for name in WITH_CRITICAL if name in cases}
    figure, axes = charts.sheet(
        "What does each step bring to critical data?",
        f"{_seeds(cases)} seeds; each step against the one before, paired by seed, in ms; black: its 95 % interval",
        command,
        (max(1, len(known)), 2),
        (13, 0.8 + 3.1 * max(1, len(known))),
    )
    measures = (("set-up in the downtime", "setup_in_downtime_ns"), ("longest critical lag", "critical_lag_max_ns"))
    panels = [(name, what, column) for name in known for what, column in measures]
    for axis, (name, what, column) in zip(axes, panels, strict=False):
        runs, by_column = known[name]
        waterfall(axis, runs, by_column[column], column)
        charts.dress(axis, f"{name}: {what}", "ms", "")
    _legend(figure)
    return figure


def _seeds(cases: Cases) -> int:
    return max((runs["seed"].n_unique() for runs, _ in cases.values()), default=0)


def waterfall(axis: Axes, runs: pl.DataFrame, told: Steps, column: str) -> None:
    """v2's mean, what each step adds or takes off to come to its own, and the last one's. Milliseconds, downwards."""
    labels = [STEPS[0].label, *(label for label, _ in told), STEPS[-1].protocol]
    means = [_mean(runs, step.protocol, column) for step in STEPS]
    widest = max((mean.high for mean in means if mean), default=0.0) or 1.0
    _level(axis, means[0], STEPS[0].protocol, 0)
    for at, (_, of) in enumerate(told, 1):
        after = means[at]
        if of is None or after is None:
            axis.text(0, at, "  no seed completed under both", va="center", fontsize=7)
        else:
            _step(axis, at, after.mean, of)
    _level(axis, means[-1], STEPS[-1].protocol, len(labels) - 1)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(0, widest * 1.55)


def _mean(runs: pl.DataFrame, protocol: str, column: str) -> Interval | None:
    values = runs.filter(COMPLETED & (pl.col("protocol") == protocol))[column].drop_nulls()
    return interval(values.to_numpy() / 1e6) if len(values) else None


def _level(axis: Axes, told: Interval | None, protocol: str, at: int) -> None:
    if told is None:
        axis.text(0, at, "  no run completed", va="center", fontsize=7)
        return
    axis.barh(at, told.mean, color=style.protocol(protocol).colour, edgecolor="black", linewidth=0.6, height=0.65)
    axis.plot([told.low, told.high], [at, at], color="black", linewidth=2)
    axis.text(max(told.mean, told.high), at, f"  {told.mean:.0f}", va="center", fontsize=7.5)


def _step(axis: Axes, at: int, after: float, of: Effect) -> None:
    """A bar from before to `after`, so that seeds that were lost in the pairs do not add up along the way."""
    change = Interval(of.difference.mean / 1e6, of.difference.low / 1e6, of.difference.high / 1e6, of.pairs)
    colour = NIL if not of.shown else SHORTER if change.mean < 0 else LONGER
    before = after - change.mean
    hatch = "////" if colour == LONGER else ""
    axis.barh(at, change.mean, left=before, color=colour, edgecolor="black", hatch=hatch, linewidth=0.6, height=0.65)
    axis.plot([before, before], [at - 0.67, at + 0.33], color="#777777", linewidth=0.6)
    axis.plot([before + change.low, before + change.high], [at, at], color="black", linewidth=2)
    right = max(before, after, before + change.high)
    lost = f"; {of.lost} lost" if of.lost else ""
    ends = f"{_signed(change.low)} to {_signed(change.high)}"
    axis.text(right, at, f"  {_signed(change.mean)} ({ends}{lost})", va="center", fontsize=7)


def _signed(value: float) -> str:
    """Without a minus in front of 0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def _legend(figure: Figure) -> None:
    looks = (
        (SHORTER, "", "the step takes off"),
        (LONGER, "////", "the step adds"),
        (NIL, "", "no difference is shown: the interval holds 0"),
    )
    handles = [Patch(facecolor=c, edgecolor="black", hatch=hatch, label=label) for c, hatch, label in looks]
    charts.handles_below(figure, handles)


def crossed(frame: pl.DataFrame, command: str) -> Figure:
    """N = 1 and 4, with and without reconfigurations: parallel lines are independent gains."""
    figure, axes = charts.sheet(
        "Does what N gains hang on reconfigurations, or on the connections?",
        f"{BUSY}: half the state saved when stopped, four engines; {frame['seed'].n_unique()} seeds, means with 95 % "
        "intervals. Parallel lines: the gains add up",
        command,
        (1, len(CROSSED)),
        (12, 4.4),
    )
    for axis, (title, column) in zip(axes, CROSSED, strict=True):
        for shift, (case, protocols, look) in enumerate(LINES):
            runs = frame.filter(pl.col(CASE) == case)
            known = [(at, _mean(runs, name, column)) for at, name in enumerate(protocols)]
            there = [(at + 0.03 * (shift - 1), of) for at, of in known if of]
            x, y = [at for at, _ in there], [of.mean for _, of in there]
            axis.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker)
            for at, of in there:
                axis.plot([at, at], [of.low, of.high], color=look.colour, linewidth=4, alpha=0.4)
        axis.set_xlim(-0.3, 1.3)
        charts.dress(axis, title, "dirty streams (N)", "ms")
        axis.set_xticks([0, 1], ["1", "4"])
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    charts.handles_below(figure, [charts.handle(look) for _, _, look in LINES])
    return figure
