# SPDX-License-Identifier: GPL-2.0-or-later
"""The arcs of the state machine (`proto_v3/vfio/fsm`): what each one takes, and what happens to the session.

Every arc that some device has stands here. Arcs marked (no P2P) are those of devices without RUNNING_P2P.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from proto_v3.vfio.uapi import State
from sim.scenario.times import DeviceTimes


class Cost(enum.Flag):
    """What an arc has to wait for."""

    NOTHING = 0
    SAVES = enum.auto()
    """The SAVEs in flight: the device is suspended only after them."""
    SUSPEND = enum.auto()
    """`suspend_ms`, and what grows with the VFs and the vectors: it starts no DMA any more."""
    QUIESCE = enum.auto()
    """`quiesce_ms`, grown alike: it answers no DMA of other devices any more."""
    RESUME = enum.auto()
    """`resume_ms`."""

    def time_ns(self, times: DeviceTimes) -> int:
        """The fixed time on a device with these; waiting for SAVEs comes on top."""
        times_ns = {
            Cost.SUSPEND: times.suspend_ns,
            Cost.QUIESCE: times.quiesce_ns,
            Cost.RESUME: times.resume_ns,
        }
        return sum(time_ns for cost, time_ns in times_ns.items() if cost in self)


class SessionStep(enum.Enum):
    """What an arc does with the session."""

    STAYS = enum.auto()
    """As it is; mostly there is none."""
    STARTS_PRECOPY = enum.auto()
    PAUSES = enum.auto()
    """Nothing new is saved: the device is suspended."""
    CONTINUES = enum.auto()
    STARTS_STOP_COPY = enum.auto()
    FINISHES = enum.auto()
    """Pre-copy's session goes on to its END."""
    ENDS_SAVING = enum.auto()
    STARTS_LOADING = enum.auto()
    ENDS_LOADING = enum.auto()


class Arc(NamedTuple):
    """One step of the state machine."""

    cost: Cost
    session: SessionStep


NOTHING, SAVES, SUSPEND, QUIESCE, RESUME = Cost.NOTHING, Cost.SAVES, Cost.SUSPEND, Cost.QUIESCE, Cost.RESUME
S = State

# fmt: off
ARCS: dict[tuple[State, State], Arc] = {
    (S.RUNNING,      S.RUNNING_P2P):  Arc(SUSPEND,                   SessionStep.STAYS),
    (S.RUNNING,      S.PRE_COPY):     Arc(NOTHING,                   SessionStep.STARTS_PRECOPY),
    (S.RUNNING,      S.STOP):         Arc(SUSPEND | QUIESCE,         SessionStep.STAYS),  # (no P2P)
    (S.RUNNING_P2P,  S.RUNNING):      Arc(NOTHING,                   SessionStep.STAYS),
    (S.RUNNING_P2P,  S.PRE_COPY_P2P): Arc(NOTHING,                   SessionStep.STARTS_PRECOPY),
    (S.RUNNING_P2P,  S.STOP):         Arc(QUIESCE,                   SessionStep.STAYS),
    (S.PRE_COPY,     S.PRE_COPY_P2P): Arc(SAVES | SUSPEND,           SessionStep.PAUSES),
    (S.PRE_COPY,     S.STOP_COPY):    Arc(SAVES | SUSPEND | QUIESCE, SessionStep.FINISHES),  # (no P2P)
    (S.PRE_COPY,     S.RUNNING):      Arc(NOTHING,                   SessionStep.ENDS_SAVING),
    (S.PRE_COPY_P2P, S.PRE_COPY):     Arc(NOTHING,                   SessionStep.CONTINUES),
    (S.PRE_COPY_P2P, S.STOP_COPY):    Arc(QUIESCE,                   SessionStep.FINISHES),
    (S.PRE_COPY_P2P, S.RUNNING_P2P):  Arc(NOTHING,                   SessionStep.ENDS_SAVING),
    (S.STOP,         S.STOP_COPY):    Arc(NOTHING,                   SessionStep.STARTS_STOP_COPY),
    (S.STOP,         S.RESUMING):     Arc(NOTHING,                   SessionStep.STARTS_LOADING),
    (S.STOP,         S.RUNNING_P2P):  Arc(RESUME,                    SessionStep.STAYS),
    (S.STOP,         S.RUNNING):      Arc(RESUME,                    SessionStep.STAYS),  # (no P2P)
    (S.STOP_COPY,    S.STOP):         Arc(NOTHING,                   SessionStep.ENDS_SAVING),
    (S.RESUMING,     S.STOP):         Arc(NOTHING,                   SessionStep.ENDS_LOADING),
}
# fmt: on
