"""The figures of `proto-v3 compare`: where the downtime goes, and what late critical data costs.

Each shows its question, its units, its spread, and how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.draw import panels, style
from experiments.runs.frame import completed_runs, ms, number, protocols
from experiments.runs.table import PATH_COLUMNS, PHASE_COLUMNS
from experiments.study.effects import Measure
from proto_v3.timeline import PHASES, Resource
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

PHASES_NOTE = (
    "stop: vCPUs and devices are stopped · drain: the source reads the last byte · transfer: it reaches the target · "
    "load: the device has it\nconfig: PCI and interrupts are loaded · resume: the guest runs"
)

MAX_WATERFALLS = 6
"""With more protocols, only the critical paths are drawn: the waterfalls would not fit a page."""


def downtime(scenario: Scenario, frame: pl.DataFrame, command: str, how: str = "") -> Figure:
    """The downtime of each protocol as a waterfall of its phases, and its critical path by resource.

    `frame` has one row a run (experiments.runs.table). Runs that were not completed are not drawn; titles count them.
    `how` is for the title: how the runs were made, if not in virtual time.
    """
    completed = completed_runs(frame)
    named = protocols(completed)
    drawn = named if len(named) <= MAX_WATERFALLS else []
    height = 1.45 * len(drawn) + 0.45 * len(named) + 2.7
    figure = Figure(figsize=(9.5, height), layout="constrained")
    rows = figure.subplots(
        len(drawn) + 2,
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [*[1.45] * len(drawn), 0.45 * len(named) + 0.4, 0.35]},
    )
    *axes, below = rows[:, 0]
    for axis, name in zip(axes, drawn, strict=False):
        _waterfall(axis, name, completed.filter(protocol=name), frame.filter(protocol=name).height)
    for published in scenario.published:
        if published.protocol in drawn and published.downtime_ms:
            _published(axes[drawn.index(published.protocol)], published.downtime_ms)
    _paths(axes[-1], below, completed, {name: _label(name, frame) for name in named})
    axes[-1].tick_params(labelbottom=True)
    axes[-1].set_xlabel("ms since the order to stop the vCPUs")
    axes[-1].set_xlim(0, ms(completed["downtime_ns"].max()) * 1.17)
    seeds = frame["seed"].n_unique()
    made = f", {how}" if how else ""
    title = f"Where does the downtime go? {scenario.name}{made}, means over {seeds} seed(s)\n\n"
    figure.suptitle(title, fontsize=12)
    _note(figure, PHASES_NOTE if drawn else _not_drawn(frame))
    panels.say_how_made(figure, command)
    return figure


def _note(figure: Figure, text: str) -> None:
    """Small print below the title."""
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.48 / height, text, ha="center", va="center", fontsize=7.5, color="#333333")


CRITICAL = (
    Measure("downtime", "downtime_ns"),
    Measure("longest critical lag", "critical_lag_max_ns", 1e9, "s"),
    Measure("late critical data", "late_critical_objects", 1, "objects"),
    Measure("sent in vain", "device_bytes_wasted", MIB, "MiB"),
)
"""The panels."""


def critical(scenario: Scenario, frame: pl.DataFrame, command: str) -> Figure:
    """What reconfigurations cost under each protocol, four panels; a bar is a mean, a line from least to most.

    `frame` as for downtime().
    """
    completed = completed_runs(frame)
    named = protocols(completed)
    height = 0.42 * len(named) + 2.3
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(1, len(CRITICAL), sharey=True)
    for axis, measure in zip(axes, CRITICAL, strict=True):
        for at, name in enumerate(named):
            runs = completed.filter(protocol=name)
            values = runs[measure.column] / measure.scale
            look = style.protocol(name)
            mean, least, most = (number(value) for value in (values.mean(), values.min(), values.max()))
            axis.barh(at, mean, height=0.7, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
            axis.plot([least, most], [at, at], color="black", linewidth=1.4)
            label = _rounded(mean)
            paused_ms = ms(runs["retries_stopped_ns"].mean())
            if measure.column == "downtime_ns" and paused_ms:
                label += f" (+ {_rounded(paused_ms)} paused)"
            axis.annotate(label, (most, at), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
        panels.heading(axis, measure.label)
        axis.set_xlabel(measure.unit)
        axis.set_xlim(0, max(number((completed[measure.column] / measure.scale).max()) * 1.25, 1e-9))
        _bars(axis)
    axes[0].set_yticks(range(len(named)), [_label(name, frame) for name in named])
    axes[0].set_ylim(len(named) - 0.5, -0.5)
    seeds = frame["seed"].n_unique()
    figure.suptitle(
        f"What does late critical data cost? {scenario.name}, {seeds} seed(s); bars: means, lines: least to most\n\n",
        fontsize=12,
    )
    _note(figure, _not_drawn(frame))
    panels.say_how_made(figure, command)
    return figure


def _bars(axis: Axes, hidden: Sequence[str] = ("top", "right")) -> None:
    """The frame and the grid of a panel of horizontal bars."""
    axis.spines[list(hidden)].set_visible(False)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def _rounded(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _not_drawn(frame: pl.DataFrame) -> str:
    """The protocols that have no bar, and why."""
    without = [name for name in protocols(frame) if name not in protocols(completed_runs(frame))]
    if not without:
        return "every protocol's runs, as means"
    lines = [", ".join(without[at : at + 3]) for at in range(0, len(without), 3)]
    return "no run completed, so no bar: " + ",\n".join(lines)


def _published(axis: Axes, published_ms: float) -> None:
    axis.axvline(published_ms, color="black", linestyle=":", linewidth=1.2)
    axis.annotate(
        f"published: {published_ms:.0f} ms",
        (published_ms, -0.5),
        xytext=(-4, 0),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        va="center",
    )


def _waterfall(axis: Axes, name: str, runs: pl.DataFrame, planned: int) -> None:
    look = style.protocol(name)
    means = [ms(runs[column].mean()) for column in PHASE_COLUMNS]
    begin = 0.0
    for at, (phase, mean) in enumerate(zip(PHASES, means, strict=True)):
        axis.barh(at, mean, left=begin, height=0.8, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
        if at:
            axis.plot([begin, begin], [at - 1.4, at + 0.4], color="#888888", linewidth=0.7)
        begin += mean
        axis.annotate(
            f"{phase} {mean:.1f}",
            (begin, at),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    downtime = runs["downtime_ns"]
    least, mean, most = ms(downtime.min()), ms(downtime.mean()), ms(downtime.max())
    axis.plot([least, most], [5.55, 5.55], color="black", linewidth=2, solid_capstyle="butt")
    kept = f"; {runs.height} of {planned} runs completed" if runs.height < planned else ""
    spread = f"(least {least:.1f}, most {most:.1f}: the black bar{kept})"
    panels.heading(axis, f"{name}: {mean:.1f} ms {spread}")
    axis.set_ylim(5.9, -0.6)
    axis.set_yticks([])
    _bars(axis, ("top", "right", "left"))


def _label(name: str, frame: pl.DataFrame) -> str:
    """A protocol's name, and the number of runs in its bar, if they are not all."""
    runs = frame.filter(protocol=name)
    done = completed_runs(runs).height
    return name if done == runs.height else f"{name}\n({done} of {runs.height} runs)"


def _paths(axis: Axes, below: Axes, completed: pl.DataFrame, labels: Mapping[str, str]) -> None:
    """One bar a protocol, by its label; the legend of the resources is in the panel `below`."""
    used = set()
    unknown = False
    for at, name in enumerate(labels):
        runs = completed.filter(protocol=name)
        begin = 0.0
        for resource, column in zip(Resource, PATH_COLUMNS, strict=True):
            mean = ms(runs[column].mean())
            if mean <= 0:
                continue
            used.add(resource)
            look = style.RESOURCES[resource]
            axis.barh(
                at, mean, left=begin, height=0.7, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0
            )
            begin += mean
        if unexplained := ms(runs["path_unexplained_ns"].mean()):
            unknown = True
            look = style.UNEXPLAINED
            axis.barh(at, unexplained, left=begin, height=0.7, color=look.colour, hatch=look.hatch, edgecolor="#999999")
            begin += unexplained
        axis.annotate(f"{begin:.0f}", (begin, at), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
    axis.set_yticks(range(len(labels)), list(labels.values()))
    axis.set_ylim(len(labels) - 0.5, -0.5)
    panels.heading(axis, "critical path by resource (sums, not in order of time)")
    _bars(axis)
    handles = [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=look.label)
        for resource, look in style.RESOURCES.items()
        if resource in used
    ]
    if unknown:
        look = style.UNEXPLAINED
        handles.append(Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="#999999", label=look.label))
    below.axis("off")
    below.legend(handles=handles, loc="center", ncols=4, fontsize=8, frameon=False)
