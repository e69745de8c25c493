# SPDX-License-Identifier: GPL-2.0-or-later
"""Plausible scenarios: values drawn from the ranges of one, the same ones for every protocol.

A sample is a point of the unit cube with a dimension a range, in the order of their names. `validate`, `fit` and
whatever else varies what is uncertain use this, so that all mean the same by a band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic

from proto_v3.errors import UserError
from sim.scenario.file import explained, moved_to
from sim.scenario.scenario import Scenario, parameters, value_at
from sim.scenario.units import short

MAX_SAMPLES = 1 << 16


@dataclass(frozen=True, slots=True)
class Sample:
    """One plausible scenario."""

    values: Mapping[str, Any]
    """What it has of the keys with a range, by dotted key, in the key's unit."""
    scenario: Scenario
    """With these values, and no ranges."""
    places: Mapping[str, float]
    """Where each of these keys was drawn in its range, from 0 to 1: independent of one another."""


def dimensions(scenario: Scenario) -> list[str]:
    """The keys that have a range: a point has a coordinate for each, in this order."""
    return sorted(scenario.ranges)


def draw(scenario: Scenario, count: int, seed: int = 0) -> list[Sample]:
    """`count` samples of the ranges of a scenario: scrambled Sobol points, the same for the same ranges and seed.

    The first ones of many are those of few. A scenario without ranges has one sample, which is itself.
    UserError if `count` is not from 1 to MAX_SAMPLES, or as for `at`.
    """
    if not 1 <= count <= MAX_SAMPLES:
        raise UserError(f"samples = {count}: must be from 1 to {MAX_SAMPLES}")
    if not scenario.ranges:
        return [Sample({}, scenario, {})]
    from scipy.stats import qmc

    cube = qmc.Sobol(len(scenario.ranges), scramble=True, seed=np.random.default_rng(seed))
    return [at(scenario, point) for point in cube.random_base2((count - 1).bit_length())[:count]]


def at(scenario: Scenario, point: Sequence[float]) -> Sample:
    """The sample at a point of the unit cube, with a coordinate from 0 to 1 for each of `dimensions`.

    A key whose range is told `of` another one gets its share of what that one is in the sample. Keys that the schema
    keeps below others (sim.scenario.ranges.ORDERED) are cut there. UserError for values that do not go together
    otherwise.
    """
    keys, values, drawn = dimensions(scenario), parameters(scenario), dict[str, Any]()
    places = dict(zip(keys, map(float, point), strict=True))
    for key in sorted(keys, key=lambda key: scenario.ranges[key].of is not None):
        drawn[key] = scenario.ranges[key].at(places[key], key, values | drawn)
    try:
        there = moved_to(scenario, drawn, values)
        return Sample({key: value_at(there, key) for key in keys}, there, places)
    except pydantic.ValidationError as error:
        shown = ", ".join(f"{key} = {short(value)}" for key, value in drawn.items())
        why = "a narrower range, or one told `of` the other key, keeps them apart"
        raise UserError(
            f"{scenario.name}: values in their ranges do not go together: {explained(error)}; {why} ({shown})"
        ) from None
