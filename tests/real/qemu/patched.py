# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU with the project's own patches (kernel/qemu_patches), and without, in turns.

    python -m tests.real.qemu.patched --out out/patched                  # all, in a guest: about eight minutes
    python -m tests.real.qemu.patched --out out/patched stop-2 --repeats 1

FOLDER/CASE/BUILD/TURN has what QEMU did and both its logs, as `tests.real.qemu.pairs` keeps them. In each turn each
build runs once, so that a slow spell of the machine falls on all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernel import guest, qemu_build
from kernel.cache import say
from kernel.qemu_build import UNPATCHED
from tests.real.qemu import pairs
from tests.real.qemu.cases import ACK, MULTIFD, Case, End
from tests.real.qemu.migrate import Qemu
from tests.real.qemu.pairs import TRANSFER
from tests.real.qemu.qmp import HungError, QemuError
from tests.real.qemu.run import TRIES, ended_as_expected, is_example, qemu_of

DEBIAN = "debian-11.1"
"""Debian's own QEMU 11.1 or newer, which has REINIT: what our reinit.patch is held against."""
REPEATS = 5
QUIESCE_US, STOP_US = 30_000, 70_000
STATE = {
    "size_kib": 1024,
    "precopy": 0,
    "quiesce_us": QUIESCE_US,
    "stop_us": STOP_US,
    "save_mib_s": 8,
    "load_mib_s": 16,
    "engines": 1,
    "load_finish_us": 20_000,
}
"""Of devices that take 100 ms to be stopped, and whose saves take 125 ms each, one after the other. Little data and a
slow firmware, so that what is emulated takes most of the time, and not the work of a machine of two cores."""


def stopping(devices: int) -> Case:
    """Devices without PRE_COPY, whose state goes by multifd: all of it in the downtime."""
    return Case(
        f"stop-{devices}",
        f"{devices} devices of one firmware, all of their state in the downtime",
        devices=devices,
        driver=STATE,
        shared_firmware=True,
        capabilities=(*MULTIFD, "return-path"),
        parameters={"multifd-channels": 1 + devices, "downtime-limit": 1},
        later={"downtime-limit": 60_000},
        unix_socket=True,
        options=TRANSFER,
    )


REINIT = Case(
    "late-reinit",
    "two devices, REINIT once the vCPUs are stopped",
    devices=2,
    driver={"size_kib": 512, "reinit_at": 3, "quiesce_us": QUIESCE_US, "suspend_us": STOP_US},
    late_reinit=True,
    capabilities=ACK,
)


@dataclass(frozen=True)
class Trial:
    """A case, and the builds that run it; the first is what the others are held against."""

    case: Case
    builds: tuple[str, ...]
    completes: tuple[str, ...]
    """The builds with which the migration completes."""


TRIALS = {
    trial.case.name: trial
    for trial in (
        *(Trial(stopping(devices), *2 * ((UNPATCHED, "early", "parallel-stop"),)) for devices in (2, 4)),
        Trial(REINIT, ("reinit", "retry", DEBIAN), ("retry",)),
    )
}


def builds() -> Mapping[str, Qemu]:
    """What the cache has of all builds. {}: none of ours."""
    built: dict[str, Qemu] = dict(qemu_build.cached())
    debian = qemu_of("11.1")
    return {**built, DEBIAN: debian} if built and debian else built


def run_trial(trial: Trial, build: str, folder: Path) -> bool:
    """One migration, kept in `folder`; whether it ended as it should. Raises QemuError."""
    qemu, completes = builds()[build], build in trial.completes
    case = replace(
        trial.case,
        ends=(End.COMPLETED if completes else End.FAILED,),
        source_runs=not completes,
        target_runs=completes,
    )
    for _ in range(TRIES):
        with contextlib.suppress(HungError):
            record = pairs.make(case, qemu, folder)
            record.write(folder)
            if is_example(case, record):
                break
        shutil.rmtree(folder, ignore_errors=True)
    else:
        raise QemuError(f"{case.name}: {build}: no run shows what it is there for")
    half, digests = case.devices, list(record.digests.values())
    return ended_as_expected(case, record) and (not completes or digests[:half] == digests[half:])


def run_here(names: Sequence[str], repeats: int, out: Path) -> int:
    """Run trials in this kernel. 1 if a migration did not end as it should."""
    wrong, have = 0, builds()
    if not have:
        say("patched: skipped: no QEMU of ours in the cache: make qemu")
        return 0
    for turn in range(repeats):
        for trial in [TRIALS[name] for name in names or TRIALS]:
            for build in [each for each in trial.builds if each in have]:
                try:
                    good = run_trial(trial, build, out / trial.case.name / build / str(turn))
                except QemuError as error:
                    say(str(error))
                    good = False
                say(
                    f"{trial.case.name}: {build}: turn {turn + 1} of {repeats}{'' if good else ': not as it should be'}"
                )
                wrong += not good
    return int(wrong > 0)


def main(arguments: Sequence[str]) -> int:
    """Run them, in a guest if this is none. 1 if a migration did not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m tests.real.qemu.patched", description="Patched QEMUs, in turns.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for what is made")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(TRIALS)}; none: all")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in TRIALS]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(TRIALS)}")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    if "PROTO_V3_GUEST" in os.environ:
        return run_here(options.cases, options.repeats, options.out)
    folder = options.out.absolute()
    command = [sys.executable, "-m", "tests.real.qemu.patched", "--out", str(folder)]
    command += ["--repeats", str(options.repeats), *options.cases]
    return guest.main(["--out", str(folder), "--memory", "2048", "--timeout", "3600", "--", *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
