"""`proto-v3 live`: real migrations, each in processes of its own, and what they measured."""

from __future__ import annotations

import asyncio
import platform
import shlex
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments import INTERRUPTED
from experiments.commands.options import parsed
from experiments.draw.live_progress import Progress
from experiments.runs.folder import ResultFolder
from experiments.runs.pool import Cell
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.live.limits import THE_MACHINES_OWN, measured_lateness_ns, too_short
from sim.live.processes.settings import Settings
from sim.live.result import LiveResult
from sim.live.run import applied, run_here, run_to
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

if TYPE_CHECKING:
    import polars as pl

DEFAULT_PORT = 22067
"""0x5633: V3."""
DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"
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
) -> int:
    """Run, print, write; returns the exit status. UserError for bad input, before anything is run or written."""
    loaded, chosen = prepared(scenario, protocols, settings, how)
    to = None if connect is None else address(connect, "--connect")
    if to is None and how.tls is not None:
        raise UserError("--tls-cert: TLS is for a target on another host: give --connect")
    folder = ResultFolder(Path(out) if out else Path("results") / f"live-{loaded.name}")
    stderr = Console(stderr=True)
    warn(stderr, loaded)
    cells = [Cell(loaded, protocol, seed) for seed in seeds for protocol in chosen]
    found, interrupted = run_jobs(cells, how, stderr, to)
    if not found:
        stderr.print("interrupted before the first run was done; nothing was written", markup=False)
        return INTERRUPTED
    from experiments.runs import manifest  # after the runs, whose memory is measured: it is heavy

    frame = table(found, how)
    folder.write_table(frame, "runs", table_format)
    how_made = manifest.of_scenario(loaded, scenario, command, frame, len(cells))
    folder.write_json(how_made | {"live": live_manifest(found, how)}, "manifest")
    folder.remove("live.png", "live.svg", "runs.parquet" if table_format == "csv" else "runs.csv")
    if interrupted:
        stderr.print(f"interrupted: {len(found)} of {len(cells)} runs were done and are kept in {folder.folder}")
        return INTERRUPTED
    _show(folder, loaded, frame, found, command, table_format)
    return 1 if OutcomeKind.FAILED.value in frame["outcome"] else 0


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


def run_jobs(
    cells: Sequence[Cell], settings: Settings, stderr: Console, to: tuple[str, int] | None = None
) -> tuple[list[LiveResult], bool]:
    """Make the runs, one after the other; returns the finished ones, and whether Ctrl-C stopped it early."""
    done: list[LiveResult] = []

    async def work() -> None:
        with Progress(stderr, cells[0].scenario.name, len(cells)) as progress:
            for cell in cells:
                progress.begin(cell.protocol.name)
                what = (cell.scenario, cell.protocol, cell.seed, settings)
                if to is None:
                    done.append(await run_here(*what, progress.heard))
                else:
                    done.append(await run_to(*what, to, progress.heard))

    return done, not interruptible(work)


def interruptible(work: Callable[[], Awaitable[None]]) -> bool:
    """Run `work` to its end; False if Ctrl-C cancelled it, which lets it clean up."""

    async def main() -> bool:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return False
        finally:
            loop.remove_signal_handler(signal.SIGINT)
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


def _show(
    folder: Any,
    scenario: Scenario,
    frame: pl.DataFrame,
    found: Sequence[LiveResult],
    command: Sequence[str],
    table_format: str,
) -> None:
    from experiments.draw import downtime as figures
    from experiments.report import tables
    from experiments.report.tables import say
    from experiments.runs.frame import completed_runs

    console = tables.console()
    figure_paths = []
    if not completed_runs(frame).is_empty():
        drawn = figures.draw_downtime(scenario, frame, shlex.join(command))
        figure_paths = folder.write_figure(drawn, "live")
    tables.print_tables(console, scenario, frame)
    if any(result.streams for result in found):
        tables.print_table(console, "Streams, of each protocol's first run", streams_table(found))
    if any(result.delays for result in found):
        tables.print_table(console, "Timers, what was asked for and how late they were; and CPU", delays_table(found))
    if figure_paths:
        say(console, f"\nFigure: {figure_paths[0]} (and .svg)")
    say(console, f"Table and manifest: {folder.folder / f'runs.{table_format}'}, {folder.folder / 'manifest.json'}")


def streams_table(found: Sequence[LiveResult]) -> Table:
    """Bytes and rate of each data fd, of the first completed run of each protocol."""
    from experiments.report.tables import add_row, plain_table

    shown = plain_table(["protocol", "data fd", "MiB", "read() calls", "us a call", "MiB/s while reading"])
    seen = set()
    for result in found:
        name = result.outcome.protocol
        if name in seen or result.outcome.kind is not OutcomeKind.COMPLETED:
            continue
        seen.add(name)
        for stream in result.streams:
            counters = stream.counters
            mib, reading_ns = counters.device_bytes / MIB, counters.read_firmware_ns
            rate = f"{mib / (reading_ns / 1e9):.0f}" if reading_ns else ""
            calls = [f"{mib:.1f}", str(counters.reads), f"{reading_ns / 1e3 / counters.reads:.0f}"]
            add_row(shown, name, stream.name, *calls, rate)
    return shown


def delays_table(found: Sequence[LiveResult]) -> Table:
    """How late timers were in each process, in the worst of the runs."""
    from experiments.report.tables import add_row, plain_table

    shown = plain_table(["process", "timers", "asked for s", "late us, median", "99 %", "most", "CPU s a run"])
    for process in dict.fromkeys(name for result in found for name in result.delays):
        delays = [result.delays[process] for result in found if process in result.delays]
        worst = [max(getattr(each, key) for each in delays) for key in LATENESS]
        asked_s = sum(each.asked_ns for each in delays) / 1e9
        count = str(sum(each.count for each in delays))
        cpu_s = sum(result.cpu_ns.get(process, 0) for result in found) / 1e9 / len(delays)
        lateness = [f"{late_ns / 1000:.0f}" for late_ns in worst]
        add_row(shown, process, count, f"{asked_s:.2f}", *lateness, f"{cpu_s:.2f}")
    return shown
