"""The standard figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.figure import Figure

from experiments.api.tracing import completed_timeline
from experiments.draw import downtime, effects, panels, staircase
from experiments.runs.frame import COMPLETED
from experiments.study.claims import WORTH
from experiments.trace.traced_run import TracedRun
from proto_v3.errors import UserError
from sim.scenario.scenario import Scenario

MADE_BY = "experiments.api"
"""What a figure says at its foot if the caller names no command."""


def draw_downtime(scenario: Scenario, runs: pl.DataFrame, made_by: str = MADE_BY) -> Figure:
    """Where the downtime goes: its phases and its critical path under each protocol, means over seeds, ms.

    `runs` are of `compare` with this scenario. The foot of the figure shows `made_by`, such as the command of
    `compare_command`, and the project's version.
    """
    question = "Where does the downtime go?"
    return _nothing(question, made_by) if _none_completed(runs) else downtime.downtime(scenario, runs, made_by)


def draw_critical(scenario: Scenario, runs: pl.DataFrame, made_by: str = MADE_BY) -> Figure:
    """What late critical data costs under each protocol: downtime (ms), longest lag (s), objects, wasted bytes (MiB).

    A bar is a mean over seeds, a line reaches from the least to the most. Arguments as for `draw_downtime`.
    """
    question = "What does late critical data cost?"
    return _nothing(question, made_by) if _none_completed(runs) else downtime.critical(scenario, runs, made_by)


def draw_path(
    runs: Mapping[str, TracedRun], made_by: str = MADE_BY, question: str = "What did the downtime wait for?"
) -> Figure:
    """The critical path of single runs as a staircase, ms: a step down is another track or resource.

    `runs` has each run under the name that its panel shows. UserError if there is none, or if one was not completed.
    """
    if not runs:
        raise UserError("runs: must have at least one run")
    return staircase.staircase(question, {name: completed_timeline(run) for name, run in runs.items()}, made_by)


def draw_seeds(
    runs: pl.DataFrame,
    protocols: Sequence[str] | None = None,
    made_by: str = MADE_BY,
    question: str = "Is the order the same for every seed?",
) -> Figure:
    """The downtime of each seed under each protocol (ms), one row a seed; of a table of runs of one place."""
    return effects.dumbbells(question, runs, protocols or list(runs["protocol"].unique(maintain_order=True)), made_by)


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
    return effects.forest(question, verdicts, by, made_by, worth)


def _none_completed(runs: pl.DataFrame) -> bool:
    return runs.filter(COMPLETED).is_empty()


def _nothing(question: str, made_by: str) -> Figure:
    figure, (axis,) = panels.sheet(question, "", made_by, (1, 1), (9, 2))
    axis.text(0.5, 0.5, "no run was completed: there is no downtime", ha="center", transform=axis.transAxes)
    axis.axis("off")
    return figure
