# SPDX-License-Identifier: GPL-2.0-or-later
"""The migration state machine: one table of arcs, and the path from a state to a target.

The kernel's table gives the *next hop* from a state toward a target, for a device that has every feature. Two rules
make the path:

1. Take the next hop. If the device lacks a feature that the hop's state needs, look up the table again from that hop
   (the state is skipped, never entered).
2. Repeat until the target is reached. A hop of ERROR means that there is no path: EINVAL.

Source: Linux `drivers/vfio/vfio_main.c`, vfio_mig_get_next_state().
"""

from __future__ import annotations

import errno
from functools import cache

from proto_v3.errors import ProtoV3Error
from proto_v3.vfio.uapi import MigrationFlags, State

ERROR, STOP, RUNNING, STOP_COPY = State.ERROR, State.STOP, State.RUNNING, State.STOP_COPY
RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = State.RESUMING, State.RUNNING_P2P, State.PRE_COPY, State.PRE_COPY_P2P
STATES = frozenset(State)

# fmt: off
TARGETS =         (STOP,         RUNNING,      STOP_COPY,    RESUMING,     RUNNING_P2P,  PRE_COPY,     PRE_COPY_P2P)
_HOPS = {  # of each current state, toward each of TARGETS
    STOP:         (STOP,         RUNNING_P2P,  STOP_COPY,    RESUMING,     RUNNING_P2P,  RUNNING_P2P,  RUNNING_P2P),
    RUNNING:      (RUNNING_P2P,  RUNNING,      RUNNING_P2P,  RUNNING_P2P,  RUNNING_P2P,  PRE_COPY,     RUNNING_P2P),
    PRE_COPY:     (RUNNING,      RUNNING,      PRE_COPY_P2P, RUNNING,      RUNNING,      PRE_COPY,     PRE_COPY_P2P),
    PRE_COPY_P2P: (RUNNING_P2P,  RUNNING_P2P,  STOP_COPY,    RUNNING_P2P,  RUNNING_P2P,  PRE_COPY,     PRE_COPY_P2P),
    # A session must not return to pre-copy. Before the fix of June 2026 the kernel looped for ever here.
    STOP_COPY:    (STOP,         STOP,         STOP_COPY,    STOP,         STOP,         ERROR,        ERROR),
    RESUMING:     (STOP,         STOP,         STOP,         RESUMING,     STOP,         STOP,         STOP),
    RUNNING_P2P:  (STOP,         RUNNING,      STOP,         STOP,         RUNNING_P2P,  RUNNING,      PRE_COPY_P2P),
}
# fmt: on

NEXT_HOP = {current: dict(zip(TARGETS, hops, strict=True)) for current, hops in _HOPS.items()}
"""NEXT_HOP[current][target]."""

# The features that a state needs besides STOP_COPY.
REQUIRED: dict[State, MigrationFlags] = {
    RUNNING_P2P: MigrationFlags.P2P,
    PRE_COPY: MigrationFlags.PRE_COPY,
    PRE_COPY_P2P: MigrationFlags.PRE_COPY | MigrationFlags.P2P,
}

# The arcs that begin a session and return a new data fd: to save, or (into RESUMING) to load. Source: vfio.h, the text
# above enum vfio_device_mig_state.
BEGINS_SESSION = frozenset({(RUNNING, PRE_COPY), (RUNNING_P2P, PRE_COPY_P2P), (STOP, STOP_COPY), (STOP, RESUMING)})


class InvalidTransitionError(ProtoV3Error, OSError):
    """The state machine has no path to the target. `errno` is EINVAL, as SET_STATE returns."""

    def __init__(self, current: int, target: int, why: str) -> None:
        super().__init__(errno.EINVAL, f"{_name(current)} -> {_name(target)}: {why}")


def _name(state: int) -> str:
    return State(state).name if state in STATES else str(state)


def supports(features: MigrationFlags, state: State) -> bool:
    """Whether a device with these features has the state. Without STOP_COPY it does not migrate, and has none."""
    needed = MigrationFlags.STOP_COPY | REQUIRED.get(state, MigrationFlags(0))
    return features & needed == needed


def path(current: int, target: int, features: MigrationFlags) -> list[State]:
    """The states that SET_STATE enters, the target last. Empty if the device is there already.

    States may be given as the kernel's numbers. Raises InvalidTransitionError (EINVAL) for a number that is no state,
    for ERROR as start or target, for a state that the device does not have, and if the table has no path.
    """
    for state in (current, target):
        if state not in STATES:
            raise InvalidTransitionError(current, target, f"there is no state {state}")
        if state == ERROR:
            raise InvalidTransitionError(current, target, "ERROR cannot be asked for, and only a reset leaves it")
        if not supports(features, State(state)):
            raise InvalidTransitionError(current, target, f"this device has no {State(state).name}")
    steps: list[State] = []
    hop, end = State(current), State(target)
    while hop is not end:
        hop = NEXT_HOP[hop][end]
        if hop is ERROR:
            raise InvalidTransitionError(current, target, "refused by the state machine")
        if supports(features, hop):
            steps.append(hop)
    return steps


FEATURE_SETS = [
    MigrationFlags.STOP_COPY | p2p | pre_copy
    for p2p in (MigrationFlags(0), MigrationFlags.P2P)
    for pre_copy in (MigrationFlags(0), MigrationFlags.PRE_COPY)
]
"""The kinds of v2 devices."""


@cache
def arcs(features: MigrationFlags) -> tuple[tuple[State, State], ...]:
    """The single steps of a device with these features: what its driver implements."""
    states = [state for state in NEXT_HOP if supports(features, state)]
    return tuple((a, b) for a in states for b in states if _is_arc(a, b, features))


def _is_arc(current: State, target: State, features: MigrationFlags) -> bool:
    try:
        return len(path(current, target, features)) == 1
    except InvalidTransitionError:
        return False
