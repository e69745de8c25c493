# SPDX-License-Identifier: GPL-2.0-or-later
"""What an experiment is: one question, a grid of runs, and the function that answers the question from the runs.

Each has a module of its own in experiments/questions, which defines `EXPERIMENT = Experiment(...)`; NAMES lists them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import polars as pl

from experiments.runs.pool import Cell
from experiments.study.claims import Finding
from experiments.study.names import QUESTIONS
from proto_v3.errors import UserError
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import NO_PARAMETERS, Scenario
from sim.scenario.units import did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = tuple(QUESTIONS)
"""In the order of the report."""
KEY_CHARS = 12
Factor = str | int | float | bool


def under(table: str, **values: Factor) -> tuple[str, ...]:
    """Settings of a scenario's table, KEY=VALUE each: `under("ram", size_gib=2, nonzero_gib=0.25)`."""
    return tuple(
        f"{table}.{key}={value:g}" if isinstance(value, float) else f"{table}.{key}={value}"
        for key, value in values.items()
    )


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the grid under one protocol: a scenario and the settings that differ from it."""

    base: str
    """A shipped scenario's name."""
    protocol: str
    settings: tuple[str, ...] = ()
    """KEY=VALUE, as for `--set`."""
    factors: Mapping[str, Factor] = field(default_factory=dict)
    """The swept values, by column of the table of runs, units in the names. Each row contains them."""
    repeats: int | None = None
    """The most repeats of this point, for points that show a tendency only; None: as many as the experiment
    has."""
    every_seed: bool = False
    """Rare events are counted here, such as failures or late data: all repeats are made, however narrow the intervals
    of the means are."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an experiment found. Each number is computed from its runs."""

    answer: str
    """The answer to the question: one or two sentences, with a confidence interval."""
    limit: str
    """What the answer does not cover: one sentence."""
    details: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    table: pl.DataFrame = field(default_factory=pl.DataFrame)
    """Effects with their intervals, one row a comparison, units in the column names."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question."""

    name: str
    question: str
    points: Callable[[bool], Sequence[Point]]
    """The grid; True asks for a coarse one, for a quick run."""
    answer: Callable[[pl.DataFrame], Answer]
    """Computed from the table of all runs."""
    figures: Callable[[pl.DataFrame, str], Mapping[str, Figure]]
    """Figures by file name, drawn from the table of runs; each shows the command that made the runs."""
    repeats: int = 30
    """The most of a point (experiments.study.seeds)."""
    quick_repeats: int = 3
    values: Sequence[Sequence[str]] = (("downtime_ns",),)
    """What the answer tells of a run, each as the columns of the table of runs whose sum it is: a point gets as many
    repeats as the intervals of these need."""

    def planned(self, quick: bool, settings: Sequence[str] = ()) -> list[Planned]:
        """All runs that the grid can ask for, repeat by repeat, each once.

        `settings`, KEY=VALUE each, change the scenarios that it builds on.
        UserError if a point cannot be run, or if a setting is about a key that the question sets itself.
        """
        seeds = range(1, 1 + (self.quick_repeats if quick else self.repeats))
        points = self.points(quick)
        if settings:
            self._check(settings, points)
            points = [replace(point, settings=(*settings, *point.settings)) for point in points]
        planned = (
            Planned.of(point, seed)
            for seed in seeds
            for point in points
            if point.repeats is None or seed <= point.repeats
        )
        return list({each.key: each for each in planned}.values())

    def _check(self, settings: Sequence[str], points: Sequence[Point]) -> None:
        own = {setting.partition("=")[0].strip() for point in points for setting in point.settings}
        for point in {point.protocol: point for point in points}.values():
            changes = Protocol.parse(point.protocol, _scenario(point.base, point.settings)[0]).changes
            own |= {f"{table}.{key}" for table, keys in changes.items() for key in keys}
        for setting in settings:
            key = setting.partition("=")[0].strip()
            for swept in sorted(own):
                if f"{key}.".startswith(f"{swept}.") or f"{swept}.".startswith(f"{key}."):
                    raise UserError(f"--set {setting}: {self.name} sets {swept} itself, so no other value can be given")


@dataclass(frozen=True, slots=True)
class Planned:
    """A run of a grid."""

    point: Point
    cell: Cell
    key: str
    """A fingerprint of all inputs of the run except the code."""

    @classmethod
    def of(cls, point: Point, seed: int) -> Planned:
        """UserError if the scenario cannot be run like that."""
        scenario, as_json = _scenario(point.base, point.settings)
        protocol = _protocol(point.base, point.settings, point.protocol)
        factors = json.dumps(dict(point.factors), sort_keys=True)
        key = hashlib.sha256(f"{as_json} {protocol.name} {seed} {factors}".encode()).hexdigest()[:KEY_CHARS]
        return cls(point, Cell(scenario, protocol, seed), key)

    def columns(self) -> dict[str, Any]:
        """The columns of its row beside those of the outcome: enough to make the run again."""
        point = self.point
        return {"cell": self.key, "base": point.base, "settings": list(point.settings), **point.factors}


@lru_cache(maxsize=4096)
def _scenario(base: str, settings: tuple[str, ...]) -> tuple[Scenario, str]:
    scenario = load(base, settings)
    return scenario, scenario.model_dump_json(exclude=set(NO_PARAMETERS))


@lru_cache(maxsize=4096)
def _protocol(base: str, settings: tuple[str, ...], name: str) -> Protocol:
    return Protocol.parse(name, _scenario(base, settings)[0])


def find(name: str) -> Experiment:
    """The experiment with this name. UserError if there is none."""
    if name not in NAMES:
        raise UserError(f"no experiment {name!r}; there are {', '.join(NAMES)}, or all{did_you_mean(name, NAMES)}")
    experiment: Experiment = importlib.import_module(f"experiments.questions.{name}").EXPERIMENT
    return experiment
