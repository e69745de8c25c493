# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics over repeated runs: means with intervals, paired effects, and a fitted scaling law.

Runs with the same seed have the same guest and the same firmware. So two protocols are compared seed by seed, and the
differences between seeds do not hide the difference between protocols. Intervals are 95 % intervals, by bootstrap over
seeds (scipy's, bias-corrected and accelerated), with a fixed generator: the same runs give the same interval. The
bootstrap draws from the values that there are: of few values its intervals are too narrow, so theirs are Student's.
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
ENOUGH_SEEDS = 10
"""For an interval by the bootstrap. Of fewer values it is Student's."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `count` values with its 95 % interval; the interval is a point if all values are equal, or if there is
    only one."""

    mean: float
    low: float
    high: float
    count: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def per(self, scale: float) -> Interval:
        """In another unit: all divided by `scale`."""
        return Interval(self.mean / scale, self.low / scale, self.high / scale, self.count)

    @property
    def percent(self) -> Interval:
        """A share in per cent."""
        return Interval(100 * self.mean, 100 * self.low, 100 * self.high, self.count)

    def text(self, unit: str = "", digits: int = 1, sign: str = "") -> str:
        """`12.3 ms (95 % interval 11.9 to 12.8)`; with `sign` "+", a sign before each number."""
        mean, low, high = (f"{value:{sign}z.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{f' {unit}' if unit else ''} (95 % interval {low} to {high})"

    def brief(self, unit: str = "", digits: int = 1, sign: str = "") -> str:
        """`12.3 ms (11.9 to 12.8)`; `sign` as in `text`."""
        mean, low, high = (f"{value:{sign}.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{f' {unit}' if unit else ''} ({low} to {high})"


def interval(values: Sequence[float] | Floats) -> Interval:
    """The mean of the values with its interval. ValueError if there are no values."""
    array = np.asarray(values, float)
    if not len(array):
        raise ValueError("no values: there is no mean")
    mean = float(array.mean())
    if len(array) < 2 or np.ptp(array) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, len(array))
    if len(array) < ENOUGH_SEEDS:
        half = students_half_width(array)
        return Interval(mean, mean - half, mean + half, len(array))
    found = _bootstrap((array,), np.mean, paired=False)
    return Interval(mean, *found, len(array))


def students_half_width(values: Sequence[float] | Floats) -> float:
    """The half width of the 95 % interval of the mean of these values, two at least, if they are normally
    distributed."""
    return float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))


def percentile(values: Sequence[float] | Floats, percent: int) -> float | None:
    """The least value that at least `percent` % of the values do not exceed; None if only the greatest value is so.

    So the 95th percentile needs 20 values, the 99th 100: fewer say nothing about what one run in 20, or in 100, takes.
    """
    rank = -(-percent * len(values) // 100)
    return float(np.sort(np.asarray(values, float))[rank - 1]) if 0 < rank < len(values) else None


def difference(before: Floats, after: Floats, *, paired: bool) -> Interval:
    """Mean of `after` minus mean of `before`, with its interval; ValueError if one of them has no values.

    Paired values are resampled as pairs, others each for itself. The interval is a point if it cannot be told from one
    value, or if no value differs.
    """
    if paired:
        return interval(after - before)
    if not len(before) or not len(after):
        raise ValueError("no values: there is no difference")
    mean, count = float(after.mean() - before.mean()), min(len(before), len(after))
    if count < 2 or (np.ptp(before) == 0 and np.ptp(after) == 0):
        return Interval(mean, mean, mean, count)
    if count < ENOUGH_SEEDS:
        variances = [float(values.var(ddof=1)) / len(values) for values in (before, after)]
        spread = sum(each**2 / (len(values) - 1) for each, values in zip(variances, (before, after), strict=True))
        half = float(stats.t.ppf((1 + LEVEL) / 2, sum(variances) ** 2 / spread)) * sum(variances) ** 0.5  # Welch's
        return Interval(mean, mean - half, mean + half, count)

    def of_means(a: Floats, b: Floats, axis: int = -1) -> Floats:
        differences: Floats = b.mean(axis=axis) - a.mean(axis=axis)
        return differences

    return Interval(mean, *_bootstrap((before, after), of_means, paired=False), count)


@dataclass(frozen=True, slots=True)
class Effect:
    """How `other` changes a column against `base`, over the seeds that were completed under both."""

    base: str
    other: str
    difference: Interval
    """Mean of other minus base, in the column's unit."""
    ratio: Interval
    """Mean of other over mean of base."""
    pairs: int
    lost: int
    """Seeds that both were given and one of them did not complete: they are not part of the effect."""

    @property
    def gain(self) -> Interval:
        """What `other` takes off, in per cent of the mean of `base`; negative if it adds."""
        mean, low, high = (100 * (1 - value) for value in (self.ratio.mean, self.ratio.high, self.ratio.low))
        return Interval(mean, low, high, self.ratio.count)

    @property
    def change(self) -> Interval:
        """What `other` adds, in per cent of the mean of `base`; negative if it takes off."""
        mean, low, high = (100 * (value - 1) for value in (self.ratio.mean, self.ratio.low, self.ratio.high))
        return Interval(mean, low, high, self.ratio.count)

    @property
    def shown(self) -> bool:
        """True if the difference's interval does not contain 0. One pair has no interval, and shows nothing."""
        return self.pairs > 1 and 0.0 not in self.difference

    def text(self, unit: str, scale: float = 1.0, digits: int = 1) -> str:
        """Difference, ratio, intervals and pairs; `scale` of the column's unit make one `unit`."""
        difference = self.difference.per(scale)
        mean, low, high = (f"{100 * (ratio - 1):+.1f}" for ratio in (self.ratio.mean, self.ratio.low, self.ratio.high))
        lost = f", {self.lost} seed(s) not completed under both" if self.lost else ""
        if self.pairs == 1:
            return f"{difference.mean:+.{digits}f} {unit}, {mean} %, one pair{lost}: no interval"
        verdict = "" if self.shown else ": no difference is shown"
        return f"{difference.text(unit, digits, '+')}, {mean} % ({low} to {high}), {self.pairs} pairs{lost}{verdict}"


def effect(frame: pl.DataFrame, column: str, base: str, other: str) -> Effect | None:
    """The effect paired by seed; None if no seed was completed under both.

    `frame` has the runs of one place of a grid, at least those of the two protocols.
    """
    seeds = [set(frame.filter(protocol=protocol)["seed"]) for protocol in (base, other)]
    wide = paired(frame, column, base, other)
    if wide.is_empty():
        return None
    before, after = wide[base].to_numpy().astype(float), wide[other].to_numpy().astype(float)
    lost = len(seeds[0] & seeds[1]) - wide.height
    return Effect(base, other, interval(after - before), _ratio(before, after), wide.height, lost)


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
    if len(before) < ENOUGH_SEEDS:  # to first order, the error of the ratio is that of the mean of what it leaves
        half = students_half_width((after - mean * before) / before.mean())
        return Interval(mean, mean - half, mean + half, len(before))

    def of_means(a: Floats, b: Floats, axis: int = -1) -> Floats:
        ratios: Floats = b.mean(axis=axis) / a.mean(axis=axis)
        return ratios

    return Interval(mean, *_bootstrap((before, after), of_means, paired=True), len(before))


def _bootstrap(values: tuple[Floats, ...], statistic: object, *, paired: bool) -> tuple[float, float]:
    """The BCa interval; where it is not defined (a statistic that hardly varies), the percentile interval."""
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # checked below
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
    """The part of `count` runs in which something happened, with Wilson's interval. ValueError for a count of 0."""
    if count < 1:
        raise ValueError("no runs: there is no share")
    found = stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / count, float(found.low), float(found.high), count)


# --- scaling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usl:
    """Gunther's Universal Scalability Law: throughput(n) = rate n / (1 + contention (n - 1) + coherency n (n - 1))."""

    rate: float
    """Throughput of one, in the unit of the fitted values."""
    contention: float
    coherency: float
    r_squared: float

    @property
    def best_n(self) -> float:
        """The n with the greatest throughput; infinity if it never falls."""
        if self.coherency <= 0:
            return float("inf")
        return float(np.sqrt(max(0.0, 1 - self.contention) / self.coherency))

    def at(self, n: Floats | float) -> Floats:
        """The throughput of n."""
        return _usl(np.asarray(n, float), self.rate, self.contention, self.coherency)


def _usl(n: Floats, rate: float, contention: float, coherency: float) -> Floats:
    throughput: Floats = rate * n / (1 + contention * (n - 1) + coherency * n * (n - 1))
    return throughput


def usl(n: Sequence[float] | Floats, throughput: Sequence[float] | Floats) -> Usl:
    """Fit the law by least squares, with contention and coherency at least 0. ValueError for fewer than three n."""
    at, measured = np.asarray(n, float), np.asarray(throughput, float)
    if len(np.unique(at)) < 3:
        raise ValueError(f"the scaling law needs at least three N; there are {len(np.unique(at))}")
    first = float(measured[at == at.min()].mean() / at.min())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # about the covariance, which is not used
        fitted, _ = optimize.curve_fit(
            _usl, at, measured, p0=[first, 0.05, 1e-4], bounds=([0, 0, 0], [np.inf, 1, 1]), x_scale=[first, 0.1, 0.01]
        )
    residual = measured - _usl(at, *fitted)
    spread = float(((measured - measured.mean()) ** 2).sum())
    return Usl(
        float(fitted[0]), float(fitted[1]), float(fitted[2]), 1 - float((residual**2).sum()) / spread if spread else 1.0
    )
