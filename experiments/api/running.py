# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios loaded, and runs made; or the command that makes them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import polars as pl

from experiments.report.tables import parameter_rows, value_text
from experiments.runs.frame import table
from experiments.runs.pool import Cell, Done, in_processes, made_once, run_cell
from experiments.runs.progress import RunsProgress
from experiments.study.experiment import NAMES, find
from experiments.trace.traced_run import TracedRun, traced_run
from proto_v3.errors import UserError
from sim.outcome import Outcome
from sim.scenario import file
from sim.scenario.protocol import Protocol
from sim.scenario.sample import Sample, draw
from sim.scenario.scenario import Scenario
from sim.scenario.scenario import parameters as values_of
from sim.scenario.shipped import shipped

P = ParamSpec("P")
T = TypeVar("T")
Seeds = int | Iterable[int]
"""A number of seeds, which count up from 1; or the seeds."""
Setting = str | int | float | bool | Sequence[str]
"""The value of a scenario's parameter."""
Progress = bool | Callable[[int, int], None]
"""False: nothing is shown. True: a bar on stderr. A function: it is called with the runs done and the runs in all."""

START_METHOD = "spawn"
"""Of worker processes: a fork of a process with threads, as a notebook's kernel is, can hang."""


def scenarios() -> pl.DataFrame:
    """The shipped scenarios. Columns: name, description."""
    rows = [(name, file.load(name).description) for name in shipped()]
    return pl.DataFrame(rows, schema=["name", "description"], orient="row")


def questions() -> pl.DataFrame:
    """The questions that `proto-v3 run` answers. Columns: name, question."""
    return pl.DataFrame([(name, find(name).question) for name in NAMES], schema=["name", "question"], orient="row")


def load(scenario: str | os.PathLike[str], changes: Mapping[str, Setting] | None = None) -> Scenario:
    """A scenario: a shipped one by its name, or a TOML file by its path, with changed parameters.

    `changes` is parameter -> value, as in `{"link.gbit_per_s": 25, "device.0.count": 4}`; the unit is in the
    parameter's name. UserError names file, key and value of each problem, and what would be right.
    """
    return file.load(os.fspath(scenario), _settings(changes or {}))


def parameters(scenario: Scenario | str, keys: Iterable[str] | None = None) -> pl.DataFrame:
    """The parameters that a scenario sets, or those of `keys` among them.

    Columns: parameter, value (as text), source, range (as text, empty if there is none), why (the reason of the range).
    """
    rows = list(parameter_rows(of_scenario(scenario)))
    if keys is not None:
        known = {row[0]: row for row in rows}
        rows = [known[key] for key in keys if key in known]
    return pl.DataFrame(rows, schema=["parameter", "value", "source", "range", "why"], orient="row")


def ranges(scenario: Scenario | str) -> pl.DataFrame:
    """The ranges of a scenario's parameters: which values are plausible beside those that it sets, and why.

    Columns: parameter, value (as text); low, high (in the parameter's unit, null for a list of values); log (equal
    ratios are equally likely); of (the parameter whose factors low and high are, or null); any (the list of values, as
    texts, or null); why.
    """
    known, rows = of_scenario(scenario), []
    for key, value in values_of(known).items():
        if (each := known.ranges.get(key)) is not None:
            choices = None if each.any is None else [value_text(choice) for choice in each.any]
            rows.append((key, value_text(value), each.low, each.high, each.log, each.of, choices, each.why))
    texts, numbers = dict.fromkeys(["parameter", "value"], pl.String()), dict.fromkeys(["low", "high"], pl.Float64())
    choices_and_why = {"log": pl.Boolean(), "of": pl.String(), "any": pl.List(pl.String()), "why": pl.String()}
    return pl.DataFrame(rows, schema={**texts, **numbers, **choices_and_why}, orient="row")


def samples(scenario: Scenario | str, count: int, seed: int = 0) -> list[Sample]:
    """Plausible scenarios: `count` quasi-random samples of the ranges of one, the same for the same seed.

    Each has `.values`, what was drawn by parameter, and `.scenario`, which `compare` takes. Run every protocol with the
    same samples. Powers of two are spread most evenly. A scenario without ranges has one sample, itself.

    UserError for a count that is not from 1 to 65536, and if values in their ranges do not go together.
    """
    return draw(of_scenario(scenario), count, seed)


def compare(
    scenario: Scenario | str,
    protocols: str | Sequence[str],
    seeds: Seeds = 10,
    *,
    jobs: int | None = 1,
    progress: Progress = False,
) -> pl.DataFrame:
    """Make runs of a scenario under each protocol, with the same seeds; returns the table of runs.

    `protocols` are names as of `proto-v3 compare`, in a list or separated by commas. `jobs` is the number of processes;
    1 runs in this one, None takes one a CPU. The table is the same for any number.

    Columns: scenario, protocol, seed, outcome (`COMPLETED`, `DID_NOT_CONVERGE`, `CANCELLED`, `UNSUPPORTED`, `FAILED`),
    reason, downtime_ns, total_ns, bound_ns, phase_*_ns and path_*_ns (each add up to the downtime), counters, and more:
    docs/api.md lists them. Times are null where the migration was not completed. A run that raises an error is a row
    with outcome FAILED.

    UserError for an unknown scenario or protocol, for seeds that are no whole numbers from 0, and for jobs below 1.
    Ctrl-C raises KeyboardInterrupt and leaves no process behind.
    """
    known = of_scenario(scenario)
    cells = [Cell(known, protocol, seed) for seed in _seeds(seeds) for protocol in _protocols(protocols, known)]
    return table(outcomes_of(cells, jobs, progress))


def sweep(
    scenario: Scenario | str,
    protocols: str | Sequence[str],
    grid: Mapping[str, Sequence[Setting]],
    seeds: Seeds = 10,
    *,
    jobs: int | None = 1,
    progress: Progress = False,
) -> pl.DataFrame:
    """Make runs for every combination of the values in `grid`; returns one table of runs.

    `grid` is parameter -> values, as in `{"link.gbit_per_s": [25, 100], "driver.lock": ["none", "global"]}`. Before
    anything is run, every combination is checked. The other arguments and errors are those of `compare`.

    Columns: one for each parameter of the grid, named as it, then those of `compare`. To sum up:
    `downtimes(runs, by=["link.gbit_per_s"])`.
    """
    for key, values in grid.items():
        if isinstance(values, str) or not len(values):
            raise UserError(f"grid: {key} = {values!r}: must be a list of at least one value")
    if not grid:
        raise UserError("grid: must have at least one parameter")
    base, chosen, cells, factors = of_scenario(scenario), _seeds(seeds), [], []
    dump = base.model_dump(mode="json")
    for values in itertools.product(*grid.values()):
        at = dict(zip(grid, values, strict=True))
        changed = file.from_dump(dump, base.name, _settings(at))
        for seed in chosen:
            for protocol in _protocols(protocols, changed):
                cells.append(Cell(changed, protocol, seed))
                factors.append({key: _cell_value(value) for key, value in at.items()})
    frame = table(outcomes_of(cells, jobs, progress))
    return pl.concat([pl.DataFrame(factors, infer_schema_length=None, strict=False), frame], how="horizontal")


def run(scenario: Scenario | str, protocol: str, seed: int = 1) -> TracedRun:
    """Make one run, and keep all that was recorded of it.

    `.outcome` has its kind, downtime_ns and counters; `.timeline` every span of work with its cause (ns).
    UserError for an unknown scenario or protocol.
    """
    known = of_scenario(scenario)
    (chosen,) = _seeds([seed])
    return outside_of_loops(traced_run, known, Protocol.parse(protocol, known), chosen)


def compare_command(
    scenario_name: str, protocol_names: Sequence[str], seeds: int, changes: Mapping[str, Setting] | None = None
) -> str:
    """The command line that makes the same runs, with a table, a figure and a manifest in a folder.

    `seeds` is their number; they begin with 1. `changes` is parameter -> value, as for `load`.
    """
    command = ["proto-v3", "compare", scenario_name, "--protocols", ",".join(protocol_names), "--seeds", str(seeds)]
    return shlex.join([*command, *(part for each in _settings(changes or {}) for part in ("--set", each))])


# --- arguments --------------------------------------------------------------------------------------------------------


def of_scenario(scenario: Scenario | str) -> Scenario:
    """The scenario, loaded if it is a name."""
    return scenario if isinstance(scenario, Scenario) else load(scenario)


def _protocols(names: str | Sequence[str], scenario: Scenario) -> list[Protocol]:
    named = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    protocols = [Protocol.parse(name, scenario) for name in named]
    if not protocols or len({protocol.name for protocol in protocols}) < len(protocols):
        raise UserError(f"protocols {', '.join(named) or '[]'}: must be at least one, and each only once")
    return protocols


def _seeds(seeds: Seeds) -> list[int]:
    chosen = list(range(1, 1 + seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or not all(type(seed) is int and seed >= 0 for seed in chosen):
        raise UserError(f"seeds {seeds}: must be a number from 1, or different whole numbers from 0")
    return chosen


def _settings(changes: Mapping[str, Setting]) -> list[str]:
    """Each change as KEY=VALUE, as `--set` takes it."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]


def _cell_value(value: Setting) -> str | int | float | bool:
    """A list of texts is one text in a table."""
    return value if isinstance(value, (str, int, float, bool)) else " ".join(value)


# --- making them ------------------------------------------------------------------------------------------------------


def outcomes_of(cells: Sequence[Cell], jobs: int | None, progress: Progress) -> list[Outcome]:
    """Of all runs, in their order."""
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise UserError(f"jobs {jobs}: must be a whole number from 1, or None for one a CPU")
    done: dict[int, Outcome] = {}
    with _reported(progress, len(cells)) as report:
        for at, outcome in made_once(
            cells, _here if jobs == 1 else lambda some: in_processes(some, jobs, START_METHOD)
        ):
            done[at] = outcome
            report(len(done), len(cells))
    return [done[at] for at in range(len(cells))]


def _here(cells: Sequence[Cell]) -> Done:
    for at, cell in enumerate(cells):
        yield at, outside_of_loops(run_cell, cell)


def outside_of_loops(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call it in a thread of its own if an event loop runs in this one: the virtual clock is an event loop too."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work(*arguments, **options)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments, **options).result()


@contextlib.contextmanager
def _reported(progress: Progress, whole: int) -> Iterator[Callable[[int, int], None]]:
    """What to call after each run."""
    if not progress:
        yield lambda done, whole: None
    elif callable(progress):
        yield progress
    elif sys.stderr.isatty():
        with RunsProgress(whole) as bar:
            yield lambda done, whole: bar.advance()
    else:  # a notebook or a file: one line, written over
        yield lambda done, whole: print(f"\rruns: {done} of {whole}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
