# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 agree`: the same scenario in virtual time and live, with the same seeds; every figure with its ratio. With
`--real`, devices of the sample driver in the running kernel are a third column.

It shows whether the simulator's answers are artefacts of the simulator. Figures are medians, because anything else that
the machine does can disturb a live run. The remaining difference is what the simulator leaves out: docs/live.md.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.live import live_manifest, live_run, not_made, prepared, run_jobs, table, warn
from experiments.commands.options import out_folder
from experiments.report import tables
from experiments.report.tables import Heading, Output, Section
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED, protocols
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, run_cells
from proto_v3.timeline import PHASES, Resource
from proto_v3.vmm.migration import OutcomeKind
from sim.live.processes.settings import Settings
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB, NS_PER_S

AIM = 0.10
"""The largest relative difference of downtime and throughput that is aimed at."""
AIMED_AT = ("downtime", "throughput")
RATIOS = {"live": "ratio", "real": "real_ratio"}
"""How a run may be made besides in virtual time, and the column of its ratio to that."""
NEGLIGIBLE = 0.01
"""A share of the downtime. The ratio of a smaller part says nothing."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A figure of a run, as an expression over the table of runs."""

    name: str
    unit: str
    value: pl.Expr


def _ms(column: str) -> pl.Expr:
    return pl.col(column) / 1e6


# From the end of set-up to the source's last byte: what of the devices was read in that time.
_MOVING_NS = pl.col("total_ns") - pl.sum_horizontal(
    "stage_setup_0_ns", *(f"phase_{name}_ns" for name in ("transfer", "load", "config", "resume"))
)

FIGURES = [
    Quantity("downtime", "ms", _ms("downtime_ns")),
    Quantity("throughput", "MiB/s", pl.col("device_bytes") / MIB / _MOVING_NS * NS_PER_S),
    Quantity("total", "ms", _ms("total_ns")),
    *[Quantity(f"phase {name}", "ms", _ms(f"phase_{name}_ns")) for name in PHASES],
    *[Quantity(f"path {each.name.lower()}", "ms", _ms(f"path_{each.name.lower()}_ns")) for each in Resource],
    Quantity("path unexplained", "ms", _ms("path_unexplained_ns")),
    Quantity("set-up in downtime", "ms", _ms("setup_in_downtime_ns")),
    Quantity("longest critical lag", "ms", _ms("critical_lag_max_ns")),
    Quantity("late critical objects", "", pl.col("late_critical_objects")),
    Quantity("read() in a lock", "ms", _ms("read_lock_ns")),
    Quantity("bytes of the devices", "MiB", pl.col("device_bytes") / MIB),
    Quantity("bytes on the wire", "MiB", pl.col("wire_bytes") / MIB),
    Quantity("read() calls", "", pl.col("reads")),
]


def run_agree(
    scenario: str,
    protocols: Sequence[str],
    seeds: Sequence[int],
    how: Settings,
    out: str | None,
    command: Sequence[str],
    settings: Sequence[str],
    *,
    real: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded, chosen = prepared(scenario, protocols, settings, how)
    cells = [Cell(loaded, protocol, seed) for seed in seeds for protocol in chosen]
    if real:
        from experiments.commands import agree_real

        agree_real.check(loaded)
    planned = (3 if real else 2) * len(cells)
    plan = Plan(command, [scenario], planned, writes=("runs", "agree"))
    with ResultFolder(out_folder(out, f"agree-{loaded.name}"), plan, force=force) as folder:
        output, stderr = Output(as_json, quiet), Console(stderr=True)
        warn(stderr, loaded)
        simulated, interrupted = run_cells(cells, None, quiet=quiet)
        if interrupted:
            return INTERRUPTED
        live, interrupted = run_jobs(cells, live_run(how), not_made, stderr, quiet=quiet)
        if interrupted:
            stderr.print("interrupted: nothing was written", markup=False)
            return INTERRUPTED
        virtual = results.table(simulated).with_columns(clock=pl.lit("virtual"))
        frame = pl.concat([virtual, table(live, how)], how="diagonal_relaxed")
        measured = {"live": live_manifest(live, how)}
        if real:
            of_devices, measured["real"], interrupted = agree_real.run_cells(loaded, cells, how, stderr, quiet=quiet)
            if interrupted:
                stderr.print("interrupted: nothing was written", markup=False)
                return INTERRUPTED
            frame = pl.concat([frame, of_devices.with_columns(clock=pl.lit("real"))], how="diagonal_relaxed")
        compared = compare(frame)
        how_made = manifest.of_scenario(loaded, scenario, command, frame, planned)
        try:
            folder.write_table(frame, "runs", "parquet")
            folder.write_table(compared, "agree", "parquet")
            folder.write_manifest(how_made | measured)
        finally:  # the results are printed if the disk is full, too
            named = compared["protocol"].unique(maintain_order=True)
            output.results(
                {"command": "agree", "scenario": loaded.name, "folder": str(folder.folder)},
                f"{loaded.name}, {_made(compared)}: {loaded.description}",
                verdicts(compared) or [f"No protocol was completed in all of them: {_made(compared)}."],
                [tables.outcomes(frame, ("protocol", "clock")), *(_section(compared, name) for name in named)],
            )
        drawn = output.drawn(lambda: _draw(folder, loaded, frame, compared, command))
        folder.commit()
    output.files(folder.folder, ["runs.parquet", "agree.parquet"], drawn, folder.why_there)
    failed = OutcomeKind.FAILED.value in frame["outcome"] or drawn is None
    return 1 if failed or not within_aim(compared) else 0


def compare(frame: pl.DataFrame) -> pl.DataFrame:
    """The medians of the completed runs: one row a protocol and figure, with the ratio of live to virtual, and of real
    to virtual if there are real runs.

    A ratio is null where the figure is 0 in virtual time, or too small to say anything.
    """
    clocks = ["virtual", *(clock for clock in RATIOS if clock == "live" or clock in frame["clock"])]
    values = frame.filter(COMPLETED).select(
        "protocol", "clock", *(each.value.cast(pl.Float64).alias(each.name) for each in FIGURES)
    )
    of = {clock: pl.col("value").filter(clock=clock) for clock in clocks}
    medians = (
        values.unpivot(index=["protocol", "clock"], variable_name="figure")
        .group_by("protocol", "figure", maintain_order=True)
        .agg(
            *(of[clock].median().alias(clock) for clock in clocks),
            *(of[clock].min().alias(f"{clock}_least") for clock in clocks[1:]),
            *(of[clock].max().alias(f"{clock}_most") for clock in clocks[1:]),
        )
        .sort(pl.col("protocol").cast(pl.Enum(protocols(frame))), maintain_order=True)
    )
    units = {each.name: each.unit for each in FIGURES}
    downtimes = [pl.col(clock).first().over("protocol") for clock in clocks]  # the first of FIGURES
    negligible = pl.when(unit="ms").then(NEGLIGIBLE * downtimes[0]).otherwise(0)
    ratios = [
        pl.when(pl.col("virtual") > negligible).then(pl.col(clock) / pl.col("virtual")).alias(RATIOS[clock])
        for clock in clocks[1:]
    ]
    columns = [name for clock in clocks[1:] for name in (clock, f"{clock}_least", f"{clock}_most", RATIOS[clock])]
    return (
        medians.filter(*(each.is_not_null() for each in downtimes))
        .with_columns(unit=pl.col("figure").replace_strict(units, return_dtype=pl.String))
        .with_columns(*ratios)
        .select("protocol", "figure", "unit", "virtual", *columns)
    )


def _clocks(compared: pl.DataFrame) -> list[str]:
    """How the runs were made besides in virtual time."""
    return [clock for clock in RATIOS if clock in compared.columns]


def _made(compared: pl.DataFrame) -> str:
    """In words."""
    return "in virtual time, live and real" if "real" in compared.columns else "in virtual time and live"


def within_aim(compared: pl.DataFrame) -> bool:
    """Whether every protocol with completed runs meets the aim, and there is at least one."""
    aimed_at = compared.filter(pl.col("figure").is_in(AIMED_AT))
    ratios = [ratio for clock in _clocks(compared) for ratio in aimed_at[RATIOS[clock]]]
    return bool(ratios) and all(ratio is not None and abs(ratio - 1) <= AIM for ratio in ratios)


def _draw(
    folder: ResultFolder, scenario: Scenario, frame: pl.DataFrame, compared: pl.DataFrame, command: Sequence[str]
) -> list[Path]:
    if compared.is_empty():
        return []
    from experiments.draw import agree as figures_agree

    drawn = figures_agree.agreement(scenario.name, frame, compared, AIM, shlex.join(command))
    return folder.write_figure(drawn, "agree")


def _section(compared: pl.DataFrame, protocol: str) -> Section:
    """The figures of a protocol that are not 0 under both clocks."""
    clocks = _clocks(compared)
    numbers = ("virtual", *(f"{clock}{end}" for clock in clocks for end in ("", "_least", "_most")))
    of_protocol = compared.filter(protocol=protocol).iter_rows(named=True)
    return Section(
        f"agreement {protocol}",
        f"{protocol}: {_made(compared)}",
        f"medians of the completed runs; least, most: of the {' or '.join(clocks)} runs before them; ratio: "
        f"{' or '.join(clocks)} / virtual, if not negligible",
        [
            Heading("figure", "figure"),
            Heading("unit", "unit"),
            Heading("virtual", "virtual", ".1f"),
            *(
                heading
                for clock in clocks
                for heading in (
                    Heading(clock, clock, ".1f"),
                    Heading(f"{clock}_least", "least", ".1f"),
                    Heading(f"{clock}_most", "most", ".1f"),
                    Heading(RATIOS[clock], "ratio", ".3f"),
                )
            ),
        ],
        [row for row in of_protocol if any(row[name] for name in numbers)],
    )


def verdicts(compared: pl.DataFrame) -> list[str]:
    """For each protocol, live and real: whether it meets the aim, and which part of the critical path differs most."""
    return [
        _verdict(
            protocol, clock, {row["figure"]: row for row in compared.filter(protocol=protocol).iter_rows(named=True)}
        )
        for protocol in protocols(compared)
        for clock in _clocks(compared)
    ]


def _verdict(protocol: str, clock: str, rows: dict[str, dict[str, Any]]) -> str:
    """`rows`: by figure."""
    parts = []
    for figure in AIMED_AT:
        ratio = rows[figure][RATIOS[clock]]
        off = None if ratio is None else ratio - 1
        met = off is not None and abs(off) <= AIM
        parts.append(
            f"{figure} {'?' if off is None else f'{100 * off:+.1f} %'} "
            f"({'within' if met else 'not within'} {100 * AIM:.0f} %)"
        )
    paths = {name: row[clock] - row["virtual"] for name, row in rows.items() if name.startswith("path ")}
    most = max(paths, key=lambda name: abs(paths[name]))
    return (
        f"{protocol}: {clock} against virtual, {', '.join(parts)}; of the critical path, "
        f"{most.removeprefix('path ')} differs most, by {paths[most]:+.1f} ms."
    )
