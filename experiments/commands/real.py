# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 real`: migrations between VFIO devices of the kernel, and what they measured."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments import INTERRUPTED
from experiments.commands.live import address, delays, draw, interruptible, run_jobs, streams, table
from experiments.commands.live_target import ending
from experiments.commands.options import out_folder
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan
from experiments.runs.pool import Cell
from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.live.processes.report import Note, RejectedNote, SessionNote
from sim.live.processes.settings import Settings
from sim.live.result import not_run
from sim.live.run import applied
from sim.live.tcp.sockets import listen, text_of
from sim.real.run import RealResult, SideDevices, run_here, run_to, serve_one
from sim.real.scenario import BASE, ProbedDevice, check_alike, check_used, loaded, of_devices, probed
from sim.real.sysfs import find, module_parameters, module_version
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario

if TYPE_CHECKING:
    from experiments.report.tables import Section

WRITES = ("runs", "real", "distribution")
"""Its files, without their suffixes."""


def run_real(
    devices: Sequence[str],
    to: Sequence[str],
    protocols: Sequence[str],
    seeds: Sequence[int],
    connect: str | None,
    scenario: str | None,
    by: str | None,
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
    """Migrate from `devices` to those of `to`, or to those of the target at `connect`; returns the exit status.

    UserError for bad input, before anything is run or written.
    """
    if bool(to) == (connect is not None):
        raise UserError("--to, --connect: give one of the two: devices of this machine, or the address of a target")
    if connect is None and how.tls is not None:
        raise UserError("--tls-cert: TLS is for a target on another host: give --connect")
    where = None if connect is None else address(connect, "--connect")
    source, target = _side(devices, by), _side(to, by)
    if to:
        check_alike(source.entries, target.entries)
    found, way = probed(source.entries, by)
    if to:
        probed(target.entries, by)
    chosen, plans = prepared(scenario, protocols, settings, found, how)
    cells = [Cell(chosen, protocol, seed) for seed in seeds for protocol in plans]
    stderr = Console(stderr=True)

    async def run(cell: Cell, watch: Callable[[Note], None]) -> RealResult:
        what = (chosen, cell.protocol, cell.seed, how, source)
        result = await (run_here(*what, target, watch) if where is None else run_to(*what, where, watch))
        for text in result.put_back:
            stderr.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
        return result

    plan = Plan(command, [scenario or BASE], len(cells), writes=WRITES)
    with ResultFolder(out_folder(out, f"real-{chosen.devices[0].name}"), plan, force=force) as folder:
        done, interrupted = run_jobs(cells, run, not_made, stderr, quiet=quiet)
        if not done:
            stderr.print("interrupted before the first run was done; nothing was written", markup=False)
            return INTERRUPTED
        from experiments.commands.finish import CommandResults, finish  # after the runs: it is heavy
        from experiments.report import comparison, findings
        from experiments.report.tables import Output
        from experiments.runs import manifest

        lives = [each.live for each in done]
        frame = table(lives, how)
        how_made = manifest.of_scenario(chosen, scenario or BASE, command, frame, len(cells))
        results = CommandResults(
            "real",
            chosen.name,
            f"{', '.join(each.entry.name for each in found)}: {platform.system()} {platform.release()}",
            frame,
            len(cells),
            how_made | {"real": real_manifest(done, how, found, way, target)},
            lambda: [*findings.conclusion(frame), *said(chosen, done)],
            lambda: [
                devices_section(chosen, found, way),
                *comparison.sections(chosen, frame),
                *streams(lives),
                *delays(lives),
            ],
            lambda: draw(folder, chosen, frame, command, "real"),
        )
        return finish(folder, results, Output(as_json, quiet), table_format, interrupted=interrupted)


def prepared(
    named: str | None,
    protocols: Sequence[str],
    settings: Sequence[str],
    found: Sequence[ProbedDevice],
    how: Settings,
) -> tuple[Scenario, list[Protocol]]:
    """The scenario with the devices in it, and the protocols. UserError if one is unknown, named twice, or cannot be
    run."""
    check_used(settings)
    scenario = of_devices(loaded(named, settings), found)
    chosen = [Protocol.parse(name, scenario) for name in protocols]
    if len({protocol.name for protocol in chosen}) < len(chosen):
        raise UserError(f"--protocols {','.join(protocols)}: one is named twice")
    for protocol in chosen:
        applied(scenario, protocol, how)  # it may refuse
    return scenario, chosen


def _side(names: Sequence[str], by: str | None) -> SideDevices:
    return SideDevices([find(name) for name in names], by)


def not_made(cell: Cell, why: str) -> RealResult:
    """The result of a run that could not be made: FAILED."""
    return RealResult(not_run(cell.scenario, cell.protocol, cell.seed, why))


# --- the target -------------------------------------------------------------------------------------------------------


def run_real_target(devices: Sequence[str], where: str, by: str | None, once: bool, settings: Settings) -> int:
    """Listen at `where`, and receive migrations into these devices, one after the other, until Ctrl-C; returns the exit
    status.

    UserError if `where` is no address, if it cannot be listened at, or if a device cannot be a target.
    """
    host, port = address(where, "--listen")
    target = _side(devices, by)
    probed(target.entries, by)
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(note: Note) -> None:
        match note:
            case SessionNote():
                say(f"{note.peer}: {note.protocol}")
            case RejectedNote():
                say(f"turned away: {note.why}")

    status = 0

    async def work() -> None:
        nonlocal status
        while True:
            end, told = await serve_one(listener, replace(settings, once=once), target, show)
            status = 0 if end.report is not None and end.report.whole else 1
            for text in [ending(end), *(f"note: {each}" for each in told)]:
                say(text)
            if once:
                return

    with contextlib.closing(listen((host, port))) as listener:
        bound = listener.getsockname()
        say(f"listening on {text_of(bound)}, for {', '.join(entry.name for entry in target.entries)}")
        if not bound[0].startswith("127.") and bound[0] != "::1" and settings.tls is None:
            say("warning: all who reach this address can load these devices: use --tls-cert, --tls-key, --tls-ca")
        if not interruptible(work):
            say("interrupted")
            return INTERRUPTED
    return status


# --- tables -----------------------------------------------------------------------------------------------------------


def said(scenario: Scenario, done: Sequence[RealResult]) -> list[str]:
    """What was compared at the end of the completed runs, in sentences."""
    completed = [each for each in done if each.live.outcome.kind is OutcomeKind.COMPLETED]
    if not completed:
        return []
    sentences = ["The guest's RAM is the same at both ends, in all completed runs."]
    for at, device in enumerate(scenario.devices):
        compared = all(len(each.compared) > at and each.compared[at] for each in completed)
        if compared:
            sentences.append(f"{device.name}: the driver's digest of its state is the same at both ends.")
        else:
            sentences.append(f"{device.name}: its state was not compared, as its driver does not say what it is.")
    return sentences


def devices_section(scenario: Scenario, found: Sequence[ProbedDevice], way: str) -> Section:
    """What the devices are."""
    from experiments.report.tables import Heading, Section

    return Section(
        "devices",
        "Devices of the source",
        f"opened by {way}; image: MIG_DATA_SIZE, while it runs",
        [
            Heading("device", "device"),
            Heading("id", "name"),
            Heading("driver", "driver"),
            Heading("features", "features"),
            Heading("dirty_streams", "dirty streams"),
            Heading("image_kib", "image KiB", ".1f"),
        ],
        [
            {
                "device": spec.name,
                "id": device.entry.name,
                "driver": device.entry.driver,
                "features": " ".join(flag.name or "" for flag in device.flags),
                "dirty_streams": device.dirty_streams,
                "image_kib": device.image_bytes / 1024,
            }
            for spec, device in zip(scenario.devices, found, strict=True)
        ],
    )


def real_manifest(
    done: Sequence[RealResult], how: Settings, found: Sequence[ProbedDevice], way: str, target: SideDevices
) -> dict[str, Any]:
    """For the manifest: what a real run depends on beside the scenario."""
    modules = sorted({each.entry.module for each in found} - {""})
    return {
        "settings": asdict(how),
        "kernel": f"{platform.system()} {platform.release()} {platform.version()}",
        "machine": platform.machine(),
        "opened_by": way,
        "source": [{"name": each.entry.name, "driver": each.entry.driver, "flags": int(each.flags)} for each in found],
        "target": [{"name": entry.name, "driver": entry.driver} for entry in target.entries],
        "modules": {name: {"version": module_version(name), "parameters": module_parameters(name)} for name in modules},
        "put_back": [text for each in done for text in each.put_back],
        "sockets": [asdict(granted) for granted in done[0].live.sockets],
    }
