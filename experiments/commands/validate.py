# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 validate`: published migrations, simulated: the error of each figure, and how the cases differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.options import out_folder
from experiments.report import findings, tables
from experiments.report.tables import Heading, Output, Section, value_text
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, run_cells
from experiments.study.published import PublishedFigure, held_against
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.file import bases, changes, find, load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.shipped import shipped

BANDS = (0.10, 0.15)
"""Relative errors: within the first they are small, beyond the second too large."""
HELD_CONSTANT = ("firmware", "driver", "device", "host", "link", "vmm")
"""The scenario's tables that describe a machine. A case is weaker evidence if it differs from its base in them."""
LEGEND = "error: of the published figure; outside: the widest band that the figure is outside of; -: not simulated"
COLUMNS = {
    "scenario": pl.String,
    "case": pl.String,
    "protocol": pl.String,
    "figure": pl.String,
    "published_ms": pl.Float64,
    "simulated_ms": pl.Float64,
    "error": pl.Float64,
    "fitted": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A published figure, compared with the mean of the runs."""

    scenario: str
    case: str
    """The name of the measurement; the scenario's if it has none."""
    protocol: str
    held: PublishedFigure

    def within(self, band: float) -> bool:
        """Whether the error is at most `band`; False if the figure was not simulated."""
        return self.held.error is not None and abs(self.held.error) <= band


def run_validate(
    names: Sequence[str],
    seeds: Sequence[int],
    out: str | None,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
    *,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    cases = _cases(names, settings)
    cells = [
        Cell(scenario, Protocol.parse(protocol, scenario), seed)
        for scenario in cases.values()
        for protocol in _protocols(scenario)
        for seed in seeds
    ]
    called = [scenario.name for scenario in cases.values()]
    plan = Plan(command, list(cases), len(cells), writes=["runs", "validate"])
    with ResultFolder(out_folder(out, "validate"), plan, force=force) as folder:
        outcomes, interrupted = run_cells(cells, jobs, quiet=quiet)
        output = Output(as_json, quiet)
        if interrupted:
            done = f"{len(outcomes)} of {len(cells)} runs were done; nothing was written"
            output.say(f"interrupted: {done}", always=True)
            return INTERRUPTED
        runs = results.table(outcomes)
        rows = [
            Row(scenario.name, published.case or scenario.name, published.protocol, held)
            for scenario in cases.values()
            for published in scenario.published
            for held in held_against(published, runs.filter(scenario=scenario.name))
        ]
        frame, how_made = tidy(rows), manifest.of_cases(cases, command, runs, len(cells))
        try:
            folder.write_table(runs, "runs", "parquet")
            folder.write_table(frame, "validate", "parquet")
            folder.write_manifest(how_made)
        finally:  # the results are printed if the disk is full, too
            output.results(
                {"command": "validate", "scenarios": called, "folder": str(folder.folder)},
                f"{len(cases)} case(s), means over {len(seeds)} seed(s)",
                list(_conclusion(rows, runs, settings)),
                list(_sections(cases, rows, runs, settings)),
            )
        drawn = output.drawn(lambda: _draw(folder, frame, how_made))
        folder.commit()
    output.files(folder.folder, ["validate.parquet", "runs.parquet"], drawn, folder.why_there)
    failed = OutcomeKind.FAILED.value in runs["outcome"] or drawn is None
    return 1 if failed or not all(row.within(BANDS[-1]) for row in rows) else 0


def _cases(names: Sequence[str], settings: Sequence[str]) -> dict[str, Scenario]:
    """The scenarios by the name or file that the user gave: a scenario's or a case's; without any, all with figures."""
    by_case: dict[str, list[str]] = {}
    if set(names) - set(shipped()):
        for name in shipped():
            for published in load(name).published:
                by_case.setdefault(published.case or name, []).append(name)
    for name in names:
        if name not in by_case:
            find(name, by_case)
    chosen = dict.fromkeys(each for name in names or shipped() for each in by_case.get(name, [name]))
    if not names:
        chosen = {name: None for name in chosen if _protocols(load(name))}
    cases = {name: load(name, settings, keep_published=True) for name in chosen}
    without = [name for name, scenario in cases.items() if not _protocols(scenario)]
    if without:
        raise UserError(f"{', '.join(without)}: no published figures to compare the runs with ([[published]])")
    called = [scenario.name for scenario in cases.values()]
    if len(set(names)) < len(names) or len(set(called)) < len(called):
        raise UserError(f"{', '.join(names)}: two cases have the same name")
    return cases


def _protocols(scenario: Scenario) -> list[str]:
    """The protocols that have published figures."""
    return list(dict.fromkeys(published.protocol for published in scenario.published if published.figures()))


# --- files -----------------------------------------------------------------------------------------------------------


def tidy(rows: Sequence[Row]) -> pl.DataFrame:
    """One row a figure; null if it was not simulated."""
    values = [
        (row.scenario, row.case, row.protocol, one.figure, one.published_ms, one.simulated_ms, one.error, one.fitted)
        for row, one in ((row, row.held) for row in rows)
    ]
    return pl.DataFrame(values, schema=COLUMNS, orient="row")


def _draw(folder: ResultFolder, frame: pl.DataFrame, how_made: dict[str, Any]) -> list[Path]:
    if frame["simulated_ms"].is_null().all():
        return []
    from experiments.draw import validate as figures_validate

    figure = figures_validate.published_against_simulated(frame, BANDS, len(how_made["seeds"]), how_made["command"])
    return folder.write_figure(figure, "validate")


# --- printing --------------------------------------------------------------------------------------------------------


def _conclusion(rows: Sequence[Row], runs: pl.DataFrame, settings: Sequence[str]) -> Iterator[str]:
    """How many figures come out, and which do not; what did not complete."""
    if settings:
        yield f"With {', '.join(f'--set {each}' for each in settings)}: not the machines that were measured."
    for kind, some in _kinds(rows):
        within = " and ".join(f"{_within(some, band)} within {100 * band:.0f} %" for band in BANDS)
        yield f"Published figures, {kind}: {len(some)}, of these {within}."
    for row in rows:
        if not row.within(BANDS[-1]):
            error = "not simulated" if row.held.error is None else f"{100 * row.held.error:+.1f} %"
            yield f"{row.scenario}, {row.protocol}: {row.held.what} is not within {100 * BANDS[-1]:.0f} %: {error}."
    for (name,), of_case in runs.group_by("scenario", maintain_order=True):
        yield from (f"{name}, {sentence}" for sentence in findings.not_completed(of_case))


def _kinds(rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[Row]]]:
    yield "predicted", [row for row in rows if not row.held.fitted]
    yield "fitted", [row for row in rows if row.held.fitted]
    yield "all", rows


def _within(rows: Sequence[Row], band: float) -> int:
    return sum(row.within(band) for row in rows)


def _sections(
    cases: Mapping[str, Scenario], rows: Sequence[Row], runs: pl.DataFrame, settings: Sequence[str]
) -> Iterator[Section]:
    """For each case its figures and how it differs from its base; then the downtimes, and how many figures come out."""
    for name, scenario in cases.items():
        of_case = [row for row in rows if row.scenario == scenario.name]
        sources = [
            f"Published ({each.case or scenario.name}, {each.protocol}): {each.citation}" for each in scenario.published
        ]
        yield _figures(
            scenario.name, f"{scenario.name}: {scenario.description}", "\n".join([LEGEND, *sources]), of_case, "what"
        )
        frame = runs.filter(scenario=scenario.name)
        if frame.filter(~COMPLETED).height:
            title = f"{scenario.name}: not all runs were completed"
            yield replace(tables.outcomes(frame, title=title), key=f"{scenario.name}: outcomes")
        yield _differences(name, scenario, settings)
    downtimes = [row for row in rows if row.held.figure == "downtime_ms"]
    if downtimes:
        yield _figures("downtimes", "The downtimes of all cases", LEGEND, downtimes, "scenario")
    yield Section(
        "counts",
        "How many of the published figures come out",
        "fitted: a parameter was fitted to the figure; predicted: none was",
        [
            Heading("kind", ""),
            Heading("figures", "figures"),
            *(Heading(f"within_{100 * band:.0f}_percent", f"within {100 * band:.0f} %") for band in BANDS),
        ],
        [
            {"kind": kind, "figures": len(some)}
            | {f"within_{100 * band:.0f}_percent": _within(some, band) for band in BANDS}
            for kind, some in _kinds(rows)
        ],
    )


def _figures(key: str, title: str, legend: str, rows: Sequence[Row], first: str) -> Section:
    """A row a figure; `outside` is the widest band that it is outside of."""
    columns = [
        Heading(first, f"{first}, ms"),
        Heading("protocol", "protocol"),
        Heading("published_ms", "published", ".1f"),
        Heading("simulated_ms", "simulated", ".1f"),
        Heading("error_percent", "error %", "+.1f"),
        Heading("used_to_fit", "used to fit"),
        Heading("outside_percent", "outside %", ".0f"),
    ]
    shown = []
    for row in rows:
        outside = [band for band in BANDS if not row.within(band)]
        texts = (row.held.what if first == "what" else row.scenario, row.protocol)
        error = None if row.held.error is None else 100 * row.held.error
        fitted, widest = "yes" if row.held.fitted else "no", 100 * outside[-1] if outside else None
        values = (*texts, row.held.published_ms, row.held.simulated_ms, error, fitted, widest)
        shown.append(dict(zip((column.name for column in columns), values, strict=True)))
    return Section(key, title, legend, columns, shown)


def _differences(name: str, scenario: Scenario, settings: Sequence[str]) -> Section:
    """The parameters that differ from the file at the bottom of what the case extends."""
    extended, rows = bases(name), []
    for key, (there, here) in changes(name, settings).items() if extended else ():
        if key.partition(".")[0] in HELD_CONSTANT and there is not None:
            values = {"base": value_text(there), "here": value_text(here)}
            rows.append({"parameter": key, **values, "source": scenario.sources.get(key, "not stated")})
    title = f"{scenario.name} extends nothing: all parameters are its own."
    if extended:
        nothing = f"{scenario.name}: nothing had to differ from {extended[-1].stem}."
        title = f"{scenario.name}: what had to differ from {extended[-1].stem}" if rows else nothing
    columns = [Heading(key, key) for key in ("parameter", "base", "here", "source")]
    return Section(f"{scenario.name}: differences", title, "", columns, rows)
