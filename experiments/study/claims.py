# SPDX-License-Identifier: GPL-2.0-or-later
"""The claims of the v3 idea, and the rules by which runs are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl

from experiments.study.statistics import Interval
from proto_v3.vmm.migration import OutcomeKind

CLAIMS = {
    "C1": "v3 moves critical set-up out of the downtime under any rate of reconfiguration that it can outrun; "
    "v2 cannot tell",
    "C2": "with F firmware engines, a lock for each fd and a link to spare, stop-copy time falls as 1/min(N, F) until "
    "copy or link bind",
    "C3": "under one big lock, or with one engine, N buys nothing",
    "C4": "two fds give most of C1, N gives C2, and they are independent",
    "C5": "a pool of shared connections with critical-first service comes close to dedicated connections",
    "C6": "reorder memory at the target has a bound",
}
Verdict = Literal["supported", "refuted", "under conditions"]

WORTH = 0.05
"""A smaller change of the downtime counts as next to nothing: nobody would build an interface for it, in kernel, VMMs
and firmware."""
SETUP_LEFT = 0.02
"""The part of v2's mean set-up in the downtime that may remain under a protocol that keeps set-up out."""
MOST_OF_SETUP = 0.9
"""C4: two fds must take more than this part of what v3-n4 takes of the set-up out of v2's downtime."""
ACK_COMES_TOO_LATE = "its ack comes too late"
"""The reason of a run that the reusable ack ended (proto_v3.vmm.v2_source.LateAckError) contains this: the VMM knew of
the late data."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the runs say about a claim."""

    claim: str
    """A key of CLAIMS."""
    verdict: Verdict
    why: str
    """One sentence, with numbers."""


def judge(*, supported: bool, refuted: bool) -> Verdict:
    """`refuted` takes precedence; if neither is true, `under conditions`."""
    return "refuted" if refuted else "supported" if supported else "under conditions"


def kept_out(left: Interval | None, before: float) -> bool | None:
    """True if the set-up `left` in the downtime is at most SETUP_LEFT of `before`, which v2 has; False if it is shown
    to be more; None if it is undecided or unknown. Both in the same unit."""
    if left is None:
        return None
    if left.mean <= SETUP_LEFT * before:
        return True
    return False if left.low > SETUP_LEFT * before else None


def gave_up() -> pl.Expr:
    """The runs that failed because critical data came too late, and the VMM saw it."""
    failed = pl.col("outcome") == OutcomeKind.FAILED.value
    return failed & pl.col("reason").fill_null("").str.contains(ACK_COMES_TOO_LATE, literal=True)
