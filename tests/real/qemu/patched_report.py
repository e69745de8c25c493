# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patches to QEMU bring, as measured, and what the model says for the same parameters.

    python -m tests.real.qemu.patched --out out/patched
    python -m tests.real.qemu.patched_report out/patched --out results/real/patched

Measured: query-migrate's downtime; and from the order to stop the vCPUs until the guest runs, by the traces of both
ends, which are on one clock. The model: `proto-v3 fit` of the unpatched run of each turn, with the driver's parameters
where they are known, simulated without and with the change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from experiments.draw import panels
from experiments.draw.canvas import Figure, own_settings
from experiments.logs.events import TraceEvent, parse
from experiments.logs.machine import machine_of
from experiments.runs import manifest
from kernel import build
from kernel.qemu_build import BUILDS, OPTIONS, PATCHES, UNPATCHED, changed_lines, digest
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import parse as parse_scenario
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import NS_PER_MS
from tests.build.scenario import small_scenario
from tests.real.qemu.migrate import SIDES, Limits, Record
from tests.real.qemu.pairs import LogPair
from tests.real.qemu.patched import DEBIAN, REINIT, STATE, TRIALS, Trial
from tests.real.qemu.project import settings_of
from tests.real.qemu.simulated import tables_of

US_PER_MS = 1000
FILES = ("README.md", "patched.png", "runs.parquet")
DOCUMENT = build.PROJECT / "docs/real.md"
BEGIN, END = "<!-- tests.real.qemu.patched_report -->", "<!-- end -->"
PROTOCOLS = {
    UNPATCHED: "v2",
    "early": "v2-early",
    "parallel-stop": "v2",
    "reinit": "v2-reinit-flush-ack-reusable",
    "retry": "v2-reinit-flush-ack-reusable-retry",
    DEBIAN: "v2-reinit-flush-ack-reusable",
}
"""What the model calls each build. For the first three the fitted scenario says that it is multifd."""
SETTINGS = {"parallel-stop": ["vmm.parallel_stop=true"]}
"""What it sets besides: `-parallel-stop` would load configs at once, too, which our patch leaves as it is."""


@dataclass(frozen=True)
class Row:
    """One run."""

    case: str
    build: str
    turn: int
    qemu: str
    status: str
    guest_runs_at: str
    query_downtime_ms: float | None
    """What query-migrate says."""
    stops: int
    """Orders to stop the vCPUs."""
    stood_ms: float
    """How long the guest stood still, over all of them."""
    driver_ms: float | None
    """From the first device in P2P at the source to the last one in RUNNING at the target, by the driver's log."""
    stop_ms: float
    """From the last order to stop the vCPUs until all devices are stopped."""
    model_status: str
    model_stood_ms: float
    model_stop_ms: float | None
    """None if it did not complete."""


def standstills_ms(record: Record) -> list[float]:
    """How long the guest stood still, for each order to stop the vCPUs.

    It runs again at the target; or at the source, when the last device is in RUNNING or PRE_COPY again.
    """
    source, target = parse(record.source_trace), parse(record.target_trace)
    orders = [event.time_us for event in checkpoints(source, "src-downtime-start")]
    started = [event.time_us for event in checkpoints(target, "dst-precopy-bh-vm-started")]
    resumed = [
        call.time_ns // 1000
        for call in record.calls
        if call.of_source and call.name == "set_state" and call.arc[1] in ("RUNNING", "PRE_COPY")
    ]
    ends = [*orders[1:], sys.maxsize]
    return [
        (max([*(each for each in resumed if begin < each < end), *(started if end is ends[-1] else [])]) - begin)
        / US_PER_MS
        for begin, end in zip(orders, ends, strict=True)
    ]


def stop_ms(record: Record) -> float:
    """From the last order to stop the vCPUs until vCPUs and devices are stopped."""
    source = parse(record.source_trace)
    order, stopped = (checkpoints(source, name)[-1] for name in ("src-downtime-start", "src-vm-stopped"))
    return (stopped.time_us - order.time_us) / US_PER_MS


def checkpoints(events: Sequence[TraceEvent], name: str) -> list[TraceEvent]:
    """QEMU's own checkpoints of a downtime, of this name."""
    return [event for event in events if event.name == "vmstate_downtime_checkpoint" and event.args == name]


def driver_ms(record: Record) -> float | None:
    """From the first device in P2P at the source, for the last time, to the last in RUNNING at the target."""
    calls = [call for call in record.calls if call.name == "set_state"]
    back = [call.time_ns for call in calls if call.of_source and call.arc[1] in ("RUNNING", "PRE_COPY")]
    begins = [call.time_ns for call in calls if call.of_source and call.arc[1].endswith("P2P")]
    ends = [call.time_ns for call in calls if not call.of_source and call.arc[1] == "RUNNING"]
    begins = [each for each in begins if each > max(back, default=0)]
    return (max(ends) - min(begins)) / NS_PER_MS if begins and ends else None


# --- the model --------------------------------------------------------------------------------------------------------


def fitted(pair: LogPair) -> dict[str, Scenario]:
    """For each build: the rig by the logs of an unpatched run, devices and firmware as the driver has them."""
    known = {
        "firmware.engines": pair.us("engines"),
        "firmware.save_mib_per_s": pair.us("save_mib_s"),
        "firmware.load_mib_per_s": pair.us("load_mib_s"),
        "firmware.save_command_us": pair.us("command_us"),
        "firmware.load_command_us": pair.us("command_us"),
        "firmware.service_cv": 0.0,
        "driver.chunk_mib": pair.us("chunk_kib") // 1024,
        "driver.chunks": pair.us("chunks"),
    }
    with tempfile.TemporaryDirectory() as folder:
        source, target = pair.unpacked(Path(folder))
        machine = machine_of(str(source), str(target), cmdline=[str(pair.folder / "cmdline.txt")])
    settings = [f"{key}={value}" for key, value in known.items()]
    return {
        name: parse_scenario(machine.text, str(pair.folder), [*settings, *SETTINGS.get(name, [])]) for name in PROTOCOLS
    }


RAM_GIB = Limits().ram_mib / 1024


def late_reinit() -> Scenario:
    """The driver's parameters; the VMM costs nothing."""
    driver = REINIT.driver
    changes: dict[str, Any] = {
        **tables_of(REINIT),
        **settings_of(REINIT),
        "device.0.suspend_ms": driver["quiesce_us"] / US_PER_MS,
        "device.0.quiesce_ms": driver["suspend_us"] / US_PER_MS,
        "device.0.resume_ms": 0.0,
        "device.0.config_load_ms": 0.0,
        "ram.size_gib": RAM_GIB,
        "ram.nonzero_gib": RAM_GIB / 64,
        "device.0.count": REINIT.devices,
    }
    return small_scenario(changes)


def simulated(scenario: Scenario, build_name: str, seed: int) -> Outcome:
    """One run, as under this build."""
    return simulate(scenario, Protocol.parse(PROTOCOLS[build_name], scenario), seed)


def stood_ms(outcome: Outcome) -> float:
    """How long the simulated guest stood still, over all orders to stop it."""
    return ((outcome.downtime_ns or 0) + outcome.counters.stopped_in_vain_ns) / NS_PER_MS


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[Row]:
    """All runs that `tests.real.qemu.patched` wrote."""
    return [row for trial in TRIALS.values() for turn in turns_of(folder, trial) for row in turn_rows(turn, trial)]


def turns_of(folder: Path, trial: Trial) -> list[dict[str, Path]]:
    """Of each turn that has all builds: their folders."""
    first = folder / trial.case.name / trial.builds[0]
    turns = []
    for number in sorted(int(path.parent.name) for path in first.glob("*/record.json")):
        have = {name: folder / trial.case.name / name / str(number) for name in trial.builds}
        turns.append({name: path for name, path in have.items() if (path / "record.json").exists()})
    return turns


def turn_rows(turn: dict[str, Path], trial: Trial) -> Iterator[Row]:
    """Of one turn."""
    late = trial.case is REINIT
    scenarios = dict.fromkeys(PROTOCOLS, late_reinit()) if late else fitted(LogPair(turn[UNPATCHED]))
    for name, path in turn.items():
        record = Record.load(path)
        model = simulated(scenarios[name], name, seed=1 + int(path.name))
        yield Row(
            case=trial.case.name,
            build=name,
            turn=int(path.name),
            qemu=record.source_qemu,
            status=record.status,
            guest_runs_at=" and ".join(side for side in SIDES if getattr(record, f"{side}_runs")),
            query_downtime_ms=record.query_migrate.get("downtime"),
            stops=len(standstills_ms(record)),
            stood_ms=sum(standstills_ms(record)),
            driver_ms=driver_ms(record),
            stop_ms=stop_ms(record),
            model_status=model.kind.lower(),
            model_stood_ms=stood_ms(model),
            model_stop_ms=model.phases_ns["stop"] / NS_PER_MS if model.phases_ns else None,
        )


# --- what is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """One build in one case, over all turns. Times in ms; `change` and `model_change` are against the case's first
    build, in the same turn; None where there is nothing to say."""

    case: str
    build: str
    status: str
    guest_runs_at: str
    turns: int
    stood: float
    least: float
    most: float
    query_downtime: float | None
    driver: float | None
    stops: float
    stop: float
    change: float | None
    model_status: str
    model: float
    model_stop: float | None
    model_change: float | None


def told(rows: Sequence[Row]) -> list[Told]:
    """Medians over the turns."""
    found = []
    for trial in TRIALS.values():
        for name in trial.builds:
            own = {row.turn: row for row in rows if (row.case, row.build) == (trial.case.name, name)}
            first = {row.turn: row for row in rows if (row.case, row.build) == (trial.case.name, trial.builds[0])}
            if not own:
                continue
            changes = [] if name == trial.builds[0] else [(own[turn], first[turn]) for turn in own if turn in first]
            stood = [row.stood_ms for row in own.values()]
            found.append(
                Told(
                    case=trial.case.name,
                    build=name,
                    status=words(row.status for row in own.values()),
                    guest_runs_at=words(row.guest_runs_at for row in own.values()),
                    turns=len(own),
                    stood=statistics.median(stood),
                    least=min(stood),
                    most=max(stood),
                    query_downtime=median(row.query_downtime_ms for row in own.values()),
                    driver=median(row.driver_ms for row in own.values()),
                    stops=statistics.median(row.stops for row in own.values()),
                    stop=statistics.median(row.stop_ms for row in own.values()),
                    change=median(row.stood_ms - base.stood_ms for row, base in changes),
                    model_status=words(row.model_status for row in own.values()),
                    model=statistics.median(row.model_stood_ms for row in own.values()),
                    model_stop=median(row.model_stop_ms for row in own.values()),
                    model_change=median(row.model_stood_ms - base.model_stood_ms for row, base in changes),
                )
            )
    return found


def words(values: Iterable[str]) -> str:
    """All different ones."""
    return ", ".join(dict.fromkeys(values))


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def number(value: float | None, signed: bool = False) -> str:
    """Of whole ms."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.0f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def page(found: Sequence[Told], versions: Sequence[str], kernel: str) -> str:
    """The page, in Markdown."""
    stopping = [each for each in found if each.case != REINIT.name]
    late = [each for each in found if each.case == REINIT.name]
    said = "; ".join(f"{each.case}, {each.build}: {number(each.stood)} ms, {number(each.model)}" for each in found)
    lines = [
        "# QEMU with the project's own patches, measured",
        "",
        f"QEMU {versions[0]} of Debian's source package, built once as it is and once with each of the patches of"
        " [kernel/qemu_patches](../../../kernel/qemu_patches); both ends the same build;"
        f" Linux {kernel} with the sample driver, in User-Mode Linux. In each turn each build migrates once. How it is"
        " made: [docs/real.md](../../../docs/real.md#qemu-with-patches-of-our-own).",
        "",
        "`make real-patched` makes this folder anew; `make qemu` builds the QEMUs. `runs.parquet` has a row a run.",
        "",
        f"![How long the guest stood still in each run, and in the model: {said}](patched.png)",
        "",
        "## The stop and the save",
        "",
        f"{driver_text()} In the table: how long the guest stood still, in ms, from the order to stop the vCPUs until"
        " it ran at the target: the median of the turns, the least and the most; QEMU's own figure (query-migrate); the"
        " driver's, from the first device in P2P to the last in RUNNING; what the patch changed, the median over the"
        " turns; what the model says; and the first part of it, until all devices were stopped.",
        "",
        *table(
            (
                *(
                    "devices",
                    "QEMU",
                    "turns",
                    "stood still",
                    "query-migrate",
                    "driver",
                    "change",
                    "model",
                    "its change",
                ),
                *("stop", "model's stop"),
            ),
            [
                (
                    each.case.rpartition("-")[2],
                    each.build,
                    str(each.turns),
                    f"{number(each.stood)} ({number(each.least)} to {number(each.most)})",
                    number(each.query_downtime),
                    number(each.driver),
                    number(each.change, signed=True),
                    number(each.model),
                    number(each.model_change, signed=True),
                    number(each.stop),
                    number(each.model_stop),
                )
                for each in stopping
            ],
        ),
        "The model is `proto-v3 fit` of the turn's unpatched run, with the driver's own parameters for the firmware,"
        " simulated as it is, under `-early`, and with `vmm.parallel_stop`. Where the two differ, it is mostly by work"
        " of QEMU's that the model has no key for: threads that two cores have to run, before all the save threads, the"
        " channels of multifd and their syncs. So the changes compare better than the times.",
        "",
        "## A late REINIT",
        "",
        f"{REINIT.text[0].upper()}{REINIT.text[1:]}; 30 ms into P2P and 70 ms into STOP_COPY each. QEMU 10.0 has no"
        " REINIT, so reinit.patch gives it what 11.1 has; Debian's own 11.1 is beside it. The guest stands still for"
        " all orders to stop it together.",
        "",
        *table(
            ("QEMU", "turns", "ends", "guest runs at", "orders to stop", "stood still", "model ends", "model"),
            [
                (
                    each.build,
                    str(each.turns),
                    each.status,
                    each.guest_runs_at,
                    number(each.stops),
                    f"{number(each.stood)} ({number(each.least)} to {number(each.most)})",
                    each.model_status,
                    number(each.model),
                )
                for each in late
            ],
        ),
        "The model has the driver's parameters, and a VMM that costs nothing. It does as 11.1, which takes its devices"
        " to RUNNING, to RUNNING_P2P and to RUNNING once more when a migration failed: 60 ms that 10.0, and so reinit,"
        " does not take. After a migration that failed, all of it is to be made again.",
        "",
        "## The patches",
        "",
        *table(
            ("patch", "lines added", "taken out", "what it does"),
            [(name, *map(str, changed_lines(name)), title_of(name)) for name in patch_names()],
        ),
    ]
    return "\n".join(lines)


@own_settings()
def drawn(rows: Sequence[Row], found: Sequence[Told]) -> Figure:
    """How long the guest stood still: each run, their median, and the model's."""
    figure = Figure(figsize=(8, 0.42 * len(found) + 1.4), layout="constrained")
    axis = figure.subplots()
    for at, each in enumerate(found):
        runs = [row.stood_ms for row in rows if (row.case, row.build) == (each.case, each.build)]
        axis.plot(runs, [at] * len(runs), "o", color="#0072B2", alpha=0.5, markersize=5, label="a run")
        axis.plot([each.stood], [at], "|", color="#0072B2", markersize=16, markeredgewidth=2.5, label="median")
        axis.plot([each.model], [at], "D", color="#D55E00", markersize=6, fillstyle="none", label="model")
    axis.set_yticks(range(len(found)), [f"{each.case}, {each.build} ({each.status})" for each in found])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    panels.dress(axis, "", "the guest stands still, ms", "")
    named = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    panels.handles_below(figure, list(named.values()))
    panels.say_how_made(figure, "make real-patched")
    return figure


def summary(found: Sequence[Told]) -> str:
    """For docs/real.md: medians of how long the guest stood still, in ms, measured and by the model."""
    stopping = [each for each in found if each.case != REINIT.name]
    late = {each.build: each for each in found if each.case == REINIT.name}
    heads = ("devices", *(f"{name}: measured, model" for name in TRIALS[stopping[0].case].builds))
    rows = [
        (
            case.rpartition("-")[2],
            *(f"{number(each.stood)}, {number(each.model)}" for each in stopping if each.case == case),
        )
        for case in dict.fromkeys(each.case for each in stopping)
    ]
    words = [
        f"with {name} it {each.status}, after {number(each.stood)} ms"
        f" (model: {each.model_status}, {number(each.model)})"
        for name, each in late.items()
    ]
    return "\n".join([*table(heads, rows), "After a late REINIT of two devices:", *(f"- {each}" for each in words), ""])


def rewritten(document: str, found: Sequence[Told]) -> str:
    """docs/real.md with the summary between its marks."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n{summary(found)}{END}{rest.partition(END)[2]}"


def driver_text() -> str:
    """The parameters of the devices, in words."""
    return (
        f"Devices of {STATE['size_kib'] // 1024} MiB without PRE_COPY, so that all of their state is saved in the"
        f" downtime, by multifd; {STATE['quiesce_us'] // US_PER_MS} ms into P2P and {STATE['stop_us'] // US_PER_MS} ms"
        f" into STOP each, one firmware a side, which does one command at a time: {STATE['save_mib_s']} MiB/s saved,"
        f" {STATE['load_mib_s']} MiB/s loaded, {STATE['load_finish_us'] // US_PER_MS} ms to end a load."
    )


def patch_names() -> list[str]:
    """In the order of BUILDS."""
    return list(dict.fromkeys(name for patches in BUILDS.values() for name in patches))


def title_of(name: str) -> str:
    """The patch's own first line, without its prefix."""
    lines = (PATCHES / f"{name}.patch").read_text(encoding="utf-8").splitlines()
    return next(line.partition(": ")[2] for line in lines[1:] if line)


def how_made(rows: Sequence[Row], folder: Path, arguments: Sequence[str], files: dict[str, str]) -> dict[str, Any]:
    """The manifest."""
    known = LogPair(next(folder.glob(f"*/{UNPATCHED}/*/known.json")).parent).known
    return {
        "command": "make real-patched",
        "report": " ".join(["python -m tests.real.qemu.patched_report", *arguments]),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": len(rows),
        "qemu": {"versions": sorted({row.qemu for row in rows}), "built": digest(), "options": OPTIONS},
        "patches": {
            name: dict(zip(("added", "taken_out"), changed_lines(name), strict=True)) for name in patch_names()
        },
        "kernel": known["kernel"],
        "driver": {
            "source": build.module_digest(),
            "parameters": {each: trial.case.driver for each, trial in TRIALS.items()},
        },
        "host": {"cpus": os.cpu_count(), "load": [round(each, 1) for each in os.getloadavg()]},
        "versions": manifest.versions(),
        "git_revision": manifest.git_revision(),
        "files": files,
    }


def main(arguments: Sequence[str]) -> int:
    """Write README.md, runs.parquet and manifest.json, and the summary in docs/real.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.real.qemu.patched_report", description="Patches, compared.")
    parser.add_argument("records", type=Path, help="the folder that tests.real.qemu.patched wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the page, the table and the manifest")
    options = parser.parse_args(arguments)
    rows = rows_of(options.records)
    if not rows:
        parser.error(f"{options.records} has no record of a trial")
    found = told(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame([asdict(row) for row in rows], infer_schema_length=None)
    frame.write_parquet(options.out / "runs.parquet")
    drawn(rows, found).savefig(options.out / "patched.png", dpi=120)
    ours = sorted({row.qemu for row in rows if row.build in BUILDS})
    kernel = Record.load(next(options.records.glob("*/*/*/record.json")).parent).kernel
    (options.out / "README.md").write_text(page(found, ours, kernel), encoding="utf-8")
    files = {name: hashlib.sha256((options.out / name).read_bytes()).hexdigest() for name in FILES}
    text = json.dumps(how_made(rows, options.records, arguments, files), indent=1)
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")
    (options.out / "manifest.json").write_text(f"{text}\n", encoding="utf-8")
    for each in found:
        print(
            f"{each.case}, {each.build}: {each.status}, stood still {each.stood:.0f} ms ({each.least:.0f} to"
            f" {each.most:.0f}), change {number(each.change, True)}; model {number(each.model)},"
            f" change {number(each.model_change, True)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
