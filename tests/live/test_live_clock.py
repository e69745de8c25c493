# SPDX-License-Identifier: GPL-2.0-or-later
"""Real time that does not drift, and the driver's locks as real ones.

What would depend on the machine is taken out: a test moves a fake clock, and what a timer was set
to is looked at in place of when it fired.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.timeline import NO_CAUSE, Timeline, caused_by
from sim.clock import virtual
from sim.clock.port import now_ns, sleep_ns, use
from sim.live import real_time as live_clock
from sim.live.fd.copy import Mutex, RealLock
from sim.live.real_time import Delays, RealTime
from sim.resource import CommandSlots
from tests.build.loops import LOOPS, run

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000
BOOT_NS = 12_345 * SECOND
"""What perf_counter_ns() says when a test begins."""


class Kernel:
    """Tells the time, and keeps what the timerfd was set to."""

    def __init__(self) -> None:
        self.now = BOOT_NS
        self.set: list[int] = []
        """Since time 0, in the order in which it was said."""

    def settime(self, _: int, at_ns: int) -> None:
        self.set.append(at_ns - BOOT_NS)


@contextlib.contextmanager
def kernel() -> Any:
    made = Kernel()
    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(**vars(time) | {"perf_counter_ns": lambda: made.now})
        patch.setattr(live_clock, "time", fake)
        patch.setattr(live_clock, "_set", made.settime)
        yield made


def on_fake_time(work: Callable[[Kernel, RealTime], Coroutine[Any, Any, None]]) -> None:
    """Run it where the time is what the test makes it."""

    async def main() -> None:
        with kernel() as made:
            real = RealTime()
            use(real)
            await work(made, real)
            real.close()

    run(main)


async def turns() -> None:
    """Let all that is ready run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def let_fire(made: Kernel, real: RealTime, task: asyncio.Task[Any], late_ns: Callable[[], int]) -> None:
    """Each timer that is waited for fires so late, until the task is done; one that is set to what is past, at once."""
    await turns()
    while not task.done():
        if real._timers:
            due = BOOT_NS + real._timers[0][0]
            made.now = due + late_ns() if due > made.now else made.now
            real._fire()
        await turns()
    await task


# --- deadlines --------------------------------------------------------------------------------------------------------

DELAYS = st.lists(st.integers(1, 2 * MS), min_size=1, max_size=12)
LATENESSES = st.lists(st.one_of(st.integers(0, 200 * US), st.integers(0, 5 * MS)), min_size=12, max_size=12)


@given(DELAYS, LATENESSES)
def test_who_sleeps_again_and_again_has_the_deadlines_of_a_clock_that_is_never_late(
    delays: list[int], lateness: list[int]
) -> None:
    woken: list[int] = []

    async def work(made: Kernel, real: RealTime) -> None:
        late = iter(lateness)

        async def sleeper() -> None:
            for delay in delays:
                await sleep_ns(delay)
                woken.append(now_ns())

        await let_fire(made, real, asyncio.create_task(sleeper()), lambda: next(late))
        due = np.cumsum(delays).tolist()
        assert set(made.set) <= set(due)  # whatever was set is what it would have been if nobody were late
        assert all(at >= deadline for at, deadline in zip(woken, due, strict=True))
        # and at the end no more is missing than the last timer was late
        fired = len(made.set)
        assert woken[-1] - due[-1] <= max(lateness[:fired])

    on_fake_time(work)


def test_what_one_task_is_late_is_not_taken_off_another_ones_sleep() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        async def late() -> None:
            await sleep_ns(1 * MS)
            await asyncio.create_task(fresh())
            await sleep_ns(1 * MS)

        async def fresh() -> None:
            await sleep_ns(10 * MS)

        await let_fire(made, real, asyncio.create_task(late()), lambda: 100 * US)
        assert made.set[:2] == [1 * MS, 11 * MS + 100 * US]

    on_fake_time(work)


def test_a_task_that_is_far_behind_lets_the_others_run() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        ran = 0

        async def other() -> None:
            nonlocal ran
            while True:
                ran += 1
                await asyncio.sleep(0)

        async def behind() -> None:
            await sleep_ns(1)
            beside = asyncio.create_task(other())
            for _ in range(30):  # all of them past
                await sleep_ns(1 * MS)
            beside.cancel()

        await let_fire(made, real, asyncio.create_task(behind()), lambda: SECOND)
        assert ran >= 30
        assert made.set == [1]

    on_fake_time(work)


def test_a_sleep_of_nothing_is_over_when_all_that_is_ready_has_run() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        ran: list[str] = []
        asyncio.get_running_loop().call_soon(ran.append, "ready")
        await sleep_ns(0)
        assert ran == ["ready"]
        assert made.set == []

    on_fake_time(work)


def test_the_timer_is_set_to_the_next_deadline_whatever_order_they_come_in() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        fired: list[str] = []
        real.call_at_ns(30, fired.append, "c")
        real.call_at_ns(10, fired.append, "a")
        real.call_at_ns(20, fired.append, "b")
        real.call_at_ns(10, fired.append, "a again")
        assert made.set == [30, 10]
        made.now = BOOT_NS + 10
        real._fire()
        assert fired == ["a", "a again"]
        assert made.set == [30, 10, 20]
        made.now = BOOT_NS + 50
        real._fire()
        assert fired == ["a", "a again", "b", "c"]

    on_fake_time(work)


def test_a_timer_that_was_cancelled_does_not_fire_and_is_not_counted() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        fired: list[str] = []
        real.call_at_ns(10, fired.append, "a").cancel()
        real.call_at_ns(10, fired.append, "b")
        made.now = BOOT_NS + 12
        real._fire()
        assert fired == ["b"]
        assert real.delays() == Delays(1, 10, 2, 2, 2)

    on_fake_time(work)


def test_a_sleep_that_is_cancelled_leaves_the_others_alone() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        given_up = asyncio.create_task(sleep_ns(10))
        other = asyncio.create_task(sleep_ns(20))
        await turns()
        given_up.cancel()
        await let_fire(made, real, other, lambda: 5)
        assert given_up.cancelled()

    on_fake_time(work)


def test_a_callback_that_fails_keeps_no_other_timer_from_firing() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        fired: list[str] = []
        real.call_at_ns(10, fail)
        real.call_at_ns(10, fired.append, "same moment")
        real.call_at_ns(20, fired.append, "later")
        made.now = BOOT_NS + 10
        with pytest.raises(ZeroDivisionError):
            real._fire()
        await asyncio.sleep(0)  # the other one is due: the loop's next turn fires it
        assert (fired, made.set) == (["same moment"], [10, 20])
        made.now = BOOT_NS + 20
        real._fire()
        assert fired == ["same moment", "later"]

    on_fake_time(work)


@given(st.lists(st.tuples(st.integers(1, MS), st.integers(0, MS)), min_size=1, max_size=200))
def test_delays_tell_what_was_asked_for_and_how_late_it_was(timers: list[tuple[int, int]]) -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        assert real.delays() == Delays(0, 0, 0, 0, 0)
        for asked, late in timers:
            real.call_at_ns(now_ns() + asked, lambda: None)
            made.now += asked + late
            real._fire()
        delays = real.delays()
        late = sorted(late for _, late in timers)
        assert (delays.count, delays.asked_ns) == (len(timers), sum(asked for asked, _ in timers))
        assert delays.late_median_ns == int(statistics.median(late))
        assert delays.late_max_ns == late[-1]
        assert delays.late_median_ns <= delays.late_p99_ns <= delays.late_max_ns

    on_fake_time(work)


def test_after_close_nothing_fires_and_nothing_is_set() -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        real.close()
        real.call_at_ns(10, pytest.fail)
        assert made.set == []
        real.close()

    on_fake_time(work)


# --- engines on real time ---------------------------------------------------------------------------------------------


@given(DELAYS, LATENESSES)
def test_commands_one_after_the_other_do_not_drift(service: list[int], lateness: list[int]) -> None:
    async def work(made: Kernel, real: RealTime) -> None:
        late = iter(lateness)
        engines = CommandSlots(1)

        async def commands() -> None:
            for each in service:
                await engines.run(each)

        await let_fire(made, real, asyncio.create_task(commands()), lambda: next(late, 0))
        ends = made.now - BOOT_NS
        assert sum(service) <= ends <= sum(service) + max(lateness[: len(service)])

    on_fake_time(work)


def test_commands_that_share_engines_end_when_they_would_in_virtual_time() -> None:
    async def shared(service: list[int]) -> list[int]:
        engines, ends = CommandSlots(1.5), []

        async def command(ns: int) -> None:
            await engines.run(ns)
            ends.append(now_ns())

        async with asyncio.TaskGroup() as group:
            for each in service:
                group.create_task(command(each))
        return ends

    expected = virtual.run(shared([1 * MS, 2 * MS, 3 * MS]))

    async def work(made: Kernel, real: RealTime) -> None:
        task = asyncio.create_task(shared([1 * MS, 2 * MS, 3 * MS]))
        await let_fire(made, real, task, lambda: 0)
        assert task.result() == expected

    on_fake_time(work)


@pytest.mark.parametrize("loop", LOOPS)
def test_on_the_real_clock_nobody_wakes_early(loop: str) -> None:
    async def main() -> None:
        real = RealTime()
        use(real)

        async def sleeper(delay: int) -> None:
            start_ns = now_ns()
            for at in range(1, 21):
                await sleep_ns(delay)
                assert now_ns() >= start_ns + at * delay

        async with asyncio.TaskGroup() as group:
            for delay in (1, 50 * US, 250 * US, 1 * MS):
                group.create_task(sleeper(delay))
        assert real.delays().count > 0
        real.close()

    run(main, loop)


# --- locks ------------------------------------------------------------------------------------------------------------


def with_locks(work: Callable[[RealLock], Coroutine[Any, Any, None]], loop: str = "uvloop") -> None:
    async def main() -> None:
        real = RealTime()
        use(real)
        caused_by(NO_CAUSE)
        await work(RealLock(Timeline(real.now_ns)))
        real.close()

    run(main, loop)


def free(lock: RealLock) -> bool:
    """Whether it can be had; it is let go of again."""

    def granted() -> None:
        pytest.fail("nobody lets go of it meanwhile")

    if lock.mutex.take(granted):
        lock.mutex.release()
        return True
    lock.mutex.give_up(granted)
    return False


@pytest.mark.parametrize("loop", LOOPS)
def test_tasks_have_a_lock_one_at_a_time_and_in_turn(loop: str) -> None:
    async def work(lock: RealLock) -> None:
        order: list[int] = []
        inside = 0

        async def user(number: int) -> None:
            nonlocal inside
            async with lock:
                inside += 1
                assert inside == 1
                order.append(number)
                await turns()
                inside -= 1

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(user(number))
        assert order == list(range(20))
        assert free(lock)

    with_locks(work, loop)


def test_threads_and_tasks_exclude_each_other() -> None:
    async def work(lock: RealLock) -> None:
        inside: list[object] = []
        overlaps = 0

        def enter(who: object) -> None:
            nonlocal overlaps
            overlaps += bool(inside)
            inside.append(who)

        def in_thread() -> None:
            for _ in range(200):
                with lock.mutex:
                    enter(threading.current_thread())
                    inside.pop()

        async def in_loop() -> None:
            for _ in range(50):
                async with lock:
                    enter("loop")
                    await asyncio.sleep(0)
                    inside.pop()

        threads = [threading.Thread(target=in_thread) for _ in range(4)]
        for thread in threads:
            thread.start()
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(in_loop())
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert overlaps == 0
        assert free(lock)

    with_locks(work)


def test_a_thread_that_takes_it_again_and_again_lets_who_waits_have_it_in_between() -> None:
    """As in virtual time, it is first come, first served: a call is not kept out by a copy of many pieces."""

    async def work(lock: RealLock) -> None:
        waits, stop = threading.Event(), threading.Event()
        takes = 0

        def copies() -> None:
            nonlocal takes
            while not stop.is_set():
                with lock.mutex:
                    waits.wait()
                    takes += 1

        thread = threading.Thread(target=copies)
        thread.start()
        while not lock.mutex._held:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(lock.__aenter__())
        await turns()
        waits.set()
        await waiting
        assert takes == 1
        stop.set()
        await lock.__aexit__()
        await asyncio.to_thread(thread.join)

    with_locks(work)


def test_who_is_cancelled_while_waiting_leaves_the_lock_to_others() -> None:
    async def work(lock: RealLock) -> None:
        async def user() -> None:
            async with lock:
                pass

        await lock.__aenter__()
        waiting = [asyncio.create_task(user()) for _ in range(3)]
        await turns()
        waiting[1].cancel()
        await turns()
        await lock.__aexit__()
        assert await asyncio.gather(*waiting, return_exceptions=True) != [None, None, None]
        assert [task.cancelled() for task in waiting] == [False, True, False]
        assert free(lock)

    with_locks(work)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("by", ["a task", "a thread"])
def test_who_is_cancelled_when_it_was_granted_already_lets_go_of_it(by: str, turn: int) -> None:
    async def work(lock: RealLock) -> None:
        async def user() -> None:
            async with lock:
                await turns()

        lock.mutex.take(lambda: None)
        waiting = asyncio.create_task(user())
        await turns()
        if by == "a task":
            lock.mutex.release()  # it is granted, but the task does not know yet
        else:
            thread = threading.Thread(target=lock.mutex.release)
            thread.start()
            thread.join()
        for _ in range(turn):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await turns()
        assert free(lock)

    with_locks(work)


def test_cancelled_anywhere_among_many_the_lock_is_neither_lost_nor_had_twice() -> None:
    async def work(lock: RealLock) -> None:
        rng = np.random.default_rng(1)
        inside = 0

        async def user() -> None:
            nonlocal inside
            async with lock:
                inside += 1
                assert inside == 1
                try:
                    await asyncio.sleep(0)
                finally:
                    inside -= 1

        for _ in range(200):
            users = [asyncio.create_task(user()) for _ in range(5)]
            for at in rng.integers(5, size=3).tolist():
                for _ in range(int(rng.integers(6))):
                    await asyncio.sleep(0)
                users[at].cancel()
            await asyncio.gather(*users, return_exceptions=True)
            await turns()
            assert inside == 0
            assert free(lock)

    with_locks(work)


def test_a_mutex_is_handed_to_threads_in_turn() -> None:
    mutex, order = Mutex(), []
    entered = [threading.Event() for _ in range(5)]

    def user(number: int) -> None:
        entered[number].set()
        with mutex:
            order.append(number)

    mutex.take(lambda: None)
    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=user, args=(number,)))
        threads[-1].start()
        entered[number].wait()
        while len(mutex._queue) <= number:
            pass
    mutex.release()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]
