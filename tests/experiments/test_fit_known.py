# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine whose numbers are known is simulated, its logs are written as QEMU writes them, and fitted: they come
out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.decision.decision import SHORT, what_brings
from experiments.decision.ladder import rungs
from experiments.logs.machine import FittedMachine, machine_of
from experiments.logs.quantity import Certainty, LogQuantity
from experiments.runs.pool import Cell
from proto_v3.timeline import PHASES, Mark
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.units import MIB, NS_PER_MS
from tests.build.fit_cases import known_logs, known_scenario
from tests.build.qemu_log import NEW, OLD, TimedRun

TICK_MS = 0.003
"""Of a log: times are whole microseconds, and a quantity is of two or three of them."""
EXACT = (
    "device.0.suspend_ms",
    "device.0.quiesce_ms",
    "device.0.resume_ms",
    "device.0.config_load_ms",
    "device.1.suspend_ms",
    "device.1.quiesce_ms",
    "device.1.resume_ms",
    "device.1.config_load_ms",
    "vmm.vcpu_stop_ms",
    "vmm.vcpu_start_ms",
    "vmm.setup_ms",
    "vmm.other_load_ms",
    "ram.sync_ms",
    "ram.final_sync_ms",
)
RATE = 0.15
HOUR_US = 3_600_000_000


def by_key(machine: FittedMachine) -> dict[str, LogQuantity]:
    return {each.key: each for each in machine.quantities}


def truth(run: TimedRun, key: str) -> Any:
    value: Any = run.scenario
    for part in key.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("protocol", ["v2", "v2-multifd"])
@pytest.mark.parametrize("offset_us", [0, -169_000_000, HOUR_US])
def test_times_sizes_and_the_downtime_come_out(tmp_path: Path, version: str, protocol: str, offset_us: int) -> None:
    source, target, run = known_logs(tmp_path, None, protocol, version, offset_us)
    machine = machine_of(source, target)
    found = by_key(machine)
    for key in EXACT:
        assert found[key].kind is Certainty.MEASURED, key
        assert found[key].value == pytest.approx(truth(run, key), abs=TICK_MS), key
    for at, device in enumerate(run.scenario.devices):
        assert found[f"device.{at}.features"].value == ["STOP_COPY", "P2P", "PRE_COPY"]
        size = found[f"device.{at}.state_mib"]
        whole_mib = machine.scenario.devices[at].whole_bytes / MIB
        assert whole_mib == pytest.approx(device.whole_bytes / MIB, rel=0.05 if size.low else 0.002)
    assert found["vmm.downtime_limit_ms"].value == 250
    assert found["vmm.multifd"].value is (protocol == "v2-multifd")
    assert machine.waterfall.downtime_ms == pytest.approx(run.timeline.downtime_ns / NS_PER_MS, abs=0.2)
    assert machine.clocks.offset_us == pytest.approx(offset_us, abs=100)
    assert machine.clocks.uncertainty_us is not None
    assert machine.clocks.uncertainty_us < 1000


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd"])
def test_the_phases_are_those_of_the_run(tmp_path: Path, protocol: str) -> None:
    source, target, run = known_logs(tmp_path, None, protocol, NEW, -169_000_000)
    machine = machine_of(source, target)
    real, known = machine.waterfall.phases_ms, run.timeline.phases_ns()
    assert list(real) == list(PHASES)
    assert sum(real.values()) == pytest.approx(machine.waterfall.downtime_ms)
    together = ("transfer", "load")  # when the last byte came, only its write() shows
    for name in PHASES:
        if name not in together:
            assert real[name] == pytest.approx(known[name] / NS_PER_MS, abs=0.3), name
    assert sum(real[name] for name in together) == pytest.approx(sum(known[name] for name in together) / 1e6, abs=0.3)
    assert machine.waterfall.marks_ms[Mark.STOP_ORDERED] == 0


@pytest.mark.parametrize("rate", [60.0, 200.0])
def test_with_multifd_the_rate_of_loads_is_measured(tmp_path: Path, rate: float) -> None:
    source, target, run = known_logs(tmp_path, {"firmware.load_mib_per_s": rate}, "v2-multifd")
    found = by_key(machine_of(source, target))
    load, finish = found["firmware.load_mib_per_s"], found["firmware.load_finish_ms"]
    assert load.value == pytest.approx(rate, rel=RATE)
    assert finish.value == pytest.approx(run.scenario.firmware.load_finish_ms, rel=RATE)


@pytest.mark.parametrize("version", [OLD, NEW])
def test_on_one_channel_rates_are_bounded_and_the_truth_is_inside(tmp_path: Path, version: str) -> None:
    source, target, run = known_logs(tmp_path, None, "v2", version)
    found = by_key(machine_of(source, target))
    for key in ("firmware.save_mib_per_s", "firmware.load_mib_per_s"):
        each = found[key]
        assert each.kind is Certainty.BOUNDED
        assert each.low is not None
        assert each.low <= truth(run, key), key
        assert "neither is seen by itself" in each.how


def test_what_is_bounded_has_a_range_and_what_cannot_be_told_keeps_that_of_the_base(tmp_path: Path) -> None:
    source, target, _ = known_logs(tmp_path)
    machine = machine_of(source, target)
    ranges, sources = machine.scenario.ranges, machine.scenario.sources
    assert ranges["firmware.save_mib_per_s"].low == by_key(machine)["firmware.save_mib_per_s"].low
    assert sources["firmware.save_mib_per_s"].startswith("bounded: at least ")
    assert sources["device.1.suspend_ms"].startswith("measured: vfio_migration_set_state")
    assert "device.1.suspend_ms" not in ranges
    for key, each in by_key(machine).items():
        if each.kind is Certainty.UNKNOWN:
            assert not sources.get(key, "").startswith(("measured", "bounded")), key


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd"])
def test_the_fitted_scenario_has_the_downtime_of_the_machine(tmp_path: Path, protocol: str) -> None:
    source, target, run = known_logs(tmp_path, None, protocol)
    machine = machine_of(source, target)
    assert machine.simulated.downtime_ns == pytest.approx(run.timeline.downtime_ns, rel=0.1)


@pytest.mark.parametrize("extends", ["mlx5", "mlx5-2vf"])
def test_what_the_base_adds_to_a_devices_times_is_in_the_measured_ones(tmp_path: Path, extends: str) -> None:
    source, target, run = known_logs(tmp_path)
    machine = machine_of(source, target, extends=extends)
    known, own = run.timeline.phases_ns(), machine.simulated.phases_ns
    assert own["stop"] == pytest.approx(known["stop"], abs=20_000)
    assert own["resume"] == pytest.approx(known["resume"], abs=20_000)
    (held,) = machine.scenario.published
    assert held.downtime_ms == pytest.approx((run.timeline.downtime_ns or 0) / 1e6, abs=0.01)
    assert held.fitted == ["stop_ms", "config_load_ms.0", "config_load_ms.1"]
    assert {*held.figures()} == {*held.fitted, "downtime_ms"}
    assert held.sums == [], "saves and loads are missing, so the downtime is not the sum of what was fitted"


@pytest.mark.parametrize("slow", ["firmware.save_mib_per_s", "firmware.load_mib_per_s"])
def test_whether_save_or_load_is_slow_is_chosen_by_the_downtime(tmp_path: Path, slow: str) -> None:
    changes = {"firmware.save_mib_per_s": 2000.0, "firmware.load_mib_per_s": 4000.0, slow: 50.0}
    source, target, run = known_logs(tmp_path, {**changes, "link.socket_buffer_mib": 1.0})
    machine = machine_of(source, target)
    assert machine.simulated.downtime_ns == pytest.approx(run.timeline.downtime_ns, rel=0.15)


def test_a_device_that_gives_its_state_in_pre_copy_and_a_guest_that_writes(tmp_path: Path) -> None:
    changes = {
        "device.0.writes": {"mib_per_s": 20.0},
        "device.0.stop_only_mib": 4.0,
        "device.1.stop_only_mib": 4.0,
        "vmm.downtime_limit_ms": 60.0,
        "ram.dirty_mib_per_s": 10.0,
        "ram.working_set_mib": 16.0,
        "driver.initial": "image",
        "driver.precopy_image": "whole",
    }
    source, target, _ = known_logs(tmp_path, changes)
    machine = machine_of(source, target)
    found = by_key(machine)
    only = found["device.0.stop_only_mib"]
    low, high = (only.value, only.value) if only.low is None else (only.low, only.high)
    assert low <= 4.1
    assert high >= 3.9
    rate = found["device.0.writes.mib_per_s"]
    if rate.value is not None:
        assert rate.value == pytest.approx(20.0, rel=0.5)
    assert found["driver.precopy"].value == "incremental"


def test_what_changes_would_bring_is_paired_over_the_same_samples(tmp_path: Path) -> None:
    source, target, _ = known_logs(tmp_path)
    machine = machine_of(source, target)
    every = rungs(machine.scenario, SHORT)
    assert [each.protocol for each in every] == [
        "v2", "v2-multifd", "v2-multifd-chunks4", "v3-n1-multifd-chunks4", "v3-n4-multifd-chunks4",
    ]  # fmt: skip
    made: list[list[tuple[Cell, Outcome]]] = []

    def run(cells: Sequence[Cell]) -> list[Outcome]:
        outcomes = [simulate(cell.scenario, cell.protocol, cell.seed) for cell in cells]
        made.append(list(zip(cells, outcomes, strict=True)))
        return outcomes

    assert machine.simulated.downtime_ns is not None
    own_ms = machine.simulated.downtime_ns / NS_PER_MS
    rows = what_brings(machine.scenario, 4, own_ms, run)
    used = rows[0].samples
    first, others = made
    assert len(first) == 4 * 4
    assert len(others) == used * len(every)
    assert [each.samples for each in rows] == [used] * len(every)
    by_seed = {cell.seed: (cell, outcome) for cell, outcome in first}
    off_ms = {cell.seed: abs((outcome.downtime_ns or 0) / NS_PER_MS - own_ms) for cell, outcome in first}
    used_seeds = {cell.seed for cell, _ in others}
    left_out = min(off for seed, off in off_ms.items() if seed not in used_seeds)
    assert all(off_ms[seed] <= max(0.15 * own_ms, left_out) for seed in used_seeds)
    for at, row in enumerate(rows[1:]):
        saved = []
        for cell, outcome in others[at + 1 :: len(every)]:
            sample, own = by_seed[cell.seed]
            assert cell.scenario.firmware == sample.scenario.firmware
            assert own.downtime_ns is not None
            assert outcome.downtime_ns is not None
            saved.append((own.downtime_ns - outcome.downtime_ns) / NS_PER_MS)
        assert row.in_all_ms is not None
        own = row.in_all_ms
        assert [own.low, own.high] == pytest.approx([min(saved), max(saved)])
        assert own.low <= own.median <= own.high


def test_without_a_sample_that_is_near_the_nearest_are_used() -> None:
    scenario = known_scenario()
    rows = what_brings(scenario, 4, 1.0, lambda cells: [simulate(c.scenario, c.protocol, c.seed) for c in cells])
    assert {each.samples for each in rows} == {1}, "it has no ranges"
    assert [each.failed for each in rows] == [0] * len(rows)
