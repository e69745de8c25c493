"""When to stop: the threshold, the window of the measurement, a bandwidth that is given, and busy rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.switchover import BusyRate, Switchover, SwitchoverSettings

MS = 1_000_000
SETTINGS = SwitchoverSettings(
    downtime_limit_ns=300 * MS,
    bandwidth_window_ns=100 * MS,
    decision_interval_ns=10 * MS,
    give_up_ns=60_000 * MS,
    read_bytes=1 << 20,
    write_bytes=32 << 10,
    ram_budget_ns=50 * MS,
)


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


def test_a_given_bandwidth_holds_from_the_start_and_is_never_measured_over() -> None:
    switchover = Switchover(replace(SETTINGS, given_bandwidth_bytes_per_s=2e6), 0)
    assert switchover.threshold_bytes == 600_000
    switchover.sample(100 * MS, 99_000_000)
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


def test_a_connection_that_carried_nothing_has_no_rate() -> None:
    rate = BusyRate(100)
    assert rate.bytes_per_s == 0
    rate.add(0, 0)
    assert rate.bytes_per_s == 0


def test_a_rate_counts_busy_time_only() -> None:
    rate = BusyRate(100 * MS)
    rate.add(1_000_000, 60 * MS)
    rate.add(1_000_000, 40 * MS)
    assert rate.bytes_per_s == 20_000_000


def test_of_the_first_window_all_that_there_is_of_it_counts() -> None:
    rate = BusyRate(100 * MS)
    rate.add(1_000_000, 10 * MS)
    assert rate.bytes_per_s == 100_000_000
    rate.add(3_000_000, 10 * MS)
    assert rate.bytes_per_s == 200_000_000


def test_after_that_the_last_full_window_counts_until_the_next_is_full() -> None:
    rate = BusyRate(100 * MS)
    rate.add(1_000_000, 100 * MS)
    rate.add(9_000_000, 99 * MS)
    assert rate.bytes_per_s == 10_000_000
    rate.add(1_000_000, 1 * MS)
    assert rate.bytes_per_s == 100_000_000


def test_a_window_starts_anew_when_the_one_before_it_is_full() -> None:
    rate = BusyRate(100 * MS)
    rate.add(5_000_000, 250 * MS)
    assert rate.bytes_per_s == 20_000_000
    rate.add(1_000_000, 100 * MS)
    assert rate.bytes_per_s == 10_000_000
