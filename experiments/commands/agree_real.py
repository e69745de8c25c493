# SPDX-License-Identifier: GPL-2.0-or-later
"""The real part of `proto-v3 agree --real`: the sample driver's devices, made to be what the scenario says, migrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console

from experiments.commands.live import run_jobs, table
from experiments.commands.real import not_made, real_manifest
from experiments.runs.pool import Cell
from sim.live.processes.report import Note
from sim.live.processes.settings import Settings
from sim.real import sample_devices
from sim.real.run import RealResult, SideDevices, run_here
from sim.real.sample_parameters import module_parameters
from sim.real.scenario import of_devices, probed
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

if TYPE_CHECKING:
    from sim.real.sample_parameters import Parameters


def check(scenario: Scenario) -> Parameters:
    """The driver's parameters. UserError if its devices cannot be what the scenario says, or if there is no driver."""
    parameters = module_parameters(scenario)
    sample_devices.check()
    return parameters


def run_cells(
    scenario: Scenario, cells: Sequence[Cell], how: Settings, stderr: Console, *, quiet: bool
) -> tuple[pl.DataFrame, dict[str, Any], bool]:
    """Make the runs, one after the other, from one device to another; the table, what the manifest says of them, and
    whether Ctrl-C stopped it early."""
    with sample_devices.made(module_parameters(scenario), 2) as (here, there):
        source, target = SideDevices([here], None), SideDevices([there], None)
        found, way = probed(source.entries, None)
        chosen = of_devices(scenario, found)

        async def run(cell: Cell, watch: Callable[[Note], None]) -> RealResult:
            return await run_here(chosen, cell.protocol, cell.seed, how, source, target, watch)

        theirs = [Cell(chosen, Protocol.parse(cell.protocol.name, chosen), cell.seed) for cell in cells]
        done, interrupted = run_jobs(theirs, run, not_made, stderr, quiet=quiet)
        if not done:
            return pl.DataFrame(), {}, True
        told = real_manifest(done, how, found, way, target) | {"parameters": module_parameters(scenario)}
        return table([each.live for each in done], how), told, interrupted
