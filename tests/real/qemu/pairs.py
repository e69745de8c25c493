# SPDX-License-Identifier: GPL-2.0-or-later
"""Pairs of QEMU's logs, of migrations whose times, sizes and rates are known: what `proto-v3 fit` has to give back.

python -m tests.real.qemu.pairs            # in a guest: makes all of them anew, into tests/data/logs/
python -m tests.real.qemu.pairs one multifd --out out/pairs

Of each pair its folder has both logs as QEMU wrote them (devices are a0, a1 at the source and b0, b1 at the target),
QMP's events, the source's command line, and what is known: the driver's parameters, what the case sets, how it ended.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.logs import how
from kernel.build import PROJECT
from kernel.cache import say
from tests.real.qemu.cases import ACK, BOTH, MULTIFD, NEW, Act, Case, End
from tests.real.qemu.migrate import SIDES, Limits, Qemu, Record, migrate
from tests.real.qemu.qmp import HungError, QemuError
from tests.real.qemu.run import TRIES, ended_as_expected, in_guest, is_example, qemu_of

FOLDER = PROJECT / "tests/data/logs"
PATTERNS = (*how.PATTERNS, "migration_cancel*")
"""What a user is told to trace (`proto-v3 fit --how`), and that the user cancelled."""

ARCS = {
    "suspend_us": 30_000,
    "quiesce_us": 50_000,
    "stop_us": 70_000,
    "load_finish_us": 90_000,
    "resume_us": 40_000,
    "run_us": 60_000,
}
"""No two are alike."""
RATES = {"save_mib_s": 64, "load_mib_s": 128}
EIGHT_MIB = {"size_kib": 8192}
LONG = {"downtime-limit": 20_000}
TRANSFER = "x-migration-multifd-transfer=on"
CHANNELS = {"multifd-channels": 3}

PAIRS = (
    Case("pair", "two devices, one channel, no ack", BOTH, 2, {**EIGHT_MIB, **ARCS, **RATES}, parameters=LONG),
    Case(
        "one",
        "one device that writes, switchover-ack, critical data that takes a while to set up",
        BOTH,
        driver={**EIGHT_MIB, **ARCS, "dirty_kib_s": 1024, "critical_setup_us": 50_000, "initial": "critical"},
        capabilities=ACK,
        parameters={"downtime-limit": 3000},
    ),
    Case(
        "multifd",
        "two devices without PRE_COPY, their state on multifd channels",
        BOTH,
        2,
        {**EIGHT_MIB, **ARCS, "save_mib_s": 16, "load_mib_s": 8, "precopy": 0},
        capabilities=(*MULTIFD, "return-path"),
        parameters={**CHANNELS, **LONG},
        options=TRANSFER,
    ),
    Case(
        "multifd-precopy",
        "two devices with PRE_COPY, what is left at the stop on multifd channels",
        NEW,
        2,
        {**EIGHT_MIB, **ARCS, "load_mib_s": 8, "dirty_kib_s": 2048},
        capabilities=(*MULTIFD, *ACK),
        parameters={**CHANNELS, **LONG},
        options=TRANSFER,
    ),
    Case(
        "no-precopy",
        "one device without PRE_COPY, one channel",
        BOTH,
        driver={**EIGHT_MIB, **ARCS, **RATES, "precopy": 0},
        capabilities=("return-path",),
        parameters=LONG,
    ),
    Case(
        "reinit",
        "REINIT seen by an exact query: a second ack",
        NEW,
        driver={**ARCS, "size_kib": 512, "reinit_at": 2},
        capabilities=ACK,
    ),
    Case(
        "late-reinit",
        "REINIT once the vCPUs are stopped: the migration fails",
        NEW,
        devices=2,
        driver={**ARCS, "size_kib": 512, "reinit_at": 3},
        late_reinit=True,
        capabilities=ACK,
        ends=(End.FAILED,),
        source_runs=True,
        target_runs=False,
        error="Switchover ACK was requested by",
    ),
    Case(
        "cancelled",
        "migrate_cancel in pre-copy",
        BOTH,
        driver={**ARCS, "size_kib": 16384, "save_mib_s": 4},
        parameters={"downtime-limit": 1},
        act=Act.CANCEL_PRECOPY,
        ends=(End.CANCELLED,),
        source_runs=True,
        target_runs=False,
    ),
    Case(
        "killed",
        "the target is killed in pre-copy",
        NEW,
        driver={**ARCS, "size_kib": 16384, "save_mib_s": 4},
        parameters={"downtime-limit": 1},
        act=Act.KILL_PRECOPY,
        ends=(End.FAILED,),
        source_runs=True,
        target_runs=False,
    ),
    Case(
        "events",
        "as `pair`, with VFIO_MIGRATION events over QMP",
        NEW,
        2,
        {**EIGHT_MIB, **ARCS, **RATES},
        capabilities=("return-path",),
        parameters=LONG,
        options="migration-events=on",
    ),
)
BY_NAME = {case.name: case for case in PAIRS}


@dataclass(frozen=True)
class LogPair:
    """A pair and what is known of it."""

    folder: Path

    @property
    def known(self) -> dict[str, Any]:
        """`driver`: the parameters of the module, as texts; `devices`, `capabilities`, `parameters`, `machine`,
        `options`: of the case; `status`, `error`, `query_migrate`: how it ended; `qemu`, `kernel`: versions.
        """
        known: dict[str, Any] = json.loads((self.folder / "known.json").read_text(encoding="utf-8"))
        return known

    def us(self, parameter: str) -> int:
        """One of the driver's numbers."""
        return int(self.known["driver"][parameter])

    def unpacked(self, into: Path) -> tuple[Path, Path]:
        """The logs of the source and of the target, as files."""
        made = []
        for side in SIDES:
            made.append(into / f"{side}.log")
            made[-1].write_bytes(gzip.decompress((self.folder / f"{side}.log.gz").read_bytes()))
        return made[0], made[1]


def kept() -> list[LogPair]:
    """Those of tests/data/logs, by name."""
    return [LogPair(path.parent) for path in sorted(FOLDER.glob("*/known.json"))]


def make(case: Case, qemu: Qemu, folder: Path) -> Record:
    """Run the case and write its pair into the folder. Raises QemuError."""
    with tempfile.TemporaryDirectory(prefix="qemu-") as work:
        record = migrate(case, qemu, qemu, Path(work), Limits(), PATTERNS)
        folder.mkdir(parents=True, exist_ok=True)
        for side in SIDES:
            log = (Path(work) / f"{side}.log").read_bytes()
            (folder / f"{side}.log.gz").write_bytes(gzip.compress(log, mtime=0))
        for name in ("source.jsonl", "target.jsonl", "cmdline.txt"):
            (folder / name).write_bytes((Path(work) / name).read_bytes())
    known = {
        "case": case.name,
        "qemu": record.source_qemu,
        "kernel": record.kernel,
        "devices": case.devices,
        "driver": record.parameters,
        "machine": case.machine,
        "capabilities": case.capabilities,
        "parameters": dict(case.parameters),
        "options": case.options,
        "status": record.status,
        "error": record.error,
        "query_migrate": record.query_migrate,
    }
    (folder / "known.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return record


def make_good(case: Case, qemu: Qemu, folder: Path) -> bool:
    """Run the case until it is what it is there for; False if it never is."""
    for _ in range(TRIES):
        with contextlib.suppress(HungError):
            record = make(case, qemu, folder)
            if is_example(case, record) and ended_as_expected(case, record):
                return True
    return False


def make_here(names: Sequence[str], out: Path) -> int:
    """Make these pairs in this kernel. 1 if one did not end as it should."""
    wrong = 0
    for case in [BY_NAME[name] for name in names] if names else PAIRS:
        for version in case.versions:
            qemu = qemu_of(version)
            if qemu is None:
                say(f"{case.name}: no QEMU {version} in the cache: make qemu")
                continue
            try:
                good = make_good(case, qemu, out / f"{case.name}-{version}")
            except QemuError as error:
                say(f"{case.name}: QEMU {qemu.version}: {error}")
                good = False
            say(f"{case.name}: QEMU {qemu.version}: {'made' if good else 'not as it should be'}")
            wrong += not good
    return int(wrong > 0)


def main(arguments: Sequence[str]) -> int:
    """Make them, in a guest if this is none. 1 if a migration did not end as it should."""
    return in_guest("tests.real.qemu.pairs", "Pairs of QEMU's logs.", BY_NAME, make_here, FOLDER, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
