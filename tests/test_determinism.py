"""The same scenario and seed give the same run: to the nanosecond, in any process, on any number of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import small_scenario

from experiments import results
from experiments.compare import Cell, run_cells
from sim.run import Outcome, Protocol, simulate
from sim.scenario import Scenario
from sim.scenario_file import load

# Everything at once: writes, reconfigurations, several devices, service times that vary, tasks that wait in crowds.
BUSY = small_scenario(
    {
        "device.0.count": 3,
        "device.0.critical": {"objects": 40, "object_kib": 4.0, "setup_us": 200.0},
        "device.0.writes": {"pattern": "hotspot", "mib_per_s": 100.0},
        "device.0.reconfigurations": {"poisson_per_s": 20.0, "objects_each": 8},
        "driver.lock": "global",
        "firmware.service_cv": 0.3,
        "ram.dirty_mib_per_s": 10.0,
    }
)


def run(scenario: Scenario, protocol: str, seed: int) -> Outcome:
    return simulate(scenario, Protocol.parse(protocol, scenario), seed)


@pytest.mark.parametrize("protocol", ["v2", "v3-n4"])
def test_two_processes_with_different_hash_seeds_give_one_trace(protocol: str) -> None:
    code = (
        "from sim.run import Protocol, simulate\n"
        "from sim.scenario_file import load\n"
        "scenario = load('nic-reconfig')\n"
        f"print(simulate(scenario, Protocol.parse({protocol!r}, scenario), 3))\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "random")
    }
    assert len(told) == 1
    assert repr(run(load("nic-reconfig"), protocol, 3)) + "\n" in told


@pytest.mark.parametrize("protocol", ["v2", "v3-n1", "v3-n4"])
def test_the_same_run_twice_in_one_process(protocol: str) -> None:
    assert run(BUSY, protocol, 1) == run(BUSY, protocol, 1)


@pytest.mark.parametrize("protocol", ["v2", "v3-n4"])
def test_every_seed_gives_a_trace_of_its_own(protocol: str) -> None:
    assert len({run(BUSY, protocol, seed).digest for seed in range(5)}) == 5


@pytest.mark.parametrize("change", [{"link.round_trip_us": 100.002}, {"vmm.vcpu_start_ms": 1.000001}])
def test_a_nanosecond_shows_in_the_digest(change: dict[str, float]) -> None:
    assert run(small_scenario(change), "v2", 1).digest != run(small_scenario(), "v2", 1).digest


def test_a_table_does_not_depend_on_the_number_of_processes() -> None:
    cells = [Cell(BUSY, Protocol.parse(name, BUSY), seed) for seed in (1, 2, 3) for name in ("v2", "v3-n2")]
    alone, _ = run_cells(cells, jobs=1)
    shared, _ = run_cells(cells, jobs=2)
    assert [(outcome.seed, outcome.protocol) for outcome in alone] == [(c.seed, c.protocol.name) for c in cells]
    assert results.table(alone).equals(results.table(shared), null_equal=True)
