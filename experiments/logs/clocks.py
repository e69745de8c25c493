# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts' clocks, set against each other by what must come first: a message is sent before it arrives.

The offset is what the target's clock shows more than the source's. What the source sends bounds it from above, what the
target sends (on the return path) from below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.logs.facts import starts, stops
from experiments.logs.pair import Pair
from proto_v3.errors import UserError

APART_US, LOOSE_US = 1_000_000, 10_000_000
"""Clocks that are not more apart than this may agree, where nothing bounds the offset from below: by a message, and by
what a whole load may be between. Ours."""
DRIFT_US = 2_000
"""As much may two bounds contradict each other: clocks drift while a migration runs. Ours."""


@dataclass(frozen=True, slots=True)
class ClockBound:
    """One message."""

    what: str
    us: int
    """The offset is at most this, or at least."""
    loose: bool = False
    """A whole load may be between what was sent and what came."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """How the clocks were set against each other."""

    offset_us: int
    upper: ClockBound | None
    lower: ClockBound | None

    def of_target(self, time_us: int) -> int:
        """A time of the target, on the source's clock."""
        return time_us - self.offset_us

    @property
    def uncertainty_us(self) -> int | None:
        """How wrong the offset may be, to either side. None: not known."""
        if self.upper is None or self.lower is None:
            return None
        return max(self.upper.us - self.offset_us, self.offset_us - self.lower.us, 0)

    @property
    def one_sided(self) -> bool:
        """The clocks are apart, and by how much at least is not known: what is between the hosts took longer."""
        return self.lower is None and self.offset_us != 0

    def told(self) -> str:
        """In words."""
        as_is, offset = "The clocks are taken as they are", f"{self.offset_us / 1e3:+.3f} ms"
        apart = f"The target's clock is {offset} from the source's" if self.offset_us else as_is
        if self.upper is None:
            return f"{as_is}: the logs have no message that is in both."
        most = f"at most {self.upper.us / 1e3:.3f} ms ahead ({self.upper.what})"
        if self.lower is not None:
            least = f"at least {self.lower.us / 1e3:.3f} ms ({self.lower.what})"
            return f"{apart}. It is {most}, and {least}: uncertain by {(self.uncertainty_us or 0) / 1e3:.3f} ms."
        if not self.offset_us:
            return (
                f"{apart}: the target's is {most}. Nothing bounds it from below: nothing came back on the return path."
            )
        return (
            f"{apart}, as if nothing took time on its way ({self.upper.what}). Nothing came back on the return path, "
            "so it may be less; then transfer and downtime took as much longer than shown."
        )


def aligned(pair: Pair) -> Clocks:
    """The offset. UserError if no offset fits: these are two migrations."""
    upper = min(_to_target(pair), key=lambda bound: bound.us, default=None)
    lower = max(_to_source(pair), key=lambda bound: bound.us, default=None)
    if upper is None:
        return Clocks(0, None, lower)
    if lower is None:
        apart_us = LOOSE_US if upper.loose else APART_US
        return Clocks(0 if 0 <= upper.us <= apart_us else upper.us, upper, None)
    if lower.us > upper.us + DRIFT_US:
        raise UserError(
            f"the logs are of two different migrations: by the {upper.what} the target's clock is at most "
            f"{upper.us / 1e3:.3f} ms ahead, by the {lower.what} at least {lower.us / 1e3:.3f} ms"
        )
    offset_us = 0 if lower.us <= 0 <= upper.us else (lower.us + upper.us) // 2
    return Clocks(offset_us, upper, lower)


def _to_target(pair: Pair) -> Iterator[ClockBound]:
    here, there = pair.source, pair.target
    sent_us, came_us = (side.moments.get("switchover start") for side in (here, there))
    if came_us is not None:
        if sent_us is not None:
            yield ClockBound("order to switch over", came_us - sent_us)
        elif "src-downtime-start" in here.marks:
            yield ClockBound("start of the downtime", came_us - here.marks["src-downtime-start"])
    for source, target in pair.devices:
        if source.save is not None and came_us is not None:
            first = next((piece.end_us for piece in target.pieces if piece.begin_us >= came_us), None)
            if first is not None:
                yield ClockBound("first bytes of a stopped device", first - source.save.begin_us)
        if source.save_thread is not None and target.first_arrived_us is not None:
            yield ClockBound("first packet of a stopped device", target.first_arrived_us - source.save_thread.begin_us)
        for sent, approved in zip(source.sent_initial_us, target.approved_us, strict=False):
            yield ClockBound("end of the initial data", approved - sent)
        stopped, runs = stops(source), [each for each in starts(target) if each.target != "STOP"]
        if stopped and runs:
            between = "stop of a device at the source, its start at the target"
            yield ClockBound(between, runs[0].end_us - stopped[-1].end_us, loose=True)


def _to_source(pair: Pair) -> Iterator[ClockBound]:
    here, there = pair.source, pair.target
    pongs, acks, shuts = (there.rp_sent.get(kind, []) for kind in (2, 7, 1))
    if pongs and "pong" in here.moments:
        yield ClockBound("answer to the first ping", pongs[0] - here.moments["pong"])
    if len(acks) == len(here.acks_us):
        for sent_us, came_us in zip(acks, here.acks_us, strict=True):
            yield ClockBound("ack of the initial data", sent_us - came_us)
    if "shut" in here.moments:
        for sent_us in shuts[-1:]:
            yield ClockBound("end of the return path", sent_us - here.moments["shut"])
        if "dst-precopy-bh-vm-started" in there.marks:
            yield ClockBound("start of the guest", there.marks["dst-precopy-bh-vm-started"] - here.moments["shut"])
