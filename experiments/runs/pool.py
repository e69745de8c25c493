# SPDX-License-Identifier: GPL-2.0-or-later
"""Many runs, in this process or in several. A run depends on its cell alone: neither the process nor the order
changes it. Other tasks can be made in the same way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, TypeVar
from typing import Protocol as Interface

from experiments.runs import interrupt
from experiments.runs.progress import RunsProgress
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome, held_against_bound
from sim.run import simulate
from sim.same_run import same_run
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

T = TypeVar("T", covariant=True)
Done = Iterator[tuple[int, Outcome]]
"""The finished runs, in any order: the cell's index in the sequence that was passed, and its outcome."""
GIVEN = 2
"""Runs that a worker has at a time: one that it makes, and the next one, so that it never waits."""
LOOK_S = 0.2
"""How often Ctrl-C is looked for."""
WORKER_FILES, OWN_FILES = 4, 48
"""Files that this process has open for each worker, and for all else."""


class Task(Interface[T]):
    """What a worker makes; it is pickled."""

    def make(self) -> T:
        """Make it. It raises nothing."""

    def broken(self, reason: str) -> T:
        """What is there instead if it could not be made."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to be made."""

    scenario: Scenario
    protocol: Protocol
    seed: int

    def make(self) -> Outcome:
        """Make it, as `run_cell`."""
        return run_cell(self)

    def broken(self, reason: str) -> Outcome:
        """The outcome if it could not be made."""
        return broken(self, reason)


def run_cell(cell: Cell) -> Outcome:
    """Make one run. If it raises, its outcome is FAILED with the traceback as reason, and the other runs go on."""
    try:
        return simulate(cell.scenario, cell.protocol, cell.seed)
    except Exception as error:  # a bug of ours: it must be seen, and must not cost the other runs
        return broken(cell, "".join(traceback.format_exception(error)))


def broken(cell: Cell, reason: str) -> Outcome:
    """The outcome of a run that could not be made."""
    return Outcome(cell.scenario.name, cell.protocol.name, cell.seed, OutcomeKind.FAILED, reason)


def made_once(cells: Sequence[Cell], make: Callable[[Sequence[Cell]], Done]) -> Done:
    """As `make` makes them, but of runs that are equal by construction only one."""
    keys: dict[tuple[int, str], str] = {}
    equal: dict[tuple[str, int], list[int]] = {}
    for at, cell in enumerate(cells):
        of_scenario = (id(cell.scenario), cell.protocol.name)
        if of_scenario not in keys:
            keys[of_scenario] = same_run(cell.scenario, cell.protocol)
        equal.setdefault((keys[of_scenario], cell.seed), []).append(at)
    groups = list(equal.values())
    for place, outcome in make([cells[group[0]] for group in groups]):
        made, *others = groups[place]
        yield made, outcome
        yield from ((at, outcome_as(outcome, cells[at])) for at in others)


def outcome_as(outcome: Outcome, cell: Cell) -> Outcome:
    """The outcome of a run that is equal by construction: with its own names and its own lower bound."""
    named = replace(outcome, scenario=cell.scenario.name, protocol=cell.protocol.name)
    return held_against_bound(named, cell.protocol.applied(cell.scenario))


def run_cells(cells: Sequence[Cell], jobs: int | None, *, quiet: bool = False) -> tuple[list[Outcome], bool]:
    """Make all runs in `jobs` processes (None: one a CPU); unless `quiet`, stderr says how far they are.

    Returns the outcomes of the finished runs, in the order of the cells, and whether it was interrupted. They are the
    same for any number of processes.
    """
    done: dict[int, Outcome] = {}
    interrupted = False
    with RunsProgress(len(cells), quiet=quiet) as progress:
        progress.begin("runs", len(cells))
        try:
            for at, outcome in made_once(cells, lambda some: in_processes(some, jobs)):
                done[at] = outcome
                progress.advance()
        except KeyboardInterrupt:
            interrupted = True
    return [done[at] for at in sorted(done)], interrupted


def in_processes(
    tasks: Sequence[Task[T]], jobs: int | None, start_method: str | None = None
) -> Iterator[tuple[int, T]]:
    """Make all tasks, such as runs, in `jobs` processes of this machine (None: one a CPU); one job runs in this
    process. Yields the index of each and what it made, in any order.

    `start_method` is one of multiprocessing's, None its default. No worker imports the caller's main module, so a
    script without a guard, a notebook and standard input can call it. KeyboardInterrupt on Ctrl-C, after the runs that
    were finished by then. No worker outlives this process, not even if it is killed.
    """
    if jobs == 1 or len(tasks) <= 1:
        for at, task in enumerate(tasks):
            yield at, task.make()
        return
    context = multiprocessing.get_context(start_method)
    interrupted = threading.Event()
    with interrupt.postponed(interrupted.set):  # an exception at any line could leave a process behind
        died: list[int] = []
        yield from _in_workers(tasks, range(len(tasks)), _most(jobs), context, interrupted, died)
        for at in died:  # once more, and alone: it has all the memory now
            died_again: list[int] = []
            yield from _in_workers(tasks, [at], 1, context, interrupted, died_again)
            if died_again:
                yield at, tasks[at].broken("the process that made this died: out of memory, or killed")
        if interrupted.is_set():
            raise KeyboardInterrupt


def _most(jobs: int | None) -> int:
    """How many workers there can be: `jobs`, or fewer if this process may not have so many open files."""
    workers = jobs or os.cpu_count() or 1
    if sys.platform == "win32":
        return workers
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return workers if files == resource.RLIM_INFINITY else max(1, min(workers, (files - OWN_FILES) // WORKER_FILES))


# --- workers: each has a connection of its own, so that there is no lock which a killed one could keep ----------------


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    connection: Any
    given: deque[int] = field(default_factory=deque)
    """The indices of its tasks. It makes the first; the others wait in the connection."""

    def end(self) -> None:
        """Kill it: it has nothing to lose but a run that nobody waits for."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _in_workers(
    tasks: Sequence[Task[T]],
    which: Iterable[int],
    count: int,
    context: Any,
    interrupted: threading.Event,
    died: list[int],
) -> Iterator[tuple[int, T]]:
    """These tasks made, until an interruption. If a worker dies, `died` gets its task, and another one goes on."""
    remaining = deque(which)
    workers: dict[Any, _Worker] = {}

    def give(worker: _Worker) -> None:
        while remaining and len(worker.given) < GIVEN:
            worker.given.append(remaining.popleft())
            with contextlib.suppress(OSError):  # it died; reading from it says so, too
                worker.connection.send(tasks[worker.given[-1]])

    try:
        while not interrupted.is_set():
            while remaining and len(workers) < count:
                try:
                    worker = _started(context)
                except OSError:  # too few files, processes or memory: what works has to do
                    if not workers:
                        raise
                    count = len(workers)
                else:
                    workers[worker.connection] = worker
                    give(worker)
            if not workers:
                return
            for connection in wait(list(workers), LOOK_S):
                worker = workers[connection]
                try:
                    outcome = worker.connection.recv()
                except (EOFError, OSError):
                    died.append(worker.given.popleft())
                    remaining.extendleft(reversed(worker.given))
                    worker.given.clear()
                else:
                    yield worker.given.popleft(), outcome
                    give(worker)
                if not worker.given:
                    workers.pop(connection).end()
    finally:
        for worker in workers.values():
            worker.end()


def _started(context: Any) -> _Worker:
    """A worker, which gets no Ctrl-C and has no main module to import."""
    ours, theirs = context.Pipe()
    caller = sys.modules["__main__"]
    try:
        with theirs:
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            if context.get_start_method() != "fork":
                with interrupt.blocked():
                    resource_tracker.ensure_running()  # now: starting it unblocks SIGINT
                sys.modules["__main__"] = ModuleType("__main__")
            with interrupt.blocked():
                process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        sys.modules["__main__"] = caller
    return _Worker(process, ours)


def _work(connection: Connection) -> None:
    """What runs in a worker. It ends with its parent, in the middle of a run too."""
    interrupt.ignore()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(connection.recv().make())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
