# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual clock: an asyncio event loop whose time is an integer number of nanoseconds.

Theory. A discrete-event simulation and an event loop are the same machine: callbacks that are ready, and a heap of
timers. A real loop sleeps until the next timer is due. This one sets its clock to that deadline and continues. Ordinary
asyncio code (tasks, queues, locks, timeouts) is then a simulation model, and a simulated day takes as long as its
callbacks take. Two rules hold:

* Order. Ready callbacks run first in, first out. If none is ready, the next timer fires: by deadline, then by the order
  in which the timers were set, whichever call set them. So everything that a timer starts at an instant is finished
  before the next timer fires, even if that one is due at the same instant. Code that spins on `asyncio.sleep(0)` until
  a timer fires therefore never ends; `VirtualLoop.max_callbacks_per_instant` stops it.

* Repeatability. Nothing outside the program may take part: threads, sockets, signals and processes are refused by name.
  asyncio keeps tasks in sets, which iterate in an order that depends on memory addresses. Here tasks, and futures of
  `create_future`, hash by a number that counts from 1 in each loop. So a TaskGroup cancels its children in the same
  order in every process. It is not the order of creation, because a set iterates by hash modulo its table size. (`run`
  cancels remaining tasks in the order of creation.)

What can still differ between processes: sets of strings or of objects that hash by address, which includes bare
coroutines given to `asyncio.as_completed` (give it tasks) and futures made by `gather` or by hand; and finalizers of
objects in a reference cycle, which run when the garbage collector finds them.

Errors. If no callback is ready and no timer is set, nothing can happen any more: `DeadlockError` reports where each
task waits, unless `call_when_stuck` said what to do then. A task's exception is raised when its run ends, unless it was
retrieved in asyncio's sense; what `gather` and `shield` drop on purpose was. Of the tasks that are done, the loop keeps
those that failed.

Async generators that are still open at the end are not closed: the code that uses one must do it (`aclosing`).

Units. Names with `_ns` take and return integers, nanoseconds since the loop's start, without a limit. asyncio's own
interface uses float seconds: delays are rounded to the nanosecond. Deadlines (`call_at`, and so `asyncio.timeout`,
which adds to `loop.time()`) are exact for the first 2**21 s (24 days); after that they are as exact as floats of that
size, within 6 ns for the first year.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from operator import index
from typing import Any, NoReturn, TypeVar

from sim.clock.port import Callback, ClockError, LoopStateError, running
from sim.clock.stuck import DeadlockError, StuckError, TimeLimitError

T = TypeVar("T")

_NS = 1_000_000_000  # nanoseconds in a second
_NEVER = 1 << 100  # the deadline of `asyncio.sleep(inf)`


class RealIOError(ClockError):
    """The program called a method of the loop that would use the real world; the message names it."""


class Handle:
    """A callback that will run, soon or at a time."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context", "when_ns")
    when_ns: int
    """For a timer: when it is due."""

    def __init__(self, callback: Callback, args: tuple[Any, ...], context: Context | None) -> None:
        self._callback = callback
        self._args = args
        self._context = copy_context() if context is None else context
        self._cancelled = False

    def cancel(self) -> None:
        """Keep the callback from running, if it has not run yet."""
        self._cancelled = True
        self._callback, self._args = _do_nothing, ()  # so that their objects need not live until the deadline

    def cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled


def _do_nothing() -> None:
    """The callback of a cancelled handle."""


class _Future(asyncio.Future[T]):
    """A future that hashes by a number. The number is drawn at the first hash, as few futures ever get into a set.

    The number is free, but asyncio awaits a class other than its own more slowly: an eighth of an asyncio.sleep.
    """

    __slots__ = ("_number",)
    _number: int

    def __hash__(self) -> int:
        try:
            return self._number
        except AttributeError:
            loop: Any = self.get_loop()
            self._number = next(loop._numbers)
            return self._number


class _Task(asyncio.Task[T]):
    """A task that hashes by its number."""

    __slots__ = ("number",)

    def __init__(self, number: int, coro: Coroutine[Any, Any, T], **options: Any) -> None:
        self.number = number  # first, since asyncio.Task puts itself into a set
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RealIOError(
            f"loop.{name} is refused on the virtual clock: it would bring in real time, threads, files or sockets, "
            "or replace what keeps runs repeatable and errors seen"
        )

    return refuse


# All public methods of an event loop, refused. VirtualLoop overrides those that it provides. A method that a later
# Python adds stays refused.
_Refusing: Any = type(
    "_Refusing",
    (asyncio.AbstractEventLoop,),
    {name: _refusal(name) for name in dir(asyncio.AbstractEventLoop) if not name.startswith("_")},
)


class VirtualLoop(_Refusing):  # type: ignore[misc]  # a base made at run time
    """An event loop in virtual time, for one thread. To be used by `run`.

    limit_ns: raise TimeLimitError before a timer fires that is due later than this; None: no limit.
    """

    max_callbacks_per_instant = 10_000_000  # past this, at the latest at its double, TimeLimitError

    def __init__(self, limit_ns: int | None = None) -> None:
        self._limit_ns = _NEVER if limit_ns is None else index(limit_ns)
        self._now_ns = 0
        self._ready: deque[Handle] = deque()
        # (deadline, number, timer): all numbers differ, so a comparison ends there and stays within C.
        self._timers: list[tuple[int, int, Handle | asyncio.Future[None]]] = []
        self._task_numbers = itertools.count(1)
        self._numbers = itertools.count(1)  # of everything else: timers, futures in sets
        self._tasks: dict[int, _Task[Any]] = {}  # those not done, by number and so in the order of creation
        self._failed: list[_Task[Any]] = []
        self._other_errors: list[BaseException] = []
        self._awaited: asyncio.Future[Any] | None = None
        self._when_stuck: Handle | None = None
        self._stopping = self._closed = False

    # Time and callbacks.

    def time(self) -> float:
        """Virtual time in seconds."""
        return self._now_ns / _NS

    def call_soon(self, callback: Callback, *args: Any, context: Context | None = None) -> Handle:
        """Run the callback at this instant, after those that are ready. If it raises, the run ends with that error."""
        handle = Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Callback, *args: Any, context: Context | None = None) -> Handle:
        """Run the callback in `delay` seconds, rounded to the nanosecond; now if negative, never if infinite."""
        return self._call_at(self._now_ns + max(0, _to_ns(delay)), callback, args, context)

    def call_at(self, when: float, callback: Callback, *args: Any, context: Context | None = None) -> Handle:
        """Run the callback at `when` seconds, rounded to the nanosecond; now if that is past, never if infinite."""
        return self._call_at(max(self._now_ns, _to_ns(when)), callback, args, context)

    def call_later_ns(self, delay_ns: int, callback: Callback, *args: Any) -> Handle:
        """Run the callback in `delay_ns` nanoseconds. ValueError if negative, TypeError if not an integer."""
        return self._call_at(self._now_ns + delay_ns, callback, args, None)

    def call_at_ns(self, when_ns: int, callback: Callback, *args: Any) -> Handle:
        """Run the callback at `when_ns` nanoseconds. ValueError if that is past, TypeError if not an integer."""
        return self._call_at(when_ns, callback, args, None)

    def call_when_stuck(self, callback: Callback) -> None:
        """If nothing can happen any more, run the callback, once, in place of raising DeadlockError."""
        self._when_stuck = Handle(callback, (), None)

    def _call_at(self, when_ns: int, callback: Callback, args: tuple[Any, ...], context: Context | None) -> Handle:
        handle = Handle(callback, args, context)
        handle.when_ns = when_ns
        self._set_timer(when_ns, handle)
        return handle

    def _wakeup_at(self, when_ns: int) -> asyncio.Future[None]:
        """A future that is done at `when_ns`.

        The future is the timer itself and needs no handle. As nobody else sees it, it can be of asyncio's own class,
        which asyncio awaits faster: a `sleep_ns` costs half of an asyncio.sleep.
        """
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._set_timer(when_ns, future)
        return future

    def _take_late_ns(self) -> int:
        """0: virtual timers are never late."""
        return 0

    def _was_late(self, task: asyncio.Task[Any] | None, late_ns: int) -> None:
        """Nothing to record: virtual timers are never late."""

    def _set_timer(self, when_ns: int, timer: Handle | asyncio.Future[None]) -> None:
        when_ns = index(when_ns)
        if when_ns < self._now_ns:
            raise ValueError(f"{when_ns} ns is past: it is {self._now_ns} ns")
        if when_ns < _NEVER:
            heappush(self._timers, (when_ns, next(self._numbers), timer))

    # Futures, tasks and their errors.

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return _Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, T], **options: Any) -> asyncio.Task[T]:
        """Start a task, with asyncio.Task's options (name, context). The default name has its number in this loop."""
        if self._closed:
            raise LoopStateError("the loop is closed and starts no task")
        number = next(self._task_numbers)
        if options.get("name") is None:
            options["name"] = f"Task-{number}"
        task = _Task(number, coro, loop=self, **options)
        self._tasks[number] = task
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: _Task[Any]) -> None:
        del self._tasks[task.number]
        if task._log_traceback:  # it has failed, and so far no one has retrieved the exception
            self._failed.append(task)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep an error that asyncio cannot raise to anybody; `close` returns it."""
        message = context.get("message", "an error without a message")
        error = context.get("exception") or RuntimeError(message)
        if self._closed:  # from a finalizer: too late to be raised
            logging.getLogger(__name__).error("%s", message, exc_info=error)
        else:
            self._other_errors.append(error)

    def get_debug(self) -> bool:
        """False: asyncio's debug mode is about real time and threads."""
        return False

    # Running.

    def run_until_complete(self, future: Awaitable[T]) -> T:
        """Run until the coroutine or future is done. Return its result, or raise its exception.

        DeadlockError, TimeLimitError and an exception of a plain callback end the run earlier. All other tasks stay as
        they are then, and continue in the next run.
        """
        self._check_idle()
        awaited: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)
        self._awaited = awaited
        awaited.add_done_callback(self._awaited_done)
        try:
            with self._current():
                self._run()
        finally:
            self._awaited = None
        return awaited.result()

    def _awaited_done(self, future: asyncio.Future[Any]) -> None:
        if future is self._awaited:  # not that of an earlier run, which something else ended
            self._stopping = True

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make this the running loop of the thread."""
        asyncio._set_running_loop(self)
        running.clock = self
        try:
            yield
        finally:
            self._stopping = False
            del running.clock
            asyncio._set_running_loop(None)

    def _run(self) -> None:
        ready, timers = self._ready, self._timers
        compact_at = 1000
        budget, budget_start_ns = itertools.repeat(None, self.max_callbacks_per_instant), -1
        while not self._stopping:
            for _ in budget:
                if not ready:
                    break
                handle = ready.popleft()
                args = handle._args
                # Most callbacks are a task's wakeup with one argument, and `*args` makes this call twice as slow.
                if len(args) == 1:
                    handle._context.run(handle._callback, args[0])
                else:
                    handle._context.run(handle._callback, *args)
                if self._stopping:
                    return
            else:
                if budget_start_ns == self._now_ns:
                    raise TimeLimitError(f"callbacks go on and on at {self._now_ns} ns", self._tasks.values())
                budget, budget_start_ns = itertools.repeat(None, self.max_callbacks_per_instant), self._now_ns
                continue

            if len(timers) > compact_at:  # a cancelled timer stays until it is due, unless most timers are cancelled
                timers[:] = [entry for entry in timers if not entry[2].cancelled()]
                heapify(timers)
                compact_at = max(1000, 2 * len(timers))
            if not timers and self._when_stuck is not None:
                ready.append(self._when_stuck)
                self._when_stuck = None
                continue
            if not timers:
                raise DeadlockError(f"nothing can happen any more at {self._now_ns} ns", self._tasks.values())
            entry = heappop(timers)
            when_ns, _, timer = entry
            if timer.cancelled():
                continue
            if when_ns > self._limit_ns:
                heappush(timers, entry)
                reason = f"the next timer is due at {when_ns} ns, past the limit of {self._limit_ns} ns"
                raise TimeLimitError(reason, self._tasks.values())
            self._now_ns = when_ns
            if isinstance(timer, Handle):
                ready.append(timer)
            else:
                timer.set_result(None)

    def _check_idle(self) -> None:
        if self._closed:
            raise LoopStateError("the loop is closed")
        if asyncio._get_running_loop() is not None:
            raise LoopStateError("an event loop is running in this thread already: await the coroutine there")

    # Ending.

    async def _end_tasks(self) -> None:
        """Cancel the other tasks in the order of creation and wait for their end; then the tasks that they started."""
        me = asyncio.current_task()
        while others := [task for task in self._tasks.values() if task is not me and not task.done()]:
            for task in others:
                task.cancel()
            await asyncio.wait(others)

    def close(self) -> list[BaseException]:
        """Close the loop, and the coroutines of tasks that are not done.

        Returns the errors that nobody retrieved: those of tasks in the order in which they failed, with a note that
        names the task, then the others.
        """
        self._closed = True
        with self._current():
            for task in list(self._tasks.values()):
                if task.done():
                    self._failed.append(task)
                else:
                    self._close_coroutine(task)
        errors: list[BaseException] = []
        for task in self._failed:
            error = task.exception() if task._log_traceback else None
            if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):  # asyncio raised these
                error.add_note(f"Raised in task {task.get_name()!r}, from which no one has retrieved it.")
                errors.append(error)
        errors += self._other_errors
        for container in (self._ready, self._timers, self._tasks, self._failed, self._other_errors):
            container.clear()
        return errors

    def _close_coroutine(self, task: _Task[Any]) -> None:
        """Close the coroutine of a task that cannot end otherwise, without a warning about it later."""
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio uses it on tasks from outside, too
        coro: Any = task.get_coro()
        for _ in range(10):  # a `finally` that awaits survives the first close()
            try:
                coro.close()
                break
            except BaseException as error:
                if getattr(coro, "cr_frame", None) is None:  # this error ended it
                    self._other_errors.append(error)


def run(main: Coroutine[Any, Any, T], *, limit_ns: int | None = None, name: str = "main") -> T:
    """Run a coroutine to its end in a new VirtualLoop, as a task of that name, and return its result.

    Remaining tasks are then cancelled in the order of creation and run to their end, and the loop is closed.

    If one error ended the run early (an exception of `main` or of a plain callback, DeadlockError, TimeLimitError) and
    there is no other, it is raised as it is. Errors that nobody retrieved are raised in an exception group, after that
    error if there is one. KeyboardInterrupt and SystemExit are always raised as they are; notes on them list the other
    errors. LoopStateError if an event loop is running in this thread.
    """
    loop = VirtualLoop(limit_ns)
    try:
        loop._check_idle()
    except LoopStateError:
        main.close()  # it will not run, and a warning about that would only distract
        raise
    task = loop.create_task(main, name=name)
    errors: list[BaseException] = []
    for stage in (lambda: task, loop._end_tasks):
        try:
            loop.run_until_complete(stage())
        except BaseException as error:
            errors.append(error)
    unretrieved = loop.close()
    alone = len(errors) == 1 and not unretrieved
    errors += unretrieved
    for interrupt in errors:
        if isinstance(interrupt, (KeyboardInterrupt, SystemExit)):
            for other in errors:
                # A signal may have interrupted a callback of the loop, and its task then waits for ever: expected.
                if other is not interrupt and not isinstance(other, StuckError):
                    interrupt.add_note(f"Another error of the run: {other!r}")
            raise interrupt
    if alone:
        raise errors[0]
    if errors:
        raise BaseExceptionGroup("errors of a run", errors)
    return task.result()


def _to_ns(seconds: float) -> int:
    try:
        return round(seconds * _NS)
    except OverflowError:  # infinity
        return _NEVER if seconds > 0 else 0
