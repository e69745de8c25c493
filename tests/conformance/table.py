# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison as a page: how many calls each driver answers as the simulated device does, and each difference.

`python -m tests.conformance.table --out FOLDER` compares the kept answers of the drivers (tests/data/conformance) with
the simulated device of today; conformance.md, conformance.json and manifest.json are written into the folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.runs.files import replacing
from experiments.runs.manifest import git_revision, versions
from tests.conformance.calls import GROUPS
from tests.conformance.differences import Judged, judge
from tests.conformance.record import Record, read, records
from tests.conformance.simulated import LIKE, simulated_answers

HEAD = """\
# The simulated device against drivers of Linux

The same {calls} calls (`tests/conformance/calls.py`) to drivers of a kernel and to the simulated device: errno,
returned numbers as far as they are no device's own, and the state afterwards. A case is one line of calls on a device
that was just opened. What differs is listed with its reason (`tests/conformance/differences.py`); a test fails for any
other difference, and for one that is no longer there. Written by `{command}`.
"""
MEANINGS = {
    "features": "VFIO_DEVICE_FEATURE: index, operations, argsz",
    "cells": "SET_STATE: each state to each target",
    "walks": "two SET_STATEs from each state",
    "infos": "PRECOPY_INFO: state, session, argsz, flags, opt-in",
    "reads": "read(): sizes, ends, stale fds, wrong direction",
    "writes": "write(): whole, cut, altered, too much; then the state",
    "polls": "epoll",
    "lives": "close, reset, the device closed and opened",
    "sizes": "MIG_DATA_SIZE against what came",
    "streams": "v3's ioctls on v2's fds",
    "v3_settings": "MIG_STREAMS, in each state",
    "v3_ioctls": "v3's ioctls: state, fd, argsz, flags",
    "v3_bytes": "v3: read(), write(), poll(), close() on several fds",
    "v3_error": "v3: from ERROR",
}


def page(judged: Sequence[tuple[Record, Judged]], command: str) -> str:
    """conformance.md."""
    lines = [HEAD.format(calls=sum(len(list(cases)) for cases in GROUPS.values()), command=command)]
    names = [f"{record.driver}, Linux {record.release}" for record, _ in judged]
    lines += [f"| calls | | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    for group in GROUPS:
        counts = [f"{each.same[group]} of {each.cases[group]}" for _, each in judged]
        lines.append(f"| {group} | {MEANINGS[group]} | {' | '.join(counts)} |")
    totals = [f"**{sum(each.same.values())} of {sum(each.cases.values())}**" for _, each in judged]
    lines.append(f"| all | | {' | '.join(totals)} |")
    for record, each in judged:
        lines += [
            f"\n## {record.driver}, Linux {record.release}\n",
            "| calls | cases | driver | simulated device | why |\n|---|---:|---|---|---|",
        ]
        lines += [
            f"| {one.group}: `{one.cases}` | {count} | `{one.kernel}` | `{one.simulated}` | {one.why} |"
            for one, count in each.listed.items()
        ]
        lines += [f"| {group}: `{case}` | 1 | `{a}` | `{b}` | **not listed** |" for group, case, a, b in each.unlisted]
    return "\n".join(lines) + "\n"


def plain(judged: Sequence[tuple[Record, Judged]]) -> list[dict[str, Any]]:
    """conformance.json."""
    return [
        {
            "driver": record.driver,
            "release": record.release,
            "parameters": dict(record.parameters),
            "cases": each.cases,
            "same": each.same,
            "differences": [{**asdict(one), "found": count} for one, count in each.listed.items()],
            "unlisted": [list(one) for one in each.unlisted],
        }
        for record, each in judged
    ]


def compared() -> list[tuple[Record, Judged]]:
    """Each kept record, judged."""
    found = []
    for record in map(read, records()):
        simulated = {group: simulated_answers(record.driver, cases) for group, cases in GROUPS.items()}
        found.append((record, judge(record.driver, record.release, record.answers, simulated)))
    return found


def main() -> None:
    """Compare, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.table", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "tests.conformance.table", *sys.argv[1:]])
    judged = compared()
    manifest = {
        "command": command,
        "records": [path.name for path in records()],
        "simulated": LIKE,
        "versions": versions(),
        "git_revision": git_revision(),
    }
    for name, text in {
        "conformance.md": page(judged, command),
        "conformance.json": json.dumps(plain(judged), indent=1) + "\n",
        "manifest.json": json.dumps(manifest, indent=1) + "\n",
    }.items():
        with replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8")
    for record, each in judged:
        told = f"{sum(each.same.values())} of {sum(each.cases.values())} alike"
        print(f"{record.driver}, Linux {record.release}: {told}, {len(each.unlisted)} not listed")


if __name__ == "__main__":
    main()
