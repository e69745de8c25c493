# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine fitted to the logs of one of its migrations."""

from __future__ import annotations

import os
from collections.abc import Sequence

import polars as pl

from experiments.api.running import Progress, outcomes_of, outside_of_loops
from experiments.commands.fit import changes_table, phases_table, quantities_table, steps_table
from experiments.decision.decision import what_brings
from experiments.logs.machine import FittedMachine, machine_of
from sim.scenario.units import NS_PER_MS


def fit(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    extends: str = "mlx5",
    cmdline: Sequence[str] = (),
    driver: Sequence[str] = (),
    migration: int | None = None,
    rename: Sequence[str] = (),
) -> FittedMachine:
    """A scenario of a real machine, from the logs of one migration: the source's and the target's.

    `.scenario` can be run, `.text` is its TOML file, `.notes` and `.clocks.told()` say what to know of the logs. The
    other arguments are those of `proto-v3 fit` (docs/fit.md). UserError for logs that cannot be used, with the reason.
    """
    return outside_of_loops(
        machine_of,
        os.fspath(source),
        os.fspath(target),
        extends=extends,
        cmdline=cmdline,
        driver=driver,
        migration=migration,
        rename=rename,
    )


def fitted_quantities(machine: FittedMachine) -> pl.DataFrame:
    """What the logs tell. Columns: parameter, value (as text; empty if it cannot be told), known (`measured`,
    `bounded`, `assumed`, `cannot be told`), low, high (bounds in the parameter's unit, null where there is none),
    source."""
    return pl.DataFrame(quantities_table(machine).rows, infer_schema_length=None)


def real_phases(machine: FittedMachine) -> pl.DataFrame:
    """The real downtime beside the simulated one. Columns: phase, real_ms, simulated_ms."""
    return pl.DataFrame(phases_table(machine).rows, infer_schema_length=None)


def real_steps(machine: FittedMachine) -> pl.DataFrame:
    """What each side did in the real downtime. Columns: from_ms (since the order to stop the vCPUs), step, device,
    side, real_ms, simulated_ms (null where a run has no such step)."""
    return pl.DataFrame(steps_table(machine).rows, infer_schema_length=None)


def what_would_help(
    machine: FittedMachine, samples: int = 32, *, jobs: int | None = 1, progress: Progress = False
) -> pl.DataFrame:
    """What multifd, more chunks and v3 would bring to a fitted machine, over what its logs leave open.

    A row is a change on top of those above it. Columns: change, protocol, downtime_ms_median, _low, _high,
    saves_percent_median, _low, _high (against the first row, within each sample; low and high: 5 and 95 %), completed,
    note (why it was not run). `decide` has all changes. `jobs` and `progress` as for `compare`.
    """
    own_ns = machine.simulated.downtime_ns
    own_ms = None if own_ns is None else own_ns / NS_PER_MS
    rows = what_brings(machine.scenario, samples, own_ms, lambda cells: outcomes_of(cells, jobs, progress))
    return pl.DataFrame(changes_table(rows).rows, infer_schema_length=None)
