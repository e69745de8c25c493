# SPDX-License-Identifier: GPL-2.0-or-later
"""The fit: least squares over the free keys, leave-one-rig-out, and what the figures cannot tell.

A free number is a share u of its range, 0 to 1. A residual is log(simulated / published), so that 10 % count the same
for 2 ms and for 2 s; each rig counts the same, however many figures it has. To each number one more residual is added,
PULL x (u - the prior's u): what no figure depends on is the prior. So the values do not hang on those in the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from experiments.calibration.figures import RigFigure, SimulatedFigures, Values
from experiments.calibration.plan import Calibration

Floats = NDArray[np.float64]

PULL = 0.02
"""The residual of a number that moved through its whole range."""
STEP = 0.08
"""Of a difference quotient, as a share of the range: large, for the VMM's rounds make small steps in the figures."""
GAIN = 0.02
"""By so much the sum of squares of the figures must become less for values to be taken instead of the priors."""
NOT_SIMULATED = 1.0
"""The residual of a figure that a run does not have, for instance because it did not converge."""
EDGE = 2e-3
"""A number that is found within this share of an end of its range is that end: the search itself starts inside."""
MOST_STEPS, MOST_STEPS_LEFT_OUT = 12, 6
LEAST_ERROR = 1e-3
"""The error of a figure, in the mean, is at least taken to be this."""
BLIND = 0.25
"""A direction is not told by the figures if its standard error is more than this share of the ranges."""
ALIKE = 0.9
"""Correlation from which two numbers are said not to be told apart."""


@dataclass(frozen=True, slots=True)
class CalibrationFit:
    """The values that were found, and the figures that they give."""

    values: Values
    targets: Sequence[RigFigure]
    simulated_ms: Sequence[float | None]

    def errors(self) -> list[float | None]:
        """Relative errors, a figure each."""
        pairs = zip(self.simulated_ms, self.targets, strict=True)
        return [None if ms is None else ms / target.published_ms - 1 for ms, target in pairs]


@dataclass(frozen=True, slots=True)
class Blind:
    """What the figures do not tell."""

    keys: Sequence[str]
    why: str


class Fitter:
    """Least squares for one plan."""

    def __init__(self, plan: Calibration, figures: SimulatedFigures) -> None:
        self._plan = plan
        self._figures = figures
        self._low, high = np.array([free.bounds for free in plan.free]).T
        self._width = high - self._low

    def fit(self) -> CalibrationFit:
        """Fit all free keys to all figures that are used."""
        every = list(range(len(self._plan.free)))
        prior = self._prior()
        values = self._solve(prior, every, self._used(), MOST_STEPS)
        before, after = (self._residuals([prior, values], self._used()) ** 2).sum(axis=1)
        if after > (1 - GAIN) * before:
            return self.with_values(prior)
        shares = (np.array(values) - self._low) / self._width
        shares = np.where(shares < EDGE, 0.0, np.where(shares > 1 - EDGE, 1.0, shares))
        return self.with_values(tuple(float(f"{value:.3g}") for value in self._at(shares, every, values)))

    def with_values(self, values: Values) -> CalibrationFit:
        """All figures, used or predicted, with these values."""
        targets = self._figures.targets
        return CalibrationFit(values, targets, self._figures.of([values], targets)[0])

    def without(self, rig: str) -> CalibrationFit:
        """Predict a rig's figures from the other rigs: their figures alone are fitted, from the declared priors on, and
        keys that were fitted to this rig have what the base says. What its source states, its scenarios keep."""
        free = [at for at, key in enumerate(self._plan.free) if self._plan.rig_of(key) != rig]
        others = [target for target in self._used() if target.rig != rig]
        values = self._solve(self._prior(), free, others, MOST_STEPS_LEFT_OUT)
        targets = [target for target in self._figures.targets if target.rig == rig]
        return CalibrationFit(values, targets, self._figures.of([values], targets, as_stated=True)[0])

    def blind(self, values: Values) -> Iterator[Blind]:
        """Keys that no figure depends on, directions that the figures do not fix, and keys that they mix up."""
        used, every = self._used(), list(range(len(self._plan.free)))
        shares = (np.array(values) - self._low) / self._width
        data = self._slopes(shares, every, values, used)
        names = [key.name for key in self._plan.free]
        seen = np.linalg.norm(data, axis=0) > 0
        for at in np.flatnonzero(~seen):
            yield Blind([names[at]], f"no figure changes with a step of {100 * STEP:.0f} % of its range")
        if not seen.any():
            return
        kept = np.flatnonzero(seen)
        weight = np.sqrt(self._weights(used))
        misfit = self._residuals([values], used)[0] / weight
        error = max(LEAST_ERROR, float(np.sqrt(np.mean(misfit**2)))) * np.mean(weight)
        _, singular, directions = np.linalg.svd(data[:, kept], full_matrices=True)
        singular = np.pad(singular, (0, len(kept) - len(singular)))
        for value, direction in zip(singular, directions, strict=True):
            if error > BLIND * value:
                largest = [kept[at] for at in np.argsort(-np.abs(direction)) if abs(direction[at]) > 0.3]
                signs = [f"{'+' if direction[list(kept).index(at)] > 0 else '-'}{names[at]}" for at in largest]
                spread = "more than the whole range" if error > value else f"{100 * error / value:.0f} % of the range"
                yield Blind(signs, f"these may move together by {spread} (one standard error)")
        covariance = np.linalg.inv(data[:, kept].T @ data[:, kept] / error**2 + 12 * np.eye(len(kept)))
        deviation = np.sqrt(np.diag(covariance))
        alike = covariance / np.outer(deviation, deviation)
        for one, other in zip(*np.triu_indices(len(kept), 1), strict=True):
            if abs(alike[one, other]) > ALIKE:
                pair = [names[kept[one]], names[kept[other]]]
                yield Blind(pair, f"correlation {alike[one, other]:+.2f}")

    def _prior(self) -> Values:
        return tuple(free.began for free in self._plan.free)

    def _used(self) -> list[RigFigure]:
        return [target for target in self._figures.targets if target.used]

    def _weights(self, targets: Sequence[RigFigure]) -> Floats:
        """The squares of a rig's residuals are averaged."""
        rigs = [target.rig for target in targets]
        return np.array([1 / rigs.count(rig) for rig in rigs])

    def _residuals(self, points: Sequence[Values], targets: Sequence[RigFigure]) -> Floats:
        """Shape (points, targets)."""
        weight = np.sqrt(self._weights(targets))
        return np.array(
            [
                [
                    NOT_SIMULATED if ms is None else np.log(max(ms, 1e-3) / target.published_ms)
                    for ms, target in zip(row, targets, strict=True)
                ]
                for row in self._figures.of(points, targets)
            ]
        ) * (weight if len(targets) else 1.0)

    def _at(self, shares: Floats, free: Sequence[int], fixed: Values) -> Values:
        values = list(fixed)
        for share, at in zip(shares, free, strict=True):
            values[at] = float(self._low[at] + share * self._width[at])
        return tuple(values)

    def _slopes(self, shares: Floats, free: Sequence[int], fixed: Values, targets: Sequence[RigFigure]) -> Floats:
        """Difference quotients of the residuals, towards the middle of the range. Shape (targets, free)."""
        steps = np.where(shares < 0.5, STEP, -STEP)
        points = [self._at(shares, free, fixed)]
        points += [self._at(shares + step, free, fixed) for step in np.diag(steps)]
        rows = self._residuals(points, targets)
        return np.asarray((rows[1:] - rows[0]) / steps[:, None]).T

    def _solve(self, start: Values, free: Sequence[int], targets: Sequence[RigFigure], steps: int) -> Values:
        """The values with the free ones moved to the least squares of the targets."""
        began = np.clip([(start[at] - self._low[at]) / self._width[at] for at in free], EDGE / 2, 1 - EDGE / 2)

        def residuals(shares: Floats) -> Floats:
            data = self._residuals([self._at(shares, free, start)], targets)[0]
            return np.concatenate([data, PULL * (shares - began)])

        def slopes(shares: Floats) -> Floats:
            return np.vstack([self._slopes(shares, free, start, targets), PULL * np.eye(len(free))])

        found = optimize.least_squares(
            residuals, began, slopes, bounds=(0, 1), max_nfev=steps, ftol=1e-3, xtol=1e-3, gtol=1e-4
        )
        return self._at(found.x, free, start)
