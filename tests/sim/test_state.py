# SPDX-License-Identifier: GPL-2.0-or-later
"""The device's state: lazy writes, what is dirty, what is saved, the stop, stripes; and the image at the target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.device.guest import make_activity
from sim.device.record_format import BlockRange
from sim.device.state import DeviceState, Difference, Image
from tests.build.hosts import MS, Hosts
from tests.build.scenario import small_scenario, virtual

SECOND = 1_000_000_000
BLOCKS, STOP_ONLY, OBJECTS = 128, 32, 8
BUSY = {
    "device.0.critical.objects": OBJECTS,
    "device.0.stop_only_mib": 2.0,
    "device.0.writes": {"pattern": "hotspot", "mib_per_s": 20.0},
    "device.0.reconfigurations": {"poisson_per_s": 20.0, "objects_each": 3},
}
TIMES = st.integers(0, 2 * SECOND)


def device(changes: dict[str, Any] | None = None, *, seed: int = 1) -> DeviceState:
    spec = small_scenario(BUSY | (changes or {})).device[0]
    return DeviceState(spec, make_activity(spec, 2 * SECOND, np.random.default_rng(seed)))


def everything(state: DeviceState) -> tuple[list[int], list[int], int]:
    return state.version.tolist(), state.object_version.tolist(), state.epoch


# --- writes and reconfigurations -------------------------------------------------------------------------------------


@given(st.lists(TIMES, max_size=20), TIMES)
def test_asking_at_any_times_in_any_order_gives_what_asking_once_does(asked: list[int], last: int) -> None:
    often, once = device(), device()
    for at in [*asked, last]:
        often.advance(at)
    once.advance(max([*asked, last]))
    assert everything(often) == everything(once)


@pytest.mark.rule("v3.4.1")
@given(TIMES)
def test_versions_count_the_writes_and_epochs_the_reconfigurations(at: int) -> None:
    state = device()
    state.advance(at)
    writes, events = state.activity.writes_until(at), state.activity.reconfigurations_until(at)
    counted = np.bincount(state.activity.write_blocks[:writes], minlength=BLOCKS)
    assert state.version.tolist() == counted.tolist()
    renewed = np.bincount(state.activity.reconfiguration_objects[:events].ravel(), minlength=OBJECTS)
    assert state.object_version.tolist() == renewed.tolist()
    assert state.epoch == 1 + events


@given(TIMES)
def test_the_next_reconfiguration_is_the_first_that_is_still_to_come(at: int) -> None:
    state = device()
    state.advance(at)
    to_come = [time for time in state.activity.reconfiguration_ns.tolist() if time > at]
    assert state.next_reconfiguration_ns() == (to_come[0] if to_come else None)


@given(TIMES, TIMES)
def test_nothing_after_the_stop_counts(stop: int, later: int) -> None:
    state, expected = device(), device()
    state.stop(stop)
    state.advance(max(stop, later))
    expected.advance(stop)
    assert everything(state) == everything(expected)
    assert state.next_reconfiguration_ns() is None


def test_epochs_are_told_of_when_they_began_each_once() -> None:
    state, told = device({"device.0.reconfigurations": {"at_s": [0.1, 0.2, 0.3]}}), []
    state.on_epochs = lambda first, last: told.append((first, last))
    for at in (0, SECOND // 10 - 1, SECOND // 10, SECOND // 10, SECOND, 2 * SECOND):
        state.advance(at)
    assert told == [(2, 2), (3, 4)]


def test_the_blocks_that_an_epoch_touches_are_those_of_the_reconfiguration_that_began_it() -> None:
    state = device({"device.0.reconfigurations": {"at_s": [0.1, 0.2], "invalidates_share": 0.25}})
    state.advance(SECOND)
    first, second = state.activity.reconfiguration_blocks[:, 0].tolist()
    assert first != second
    assert [state.touched_blocks(epoch) for epoch in (2, 3)] == [BlockRange(first, 32, 2), BlockRange(second, 32, 3)]


# --- dirty and saved -------------------------------------------------------------------------------------------------


def test_at_first_all_is_dirty() -> None:
    state = device()
    assert state.dirty_blocks(slice(None), stopped=True).tolist() == list(range(BLOCKS))
    assert state.dirty_objects().tolist() == list(range(OBJECTS))


def test_blocks_of_the_stopped_device_only_are_not_dirty_before_the_stop() -> None:
    assert device().dirty_blocks(slice(None), stopped=False).tolist() == list(range(BLOCKS - STOP_ONLY))


def test_what_is_saved_is_clean_until_it_is_written_to() -> None:
    state = device()
    state.advance(SECOND // 2)
    saved_blocks = state.save_blocks(np.arange(BLOCKS))
    saved_objects = state.save_objects(np.arange(OBJECTS))
    assert not len(state.dirty_blocks(slice(None), stopped=True))
    assert not len(state.dirty_objects())
    state.advance(SECOND)
    assert (
        state.dirty_blocks(slice(None), stopped=True).tolist() == np.flatnonzero(state.version != saved_blocks).tolist()
    )
    assert state.dirty_objects().tolist() == np.flatnonzero(state.object_version != saved_objects).tolist()
    assert len(state.dirty_objects())


def test_saving_takes_the_versions_of_that_moment() -> None:
    state = device()
    state.advance(SECOND)
    chosen = np.array([0, 1, 5, 40])
    versions = state.save_blocks(chosen)
    expected = state.version[chosen].tolist()
    assert max(expected) > 0
    state.advance(2 * SECOND)
    assert versions.tolist() == expected


@given(st.integers(1, 200), st.booleans(), TIMES)
def test_homes_share_the_dirty_blocks_out_without_overlap(stripes: int, stopped: bool, at: int) -> None:
    state = device()
    state.save_blocks(np.arange(0, BLOCKS, 3))
    state.advance(at)
    parts = [state.dirty_blocks(slice(first, None, stripes), stopped) for first in range(stripes)]
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == len(together)
    assert sorted(together.tolist()) == state.dirty_blocks(slice(None), stopped).tolist()


def test_a_home_is_the_same_blocks_every_time() -> None:
    state = device()
    before = set(state.dirty_blocks(slice(2, None, 5), stopped=True).tolist())
    state.save_blocks(np.arange(BLOCKS))
    state.advance(2 * SECOND)
    assert set(state.dirty_blocks(slice(2, None, 5), stopped=True).tolist()) < before


def test_what_was_dropped_before_it_was_read_is_dirty_again_and_nothing_else() -> None:
    state = device()
    state.save_blocks(np.arange(BLOCKS))
    state.save_objects(np.arange(OBJECTS))
    state.unsave(np.array([3, 40]), np.array([5]))
    assert state.dirty_blocks(slice(None), stopped=True).tolist() == [3, 40]
    assert state.dirty_objects().tolist() == [5]


def test_what_was_saved_of_blocks_that_an_epoch_made_invalid_counts_no_more() -> None:
    state = device()
    state.save_blocks(np.arange(BLOCKS))
    state.save_objects(np.arange(OBJECTS))
    state.invalidate(BlockRange(94, 4, 7))
    assert state.dirty_blocks(slice(None), stopped=True).tolist() == [94, 95, 96, 97]
    assert state.dirty_blocks(slice(None), stopped=False).tolist() == [94, 95]
    assert not len(state.dirty_objects())
    state.invalidate(BlockRange(5, 0, 8))
    assert len(state.dirty_blocks(slice(None), stopped=True)) == 4


def test_all_that_was_saved_can_be_forgotten() -> None:
    state = device()
    state.save_blocks(np.arange(BLOCKS))
    state.save_objects(np.arange(OBJECTS))
    state.forget_saves()
    assert state.dirty_blocks(slice(None), stopped=True).tolist() == list(range(BLOCKS))
    assert state.dirty_objects().tolist() == list(range(OBJECTS))


def test_one_home_can_be_forgotten_without_the_others_and_without_the_objects() -> None:
    state = device()
    state.save_blocks(np.arange(BLOCKS))
    state.save_objects(np.arange(OBJECTS))
    state.forget_saves(slice(2, None, 5), objects=False)
    assert state.dirty_blocks(slice(None), stopped=True).tolist() == list(range(2, BLOCKS, 5))
    assert not len(state.dirty_objects())


# --- ordering the stop, and going on after it ------------------------------------------------------------------------

LATE = {"device.0.reconfigurations": {"at_s": [0.5, 1.5], "during_stop_ms": [0.0, 2.0], "objects_each": 3}}


def test_reconfigurations_during_the_stop_come_so_long_after_the_order() -> None:
    state = device(LATE)
    state.order_stop(SECOND)
    epochs = []
    for at in (SECOND - 1, SECOND, SECOND + 1_999_999, SECOND + 2_000_000):
        state.advance(at)
        epochs.append(state.epoch)
    assert epochs == [2, 3, 3, 4]
    assert state.next_reconfiguration_ns() == 3 * SECOND // 2


def test_what_had_happened_before_the_order_happens_once() -> None:
    ordered, plain = device(LATE), device(LATE)
    for state in (ordered, plain):
        state.advance(SECOND // 2)
    ordered.order_stop(SECOND // 2)
    plain.advance(SECOND // 2)
    assert ordered.epoch == plain.epoch == 2
    ordered.advance(SECOND)
    late = np.bincount(ordered.activity.during_stop_objects.ravel(), minlength=OBJECTS)
    assert ordered.object_version.tolist() == (plain.object_version + late).tolist()


@pytest.mark.parametrize("stops", [None, 1, 2, 3])
def test_they_come_at_so_many_orders_to_stop_from_the_first_and_at_one_if_nothing_else_is_said(
    stops: int | None,
) -> None:
    plan = {"during_stop_ms": [1.0], "objects_each": 3} | ({} if stops is None else {"during_stops": stops})
    state = device({"device.0.reconfigurations": plan})
    epochs = []
    for order in range(1, 5):
        ordered = order * SECOND // 10
        state.order_stop(ordered)
        state.stop(ordered + 2_000_000)
        epochs.append(state.epoch)
        state.start()
    assert epochs == [1 + min(order, stops or 1) for order in range(1, 5)]


def test_those_that_would_come_after_the_vcpus_are_stopped_do_not_come() -> None:
    state = device(LATE)
    state.order_stop(SECOND)
    state.stop(SECOND + 1_000_000)
    state.advance(2 * SECOND)
    assert state.epoch == 3
    assert state.next_reconfiguration_ns() is None


def test_whoever_waits_for_the_next_reconfiguration_is_told_of_those_that_were_put_in() -> None:
    state, told = device(LATE), []
    state.on_new_events = lambda: told.append(state.next_reconfiguration_ns())
    state.order_stop(SECOND)
    assert told == [SECOND]


def test_nobody_is_told_where_the_stop_brings_none() -> None:
    state, told = device({"device.0.reconfigurations": {"at_s": [1.5]}}), []
    state.on_new_events = lambda: told.append(True)
    state.order_stop(SECOND)
    assert told == []


def test_a_guest_that_goes_on_after_a_stop_has_all_of_its_activity_in_the_end() -> None:
    stopped, expected = device(), device()
    stopped.stop(SECOND // 2)
    stopped.start()
    for state in (stopped, expected):
        state.advance(SECOND)
    assert everything(stopped) == everything(expected)


# --- the image -------------------------------------------------------------------------------------------------------


def test_an_empty_image_differs_in_everything_even_from_a_device_that_nothing_was_written_to() -> None:
    state = device()
    assert Image(state.spec).differences(state) == Difference(BLOCKS, OBJECTS)


def test_an_image_with_every_version_does_not_differ() -> None:
    state = device()
    state.advance(SECOND)
    image = Image(state.spec)
    image.version[:] = state.version
    image.object_version[:] = state.object_version
    assert not image.differences(state)


@pytest.mark.parametrize("by", [-1, 1])
def test_one_version_off_in_either_direction_is_a_difference(by: int) -> None:
    state = device()
    state.advance(SECOND)
    image = Image(state.spec)
    image.version[:] = state.version
    image.object_version[:] = state.object_version
    image.version[7] += by
    assert image.differences(state) == Difference(blocks=1, objects=0)
    image.version[7] -= by
    image.object_version[3] += by
    assert image.differences(state) == Difference(blocks=0, objects=1)
    assert image.differences(state)


@virtual
async def test_stopped_once_it_stays_stopped_then() -> None:
    state = Hosts({"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}}).state
    state.stop(100 * MS)
    state.stop(200 * MS)
    state.advance(300 * MS)
    assert state.version.sum() == 16
