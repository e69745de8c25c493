"""Many runs, in this process or in several. A run depends on its cell alone: neither the process nor the order
changes it."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from types import FrameType, ModuleType

from experiments.runs.progress import RunsProgress
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

Done = Iterator[tuple[int, Outcome]]
"""The finished runs, in any order: the cell's index in the sequence that was passed, and its outcome."""
CELLS_PER_WORKER = 16
"""Runs handed to the pool in advance: enough that no worker waits, few enough that an interruption loses little."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run to be made."""

    scenario: Scenario
    protocol: Protocol
    seed: int


def run_cell(cell: Cell) -> Outcome:
    """Make one run. If it raises, its outcome is FAILED with the traceback as reason, and the other runs go on."""
    try:
        return simulate(cell.scenario, cell.protocol, cell.seed)
    except Exception as error:  # a bug of ours: it must be seen, and must not cost the other runs
        return broken(cell, "".join(traceback.format_exception(error)))


def broken(cell: Cell, reason: str) -> Outcome:
    """The outcome of a run that could not be made."""
    return Outcome(cell.scenario.name, cell.protocol.name, cell.seed, OutcomeKind.FAILED, reason)


def run_cells(cells: Sequence[Cell], jobs: int | None, *, quiet: bool = False) -> tuple[list[Outcome], bool]:
    """Make all runs in `jobs` processes (None: one a CPU); unless `quiet`, stderr says how far they are.

    Returns the outcomes of the finished runs, in the order of the cells, and whether Ctrl-C stopped it early. They are
    the same for any number of processes.
    """
    done: dict[int, Outcome] = {}
    interrupted = False
    with RunsProgress(len(cells), quiet=quiet) as progress:
        progress.begin("runs", len(cells))
        try:
            for at, outcome in in_processes(cells, jobs):
                done[at] = outcome
                progress.advance()
        except KeyboardInterrupt:
            interrupted = True
    return [done[at] for at in sorted(done)], interrupted


def in_processes(cells: Sequence[Cell], jobs: int | None, start_method: str | None = None) -> Done:
    """Make all runs in `jobs` processes of this machine (None: one a CPU); one job runs in this process.

    `start_method` is one of multiprocessing's, None its default. No worker imports the caller's main module, so a
    script without a guard, a notebook and standard input can call it. KeyboardInterrupt on Ctrl-C, after the runs that
    were finished by then.
    """
    if jobs == 1 or len(cells) <= 1:
        for at, cell in enumerate(cells):
            yield at, run_cell(cell)
        return
    workers = min(jobs or os.cpu_count() or 1, len(cells))
    with _noted_interrupt() as interrupted:
        in_pool = partial(_in_pool, cells, multiprocessing.get_context(start_method), interrupted)
        remaining = iter(range(len(cells)))
        while True:  # a pool with a dead worker can make no more runs: another one goes on
            lost: list[int] = []
            yield from in_pool(remaining, workers, lost)
            if not lost:
                return
            for at in sorted(lost):  # one of them may have killed the worker: each gets a process of its own now
                lost_again: list[int] = []
                yield from in_pool(iter([at]), 1, lost_again)
                if lost_again:
                    yield at, broken(cells[at], "the process that made this run died: out of memory, or killed")


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one raises at once, for a user who cannot wait.

    A KeyboardInterrupt at any line could leave the pool with a lock held for ever. Outside of the main thread, where
    Python delivers no signal, nothing changes.
    """
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _starting_workers(context: BaseContext) -> Iterator[None]:
    """While workers are started: they get no Ctrl-C, not even before they ignore it, and no main module to import."""
    if context.get_start_method() == "fork":
        yield
        return
    caller = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        with _without_interrupts():
            yield
    finally:
        sys.modules["__main__"] = caller


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started meanwhile never gets SIGINT, where there are signal masks."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # first: the start of a worker would start it, and that unblocks SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_pool(
    cells: Sequence[Cell],
    context: BaseContext,
    interrupted: threading.Event,
    remaining: Iterator[int],
    workers: int,
    lost: list[int],
) -> Done:
    """Runs of the remaining cells, until there are no more or the pool breaks: `lost` then gets those under way."""
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore_interrupt)
    waiting: dict[Future[Outcome], int] = {}
    try:
        while not lost:
            # Few at a time: a wait looks at every future that it waits for.
            for at in itertools.islice(remaining, CELLS_PER_WORKER * workers - len(waiting)):
                with _starting_workers(context):
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
    except BrokenProcessPool:  # raised by submit()
        lost += [*waiting.values(), at]
    except BaseException:  # the runs under way can take minutes, and nobody waits for them any more
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
