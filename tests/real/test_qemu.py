# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified QEMUs migrate devices of the sample driver: what docs/v2.md says of QEMU is so, and the project's VMMs
make the same calls on the same driver in the same kernel."""

from __future__ import annotations

import pytest

from tests.real import mdev
from tests.real.qemu import project
from tests.real.qemu.cases import CASES, Case, End
from tests.real.qemu.compare import compare, conditions_of
from tests.real.qemu.facts import Seen, shown_by
from tests.real.qemu.phases import phased
from tests.real.qemu.run import ended_as_expected, is_example, qemu_of, run_qemu

RUNS = [
    pytest.param(case, version, id=f"{case.name}-{version}", marks=[] if version in case.short else [pytest.mark.slow])
    for case in CASES
    for version in case.versions
]


@pytest.fixture(autouse=True)
def driver() -> None:
    if not mdev.supported(mdev.SAMPLE):
        pytest.skip(f"this kernel has no module {mdev.SAMPLE_MODULE}")


@pytest.mark.parametrize(("case", "version"), RUNS)
def test_qemu_does_what_the_rules_say_and_the_project_does_the_same(case: Case, version: str) -> None:
    qemu = qemu_of(version)
    if qemu is None:
        pytest.skip(f"no QEMU {version} in the cache: make qemu")
    record = run_qemu(case, qemu)
    assert ended_as_expected(case, record), (record.status, record.source_status, record.target_status, record.error)
    assert is_example(case, record), "REINIT came before the decision in each try"
    seen = Seen(record)
    for fact in shown_by(seen):
        fact.check(seen)
    if End.REFUSED in case.ends:
        return
    ours = project.migrate(case, version)
    if case.project_differs:
        assert [side for side in ("source", "target") if getattr(ours, f"{side}_runs")] == case.project_runs.split()
        return
    assert (ours.status, ours.source_runs, ours.target_runs) == (record.status, record.source_runs, record.target_runs)
    if record.target_runs:
        half = case.devices
        digests = list(ours.digests.values())
        assert digests[:half] == digests[half:]
    findings = compare(phased(record.calls), phased(ours.calls), conditions_of(case, same_driver=True))
    assert [str(finding) for finding in findings if finding.wrong] == []
