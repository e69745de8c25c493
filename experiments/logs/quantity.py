# SPDX-License-Identifier: GPL-2.0-or-later
"""A quantity that logs tell: measured, bounded, assumed for the sake of these, or not to be told from them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
US_PER_MS, US_PER_S = 1_000, 1_000_000
LEAST_BYTES = MIB
"""Fewer bytes say nothing of a rate: they are gone in a few calls. Ours."""


class Certainty(enum.StrEnum):
    """How well a quantity is known."""

    MEASURED = "measured"
    BOUNDED = "bounded"
    ASSUMED = "assumed"
    """Chosen so that the others can be met."""
    UNKNOWN = "cannot be told"


@dataclass(frozen=True, slots=True)
class LogQuantity:
    """The value of a scenario's key."""

    key: str
    """`device.1.suspend_ms`."""
    value: Any
    """None: the base's value stays."""
    kind: Certainty
    how: str
    """By which event; or why it cannot be told."""
    low: float | None = None
    high: float | None = None
    """Bounds; None: on this side there is none."""

    @property
    def source(self) -> str:
        """What a scenario's `[sources]` says of it."""
        if self.kind is Certainty.BOUNDED:
            return f"bounded: {self.between}; {self.how}"
        return f"{self.kind.value}: {self.how}"

    @property
    def between(self) -> str:
        """The bounds in words."""
        if self.low is not None and self.high is not None:
            return f"between {self.low:.6g} and {self.high:.6g}"
        return f"at most {self.high:.6g}" if self.low is None and self.high is not None else f"at least {self.low:.6g}"


def measured(key: str, value: Any, how: str) -> LogQuantity:
    """A value that the logs have. A time of less than nothing is of two threads that wrote in another order."""
    if key.endswith("_ms"):
        value = max(0.0, value)
    return LogQuantity(key, round(value, 6) if isinstance(value, float) else value, Certainty.MEASURED, how)


def bounded(key: str, value: float, how: str, low: float | None = None, high: float | None = None) -> LogQuantity:
    """A value that the logs leave some room for; measured, if it is no room."""
    if low is not None and low == high:
        return measured(key, value, how)
    return LogQuantity(
        key,
        round(value, 6),
        Certainty.BOUNDED,
        how,
        None if low is None else round(low, 6),
        None if high is None else round(high, 6),
    )


def assumed(key: str, value: Any, how: str) -> LogQuantity:
    """A value that no log has, but which these logs need."""
    return LogQuantity(key, value, Certainty.ASSUMED, how)


def unknown(key: str, why: str) -> LogQuantity:
    """The base's value stays."""
    return LogQuantity(key, None, Certainty.UNKNOWN, why)


def times_told(times_us: Sequence[int]) -> str:
    """`median of 3, 1.2 to 1.4 ms`."""
    shown = [each / US_PER_MS for each in times_us]
    if len(shown) < 2:
        return f"{shown[0]:.3f} ms"
    return f"median of {len(shown)}, {min(shown):.3f} to {max(shown):.3f} ms"


def median_ms(times_us: Sequence[int]) -> float:
    """Their median, ms."""
    return median(times_us) / US_PER_MS
