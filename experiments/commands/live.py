# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 live`: real migrations, each in processes of its own, and what they measured."""

from __future__ import annotations

import asyncio
import platform
import shlex
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.options import out_folder, parsed
from experiments.draw.live_progress import Progress
from experiments.runs import interrupt
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell
from proto_v3.errors import ProtoV3Error, UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.live.limits import THE_MACHINES_OWN, measured_lateness_ns, too_short
from sim.live.processes.report import Note
from sim.live.processes.settings import Settings
from sim.live.result import LiveResult, not_run
from sim.live.run import applied, run_here, run_to
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

if TYPE_CHECKING:
    import polars as pl

    from experiments.report.tables import Section

DEFAULT_PORT = 22067
"""0x5633: V3."""
DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"
WRITES = ("runs", "live", "distribution")
"""Its files, without their suffixes."""
Result = TypeVar("Result")
MakeRun = Callable[[Cell, Callable[[Note], None]], Awaitable[Result]]
"""Makes one run; the second argument hears what its processes report meanwhile."""
LATENESS = ("late_median_ns", "late_p99_ns", "late_max_ns")


def address(text: str, option: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[V6]:PORT`, or a host alone, with the default port. UserError for another text."""
    host, colon, port = text.rpartition(":")
    if not colon or "]" in port or (":" in host and not host.startswith("[")):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not int(port) < 1 << 16:
        raise UserError(f"{option} {text}: must be HOST:PORT, as in {DEFAULT_LISTEN}")
    return host, int(port)


def run_live(
    scenario: str,
    protocols: Sequence[str],
    seeds: Sequence[int],
    connect: str | None,
    how: Settings,
    out: str | None,
    table_format: str,
    command: Sequence[str],
    settings: Sequence[str],
    *,
    as_json: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded, chosen = prepared(scenario, protocols, settings, how)
    to = None if connect is None else address(connect, "--connect")
    if to is None and how.tls is not None:
        raise UserError("--tls-cert: TLS is for a target on another host: give --connect")
    cells = [Cell(loaded, protocol, seed) for seed in seeds for protocol in chosen]
    plan = Plan(command, [scenario], len(cells), writes=WRITES)
    with ResultFolder(out_folder(out, f"live-{loaded.name}"), plan, force=force) as folder:
        stderr = Console(stderr=True)
        warn(stderr, loaded)
        found, interrupted = run_jobs(cells, live_run(how, to), not_made, stderr, quiet=quiet)
        if not found:
            stderr.print("interrupted before the first run was done; nothing was written", markup=False)
            return INTERRUPTED
        from experiments.commands.finish import (  # after the runs, whose memory is measured: it is heavy
            CommandResults,
            finish,
        )
        from experiments.report import comparison, findings
        from experiments.report.tables import Output
        from experiments.runs import manifest

        frame = table(found, how)
        how_made = manifest.of_scenario(loaded, scenario, command, frame, len(cells))
        results = CommandResults(
            "live",
            loaded.name,
            f"{loaded.name}, live: {loaded.description}",
            frame,
            len(cells),
            how_made | {"live": live_manifest(found, how)},
            lambda: findings.conclusion(frame),
            lambda: [*comparison.sections(loaded, frame), *streams(found), *delays(found)],
            lambda: draw(folder, loaded, frame, command),
        )
        return finish(folder, results, Output(as_json, quiet), table_format, interrupted=interrupted)


def prepared(
    scenario: str, protocols: Sequence[str], settings: Sequence[str], how: Settings
) -> tuple[Scenario, list[Protocol]]:
    """The scenario and the protocols. UserError if one of them is unknown or cannot be run live."""
    loaded, chosen = parsed(scenario, protocols, settings)
    for protocol in chosen:
        applied(loaded, protocol, how)  # it may refuse
    return loaded, chosen


def warn(stderr: Console, scenario: Scenario) -> None:
    """Print which of the scenario's delays are shorter than timers can be here."""
    lateness_ns = measured_lateness_ns()
    short = too_short(scenario, lateness_ns)
    if short:
        delays = ", ".join(f"{key} ({asked_ns / 1000:.3g} us)" for key, asked_ns in short.items())
        stderr.print(
            f"warning: a timer is {lateness_ns / 1000:.0f} us late here (median), so these delays come out longer than "
            f"the scenario says: {delays}",
            markup=False,
            highlight=False,
        )


def live_run(how: Settings, to: tuple[str, int] | None = None) -> MakeRun[LiveResult]:
    """A function that makes a live run; `to`: to a target that listens there."""

    async def run(cell: Cell, watch: Callable[[Note], None]) -> LiveResult:
        what = (cell.scenario, cell.protocol, cell.seed, how)
        return await (run_here(*what, watch) if to is None else run_to(*what, to, watch))

    return run


def not_made(cell: Cell, why: str) -> LiveResult:
    """The result of a run that could not be made: FAILED."""
    return not_run(cell.scenario, cell.protocol, cell.seed, why)


def run_jobs(
    cells: Sequence[Cell],
    run: MakeRun[Result],
    not_made: Callable[[Cell, str], Result],
    stderr: Console,
    *,
    quiet: bool = False,
) -> tuple[list[Result], bool]:
    """Make the runs, one after the other; returns the finished ones, and whether Ctrl-C stopped it early.

    What makes a run impossible is raised if it is the first one; later it is a FAILED run, and the others are kept.
    """
    done: list[Result] = []

    async def work() -> None:
        with Progress(stderr, cells[0].scenario.name, len(cells), quiet=quiet) as progress:
            for cell in cells:
                progress.begin(cell.protocol.name)
                try:
                    done.append(await run(cell, progress.heard))
                except (OSError, ProtoV3Error) as error:
                    if not done:
                        raise
                    done.append(not_made(cell, str(error)))

    return done, not interruptible(work)


def interruptible(work: Callable[[], Awaitable[None]]) -> bool:
    """Run `work` to its end; False if Ctrl-C cancelled it, which lets it clean up."""

    async def main() -> bool:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        with interrupt.postponed(lambda: loop.call_soon_threadsafe(task.cancel)):
            try:
                await task
            except asyncio.CancelledError:
                return False
        return True

    return asyncio.run(main())


# --- tables -----------------------------------------------------------------------------------------------------------


def table(found: Sequence[LiveResult], settings: Settings) -> pl.DataFrame:
    """The runs as a table: the columns of a run in virtual time, and how late timers were."""
    import polars as pl

    from experiments.runs import frame as results

    rows = []
    for result in found:
        late = list(result.delays.values())
        rows.append(
            results.row(result.outcome)
            | {
                "clock": "live",
                "io": settings.io,
                "loop": settings.loop,
                "delays": sum(each.count for each in late),
                "delays_asked_ns": sum(each.asked_ns for each in late),
                **{key: max((getattr(each, key) for each in late), default=None) for key in LATENESS},
                "cpu_ns": sum(result.cpu_ns.values()),
                "clock_uncertainty_ns": result.clock_uncertainty_ns,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def live_manifest(found: Sequence[LiveResult], settings: Settings) -> dict[str, Any]:
    """For the manifest: what a live run depends on beside the scenario."""
    return {
        "settings": asdict(settings),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "not_emulated": THE_MACHINES_OWN,
        "sockets": [asdict(granted) for granted in found[0].sockets],
        "delays_of_the_first_run": {name: asdict(each) for name, each in found[0].delays.items()},
    }


def draw(
    folder: ResultFolder, scenario: Scenario, frame: pl.DataFrame, command: Sequence[str], name: str = "live"
) -> list[Path]:
    """Write the figures of the completed runs; `name` is that of the first one's file. Returns the files."""
    from experiments.draw.distribution import draw_distribution
    from experiments.draw.downtime import draw_downtime
    from experiments.runs.frame import completed_runs

    if completed_runs(frame).is_empty():
        return []
    made_by = shlex.join(command)
    return [
        *folder.write_figure(draw_downtime(scenario, frame, made_by), name),
        *folder.write_figure(draw_distribution(scenario, frame, made_by), "distribution"),
    ]


def streams(found: Sequence[LiveResult]) -> Iterator[Section]:
    """Bytes and rate of each data fd, of the first completed run of each protocol; nothing if no run has streams."""
    from experiments.report.tables import Heading, Section

    rows, seen = [], set()
    for result in found:
        name = result.outcome.protocol
        if name in seen or result.outcome.kind is not OutcomeKind.COMPLETED:
            continue
        seen.add(name)
        for stream in result.streams:
            counters = stream.counters
            mib, reading_ns = counters.device_bytes / MIB, counters.read_firmware_ns
            rows.append(
                {
                    "protocol": name,
                    "data_fd": stream.name,
                    "device_mib": mib,
                    "reads": counters.reads,
                    "us_a_read": reading_ns / 1e3 / counters.reads if counters.reads else None,
                    "mib_per_s": mib / (reading_ns / 1e9) if reading_ns else None,
                }
            )
    if rows:
        yield Section(
            "streams",
            "Streams, of each protocol's first run",
            "a row is one data fd; MiB/s: while a read() is under way",
            [
                Heading("protocol", "protocol"),
                Heading("data_fd", "data fd"),
                Heading("device_mib", "MiB", ".1f"),
                Heading("reads", "read() calls"),
                Heading("us_a_read", "us a call", ".0f"),
                Heading("mib_per_s", "MiB/s", ".0f"),
            ],
            rows,
        )


def delays(found: Sequence[LiveResult]) -> Iterator[Section]:
    """How late timers were in each process, in the worst of the runs; nothing if no process reported it."""
    from experiments.report.tables import Heading, Section

    rows = []
    for process in dict.fromkeys(name for result in found for name in result.delays):
        of_process = [result.delays[process] for result in found if process in result.delays]
        cpu_ns = sum(result.cpu_ns.get(process, 0) for result in found) / len(of_process)
        rows.append(
            {
                "process": process,
                "timers": sum(each.count for each in of_process),
                "asked_s": sum(each.asked_ns for each in of_process) / 1e9,
                **{
                    f"{key.removesuffix('_ns')}_us": max(getattr(each, key) for each in of_process) / 1e3
                    for key in LATENESS
                },
                "cpu_s": cpu_ns / 1e9,
            }
        )
    if rows:
        yield Section(
            "timers",
            "Timers: what was asked for, and how late they were",
            "late: in the worst run, us; CPU: s of a run, in the mean",
            [
                Heading("process", "process"),
                Heading("timers", "timers"),
                Heading("asked_s", "asked for s", ".2f"),
                Heading("late_median_us", "late us, median", ".0f"),
                Heading("late_p99_us", "p99", ".0f"),
                Heading("late_max_us", "most", ".0f"),
                Heading("cpu_s", "CPU s", ".2f"),
            ],
            rows,
        )
