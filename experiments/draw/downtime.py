# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of `proto-v3 compare` and `live`: where the downtime goes, and what late critical data costs."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from experiments.draw import panels, style
from experiments.draw.canvas import Axes, Figure, own_settings
from experiments.draw.panels import MADE_BY
from experiments.runs.frame import PATH_COLUMNS, PHASE_COLUMNS, completed_runs, ms, number, protocols
from experiments.study.effects import Measure
from proto_v3.timeline import PHASES
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

PHASES_NOTE = (
    "stop: vCPUs and devices are stopped · drain: the source reads the last byte · transfer: it reaches the target · "
    "load: the device has it\nconfig: PCI and interrupts are loaded · resume: the guest runs"
)

MAX_WATERFALLS = 6
"""With more protocols, only the critical paths are drawn: the waterfalls would not fit a page."""
CRITICAL = (
    Measure("downtime", "downtime_ns"),
    Measure("longest critical lag", "critical_lag_max_ns", 1e9, "s"),
    Measure("late critical data", "late_critical_objects", 1, "objects"),
    Measure("sent in vain", "device_bytes_wasted", MIB, "MiB"),
)
"""The panels of draw_critical()."""


@own_settings()
def draw_downtime(scenario: Scenario, runs: pl.DataFrame, made_by: str = MADE_BY) -> Figure:
    """Where the downtime goes: its phases and its critical path under each protocol, means over seeds, ms.

    `runs` are of `compare` with this scenario. The foot of the figure shows `made_by`, such as the command of
    `compare_command`, and the project's version.
    """
    completed = completed_runs(runs)
    if completed.is_empty():
        return _nothing("Where does the downtime go?", made_by)
    named = protocols(completed)
    drawn = named if len(named) <= MAX_WATERFALLS else []
    figure = Figure(figsize=(9.5, 1.45 * len(drawn) + 0.45 * len(named) + 2.7), layout="constrained")
    rows = figure.subplots(
        len(drawn) + 2,
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [*[1.45] * len(drawn), 0.45 * len(named) + 0.4, 0.35]},
    )
    *axes, below = rows[:, 0]
    for axis, name in zip(axes, drawn, strict=False):
        _waterfall(axis, name, completed.filter(protocol=name), runs.filter(protocol=name).height)
    for published in scenario.published:
        if published.protocol in drawn and published.downtime_ms:
            axis, text = axes[drawn.index(published.protocol)], f"published: {published.downtime_ms:.0f} ms"
            axis.axvline(published.downtime_ms, color="black", linestyle=":", linewidth=1.2)
            panels.beside(axis, text, published.downtime_ms, -0.5, -4)
    _paths(axes[-1], below, completed, {name: _label(name, runs) for name in named})
    axes[-1].tick_params(labelbottom=True)
    axes[-1].set_xlabel("ms since the order to stop the vCPUs")
    axes[-1].set_xlim(0, ms(completed["downtime_ns"].max()) * 1.17)
    live = ", live" if "clock" in runs.columns else ""
    title = f"Where does the downtime go? {scenario.name}{live}, means over {runs['seed'].n_unique()} seed(s)"
    _frame(figure, title, PHASES_NOTE if drawn else _not_drawn(runs), made_by)
    return figure


@own_settings()
def draw_critical(scenario: Scenario, runs: pl.DataFrame, made_by: str = MADE_BY) -> Figure:
    """What late critical data costs under each protocol: downtime (ms), longest lag (s), objects, wasted bytes (MiB).

    A bar is a mean over seeds, a line reaches from the least to the most. Arguments as for `draw_downtime`.
    """
    completed = completed_runs(runs)
    if completed.is_empty():
        return _nothing("What does late critical data cost?", made_by)
    named = protocols(completed)
    figure = Figure(figsize=(11, 0.42 * len(named) + 2.3), layout="constrained")
    axes = figure.subplots(1, len(CRITICAL), sharey=True)
    for axis, measure in zip(axes, CRITICAL, strict=True):
        for at, name in enumerate(named):
            _mean_bar(axis, at, name, completed.filter(protocol=name), measure)
        panels.heading(axis, measure.label)
        axis.set_xlabel(measure.unit)
        axis.set_xlim(0, max(number((completed[measure.column] / measure.scale).max()) * 1.25, 1e-9))
        panels.bars(axis)
    axes[0].set_yticks(range(len(named)), [_label(name, runs) for name in named])
    axes[0].set_ylim(len(named) - 0.5, -0.5)
    seeds = f"{runs['seed'].n_unique()} seed(s); bars: means, lines: least to most"
    _frame(figure, f"What does late critical data cost? {scenario.name}, {seeds}", _not_drawn(runs), made_by)
    return figure


def _nothing(question: str, made_by: str) -> Figure:
    figure, (axis,) = panels.sheet(question, "", made_by, (1, 1), (9, 2))
    panels.say(axis, "no run was completed: there is no downtime")
    axis.axis("off")
    return figure


def _frame(figure: Figure, title: str, note: str, made_by: str) -> None:
    """The title, small print below it, and how the figure was made."""
    figure.suptitle(f"{title}\n\n", fontsize=12)
    above = 1 - 0.48 / figure.get_figheight()
    figure.text(0.5, above, note, ha="center", va="center", fontsize=7.5, color="#333333")
    panels.say_how_made(figure, made_by)


def _label(name: str, frame: pl.DataFrame) -> str:
    """A protocol's name, and the number of runs in its bar, if they are not all."""
    runs = frame.filter(protocol=name)
    done = completed_runs(runs).height
    return name if done == runs.height else f"{name}\n({done} of {runs.height} runs)"


def _not_drawn(frame: pl.DataFrame) -> str:
    """The protocols that have no bar, and why."""
    without = [name for name in protocols(frame) if name not in protocols(completed_runs(frame))]
    if not without:
        return "every protocol's runs, as means"
    lines = [", ".join(without[at : at + 3]) for at in range(0, len(without), 3)]
    return "no run completed, so no bar: " + ",\n".join(lines)


def _mean_bar(axis: Axes, at: int, name: str, runs: pl.DataFrame, measure: Measure) -> None:
    values = runs[measure.column] / measure.scale
    mean, least, most = (number(value) for value in (values.mean(), values.min(), values.max()))
    style.bar(axis, at, mean, style.protocol(name))
    axis.plot([least, most], [at, at], color="black", linewidth=1.4)
    label = _rounded(mean)
    paused_ms = ms(runs["retries_stopped_ns"].mean())
    if measure.column == "downtime_ns" and paused_ms:
        label += f" (+ {_rounded(paused_ms)} paused)"
    panels.beside(axis, label, most, at)


def _rounded(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _waterfall(axis: Axes, name: str, runs: pl.DataFrame, planned: int) -> None:
    means = {phase: ms(runs[column].mean()) for phase, column in zip(PHASES, PHASE_COLUMNS, strict=True)}
    panels.waterfall(axis, means, style.protocol(name))
    downtime = runs["downtime_ns"]
    least, mean, most = ms(downtime.min()), ms(downtime.mean()), ms(downtime.max())
    axis.plot([least, most], [5.55, 5.55], color="black", linewidth=2, solid_capstyle="butt")
    kept = f"; {runs.height} of {planned} runs completed" if runs.height < planned else ""
    panels.heading(axis, f"{name}: {mean:.1f} ms (least {least:.1f}, most {most:.1f}: the black bar{kept})")
    axis.set_ylim(5.9, -0.6)


def _paths(axis: Axes, below: Axes, completed: pl.DataFrame, labels: Mapping[str, str]) -> None:
    """One bar a protocol, by its label; the legend of the resources is in the panel `below`."""
    columns = dict(zip(PATH_COLUMNS, style.RESOURCES.values(), strict=True)) | {
        "path_unexplained_ns": style.UNEXPLAINED
    }
    used = set()
    for at, name in enumerate(labels):
        runs, begin = completed.filter(protocol=name), 0.0
        for column, look in columns.items():
            if (mean := ms(runs[column].mean())) > 0:
                used.add(look)
                style.bar(axis, at, mean, look, left=begin)
                begin += mean
        panels.beside(axis, f"{begin:.0f}", begin, at)
    axis.set_yticks(range(len(labels)), list(labels.values()))
    axis.set_ylim(len(labels) - 0.5, -0.5)
    panels.heading(axis, "critical path by resource (sums, not in order of time)")
    panels.bars(axis)
    below.axis("off")
    handles = [style.patch(look) for look in columns.values() if look in used]
    below.legend(handles=handles, loc="center", ncols=4, fontsize=8, frameon=False)
