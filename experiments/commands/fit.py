# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 fit`: a real machine from the logs of one migration: its scenario, its downtime, what would shorten it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import INTERRUPTED
from experiments.decision.bands import BAND, Brought
from experiments.decision.decision import parts, what_brings
from experiments.decision.machines import DRAWN
from experiments.logs.how import how
from experiments.logs.machine import FittedMachine, machine_of
from experiments.logs.quantity import Certainty
from experiments.report.tables import Heading, Output, Section, value_text
from experiments.runs.files import output_file, replacing
from experiments.runs.pool import Cell, run_cells
from proto_v3.errors import UserError
from proto_v3.timeline import PHASES
from sim.outcome import Outcome
from sim.scenario.sample import MAX_SAMPLES
from sim.scenario.units import NS_PER_MS

FAR = 0.1
"""A phase that differs by more than this part of the downtime is told. Ours."""
TOO_FAR = 0.25
"""A fitted downtime that is further off the real one than this part of it is no ground for what changes would bring.
Ours."""
FIGURES = (".png", ".svg")
NO_DATE = {".svg": {"Date": None}}
"""The same logs give the same file."""


def print_how() -> None:
    """Print how to get the logs."""
    print(how(), end="")


def run_fit(
    source: str,
    target: str,
    out: str | None,
    cmdline: Sequence[str],
    driver: Sequence[str],
    extends: str,
    migration: int | None,
    rename: Sequence[str],
    samples: int,
    jobs: int | None,
    command: Sequence[str],
    *,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Read, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    if samples > MAX_SAMPLES // DRAWN:
        raise UserError(f"--samples {samples}: must be at most {MAX_SAMPLES // DRAWN}")
    file = None if out is None else _new_file(out, force=force)
    machine = machine_of(
        source,
        target,
        name="fit" if file is None else file.stem,
        extends=extends,
        cmdline=cmdline,
        driver=driver,
        migration=migration,
        rename=rename,
    )
    output = Output(as_json, quiet)
    if file is not None:  # what the logs tell is known, however the runs end
        with replacing(file) as new:
            new.write_text(machine.text, encoding="utf-8")
    rows = list[Brought]()
    try:
        if samples:
            own_ms = _ms(machine.simulated.downtime_ns)
            rows = what_brings(machine.scenario, samples, own_ms, lambda cells: _made(cells, jobs, quiet))
    except KeyboardInterrupt:
        kept = "nothing was written" if file is None else f"the scenario is in {file}"
        output.say(f"interrupted: {kept}", always=True)
        return INTERRUPTED
    output.results(
        {"command": "fit", "scenario": machine.scenario.name, "file": None if file is None else str(file)},
        f"{machine.scenario.name}: {machine.scenario.description}",
        list(conclusion(machine, rows)),
        list(sections(machine, rows)),
    )
    if file is None:
        output.say("\nNothing was written; --out FILE.toml keeps the scenario.")
        return 0
    drawn = output.drawn(lambda: _draw(machine, rows, file, command))
    if drawn is not None:
        output.say(f"\nFigure: {file.with_suffix('.png')} (and .svg)")
    own_ns = machine.simulated.downtime_ns
    near = "" if own_ns is None else f" --near-ms {own_ns / NS_PER_MS:.0f}"
    output.say(
        f"Scenario: {file}; what to change first there: proto-v3 decide {shlex.quote(str(file))}{near}", always=True
    )
    return 0 if drawn is not None else 1


def _made(cells: Sequence[Cell], jobs: int | None, quiet: bool) -> list[Outcome]:
    """All runs. KeyboardInterrupt if they were interrupted."""
    outcomes, interrupted = run_cells(cells, jobs, quiet=quiet)
    if interrupted:
        raise KeyboardInterrupt
    return outcomes


def _new_file(name: str, *, force: bool) -> Path:
    """The scenario's file. UserError if it is there, or one of its figures, unless that is forced."""
    file = Path(name)
    if file.suffix != ".toml":
        raise UserError(f"--out {name}: must be the name of a .toml file")
    for each in (file, *(file.with_suffix(end) for end in FIGURES)):
        if each.exists() and not force:
            raise UserError(f"--out {name}: {each} is there already; nothing was done (--force replaces it)")
    return output_file("--out", file)


def _draw(machine: FittedMachine, rows: Sequence[Brought], file: Path, command: Sequence[str]) -> list[Path]:
    from experiments.draw.fit import draw_fit

    figure, paths = draw_fit(machine, rows, shlex.join(command)), [file.with_suffix(end) for end in FIGURES]
    for path in paths:
        with replacing(path) as new:
            figure.savefig(new, format=path.suffix[1:], dpi=160, metadata=NO_DATE.get(path.suffix))
    return paths


# --- what is printed --------------------------------------------------------------------------------------------------


def conclusion(machine: FittedMachine, rows: Sequence[Brought]) -> Iterator[str]:
    """What matters most, in sentences."""
    real_ms, own_ns = machine.waterfall.downtime_ms, machine.simulated.downtime_ns
    if real_ms is not None:
        yield f"The guest stood still for {'at least ' if machine.clocks.one_sided else ''}{real_ms:.1f} ms."
    if own_ns is None:
        yield f"The simulated migration was not completed: {machine.simulated.kind.value}, {machine.simulated.reason}."
    else:
        off = "" if real_ms is None else f", {100 * (own_ns / NS_PER_MS / real_ms - 1):+.1f} %"
        yield f"The fitted scenario's guest stands still for {own_ns / NS_PER_MS:.1f} ms{off}."
        if real_ms is not None and abs(own_ns / NS_PER_MS - real_ms) > TOO_FAR * real_ms:
            yield "That is too far off: what changes would bring is said of the scenario, and not of the machine."
    yield from _differs(machine)
    kinds = [each.kind for each in machine.quantities]
    counts = ", ".join(f"{kinds.count(kind)} {kind.value}" for kind in Certainty)
    yield f"Of {len(kinds)} quantities: {counts}; all else is as in the scenario that is extended."
    yield machine.clocks.told()
    yield from machine.notes
    saving = [(row.in_all_percent, row.in_all_ms, row) for row in rows[1:] if row.in_all_percent and row.in_all_ms]
    if saving:
        percent, less, row = max(saving, key=lambda each: each[0].median)
        yield (
            f"With all changes up to {row.rung.name} the downtime is shortest: by {less.median:.1f} ms, "
            f"{percent.median:.0f} % ({percent.low:.0f} to {percent.high:.0f} % over {row.samples} plausible machines)."
        )


def _differs(machine: FittedMachine) -> Iterator[str]:
    """The phase that is not explained, if one is not."""
    real = machine.waterfall
    own = {name: took / NS_PER_MS for name, took in machine.simulated.phases_ns.items()}
    if real.downtime_ms is None or not own:
        return
    name = max(PHASES, key=lambda name: abs(real.phases_ms[name] - own[name]))
    if abs(real.phases_ms[name] - own[name]) > FAR * real.downtime_ms:
        yield f"What is not explained is in {name}: {real.phases_ms[name]:.1f} ms, simulated {own[name]:.1f}."


def sections(machine: FittedMachine, rows: Sequence[Brought]) -> Iterator[Section]:
    """All of it, as tables."""
    yield phases_table(machine)
    yield steps_table(machine)
    yield quantities_table(machine)
    if rows:
        yield changes_table(rows)


def phases_table(machine: FittedMachine) -> Section:
    """The phases of the downtime, real and simulated."""
    real, own = machine.waterfall, machine.simulated
    rows = [
        {"phase": name, "real_ms": real.phases_ms[name], "simulated_ms": _ms(own.phases_ns.get(name))}
        for name in PHASES
    ]
    rows.append({"phase": "downtime", "real_ms": real.downtime_ms, "simulated_ms": _ms(own.downtime_ns)})
    legend = "ms; a phase whose end the logs do not show is part of the next one"
    columns = [
        Heading("phase", "phase"),
        Heading("real_ms", "real", ",.1f"),
        Heading("simulated_ms", "simulated", ",.1f"),
    ]
    return Section("phases", "Where the downtime went", legend, columns, rows)


def _ms(ns: int | None) -> float | None:
    return None if ns is None else ns / NS_PER_MS


def steps_table(machine: FittedMachine) -> Section:
    """What each side did in the downtime, real and simulated."""
    names = [device.name for device in machine.scenario.devices]
    own = {f"stage_{each.name}_{each.index}_ns": each.end_ns - each.start_ns for each in machine.simulated.stages}
    rows = [
        {
            "from_ms": step.begin_ms,
            "step": step.name,
            "device": "" if step.device is None else names[step.device],
            "side": step.side,
            "real_ms": step.ms,
            "simulated_ms": _ms(own.get(step.stage)),
        }
        for step in machine.waterfall.steps
    ]
    columns = [
        Heading("from_ms", "from, ms", ",.1f"),
        *(Heading(name, name) for name in ("step", "device", "side")),
        Heading("real_ms", "real, ms", ",.3f"),
        Heading("simulated_ms", "simulated", ",.3f"),
    ]
    return Section("steps", "Step by step", "since the order to stop the vCPUs, on the source's clock", columns, rows)


def quantities_table(machine: FittedMachine) -> Section:
    """What the logs tell, and how well."""
    rows = [
        {
            "parameter": each.key,
            "value": "" if each.value is None else value_text(each.value),
            "known": each.kind.value,
            "low": each.low,
            "high": each.high,
            "source": each.how,
        }
        for each in machine.quantities
    ]
    columns = [
        *(Heading(name, name) for name in ("parameter", "value", "known")),
        *(Heading(name, name, ",.4g") for name in ("low", "high")),
        Heading("source", "source"),
    ]
    legend = "what cannot be told keeps the value and the range of the scenario that is extended"
    return Section("quantities", "What the logs tell", legend, columns, rows)


def changes_table(rows: Sequence[Brought]) -> Section:
    """What each change would bring."""
    shown = [
        {
            "change": row.rung.name,
            "protocol": row.rung.protocol,
            **parts("downtime_ms", row.levels.get("downtime_ms")),
            **parts("saves_percent", row.in_all_percent),
            "completed": row.samples - row.failed if row.made else None,
            "note": row.rung.nothing,
        }
        for row in rows
    ]
    low, high = (f"{100 * each:.0f} %" for each in BAND)
    columns = [
        Heading("change", "change"),
        Heading("protocol", "protocol"),
        Heading("downtime_ms_median", "ms, median", ",.1f"),
        Heading("downtime_ms_low", low, ",.1f"),
        Heading("downtime_ms_high", high, ",.1f"),
        Heading("saves_percent_median", "saves %, median", "+.1f"),
        Heading("saves_percent_low", low, "+.1f"),
        Heading("saves_percent_high", high, "+.1f"),
        Heading("completed", "completed"),
        Heading("note", "note"),
    ]
    legend = (
        f"each on top of those above it, over {rows[0].samples} samples of what is not known, of about this downtime; "
        "saves: against the first row, in each"
    )
    return Section("changes", "What changes would bring here", legend, columns, shown)
