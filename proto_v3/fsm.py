"""The migration state machine: one table of arcs, and the path from a state to a target.

The kernel's table gives the *next hop* from a state toward a target, for a device that has every feature. Two rules
make the path:

1. Take the next hop; if the device lacks the feature that the hop's state needs, take the table again from that hop
   (so the state is passed over, never entered).
2. Repeat until the target is reached. A hop of ERROR means that there is no way: EINVAL.

Source: Linux `drivers/vfio/vfio_main.c`, vfio_mig_get_next_state().
"""

from __future__ import annotations

import errno

from proto_v3.errors import ProtoV3Error
from proto_v3.uapi import MigrationFlags, State

ERROR, STOP, RUNNING, STOP_COPY = State.ERROR, State.STOP, State.RUNNING, State.STOP_COPY
RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = State.RESUMING, State.RUNNING_P2P, State.PRE_COPY, State.PRE_COPY_P2P

# NEXT_HOP[current][target]
NEXT_HOP: dict[State, dict[State, State]] = {
    STOP: {
        STOP: STOP,
        RUNNING: RUNNING_P2P,
        STOP_COPY: STOP_COPY,
        RESUMING: RESUMING,
        RUNNING_P2P: RUNNING_P2P,
        PRE_COPY: RUNNING_P2P,
        PRE_COPY_P2P: RUNNING_P2P,
    },
    RUNNING: {
        STOP: RUNNING_P2P,
        RUNNING: RUNNING,
        STOP_COPY: RUNNING_P2P,
        RESUMING: RUNNING_P2P,
        RUNNING_P2P: RUNNING_P2P,
        PRE_COPY: PRE_COPY,
        PRE_COPY_P2P: RUNNING_P2P,
    },
    PRE_COPY: {
        STOP: RUNNING,
        RUNNING: RUNNING,
        STOP_COPY: PRE_COPY_P2P,
        RESUMING: RUNNING,
        RUNNING_P2P: RUNNING,
        PRE_COPY: PRE_COPY,
        PRE_COPY_P2P: PRE_COPY_P2P,
    },
    PRE_COPY_P2P: {
        STOP: RUNNING_P2P,
        RUNNING: RUNNING_P2P,
        STOP_COPY: STOP_COPY,
        RESUMING: RUNNING_P2P,
        RUNNING_P2P: RUNNING_P2P,
        PRE_COPY: PRE_COPY,
        PRE_COPY_P2P: PRE_COPY_P2P,
    },
    STOP_COPY: {
        STOP: STOP,
        RUNNING: STOP,
        STOP_COPY: STOP_COPY,
        RESUMING: STOP,
        RUNNING_P2P: STOP,
        # One session must not go back to pre-copy; before the fix of June 2026 the kernel looped for ever here.
        PRE_COPY: ERROR,
        PRE_COPY_P2P: ERROR,
    },
    RESUMING: {
        STOP: STOP,
        RUNNING: STOP,
        STOP_COPY: STOP,
        RESUMING: RESUMING,
        RUNNING_P2P: STOP,
        PRE_COPY: STOP,
        PRE_COPY_P2P: STOP,
    },
    RUNNING_P2P: {
        STOP: STOP,
        RUNNING: RUNNING,
        STOP_COPY: STOP,
        RESUMING: STOP,
        RUNNING_P2P: RUNNING_P2P,
        PRE_COPY: RUNNING,
        PRE_COPY_P2P: PRE_COPY_P2P,
    },
}

# What a device must have for a state to exist.
REQUIRED: dict[State, MigrationFlags] = {
    RUNNING_P2P: MigrationFlags.P2P,
    PRE_COPY: MigrationFlags.PRE_COPY,
    PRE_COPY_P2P: MigrationFlags.PRE_COPY | MigrationFlags.P2P,
}


class InvalidTransitionError(ProtoV3Error, OSError):
    """The state machine has no way to the target. `errno` is EINVAL, as SET_STATE would answer."""

    def __init__(self, current: State, target: State, why: str) -> None:
        super().__init__(errno.EINVAL, f"{current.name} -> {target.name}: {why}")


def supports(features: MigrationFlags, state: State) -> bool:
    """Whether a device with these features has the state."""
    needed = REQUIRED.get(state, MigrationFlags(0))
    return features & needed == needed


def path(current: State, target: State, features: MigrationFlags) -> list[State]:
    """The states that SET_STATE passes through, the target last; empty when already there.

    Raises InvalidTransitionError (EINVAL) for ERROR as start or target, for a state that the device does not have,
    and where the table refuses.
    """
    for state in (current, target):
        if state is ERROR:
            raise InvalidTransitionError(current, target, "ERROR cannot be asked for, and only a reset leaves it")
        if not supports(features, state):
            raise InvalidTransitionError(current, target, f"this device has no {state.name}")
    steps: list[State] = []
    hop = current
    while hop is not target:
        hop = NEXT_HOP[hop][target]
        if hop is ERROR:
            raise InvalidTransitionError(current, target, "refused by the state machine")
        if supports(features, hop):
            steps.append(hop)
    return steps
