"""Figures. Each says its question, its units, its spread, and how it was made."""

from __future__ import annotations

import re
import textwrap

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments import __version__
from experiments.draw import style
from experiments.runs.frame import completed_runs, ms, number, protocols
from experiments.runs.manifest import git_revision
from experiments.runs.table import PATH_COLUMNS, PHASE_COLUMNS
from proto_v3.timeline import PHASES, Resource
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

PHASES_TOLD = (
    "stop: vCPUs and devices are stopped · drain: the source reads the last byte · transfer: it reaches the target · "
    "load: the device has it\nconfig: PCI and interrupts are loaded · resume: the guest runs"
)

MAX_WATERFALLS = 6
"""Of more protocols, only the critical paths are drawn: a figure of waterfalls would not fit a page."""


def downtime(scenario: Scenario, frame: pl.DataFrame, command: str, how: str = "") -> Figure:
    """The downtime of each protocol as a waterfall of its phases, and its critical path by resource.

    `frame` has one row a run (experiments.runs.table); runs that were not completed are named in the titles, not drawn.
    `how` they were made is said in the title, if it was not in virtual time.
    """
    completed = completed_runs(frame)
    named = protocols(completed)
    drawn = named if len(named) <= MAX_WATERFALLS else []
    height = 1.45 * len(drawn) + 0.45 * len(named) + 2.7
    figure = Figure(figsize=(9.5, height), layout="constrained")
    panels = figure.subplots(
        len(drawn) + 2,
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [*[1.45] * len(drawn), 0.45 * len(named) + 0.4, 0.35]},
    )
    *axes, below = panels[:, 0]
    for axis, name in zip(axes, drawn, strict=False):
        runs = completed.filter(pl.col("protocol") == name)
        _waterfall(axis, name, runs, frame.filter(pl.col("protocol") == name).height)
    for published in scenario.published:
        if published.protocol in drawn and published.downtime_ms:
            _published(axes[drawn.index(published.protocol)], published.downtime_ms)
    _paths(axes[-1], below, completed, [_labelled(name, frame) for name in named])
    axes[-1].tick_params(labelbottom=True)
    axes[-1].set_xlabel("ms since the order to stop the vCPUs")
    axes[-1].set_xlim(0, ms(completed["downtime_ns"].max()) * 1.17)
    seeds = frame["seed"].n_unique()
    made = f", {how}" if how else ""
    title = f"Where does the downtime go? {scenario.name}{made}, means over {seeds} seed(s)\n\n"
    figure.suptitle(title, fontsize=12)
    told = PHASES_TOLD if drawn else _not_drawn(frame)
    _say_below_the_title(figure, told)
    say_how_made(figure, command)
    return figure


def _say_below_the_title(figure: Figure, told: str) -> None:
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.48 / height, told, ha="center", va="center", fontsize=7.5, color="#333333")


CRITICAL = {
    "downtime": ("downtime_ns", 1e6, "ms"),
    "longest critical lag": ("critical_lag_max_ns", 1e9, "s"),
    "late critical data": ("late_critical_objects", 1, "objects"),
    "sent in vain": ("device_bytes_wasted", MIB, "MiB"),
}
"""Panel, column, what it is divided by, unit."""


def critical(scenario: Scenario, frame: pl.DataFrame, command: str) -> Figure:
    """What reconfigurations cost under each protocol, four panels; a bar is a mean, a line from least to most.

    `frame` as for downtime().
    """
    completed = completed_runs(frame)
    named = protocols(completed)
    height = 0.42 * len(named) + 2.3
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(1, len(CRITICAL), sharey=True)
    for axis, (title, (column, unit, told)) in zip(axes, CRITICAL.items(), strict=True):
        for at, name in enumerate(named):
            values = completed.filter(pl.col("protocol") == name)[column] / unit
            look = style.protocol(name)
            mean, least, most = (number(value) for value in (values.mean(), values.min(), values.max()))
            axis.barh(at, mean, height=0.7, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
            axis.plot([least, most], [at, at], color="black", linewidth=1.4)
            label = _rounded(mean)
            paused_ms = ms(completed.filter(pl.col("protocol") == name)["retries_stopped_ns"].mean())
            if column == "downtime_ns" and paused_ms:
                label += f" (+ {_rounded(paused_ms)} paused)"
            axis.annotate(label, (most, at), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center")
        axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        axis.set_xlabel(told)
        axis.set_xlim(0, max(number((completed[column] / unit).max()) * 1.25, 1e-9))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(named)), [label for _, label in [_labelled(name, frame) for name in named]])
    axes[0].set_ylim(len(named) - 0.5, -0.5)
    seeds = frame["seed"].n_unique()
    figure.suptitle(
        f"What does late critical data cost? {scenario.name}, {seeds} seed(s); bars: means, lines: least to most\n\n",
        fontsize=12,
    )
    _say_below_the_title(figure, _not_drawn(frame))
    say_how_made(figure, command)
    return figure


def _rounded(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _not_drawn(frame: pl.DataFrame) -> str:
    """Which protocols have no bar, and why."""
    without = [name for name in protocols(frame) if name not in protocols(completed_runs(frame))]
    if not without:
        return "every protocol's runs, as means"
    lines = [", ".join(without[at : at + 3]) for at in range(0, len(without), 3)]
    return "no run completed, so no bar: " + ",\n".join(lines)


def say_how_made(figure: Figure, command: str) -> None:
    """The command and the version, at the bottom."""
    figure.supxlabel(how_made(command), fontsize=6.5, color="#555555", family="monospace")


def how_made(command: str) -> str:
    """The same in words."""
    made = f"{command}  |  proto-v3 {__version__}, {git_revision()[:12]}"
    return textwrap.fill(re.sub(r",(?=\S)", ", ", made), 150, break_on_hyphens=False)  # lists of protocols are long


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
    axis.set_title(f"{name}: {mean:.1f} ms {spread}", loc="left", fontsize=9.5, fontweight="bold")
    axis.set_ylim(5.9, -0.6)
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def _labelled(name: str, frame: pl.DataFrame) -> tuple[str, str]:
    """A protocol, and what stands beside its bar: how many runs there are in it, if not all."""
    runs = frame.filter(pl.col("protocol") == name)
    done = completed_runs(runs).height
    return name, name if done == runs.height else f"{name}\n({done} of {runs.height} runs)"


def _paths(axis: Axes, below: Axes, completed: pl.DataFrame, named: list[tuple[str, str]]) -> None:
    used = set()
    unknown = False
    for at, (name, _) in enumerate(named):
        runs = completed.filter(pl.col("protocol") == name)
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
    axis.set_yticks(range(len(named)), [label for _, label in named])
    axis.set_ylim(len(named) - 0.5, -0.5)
    axis.set_title(
        "critical path by resource (sums, not in order of time)", loc="left", fontsize=9.5, fontweight="bold"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
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
