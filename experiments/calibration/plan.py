# SPDX-License-Identifier: GPL-2.0-or-later
"""What is fitted: a TOML file with the keys that are free and the rigs whose figures are used.

A figure is used if its scenario lists it under `fitted` of its `[[published]]` entry. All others are predicted.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, model_validator

from proto_v3.errors import UserError
from sim.scenario.file import bases, explained, find, find_base, load, moved_to
from sim.scenario.scenario import Scenario
from sim.scenario.scenario import value_at as scenario_value
from sim.scenario.units import Table, short

SHIPPED = Path(__file__).with_name("mlx5.toml")


class FreeKey(Table):
    """One number to be found."""

    scenario: str
    """The scenario or base whose file has the value; scenarios that extend it inherit it."""
    keys: Annotated[list[str], Field(min_length=1)]
    """The keys that get the number. Several where the figures cannot tell them apart."""
    low: float | None = None
    high: float | None = None
    """The number is at least `low` and at most `high`. If left out, as the scenario's range of the first key says."""
    prior: float | None = None
    """Where the search begins, and to where a number is pulled that the figures do not tell. It is not the value in the
    scenario's file, so that a second fit finds what the first one found. If left out, the middle between the bounds."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.scenario}: {' = '.join(self.keys)}"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if (self.low is None) is not (self.high is None):
            raise ValueError("low, high: must be given both, or left out both")
        if self.low is not None and self.high is not None and not -math.inf < self.low < self.high < math.inf:
            raise self.wrong("low", f"must be less than high = {self.high:g}")
        return self

    @property
    def began(self) -> float:
        """The prior. KeyError as `bounds`."""
        return sum(self.bounds) / 2 if self.prior is None else self.prior

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value. KeyError if neither the plan nor the scenario has them."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        plausible = as_in_file(self.scenario).ranges[self.keys[0]]
        if plausible.low is None or plausible.high is None or plausible.of is not None:
            raise KeyError(self.keys[0])
        return plausible.low, plausible.high


class Rig(Table):
    """One machine that somebody measured."""

    name: str
    scenarios: Annotated[list[str], Field(min_length=1)]
    left_out: dict[str, float | Literal["base"]] = Field(default_factory=dict)
    """What its source does not state, when the rig is predicted from the others: a number, or that of the file at the
    bottom of what its scenarios extend. So it is for each free key of its own that is not listed."""


class Calibration(Table):
    """A file that says what is fitted to what."""

    free: Annotated[list[FreeKey], Field(min_length=1)]
    rig: Annotated[list[Rig], Field(min_length=1)]

    def rig_of(self, free: FreeKey) -> str | None:
        """The rig that alone has this key; None if rigs share it."""
        own = file_of(free.scenario)
        return next((rig.name for rig in self.rig if own in map(file_of, rig.scenarios)), None)


def read(path: Path) -> Calibration:
    """Read the file. UserError names the file, the key, the value and what would be right."""
    try:
        plan = Calibration.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    except pydantic.ValidationError as error:
        lines = [
            f"{'.'.join(map(str, each['loc']))} = {short(each['input'])}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        ]
        raise UserError(f"{path}: {'; '.join(lines)}") from error
    try:
        problems = list(_problems(plan))
    except UserError as error:  # a scenario that is not there, or is wrong
        raise UserError(f"{path}: {error}") from error
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return plan


def _problems(plan: Calibration) -> Iterator[str]:
    names = [name for rig in plan.rig for name in rig.scenarios]
    if len(set(names)) < len(names):
        yield f"rig.scenarios = {names}: must name each scenario once"
    rigs = [rig.name for rig in plan.rig]
    if len(set(rigs)) < len(rigs):
        yield f"rig.name = {rigs}: must differ from rig to rig"
    for name in dict.fromkeys(names):
        if not any(published.figures() for published in as_in_file(name).published):
            yield f"rig.scenarios: {name} has no published figures"
    for rig in plan.rig:
        for key, instead in rig.left_out.items():
            try:
                value_at(as_in_file(str(base_of(rig.scenarios[0])) if instead == "base" else rig.scenarios[0]), key)
            except KeyError:
                yield f"rig.left_out: {key!r}: must be a key with a number in what {rig.name}'s scenarios extend"
    known = {file for name in names for file in _chain(name)}
    for at, free in enumerate(plan.free):
        if file_of(free.scenario) not in known:
            yield f"free.{at}.scenario = {free.scenario!r}: must be a scenario of a rig, or what one extends"
            continue
        owner = as_in_file(free.scenario)
        wrong = [f"free.{at}.keys: {key!r}: {why}" for key in free.keys if (why := _not_free(owner, key))]
        yield from wrong
        try:
            bounds = free.bounds
        except KeyError:
            yield f"free.{at}.low: must be given, for {free.scenario} has no range from low to high of {free.keys[0]}"
            continue
        if not bounds[0] <= free.began <= bounds[1]:
            yield f"free.{at}.prior = {free.began:g}: must be from {bounds[0]:g} to {bounds[1]:g}"
        for end in () if wrong else bounds:
            try:
                moved_to(owner, dict.fromkeys(free.keys, end))
            except pydantic.ValidationError as error:
                yield f"free.{at}: {end:g} is not possible in {free.scenario}: {explained(error)}"


def _not_free(owner: Scenario, key: str) -> str:
    """Why the key of a scenario cannot be fitted; empty if it can."""
    try:
        whole = isinstance(value_at(owner, key), int)
    except KeyError:
        return f"must be a key with a number in {owner.name}"
    return "must not be a whole number" if whole else ""


def file_of(name: str) -> Path:
    """The file of a scenario, of a base, or of a path."""
    try:
        return find(name).resolve()
    except UserError:
        return find_base(name).resolve()


def _chain(name: str) -> list[Path]:
    """The file of a scenario, the one that it extends, and so on."""
    return [file_of(name), *(path.resolve() for path in bases(name))]


@cache
def as_in_file(name: str) -> Scenario:
    """The scenario or base of this name or path, as its file has it: read once."""
    return load(str(file_of(name)))


def value_at(scenario: Scenario, key: str) -> float:
    """A number of a scenario by its dotted key, defaults included; whole if the key's are. KeyError if it is none."""
    value = scenario_value(scenario, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise KeyError(key)
    return value


def base_of(name: str) -> Path:
    """The file at the bottom of what a scenario extends; its own if it extends nothing."""
    return _chain(name)[-1]


def reaches(free: FreeKey, name: str) -> list[str]:
    """The keys of `free` whose value scenario `name` has: its own, or inherited and not set on the way."""
    chain, owner = _chain(name), file_of(free.scenario)
    if owner not in chain:
        return []
    above = [tomllib.loads(path.read_text(encoding="utf-8")) for path in chain[: chain.index(owner)]]
    return [key for key in free.keys if not any(_sets(tables, key) for tables in above)]


def _sets(tables: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(tables, list) and part.isdecimal() and int(part) < len(tables):
            tables = tables[int(part)]
        elif isinstance(tables, dict) and part in tables:
            tables = tables[part]
        else:
            return False
    return True
