# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the cases in a guest, with QEMU and with the project's VMMs, and keep a record of each run.

    python -m tests.real.qemu.run --out FOLDER             # all cases, in a guest: about two minutes
    python -m tests.real.qemu.run --out FOLDER ack reinit  # these

FOLDER/CASE-VERSION/ has what QEMU did, FOLDER/CASE-VERSION-project/ what the project did, under that version's rules.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from kernel import guest
from kernel.cache import say
from kernel.qemu_packages import cached
from tests.real.qemu import project
from tests.real.qemu.cases import BY_NAME, CASES, Case, End
from tests.real.qemu.migrate import Limits, Qemu, Record, migrate
from tests.real.qemu.phases import Phase, phased
from tests.real.qemu.qmp import HungError, QemuError

TRIES = 4
"""Of a case whose REINIT has to come with the last PRECOPY_INFO: on a loaded machine it may come before that.

Also of one in which QEMU hangs (docs/v2.md, what was seen of multifd).
"""


def installed() -> dict[str, Qemu]:
    """The QEMUs in the cache, by the versions that cases name: `10.0`, `11.1`."""
    return {".".join(qemu.version.split(".")[:2]): qemu for qemu in cached()}


def qemu_of(version: str) -> Qemu | None:
    """The QEMU of a version that a case names; for 11.1 also a newer one. None if the cache has none."""
    have = installed()
    if version == "11.1":
        newer = [qemu for name, qemu in have.items() if tuple(map(int, name.split("."))) >= (11, 1)]
        return newer[-1] if newer else None
    return have.get(version)


def is_example(case: Case, record: Record) -> bool:
    """Whether the record shows what the case is there for."""
    if not case.late_reinit:
        return True
    return any(call.value("flags") for call in phased(record.calls)[Phase.STOP] if call.name == "precopy_info")


def run_qemu(case: Case, qemu: Qemu) -> Record:
    """The case with QEMU. Raises QemuError."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(HungError):
            record = run_once(case, qemu)
            if is_example(case, record):
                return record
    return run_once(case, qemu)


def run_once(case: Case, qemu: Qemu) -> Record:
    """The case with QEMU at both ends."""
    with tempfile.TemporaryDirectory(prefix="qemu-") as folder:
        return migrate(case, qemu, qemu, Path(folder), Limits())


def ended_as_expected(case: Case, record: Record) -> bool:
    """Whether QEMU ended, and the guest runs, as the case says."""
    return (
        record.status in case.ends
        and (record.source_runs, record.target_runs) == (case.source_runs, case.target_runs)
        and case.error in record.error
    )


def run_here(names: Sequence[str], out: Path) -> int:
    """Run the cases in this kernel, and write their records. 1 if one did not end as it should."""
    wrong = 0
    for case in [BY_NAME[name] for name in names] if names else CASES:
        for version in case.versions:
            qemu, begun = qemu_of(version), time.monotonic()
            if qemu is None:
                say(f"{case.name}: no QEMU {version} in the cache: make qemu")
                continue
            try:
                record = run_qemu(case, qemu)
            except QemuError as error:
                say(f"{case.name}: QEMU {qemu.version}: {error}")
                wrong += 1
                continue
            record.write(out / f"{case.name}-{version}")
            good = ended_as_expected(case, record) and is_example(case, record)
            wrong += not good
            told = "" if good else f", not as expected: source {record.source_status}, target {record.target_status}"
            said = "" if good else f" {record.error[:500]}"
            say(f"{case.name}: QEMU {qemu.version}: {record.status}, {time.monotonic() - begun:.1f} s{told}{said}")
            if End.REFUSED not in case.ends:
                record = project.migrate(case, version)
                record.write(out / f"{case.name}-{version}-project")
                say(f"{case.name}: the project as {record.source_qemu}: {record.status} {record.error}".rstrip())
    return int(wrong > 0)


def main(arguments: Sequence[str]) -> int:
    """Run them, in a guest if this is none. 1 if a migration did not end as it should."""
    return in_guest("tests.real.qemu.run", "QEMU and the project, compared.", BY_NAME, run_here, None, arguments)


def in_guest(
    module: str,
    description: str,
    names: Collection[str],
    run: Callable[[Sequence[str], Path], int],
    out: Path | None,
    arguments: Sequence[str],
) -> int:
    """The command line of a module that runs cases in a guest. `run` is called in the guest, with the names of some
    cases (none: all) and the folder to write to; `out` is that folder if the arguments name none."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--out", type=Path, default=out, required=out is None, help="the folder for what is made")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}; none: all")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.cases if name not in names]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(names)}")
    if "PROTO_V3_GUEST" in os.environ:
        return run(options.cases, options.out)
    folder = options.out.absolute()
    command = [sys.executable, "-m", module, "--out", str(folder), *options.cases]
    return guest.main(["--out", str(folder), "--memory", "2048", "--timeout", "1200", "--", *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
