# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m experiments.calibration`: fit the free keys, and print what came out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import click

from experiments.calibration.figures import RigFigure, SimulatedFigures
from experiments.calibration.fit import CalibrationFit, Fitter
from experiments.calibration.plan import SHIPPED, Calibration, read
from experiments.calibration.write import as_toml, by_file, write
from experiments.report.tables import Heading, Output, Section
from proto_v3.errors import UserError
from proto_v3.text import clean


@click.command()
@click.argument("plan", type=click.Path(path_type=Path), default=SHIPPED)
@click.option("--jobs", type=click.IntRange(1), help="Processes; by default one a CPU.")
@click.option("--no-fit", is_flag=True, help="Only show what the values in the files give.")
@click.option("--quick", is_flag=True, help="Without leave-one-rig-out.")
@click.option("--write", "writes", is_flag=True, help="Put the values into the scenario files.")
def main(plan: Path, jobs: int | None, no_fit: bool, quick: bool, writes: bool) -> None:
    """Fit the keys that PLAN says are free to the published figures that its scenarios list as fitted.

    PLAN is a TOML file; without it, the shipped one, of mlx5. Printed are the values, each figure beside its
    simulation, each rig as predicted from the others, and what the figures cannot tell. Nothing is left to chance: the
    same files give the same values. It takes about five minutes. The search ends after 12 steps at the latest.

    Exit status: 0, however large the errors are; 1 for bad input.
    """
    try:
        _run(read(plan), jobs, no_fit, quick, writes)
    except UserError as error:
        raise click.ClickException(clean(str(error))) from error


def _run(plan: Calibration, jobs: int | None, no_fit: bool, quick: bool, writes: bool) -> None:
    began = time.monotonic()
    figures = SimulatedFigures(plan, jobs)
    fitter = Fitter(plan, figures)
    before = fitter.with_values(figures.start)
    fit = before if no_fit else fitter.fit()
    left_out = {} if quick else {rig.name: fitter.without(rig.name) for rig in plan.rig}
    sections = [_values(plan, figures, fit), _figures(fit, left_out), _blind(fitter, fit)]
    conclusion = [
        *_summary("used", fit, lambda target: target.used),
        *_summary("sums of used ones", fit, lambda target: target.is_sum),
        *_summary("predicted", fit, lambda target: not target.used and not target.is_sum),
        *(line for rig, each in left_out.items() for line in _summary(f"{rig} left out", each)),
        f"{figures.runs} runs in {time.monotonic() - began:.0f} s.",
    ]
    Output().results({}, f"{len(plan.free)} free keys, {len(figures.targets)} figures", conclusion, sections)
    for name, numbers in by_file(plan, fit.values).items():
        click.echo(f"\n# {name}\n{as_toml(numbers)}", nl=False)
    for line in write(plan, fit.values) if writes else ():
        click.echo(line)


def _summary(name: str, fit: CalibrationFit, of: Callable[[RigFigure], bool] = lambda _: True) -> Iterator[str]:
    pairs = zip(fit.targets, fit.errors(), strict=True)
    errors = [error for target, error in pairs if of(target)]
    sizes = [abs(error) for error in errors if error is not None]
    if sizes:
        missing = len(errors) - len(sizes)
        yield (
            f"{name}: {len(errors)} figures, error {100 * median(sizes):.1f} % in the median, {100 * max(sizes):.1f} % "
            f"at most{f'; {missing} were not simulated' if missing else ''}."
        )


def _values(plan: Calibration, figures: SimulatedFigures, fit: CalibrationFit) -> Section:
    columns = [Heading("key", "key"), *(Heading(key, key, "g") for key in ("low", "high", "before", "found"))]
    rows = [
        {"key": free.name, "low": free.bounds[0], "high": free.bounds[1], "before": before, "found": found}
        for free, before, found in zip(plan.free, figures.start, fit.values, strict=True)
    ]
    return Section("values", "Values", "low, high: the range in which the number was looked for", columns, rows)


def _figures(fit: CalibrationFit, left_out: dict[str, CalibrationFit]) -> Section:
    predicted = {
        target: error for each in left_out.values() for target, error in zip(each.targets, each.errors(), strict=True)
    }
    columns = [
        *(Heading(name, name) for name in ("scenario", "protocol", "figure", "used")),
        Heading("published_ms", "published, ms", ".1f"),
        Heading("simulated_ms", "simulated, ms", ".1f"),
        Heading("error_percent", "error %", "+.1f"),
        Heading("left_out_percent", "rig left out %", "+.1f"),
    ]
    rows = []
    for target, simulated, error in zip(fit.targets, fit.simulated_ms, fit.errors(), strict=True):
        without = predicted.get(target)
        rows.append(
            {
                "scenario": target.scenario,
                "protocol": target.protocol,
                "figure": target.figure,
                "used": "yes" if target.used else "sum" if target.is_sum else "no",
                "published_ms": target.published_ms,
                "simulated_ms": simulated,
                "error_percent": None if error is None else 100 * error,
                "left_out_percent": None if without is None else 100 * without,
            }
        )
    legend = (
        "used: yes, by the fit; sum, of figures that are; no, it is predicted; rig left out: the error when the fit "
        "uses no figure of this rig"
    )
    return Section("figures", "Figures", legend, columns, rows)


def _blind(fitter: Fitter, fit: CalibrationFit) -> Section:
    rows = [{"keys": ", ".join(each.keys), "why": each.why} for each in fitter.blind(fit.values)]
    return Section("blind", "What the figures cannot tell", "", [Heading("keys", "keys"), Heading("why", "why")], rows)


if __name__ == "__main__":
    main()
