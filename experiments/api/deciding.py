# SPDX-License-Identifier: GPL-2.0-or-later
"""What to change first, for a scenario."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import polars as pl

from experiments.api.running import Progress, of_scenario, outcomes_of
from experiments.decision.decision import Decision, indices_table, rows_table, study
from experiments.decision.decision import decide as decided
from experiments.runs.frame import table
from experiments.runs.pool import Cell
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS


def decide(
    scenario: Scenario | str,
    samples: int = 256,
    changes: Collection[str] | None = None,
    *,
    near_ms: float | None = None,
    jobs: int | None = 1,
    progress: Progress = False,
) -> Decision:
    """What each change brings on top of those above it, over plausible machines: what `proto-v3 decide` prints.

    The machines are samples of the scenario's ranges, and all protocols are run on the same ones. `changes` are names
    of rows, as `proto-v3 decide --changes` takes them; None: all. `near_ms` is the downtime of a machine as it is: of
    four times as many samples those within 15 % of it are taken. `jobs` and `progress` as for `compare`.

    `.verdicts` has the answers (`.word`, `.sentence`), `decision_rows` the table, `decision_indices` which parameter
    decides. UserError for an unknown scenario or change, for a bad number of samples, and for values of the ranges that
    do not go together.
    """

    def downtimes_ms(cells: Sequence[Cell]) -> list[float | None]:
        return [ns and ns / NS_PER_MS for ns in (each.downtime_ns for each in outcomes_of(cells, jobs, progress))]

    planned = study(of_scenario(scenario), samples, changes, near_ms, downtimes_ms)
    return decided(planned, table(outcomes_of(planned.cells, jobs, progress)))


def decision_rows(decision: Decision) -> pl.DataFrame:
    """The decision table, one row a change. Columns: change, where, protocol (empty: not run), nothing (why not), needs
    (what it needs that nobody has measured), samples, failed, fewer_failures (than in the row above), probability (that
    it takes more than 5 % off the downtime of the row above); brings_percent and in_all_percent (of the downtime,
    against the row above and the first one), and for downtime_ms, stop_ms, critical_lag_s, total_s, again_mib and
    pinned_mib the value, and NAME_brings, how much less it is than in the row above: each as _median, _low, _high (5
    and 95 %).

    A run that does not complete counts as longer than any that does. What is infinite by that is null."""
    return rows_table(decision)


def decision_indices(decision: Decision) -> pl.DataFrame:
    """Sobol's first-order indices of what each change takes off the downtime, %, the largest of each change first.

    Columns: change, parameter, first_order, half_width (of its 95 % interval). Empty without SALib (extra `indices`),
    and with fewer than 128 samples."""
    return indices_table(decision)
