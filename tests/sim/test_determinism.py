# SPDX-License-Identifier: GPL-2.0-or-later
"""The same scenario and seed give the same run: to the nanosecond, in any process, on any number of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runs import frame as results
from experiments.runs.pool import Cell, run_cells
from sim.outcome import Outcome
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.runs import run
from tests.build.scenario import BUSY, ENDS_EARLY, small_scenario

ROOT = Path(__file__).parents[2]


V3_WAYS = ["v3-n4-pool-invalidate-retry", "v3-n3-one", "v3-blocks-n4-pool"]
REUSABLE = [
    "v2-reinit-flush-ack-reusable",
    "v2-multifd-reinit-invalidate-ack-reusable-polls",
    "v2-priority-ack-reusable",
]
CASES: dict[str, tuple[Scenario, list[str], int]] = {
    "nic-reconfig": (load("nic-reconfig"), ["v2", "v2-multifd-ack-polls", "v3-n4-pool-invalidate-retry"], 3),
    **{
        how: (
            small_scenario({"device.0.count": 3} | changes),
            [*REUSABLE, "v3-n3", "v3-n3-one-invalidate", "v3-blocks-n3-pool"],
            1,
        )
        for how, changes in ENDS_EARLY.items()
    },
}


def outcomes(case: str) -> list[Outcome]:
    scenario, protocols, seed = CASES[case]
    return [run(scenario, protocol, seed) for protocol in protocols]


@pytest.fixture(scope="module")
def of_processes() -> list[dict[str, str]]:
    """What all cases come to in processes with different hash seeds."""
    code = f"from {__name__} import CASES, outcomes; print({{case: repr(outcomes(case)) for case in CASES}})"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "random")
    ]
    return [ast.literal_eval(process.communicate()[0].decode()) for process in started]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_processes_with_different_hash_seeds_give_one_trace(case: str, of_processes: list[dict[str, str]]) -> None:
    """Also where a run ends early."""
    here = outcomes(case)
    assert [told[case] for told in of_processes] == [repr(here)] * 2
    if case in ENDS_EARLY:
        assert {outcome.guest_runs_at for outcome in here[: len(REUSABLE)]} == {"source"}


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
