# SPDX-License-Identifier: GPL-2.0-or-later
"""When to stop: the threshold, the window of the measurement, and a bandwidth that is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.vmm.switchover import (
    Backlog,
    Left,
    RamBacklog,
    StoppedOnly,
    StreamBacklog,
    Switchover,
    SwitchoverSettings,
    why_not,
)

MS = 1_000_000
SETTINGS = SwitchoverSettings(
    downtime_limit_ns=300 * MS,
    bandwidth_window_ns=100 * MS,
    idle_round_ns=1 * MS,
    precopy_idle_ns=10 * MS,
    decision_interval_ns=10 * MS,
    give_up_ns=60_000 * MS,
    read_bytes=1 << 20,
    write_bytes=32 << 10,
    ram_budget_ns=50 * MS,
)


@pytest.mark.rule("v2.vmm.4")
def test_the_threshold_is_bandwidth_times_downtime_limit() -> None:
    switchover = Switchover(SETTINGS, 0)
    switchover.sample(100 * MS, 1_000_000)
    assert switchover.bandwidth_bytes_per_s == 10_000_000
    assert switchover.threshold_bytes == 3_000_000


def test_what_is_left_fits_below_the_threshold_and_not_at_it() -> None:
    switchover = Switchover(SETTINGS, 0)
    switchover.sample(100 * MS, 1_000_000)
    assert switchover.fits(2_999_999)
    assert not switchover.fits(3_000_000)


def test_before_the_first_window_only_nothing_fits() -> None:
    switchover = Switchover(SETTINGS, 0)
    switchover.sample(100 * MS - 1, 1_000_000)
    assert switchover.threshold_bytes == 0
    assert not switchover.fits(1)
    assert switchover.fits(0)


def test_a_window_counts_from_the_start_that_is_given() -> None:
    switchover = Switchover(SETTINGS, 5_000 * MS)
    switchover.sample(5_099 * MS, 1_000_000)
    assert switchover.bandwidth_bytes_per_s == 0
    switchover.sample(5_100 * MS, 1_000_000)
    assert switchover.bandwidth_bytes_per_s == 10_000_000


@pytest.mark.rule("v2.vmm.4")
def test_each_window_counts_its_own_bytes_and_time() -> None:
    switchover = Switchover(SETTINGS, 0)
    switchover.sample(100 * MS, 1_000_000)
    switchover.sample(150 * MS, 9_000_000)  # within the second window: changes nothing yet
    assert switchover.bandwidth_bytes_per_s == 10_000_000
    switchover.sample(350 * MS, 1_500_000)
    assert switchover.bandwidth_bytes_per_s == 500_000 / 0.25


def test_a_window_in_which_nothing_was_sent_leaves_no_bandwidth() -> None:
    switchover = Switchover(SETTINGS, 0)
    switchover.sample(100 * MS, 1_000_000)
    switchover.sample(200 * MS, 1_000_000)
    assert switchover.threshold_bytes == 0


@pytest.mark.rule("v2.vmm.19")
def test_a_window_is_full_when_its_share_of_max_bandwidth_is_sent() -> None:
    """A tenth of a million bytes in a window of 100 ms; the next window begins with what was sent by then."""
    settings = replace(SETTINGS, bandwidth_window_ns=100 * MS, max_bandwidth_bytes_per_s=1e6)
    switchover = Switchover(settings, 0)
    assert [switchover.window_is_full(sent) for sent in (99_999, 100_000)] == [False, True]
    assert [switchover.window_left_ns(now) for now in (0, 30 * MS, 101 * MS)] == [100 * MS, 70 * MS, 0]
    switchover.sample(100 * MS, 120_000)
    assert [switchover.window_is_full(sent) for sent in (219_999, 220_000)] == [False, True]
    assert not Switchover(SETTINGS, 0).window_is_full(1 << 60), "no limit is the default"


@pytest.mark.rule("v2.vmm.4")
def test_a_given_bandwidth_holds_once_the_first_window_is_over_and_is_never_measured_over() -> None:
    switchover = Switchover(replace(SETTINGS, given_bandwidth_bytes_per_s=2e6), 0)
    switchover.sample(99 * MS, 99_000_000)
    assert switchover.threshold_bytes == 0
    assert switchover.fits(0)
    assert not switchover.fits(1)
    switchover.sample(100 * MS, 99_000_000)
    assert switchover.threshold_bytes == 600_000
    switchover.sample(200 * MS, 99_000_000)
    assert switchover.threshold_bytes == 600_000


@given(
    st.lists(st.tuples(st.integers(1, 80 * MS), st.integers(0, 1 << 30)), min_size=1, max_size=30),
    st.integers(0, 1 << 40),
)
def test_the_bandwidth_is_the_mean_over_the_last_closed_window(steps: list[tuple[int, int]], start: int) -> None:
    switchover = Switchover(SETTINGS, start)
    now, sent = start, 0
    opened, opened_sent, expected = start, 0, 0.0
    for elapsed, size in steps:
        now, sent = now + elapsed, sent + size
        switchover.sample(now, sent)
        if now - opened >= SETTINGS.bandwidth_window_ns:
            expected = (sent - opened_sent) / ((now - opened) / 1e9)
            opened, opened_sent = now, sent
        assert switchover.bandwidth_bytes_per_s == pytest.approx(expected)


# --- one part by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RamBacklog, StreamBacklog])
def test_a_part_that_did_nothing_yet_does_not_fit_unless_nothing_is_left(kind: type[Backlog]) -> None:
    part = kind(SETTINGS, 0)
    assert part.fits(0)
    assert not part.fits(1)
    part.sample(50 * MS, 1_000, 5_000)
    assert not part.fits(1), "half a window tells nothing"


def test_ram_must_fit_at_the_rate_of_the_last_window_in_which_it_had_something_left() -> None:
    part = RamBacklog(SETTINGS, 0)
    part.sample(100 * MS, 1_000, 5_000)
    assert part.fits(2_999)
    assert not part.fits(3_000)
    part.sample(150 * MS, 90_000, 5_000)
    assert not part.fits(3_000), "this window is not over"
    part.sample(250 * MS, 201_000, 5_000)
    assert part.fits(399_999)
    assert not part.fits(400_000), "200 kB in 150 ms, and a limit of 300 ms"


def test_ram_that_ran_dry_is_not_judged_until_it_has_something_left_for_a_whole_window() -> None:
    part = RamBacklog(SETTINGS, 0)
    part.sample(100 * MS, 10, 5_000)
    assert not part.fits(5_000)
    part.sample(120 * MS, 5_010, 0)
    assert part.fits(1 << 40)
    part.sample(219 * MS, 5_020, 7_000)
    assert part.fits(1 << 40)
    part.sample(220 * MS, 5_030, 7_000)
    assert part.fits(59)
    assert not part.fits(60)


@pytest.mark.rule("v3.6.3")
def test_a_stream_must_fit_at_the_rate_of_its_round_the_time_before_anything_came_included() -> None:
    part = StreamBacklog(SETTINGS, 0)
    for at in range(10, 400, 10):  # it is being saved
        part.sample(at * MS, 0, 5_000)
    assert not part.fits(1)
    part.sample(400 * MS, 2_000, 3_000)
    assert part.fits(1_499)
    assert not part.fits(1_500), "2 kB in 400 ms, and a limit of 300 ms"
    part.sample(500 * MS, 5_000, 0)
    assert part.fits(0)
    assert part.fits(2_999)
    assert not part.fits(3_000), "5 kB in half a second"
    part.sample(5_000 * MS, 5_000, 0)
    assert part.fits(2_999)
    assert not part.fits(3_000), "the time in which there was nothing to carry does not count"


@pytest.mark.rule("v3.6.3")
def test_a_new_round_of_a_stream_stands_for_itself_once_it_is_a_window_old() -> None:
    part = StreamBacklog(SETTINGS, 0)
    part.sample(200 * MS, 2_000, 0)
    part.sample(300 * MS, 2_000, 50_000)
    part.sample(399 * MS, 11_900, 40_100)
    assert not part.fits(3_000), "still at the last round's 10 kB a second"
    part.sample(400 * MS, 12_000, 40_000)
    assert part.fits(29_999)
    assert not part.fits(30_000), "10 kB in 100 ms"


def test_a_stream_that_never_carried_anything_is_not_judged_once_it_ran_dry() -> None:
    part = StreamBacklog(SETTINGS, 0)
    part.sample(10 * MS, 0, 0)
    assert part.fits(1 << 40)


def test_what_runs_dry_between_two_decisions_is_not_judged_by_less_than_that_time() -> None:
    part = StreamBacklog(replace(SETTINGS, downtime_limit_ns=1 * MS, decision_interval_ns=10 * MS), 0)
    part.sample(10 * MS, 5_000, 0)
    assert part.fits(4_999)
    assert not part.fits(5_000)


@pytest.mark.rule("v3.6.2")
@pytest.mark.parametrize(("unread_ms", "most"), [(0, 2_999_999), (100, 1_999_999), (299, 9_999), (300, 0), (1_000, 0)])
def test_what_is_not_saved_yet_must_fit_the_time_that_is_left_when_the_streams_are_empty(
    unread_ms: int, most: int
) -> None:
    switchover = Switchover(SETTINGS, 0)
    switchover.sample(100 * MS, 1_000_000)
    assert switchover.fits_after(unread_ms * MS, most)
    assert not switchover.fits_after(unread_ms * MS, most + 1)


def test_a_limit_below_the_decision_interval_leaves_one_interval_for_what_is_not_saved_yet() -> None:
    switchover = Switchover(replace(SETTINGS, downtime_limit_ns=1 * MS), 0)
    switchover.sample(100 * MS, 1_000_000)
    assert switchover.fits_after(5 * MS, 49_999)
    assert not switchover.fits_after(5 * MS, 50_000)


@pytest.mark.parametrize("kind", [RamBacklog, StreamBacklog])
def test_a_part_without_a_rate_takes_for_ever_unless_it_keeps_up(kind: type[Backlog]) -> None:
    part = kind(SETTINGS, 0)
    assert part.time_ns(0) == 0
    assert part.time_ns(1) == math.inf
    part.sample(10 * MS, 0, 0)
    assert part.time_ns(1 << 40) == 0
    part.sample(20 * MS, 0, 5_000)
    part.sample(120 * MS, 0, 5_000)
    assert part.time_ns(1) == math.inf, "a whole window, and nothing was sent"


@pytest.mark.parametrize("kind", [RamBacklog, StreamBacklog])
def test_a_given_bandwidth_stands_for_all_parts(kind: type[Backlog]) -> None:
    part = kind(replace(SETTINGS, given_bandwidth_bytes_per_s=1.0), 0)
    part.sample(100 * MS, 10, 5_000)
    assert part.fits(1 << 40)


# --- why it did not converge -----------------------------------------------------------------------------------------

MIB = 1 << 20


def told(samples: Sequence[tuple[int, int]], parts: Sequence[Left], *held_up: str, given: float | None = None) -> str:
    """Why 120 s were not enough. `samples`: milliseconds and MiB sent."""
    settings = replace(SETTINGS, given_bandwidth_bytes_per_s=given)
    switchover = Switchover(settings, 0)
    for at_ms, sent_mib in samples:
        switchover.sample(at_ms * MS, sent_mib * MIB)
    return why_not(settings, 120_000 * MS, switchover, parts, held_up)


LEFT = [Left("RAM", 12 * MIB), Left("vf0", 800 * MIB, 512 * MIB)]
RIGHT = "given up after 120 s of pre-copy: 812 MiB left (RAM 12, vf0 800); "


def test_what_is_left_what_fits_and_what_never_will() -> None:
    assert told([(100, 200)], LEFT) == RIGHT + "600 MiB fit a downtime limit of 300 ms at 2000 MiB/s"
    assert told([(100, 100)], LEFT, "x holds it up", "y too") == (
        RIGHT + "300 MiB fit a downtime limit of 300 ms at 1000 MiB/s; x holds it up; y too; "
        "vf0 has 512 MiB that pre-copy does not give: they can never fit, at no bandwidth that was measured"
    )
    assert told([(100, 7)], LEFT, given=1000 * MIB) == (
        RIGHT + "300 MiB fit a downtime limit of 300 ms at the given 1000 MiB/s; "
        "vf0 has 512 MiB that pre-copy does not give: they can never fit"
    )


def test_a_bandwidth_is_told_as_far_as_it_was_measured() -> None:
    most = "600 MiB would at 2000 MiB/s, the most that was measured"
    limit = "a downtime limit of 300 ms"
    assert told([(100, 200), (200, 300)], LEFT) == RIGHT + f"300 MiB fit {limit} at 1000 MiB/s ({most})"
    idle = told([(100, 200), (200, 200)], LEFT)
    assert idle == RIGHT + f"nothing fits {limit}, as nothing was sent in the last 100 ms ({most})"
    assert told([(99, 200)], [*LEFT[:1]]).endswith(f"nothing fits {limit}, as no bandwidth was measured over 100 ms")


def test_without_a_look_only_what_held_it_up_is_told() -> None:
    assert why_not(SETTINGS, 1_500 * MS, None, [], ["a call hangs"]) == "given up after 1.5 s of pre-copy: a call hangs"
    assert why_not(SETTINGS, 1 * MS, None, [], []).endswith("0.001 s of pre-copy: what is left is not known")


def test_what_only_a_stopped_device_gives_is_known_at_the_start_or_when_pre_copy_has_nothing_to_give() -> None:
    part = StoppedOnly()
    assert part.bytes == 0
    part.begins(1000 * MIB, 5 * MIB)
    assert part.bytes == 0, "headers and rounding"
    part.begins(1000 * MIB, 300 * MIB)
    assert part.bytes == 300 * MIB
    part.drained(700 * MIB)
    part.drained(500 * MIB)
    part.drained(600 * MIB)
    assert part.bytes == 500 * MIB, "a driver that gives all of it again when it is stopped"
