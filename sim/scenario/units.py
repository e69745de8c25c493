"""What the scenario tables are made of: units, kinds of numbers, how a message shows a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

import pydantic
from pydantic import Field

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NS_PER_US, NS_PER_MS, NS_PER_S = 1_000, 1_000_000, 1_000_000_000
BYTES_PER_S_PER_GBIT = 125_000_000
PAGE_BYTES = 4 * KIB

Positive = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
PositiveMs = Annotated[float, Field(ge=0.001, le=1e9, allow_inf_nan=False)]
"""A wait or a window; shorter than a microsecond it would only cost events."""
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


_FACTORS: dict[str, float] = {
    "gbit_per_s": BYTES_PER_S_PER_GBIT,
    "gib_per_s": GIB,
    "mib_per_s": MIB,
    "_kib": KIB,
    "_mib": MIB,
    "_gib": GIB,
    "_us": NS_PER_US,
    "_ms": NS_PER_MS,
    "_s": NS_PER_S,
}
"""What a key's end says, in bytes, nanoseconds, or bytes a second; the first that fits."""


class Whole:
    """In a table: a key's value in whole bytes or nanoseconds."""

    def __init__(self, key: str) -> None:
        self._key, self._factor = key, _factor(key)

    def __get__(self, table: Table, kind: type) -> int:
        value: float = getattr(table, self._key)
        return round(value * self._factor)


class Rate:
    """In a table: a key's value in bytes a second."""

    def __init__(self, key: str) -> None:
        self._key, self._factor = key, _factor(key)

    def __get__(self, table: Table, kind: type) -> float:
        value: float = getattr(table, self._key)
        return value * self._factor


def _factor(key: str) -> float:
    return next(factor for end, factor in _FACTORS.items() if key.endswith(end))


def ns(ms: float) -> int:
    """Milliseconds to whole nanoseconds."""
    return round(ms * NS_PER_MS)


class Table(pydantic.BaseModel):
    """A table of the file: no unknown keys, no strings taken for numbers, never changed after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, ignored_types=(Whole, Rate))


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return ""
