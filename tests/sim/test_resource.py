# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers against brute force and queueing theory, memory that threads share, the accounting lock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from fractions import Fraction
from math import ceil, factorial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from proto_v3.timeline import Mark, PathStep, Resource, Timeline
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.clock.virtual import run
from sim.resource import CommandSlots, FifoServer, Lock, Memory, duration_ns

SECOND = 1_000_000_000
JOBS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80)), max_size=40)
"""Of each job: how long after the one before it comes, and how long it takes."""


# --- a pipe ----------------------------------------------------------------------------------------------------------


@given(JOBS)
def test_a_pipe_is_one_server_at_a_rate_in_order_of_arrival(jobs: list[tuple[int, int]]) -> None:
    pipe = FifoServer(bytes_per_s=SECOND / 4)
    now, free, spans, expected = 0, 0, [], []
    for gap, size in jobs:
        now += gap
        spans.append(pipe.book(size, now))
        expected.append((max(now, free), max(now, free) + 4 * size))
        free = expected[-1][1]
    assert spans == expected


@given(st.integers(0, 1 << 40), st.floats(1, 1e12))
def test_a_duration_is_size_over_rate_to_the_nanosecond(size: int, bytes_per_s: float) -> None:
    assert duration_ns(size, bytes_per_s) == pytest.approx(size / bytes_per_s * SECOND, abs=0.5, rel=1e-12)


# --- engines ---------------------------------------------------------------------------------------------------------


def ends(
    engines: float, arrivals: list[int], services: list[int], *, cancelled: dict[int, int] | None = None
) -> list[int]:
    """When each command is through. `cancelled`: when the caller of some of them gives up; those end then."""

    async def main() -> list[int]:
        firmware = CommandSlots(engines)

        async def command(at: int, service: int) -> int:
            await sleep_until_ns(at)
            with contextlib.suppress(asyncio.CancelledError):
                await firmware.run(service)
            return now_ns()

        tasks = [asyncio.create_task(command(*job)) for job in zip(arrivals, services, strict=True)]
        for number, at in sorted((cancelled or {}).items(), key=lambda item: item[1]):
            await sleep_until_ns(at)
            tasks[number].cancel()
        return await asyncio.gather(*tasks)

    return run(main())


def shared_by_hand(engines: float, arrivals: list[int], services: list[int]) -> list[Fraction]:
    """The same, in exact numbers, from one arrival or end to the next."""
    left = {number: Fraction(service) for number, service in enumerate(services)}
    through: dict[int, Fraction] = {}
    now = Fraction(0)
    while left:
        present = [number for number in left if arrivals[number] <= now]
        for number in present:
            if left[number] == 0:
                through[number] = now
                del left[number]
        present = [number for number in present if number in left]
        to_come = [Fraction(arrivals[number]) for number in left if arrivals[number] > now]
        speed = min(Fraction(1), Fraction(engines) / len(present)) if present else Fraction(0)
        events = [*to_come, *(now + left[number] / speed for number in present)]
        if events:
            step = min(events) - now
            for number in present:
                left[number] -= step * speed
            now += step
    return [through[number] for number in range(len(services))]


@example(commands=11, service=999_999, engines=3)  # 3 / 11 is no float
@given(st.integers(1, 12), st.integers(0, 10**9), st.sampled_from([1, 1.25, 1.5, 2, 2.7, 3, 4, 16]))
def test_equal_commands_at_once_all_end_together(commands: int, service: int, engines: float) -> None:
    """None waits for another: each is slowed down by as many times as there are too many of them."""
    expected = ceil(service * max(Fraction(1), commands / Fraction(engines)))
    assert ends(engines, [0] * commands, [service] * commands) == [expected] * commands


def test_two_that_overlap_share_for_as_long_as_they_do() -> None:
    """A alone for 50, both at half speed until A is through at 150; B has 50 left, and is alone again."""
    assert ends(1, [0, 50], [100, 100]) == [150, 200]


def test_a_short_command_overtakes_a_long_one() -> None:
    assert ends(1, [0, 100], [1000, 10]) == [1010, 120]


def test_three_on_two_engines_by_hand() -> None:
    """One alone for 30; all at 2/3 for 90, in which they get 60 each; then the other two at full speed."""
    assert ends(2, [0, 30, 30], [30 + 60, 200, 200]) == [30 + 90, 30 + 90 + 140, 30 + 90 + 140]


def test_a_fraction_of_an_engine_is_shared_too() -> None:
    """One and a half engines: alone at full speed, two at 3/4 each, three at half speed."""
    assert ends(1.5, [0], [600]) == [600]
    assert ends(1.5, [0] * 2, [600] * 2) == [800] * 2
    assert ends(1.5, [0] * 3, [600] * 3) == [1200] * 3


def test_an_engine_that_was_idle_starts_anew() -> None:
    assert ends(1, [0, 1000, 1050], [100, 100, 100]) == [100, 1150, 1200]


def test_a_command_of_no_time_ends_at_once_whatever_else_runs() -> None:
    assert ends(1, [0, 0, 7], [100, 100, 0]) == [200, 200, 7]


def test_a_long_command_ends_to_the_nanosecond() -> None:
    """Three of an hour each on two engines: half an hour more, and no rounding adds up."""
    hour = 3600 * SECOND
    assert ends(2, [0, 0, 0], [hour] * 3) == [3 * hour // 2] * 3


def test_what_ran_long_before_costs_no_precision() -> None:
    years = 10**17
    assert ends(1, [0, years + 1], [years, 3]) == [years, years + 4]


def test_those_that_end_at_the_same_time_go_on_in_the_order_in_which_they_came() -> None:
    async def main() -> list[int]:
        engines, order = CommandSlots(1), []

        async def command(number: int) -> None:
            await engines.run(100)
            order.append(number)

        await asyncio.gather(*(asyncio.create_task(command(number)) for number in range(5)))
        return order

    assert run(main()) == [0, 1, 2, 3, 4]


def ends_by_vf(engines: float, of_a_vf: float, commands: list[tuple[int, int, int]]) -> list[int]:
    """When each command is through that arrives at a time, takes a time, and is of a VF."""

    async def main() -> list[int]:
        firmware = CommandSlots(engines, of_a_vf)

        async def command(at: int, service: int, vf: int) -> int:
            await sleep_until_ns(at)
            await firmware.run(service, vf)
            return now_ns()

        return await asyncio.gather(*(asyncio.create_task(command(*each)) for each in commands))

    return run(main())


def test_a_vf_has_no_more_than_its_part_and_leaves_the_rest_to_the_others() -> None:
    """Three engines, one and a half a VF. Three commands of VF 0 would have 3/4 of an engine each beside one of VF 1,
    and have half of one: 1.5 in all. VF 1's runs at full speed, and what is over is not used."""
    assert ends_by_vf(3, 1.5, [(0, 600, 0)] * 3 + [(0, 600, 1)]) == [1200] * 3 + [600]
    # Four of VF 1 beside them: 3/7 each, so that no VF comes to its part but VF 1's 12/7; then 1.5 for each VF.
    assert ends_by_vf(3, 1.5, [(0, 600, 0)] * 3 + [(0, 600, 1)] * 4) == [1200] * 3 + [1600] * 4


def test_a_vfs_part_holds_beside_many_others_too() -> None:
    """Two engines, one a VF: VF 0 with three commands has 2/3 of an engine in all beside VFs 1 to 6 with one each (2/9
    a command), which is below its part; alone it has 1."""
    assert ends_by_vf(2, 1, [(0, 200, 0)] * 3 + [(0, 200, vf) for vf in range(1, 7)]) == [900] * 9
    assert ends_by_vf(2, 1, [(0, 200, 0)] * 3) == [600] * 3


ENGINES = st.sampled_from([1, 1.5, 2, 3.25])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80), st.integers(0, 3)), max_size=30), ENGINES)
def test_a_part_that_is_no_less_than_all_engines_changes_nothing(
    jobs: list[tuple[int, int, int]], engines: float
) -> None:
    arrivals = np.cumsum([gap for gap, _, _ in jobs]).astype(int).tolist()
    commands = [(at, service, vf) for at, (_, service, vf) in zip(arrivals, jobs, strict=True)]
    together = ends(engines, arrivals, [service for _, service, _ in commands])
    assert ends_by_vf(engines, engines, commands) == together
    for end, whole in zip(ends_by_vf(engines, engines * (1 - 1e-9), commands), together, strict=True):
        assert abs(end - whole) <= len(jobs) + 1


@given(JOBS, ENGINES)
def test_engines_share_as_exact_numbers_do(jobs: list[tuple[int, int]], engines: float) -> None:
    """To a nanosecond a command: each end is at a whole one, and what was over is lost to the others."""
    arrivals = np.cumsum([gap for gap, _ in jobs]).astype(int).tolist()
    services = [service for _, service in jobs]
    exact = shared_by_hand(engines, arrivals, services)
    for end, expected in zip(ends(engines, arrivals, services), exact, strict=True):
        assert expected <= end + 1e-3
        assert end <= expected + len(jobs) + 1


@given(JOBS, ENGINES)
def test_the_same_commands_end_at_the_same_times_again(jobs: list[tuple[int, int]], engines: float) -> None:
    arrivals = np.cumsum([gap for gap, _ in jobs]).astype(int).tolist()
    services = [service for _, service in jobs]
    assert ends(engines, arrivals, services) == ends(engines, arrivals, services)


@given(JOBS, ENGINES, st.data())
def test_a_command_whose_caller_gave_up_slows_the_others_down_as_before(
    jobs: list[tuple[int, int]], engines: float, data: st.DataObject
) -> None:
    """The firmware knows nothing of it."""
    arrivals = np.cumsum([gap for gap, _ in jobs]).astype(int).tolist()
    services = [service for _, service in jobs]
    before = ends(engines, arrivals, services)
    gone = data.draw(st.sets(st.integers(0, len(jobs) - 1), max_size=5)) if jobs else set()
    cancelled = {
        number: (arrivals[number] + before[number]) // 2 for number in gone if before[number] > arrivals[number]
    }
    after = ends(engines, arrivals, services, cancelled=cancelled)
    assert after == [cancelled.get(number, end) for number, end in enumerate(before)]


# --- queueing theory -------------------------------------------------------------------------------------------------

CUSTOMERS, BATCHES = 200_000, 50
SHARING = 40_000
"""Of commands that share engines: each is a task."""


def arrivals_at(load_per_s: float, count: int) -> list[int]:
    gaps = np.random.default_rng(20240726).exponential(SECOND / load_per_s, count)
    arrivals: list[int] = np.cumsum(gaps).astype(np.int64).tolist()
    return arrivals


def mean_and_error(times: list[int]) -> tuple[float, float]:
    """Mean and its standard error, by batch means: times in a queue are no independent draws.

    The first batch, from when the queue was still empty, is left out.
    """
    batches = np.array(times, np.float64).reshape(BATCHES, -1).mean(axis=1)[1:]
    return float(batches.mean()), float(batches.std(ddof=1) / np.sqrt(len(batches)))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0])
def test_a_pipe_waits_as_pollaczek_and_khinchine_say(load: float, cv: float) -> None:
    """M/G/1: W = rho / (1 - rho) x (1 + cv^2) / 2 x service; cv = 0 is M/D/1."""
    service = 1_000_000
    factors = np.random.default_rng(1).gamma(1 / cv**2, cv**2, CUSTOMERS) if cv else np.ones(CUSTOMERS)
    sizes = np.rint(service * factors).astype(int).tolist()
    pipe = FifoServer(bytes_per_s=SECOND)
    arrivals = arrivals_at(load * SECOND / service, CUSTOMERS)
    mean, error = mean_and_error([pipe.book(size, now)[0] - now for now, size in zip(arrivals, sizes, strict=True)])
    expected = load / (1 - load) * (1 + cv**2) / 2 * service
    assert error < 0.06 * expected  # or the test would show nothing
    assert mean == pytest.approx(expected, abs=4 * error)


def mean_stay(engines: float, load_per_s: float, service_ns: NDArray[np.float64]) -> tuple[float, float]:
    """From a command's arrival to its end."""
    arrivals = arrivals_at(load_per_s, len(service_ns))
    through = ends(engines, arrivals, np.rint(service_ns).astype(int).tolist())
    return mean_and_error([end - at for at, end in zip(arrivals, through, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize(("load", "cv"), [(0.3, 1.0), (0.6, 0.0), (0.6, 1.0)])
def test_one_shared_engine_takes_as_long_as_its_load_says_however_commands_vary(load: float, cv: float) -> None:
    """M/G/1 processor sharing: T = service / (1 - rho), whatever the spread of the service times (Kleinrock 1967)."""
    service = 1_000_000
    factors = np.random.default_rng(3).gamma(1 / cv**2, cv**2, SHARING) if cv else np.ones(SHARING)
    mean, error = mean_stay(1, load * SECOND / service, service * factors)
    expected = service / (1 - load)
    assert error < 0.06 * expected
    assert mean == pytest.approx(expected, abs=4 * error)


@pytest.mark.slow
def test_several_shared_engines_take_as_long_as_erlang_says() -> None:
    """M/M/c: commands end at the same rate whether they share or queue, so T = service (1 + C(c, a) / (c - a))."""
    service, servers = 1_000_000, 4
    offered = 0.75 * servers
    mean, error = mean_stay(servers, offered * SECOND / service, np.random.default_rng(2).exponential(service, SHARING))
    last = offered**servers / factorial(servers) * servers / (servers - offered)
    waits = last / (sum(offered**k / factorial(k) for k in range(servers)) + last)
    expected = service + waits * service / (servers - offered)
    assert error < 0.06 * expected
    assert mean == pytest.approx(expected, abs=4 * error)


# --- memory ----------------------------------------------------------------------------------------------------------


def copied(sizes: list[int], *, thread: float, total: float, call_ns: int = 0) -> list[int]:
    """When each of several threads has copied its bytes, all starting at 0. Rates in bytes/s."""

    async def main() -> list[int]:
        memory = Memory(thread, total, Timeline(now_ns))

        async def copy(size: int) -> int:
            await memory.copy(size, call_ns, "read")
            return now_ns()

        return await asyncio.gather(*(asyncio.create_task(copy(size)) for size in sizes))

    return run(main())


def test_one_thread_copies_at_its_own_rate() -> None:
    assert copied([8_000], thread=1e9, total=5e9) == [8_000]


def test_a_call_costs_before_the_copy() -> None:
    assert copied([8_000], thread=1e9, total=5e9, call_ns=700) == [8_700]


def test_threads_do_not_slow_each_other_down_while_the_memory_has_room() -> None:
    assert copied([8_000] * 5, thread=1e9, total=5e9) == [8_000] * 5


def test_more_threads_share_what_the_memory_has() -> None:
    through = copied([8_000] * 20, thread=1e9, total=5e9)
    assert max(through) == 20 * 8_000 // 5
    assert through == sorted(through)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=12), st.integers(1, 8))
def test_neither_a_thread_nor_the_memory_is_ever_faster_than_it_can(sizes: list[int], ratio: int) -> None:
    through = copied(sizes, thread=1e9, total=ratio * 1e9)
    assert all(end >= size for end, size in zip(through, sizes, strict=True))
    assert max(through) >= sum(sizes) / ratio - len(sizes)
    assert max(through) <= max(max(sizes), sum(sizes) / ratio + len(sizes))  # the memory never idles while work is left


def test_a_copy_is_on_the_timeline_with_its_call() -> None:
    async def main() -> list[PathStep]:
        timeline = Timeline(now_ns)
        timeline.mark(Mark.STOP_ORDERED)
        await Memory(1e9, 1e9, timeline).copy(100, 7, "write")
        timeline.mark(Mark.RESUMED)
        return timeline.critical_path()

    assert run(main()) == [PathStep(Resource.COPY, "write", "main", 0, 107)]


# --- the lock --------------------------------------------------------------------------------------------------------


def locked(*workers: Callable[[Lock], Coroutine[Any, Any, None]]) -> tuple[int, int]:
    """Of workers on one lock: how long they took, how long they waited by the timeline's account."""

    async def main() -> tuple[int, int]:
        timeline = Timeline(now_ns)
        lock = Lock(timeline)
        timeline.mark(Mark.STOP_ORDERED)
        await asyncio.gather(*(asyncio.create_task(worker(lock)) for worker in workers))
        timeline.mark(Mark.RESUMED)
        return now_ns(), timeline.in_downtime_ns(Resource.LOCK)

    return run(main())


async def hold_once(lock: Lock) -> None:
    async with lock:
        await sleep_ns(10)


async def hold_five_times_in_a_row(lock: Lock) -> None:
    for _ in range(5):
        await hold_once(lock)


async def hold_five_times_with_pauses(lock: Lock) -> None:
    for _ in range(5):
        await hold_once(lock)
        await sleep_ns(1)


def test_a_lock_that_is_free_is_not_waited_for() -> None:
    assert locked(hold_once) == (10, 0)


def test_waiting_is_accounted_for_each_that_waits() -> None:
    assert locked(hold_once, hold_once, hold_once) == (30, 10 + 20)


def test_waiting_is_accounted_for_when_the_lock_changes_hands() -> None:
    """Two that want it all the time take turns: all waits but the first one's first are for 10 ns."""
    assert locked(hold_five_times_in_a_row, hold_five_times_in_a_row) == (100, 90)


def test_waiting_is_accounted_for_between_pauses() -> None:
    assert locked(hold_five_times_with_pauses, hold_five_times_with_pauses) == (101, 82)


def test_the_lock_is_first_come_first_served() -> None:
    async def main() -> list[int]:
        lock, order = Lock(Timeline(now_ns)), []

        async def take(number: int) -> None:
            await sleep_ns(number)
            for turn in range(2):
                async with lock:
                    order.append(10 * turn + number)
                    await sleep_ns(100)

        await asyncio.gather(*(asyncio.create_task(take(number)) for number in range(4)))
        return order

    assert run(main()) == [0, 1, 2, 3, 10, 11, 12, 13]


def test_one_that_is_cancelled_while_it_waits_leaves_the_lock_to_the_next() -> None:
    async def main() -> int:
        lock = Lock(Timeline(now_ns))
        first, second, third = (asyncio.create_task(hold_once(lock)) for _ in range(3))
        await sleep_ns(5)
        second.cancel()
        await asyncio.wait([first, second, third])
        return now_ns()

    assert run(main()) == 20


def test_the_lock_is_free_again_after_an_error() -> None:
    async def main() -> int:
        lock = Lock(Timeline(now_ns))
        with pytest.raises(OSError, match="inside"):
            async with lock:
                raise OSError("inside")
        await hold_once(lock)
        return now_ns()

    assert run(main()) == 10
