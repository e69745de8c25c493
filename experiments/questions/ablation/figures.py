# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of ablation: in each case, waterfalls from v2's level down to v3's; and lines that cross or do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, Patch
from experiments.questions.ablation import question
from experiments.questions.ablation.question import BUSY, CASES, IDLE, N_FDS, RECONFIGURED, STEPS, TWO_FDS
from experiments.study.effects import Measure, mean
from experiments.study.statistics import Effect, Interval

SHORTER, LONGER, NONE = "#999999", "#D55E00", "white"
HATCHES = {LONGER: "////"}
DOWNTIME, SETUP, LAG, DRAIN, _ = question.MEASURES
LINES = (
    (BUSY, (TWO_FDS, N_FDS), style.wire("", "reconfigured, a connection a stream")),
    (IDLE, (TWO_FDS, N_FDS), style.Style("#777777", "", "never reconfigured", "o", (0, (6, 2)))),
    (
        BUSY,
        (question.TWO_FDS_ONE_CONNECTION, question.N_FDS_ONE_CONNECTION),
        style.wire("-one", "reconfigured, one connection"),
    ),
)
"""Case, protocols with N = 1 and 4, look."""


def figures(frame: pl.DataFrame, command: str) -> Mapping[str, Figure]:
    """Downtime step by step; set-up and lag; what N does with and without reconfigurations."""
    runs = dict(question.cases(frame))
    critical = [name for name in (RECONFIGURED, BUSY) if name in runs]
    return {
        "ablation": _waterfalls(
            "What does each step from v2 to v3 bring to the downtime?",
            [(runs[name], DOWNTIME, f"{name}: {CASES[name].about}", "downtime, ms") for name in runs],
            command,
        ),
        "ablation_critical": _waterfalls(
            "What does each step bring to critical data?",
            [(runs[name], of, f"{name}: {of.label}", "ms") for name in critical for of in (SETUP, LAG)],
            command,
        ),
        "ablation_crossed": _crossed(frame, command),
    }


def _waterfalls(question: str, shown: Sequence[tuple[pl.DataFrame, Measure, str, str]], command: str) -> Figure:
    """A waterfall for each of (runs, measure, title, x axis), two in a row."""
    rows = -(-max(1, len(shown)) // 2)
    seeds = ", ".join(dict.fromkeys(panels.seeds(runs) for runs, *_ in shown))
    note = f"{seeds} seeds; each step against the one before, paired by seed, in ms; black: its 95 % interval"
    figure, axes = panels.sheet(question, note, command, (rows, 2), (13, 0.8 + 3.1 * rows))
    for axis, (runs, measure, title, x) in zip(axes, shown, strict=False):
        _waterfall(axis, runs, measure.column)
        panels.dress(axis, title, x, "")
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    looks = {
        SHORTER: "the step takes off",
        LONGER: "the step adds",
        NONE: "no difference is shown: the interval holds 0",
    }
    handles = [Patch(facecolor=c, edgecolor="black", hatch=HATCHES.get(c), label=label) for c, label in looks.items()]
    panels.handles_below(figure, handles)
    return figure


def _waterfall(axis: Axes, runs: pl.DataFrame, column: str) -> None:
    """v2's mean, what each step adds or takes off to reach its own mean, and the last mean. Milliseconds, downwards."""
    found = question.steps(runs, column)
    names = list(STEPS)
    labels = [STEPS[names[0]], *(label for label, _ in found), names[-1]]
    means = [mean(runs, column, protocol=name) for name in names]
    widest = max((each.high for each in means if each), default=0.0) or 1.0
    _level(axis, means[0], names[0], 0)
    for at, (_, step) in enumerate(found, 1):
        after = means[at]
        if step is None or after is None:
            axis.text(0, at, "  no seed completed under both", va="center", fontsize=7)
        else:
            _step(axis, at, after.mean, step)
    _level(axis, means[-1], names[-1], len(labels) - 1)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(0, widest * 1.55)


def _level(axis: Axes, level: Interval | None, protocol: str, at: int) -> None:
    if level is None:
        axis.text(0, at, "  no run completed", va="center", fontsize=7)
        return
    axis.barh(at, level.mean, color=style.protocol(protocol).colour, edgecolor="black", linewidth=0.6, height=0.65)
    axis.plot([level.low, level.high], [at, at], color="black", linewidth=2)
    axis.text(max(level.mean, level.high), at, f"  {level.mean:.0f}", va="center", fontsize=7.5)


def _step(axis: Axes, at: int, after: float, step: Effect) -> None:
    """A bar that ends at `after`, so that seeds that are missing in the pairs do not add up along the way."""
    change = step.difference.per(1e6)
    colour = NONE if not step.shown else SHORTER if change.mean < 0 else LONGER
    before = after - change.mean
    look: dict[str, Any] = {"color": colour, "hatch": HATCHES.get(colour), "edgecolor": "black", "linewidth": 0.6}
    axis.barh(at, change.mean, left=before, height=0.65, **look)
    axis.plot([before, before], [at - 0.67, at + 0.33], color="#777777", linewidth=0.6)
    axis.plot([before + change.low, before + change.high], [at, at], color="black", linewidth=2)
    right = max(before, after, before + change.high)
    lost = f"; {step.lost} lost" if step.lost else ""
    text = f"  {change.mean:+z.1f} ({change.low:+z.1f} to {change.high:+z.1f}{lost})"
    axis.text(right, at, text, va="center", fontsize=7)


def _crossed(frame: pl.DataFrame, command: str) -> Figure:
    """N = 1 and 4, with and without reconfigurations: parallel lines are independent gains."""
    title = "Does what N gains hang on reconfigurations, or on the connections?"
    note = (
        f"{BUSY}: half the state saved when stopped, four engines; {panels.seeds(frame)} seeds, means with 95 % "
        "intervals. Parallel lines: the gains add up"
    )
    figure, axes = panels.sheet(title, note, command, (1, 3), (12, 4.4))
    for axis, measure in zip(axes, (DOWNTIME, SETUP, DRAIN), strict=True):
        for shift, (case, protocols, look) in enumerate(LINES):
            runs = frame.filter(case=case)
            known = [(at, mean(runs, measure.column, protocol=name)) for at, name in enumerate(protocols)]
            there = [(at + 0.03 * (shift - 1), of) for at, of in known if of]
            x, y = [at for at, _ in there], [of.mean for _, of in there]
            axis.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker)
            for at, of in there:
                axis.plot([at, at], [of.low, of.high], color=look.colour, linewidth=4, alpha=0.4)
        axis.set_xlim(-0.3, 1.3)
        panels.dress(axis, measure.label, "dirty streams (N)", "ms")
        axis.set_xticks([0, 1], ["1", "4"])
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    panels.handles_below(figure, [panels.handle(look) for _, _, look in LINES])
    return figure
