"""The same scenario and seed give the same run: to the nanosecond, in any process, on any number of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from experiments.runs import table as results
from experiments.runs.pool import Cell, run_cells
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.scenario import BUSY, ENDS_EARLY, small_scenario


def run(scenario: Scenario, protocol: str, seed: int) -> Outcome:
    return simulate(scenario, Protocol.parse(protocol, scenario), seed)


def told_by_processes(code: str) -> str:
    """What a program prints, if it is the same whatever the hash seed."""
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
    return told.pop()


RUN = """
from sim.scenario.protocol import Protocol
from sim.run import simulate
from sim.scenario.scenario import Scenario
from sim.scenario.file import load
"""


V3_WAYS = ["v3-n4-pool-invalidate-retry", "v3-n3-one", "v3-blocks-n4-pool"]


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd-ack-polls", "v3-n4-pool-invalidate-retry"])
def test_two_processes_with_different_hash_seeds_give_one_trace(protocol: str) -> None:
    code = f"{RUN}scenario = load('nic-reconfig')\nprint(simulate(scenario, Protocol.parse({protocol!r}, scenario), 3))"
    assert told_by_processes(code) == repr(run(load("nic-reconfig"), protocol, 3)) + "\n"


@pytest.mark.parametrize("how", ENDS_EARLY)
def test_a_run_that_ends_early_leaves_one_trace_too(how: str) -> None:
    scenario = small_scenario({"device.0.count": 3} | ENDS_EARLY[how])
    protocols = ["v2-reinit-flush-ack-reusable", "v2-multifd-reinit-invalidate-ack-reusable-polls", "v3-n3"]
    protocols += ["v3-n3-one-invalidate", "v3-blocks-n3-pool"]
    code = (
        f"{RUN}scenario = Scenario.model_validate({scenario.model_dump()!r})\n"
        f"for name in {protocols}:\n    print(simulate(scenario, Protocol.parse(name, scenario), 1))"
    )
    outcomes = [run(scenario, protocol, 1) for protocol in protocols]
    assert told_by_processes(code).splitlines() == [repr(outcome) for outcome in outcomes]
    assert {outcome.guest_runs_at for outcome in outcomes[:2]} == {"source"}


@pytest.mark.parametrize(
    "protocol", ["v2", "v2-multifd", "v2-multifd-reinit-invalidate-ack", "v3-n1", "v3-n4", *V3_WAYS]
)
def test_the_same_run_twice_in_one_process(protocol: str) -> None:
    assert run(BUSY, protocol, 1) == run(BUSY, protocol, 1)


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd-ack", "v3-n4", *V3_WAYS])
def test_every_seed_gives_a_trace_of_its_own(protocol: str) -> None:
    assert len({run(BUSY, protocol, seed).digest for seed in range(5)}) == 5


@pytest.mark.parametrize("change", [{"link.round_trip_us": 100.002}, {"vmm.vcpu_start_ms": 1.000001}])
def test_a_nanosecond_shows_in_the_digest(change: dict[str, float]) -> None:
    assert run(small_scenario(change), "v2", 1).digest != run(small_scenario(), "v2", 1).digest


def test_a_table_does_not_depend_on_the_number_of_processes() -> None:
    cells = [
        Cell(BUSY, Protocol.parse(name, BUSY), seed) for seed in (1, 2, 3) for name in ("v2", "v2-multifd", "v3-n2")
    ]
    alone, _ = run_cells(cells, jobs=1)
    shared, _ = run_cells(cells, jobs=2)
    assert [(outcome.seed, outcome.protocol) for outcome in alone] == [(c.seed, c.protocol.name) for c in cells]
    assert results.table(alone).equals(results.table(shared), null_equal=True)
