"""What can be said of repeated runs: means with intervals, paired effects, and a scaling law fitted.

Runs with the same seed have the same guest and the same firmware: so two protocols are compared seed by seed, and what
seeds differ in does not hide what protocols differ in. Intervals are of 95 %, by the bootstrap over seeds (scipy's,
bias-corrected and accelerated), with a fixed generator: the same runs give the same interval.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import optimize, stats

from experiments.runs.frame import COMPLETED

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `count` values, and its 95 % interval, which is a point if they are equal, or one."""

    mean: float
    low: float
    high: float
    count: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def told(self, unit: str = "", digits: int = 1) -> str:
        """`12.3 ms (95 % interval 11.9 to 12.8)`."""
        unit = f" {unit}" if unit else ""
        return f"{self.mean:.{digits}f}{unit} (95 % interval {self.low:.{digits}f} to {self.high:.{digits}f})"


def interval(values: Sequence[float] | Floats) -> Interval:
    """The mean of the values with its interval. ValueError if there is none."""
    told = np.asarray(values, float)
    if not len(told):
        raise ValueError("no values: there is no mean")
    mean = float(told.mean())
    if len(told) < 2 or np.ptp(told) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, len(told))
    found = _bootstrap((told,), np.mean, paired=False)
    return Interval(mean, *found, len(told))


@dataclass(frozen=True, slots=True)
class Effect:
    """What `other` does to a column against `base`, over the seeds that were completed under both."""

    base: str
    other: str
    difference: Interval
    """Of the means, other minus base, in the column's unit."""
    ratio: Interval
    """Of the means, other over base."""
    pairs: int
    lost: int
    """Seeds that one of the two did not complete: what is said is about the others."""

    @property
    def shown(self) -> bool:
        """Whether the difference's interval leaves 0 out; one pair has none, and shows nothing."""
        return self.pairs > 1 and 0.0 not in self.difference

    def told(self, unit: str, scale: float = 1.0, digits: int = 1) -> str:
        """In words: difference, ratio, intervals, pairs; `scale` of the column's unit make one of `unit`."""
        d, r = self.difference, self.ratio
        low, high, mean = d.low / scale, d.high / scale, d.mean / scale
        percent = [100 * (value - 1) for value in (r.mean, r.low, r.high)]
        lost = f", {self.lost} seed(s) not completed under both" if self.lost else ""
        if self.pairs == 1:
            return f"{mean:+.{digits}f} {unit}, {percent[0]:+.1f} %, one pair{lost}: no interval"
        verdict = "" if self.shown else ": no difference is shown"
        return (
            f"{mean:+.{digits}f} {unit} (95 % interval {low:+.{digits}f} to {high:+.{digits}f}), "
            f"{percent[0]:+.1f} % ({percent[1]:+.1f} to {percent[2]:+.1f}), {self.pairs} pairs{lost}{verdict}"
        )


def effect(frame: pl.DataFrame, column: str, base: str, other: str) -> Effect | None:
    """Paired by seed: `frame` has the runs of one place of a grid, at least those of the two protocols.

    None if no seed was completed under both.
    """
    planned = frame.filter(pl.col("protocol").is_in([base, other]))["seed"].n_unique()
    wide = paired(frame, column, base, other)
    if wide.is_empty():
        return None
    before, after = wide[base].to_numpy().astype(float), wide[other].to_numpy().astype(float)
    return Effect(base, other, interval(after - before), _ratio(before, after), wide.height, planned - wide.height)


def paired(frame: pl.DataFrame, column: str, base: str, other: str) -> pl.DataFrame:
    """One row for each seed that was completed under both protocols: seed, and the column under each."""
    runs = frame.filter(COMPLETED & pl.col("protocol").is_in([base, other]))
    wide = runs.pivot(on="protocol", index="seed", values=column)
    if base not in wide.columns or other not in wide.columns:
        return pl.DataFrame(schema={"seed": frame.schema["seed"], base: pl.Float64, other: pl.Float64})
    return wide.select("seed", base, other).drop_nulls().sort("seed")


def _ratio(before: Floats, after: Floats) -> Interval:
    mean = float(after.mean() / before.mean()) if before.mean() else float("nan")
    each = after * before.mean() - before * after.mean()
    if len(before) < 2 or np.ptp(each) <= 1e-9 * max(1.0, float(np.abs(each).max()), float(before.mean() ** 2)):
        return Interval(mean, mean, mean, len(before))

    def of_means(a: Floats, b: Floats, axis: int = -1) -> Floats:
        ratios: Floats = b.mean(axis=axis) / a.mean(axis=axis)
        return ratios

    return Interval(mean, *_bootstrap((before, after), of_means, paired=True), len(before))


def _bootstrap(values: tuple[Floats, ...], statistic: object, *, paired: bool) -> tuple[float, float]:
    """BCa; where that is not defined (a statistic that hardly varies), by percentiles."""
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # looked for below
            found = stats.bootstrap(
                values,
                statistic,
                paired=paired,
                vectorized=True,
                n_resamples=RESAMPLES,
                confidence_level=LEVEL,
                method=method,
                random_state=np.random.default_rng(0),
            ).confidence_interval
        if np.isfinite(found.low) and np.isfinite(found.high):
            break
    return float(found.low), float(found.high)


def share(successes: int, count: int) -> Interval:
    """How often something happened, with Wilson's interval. ValueError for a count of 0."""
    if count < 1:
        raise ValueError("no runs: there is no share")
    found = stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / count, float(found.low), float(found.high), count)


# --- scaling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usl:
    """Gunther's Universal Scalability Law: throughput(n) = rate n / (1 + contention (n - 1) + coherency n (n - 1))."""

    rate: float
    """Of one, in the unit that was given."""
    contention: float
    coherency: float
    r_squared: float

    @property
    def best_n(self) -> float:
        """Where the throughput is greatest; infinity if it never falls."""
        if self.coherency <= 0:
            return float("inf")
        return float(np.sqrt(max(0.0, 1 - self.contention) / self.coherency))

    def at(self, n: Floats | float) -> Floats:
        """The throughput of so many."""
        return _usl(np.asarray(n, float), self.rate, self.contention, self.coherency)


def _usl(n: Floats, rate: float, contention: float, coherency: float) -> Floats:
    told: Floats = rate * n / (1 + contention * (n - 1) + coherency * n * (n - 1))
    return told


def usl(n: Sequence[float] | Floats, throughput: Sequence[float] | Floats) -> Usl:
    """Fit the law by least squares, with contention and coherency from 0 on. ValueError for less than three points."""
    at, got = np.asarray(n, float), np.asarray(throughput, float)
    if len(np.unique(at)) < 3:
        raise ValueError(f"the scaling law needs at least three N; there are {len(np.unique(at))}")
    first = float(got[at == at.min()].mean() / at.min())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # of the covariance, which nobody asks for
        fitted, _ = optimize.curve_fit(
            _usl, at, got, p0=[first, 0.05, 1e-4], bounds=([0, 0, 0], [np.inf, 1, 1]), x_scale=[first, 0.1, 0.01]
        )
    left = got - _usl(at, *fitted)
    spread = float(((got - got.mean()) ** 2).sum())
    return Usl(
        float(fitted[0]), float(fitted[1]), float(fitted[2]), 1 - float((left**2).sum()) / spread if spread else 1.0
    )
