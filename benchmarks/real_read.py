# SPDX-License-Identifier: GPL-2.0-or-later
"""read() of the sample driver in STOP_COPY, measured in a real kernel: the cases of the question kernel_read.

A guest (kernel/guest.py) loads the driver. For each case its devices are stopped, and each data fd is read to its end
by a thread of its own, in C (read_streams.c): eight threads of Python that read 64 KiB each time took three times as
long. All cases take turns in each round of one boot, so that a slow spell of the machine falls on all of them. What is
counted: throughput, read() calls, context switches and CPU time of the threads; and by the driver itself commands, the
time in them, in copies and waiting for its mutex, and the most commands at once.

The table is what `proto-v3 run kernel_read` reads, if --out is results/real/read. The machine should be idle.

    python -m benchmarks.real_read [--rounds 5] [--quick] [--out out/real-read]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from experiments.questions.kernel_read import grid
from experiments.questions.kernel_read.grid import CopyCost, ReadCase
from experiments.runs import manifest
from experiments.runs.folder import SCHEMA_VERSION, ResultFolder
from experiments.runs.plan import Plan
from kernel import build, guest
from kernel.build import MODULE, Kernel
from kernel.cache import BuildError, UnavailableError, stop_on_signals
from kernel.guest import GuestError, UserModeLinux
from proto_v3.errors import UserError
from sim.real.sample_parameters import Parameters, module_parameters
from sim.scenario.file import load

HERE = Path(__file__).resolve().parent
READER = HERE / "read_streams.c"
HEADERS = HERE.parent / "docs"
GUEST_PART = HERE / "real_read_guest.py"
SECONDS_A_ROUND = 600
"""Ten times what a round takes on an idle machine: how long the guest may live."""
SKIPPED = 0
BUSY = 0.5
"""The load, over a minute, of a machine that has other work to do."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="real_read.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="each case is measured once in each of them")
    parser.add_argument("--quick", action="store_true", help="the cases of a quick run of the question")
    parser.add_argument("--debug", action="store_true", help="the kernel with lock_stat; its times are its own")
    parser.add_argument("--cpus", type=int, default=2, help="of the guest")
    parser.add_argument("--memory", type=int, default=1792, help="of the guest, MiB")
    parser.add_argument("--out", type=Path, default=Path("out/real-read"), help="the folder of the table")
    parser.add_argument("--force", action="store_true", help="replace what is in the folder, whatever it is")
    options = parser.parse_args(arguments)
    stop_on_signals()
    command = ["python", "-m", "benchmarks.real_read", *arguments]
    cases = grid.cases(options.quick)
    plan = Plan(command, ["real_read"], len(cases) * options.rounds, quick=options.quick, writes=("runs",))
    try:
        (kernel,) = build.get(["um-debug" if options.debug else "um"])
        with ResultFolder(options.out, plan, force=options.force) as folder:
            before = os.getloadavg()
            if before[0] > BUSY:
                print(
                    f"real_read: this machine has other work (load {before[0]:.1f}): it is measured, too",
                    file=sys.stderr,
                )
            rows, of_guest = measured(kernel, cases, options)
            frame = pl.DataFrame(rows, infer_schema_length=None)
            folder.write_table(frame, "runs", "parquet")
            folder.write_manifest(how_made(plan, kernel, of_guest, rows, before))
            folder.commit()
            print_table(frame)
            print(f"The table is {folder.folder / 'runs.parquet'}{folder.why_there}")
    except UnavailableError as error:
        print(f"real_read: skipped: {error}")
        return SKIPPED
    except (BuildError, GuestError, TimeoutError, UserError) as error:
        print(f"real_read: {error}", file=sys.stderr)
        return 1
    return 0


# --- the work ---------------------------------------------------------------------------------------------------------


def measured(
    kernel: Kernel, cases: Sequence[ReadCase], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a case and round, and what the guest says of itself."""
    with tempfile.TemporaryDirectory(prefix="real-read-") as name:
        job, reader = Path(name, "job.json"), Path(name, "read_streams")
        job.write_text(json.dumps({"rounds": options.rounds, "settings": settings(cases)}), encoding="utf-8")
        compile_reader(reader)
        lines = Lines()
        outcome = guest.run(
            UserModeLinux(
                kernel=kernel,
                modules=guest.standard_modules(kernel),
                cpus=options.cpus,
                memory_mib=options.memory,
                writable=Path(name),
                timeout_s=SECONDS_A_ROUND * options.rounds,
            ),
            [sys.executable, str(GUEST_PART), str(job), str(reader)],
            lines.add,
        )
    if outcome.status or outcome.complaints:
        last = "\n".join([*lines.others[-20:], *outcome.complaints])
        raise GuestError(f"the measurement ended with status {outcome.status}:\n{last}")
    return lines.rows, lines.kernel


def settings(cases: Sequence[ReadCase]) -> list[dict[str, Any]]:
    """The job of the guest: cases whose devices are made alike are one setting."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        what = {"parameters": parameters(case), "devices": case.devices, "saved_before": not case.save_mib_s}
        setting = found.setdefault(json.dumps(what), what | {"reads": []})
        streams = 0 if case.kind == "v2" else case.streams
        setting["reads"].append({"streams": streams, "read_bytes": case.read_kib * 1024, "case": asdict(case)})
    return list(found.values())


def parameters(case: ReadCase) -> Parameters:
    """Of the driver's module: the scenario that is simulated, of one device."""
    return module_parameters(load(grid.BASE, grid.settings(replace(case, devices=1), CopyCost())))


def compile_reader(program: Path) -> None:
    """read_streams.c as a static program: the guest has the libraries of this machine, or not."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError("there is no C compiler")
    command = [compiler, "-O2", "-Wall", "-static", "-pthread", f"-I{HEADERS}", str(READER), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}:\n{done.stderr}")


class Lines:
    """What the guest prints: rows, its kernel, how far it is; all else is what went wrong."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.kernel: dict[str, Any] = {}
        self.others: list[str] = []
        self._rest = b""

    def add(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace").strip())

    def _line(self, line: str) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            self.others.append(line)
            return
        if "row" in told:
            self.rows.append(told["row"])
        self.kernel |= told.get("kernel", {})
        if "progress" in told and sys.stderr.isatty():
            print(f"\r{100 * told['progress']:.0f} %", end="", file=sys.stderr, flush=True)


# --- what comes of it -------------------------------------------------------------------------------------------------


def how_made(
    plan: Plan, kernel: Kernel, of_guest: dict[str, Any], rows: Sequence[dict[str, Any]], before: tuple[float, ...]
) -> dict[str, Any]:
    """The manifest: enough to know what was measured, and to measure it again."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": plan.line,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": len(rows) == plan.runs,
        "quick": plan.quick,
        "experiment": "real_read",
        "runs": len(rows),
        "runs_planned": plan.runs,
        "guest": {**of_guest, "package": kernel.debian_version, "config": kernel.name.rpartition("-")[2]},
        "driver": {"name": MODULE, "source": build.module_digest()},
        "host": {
            "cpus": os.cpu_count(),
            "cpu": cpu_model(),
            "load_before": [round(each, 1) for each in before],
            "load_after": [round(each, 1) for each in os.getloadavg()],
        },
        "versions": manifest.versions(),
        "git_revision": manifest.git_revision(),
    }


def cpu_model() -> str:
    """What /proc/cpuinfo calls the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(frame: pl.DataFrame) -> None:
    """Medians, a line a case."""
    for row in grid.medians(frame).iter_rows(named=True):
        case = grid.case_of(row)
        name = "v2" if case.kind == "v2" else f"N = {case.streams}"
        print(
            f"{case.where:75} {name:5} {row['mib_per_s']:7.0f} MiB/s ({row['least_mib_per_s']:.0f} to "
            f"{row['most_mib_per_s']:.0f}), {row['reads']:.0f} reads, {row['voluntary_switches']:.0f} + "
            f"{row['involuntary_switches']:.0f} switches, {row['commands_at_once']:.0f} commands at once, "
            f"waited {row['lock_wait_ns'] / 1e6:.1f} ms"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
