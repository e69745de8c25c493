# SPDX-License-Identifier: GPL-2.0-or-later
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
from proto_v3.vfio import fsm_diagram
from proto_v3.vfio.fsm import (
    BEGINS_SESSION,
    FEATURE_SETS,
    NEXT_HOP,
    REQUIRED,
    STATES,
    InvalidTransitionError,
    arcs,
    path,
    supports,
)
from proto_v3.vfio.uapi import MigrationFlags, State

STATES_MD = Path(__file__).parents[2] / "docs" / "states.md"
PATHS = json.loads((Path(__file__).parents[1] / "data" / "fsm_paths.json").read_text())["paths"]
VECTORS = [
    (features, State[current], State[target], steps)
    for features, rows in PATHS.items()
    for current, row in rows.items()
    for target, steps in row.items()
]
EVERYTHING = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
FEATURES = st.sampled_from([MigrationFlags.STOP_COPY | MigrationFlags(extra) for extra in (0, 2, 4, 6)])
ANY_STATE = st.sampled_from(State)


def flags(names: str) -> MigrationFlags:
    joined = MigrationFlags(0)
    for name in names.split("|"):
        joined |= MigrationFlags[name]
    return joined


def test_the_vectors_are_complete() -> None:
    assert len(VECTORS) == len(set(VECTORS)) == 4 * 8 * 7


@pytest.mark.rule("v2.contract.2")
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
    assert path(int(state), int(state), EVERYTHING) == []


@pytest.mark.rule("v2.contract.3")
def test_error_is_neither_left_nor_asked_for_even_from_itself() -> None:
    with pytest.raises(InvalidTransitionError, match="ERROR cannot be asked for"):
        path(State.ERROR, State.ERROR, EVERYTHING)


def test_a_state_that_the_device_lacks_is_refused_as_start_too() -> None:
    with pytest.raises(InvalidTransitionError, match="this device has no PRE_COPY"):
        path(State.PRE_COPY, State.RUNNING, MigrationFlags.STOP_COPY)


@pytest.mark.rule("v2.contract.3")
def test_a_refusal_names_both_states_and_is_ours_and_the_systems() -> None:
    with pytest.raises(InvalidTransitionError, match="STOP_COPY -> PRE_COPY: refused") as caught:
        path(State.STOP_COPY, State.PRE_COPY, EVERYTHING)
    assert isinstance(caught.value, ProtoV3Error)
    assert isinstance(caught.value, OSError)


@given(FEATURES, ANY_STATE, ANY_STATE)
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


@given(ANY_STATE, ANY_STATE)
def test_with_every_feature_each_hop_is_an_arc_of_the_table(current: State, target: State) -> None:
    try:
        steps = path(current, target, EVERYTHING)
    except InvalidTransitionError:
        return
    assert all(NEXT_HOP[here][target] is there for here, there in pairwise([current, *steps]))


@given(FEATURES, ANY_STATE, ANY_STATE)
def test_the_rest_of_a_path_is_the_path_from_there(features: MigrationFlags, current: State, target: State) -> None:
    try:
        steps = path(current, target, features)
    except InvalidTransitionError:
        return
    for done, state in enumerate(steps, start=1):
        assert path(state, target, features) == steps[done:]


# --- numbers for states, odd features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("features", PATHS)
def test_the_kernels_numbers_do_as_well_as_names(features: str) -> None:
    for names, current, target, steps in VECTORS:
        if names == features and steps != "EINVAL":
            by_number = path(int(current), int(target), flags(features))
            assert by_number == path(current, target, flags(features))
            assert all(isinstance(step, State) for step in by_number)


@pytest.mark.parametrize("number", [-1, 8, 2**32 - 1])
def test_a_number_that_is_no_state_is_einval_as_start_and_as_target(number: int) -> None:
    for current, target in [(State.RUNNING, number), (number, State.RUNNING), (number, number)]:
        with pytest.raises(InvalidTransitionError, match=f"there is no state {number}$") as caught:
            path(current, target, EVERYTHING)
        assert caught.value.errno == errno.EINVAL


def test_the_number_of_error_is_refused_as_its_name_is() -> None:
    with pytest.raises(InvalidTransitionError, match="ERROR cannot be asked for"):
        path(State.RUNNING, 0, EVERYTHING)


def test_a_refusal_names_what_has_a_name() -> None:
    with pytest.raises(InvalidTransitionError, match="RUNNING -> 8: "):
        path(2, 8, EVERYTHING)


@pytest.mark.parametrize("extra", [0, MigrationFlags.P2P, MigrationFlags.PRE_COPY])
def test_without_stop_copy_a_device_has_no_state_at_all(extra: int) -> None:
    features = MigrationFlags(extra)
    assert not any(supports(features, state) for state in State)
    assert arcs(features) == ()
    for state in NEXT_HOP:
        with pytest.raises(InvalidTransitionError, match="this device has no"):
            path(state, state, features)


def test_with_stop_copy_any_device_may_be_in_error() -> None:
    assert all(supports(features, State.ERROR) for features in FEATURE_SETS)


# --- arcs: drivers implement these, by the comment in vfio_mig_get_next_state() ---------------------------------------

ARCS = {
    "STOP_COPY": {"RUNNING STOP", "STOP RUNNING", "STOP STOP_COPY", "STOP_COPY STOP", "STOP RESUMING", "RESUMING STOP"},
    "STOP_COPY|P2P": {
        *("STOP STOP_COPY", "STOP_COPY STOP", "STOP RESUMING", "RESUMING STOP"),
        *("RUNNING RUNNING_P2P", "RUNNING_P2P RUNNING", "RUNNING_P2P STOP", "STOP RUNNING_P2P"),
    },
}
ARCS["STOP_COPY|PRE_COPY"] = ARCS["STOP_COPY"] | {"RUNNING PRE_COPY", "PRE_COPY RUNNING", "PRE_COPY STOP_COPY"}
ARCS["STOP_COPY|P2P|PRE_COPY"] = ARCS["STOP_COPY|P2P"] | {
    *("PRE_COPY RUNNING", "RUNNING PRE_COPY", "PRE_COPY PRE_COPY_P2P", "PRE_COPY_P2P PRE_COPY"),
    *("PRE_COPY_P2P RUNNING_P2P", "PRE_COPY_P2P STOP_COPY", "RUNNING_P2P PRE_COPY_P2P"),
}


@pytest.mark.parametrize("features", ARCS)
def test_the_arcs_are_those_that_a_driver_must_implement(features: str) -> None:
    found = [f"{a.name} {b.name}" for a, b in arcs(flags(features))]
    assert sorted(found) == sorted(ARCS[features])


def test_every_feature_set_is_among_them() -> None:
    assert {flags(names) for names in ARCS} == set(FEATURE_SETS)
    assert len(FEATURE_SETS) == 4


def test_with_every_feature_the_arcs_are_the_tables_direct_hops() -> None:
    direct = {(a, b) for a, row in NEXT_HOP.items() for b, hop in row.items() if hop is b and a is not b}
    assert set(arcs(EVERYTHING)) == direct


def test_the_table_has_a_hop_from_every_state_to_every_state_but_error() -> None:
    states = STATES - {State.ERROR}
    assert set(NEXT_HOP) == states
    assert all(set(row) == states for row in NEXT_HOP.values())
    assert set(REQUIRED) <= states


@pytest.mark.rule("v2.contract.7")
def test_four_arcs_begin_a_session_and_each_is_an_arc() -> None:
    assert {f"{a.name} {b.name}" for a, b in BEGINS_SESSION} == {
        *("RUNNING PRE_COPY", "RUNNING_P2P PRE_COPY_P2P", "STOP STOP_COPY", "STOP RESUMING")
    }
    assert set(arcs(EVERYTHING)) >= BEGINS_SESSION


# --- docs/states.md ---------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.contract.2")
def test_the_page_of_states_is_what_the_table_gives() -> None:
    assert STATES_MD.read_text() == fsm_diagram.page(), "renew it: python -m proto_v3.vfio.fsm_diagram > docs/states.md"


def test_the_diagram_has_each_arc_once_and_marks_what_is_special() -> None:
    lines = fsm_diagram.page().split("```mermaid\n")[1].split("\n```")[0].splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> RUNNING"]
    drawn = [line.strip().partition(" : ") for line in lines[2:]]
    labels = {arc: label for arc, _, label in drawn}
    assert sorted(labels) == sorted(f"{a.name} --> {b.name}" for a, b in arcs(EVERYTHING))
    assert len(labels) == len(drawn)
    assert labels["STOP --> STOP_COPY"] == "fd to read"
    assert labels["STOP --> RESUMING"] == "fd to write"
    assert labels["RUNNING --> PRE_COPY"] == "fd to read [PRE_COPY]"
    assert labels["RUNNING_P2P --> PRE_COPY_P2P"] == "fd to read [P2P, PRE_COPY]"
    assert sum("fd to" in label for label in labels.values()) == 4
    assert labels["STOP_COPY --> STOP"] == ""
    assert sum("P2P" in label for label in labels.values()) == 4 + 5  # at RUNNING_P2P alone, and at PRE_COPY_P2P
    assert not any(":" in label or ";" in label for label in labels.values())


def test_the_page_tables_every_hop() -> None:
    rows = [line for line in fsm_diagram.page().splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip(" *") for cell in row.split("|")[1:-1]] for row in rows]
    assert len(body) == 7
    for name, *hops in body:
        for target, hop in zip(header[1:], hops, strict=True):
            expected = NEXT_HOP[State[name]][State[target]]
            assert hop == ("" if name == target else "EINVAL" if expected is State.ERROR else expected.name)
