# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison as a page: what QEMU, and the project's VMMs on the same driver and on the simulated device, did.

python -m tests.real.qemu.run --out out/qemu                             # about three minutes
python -m tests.real.qemu.report out/qemu --out results/real/qemu
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.real.qemu import simulated
from tests.real.qemu.cases import CASES, Act, Case
from tests.real.qemu.compare import Finding, compare, conditions_of
from tests.real.qemu.facts import Seen, shown_by
from tests.real.qemu.migrate import Record
from tests.real.qemu.phases import phased


@dataclass(frozen=True)
class Compared:
    """One case under one version of QEMU."""

    case: Case
    qemu: Record
    project: Record | None
    """On the same driver; None where QEMU refuses to start."""
    simulated: Record | None
    """None also where the simulation has no such failure."""

    def findings(self, other: Record) -> list[Finding]:
        """QEMU against one of the others."""
        conditions = conditions_of(self.case, same_driver=other is self.project)
        return compare(phased(self.qemu.calls), phased(other.calls), conditions)


def load(folder: Path) -> list[Compared]:
    """What `tests.real.qemu.run` wrote, with the simulations."""
    found = []
    for case in CASES:
        for version in case.versions:
            path = folder / f"{case.name}-{version}"
            if not (path / "record.json").exists():
                continue
            beside = folder / f"{case.name}-{version}-project"
            project = Record.load(beside) if beside.exists() else None
            model = None
            if project is not None and case.act in (None, Act.CANCEL_PRECOPY):
                model = simulated.migrate(case, version)
            found.append(Compared(case, Record.load(path), project, model))
    return found


def verdict(case: Case, finding: Finding) -> str:
    """In words."""
    if finding.same:
        return "same" if finding.qemu == finding.other else "near"
    if finding.rule.differs_because:
        return f"may differ: {finding.rule.differs_because}"
    return f"differs: {case.project_differs}" if case.project_differs else "DIFFERS"


def runs(record: Record) -> str:
    """Where the guest runs at the end."""
    sides = [side for side, running in (("source", record.source_runs), ("target", record.target_runs)) if running]
    return " and ".join(sides) or "nowhere"


def cell(value: Any) -> str:
    """A value in a table of Markdown."""
    if isinstance(value, dict):
        value = "; ".join(f"{key}: {each}" for key, each in value.items())
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    return str(value).replace("|", "/") or "-"


def page(compared: Sequence[Compared]) -> str:
    """The page, in Markdown."""
    lines = [
        "# QEMU's calls and the project's",
        "",
        "By phase, in the sample driver's log of calls; a0 and a1 are the source's devices, b0 and b1 the target's. The"
        " rules of the comparison are in tests/real/qemu/compare.py.",
    ]
    for each in compared:
        case, qemu = each.case, each.qemu
        lines += ["", f"## {case.name}, QEMU {qemu.source_qemu}", "", f"{case.text}.", ""]
        lines += [f"QEMU: {qemu.status}; the guest runs at: {runs(qemu)}."]
        if facts := [fact.name.replace("_", " ") for fact in shown_by(Seen(qemu))]:
            lines += ["", f"Shows: {'; '.join(facts)}."]
        for name, other in (("the same driver", each.project), ("the simulated device", each.simulated)):
            if other is None:
                continue
            lines += [
                "",
                f"The project on {name}, {other.source_qemu}: {other.status}; the guest runs at: {runs(other)}.",
            ]
            lines += ["", f"| phase | what | QEMU | the project on {name} | |", "|---|---|---|---|---|"]
            for finding in each.findings(other):
                if finding.qemu or finding.other:
                    row = (finding.rule.phase, finding.rule.aspect, finding.qemu, finding.other, verdict(case, finding))
                    lines.append(f"| {' | '.join(map(cell, row))} |")
    return "\n".join(lines) + "\n"


def manifest(compared: Sequence[Compared]) -> dict[str, Any]:
    """What was compared, and how it came out."""
    wrong = [
        f"{each.case.name} ({each.qemu.source_qemu}): {finding}"
        for each in compared
        if not each.case.project_differs
        for other in (each.project, each.simulated)
        if other is not None
        for finding in each.findings(other)
        if finding.wrong
    ]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": "python -m tests.real.qemu.run && python -m tests.real.qemu.report",
        "commit": commit.stdout.strip(),
        "qemu": sorted({each.qemu.source_qemu for each in compared}),
        "kernel": sorted({each.qemu.kernel for each in compared}),
        "runs": {
            f"{each.case.name} ({each.qemu.source_qemu})": {
                "status": each.qemu.status,
                "guest runs at": runs(each.qemu),
                "project": each.project.status if each.project else None,
                "project's guest runs at": runs(each.project) if each.project else None,
                "driver": each.qemu.parameters,
            }
            for each in compared
        },
        "against the rules": wrong,
    }


def main(arguments: Sequence[str]) -> int:
    """Write comparison.md and manifest.json. 1 if something differs against the rules."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.real.qemu.report", description="QEMU and the project, compared."
    )
    parser.add_argument("records", type=Path, help="the folder that tests.real.qemu.run wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the page and its manifest")
    options = parser.parse_args(arguments)
    compared = load(options.records)
    if not compared:
        parser.error(f"{options.records} has no record of a case")
    options.out.mkdir(parents=True, exist_ok=True)
    told = manifest(compared)
    (options.out / "comparison.md").write_text(page(compared), encoding="utf-8")
    (options.out / "manifest.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for line in told["against the rules"]:
        print(f"differs: {line}")
    print(f"{len(compared)} runs of QEMU compared; {len(told['against the rules'])} differences against the rules")
    return int(bool(told["against the rules"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
