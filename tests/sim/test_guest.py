# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's activity: made from the seed alone, at the rates, in the patterns and within the ranges asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.device.guest import Activity, make_activity
from tests.build.scenario import small_scenario

SECOND = 1_000_000_000
BLOCKS = 128
"""Of the small scenario: 8 MiB in blocks of 64 KiB, so 16 writes a second are 1 MiB/s."""


def activity(changes: dict[str, Any], *, seed: int = 1, horizon_ns: int = 10 * SECOND) -> Activity:
    device = small_scenario({f"device.0.{key}": value for key, value in changes.items()}).device[0]
    return make_activity(device, horizon_ns, np.random.default_rng(seed))


def writes(pattern: str, mib_per_s: float = 100.0, **more: Any) -> dict[str, Any]:
    return {"writes": {"pattern": pattern, "mib_per_s": mib_per_s, **more}}


def reconfigurations(**plan: Any) -> dict[str, Any]:
    return {"critical.objects": 32, "reconfigurations": plan}


def same(one: Activity, other: Activity) -> bool:
    return (
        one.writes_per_s == other.writes_per_s
        and np.array_equal(one.write_blocks, other.write_blocks)
        and np.array_equal(one.reconfiguration_ns, other.reconfiguration_ns)
        and np.array_equal(one.reconfiguration_objects, other.reconfiguration_objects)
        and np.array_equal(one.during_stop_ns, other.during_stop_ns)
        and np.array_equal(one.during_stop_objects, other.during_stop_objects)
        and np.array_equal(one.reconfiguration_blocks, other.reconfiguration_blocks)
        and np.array_equal(one.during_stop_blocks, other.during_stop_blocks)
    )


BUSY = [
    writes("uniform") | reconfigurations(poisson_per_s=5.0, objects_each=4),
    writes("hotspot") | reconfigurations(at_s=[1.0, 2.0], during_stop_ms=[0.5, 0.1], objects_each=4),
    writes("sequential") | reconfigurations(poisson_per_s=5.0, during_stop_ms=[0.5], invalidates_share=0.1),
]


@pytest.mark.parametrize("busy", BUSY)
def test_the_same_seed_gives_the_same_activity(busy: dict[str, Any]) -> None:
    assert same(activity(busy, seed=3), activity(busy, seed=3))


@pytest.mark.parametrize("busy", BUSY)
def test_another_seed_gives_other_writes_and_other_objects(busy: dict[str, Any]) -> None:
    one, other = activity(busy, seed=3), activity(busy, seed=4)
    assert not np.array_equal(one.write_blocks, other.write_blocks)
    assert not np.array_equal(one.reconfiguration_objects, other.reconfiguration_objects)


def test_an_idle_guest_does_nothing() -> None:
    idle = activity({})
    assert idle.writes_until(100 * SECOND) == 0
    assert idle.reconfigurations_until(100 * SECOND) == 0


# --- writes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["uniform", "hotspot", "sequential"])
def test_writes_come_at_the_rate_asked_for_up_to_the_horizon(pattern: str) -> None:
    busy = activity(writes(pattern, mib_per_s=100.0))
    assert busy.writes_per_s == 1600
    assert len(busy.write_blocks) == 16_000
    assert busy.writes_until(10 * SECOND) == 16_000
    assert busy.writes_until(99 * SECOND) == 16_000


def test_the_kth_write_is_k_periods_after_the_start() -> None:
    busy = activity(writes("uniform", mib_per_s=100.0))
    period = SECOND // 1600
    assert [busy.writes_until(at) for at in (0, period - 1, period, 2 * period - 1, 2 * period)] == [0, 0, 1, 1, 2]


@given(st.floats(0.01, 1000), st.lists(st.integers(0, 10 * SECOND), min_size=2, max_size=10).map(sorted))
def test_writes_never_go_back_and_keep_to_their_rate(mib_per_s: float, times: list[int]) -> None:
    busy = activity(writes("uniform", mib_per_s=mib_per_s))
    counts = [busy.writes_until(at) for at in times]
    assert counts == sorted(counts)
    for at, count in zip(times, counts, strict=True):
        assert count == pytest.approx(at / SECOND * mib_per_s * 16, abs=1)


@pytest.mark.parametrize("pattern", ["uniform", "hotspot", "sequential"])
def test_no_write_goes_to_a_block_that_can_be_saved_only_when_stopped(pattern: str) -> None:
    blocks = activity(writes(pattern) | {"stop_only_mib": 2.0}).write_blocks
    assert blocks.min() == 0
    assert blocks.max() == BLOCKS - 32 - 1


def test_uniform_writes_are_spread_evenly() -> None:
    counts = np.bincount(activity(writes("uniform", mib_per_s=1000.0)).write_blocks, minlength=BLOCKS)
    expected = counts.sum() / BLOCKS
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared == pytest.approx(BLOCKS - 1, abs=4 * np.sqrt(2 * (BLOCKS - 1)))


@pytest.mark.parametrize(("share", "fraction"), [(0.9, 0.1), (0.5, 0.25), (0.99, 0.5)])
def test_a_hotspot_gets_its_share_and_of_the_others_what_falls_into_it(share: float, fraction: float) -> None:
    blocks = activity(writes("hotspot", mib_per_s=1000.0, hot_share=share, hot_fraction=fraction)).write_blocks
    hot_blocks = round(fraction * BLOCKS)
    expected = share + (1 - share) * hot_blocks / BLOCKS
    error = np.sqrt(expected * (1 - expected) / len(blocks))
    assert np.mean(blocks < hot_blocks) == pytest.approx(expected, abs=4 * error)


def test_sequential_writes_go_round() -> None:
    blocks = activity(writes("sequential") | {"stop_only_mib": 2.0}).write_blocks
    assert len(blocks) > 10 * 96
    assert (np.diff(blocks) % 96 == 1).all()


# --- reconfigurations ------------------------------------------------------------------------------------------------


def test_reconfigurations_come_when_they_are_told_to_in_any_order() -> None:
    busy = activity(reconfigurations(at_s=[2.5, 0.0, 1.0, 1.0]))
    assert busy.reconfiguration_ns.tolist() == [0, SECOND, SECOND, 2_500_000_000]
    counts = [busy.reconfigurations_until(at) for at in (0, SECOND - 1, SECOND, 2_499_999_999, 2_500_000_000)]
    assert counts == [1, 1, 3, 3, 4]


def test_reconfigurations_after_the_horizon_are_left_out() -> None:
    busy = activity(reconfigurations(at_s=[1.0, 11.0]), horizon_ns=10 * SECOND)
    assert busy.reconfiguration_ns.tolist() == [SECOND]


def test_random_reconfigurations_come_at_the_rate_asked_for() -> None:
    per_s, horizon_s = 50.0, 400
    times = activity(reconfigurations(poisson_per_s=per_s), horizon_ns=horizon_s * SECOND).reconfiguration_ns
    expected = per_s * horizon_s
    assert len(times) == pytest.approx(expected, abs=4 * np.sqrt(expected))
    gaps = np.diff(times) / SECOND * per_s  # exponential with mean 1, so with standard deviation 1
    assert gaps.std() == pytest.approx(1, abs=4 * np.sqrt(2 / len(gaps)))


@given(st.integers(0, 1000), st.floats(0.1, 100), st.integers(1, 32))
def test_random_reconfigurations_are_sorted_and_within_range(seed: int, per_s: float, objects_each: int) -> None:
    busy = activity(reconfigurations(poisson_per_s=per_s, objects_each=objects_each), seed=seed)
    times, objects = busy.reconfiguration_ns, busy.reconfiguration_objects
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < 10 * SECOND)).all()
    assert objects.shape == (len(times), objects_each)
    assert ((objects >= 0) & (objects < 32)).all()


def test_a_reconfiguration_makes_neighbours_new_round_the_end() -> None:
    objects = activity(reconfigurations(poisson_per_s=50.0, objects_each=5)).reconfiguration_objects
    assert (np.diff(objects, axis=1) % 32 == 1).all()
    assert len(np.unique(objects[:, 0])) == 32


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.001, 0), (0.1, 13), (0.5, 64), (0.99, 127)])
def test_a_reconfiguration_names_a_range_of_its_share_anywhere_among_the_blocks(share: float, count: int) -> None:
    """Blocks that can be saved only when stopped, too: their earlier data is invalid as any other."""
    busy = activity(reconfigurations(poisson_per_s=200.0, invalidates_share=share) | {"stop_only_mib": 2.0})
    first, counts = busy.reconfiguration_blocks.T
    assert busy.reconfiguration_blocks.shape == (len(busy.reconfiguration_ns), 2)
    assert (counts == count).all()
    assert first.min() == 0
    assert first.max() == BLOCKS - count


def test_a_reconfiguration_names_all_blocks_if_nothing_else_is_said() -> None:
    busy = activity(reconfigurations(at_s=[1.0, 2.0], during_stop_ms=[0.5]))
    assert busy.reconfiguration_blocks.tolist() == [[0, BLOCKS]] * 2
    assert busy.during_stop_blocks.tolist() == [[0, BLOCKS]]
    assert activity({}).reconfiguration_blocks.shape == activity({}).during_stop_blocks.shape == (0, 2)


def test_the_blocks_that_are_named_leave_all_else_as_it_was() -> None:
    plan = {"poisson_per_s": 50.0, "during_stop_ms": [0.5], "objects_each": 3}
    one, other = (
        activity(writes("uniform") | reconfigurations(**plan, invalidates_share=share), seed=9) for share in (0.1, 0.7)
    )
    assert not np.array_equal(one.reconfiguration_blocks, other.reconfiguration_blocks)
    one = replace(one, reconfiguration_blocks=other.reconfiguration_blocks, during_stop_blocks=other.during_stop_blocks)
    assert same(one, other)


def test_reconfigurations_leave_the_writes_as_they_were() -> None:
    without = activity(writes("hotspot"), seed=9)
    with_them = activity(writes("hotspot") | reconfigurations(poisson_per_s=50.0, objects_each=8), seed=9)
    assert len(with_them.reconfiguration_ns) > 100
    assert np.array_equal(without.write_blocks, with_them.write_blocks)


def test_writes_leave_the_reconfigurations_as_they_were() -> None:
    without = activity(reconfigurations(poisson_per_s=50.0), seed=9)
    with_them = activity(writes("uniform") | reconfigurations(poisson_per_s=50.0), seed=9)
    assert np.array_equal(without.reconfiguration_ns, with_them.reconfiguration_ns)
    assert np.array_equal(without.reconfiguration_objects, with_them.reconfiguration_objects)
    assert np.array_equal(without.reconfiguration_blocks, with_them.reconfiguration_blocks)


# --- reconfigurations during the stop --------------------------------------------------------------------------------


def test_reconfigurations_during_the_stop_are_sorted_and_do_not_happen_before_it_is_ordered() -> None:
    busy = activity(reconfigurations(during_stop_ms=[2.0, 0.0, 0.5], objects_each=3))
    assert busy.during_stop_ns.tolist() == [0, 500_000, 2_000_000]
    assert busy.during_stop_objects.shape == (3, 3)
    assert busy.during_stop_blocks.shape == (3, 2)
    assert busy.reconfigurations_until(10 * SECOND) == 0


def test_a_stop_puts_its_reconfigurations_in_among_the_others() -> None:
    plan = {"at_s": [1.0, 1.5], "during_stop_ms": [0.0, 600.0]}
    before = activity(reconfigurations(**plan, objects_each=3, invalidates_share=0.1))
    after = before.with_events_during_stop(SECOND)
    assert after.reconfiguration_ns.tolist() == [SECOND, SECOND, 1_500_000_000, 1_600_000_000]
    given, late = before.reconfiguration_objects.tolist(), before.during_stop_objects.tolist()
    assert after.reconfiguration_objects.tolist() == [given[0], late[0], given[1], late[1]]
    named, late_named = before.reconfiguration_blocks.tolist(), before.during_stop_blocks.tolist()
    assert after.reconfiguration_blocks.tolist() == [named[0], late_named[0], named[1], late_named[1]]
    assert np.array_equal(after.write_blocks, before.write_blocks)
    assert before.reconfiguration_ns.tolist() == [SECOND, 1_500_000_000]


@pytest.mark.parametrize("plan", [{"at_s": [0.5, 3.0]}, {"poisson_per_s": 5.0}, {}])
def test_those_during_the_stop_leave_all_else_as_it_was(plan: dict[str, Any]) -> None:
    without = activity(writes("hotspot") | reconfigurations(**plan), seed=9)
    with_them = activity(writes("hotspot") | reconfigurations(**plan, during_stop_ms=[1.0]), seed=9)
    assert len(with_them.during_stop_ns) == 1
    assert np.array_equal(without.write_blocks, with_them.write_blocks)
    assert np.array_equal(without.reconfiguration_ns, with_them.reconfiguration_ns)
    assert np.array_equal(without.reconfiguration_objects, with_them.reconfiguration_objects)
    assert np.array_equal(without.reconfiguration_blocks, with_them.reconfiguration_blocks)
