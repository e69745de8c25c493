# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual clock: order, exact time, repeatable runs, reports of deadlocks, errors that are not lost, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from proto_v3.errors import ProtoV3Error
from sim.clock.port import ClockError, LoopStateError, now_ns, sleep_ns, sleep_until_ns
from sim.clock.stuck import DeadlockError, TimeLimitError
from sim.clock.virtual import RealIOError, VirtualLoop, run

SECOND = 1_000_000_000
DAY = 86_400 * SECOND


@pytest.fixture(autouse=True)
def no_noise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """No test may leave a warning, a log record or output behind, also when the garbage is collected after it."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert unraisable == []
    assert caplog.get_records("call") + caplog.records == []
    assert capfd.readouterr() == ("", "")


def here() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def start(
    coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: contextvars.Context | None = None
) -> asyncio.Task[Any]:
    """asyncio.create_task; the loop keeps the task until it is done, so the tests may drop it."""
    return asyncio.create_task(coro, name=name, context=context)


# Time.


def test_time_starts_at_zero_and_jumps_to_the_next_timer() -> None:
    async def main() -> list[int]:
        seen = [now_ns()]
        await asyncio.sleep(86_400 * 365)
        seen.append(now_ns())
        await sleep_ns(1)
        seen.append(now_ns())
        await sleep_until_ns(400 * DAY)
        return [*seen, here()._now_ns]

    assert run(main()) == [0, 365 * DAY, 365 * DAY + 1, 400 * DAY]


@pytest.mark.slow
def test_a_million_sleeps_of_one_nanosecond_late_in_a_run() -> None:
    async def main() -> int:
        await sleep_ns(300 * DAY)
        for _ in range(1_000_000):
            await sleep_ns(1)
        return now_ns()

    assert run(main()) == 300 * DAY + 1_000_000


def test_asyncio_sleep_adds_up_exactly_however_late() -> None:
    async def main() -> int:
        await sleep_ns(300 * DAY + 3)
        for _ in range(1000):
            await asyncio.sleep(0.1)
            await asyncio.sleep(1e-9)
        await asyncio.sleep(10**16 + 1)  # a float would lose the one
        return now_ns()

    assert run(main()) == 300 * DAY + 3 + 100 * SECOND + 1000 + (10**16 + 1) * SECOND


@pytest.mark.parametrize("start", [0, 1, 12_345_678_901, DAY + 7, 2**21 * SECOND - 3 * SECOND - 1])
@pytest.mark.parametrize("delay", [1, 999, 123_456_789, SECOND, SECOND + 1])
def test_float_deadlines_are_exact_for_the_documented_span(start: int, delay: int) -> None:
    async def main() -> int:
        await sleep_until_ns(start)
        done = asyncio.Event()
        here().call_at(here().time() + delay / SECOND, done.set)
        await done.wait()
        return now_ns()

    assert run(main()) == start + delay


def test_time_in_seconds_is_the_nearest_float() -> None:
    async def main() -> None:
        generator = random.Random(1)
        for _ in range(1000):
            await sleep_ns(generator.randrange(DAY))
            assert here().time() == float(Fraction(now_ns(), SECOND))

    run(main())


@pytest.mark.parametrize(("until", "error"), [(2**21 * SECOND, 0), (365 * DAY, 6)])
def test_float_deadlines_are_as_good_as_documented(until: int, error: int) -> None:
    generator = random.Random(until)
    worst = 0
    for _ in range(10_000):
        loop = VirtualLoop()
        loop._now_ns = generator.randrange(until)
        deadline = loop._now_ns + generator.randrange(min(until - loop._now_ns, 10 ** generator.randrange(1, 16)))
        handle = loop.call_at(loop.time() + (deadline - loop._now_ns) / SECOND, print)
        worst = max(worst, abs(handle.when_ns - deadline))
    assert worst <= error


def test_a_timeout_is_off_by_a_few_nanoseconds_after_that() -> None:
    async def main() -> int:
        await sleep_until_ns(300 * DAY + 1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.Event().wait()
        return now_ns()

    assert abs(run(main()) - (300 * DAY + 1 + SECOND)) <= 6


def test_float_times_in_the_past_fire_now_and_infinite_ones_never() -> None:
    async def main() -> list[str]:
        await sleep_ns(10)
        seen: list[str] = []
        here().call_later(-1, seen.append, "later")
        here().call_at(0, seen.append, "at")
        here().call_later(float("-inf"), seen.append, "minus infinity")
        here().call_later(float("inf"), seen.append, "never")
        await sleep_ns(0)
        assert now_ns() == 10
        return seen

    assert run(main()) == ["later", "at", "minus infinity"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: sleep_ns(-1), ValueError),
        (lambda: sleep_until_ns(9), ValueError),
        (lambda: sleep_ns(1.0), TypeError),  # type: ignore[arg-type]
        (lambda: asyncio.sleep(float("nan")), ValueError),
    ],
)
def test_bad_sleeps_are_errors(call: Callable[[], Awaitable[None]], error: type[Exception]) -> None:
    async def main() -> None:
        await sleep_ns(10)
        with pytest.raises(error):
            await call()
        assert now_ns() == 10

    run(main())


def test_bad_times_of_callbacks_are_errors() -> None:
    async def main() -> None:
        await sleep_ns(10)
        with pytest.raises(ValueError, match="9 ns is past: it is 10 ns"):
            here().call_at_ns(9, print)
        with pytest.raises(ValueError, match="9 ns is past"):
            here().call_later_ns(-1, print)
        with pytest.raises(TypeError):
            here().call_at_ns(11.0, print)  # type: ignore[arg-type]

    run(main())


# Order.


def test_equal_deadlines_fire_in_the_order_in_which_they_were_set() -> None:
    seen: list[str] = []

    async def sleeper(name: str, sleep: Coroutine[Any, Any, None]) -> None:
        await sleep
        seen.append(name)

    async def main() -> None:
        loop = here()
        loop.call_at_ns(1000, seen.append, "0 at_ns")
        tasks = [start(sleeper("1 sleep_ns", sleep_ns(1000)))]
        await asyncio.sleep(0)
        loop.call_later(1e-6, seen.append, "2 later")
        tasks.append(start(sleeper("3 asyncio.sleep", asyncio.sleep(1e-6))))
        await asyncio.sleep(0)
        loop.call_at(1e-6, seen.append, "4 at")
        tasks.append(start(sleeper("5 sleep_until_ns", sleep_until_ns(1000))))
        await asyncio.sleep(0)
        await sleep_ns(400)
        loop.call_later_ns(600, seen.append, "6 later_ns")
        tasks.append(start(sleeper("7 asyncio.sleep", asyncio.sleep(6e-7))))
        await asyncio.gather(*tasks)
        assert now_ns() == 1000

    run(main())
    assert [int(name.split()[0]) for name in seen] == list(range(8))


def test_ready_callbacks_run_before_timers_that_are_due() -> None:
    seen: list[int] = []

    def first() -> None:
        seen.append(1)
        here().call_soon(seen.append, 2)

    async def main() -> None:
        loop = here()
        loop.call_later_ns(0, seen.append, 3)
        loop.call_soon(first)
        await sleep_ns(0)

    run(main())
    assert seen == [1, 2, 3]


def test_what_a_timer_sets_off_is_over_before_the_next_of_the_same_instant() -> None:
    seen: list[str] = []

    def first() -> None:
        here().call_soon(seen.append, "caused by first")

    async def main() -> None:
        here().call_later_ns(5, first)
        here().call_later_ns(5, seen.append, "second")
        await sleep_ns(5)

    run(main())
    assert seen == ["caused by first", "second"]


def test_cancelled_timers_do_not_fire_nor_move_time() -> None:
    seen: list[int] = []

    async def main() -> int:
        loop = here()
        soon, later = loop.call_soon(seen.append, 1), loop.call_later(5, seen.append, 2)
        assert later.when_ns == 5 * SECOND
        assert not later.cancelled()
        soon.cancel()
        later.cancel()
        assert later.cancelled()
        sleeper = start(sleep_ns(7 * SECOND))
        await sleep_ns(1)
        sleeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeper
        await asyncio.Event().wait()
        return now_ns()

    with pytest.raises(DeadlockError, match="at 1 ns"):
        run(main())
    assert seen == []


def test_cancelled_timers_are_dropped_long_before_they_are_due() -> None:
    async def main() -> int:
        for _ in range(20_000):
            async with asyncio.timeout(3600):
                await sleep_ns(1)
        return len(here()._timers)

    assert run(main()) < 3000


# The same run every time.

PROGRAM = """
import asyncio, hashlib, random
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run

ballast = []

async def main():
    trace = []

    async def child(number):
        try:
            await sleep_ns(number * 7 % 5)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            trace.append(("cancelled", asyncio.current_task().get_name(), now_ns()))
            raise

    async def breaker():
        await sleep_ns(50)
        raise ValueError

    for size in (3, 20, 100):
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(size):
                    group.create_task(child(number))
                group.create_task(breaker())
        except* ValueError:
            trace.append("group over")

    loop = asyncio.get_running_loop()
    futures = []
    for _ in range(50):
        futures.append(loop.create_future())
        # Some more of the same size, so that no two runs have theirs at addresses that are alike.
        ballast.extend(type(futures[0])(loop=loop) for _ in range(random.SystemRandom().randrange(5)))

    def resolve(numbers):
        for number in numbers:
            futures[number].set_result(number)

    for first in range(7):
        loop.call_later_ns(first * 3 % 7, resolve, range(first, 50, 7))
    pending = set(futures)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        trace.append(("futures", [future.result() for future in done]))

    async def wait(number):
        await events[number % 4].wait()
        return number

    events = [asyncio.Event() for _ in range(4)]
    for number, event in enumerate(events):
        loop.call_later_ns(number, event.set)
    tasks = {asyncio.create_task(wait(number)) for number in range(40)}
    while tasks:
        done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        trace.append(("tasks", [(task.result(), task.get_name()) for task in done]))
    trace.append(sorted(task.get_name() for task in asyncio.all_tasks()))
    return trace

def digest():
    return hashlib.sha256(repr(run(main())).encode()).hexdigest()
"""


def test_two_runs_in_one_process_and_in_two_processes_give_one_trace() -> None:
    program = types.ModuleType("program")
    exec(PROGRAM, program.__dict__)
    digests = {program.digest() for _ in range(3)}
    root = Path(__file__).resolve().parents[2]
    for seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", f"{PROGRAM}\nprint(digest())"]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        digests.add(output.stdout.strip())
    assert len(digests) == 1


def test_a_set_of_futures_iterates_in_the_order_of_numbers() -> None:
    async def main() -> None:
        futures = [here().create_future() for _ in range(8)]
        for number, future in enumerate(futures):
            future.set_result(number)
        assert len({hash(future) for future in futures}) == 8
        assert [hash(future) for future in futures] == sorted(hash(future) for future in futures)
        assert hash(futures[0]) == hash(futures[0])

    run(main())


def test_default_task_names_count_from_one_in_each_loop() -> None:
    async def main() -> list[str]:
        tasks = [start(sleep_ns(1)), start(sleep_ns(1), name="named")]
        async with asyncio.TaskGroup() as group:
            tasks.append(group.create_task(sleep_ns(1)))
        return [task.get_name() for task in tasks]

    first = run(main())
    assert first == ["Task-2", "named", "Task-4"]
    assert run(main()) == first


def test_what_is_left_over_is_cancelled_in_the_order_of_creation() -> None:
    seen: list[int] = []

    async def child(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await sleep_ns(1)  # its end is waited for
            seen.append(number)

    async def main() -> None:
        tasks = [start(child(number)) for number in range(500)]
        await sleep_ns(1)
        del tasks[::2]

    run(main())
    assert seen == list(range(500))


# asyncio as it is.


def test_asyncio_primitives_work_in_virtual_time() -> None:
    async def main() -> list[Any]:
        seen: list[Any] = []
        queue: asyncio.Queue[int] = asyncio.Queue(2)
        lock, semaphore, condition, event = asyncio.Lock(), asyncio.Semaphore(2), asyncio.Condition(), asyncio.Event()

        async def produce() -> None:
            for item in range(4):
                await queue.put(item)
                await asyncio.sleep(1)

        async def consume() -> None:
            for _ in range(4):
                seen.append((await queue.get(), here().time()))
                await asyncio.sleep(2)
            event.set()

        async def guarded(name: str) -> None:
            async with semaphore, lock:
                await asyncio.sleep(1)
            await event.wait()
            async with condition:
                await condition.wait()
                seen.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            group.create_task(consume())
            for name in "abc":
                group.create_task(guarded(name))
            await event.wait()
            await asyncio.sleep(0)
            async with condition:
                condition.notify_all()
        seen.append(await asyncio.gather(asyncio.sleep(1, "x"), asyncio.sleep(2, "y")))
        seen.append(await asyncio.shield(asyncio.sleep(1, "shielded")))
        seen.append(
            [await first for first in asyncio.as_completed([asyncio.sleep(3, "late"), asyncio.sleep(1, "early")])]
        )
        return [*seen, here().time()]

    assert run(main()) == [
        (0, 0.0),
        (1, 2.0),
        (2, 4.0),
        (3, 6.0),
        "a",
        "b",
        "c",
        ["x", "y"],
        "shielded",
        ["early", "late"],
        14.0,
    ]


def test_timeout_and_wait_for() -> None:
    async def main() -> list[int]:
        times = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await asyncio.Event().wait()
        times.append(now_ns())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.25)
        times.append(now_ns())
        assert await asyncio.wait_for(asyncio.sleep(1, "in time"), 1.5) == "in time"
        times.append(now_ns())
        async with asyncio.timeout(2) as timeout:
            timeout.reschedule(here().time() + 10)
            await asyncio.sleep(5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        return [*times, now_ns()]

    assert run(main()) == [1_500_000_000, 1_750_000_000, 2_750_000_000, 7_750_000_000]


def test_context_variables_are_those_of_the_task_and_of_the_callback() -> None:
    variable = contextvars.ContextVar("variable", default="outside")

    async def child(value: str) -> str:
        variable.set(value)
        await sleep_ns(1)
        await asyncio.sleep(0)
        return variable.get()

    async def main() -> list[str]:
        seen = [*await asyncio.gather(child("a"), child("b"))]
        variable.set("main")
        here().call_soon(lambda: seen.append(variable.get()))
        here().call_later_ns(1, lambda: seen.append(variable.get()))
        empty = contextvars.Context()
        here().call_soon(lambda: seen.append(variable.get()), context=empty)
        here().call_later(1e-9, lambda: seen.append(variable.get()), context=empty)
        variable.set("main, later")
        await start(sleep_ns(2), context=empty)
        return [*seen, variable.get()]

    assert run(main()) == ["a", "b", "main", "outside", "main", "outside", "main, later"]


# Deadlock.


def test_deadlock_names_every_waiting_task_and_its_place() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue()

    async def pump() -> None:
        await queue.get()

    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        await asyncio.Event().wait()

    async def iterate() -> None:
        async for _ in numbers():
            pass

    class Forever:
        def __await__(self) -> Generator[Any, None, None]:
            yield from asyncio.get_running_loop().create_future()

    async def custom() -> None:
        await Forever()

    async def for_ever() -> None:
        await asyncio.sleep(float("inf"))

    async def main() -> None:
        for function in (pump, iterate, custom, for_ever):
            reader = start(function(), name=function.__name__)
        start(asyncio.sleep(1), name="done by then")
        await reader

    with pytest.raises(DeadlockError) as caught:
        run(main(), name="the main task")
    waiting = {task.name: task for task in caught.value.waiting}
    assert list(waiting) == ["the main task", "pump", "iterate", "custom", "for_ever"]
    functions = {name: [place.function.split(".")[-1] for place in task.places] for name, task in waiting.items()}
    assert functions == {
        "the main task": ["main"],
        "pump": ["get", "pump"],
        "iterate": ["wait", "numbers", "iterate"],
        "custom": ["__await__", "custom"],
        "for_ever": ["sleep", "for_ever"],
    }
    assert waiting["the main task"].awaits == "for_ever"
    assert waiting["pump"].awaits is None
    place = waiting["pump"].places[1]
    assert (place.file, place.line) == (__file__, pump.__code__.co_firstlineno + 1)
    line = next(line for line in str(caught.value).splitlines() if line.startswith("  pump"))
    assert line.startswith("  pump waits in Queue.get (asyncio/queues.py:")
    assert line.endswith(f"pump (sim/test_clock.py:{place.line})")
    assert ", called from " in line
    assert str(caught.value).startswith(f"nothing can happen any more at {SECOND} ns\n")
    assert "for task for_ever" in str(caught.value)


def test_after_a_deadlock_the_tasks_have_ended() -> None:
    seen: list[str] = []

    async def child() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await sleep_ns(1)
            seen.append(f"child at {now_ns()}")

    async def main() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
        finally:
            seen.append("main")

    with pytest.raises(DeadlockError):
        run(main())
    assert seen == ["child at 1", "main"]


def test_a_callback_runs_once_when_nothing_else_can_happen() -> None:
    seen: list[int] = []

    async def main() -> None:
        event = asyncio.Event()

        def stuck() -> None:
            seen.append(now_ns())
            event.set()

        loop: Any = asyncio.get_running_loop()
        loop.call_when_stuck(stuck)
        await sleep_ns(SECOND)
        await event.wait()
        await sleep_ns(1)
        event.clear()
        await event.wait()

    with pytest.raises(DeadlockError, match=f"at {SECOND + 1} ns"):
        run(main())
    assert seen == [SECOND]


def test_a_task_that_will_not_end_is_closed_and_reported() -> None:
    seen: list[str] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("closed")

    async def main() -> str:
        start(stubborn(), name="stubborn")
        await sleep_ns(1)
        return "fine"

    with pytest.raises(DeadlockError) as caught:
        run(main())
    assert "stubborn" in [task.name for task in caught.value.waiting]
    assert seen == ["closed"]


def test_closing_a_loop_with_unfinished_tasks_leaves_no_noise() -> None:
    async def child() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(sleep_ns(1000))
                await sleep_ns(1000)  # closed here, the group waits for its task
        finally:
            try:
                await sleep_ns(1)
            finally:
                await sleep_ns(1)

    async def main() -> None:
        start(child())
        await sleep_ns(1)
        start(child())  # never started

    loop = VirtualLoop()
    loop.run_until_complete(main())
    loop.close()
    assert asyncio.all_tasks(loop) != set()  # they are still pending, and no one complains


# Errors.


async def fail(error: BaseException, delay_ns: int = 0) -> None:
    await sleep_ns(delay_ns)
    raise error


def test_an_exception_of_main_is_raised_as_it_is() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        run(fail(error))
    assert caught.value is error
    assert not hasattr(error, "__notes__")


def test_exceptions_of_background_tasks_are_raised_at_the_end() -> None:
    async def main(tasks: list[asyncio.Task[None]]) -> None:
        tasks.append(start(fail(ValueError("second"), 20), name="kept"))
        start(fail(KeyError("first"), 10), name="dropped")
        await sleep_ns(30)
        gc.collect()

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(ExceptionGroup) as caught:
        run(main(tasks))
    assert [type(error) for error in caught.value.exceptions] == [KeyError, ValueError]
    assert [error.__notes__ for error in caught.value.exceptions] == [
        [f"Raised in task '{name}', from which no one has retrieved it."] for name in ("dropped", "kept")
    ]


def test_exceptions_that_someone_has_retrieved_are_not_raised_again() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="awaited"):
            await start(fail(ValueError("awaited")))
        task = start(fail(ValueError("looked at")))
        await asyncio.wait([task])
        assert isinstance(task.exception(), ValueError)
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail(ValueError("grouped")))
        await asyncio.gather(fail(ValueError("gathered")), return_exceptions=True)

    run(main())


def test_lost_exceptions_come_together_with_that_of_main() -> None:
    async def main() -> None:
        start(fail(KeyError("background")))
        await sleep_ns(1)
        raise ValueError("main")

    with pytest.raises(ExceptionGroup) as caught:
        run(main())
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]


def test_lost_exceptions_come_together_with_a_deadlock() -> None:
    async def main() -> None:
        start(fail(KeyError("the cause")))
        await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        run(main())
    assert [type(error) for error in caught.value.exceptions] == [DeadlockError, KeyError]


def test_exceptions_of_tasks_that_fail_while_being_cancelled_are_raised() -> None:
    async def child() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("in cleanup")

    async def main() -> None:
        start(child())
        await sleep_ns(1)

    with pytest.raises(ExceptionGroup) as caught:
        run(main())
    assert [str(error) for error in caught.value.exceptions] == ["in cleanup"]


def test_an_error_of_a_future_that_dies_unread_is_raised() -> None:
    async def main() -> None:
        here().create_future().set_exception(ValueError("unread"))

    with pytest.raises(ExceptionGroup) as caught:
        run(main())
    assert [str(error) for error in caught.value.exceptions] == ["unread"]


@pytest.mark.parametrize("method", ["call_soon", "call_later"])
def test_an_exception_in_a_callback_ends_the_run(method: str) -> None:
    seen: list[str] = []

    def callback(*_: object) -> None:
        raise ValueError("in a callback")

    async def main() -> None:
        try:
            getattr(here(), method)(*([callback] if method == "call_soon" else [1, callback]))
            await asyncio.sleep(10)
            seen.append("not reached")
        finally:
            seen.append(f"cancelled at {here().time()}")

    with pytest.raises(ValueError, match="in a callback"):
        run(main())
    assert seen == [f"cancelled at {0.0 if method == 'call_soon' else 1.0}"]


def test_a_callback_that_fails_in_the_instant_of_mains_end() -> None:
    """The end of main is then known, but not yet acted upon; the cleanup must not mistake it for its own."""

    def callback() -> None:
        raise ValueError("in a callback")

    async def child() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await sleep_ns(5)
            seen.append(now_ns())

    async def main() -> None:
        start(child())
        await sleep_ns(1)
        here().call_soon(callback)

    seen: list[int] = []
    with pytest.raises(ValueError, match="in a callback"):
        run(main())
    assert seen == [6]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("in_main", [True, False])
def test_interrupts_go_out_as_they_are(kind: type[BaseException], in_main: bool) -> None:
    error = kind()
    seen: list[str] = []

    async def child() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("child ended")

    async def main() -> None:
        start(child())
        start(fail(ValueError("also")))
        await sleep_ns(1)
        if in_main:
            raise error
        start(fail(error))
        await asyncio.Event().wait()

    with pytest.raises(kind) as caught:
        run(main())
    assert caught.value is error
    assert error.__notes__ == ["Another error of the run: ValueError('also')"]
    assert seen == ["child ended"]


def test_a_signal_interrupts_a_run_that_would_not_end() -> None:
    async def main() -> None:
        signal.raise_signal(signal.SIGINT)
        while True:
            await sleep_ns(1)

    with pytest.raises(KeyboardInterrupt):
        run(main())


def test_a_callback_cut_off_by_an_interrupt_leaves_a_task_behind_without_noise() -> None:
    """What a signal does when it arrives while the loop has a callback in hand."""

    async def child(event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> None:
        event = asyncio.Event()
        start(child(event))
        await sleep_ns(1)
        here().call_soon(interrupt, here())
        event.set()
        await sleep_ns(10)

    def interrupt(loop: VirtualLoop) -> None:
        loop._ready.popleft()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(main())
    assert not hasattr(caught.value, "__notes__")


def test_a_cancelled_main_raises_cancelled_error() -> None:
    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await sleep_ns(1)

    with pytest.raises(asyncio.CancelledError):
        run(main())


# Limits.


def test_the_limit_ends_an_endless_poll_loop() -> None:
    async def poll() -> None:
        while True:
            await sleep_ns(10)

    async def main() -> None:
        await start(poll(), name="poller")

    with pytest.raises(TimeLimitError, match="due at 1010 ns, past the limit of 1005 ns") as caught:
        run(main(), limit_ns=1005)
    assert [task.name for task in caught.value.waiting] == ["main", "poller"]


def test_a_timer_at_the_limit_fires() -> None:
    assert run(asyncio.sleep(1e-6, "result"), limit_ns=1000) == "result"


def test_a_cancelled_timer_past_the_limit_does_not_count() -> None:
    async def main() -> None:
        here().call_later(1, print).cancel()
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError):
        run(main(), limit_ns=10)


@pytest.mark.parametrize("sleep", [asyncio.sleep, sleep_ns])
def test_callbacks_without_end_at_one_instant_are_ended(
    monkeypatch: pytest.MonkeyPatch, sleep: Callable[[int], Awaitable[None]]
) -> None:
    async def main() -> None:
        await sleep_ns(7)
        while True:
            await sleep(0)

    monkeypatch.setattr(VirtualLoop, "max_callbacks_per_instant", 1000)
    with pytest.raises(TimeLimitError, match="at 7 ns"):
        run(main())


def test_many_callbacks_while_time_goes_on_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        for _ in range(5000):
            await sleep_ns(1)
        return now_ns()

    monkeypatch.setattr(VirtualLoop, "max_callbacks_per_instant", 1000)
    assert run(main()) == 5000


# What is refused.

REFUSED: dict[str, Callable[[], Awaitable[Any]]] = {
    "run_in_executor": lambda: asyncio.to_thread(print),
    "getaddrinfo": lambda: here().getaddrinfo("localhost", 1),
    "create_connection": lambda: asyncio.open_connection("localhost", 1),
    "create_server": lambda: asyncio.start_server(print, "localhost", 1),
    "create_unix_connection": lambda: asyncio.open_unix_connection("/nowhere"),
    "create_datagram_endpoint": lambda: here().create_datagram_endpoint(asyncio.DatagramProtocol),
    "sock_recv": lambda: here().sock_recv(socket.socket(), 1),
    "subprocess_exec": lambda: asyncio.create_subprocess_exec("true"),
    "subprocess_shell": lambda: asyncio.create_subprocess_shell("true"),
    "connect_read_pipe": lambda: here().connect_read_pipe(asyncio.Protocol, sys.stdin),
    "add_reader": lambda: here().add_reader(0, print),
    "add_writer": lambda: here().add_writer(1, print),
    "add_signal_handler": lambda: here().add_signal_handler(signal.SIGTERM, print),
    "set_default_executor": lambda: here().set_default_executor(None),
    "set_task_factory": lambda: here().set_task_factory(None),
    "set_exception_handler": lambda: here().set_exception_handler(None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_real_world_is_refused_by_name(name: str) -> None:
    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            with pytest.raises(RealIOError, match=rf"^loop\.{name} is refused"):
                await REFUSED[name]()
            gc.collect()

    run(main())


def test_every_method_of_an_event_loop_is_provided_or_refused() -> None:
    public = {name for name in dir(asyncio.AbstractEventLoop) if not name.startswith("_")}
    untouched = {name for name in public if getattr(VirtualLoop, name) is getattr(asyncio.AbstractEventLoop, name)}
    assert untouched == set()


def test_a_run_within_a_run_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(LoopStateError, match="running in this thread already"):
            run(sleep_ns(1))
        future = here().create_future()
        for loop in (VirtualLoop(), here()):
            with pytest.raises(LoopStateError, match="running in this thread already"):
                loop.run_until_complete(future)
        await sleep_ns(1)

    run(main())

    async def real() -> None:
        with pytest.raises(LoopStateError, match="running in this thread already"):
            run(sleep_ns(1))
        with pytest.raises(LoopStateError, match="no virtual event loop"):
            now_ns()
        with pytest.raises(LoopStateError, match="no virtual event loop"):
            await sleep_ns(1)

    asyncio.run(real())


def test_two_threads_have_a_clock_each() -> None:
    times: dict[int, int] = {}

    async def main(steps: int) -> None:
        for _ in range(steps):
            await sleep_ns(1)
        times[steps] = now_ns()

    threads = [threading.Thread(target=lambda steps=steps: run(main(steps))) for steps in (10, 20, 3000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert times == {10: 10, 20: 20, 3000: 3000}
    with pytest.raises(LoopStateError):
        now_ns()


def test_the_errors_are_the_projects() -> None:
    for error in (ClockError, DeadlockError, LoopStateError, RealIOError, TimeLimitError):
        assert issubclass(error, ProtoV3Error)


# Memory.


def test_finished_tasks_and_their_results_are_not_kept() -> None:
    class Result:
        pass

    async def child() -> Result:
        await sleep_ns(1)
        return Result()

    async def main() -> None:
        task = start(child())
        result = weakref.ref(await task)
        finished = weakref.ref(task)
        del task
        await sleep_ns(1)
        gc.collect()
        assert finished() is None
        assert result() is None

    run(main())


def test_a_pending_task_that_no_one_refers_to_is_kept() -> None:
    async def child() -> None:
        await here().create_future()

    async def main() -> None:
        start(child(), name="forgotten")
        await sleep_ns(1)
        gc.collect()
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError) as caught:
        run(main())
    assert [task.name for task in caught.value.waiting] == ["main", "forgotten"]
