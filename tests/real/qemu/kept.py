# SPDX-License-Identifier: GPL-2.0-or-later
"""The kept records of QEMU's migrations: one of each case and version.

python -m tests.real.qemu.run --out out/qemu && python -m tests.real.qemu.kept out/qemu   # keeps new ones
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.real.qemu.calls import without_idle_rounds
from tests.real.qemu.cases import CASES
from tests.real.qemu.facts import Seen
from tests.real.qemu.migrate import Record
from tests.real.qemu.trace import thinned

FOLDER = Path(__file__).resolve().parents[2] / "data" / "qemu"


def kept() -> list[Path]:
    """Their folders."""
    return sorted(path.parent for path in FOLDER.glob("*/record.json"))


@functools.cache
def records() -> dict[str, Seen]:
    """Them, by the names of their folders."""
    return {path.name: Seen(Record.load(path)) for path in kept()}


def main(arguments: Sequence[str]) -> int:
    """Keep the records of a folder that `tests.real.qemu.run` wrote."""
    if len(arguments) != 1:
        sys.exit("usage: python -m tests.real.qemu.kept FOLDER")
    for case in CASES:
        for version in case.versions:
            name = f"{case.name}-{version}"
            record = Record.load(Path(arguments[0]) / name)
            record.calls = without_idle_rounds(record.calls)
            record.source_trace = thinned(record.source_trace)
            record.write(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
