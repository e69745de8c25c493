# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs that unmodified QEMUs wrote, of migrations whose times, sizes and rates are known (tests/data/logs/): `proto-v3
fit` gives them back."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from experiments.logs.device_quantities import device_quantities
from experiments.logs.events import LogFile
from experiments.logs.machine import FittedMachine, machine_of
from experiments.logs.pair import read_pair
from experiments.logs.quantity import GIB, Certainty, LogQuantity
from experiments.runs.frame import table
from experiments.study.published import held_against
from proto_v3.errors import UserError
from sim.scenario.file import load
from tests.build.fit_truth import LEAST_MS, Truth
from tests.real.qemu.cases import End
from tests.real.qemu.pairs import FOLDER, PAIRS, LogPair, kept

COMPLETED = [pair.folder.name for pair in kept() if pair.known["status"] == End.COMPLETED]
OTHERS = [pair.folder.name for pair in kept() if pair.known["status"] != End.COMPLETED]
MOST_BYTES = 30 << 10
MOST_ERROR = 0.15
"""Of a figure that is called fitted."""


@functools.cache
def fit(name: str) -> FittedMachine:
    pair = LogPair(FOLDER / name)
    with tempfile.TemporaryDirectory() as folder:
        source, target = pair.unpacked(Path(folder))
        return machine_of(str(source), str(target), cmdline=[str(pair.folder / "cmdline.txt")])


@pytest.mark.parametrize("name", COMPLETED)
def test_what_is_called_fitted_is_near(name: str) -> None:
    """A figure of another meaning than the simulated stage's is not in the file: the simulated one may be any."""
    machine = fit(name)
    (published,) = machine.scenario.published
    held = held_against(published, table([machine.simulated]))
    errors = {each.figure: each.error for each in held if each.fitted}
    assert "stop_ms" in errors
    assert all(error is not None and abs(error) <= MOST_ERROR for error in errors.values()), errors
    assert {each.figure.partition(".")[0] for each in held} <= {"stop_ms", "config_load_ms", "downtime_ms"}
    several = len(machine.scenario.devices) > 1
    assert any("config" in figure for figure in errors) != (several and machine.scenario.vmm.multifd)


def test_each_case_is_kept_and_is_small() -> None:
    assert {pair.folder.name for pair in kept()} == {f"{case.name}-{each}" for case in PAIRS for each in case.versions}
    for pair in kept():
        for file in pair.folder.iterdir():
            assert file.stat().st_size <= MOST_BYTES, file


@pytest.mark.parametrize("name", COMPLETED)
def test_the_times_of_all_arcs_come_out(name: str) -> None:
    Truth(LogPair(FOLDER / name)).check_times(fit(name))


@pytest.mark.parametrize("name", COMPLETED)
def test_sizes_come_out_or_are_bounded(name: str) -> None:
    Truth(LogPair(FOLDER / name)).check_sizes(fit(name))


@pytest.mark.parametrize("name", COMPLETED)
def test_rates_come_out_or_cannot_be_told(name: str) -> None:
    Truth(LogPair(FOLDER / name)).check_rates(fit(name))


@pytest.mark.parametrize("name", COMPLETED)
def test_what_was_sent_of_ram_is_within_the_bounds(name: str) -> None:
    """QEMU counts each page that is not zero; at the stop some may not have been looked at, or sent, yet."""
    ram = LogPair(FOLDER / name).known["query_migrate"]["ram"]
    found = by_key(fit(name))["ram.nonzero_gib"]
    assert found.kind is Certainty.BOUNDED
    assert found.high is not None
    assert found.high * GIB >= ram["normal-bytes"]


@pytest.mark.parametrize("name", ["one-11.1", "pair-11.1", "multifd-precopy-11.1"])
def test_what_was_left_of_ram_does_not_count_the_devices(name: str) -> None:
    """QEMU 11.1 reports what is left of all in one number: no more than the guest has is left of RAM."""
    source, target = (str(FOLDER / name / f"{side}.log.gz") for side in ("source", "target"))
    facts = read_pair(source, target).source
    everything = {event.name: event for event in LogFile(source).read() if event.value("final") == 1}
    assert facts.final_ram_bytes is not None
    assert facts.final_ram_bytes < LogPair(FOLDER / name).known["query_migrate"]["ram"]["total"]
    pending = everything["qemu_savevm_query_pending"].value("precopy") or 0
    assert pending - facts.final_ram_bytes == sum(device.left_bytes for device in facts.devices.values()) > 0


@pytest.mark.parametrize("name", COMPLETED)
def test_what_the_user_set_comes_out(name: str) -> None:
    Truth(LogPair(FOLDER / name)).check_settings(fit(name))


@pytest.mark.parametrize("name", COMPLETED)
def test_the_downtime_is_qemus_where_it_counts_the_target(name: str) -> None:
    """QEMU's own figure leaves out the load if the target sends nothing back (without the return path)."""
    pair, machine = LogPair(FOLDER / name), fit(name)
    assert machine.waterfall.downtime_ms is not None
    if {"return-path", "switchover-ack"} & set(pair.known["capabilities"]):
        qemus = pair.known["query_migrate"]["downtime"]
        assert qemus - 150 <= machine.waterfall.downtime_ms <= qemus + LEAST_MS
    assert sum(machine.waterfall.phases_ms.values()) == pytest.approx(machine.waterfall.downtime_ms)


@pytest.mark.parametrize("name", OTHERS)
def test_a_migration_that_did_not_complete_is_told_as_what_it_was(name: str) -> None:
    how = "was cancelled" if "cancelled" in name else "failed"
    with pytest.raises(UserError, match=rf"this migration {how} (before|after) the guest was stopped"):
        fit(name)


@pytest.mark.parametrize(("us", "kind"), [(7_000, Certainty.UNKNOWN), (7_000_000, Certainty.MEASURED)])
def test_reports_soon_after_each_other_do_not_tell_that_nothing_is_written(
    tmp_path: Path, us: int, kind: Certainty
) -> None:
    source, target = LogPair(FOLDER / "one-11.1").unpacked(tmp_path)
    pair = read_pair(str(source), str(target))
    here, _ = pair.devices[0]
    here.dirtied_bytes, here.dirtied_us = 0, us
    found = {each.key: each for each in device_quantities(pair, 0, load("mlx5-2vf").device[0])}
    assert found["device.0.writes.mib_per_s"].kind is kind


def by_key(machine: FittedMachine) -> dict[str, LogQuantity]:
    return {each.key: each for each in machine.quantities}


def test_multifd_tells_the_rate_of_loads_and_one_channel_does_not() -> None:
    key = "firmware.load_mib_per_s"
    assert by_key(fit("multifd-11.1"))[key].kind is Certainty.MEASURED
    assert by_key(fit("pair-11.1"))[key].kind is not Certainty.MEASURED
