# SPDX-License-Identifier: GPL-2.0-or-later
"""`[ranges]` of a scenario: which values of a key are plausible beside the one that is set, and why."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from sim.scenario import toml
from sim.scenario.units import Table, Text, did_you_mean, short

MAX_CHOICES = 64
SURE = ("published", "measured", "kernel", "qemu", "yours")
"""Kinds of sources whose values need no range. The others are `bounded`, `fitted`, `derived` and `assumed`."""
ORDERED = {
    "ram.nonzero_gib": ("ram.size_gib", 1.0),
    "ram.working_set_mib": ("ram.size_gib", 1024.0),
    "host.copy_gib_per_s": ("host.memory_gib_per_s", 1.0),
    "link.per_connection_gbit_per_s": ("link.gbit_per_s", 1.0),
    "vmm.read_mib": ("link.socket_buffer_mib", 1.0),
    "device.stop_only_mib": ("device.state_mib", 1.0),
}
"""Keys that the schema keeps below another one, with the factor between their units. Where a sample puts them above it,
they get its value; so does one that a user's file inherits, whose other key it sets."""
Choice = bool | int | float | str | list[str]
Values = Mapping[str, Any]
"""By dotted key."""


class Range(Table):
    """Plausible values of a key: from `low` to `high`, or `any` of a list."""

    low: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The least plausible value, in the key's unit."""
    high: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The greatest plausible value."""
    log: bool = False
    """Equally likely are equal ratios, not equal differences: for a range of more than a decade."""
    of: Text | None = None
    """Another key: `low` and `high` are factors of its value, whatever that is in a sample."""
    any: Annotated[list[Choice], Field(min_length=2, max_length=MAX_CHOICES)] | None = None
    """In place of low and high: the plausible values of a word, a switch or a number, all equally likely."""
    why: Text
    """The reason: what was seen or what others say, and where."""

    @model_validator(mode="after")
    def _form(self) -> Self:
        if not self.why.strip():
            raise ValueError('why = "": must say why these values are plausible')
        if self.any is not None:
            if given := [key for key in ("low", "high", "of") if getattr(self, key) is not None]:
                raise self.wrong(given[0], "must be left out where any = [...] lists the values")
            if self.log:
                raise self.wrong("log", "must be left out where any = [...] lists the values")
            if any(_same(one, other) for at, one in enumerate(self.any) for other in self.any[:at]):
                raise self.wrong("any", "must name each value once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("low, high: must be given both, or any = [...] in their place")
        if self.low > self.high or (self.low == self.high and self.of is None):
            raise self.wrong("low", f"must be less than high = {self.high:g}")
        if self.log and self.low <= 0:
            raise self.wrong("low", "must be greater than 0 where log = true")
        return self

    @property
    def words(self) -> str:
        """`1 to 4`, `1 to 100 (log)`, `0.5 to 1 x device.0.state_mib`, `full, left`."""
        if self.any is not None:
            return ", ".join(_word(each) for each in self.any)
        assert self.low is not None
        assert self.high is not None
        both = f"{self.low:g} to {self.high:g}" if self.low < self.high else f"{self.low:g}"
        return both + (f" x {self.of}" if self.of else "") + (" (log)" if self.log else "")

    def ends(self, key: str, values: Values) -> list[Any]:
        """The least and the greatest value of `key`, or all choices. `values` has the scenario's, by key."""
        return list(self.any) if self.any is not None else [self.at(where, key, values) for where in (0.0, 1.0)]

    def at(self, where: float, key: str, values: Values) -> Any:
        """The value of `key` at a place from 0 to 1; `values` has the scenario's, and what `of` has in the sample."""
        if self.any is not None:
            return self.any[min(int(where * len(self.any)), len(self.any) - 1)]
        assert self.low is not None
        assert self.high is not None
        whole = type(values[key]) is int
        low, high = self.low, self.high + whole
        value = low * (high / low) ** where if self.log else low + where * (high - low)
        value = min(max(value, self.low), self.high)
        if whole:
            return math.floor(value)
        return value * values[self.of] if self.of else value

    def holds(self, key: str, values: Values) -> bool:
        """Whether the value of `key` is one of those."""
        own = values[key]
        if self.any is not None:
            return any(_same(own, each) for each in self.any)
        assert self.low is not None
        assert self.high is not None
        base = values[self.of] if self.of else 1.0
        low, high = self.low * base, self.high * base
        return _is_number(own) and (low <= own <= high or math.isclose(own, low) or math.isclose(own, high))

    def problem(self, key: str, values: Values) -> str:
        """What is wrong with it beside the scenario's values; empty if nothing is."""
        own = values[key]
        if self.any is None and not _is_number(own):
            return f" = {self.words}: must be any = [...], for the value is {short(own)}"
        if self.any is None and type(own) is int:
            if self.of:
                return f".of = {short(self.of)}: must be left out, for the value is a whole number"
            if self.low != int(self.low or 0) or self.high != int(self.high or 0):
                return f" = {self.words}: low and high must be whole numbers, as the value, {own}"
        if self.of and (self.of == key or not isinstance(values.get(self.of), float)):
            numbers = [each for each, value in values.items() if isinstance(value, float) and each != key]
            return f".of = {short(self.of)}: must be another key that the file sets{did_you_mean(self.of, numbers)}"
        if not self.holds(key, values):
            return f" = {self.words}: must contain the value, {_word(own)}"
        return ""


def problems(ranges: Mapping[str, Range], values: Values, not_set: Callable[[str], str]) -> Iterator[str]:
    """What is wrong with the ranges of a scenario, whose parameters are `values`.

    `not_set` tells what to do about a key that is not one of them.
    """
    for key, each in ranges.items():
        if key not in values:
            yield f"ranges.{key}: must be of a key that the file sets{not_set(key)}"
        elif problem := each.problem(key, values):
            yield f"ranges.{key}{problem}"
        elif each.of is not None and each.of in ranges and ranges[each.of].of:
            yield f"ranges.{key}.of = {short(each.of)}: must be a key whose own range has no `of`"


def moved(tables: dict[str, Any], ranges: Mapping[str, Range], values: Values, chosen: Values) -> dict[str, Any]:
    """A scenario's tables with the `chosen` values put in, which keys that follow them do.

    `values` are the parameters as the scenario sets them. A key whose range is told `of` another keeps its ratio to
    it, unless it is among the chosen. One that is above its limit (ORDERED) gets that value.
    """
    after = {**values, **chosen}
    for key, each in ranges.items():
        if each.of is not None and each.of in chosen and key not in chosen and values[each.of]:
            after[key] = values[key] * after[each.of] / values[each.of]
    after |= cut(after)
    for key, value in after.items():
        if value != values[key]:
            tables = toml.put(tables, key.split("."), value)
    return tables


def cut(values: Values) -> dict[str, float]:
    """The keys whose value is above that of the key over them (ORDERED), each with the most that it may be."""
    least = {}
    for key, value in values.items():
        above, factor = ORDERED.get(re.sub(r"\.\d+\.", ".", key), ("", 1.0))
        limit: Any = values.get(re.sub(r"^device\.", f"device.{key.split('.')[1]}.", above)) if above else None
        with contextlib.suppress(OverflowError):  # a whole number of 400 digits; the validation reports it
            if _is_number(value) and _is_number(limit) and value > limit * factor:
                least[key] = limit * factor
    return least


OUTSIDE = ", outside of what was plausible: "


def outside(ranges: Any, key: str, values: Values) -> str:
    """What the source of a user's value says more if it is outside of the range that it takes the place of.

    `ranges` are those of the base's tables, not yet validated. Empty for a value in its range, or that has none.
    """
    try:
        each = Range.model_validate(ranges[key])
        return "" if each.holds(key, values) else f"{OUTSIDE}{each.words} ({each.why})"
    except (KeyError, TypeError, ValueError):  # there is none, or the validation reports it
        return ""


def is_outside(source: str) -> bool:
    """Whether `outside` told of the value of this source."""
    return OUTSIDE in source


def without_range(ranges: Mapping[str, Range], sources: Mapping[str, str], values: Values) -> list[str]:
    """The parameters of any other or of no stated source that have no range. Names need none."""
    return [
        key
        for key in values
        if key not in ranges and sources.get(key, "").partition(":")[0] not in SURE and not key.endswith(".name")
    ]


def _same(one: object, other: object) -> bool:
    """Equal, and not a switch beside a number: in Python, True == 1."""
    return one == other and isinstance(one, bool) is isinstance(other, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _word(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
