# SPDX-License-Identifier: GPL-2.0-or-later
"""What the scenario tables are made of: units, kinds of numbers, how a message shows a value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, Field
from typing_extensions import override

from proto_v3.text import clean

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NS_PER_US, NS_PER_MS, NS_PER_S = 1_000, 1_000_000, 1_000_000_000
BYTES_PER_S_PER_GBIT = 125_000_000
PAGE_BYTES = 4 * KIB

Positive = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
PositiveMs = Annotated[float, Field(ge=0.001, le=1e9, allow_inf_nan=False)]
"""A wait or a window; shorter than a microsecond it would only cost events."""
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(lambda text: clean(text, MAX_TEXT_CHARS))]
"""For people: cleaned where it comes in."""
MAX_TEXT_CHARS = 2000

UNITS: dict[str, tuple[str, float]] = {
    "_ms_per_vf": ("milliseconds a VF", NS_PER_MS),
    "_us_per_vector": ("microseconds a vector", NS_PER_US),
    "_us_per_channel": ("microseconds a channel", NS_PER_US),
    "_us_per_pf_vector": ("microseconds a vector", NS_PER_US),
    "_gbit_per_s": ("Gbit/s", BYTES_PER_S_PER_GBIT),
    "_gib_per_s": ("GiB/s", GIB),
    "_mib_per_s": ("MiB/s", MIB),
    "_per_s": ("a second", 1),
    "_ms": ("milliseconds", NS_PER_MS),
    "_us": ("microseconds", NS_PER_US),
    "_s": ("seconds", NS_PER_S),
    "_kib": ("KiB", KIB),
    "_mib": ("MiB", MIB),
    "_gib": ("GiB", GIB),
}
"""The unit by the end of a key, the first that fits: its name, and its size in bytes, nanoseconds or bytes a second."""


def unit_of(key: str) -> tuple[str, float] | None:
    """The entry of UNITS for a key; None if the key has no unit."""
    return next((unit for end, unit in UNITS.items() if f"_{key}".endswith(end)), None)


class Rate:
    """In a table: a key's value in bytes a second."""

    def __init__(self, key: str) -> None:
        unit = unit_of(key)
        assert unit is not None
        self._key, self._factor = key, unit[1]

    def __get__(self, table: Table, kind: type) -> float:
        value: float = getattr(table, self._key)
        return value * self._factor


class Whole(Rate):
    """In a table: a key's value in whole bytes or nanoseconds."""

    @override
    def __get__(self, table: Table, kind: type) -> int:
        return round(super().__get__(table, kind))


def ns(ms: float) -> int:
    """Milliseconds to whole nanoseconds."""
    return round(ms * NS_PER_MS)


class Table(pydantic.BaseModel):
    """A table of the file: no unknown keys, no strings taken for numbers, never changed after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, ignored_types=(Rate, Whole))

    def wrong(self, key: str, why: str) -> ValueError:
        """The error about a key's value: `why` says what would be right."""
        value = getattr(self, key)
        shown = f"{value:g}" if isinstance(value, float) else f'"{value}"' if isinstance(value, str) else value
        return ValueError(f"{key} = {shown}: {why}")


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
