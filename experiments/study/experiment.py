"""What an experiment is: one question, a grid of runs, and what to make of them.

Each has a file of its own in this folder, which says `EXPERIMENT = Experiment(...)`, and its name in NAMES.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from experiments.runs.pool import Cell
from experiments.study.statistics import Effect, Interval
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = (
    "reconfiguration",
    "read_scaling",
    "state_and_dirty_rate",
    "switchover_hazard",
    "channels",
    "reorder_memory",
    "buffer_and_chunk",
    "many_devices",
    "ablation",
    "sensitivity",
)
"""In the order in which they are told."""
CLAIMS = {
    "C1": "v3 moves critical set-up out of the downtime under any rate of reconfiguration that it can outrun; "
    "v2 cannot tell",
    "C2": "with F firmware engines, a lock for each fd and a link to spare, stop-copy time falls as 1/min(N, F) until "
    "copy or link bind",
    "C3": "under one big lock, or with one engine, N buys nothing",
    "C4": "two fds give most of C1, N gives C2, and they are independent",
    "C5": "a pool of shared connections with critical-first service comes close to dedicated connections",
    "C6": "reorder memory at the target has a bound",
}
Verdict = Literal["supported", "refuted", "under conditions"]
KEY_CHARS = 12
NOT_OF_A_RUN = ("name", "description", "published", "sources")
"""Of a scenario: words that change nothing in a run."""


@dataclass(frozen=True, slots=True)
class Point:
    """A place of the grid: a scenario with what is set otherwise, under a protocol."""

    base: str
    """A shipped scenario's name."""
    protocol: str
    settings: tuple[str, ...] = ()
    """KEY=VALUE, as of `--set`."""
    factors: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """What is swept, by the name of its column in the table, with its unit: becomes part of each row."""
    repeats: int | None = None
    """At most so many, of a place that is to show a tendency only; else as many as the experiment has."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the runs say of a claim."""

    claim: str
    """A key of CLAIMS."""
    verdict: Verdict
    why: str
    """One sentence, with numbers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an experiment found. Every number is computed from its runs."""

    answer: str
    """To the question: one or two sentences, with a confidence interval."""
    limit: str
    """What it does not say: one sentence."""
    details: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    table: pl.DataFrame = field(default_factory=pl.DataFrame)
    """Effects with their intervals, one row a comparison, units in the column names."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question."""

    name: str
    question: str
    claims: Sequence[str]
    points: Callable[[bool], Sequence[Point]]
    """The grid; a coarse one if it is to be quick."""
    answer: Callable[[pl.DataFrame], Answer]
    """Of the table of runs, all of them."""
    figures: Callable[[pl.DataFrame, str], Mapping[str, Figure]]
    """By file name, of the table of runs and the command, which each figure tells."""
    repeats: int = 30
    quick_repeats: int = 3

    def planned(self, quick: bool) -> list[Planned]:
        """All runs of the grid, repeat by repeat. UserError for a grid that cannot be run."""
        seeds = range(1, 1 + (self.quick_repeats if quick else self.repeats))
        points = self.points(quick)
        return [
            Planned.of(point, seed)
            for seed in seeds
            for point in points
            if point.repeats is None or seed <= point.repeats
        ]


@dataclass(frozen=True, slots=True)
class Planned:
    """A run of a grid."""

    point: Point
    cell: Cell
    key: str
    """A fingerprint of all that the run depends on, but for the code."""

    @classmethod
    def of(cls, point: Point, seed: int) -> Planned:
        """UserError if the scenario cannot be run like that."""
        scenario, told = _scenario(point.base, point.settings)
        protocol = Protocol.parse(point.protocol, scenario)
        factors = json.dumps(dict(point.factors), sort_keys=True)
        key = hashlib.sha256(f"{told} {protocol.name} {seed} {factors}".encode()).hexdigest()[:KEY_CHARS]
        return cls(point, Cell(scenario, protocol, seed), key)

    def columns(self) -> dict[str, Any]:
        """What its row has beside the outcome's columns: enough to make the run again."""
        return {
            "cell": self.key,
            "base": self.point.base,
            "settings": list(self.point.settings),
            **self.point.factors,
        }


@lru_cache(maxsize=4096)
def _scenario(base: str, settings: tuple[str, ...]) -> tuple[Scenario, str]:
    scenario = load(base, settings)
    return scenario, scenario.model_dump_json(exclude=set(NOT_OF_A_RUN))


def find(name: str) -> Experiment:
    """By its name. UserError if there is none."""
    if name not in NAMES:
        raise UserError(f"no experiment {name!r}; there are {', '.join(NAMES)}, or all{did_you_mean(name, NAMES)}")
    experiment: Experiment = importlib.import_module(f"experiments.questions.{name}").EXPERIMENT
    return experiment


WORTH = 0.05
"""A change of the downtime below this is next to nothing: nobody would build an interface for it, in kernel, VMMs and
firmware."""
SETUP_LEFT = 0.02
"""Of the set-up that v2 has in its downtime, in the means: what a protocol that keeps it out may leave there."""
ACK_COMES_TOO_LATE = "its ack comes too late"
"""In the reason of a run that the reusable ack gave up (proto_v3.vmm.v2_source.LateAckError): it was told of the
late data."""
NOT_BOTH = "no seed was completed under both"


def effect_row(told: Effect | None, base: str, other: str, scale: float, unit: str) -> dict[str, Any]:
    """A row of a table of effects, in a unit that `scale` of the column's make one of; nulls if there is none."""
    row: dict[str, Any] = {"base": base, "other": other}
    for name, of in (("difference", told and told.difference), ("ratio", told and told.ratio)):
        by, suffix = (scale, f"_{unit}") if name == "difference" else (1.0, "")
        for part in ("mean", "low", "high"):
            row[f"{name}_{part}{suffix}"] = getattr(of, part) / by if of else None
    return row | {"pairs": told.pairs if told else 0, "lost": told.lost if told else None}


def kinds_told(runs: pl.DataFrame) -> str:
    """How many runs ended in which way: `3 FAILED, 2 DID_NOT_CONVERGE`."""
    return ", ".join(f"{count} {kind}" for kind, count in runs["outcome"].value_counts(sort=True).iter_rows())


def kept_out(left: Interval | None, before: float) -> bool | None:
    """Whether so much set-up in the downtime is next to nothing beside what v2 has, `before`, in the same unit; None if
    neither that nor the contrary is shown, or nothing is known."""
    if left is None:
        return None
    if left.mean <= SETUP_LEFT * before:
        return True
    return False if left.low > SETUP_LEFT * before else None


def gave_up() -> pl.Expr:
    """The runs that failed because critical data came too late, and the VMM saw it."""
    failed = pl.col("outcome") == OutcomeKind.FAILED.value
    return failed & pl.col("reason").fill_null("").str.contains(ACK_COMES_TOO_LATE, literal=True)


def places(frame: pl.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    """Each place of the grid, by these columns, with its runs, in the order of the table."""
    for key, runs in frame.group_by(*by, maintain_order=True):
        yield dict(zip(by, key, strict=True)), runs
