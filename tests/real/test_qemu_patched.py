# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU with the project's own patches: each does what its first line says, and the target is the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.qemu_build import UNPATCHED
from tests.real import mdev
from tests.real.qemu.calls import LoggedCall
from tests.real.qemu.cases import Act
from tests.real.qemu.migrate import Limits, Record, migrate
from tests.real.qemu.patched import REINIT, TRIALS, builds, run_trial, stopping

STOP = stopping(2).name


@pytest.fixture(autouse=True)
def driver() -> None:
    if not mdev.supported(mdev.SAMPLE):
        pytest.skip(f"this kernel has no module {mdev.SAMPLE_MODULE}")


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str, str], Record]:
    """A function that runs a trial under a build."""

    def run(name: str, build: str) -> Record:
        if build not in builds():
            pytest.skip(f"no QEMU with our patches in the cache ({build}): make qemu")
        assert run_trial(TRIALS[name], build, tmp_path)
        return Record.load(tmp_path)

    return run


def arcs(record: Record, *names: str) -> list[LoggedCall]:
    """The source's state changes that go to one of these states, in order, since pre-copy or RUNNING was left last."""
    return [call for call in record.calls if call.of_source and call.name == "set_state" and call.arc[1] in names]


def devices(calls: Sequence[LoggedCall]) -> list[str]:
    """Whose they are."""
    return [call.device for call in calls]


@pytest.mark.parametrize(
    ("build", "saves_first"),
    [pytest.param(UNPATCHED, False, marks=pytest.mark.slow), ("early", True)],
)
def test_a_device_saves_while_the_next_one_is_stopped(
    run: Callable[[str, str], Record], build: str, saves_first: bool
) -> None:
    record = run(STOP, build)
    stopped = arcs(record, "STOP", "STOP_COPY")
    last_stop = max((call for call in stopped if call.arc[0] == "RUNNING_P2P"), key=lambda call: call.time_ns)
    first, last = record.calls.index(stopped[0]), record.calls.index(last_stop)
    assert devices(stopped)[:1] == ["a1"]
    saving = [call for call in stopped if call.arc == ("STOP", "STOP_COPY") and call.device == "a1"]
    assert len(saving) == 1
    assert (first < record.calls.index(saving[0]) < last) is saves_first


def test_the_devices_of_a_pass_are_stopped_at_once(run: Callable[[str, str], Record]) -> None:
    record = run(STOP, "parallel-stop")
    p2p, stop = arcs(record, "RUNNING_P2P")[-2:], [call for call in arcs(record, "STOP") if call.arc[0] != "STOP_COPY"]
    for calls in (p2p, stop):
        assert sorted(devices(calls)) == ["a0", "a1"]
        assert len({call.thread for call in calls}) == 2
    assert max(call.time_ns for call in p2p) < min(call.time_ns for call in stop)


@pytest.mark.parametrize("build", [pytest.param(UNPATCHED, marks=pytest.mark.slow), "early"])
def test_the_guest_runs_on_if_the_target_dies_while_devices_are_saved(build: str, tmp_path: Path) -> None:
    if build not in builds():
        pytest.skip(f"no QEMU with our patches in the cache ({build}): make qemu")
    case = replace(stopping(2), name="killed", act=Act.KILL_STOP, source_runs=True, target_runs=False)
    record = migrate(case, builds()[build], builds()[build], tmp_path, Limits())
    assert (record.status, record.source_runs, record.target_runs) == ("failed", True, False)
    assert [call.arc[1] for call in record.calls if call.device == "a0" and call.name == "set_state"][-1] == "RUNNING"


@pytest.mark.parametrize("build", [pytest.param("reinit", marks=pytest.mark.slow), "retry"])
def test_after_a_late_reinit_the_guest_runs_on_and_the_migration_with_it(
    run: Callable[[str, str], Record], build: str
) -> None:
    record = run(REINIT.name, build)
    back = [call for call in arcs(record, "PRE_COPY") if call.arc[0] == "PRE_COPY_P2P"]
    if build == "retry":
        assert sorted(devices(back)) == ["a0", "a1"]
        assert len(arcs(record, "PRE_COPY_P2P")) == 4
        assert not [call for call in arcs(record, "STOP_COPY") if call.time_ns < max(each.time_ns for each in back)]
    else:
        assert not back
        assert len(arcs(record, "STOP_COPY")) == 2
