# SPDX-License-Identifier: GPL-2.0-or-later
"""Which uncertain key decides whether a change is worth making: Sobol's indices, and where the answer turns.

A first-order index of a key is the part of the variance of the gain that the key alone explains. It is estimated from
the samples that are there, by RBD-FAST of SALib (Tarantola and others 2006; Plischke 2010; the bias is taken off as by
Tissot and Prieur 2012). Sobol points are not independent in every pair of some thirty dimensions: by itself the
estimate gives a key that does nothing up to half of what another one explains. So what all other keys explain is taken
off first, as a fit of polynomials of all keys together sees it. What the indices leave of 1 is of keys together, of the
runs' own spread, and of the error.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.decision.bands import Floats

MISSING = "which parameter decides is not known: it takes SALib; install proto-v3[indices]"
LEAST_SAMPLES = 128
"""With fewer, an index says little. Ours."""
HARMONICS = 6
"""Of the gain over each key. More see sharper steps, and more noise (2 x harmonics / samples). Ours."""
DEGREE = 3
"""Of the polynomials of each key, less with few samples: two for each coefficient at least. Ours."""
LEAST_INDEX, OF_SAMPLES = 0.1, 256
"""What so many samples can give a key that does nothing, at the most. Measured (test_decision.py). Less is not told; of
fewer samples more, by the root."""
LEAST_SPREAD_PERCENT = 1.0
"""If a gain differs by less than this between machines, nothing decides. Ours."""
RESAMPLES = 20
"""Of the bootstrap."""
CONFIDENCE = 0.95
FULL_PERCENT = 100.0
"""What a run counts that completes where the one above does not; less that, the other way round."""


@dataclass(frozen=True, slots=True)
class Index:
    """How much a key decides."""

    key: str
    first_order: float
    half_width: float
    """Of its 95 % interval (bootstrap)."""
    least: float = LEAST_INDEX
    """What a key that does nothing may get."""

    @property
    def told(self) -> bool:
        """Whether it is more than noise."""
        return self.first_order > max(self.half_width, self.least)


def has_indices() -> bool:
    """Whether SALib is installed."""
    return importlib.util.find_spec("SALib") is not None


def indices(places: Mapping[str, Sequence[float]], values: Floats) -> list[Index]:
    """The first-order index of each key for `values`, the largest first.

    `places` has, for each key, a number a sample, independent of those of other keys. Nothing comes of fewer than
    LEAST_SAMPLES, and of values that do not vary. ImportError without SALib.
    """
    if len(values) < LEAST_SAMPLES or not places or np.ptp(values) == 0:
        return []
    from SALib.analyze import rbd_fast

    found, points = [], np.column_stack([np.asarray(each, dtype=float) for each in places.values()])
    parts, least = _parts(points, values), LEAST_INDEX * math.sqrt(OF_SAMPLES / len(values))
    for at, key in enumerate(places):
        rest = values - parts.sum(axis=1) + parts[:, at]
        told = rbd_fast.analyze(
            {"num_vars": 1, "names": [key]},
            points[:, [at]],
            rest,
            M=HARMONICS,
            num_resamples=RESAMPLES,
            conf_level=CONFIDENCE,
            seed=0,
        )
        share = float(np.var(rest) / np.var(values))
        found.append(Index(key, share * float(told["S1"][0]), share * float(told["S1_conf"][0]), least))
    return sorted(found, key=lambda each: -each.first_order)


def _parts(points: Floats, values: Floats) -> Floats:
    """What each key explains of each value, by least squares over Legendre polynomials of all keys: samples x keys."""
    count, keys = points.shape
    degree = max(1, min(DEGREE, count // 2 // keys))
    terms = np.polynomial.legendre.legvander(2 * points - 1, degree)[:, :, 1:]
    factors, *_ = np.linalg.lstsq(np.column_stack([np.ones(count), terms.reshape(count, -1)]), values, rcond=None)
    parts: Floats = np.einsum("skd,kd->sk", terms, factors[1:].reshape(keys, degree))
    return parts


def bounded(gains_percent: Floats) -> Floats:
    """Gains that a variance can be taken of: a run that completes, or does not, counts as all of the downtime."""
    return np.clip(gains_percent, -FULL_PERCENT, FULL_PERCENT)


@dataclass(frozen=True, slots=True)
class Turn:
    """Where the answer turns as one key moves through its range."""

    value: Any
    """Of a number, the value between the two answers; of other keys, the list of those for which it is yes."""
    above: bool = True
    """It is yes above the value."""


def turn(values: Sequence[Any], yes: Sequence[bool]) -> Turn | None:
    """The value of a key from which on the answer is another one; None if it is mostly the same everywhere.

    Of all values that could divide the samples in two, the one that leaves fewest of them with the other side's answer.
    It must leave fewer than half as many as one answer for all.
    """
    answers = np.asarray(yes, dtype=bool)
    least = min(int(answers.sum()), int((~answers).sum()))
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values):
        texts = np.array([str(each) for each in values])
        kinds = {each: answers[texts == each] for each in dict.fromkeys(texts)}
        wrong = sum(min(int(each.sum()), int((~each).sum())) for each in kinds.values())
        for_yes = [str(name) for name, each in kinds.items() if 2 * each.sum() > len(each)]
        return Turn(for_yes) if for_yes and 2 * wrong < least else None
    order = np.argsort(np.asarray(values, dtype=float), kind="stable")
    numbers, answers = np.asarray(values, dtype=float)[order], answers[order]
    below = np.cumsum(answers)[:-1]  # yes among the first 1, 2, ...
    count = np.arange(1, len(answers))
    wrong_above = below + (len(answers) - count) - (answers.sum() - below)  # yes above, no below
    wrong_below = len(answers) - wrong_above
    divides = numbers[1:] > numbers[:-1]
    if not divides.any():
        return None
    best = {up: np.where(divides, wrong, len(answers)) for up, wrong in ((True, wrong_above), (False, wrong_below))}
    up = bool(best[True].min() <= best[False].min())
    at = int(best[up].argmin())
    if 2 * best[up][at] >= least:
        return None
    return Turn(float(numbers[at] + numbers[at + 1]) / 2, up)
