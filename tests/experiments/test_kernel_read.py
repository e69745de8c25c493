# SPDX-License-Identifier: GPL-2.0-or-later
"""kernel_read: its cases, and what it makes of measured tables, made-up ones, and of simulated runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import pytest

from experiments.questions.kernel_read import EXPERIMENT, grid
from experiments.questions.kernel_read.grid import CopyCost, Measurement, ReadCase, cases, points, settings
from experiments.questions.kernel_read.question import NO_TABLE, compared, of_case, simulated_rates
from experiments.study.experiment import Answer, Planned
from sim.real.sample_parameters import module_parameters
from sim.scenario.file import load
from sim.scenario.units import GIB, KIB, MIB, NS_PER_S
from tests.build.grids import table_of

MibPerS = Callable[[ReadCase], float]


def as_claimed(case: ReadCase) -> float:
    """C2 and C3 to the letter: one lock or one engine, and N buys nothing."""
    firmware = grid.SAVE_MIB_PER_S * min(case.streams, case.engines) if case.save_mib_s else 3000.0
    return grid.SAVE_MIB_PER_S if case.save_mib_s and case.lock != "fd" else firmware


def as_by_the_locks(case: ReadCase) -> float:
    """A lock over the copy is not in the way of firmware."""
    if not case.save_mib_s:
        return 3000.0
    at_once = 1 if case.lock_over == "command" else min(case.streams, case.engines)
    return float(grid.SAVE_MIB_PER_S * at_once)


def nothing_helps(case: ReadCase) -> float:
    return 90.0 if case.save_mib_s else 3000.0


def made_up(mib_per_s: MibPerS, rounds: int = 3) -> Measurement:
    """A table as benchmarks/real_read.py writes it; rounds differ by 1 %."""
    rows = []
    for number in range(rounds):
        for case in cases(quick=False):
            size = case.state_mib * case.devices * MIB
            elapsed_ns = size / MIB / mib_per_s(case) * NS_PER_S * (1 + number / 100)
            reads = size // (case.read_kib * KIB) + case.streams
            row = {**asdict(case), "round": number, "elapsed_ns": round(elapsed_ns), "bytes": size, "reads": reads}
            row |= {"voluntary_switches": reads, "involuntary_switches": 1, "cpu_ns": 1_000_000}
            row |= {"commands": 64, "command_ns": 1_000_000, "copy_ns": 1_000_000, "lock_wait_ns": 1_000_000}
            rows.append(row | {"commands_at_once": min(case.streams, case.engines)})
    guest = {"release": "7.3.4", "machine": "x86_64", "cpus": 2}
    return Measurement(pl.DataFrame(rows), {"guest": guest, "driver": {"name": "made-up"}, "made": "today"})


@pytest.fixture(scope="module")
def simulated() -> pl.DataFrame:
    """The runs of the quick grid."""
    return table_of(Planned.of(point, 1) for point in points(quick=True))


@pytest.fixture
def with_table(monkeypatch: pytest.MonkeyPatch) -> Callable[[Measurement | None], None]:
    return lambda measurement: monkeypatch.setattr(grid, "measured", lambda: measurement)


def verdicts(told: Answer) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in told.findings}


# --- the cases --------------------------------------------------------------------------------------------------------


def test_each_case_is_there_once_and_has_one_stream_to_be_held_against() -> None:
    for quick in (True, False):
        all_cases = cases(quick)
        assert len(set(all_cases)) == len(all_cases)
        assert {replace(each, kind="v3", streams=1) for each in all_cases} <= set(all_cases)


def test_a_case_is_one_scenario_for_driver_and_simulation() -> None:
    """What the benchmark sets in the module is made of the scenario that is simulated."""
    for case in cases(quick=False):
        scenario = load(grid.BASE, settings(replace(case, devices=1), CopyCost()))
        made = module_parameters(scenario)
        assert (made["lock"], made["lock_over"], made["engines"]) == (case.lock, case.lock_over, case.engines)
        assert made["size_kib"] == case.state_mib * 1024
        assert made["save_mib_s"] == (case.save_mib_s or grid.NO_FIRMWARE_MIB_PER_S)


def test_the_machine_is_known_by_two_sizes_of_read() -> None:
    copies_gib_per_s, call_us = 4.0, 20.0

    def rate(case: ReadCase) -> float:
        read_s = call_us * 1e-6 + case.read_kib * KIB / (copies_gib_per_s * GIB)
        return case.read_kib / 1024 / read_s

    runs = made_up(rate, rounds=1).runs.with_columns(reads=pl.col("bytes") // (pl.col("read_kib") * KIB))
    found = CopyCost.of(Measurement(runs, {"guest": {"cpus": 4}}))
    assert found.copy_gib_per_s == pytest.approx(copies_gib_per_s, rel=0.01)
    assert found.call_us == pytest.approx(call_us, rel=0.01)
    assert found.cpus == 4
    assert CopyCost.of(None) == CopyCost()


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_reads_scale_as_the_driver_is_set(simulated: pl.DataFrame) -> None:
    rates = simulated_rates(simulated)
    for case, expected in (
        (ReadCase(streams=4), 4.0),
        (ReadCase(streams=4, engines=1), 1.0),
        (ReadCase(streams=4, lock="device"), 4.0),
        (ReadCase(streams=4, lock="device", lock_over="command"), 1.0),
    ):
        row = of_case(rates, case)
        assert row is not None
        assert row["sim_ratio"] == pytest.approx(expected, rel=0.02), case


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mib_per_s", "c2", "c3", "alike"),
    [
        (as_claimed, "supported", "supported", False),
        (as_by_the_locks, "supported", "under conditions", True),
        (nothing_helps, "refuted", "supported", False),
    ],
)
def test_verdicts_follow_the_measurement(
    simulated: pl.DataFrame,
    with_table: Callable[[Measurement | None], None],
    mib_per_s: MibPerS,
    c2: str,
    c3: str,
    alike: bool,
) -> None:
    with_table(made_up(mib_per_s))
    told = EXPERIMENT.answer(simulated)
    assert verdicts(told) == {"C2": c2, "C3": c3}
    assert "7.3.4" in " ".join(told.details)
    near = told.table.filter((pl.col("save_mib_s") > 0) & (pl.col("off").abs() > 0.1)).is_empty()
    assert near is alike
    assert set(EXPERIMENT.figures(simulated, "command")) == {"kernel_read"}


@pytest.mark.slow
def test_without_a_measurement_it_says_so(
    simulated: pl.DataFrame, with_table: Callable[[Measurement | None], None]
) -> None:
    with_table(None)
    told = EXPERIMENT.answer(simulated)
    assert NO_TABLE in told.answer
    assert told.findings == ()
    assert set(EXPERIMENT.figures(simulated, "command")) == {"kernel_read"}


def test_only_a_case_that_was_simulated_too_is_compared() -> None:
    runs = made_up(as_claimed).runs
    simulated = pl.DataFrame(
        [{**asdict(ReadCase()), "sim_mib_per_s": 100.0, "sim_ratio": 1.0, "sim_reads": 64, "sim_lock_ns": 0}]
    )
    both = compared(runs, simulated)
    assert [grid.case_of(row) for row in both.iter_rows(named=True)] == [ReadCase()]
    assert both["ratio"].to_list() == [1.0]


def test_the_measurement_that_is_kept_is_read_from_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / grid.MEASURED
    folder.mkdir(parents=True)
    monkeypatch.setattr(grid, "clone", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert grid.measured() is None
    runs = made_up(as_claimed, rounds=1).runs
    runs.write_parquet(folder / "runs.parquet")
    (folder / "manifest.json").write_text('{"schema_version": 6, "made": "today"}', encoding="utf-8")
    found = grid.measured()
    assert found is not None
    assert found.runs.equals(runs)
    assert found.manifest["made"] == "today"
