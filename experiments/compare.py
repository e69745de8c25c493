"""The main job: the same devices migrated under each protocol, with the same seeds.

What it shows is read off the runs: tables, a figure, and a few sentences whose numbers are computed.
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import INTERRUPTED, results, tell
from experiments.folder import ResultFolder
from proto_v3.errors import UserError
from proto_v3.migration import OutcomeKind
from sim.outcome import Outcome
from sim.protocol import Protocol
from sim.run import simulate
from sim.scenario import Scenario
from sim.scenario_file import load


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
        reason = "".join(traceback.format_exception(error))
        return Outcome(cell.scenario.name, cell.protocol.name, cell.seed, OutcomeKind.FAILED, reason)


def run_compare(
    scenario_name: str,
    protocol_names: Sequence[str],
    seeds: Sequence[int],
    out: str | None,
    table_format: str,
    jobs: int | None,
    command: Sequence[str],
    settings: Sequence[str] = (),
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    scenario = load(scenario_name, settings)
    protocols = [Protocol.parse(name, scenario) for name in protocol_names]
    if len({protocol.name for protocol in protocols}) < len(protocols):
        raise UserError(f"--protocols {','.join(protocol_names)}: one is named twice")
    if out == "":
        raise UserError("--out '': must be the name of a folder")
    folder = ResultFolder(Path(out) if out else Path("results") / scenario.name)
    cells = [Cell(scenario, protocol, seed) for seed in seeds for protocol in protocols]
    outcomes, interrupted = run_cells(cells, jobs)
    console = tell.console()
    if not outcomes:
        say(console, "interrupted before the first run was done; nothing was written")
        return INTERRUPTED
    frame = results.table(outcomes)
    folder.write_table(frame, "runs", table_format)
    folder.write_json(results.manifest(scenario, scenario_name, command, outcomes, len(cells)), "manifest")
    folder.remove(
        "compare.png",
        "compare.svg",
        "critical.png",
        "critical.svg",
        "runs.parquet" if table_format == "csv" else "runs.csv",
    )
    if interrupted:
        say(console, f"interrupted: {len(outcomes)} of {len(cells)} runs were done and are kept in {folder.folder}")
        return INTERRUPTED
    figures = _draw(folder, scenario, frame, command)  # before anything is printed, which may go to `head`
    tell.print_tables(console, scenario, frame)
    tell.print_findings(console, frame)
    drawn = ", ".join(str(path) for path in figures if path.suffix == ".png")
    say(console, f"\nFigure: {drawn} (and .svg)" if figures else "\nNo run was completed: nothing to draw.")
    say(console, f"Table and manifest: {folder.folder / f'runs.{table_format}'}, {folder.folder / 'manifest.json'}")
    return 1 if any(outcome.kind is OutcomeKind.FAILED for outcome in outcomes) else 0


def say(console: Console, line: str) -> None:
    """A line as it is: with paths that can be copied, and brackets that are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def run_cells(cells: Sequence[Cell], jobs: int | None) -> tuple[list[Outcome], bool]:
    """Run all cells, on `jobs` processes; returns what was done, in the cells' order, and whether Ctrl-C cut it short.

    The outcomes are the same for any number of processes: a run depends on its cell alone.
    """
    done: dict[int, Outcome] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("runs", total=len(cells))
        try:
            for at, outcome in _in_processes(cells, jobs):
                done[at] = outcome
                progress.advance(task)
        except KeyboardInterrupt:
            return [done[at] for at in sorted(done)], True
    return [done[at] for at in sorted(done)], False


def _in_processes(cells: Sequence[Cell], jobs: int | None) -> Iterator[tuple[int, Outcome]]:
    if jobs == 1 or len(cells) == 1:
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
    workers = jobs or os.cpu_count() or 1
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        waiting: dict[Future[Outcome], int] = {}
        left = enumerate(cells)
        while True:
            # A few at a time: a wait looks at all that it waits for.
            for at, cell in itertools.islice(left, 16 * workers - len(waiting)):
                waiting[pool.submit(run_cell, cell)] = at
            if not waiting:
                return
            for future in wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
            if interrupted.is_set():
                raise KeyboardInterrupt
    except BaseException:  # what they are at can last for minutes, and nobody waits for it any more
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGINT, before)


def _draw(folder: ResultFolder, scenario: Scenario, frame: pl.DataFrame, command: Sequence[str]) -> list[Path]:
    if frame.filter(pl.col("outcome") == OutcomeKind.COMPLETED.value).is_empty():
        return []
    from experiments import figures

    paths = folder.write_figure(figures.downtime(scenario, frame, shlex.join(command)), "compare")
    if any(device.reconfigurations for device in scenario.devices):
        paths += folder.write_figure(figures.critical(scenario, frame, shlex.join(command)), "critical")
    return paths
