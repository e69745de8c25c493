"""What the tables of a scenario are made of: units, kinds of numbers, how a value is told in a message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

import pydantic
from pydantic import Field

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NS_PER_MS, NS_PER_S = 1_000_000, 1_000_000_000
BYTES_PER_S_PER_GBIT = 125_000_000
PAGE_BYTES = 4 * KIB

Positive = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
PositiveMs = Annotated[float, Field(ge=0.001, le=1e9, allow_inf_nan=False)]
"""A wait or a window; shorter than a microsecond it would only cost events."""
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


def ns(ms: float) -> int:
    """Milliseconds to whole nanoseconds."""
    return round(ms * NS_PER_MS)


class Table(pydantic.BaseModel):
    """A table of the file: no unknown keys, no strings taken for numbers, never changed after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


def short(value: Any) -> str:
    """A value as it is told in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return ""
