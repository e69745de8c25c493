"""The state machine: every path of the kernel's table, refusals, and what holds for any path."""

from __future__ import annotations

import errno
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.errors import ProtoV3Error
from proto_v3.fsm import NEXT_HOP, InvalidTransitionError, path, supports
from proto_v3.uapi import MigrationFlags, State

PATHS = json.loads((Path(__file__).parent / "data" / "fsm_paths.json").read_text())["paths"]
VECTORS = [
    (features, State[current], State[target], steps)
    for features, rows in PATHS.items()
    for current, row in rows.items()
    for target, steps in row.items()
]
EVERYTHING = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
FEATURES = st.sampled_from([MigrationFlags.STOP_COPY | MigrationFlags(extra) for extra in (0, 2, 4, 6)])
STATES = st.sampled_from(State)


def flags(names: str) -> MigrationFlags:
    joined = MigrationFlags(0)
    for name in names.split("|"):
        joined |= MigrationFlags[name]
    return joined


def test_the_vectors_are_complete() -> None:
    assert len(VECTORS) == len(set(VECTORS)) == 4 * 8 * 7


@pytest.mark.parametrize(
    ("features", "current", "target", "steps"),
    [pytest.param(*vector, id=f"{vector[0]}: {vector[1].name} to {vector[2].name}") for vector in VECTORS],
)
def test_the_path_is_the_kernels(features: str, current: State, target: State, steps: str) -> None:
    if steps == "EINVAL":
        with pytest.raises(InvalidTransitionError) as caught:
            path(current, target, flags(features))
        assert caught.value.errno == errno.EINVAL
    else:
        assert path(current, target, flags(features)) == [State[step] for step in steps.split()]


@pytest.mark.parametrize("state", [state for state in State if state is not State.ERROR])
def test_no_step_where_the_device_is_there_already(state: State) -> None:
    assert path(state, state, EVERYTHING) == []


def test_error_is_neither_left_nor_asked_for_even_from_itself() -> None:
    with pytest.raises(InvalidTransitionError, match="ERROR cannot be asked for"):
        path(State.ERROR, State.ERROR, EVERYTHING)


def test_a_state_that_the_device_lacks_is_refused_as_start_too() -> None:
    with pytest.raises(InvalidTransitionError, match="this device has no PRE_COPY"):
        path(State.PRE_COPY, State.RUNNING, MigrationFlags.STOP_COPY)


def test_a_refusal_names_both_states_and_is_ours_and_the_systems() -> None:
    with pytest.raises(InvalidTransitionError, match="STOP_COPY -> PRE_COPY: refused") as caught:
        path(State.STOP_COPY, State.PRE_COPY, EVERYTHING)
    assert isinstance(caught.value, ProtoV3Error)
    assert isinstance(caught.value, OSError)


def test_multi_stream_changes_no_path() -> None:
    for features, current, target, steps in VECTORS:
        if steps != "EINVAL":
            with_streams = flags(features) | MigrationFlags.MULTI_STREAM
            assert path(current, target, with_streams) == path(current, target, flags(features))


@given(FEATURES, STATES, STATES)
def test_every_hop_is_supported_none_is_entered_twice_and_the_last_is_the_target(
    features: MigrationFlags, current: State, target: State
) -> None:
    try:
        steps = path(current, target, features)
    except InvalidTransitionError:
        return
    assert all(supports(features, step) for step in steps)
    assert len({current, *steps}) == 1 + len(steps)
    assert [current, *steps][-1] is target


@given(STATES, STATES)
def test_with_every_feature_each_hop_is_an_arc_of_the_table(current: State, target: State) -> None:
    try:
        steps = path(current, target, EVERYTHING)
    except InvalidTransitionError:
        return
    assert all(NEXT_HOP[here][target] is there for here, there in pairwise([current, *steps]))


@given(FEATURES, STATES, STATES)
def test_the_rest_of_a_path_is_the_path_from_there(features: MigrationFlags, current: State, target: State) -> None:
    try:
        steps = path(current, target, features)
    except InvalidTransitionError:
        return
    for done, state in enumerate(steps, start=1):
        assert path(state, target, features) == steps[done:]
