"""What the runs of experiments/questions/sensitivity/question.py give: the effect at each base, each end of a
parameter, each square."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from experiments.questions.sensitivity.grid import CONCLUSIONS, ENGINES_COLUMN, MAPS, V3, Conclusion, Map
from experiments.runs.frame import COMPLETED
from experiments.study.experiment import NOT_BOTH, WORTH
from experiments.study.statistics import Effect, Interval, effect

FEWEST = 3
"""Seeds that both completed, for a ratio at an end of a parameter."""
MULTIFD = CONCLUSIONS[1]
"""The strongest v2 for idle devices: what N streams are held against."""


@dataclass(frozen=True, slots=True)
class RangeEnd:
    """A parameter's end: its value, the effect there, and what was not completed."""

    at: str
    told: Effect | None
    left: str
    """`v2 10 DID_NOT_CONVERGE`; empty if all were completed."""

    @property
    def ratio(self) -> Interval | None:
        """Downtime of v3 over the other's."""
        return self.told.ratio if self.told else None

    @property
    def words(self) -> str:
        """`0.912 (0.905 to 0.918) at 195`."""
        if self.told is None:
            return f"no ratio at {self.at} ({self.left or NOT_BOTH})"
        pairs = f", {self.told.pairs} pairs" if self.told.lost else ""
        return f"{ratio_told(self.told.ratio)} at {self.at}{pairs}"


@dataclass(frozen=True, slots=True)
class Bar:
    """How far a conclusion's ratio moves with a parameter."""

    parameter: str
    base: Effect | None
    low: RangeEnd
    high: RangeEnd

    @property
    def swing(self) -> float:
        """From the least to the greatest ratio, of the base and the two ends that have one."""
        means = [each.ratio.mean for each in (self.base, self.low.told, self.high.told) if each]
        return max(means) - min(means) if means else 0.0


def ratio_told(of: Interval) -> str:
    """`0.912 (0.905 to 0.918)`."""
    return f"{of.mean:.3f} ({of.low:.3f} to {of.high:.3f})"


def gain_told(of: Interval) -> str:
    """`8.8 % (8.2 to 9.5)`."""
    return f"{100 * (1 - of.mean):.1f} % ({100 * (1 - of.high):.1f} to {100 * (1 - of.low):.1f})"


def is_under(of: Interval | None) -> bool:
    """Whether it is shown that the gain is less than WORTH."""
    return of is not None and of.low > 1 - WORTH


def _effect(runs: pl.DataFrame, conclusion: Conclusion) -> Effect | None:
    return effect(runs.filter(pl.col("base") == conclusion.base), "downtime_ns", conclusion.against, V3)


def base(frame: pl.DataFrame, conclusion: Conclusion) -> Effect | None:
    """With no parameter moved."""
    return _effect(frame.filter(pl.col("part") == "base"), conclusion)


def bars(frame: pl.DataFrame, conclusion: Conclusion) -> list[Bar]:
    """Each parameter that was moved, the greatest swing first."""
    runs = frame.filter((pl.col("part") == "tornado") & (pl.col("base") == conclusion.base))
    at_base, told = base(frame, conclusion), []
    for (parameter,), of_parameter in runs.group_by("parameter", maintain_order=True):
        low, high = (_end(of_parameter.filter(pl.col("side") == side), conclusion) for side in ("low", "high"))
        told.append(Bar(str(parameter), at_base, low, high))
    return sorted(told, key=lambda bar: bar.swing, reverse=True)


def _end(runs: pl.DataFrame, conclusion: Conclusion) -> RangeEnd:
    of_both = runs.filter(pl.col("protocol").is_in([conclusion.against, V3]))
    left = of_both.filter(~COMPLETED).group_by("protocol", "outcome", maintain_order=True).len("runs")
    words = ", ".join(f"{protocol} {count} {kind}" for protocol, kind, count in left.iter_rows())
    told = _effect(runs, conclusion)
    return RangeEnd(str(runs["at"].first()) if runs.height else "", told if _enough(told, runs) else None, words)


def _enough(told: Effect | None, runs: pl.DataFrame) -> bool:
    """Whether so many seeds were completed by both that a ratio says something."""
    return told is not None and told.pairs >= min(FEWEST, runs["seed"].n_unique())


def square(frame: pl.DataFrame, of: Map, engines: float, value: float, against: str) -> Effect | None:
    """A place of a map."""
    runs = frame.filter((pl.col("part") == "map") & (pl.col(ENGINES_COLUMN) == engines) & (pl.col(of.column) == value))
    told = _effect(runs, Conclusion("", of.base, against))
    return told if _enough(told, runs) else None


def maps_run(frame: pl.DataFrame) -> list[tuple[Map, str]]:
    """Those that were run, with each protocol that v3 is held against there."""
    found = [of for of in MAPS if of.column in frame.columns]
    return [(of, against) for of in found for against in of.protocols if against != V3]


def sides(frame: pl.DataFrame, of: Map) -> tuple[list[float], list[float]]:
    """The engines and the values of the second parameter that were run."""
    runs = frame.filter((pl.col("part") == "map") & (pl.col("base") == of.base))
    return sorted(runs[ENGINES_COLUMN].unique()), sorted(runs[of.column].unique())


def ratio_of(told: Effect | None) -> Interval | None:
    """Its ratio, if there is an effect."""
    return told.ratio if told else None
