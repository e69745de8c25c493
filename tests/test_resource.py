"""Servers against brute force and queueing theory, memory that threads share, the accounting lock, the bell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from math import factorial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from proto_v3.timeline import NO_CAUSE, Mark, PathStep, Resource, Timeline, cause, caused_by
from sim.clock import now_ns, run, sleep_ns
from sim.resource import Bell, Engines, Lock, Memory, Pipe, duration_ns

SECOND = 1_000_000_000
JOBS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80)), max_size=40)
"""Of each job: how long after the one before it comes, and how long it takes."""


def brute_force(jobs: list[tuple[int, int]], servers: int) -> list[tuple[int, int]]:
    """Start and end of each job, found by going through time step by step."""
    arrivals = np.cumsum([gap for gap, _ in jobs]).tolist()
    spans: list[tuple[int, int]] = []
    busy_until: list[int] = []
    now = 0
    while len(spans) < len(jobs):
        busy_until = [end for end in busy_until if end > now]
        while len(spans) < len(jobs) and arrivals[len(spans)] <= now and len(busy_until) < servers:
            spans.append((now, now + jobs[len(spans)][1]))
            busy_until = [end for end in [*busy_until, spans[-1][1]] if end > now]
        now += 1
    return spans


@given(JOBS, st.integers(1, 4))
def test_engines_serve_in_order_of_arrival_as_soon_as_one_is_free(jobs: list[tuple[int, int]], servers: int) -> None:
    engines = Engines(servers)
    now, spans = 0, []
    for gap, service in jobs:
        now += gap
        spans.append(engines.book(service, now))
    assert spans == brute_force(jobs, servers)


@given(JOBS)
def test_a_pipe_is_one_server_at_a_rate(jobs: list[tuple[int, int]]) -> None:
    pipe = Pipe(bytes_per_s=SECOND / 4)
    now, spans = 0, []
    for gap, size in jobs:
        now += gap
        spans.append(pipe.book(size, now))
    assert spans == brute_force([(gap, 4 * size) for gap, size in jobs], servers=1)


@given(st.integers(0, 1 << 40), st.floats(1, 1e12))
def test_a_duration_is_size_over_rate_to_the_nanosecond(size: int, bytes_per_s: float) -> None:
    assert duration_ns(size, bytes_per_s) == pytest.approx(size / bytes_per_s * SECOND, abs=0.5, rel=1e-12)


# --- queueing theory -------------------------------------------------------------------------------------------------

CUSTOMERS, BATCHES = 200_000, 50


def mean_wait(engines: Engines, load_per_s: float, service_ns: NDArray[np.int64]) -> tuple[float, float]:
    """Mean wait of Poisson arrivals and its standard error, by batch means: waits in a queue are no independent draws.

    The first batch, from when the queue was still empty, is left out.
    """
    gaps = np.random.default_rng(20240726).exponential(SECOND / load_per_s, len(service_ns))
    arrivals = np.cumsum(gaps).astype(np.int64)
    waits = [
        engines.book(service, now)[0] - now for now, service in zip(arrivals.tolist(), service_ns.tolist(), strict=True)
    ]
    batches = np.array(waits, np.float64).reshape(BATCHES, -1).mean(axis=1)[1:]
    return float(batches.mean()), float(batches.std(ddof=1) / np.sqrt(len(batches)))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0])
def test_one_engine_waits_as_pollaczek_and_khinchine_say(load: float, cv: float) -> None:
    """M/G/1: W = rho / (1 - rho) x (1 + cv^2) / 2 x service; cv = 0 is M/D/1."""
    service = 1_000_000
    factors = np.random.default_rng(1).gamma(1 / cv**2, cv**2, CUSTOMERS) if cv else np.ones(CUSTOMERS)
    mean, error = mean_wait(Engines(1), load * SECOND / service, np.rint(service * factors).astype(np.int64))
    expected = load / (1 - load) * (1 + cv**2) / 2 * service
    assert error < 0.06 * expected  # or the test would show nothing
    assert mean == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("servers", [2, 4])
def test_several_engines_wait_as_erlang_says(servers: int) -> None:
    """M/M/c: W = C(c, a) x service / (c - a), with a the offered load and C Erlang's probability of waiting."""
    service, offered = 1_000_000, 0.75 * servers
    drawn = np.random.default_rng(2).exponential(service, CUSTOMERS)
    mean, error = mean_wait(Engines(servers), offered * SECOND / service, np.rint(drawn).astype(np.int64))
    last = offered**servers / factorial(servers) * servers / (servers - offered)
    waits = last / (sum(offered**k / factorial(k) for k in range(servers)) + last)
    expected = waits * service / (servers - offered)
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
    ends = copied([8_000] * 20, thread=1e9, total=5e9)
    assert max(ends) == 20 * 8_000 // 5
    assert ends == sorted(ends)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=12), st.integers(1, 8))
def test_neither_a_thread_nor_the_memory_is_ever_faster_than_it_can(sizes: list[int], ratio: int) -> None:
    ends = copied(sizes, thread=1e9, total=ratio * 1e9)
    assert all(end >= size for end, size in zip(ends, sizes, strict=True))
    assert max(ends) >= sum(sizes) / ratio - len(sizes)
    assert max(ends) <= max(max(sizes), sum(sizes) / ratio + len(sizes))  # the memory never idles while work is left


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


# --- the bell --------------------------------------------------------------------------------------------------------


def rung(ring: Callable[[Bell], None], *, waiters: int = 1) -> list[tuple[int, int]]:
    """When each waiter went on and what its cause was, if the bell is rung after 5 ns by a task whose cursor is 7."""

    async def main() -> list[tuple[int, int]]:
        bell = Bell()

        async def wait() -> tuple[int, int]:
            await bell.wait()
            return now_ns(), cause()

        caused_by(NO_CAUSE)
        waiting = [asyncio.create_task(wait()) for _ in range(waiters)]
        await sleep_ns(5)
        caused_by(7)
        ring(bell)
        return await asyncio.gather(*waiting)

    return run(main())


def test_what_the_ringer_did_last_is_the_cause() -> None:
    assert rung(lambda bell: bell.ring()) == [(5, 7)]


def test_the_cause_may_be_another_span() -> None:
    assert rung(lambda bell: bell.ring(by=3)) == [(5, 3)]


def test_a_ring_wakes_all() -> None:
    assert rung(lambda bell: bell.ring(), waiters=3) == [(5, 7)] * 3


def test_the_first_of_two_rings_is_the_cause() -> None:
    def twice(bell: Bell) -> None:
        bell.ring(by=1)
        bell.ring(by=2)

    assert rung(twice) == [(5, 1)]


def test_a_ring_is_not_kept_for_who_waits_later() -> None:
    async def main() -> bool:
        bell = Bell()
        bell.ring()
        waiting = asyncio.create_task(bell.wait())
        await sleep_ns(100)
        return waiting.done()

    assert not run(main())


def test_the_bell_knows_whether_anybody_waits() -> None:
    async def main() -> list[bool]:
        bell = Bell()
        told = [bell.waited_for]
        waiting = asyncio.create_task(bell.wait())
        await sleep_ns(1)
        told.append(bell.waited_for)
        bell.ring()
        told.append(bell.waited_for)
        await waiting
        return told

    assert run(main()) == [False, True, False]


def test_who_gave_up_waiting_does_not_wait_any_more() -> None:
    async def main() -> bool:
        bell = Bell()
        waiting = asyncio.create_task(bell.wait())
        await sleep_ns(1)
        waiting.cancel()
        await asyncio.wait([waiting])
        return bell.waited_for

    assert run(main()) is False
