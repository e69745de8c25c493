"""Runs, made on all cores or on a cluster: each depends on its cell alone, so they come out the same wherever they are
made, and in whatever order."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

Done = Iterator[tuple[int, Outcome]]
"""A cell's place among those that were given, and its outcome, as they are done."""
A_FEW = 16
"""Runs handed out ahead, a worker: so that none waits, and few are lost when all is stopped."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to be made."""

    scenario: Scenario
    protocol: Protocol
    seed: int


def run_cell(cell: Cell) -> Outcome:
    """Make one run. One that breaks is recorded as such, and the others go on."""
    try:
        return simulate(cell.scenario, cell.protocol, cell.seed)
    except Exception as error:  # a bug of ours: it must be seen, and must not cost the other runs
        return broken(cell, "".join(traceback.format_exception(error)))


def broken(cell: Cell, reason: str) -> Outcome:
    """What stands for a run that could not be made."""
    return Outcome(cell.scenario.name, cell.protocol.name, cell.seed, OutcomeKind.FAILED, reason)


def progress_bar() -> Progress:
    """On a terminal, with the time that is left; elsewhere nothing is shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def run_cells(cells: Sequence[Cell], jobs: int | None) -> tuple[list[Outcome], bool]:
    """Run all cells, on `jobs` processes; returns what was done, in the cells' order, and whether Ctrl-C cut it short.

    The outcomes are the same for any number of processes.
    """
    done: dict[int, Outcome] = {}
    with progress_bar() as progress:
        task = progress.add_task("runs", total=len(cells))
        try:
            for at, outcome in in_processes(cells, jobs):
                done[at] = outcome
                progress.advance(task)
        except KeyboardInterrupt:
            return [done[at] for at in sorted(done)], True
    return [done[at] for at in sorted(done)], False


# --- on this machine --------------------------------------------------------------------------------------------------


def in_processes(cells: Sequence[Cell], jobs: int | None) -> Done:
    """On so many processes of this machine. KeyboardInterrupt if Ctrl-C came; what was done has been told by then."""
    if jobs == 1 or len(cells) <= 1:
        for at, cell in enumerate(cells):
            yield at, run_cell(cell)
        return
    # A KeyboardInterrupt out of nowhere could leave the pool with a lock held, for ever. So Ctrl-C is only noted, and
    # looked at between waits; the workers, which get it too, ignore it. A second one is for who cannot wait.
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield from _in_pools(cells, jobs or os.cpu_count() or 1, interrupted)
    finally:
        signal.signal(signal.SIGINT, before)


def _in_pools(cells: Sequence[Cell], workers: int, interrupted: threading.Event) -> Done:
    """In one pool after the other: one whose worker died is of no use any more."""
    left = iter(range(len(cells)))
    while True:
        lost: list[int] = []
        yield from _in_pool(cells, left, workers, interrupted, lost)
        if not lost:
            return
        for at in sorted(lost):  # one of them may be what killed it: each has a process of its own now
            alone: list[int] = []
            yield from _in_pool(cells, iter([at]), 1, interrupted, alone)
            if alone:
                yield at, broken(cells[at], "the process that made this run died: out of memory, or killed")


def _in_pool(
    cells: Sequence[Cell], left: Iterator[int], workers: int, interrupted: threading.Event, lost: list[int]
) -> Done:
    """Runs of what is left, until there are no more, or the pool breaks: then `lost` has what it was at."""
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    waiting: dict[Future[Outcome], int] = {}
    try:
        while not lost:
            # A few at a time: a wait looks at all that it waits for.
            for at in itertools.islice(left, A_FEW * workers - len(waiting)):
                waiting[pool.submit(run_cell, cells[at])] = at
            if not waiting:
                return
            for future in wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED).done:
                at = waiting.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    lost.append(at)
                else:
                    yield at, outcome
            if interrupted.is_set():
                raise KeyboardInterrupt
        lost += waiting.values()
    except BrokenProcessPool:  # at submit()
        lost += [*waiting.values(), at]
    except BaseException:  # what they are at can last for minutes, and nobody waits for it any more
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
