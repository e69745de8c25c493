# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 validate`: published migrations, simulated: the error of each figure, and how the cases differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from experiments import INTERRUPTED
from experiments.commands.options import out_folder, tell_outside
from experiments.report import findings, tables
from experiments.report.tables import Heading, Output, Section, value_text
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.frame import COMPLETED
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell, run_cells
from experiments.study.published import KINDS, PERCENTILES, PublishedFigure, held_against, median_and_worst
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.scenario.file import bases, changes, find, load
from sim.scenario.protocol import Protocol
from sim.scenario.sample import Sample, draw
from sim.scenario.scenario import Scenario
from sim.scenario.screening import PIECES, screened
from sim.scenario.shipped import shipped

MARGINS = (0.10, 0.15)
"""Relative errors: within the first they are small, beyond the second too large."""
SAMPLES = 16
"""Of each case's ranges: the command takes less than a minute with a few seeds, on two cores."""
SAMPLE_SEED = 0
HELD_CONSTANT = ("firmware", "driver", "device", "host", "link", "vmm")
"""The scenario's tables that describe a machine. A case is weaker evidence if it differs from its base in them."""
LEGEND = (
    f"low, high: {PERCENTILES[0]} and {PERCENTILES[1]} % of the samples; outside: the margin that the error exceeds; "
    "inside: low to high; -: none"
)
COLUMNS = {
    "scenario": pl.String,
    "case": pl.String,
    "protocol": pl.String,
    "figure": pl.String,
    "published_ms": pl.Float64,
    "simulated_ms": pl.Float64,
    "error": pl.Float64,
    "kind": pl.String,
    "simulated_low_ms": pl.Float64,
    "simulated_high_ms": pl.Float64,
    "samples": pl.Int64,
    "inside": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A published figure, compared with the mean of the runs."""

    scenario: str
    case: str
    """The name of the measurement; the scenario's if it has none."""
    protocol: str
    held: PublishedFigure

    def within(self, margin: float) -> bool:
        """Whether the error is at most `margin`; False if the figure was not simulated."""
        return self.held.error is not None and abs(self.held.error) <= margin


def run_validate(
    names: Sequence[str],
    seeds: Sequence[int],
    out: str | None,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
    *,
    samples: int = 0,
    screening: bool = True,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written.

    `samples` is how many are drawn from the ranges of each case, for the bands. Each is run once under each protocol,
    screened if `screening` (sim.scenario.screening).
    """
    cases = _cases(names, settings)
    tell_outside(*cases.values())
    cells = [
        Cell(scenario, Protocol.parse(protocol, scenario), seed)
        for scenario in cases.values()
        for protocol in _protocols(scenario)
        for seed in seeds
    ]
    drawn = _drawn(cases.values(), samples, screening=screening)
    varied = [
        Cell(sample.scenario, Protocol.parse(protocol, sample.scenario), seeds[at % len(seeds)])
        for at, sample in drawn
        for protocol in _protocols(sample.scenario)
    ]
    called = [scenario.name for scenario in cases.values()]
    plan = Plan(command, list(cases), len(cells), writes=["runs", "validate", "samples"])
    with ResultFolder(out_folder(out, "validate"), plan, force=force) as folder:
        outcomes, interrupted = run_cells(cells + varied, jobs, quiet=quiet)
        output = Output(as_json, quiet)
        if interrupted:
            done = f"{len(outcomes)} of {len(cells) + len(varied)} runs were done; nothing was written"
            output.say(f"interrupted: {done}", always=True)
            return INTERRUPTED
        runs = results.table(outcomes[: len(cells)])
        sampled = _sampled(drawn, outcomes[len(cells) :])
        rows = [
            Row(scenario.name, published.case or scenario.name, published.protocol, held)
            for scenario in cases.values()
            for published in scenario.published
            for held in held_against(published, *(each.filter(scenario=scenario.name) for each in (runs, sampled)))
        ]
        frame = tidy(rows)
        how_made = manifest.of_cases(cases, command, runs, len(cells))
        how_made |= {"samples": samples, "sample_seed": SAMPLE_SEED, "sample_pieces": PIECES if screening else 1}
        try:
            folder.write_table(runs, "runs", "parquet")
            folder.write_table(frame, "validate", "parquet")
            if drawn:
                folder.write_table(sampled, "samples", "parquet")
            folder.write_manifest(how_made)
        finally:  # the results are printed if the disk is full, too
            output.results(
                {"command": "validate", "scenarios": called, "folder": str(folder.folder)},
                f"{len(cases)} case(s), means over {len(seeds)} seed(s), bands over {samples} sample(s) of the ranges",
                list(_conclusion(cases.values(), rows, runs, sampled, settings)),
                list(_sections(cases, rows, runs, settings)),
            )
        figures = output.drawn(lambda: _draw(folder, frame, how_made))
        folder.commit()
    written = ["validate.parquet", "runs.parquet", *(["samples.parquet"] if drawn else [])]
    output.files(folder.folder, written, figures, folder.why_there)
    failed = OutcomeKind.FAILED.value in runs["outcome"] or figures is None
    return 1 if failed or not all(row.within(MARGINS[-1]) for row in rows) else 0


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


def _drawn(cases: Iterable[Scenario], count: int, *, screening: bool) -> list[tuple[int, Sample]]:
    """The samples of all cases that have ranges, each with its number; screened or not."""
    drawn = [each for case in cases if case.ranges and count for each in enumerate(draw(case, count, SAMPLE_SEED))]
    return [(at, replace(each, scenario=screened(each.scenario)) if screening else each) for at, each in drawn]


def _sampled(drawn: Sequence[tuple[int, Sample]], outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """The runs of the samples: a table of runs with the sample's number and values, as JSON."""
    if not drawn:
        return pl.DataFrame(schema={"scenario": pl.String, "protocol": pl.String, "outcome": pl.String})
    told = [
        {"sample": at, "values": json.dumps(sample.values)} for at, sample in drawn for _ in _protocols(sample.scenario)
    ]
    return pl.concat([results.table(outcomes), pl.DataFrame(told)], how="horizontal")


def _protocols(scenario: Scenario) -> list[str]:
    """The protocols that have published figures."""
    return list(dict.fromkeys(published.protocol for published in scenario.published if published.figures()))


# --- files -----------------------------------------------------------------------------------------------------------


def tidy(rows: Sequence[Row]) -> pl.DataFrame:
    """One row a figure; null if it was not simulated."""
    values = []
    for row in rows:
        one, band = row.held, row.held.band
        ends = (band.low_ms, band.high_ms, band.samples) if band else (None, None, None)
        about = (row.scenario, row.case, row.protocol, one.figure)
        values.append((*about, one.published_ms, one.simulated_ms, one.error, one.kind, *ends, one.inside))
    return pl.DataFrame(values, schema=COLUMNS, orient="row")


def _draw(folder: ResultFolder, frame: pl.DataFrame, how_made: dict[str, Any]) -> list[Path]:
    if frame["simulated_ms"].is_null().all():
        return []
    from experiments.draw import validate as figures_validate

    figure = figures_validate.published_against_simulated(frame, MARGINS, len(how_made["seeds"]), how_made["command"])
    return folder.write_figure(figure, "validate")


# --- printing --------------------------------------------------------------------------------------------------------


def _conclusion(
    cases: Iterable[Scenario], rows: Sequence[Row], runs: pl.DataFrame, sampled: pl.DataFrame, settings: Sequence[str]
) -> Iterator[str]:
    """How many figures come out, and which do not; what did not complete."""
    if settings:
        yield f"With {', '.join(f'--set {each}' for each in settings)}: not the machines that were measured."
    for kind, some in _kinds(rows):
        within = " and ".join(f"{_within(some, margin)} within {100 * margin:.0f} %" for margin in MARGINS)
        yield f"Published figures, {kind}: {len(some)}, of these {within}{_errors_and_bands(some)}."
    for row in rows:
        if not row.within(MARGINS[-1]):
            error = "not simulated" if row.held.error is None else f"{100 * row.held.error:+.1f} %"
            yield f"{row.scenario}, {row.protocol}: {row.held.what} is not within {100 * MARGINS[-1]:.0f} %: {error}."
    if not sampled.is_empty() and (without := [case.name for case in cases if not case.ranges]):
        yield f"Without ranges, so without bands: {', '.join(without)}."
    for (name,), of_case in runs.group_by("scenario", maintain_order=True):
        yield from (f"{name}, {sentence}" for sentence in findings.not_completed(of_case))
    for (name, protocol), of_case in sampled.group_by("scenario", "protocol", maintain_order=True):
        if lost := of_case.filter(~COMPLETED).height:
            told = f"{lost} of {of_case.height} samples did not complete; the bands are of the others"
            if lost == of_case.height:
                told = f"none of {lost} samples completed, so there are no bands"
            yield f"{name}, {protocol}: {told}."


def _errors_and_bands(rows: Sequence[Row]) -> str:
    told = ""
    if errors := median_and_worst([row.held for row in rows]):
        told = f"; error: median {100 * errors[0]:.1f} %, worst {100 * errors[1]:.1f} %"
    if banded := [row for row in rows if row.held.band]:
        told += f"; inside their band: {_inside(banded)} of {len(banded)}"
    return told


def _kinds(rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[Row]]]:
    for kind in KINDS:
        yield kind, [row for row in rows if row.held.kind == kind]
    yield "all", rows


def _within(rows: Sequence[Row], margin: float) -> int:
    return sum(row.within(margin) for row in rows)


def _inside(rows: Sequence[Row]) -> int:
    return sum(row.held.inside is True for row in rows)


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
    yield _counts(rows)


def _counts(rows: Sequence[Row]) -> Section:
    """Each class of figures by itself: how many there are, how far off they are, how many are inside their band."""
    columns = [
        Heading("kind", ""),
        Heading("figures", "figures"),
        *(Heading(f"within_{100 * margin:.0f}_percent", f"within {100 * margin:.0f} %") for margin in MARGINS),
        Heading("median_error_percent", "median error %", ".1f"),
        Heading("worst_error_percent", "worst error %", ".1f"),
        Heading("with_band", "with a band"),
        Heading("inside", "inside it"),
    ]
    shown = []
    for kind, some in _kinds(rows):
        errors = median_and_worst([row.held for row in some]) or (None, None)
        values = [
            *(kind, len(some), *(_within(some, margin) for margin in MARGINS)),
            *(None if error is None else 100 * error for error in errors),
            *(sum(row.held.band is not None for row in some), _inside(some)),
        ]
        shown.append(dict(zip((column.name for column in columns), values, strict=True)))
    legend = "; ".join(KINDS.values())
    return Section("counts", "How many of the published figures come out", legend, columns, shown)


def _figures(key: str, title: str, legend: str, rows: Sequence[Row], first: str) -> Section:
    """A row a figure."""
    columns = [
        Heading(first, f"{first}, ms"),
        Heading("protocol", "protocol"),
        Heading("published_ms", "published", ".1f"),
        Heading("simulated_ms", "simulated", ".1f"),
        Heading("simulated_low_ms", "low", ".1f"),
        Heading("simulated_high_ms", "high", ".1f"),
        Heading("error_percent", "error %", "+.1f"),
        Heading("outside_percent", "outside %", ".0f"),
        Heading("inside", "inside"),
        Heading("kind", "kind"),
    ]
    shown = []
    for row in rows:
        one, band = row.held, row.held.band
        outside = [margin for margin in MARGINS if not row.within(margin)]
        values = [
            *(one.what if first == "what" else row.scenario, row.protocol, one.published_ms, one.simulated_ms),
            *((band.low_ms, band.high_ms) if band else (None, None)),
            None if one.error is None else 100 * one.error,
            100 * outside[-1] if outside else None,
            None if one.inside is None else "yes" if one.inside else "no",
            one.kind,
        ]
        shown.append(dict(zip((column.name for column in columns), values, strict=True)))
    return Section(key, title, legend, columns, shown)


def _differences(name: str, scenario: Scenario, settings: Sequence[str]) -> Section:
    """The parameters of the machine, and the fitted ones, that differ from the file at the bottom of what the case
    extends."""
    extended, rows = bases(name), []
    for key, (there, here) in changes(name, settings).items() if extended else ():
        source = scenario.sources.get(key, "not stated")
        if key.partition(".")[0] in HELD_CONSTANT or source.startswith("fitted:"):
            values = {"base": None if there is None else value_text(there), "here": value_text(here)}
            rows.append({"parameter": key, **values, "source": source})
    title = f"{scenario.name} extends nothing: all parameters are its own."
    if extended:
        nothing = f"{scenario.name}: nothing had to differ from {extended[-1].stem}."
        title = f"{scenario.name}: what had to differ from {extended[-1].stem}" if rows else nothing
    columns = [Heading(key, key) for key in ("parameter", "base", "here", "source")]
    legend = "base: - if it is left out there" if rows else ""
    return Section(f"{scenario.name}: differences", title, legend, columns, rows)
