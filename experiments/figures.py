"""Figures. Each says its question, its units, its spread, and how it was made."""

from __future__ import annotations

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments import style
from experiments.results import PATH_COLUMNS, PHASE_COLUMNS, git_revision, versions
from experiments.tell import COMPLETED, ms, protocols
from proto_v3.timeline import PHASES, Resource
from sim.scenario import Scenario

PHASES_TOLD = (
    "stop: vCPUs and devices are stopped · drain: the source reads the last byte · transfer: it reaches the target · "
    "load: the device has it\nconfig: PCI and interrupts are loaded · resume: the guest runs"
)


def downtime(scenario: Scenario, frame: pl.DataFrame, command: str) -> Figure:
    """The downtime of each protocol as a waterfall of its phases, and its critical path by resource.

    `frame` has one row a run (experiments.results); runs that were not completed are named in the titles, not drawn.
    """
    completed = frame.filter(COMPLETED)
    named = protocols(completed)
    height = 1.45 * len(named) + 0.45 * len(named) + 2.6
    figure = Figure(figsize=(9.5, height), layout="constrained")
    panels = figure.subplots(
        len(named) + 1,
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [1.45] * len(named) + [0.45 * len(named) + 0.4]},
    )
    axes = list(panels[:, 0])
    for axis, name in zip(axes, named, strict=False):
        runs = completed.filter(pl.col("protocol") == name)
        _waterfall(axis, name, runs, frame.filter(pl.col("protocol") == name).height)
    if "v2" in named and scenario.published and scenario.published.downtime_ms:
        _published(axes[named.index("v2")], scenario.published.downtime_ms)
    _paths(axes[-1], completed, named)
    axes[-1].set_xlabel("ms since the order to stop the vCPUs")
    axes[-1].set_xlim(0, ms(completed["downtime_ns"].max()) * 1.17)
    seeds = frame["seed"].n_unique()
    figure.suptitle(f"Where does the downtime go? {scenario.name}, means over {seeds} seed(s)\n\n", fontsize=12)
    figure.text(0.5, 1 - 0.48 / height, PHASES_TOLD, ha="center", va="center", fontsize=7.5, color="#333333")
    made = f"{command}  |  proto-v3 {versions()['proto-v3']}, {git_revision()[:12]}"
    figure.supxlabel(made, fontsize=6.5, color="#555555", family="monospace")
    return figure


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


def _paths(axis: Axes, completed: pl.DataFrame, named: list[str]) -> None:
    used = set()
    for at, name in enumerate(named):
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
    axis.set_yticks(range(len(named)), named)
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
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, fontsize=8, frameon=False)
