# SPDX-License-Identifier: GPL-2.0-or-later
"""The answers of a driver, kept: for machines where no kernel can be had that has it.

In the guest: `python -m tests.conformance.record DEVICE --out FILE`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sim.real.sysfs import find, module_parameters
from tests.conformance.calls import GROUPS
from tests.conformance.differences import Answers
from tests.conformance.kernel import kernel_answers

FOLDER = Path(__file__).resolve().parents[1] / "data" / "conformance"


@dataclass(frozen=True)
class Record:
    """What a driver answered."""

    driver: str
    release: str
    """Of the kernel, as uname(2) says."""
    parameters: Mapping[str, str]
    """The module's, when it was asked."""
    answers: Answers

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.driver}-{self.release}.json"


def ask(device: str) -> Record:
    """Make all calls to a device of the running kernel."""
    entry = find(device)
    answers = {group: kernel_answers(device, cases) for group, cases in GROUPS.items()}
    return Record(entry.module or entry.driver, os.uname().release, module_parameters(entry.module), answers)


def write(record: Record, path: Path) -> None:
    """Write it, the cases by answer: few answers, many cases."""
    groups = {}
    for group, cases in record.answers.items():
        by_answer = defaultdict(list)
        for case, answer in cases.items():
            by_answer[answer].append(case)
        groups[group] = by_answer
    what = {
        "driver": record.driver,
        "release": record.release,
        "parameters": dict(record.parameters),
        "answers": groups,
    }
    path.write_text(json.dumps(what, indent=0) + "\n", encoding="utf-8")


def read(path: Path) -> Record:
    """Read what was written."""
    what = json.loads(path.read_text(encoding="utf-8"))
    answers = {
        group: {case: answer for answer, cases in by_answer.items() for case in cases}
        for group, by_answer in what["answers"].items()
    }
    return Record(what["driver"], what["release"], what["parameters"], answers)


def records() -> list[Path]:
    """Those that are kept."""
    return sorted(FOLDER.glob("*.json"))


def main() -> None:
    """Ask a device, and write what it answered."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.record", description=__doc__)
    parser.add_argument("device", help="its name in sysfs, /dev/vfio/devices/vfioN, or a path in sysfs")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the file is DRIVER-RELEASE.json in it"
    )
    arguments = parser.parse_args()
    record = ask(arguments.device)
    write(record, arguments.out / record.name)


if __name__ == "__main__":
    main()
