# SPDX-License-Identifier: GPL-2.0-or-later
"""What is called the same run is the same to the last span; and what is not the same is not called so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.runs.pool import Cell, made_once, outcome_as, run_cell
from sim.outcome import Outcome
from sim.run import simulate
from sim.same_run import same_run
from sim.scenario.file import load
from sim.scenario.protocol import Protocol

SMALL = (
    *("ram.size_gib=0.25", "ram.nonzero_gib=0.03", "device.0.state_mib=24", "device.0.block_kib=256"),
    *("vmm.setup_ms=20", "vmm.give_up_s=4", "driver.chunk_mib=4"),
)
IDLE = ("mlx5-2vf", (*SMALL, "device.0.stop_only_mib=24", "device.0.count=1"))
TWO = ("mlx5-2vf", (*SMALL, "device.0.stop_only_mib=16"))
ALONE = (TWO[0], (*TWO[1], "vmm.multifd=false"))
NIC = ("nic-reconfig", (*SMALL, "device.0.stop_only_mib=8", "device.0.critical.objects=32"))
QUIET = (NIC[0], (*NIC[1], "device.0.reconfigurations.poisson_per_s=0", "device.0.reconfigurations.objects_each=8"))
LATE = ("late-reconfig", (*SMALL, "device.0.stop_only_mib=8"))
ONCE, OVER, OF_A_VF = "device.0.reconfigurations={at_s=[0.5]}", "driver.lock_over=command", "firmware.vf_engines=2"
Run = tuple[tuple[str, tuple[str, ...]], str, str]
"""A base with settings, a protocol, more settings."""


def cell(run: Run, seed: int = 1) -> Cell:
    (base, settings), protocol, more = run
    scenario = load(base, (*settings, *more.split()))
    return Cell(scenario, Protocol.parse(protocol, scenario), seed)


def key(of: Cell) -> str:
    return same_run(of.scenario, of.protocol)


EQUAL = [
    # 1 and 1.0; a default that is said
    ((TWO, "v2", "firmware.engines=2"), (TWO, "v2", "firmware.engines=2.0 driver.precopy=incremental")),
    ((TWO, "v3", ""), (TWO, "v3-n4-streams", "")),
    # keys of the other protocol
    (
        (TWO, "v2", ""),
        (TWO, "v2", "v3.dirty_streams=2 v3.wire=pool driver.epochs=invalidate device.0.max_dirty_streams=8"),
    ),
    ((TWO, "v3-n2", ""), (TWO, "v3-n2", "vmm.write_kib=64 vmm.precopy_user=polls vmm.device_buffer_gib_per_s=2")),
    ((NIC, "v3-n2", ""), (NIC, "v3-n2", "vmm.reinit=true vmm.switchover_ack=reusable driver.reinit=invalidate")),
    # multifd's, without it
    (
        (ALONE, "v2", ""),
        (ALONE, "v2", "vmm.multifd_channels=8 vmm.multifd_copy_gib_per_s=3 vmm.multifd_load_threads=1"),
    ),
    ((ALONE, "v3-n2", ""), (ALONE, "v3-n2", "vmm.multifd_channels=8 vmm.multifd_sync_us_per_channel=500")),
    # policies about new critical data, where there is none
    ((QUIET, "v2-ack", ""), (QUIET, "v2-reinit-flush-ack", "")),
    ((QUIET, "v2", ""), (QUIET, "v2-reinit-invalidate", "")),
    ((QUIET, "v3-n2", ""), (QUIET, "v3-n2-invalidate-retry", "")),
    # locks that nobody waits for
    ((TWO, "v3-n4", "driver.lock=none"), (TWO, "v3-n4", "driver.lock=per_fd")),
    ((IDLE, "v2-multifd", "driver.lock=global"), (IDLE, "v2-multifd", "driver.lock=none")),
    # more engines than there are commands
    ((TWO, "v2-multifd", "firmware.engines=2"), (TWO, "v2-multifd", "firmware.engines=7.5")),
    ((TWO, "v3-n2", "firmware.engines=6"), (TWO, "v3-n2", "firmware.engines=64")),
]
DIFFERENT = [
    ((TWO, "v2", ""), (TWO, "v2-multifd", "")),
    ((TWO, "v3-n2", ""), (TWO, "v3-n4", "")),
    ((TWO, "v2-multifd", ""), (TWO, "v2-multifd", "vmm.multifd_channels=8")),
    ((TWO, "v3-n2-multifd", ""), (TWO, "v3-n2-multifd", "vmm.multifd_channels=8")),
    ((TWO, "v3-n2", ""), (TWO, "v3-n2", "v3.target_knows=v2")),
    ((TWO, "v3-n2", "v3.target_knows=v2"), (TWO, "v3-n2", "v3.target_knows=v2 vmm.switchover_ack=one_shot")),
    ((NIC, "v2", ""), (NIC, "v2-reinit-flush", "")),
    ((NIC, "v3-n2", ""), (NIC, "v3-n2-retry", "")),
    ((QUIET, "v2", ""), (QUIET, "v2-priority", "")),
    ((QUIET, "v2-parts", ""), (QUIET, "v2-parts", "v3.decision_interval_ms=50")),
    ((QUIET, "v2-parts", ""), (QUIET, "v2-whole", "")),
    ((TWO, "v2", "vmm.pieces_at_once=4"), (TWO, "v2", "vmm.pieces_at_once=4 v3.wire=pool")),
    ((LATE, "v3-n2", ""), (LATE, "v3-n2-retry", "")),
    ((QUIET, "v2-ack", ""), (QUIET, "v2", "")),
    (
        (QUIET, "v2", "device.0.reconfigurations={at_s=[0.5]}"),
        (QUIET, "v2-reinit-flush", "device.0.reconfigurations={at_s=[0.5]}"),
    ),
    ((TWO, "v3-n4", "driver.lock=global"), (TWO, "v3-n4", "driver.lock=device")),
    ((IDLE, "v3-n4", "driver.lock=global"), (IDLE, "v3-n4", "driver.lock=device")),  # MIG_DATA_SIZE takes the latter
    ((IDLE, "v2-multifd-threads", "driver.lock=per_fd"), (IDLE, "v2-multifd-threads", "driver.lock=device")),
    ((IDLE, "v3-n4", "driver.lock=none"), (IDLE, "v3-n4", "driver.lock=device")),
    ((IDLE, "v3-blocks", "driver.lock=none"), (IDLE, "v3-blocks", "driver.lock=per_fd")),
    (
        (IDLE, "v2", "driver.lock_over=command driver.lock=none"),
        (IDLE, "v2", "driver.lock_over=command driver.lock=device"),
    ),
    ((TWO, "v2-multifd", "firmware.engines=1.5"), (TWO, "v2-multifd", "firmware.engines=2")),
    ((TWO, "v3-n2", "firmware.engines=5"), (TWO, "v3-n2", "firmware.engines=6")),
    (
        (TWO, "v3-n2", "firmware.engines=6 firmware.vf_engines=2"),
        (TWO, "v3-n2", "firmware.engines=64 firmware.vf_engines=2"),
    ),
    ((TWO, "v3-n2", "link.gbit_per_s=100"), (TWO, "v3-n2", "link.gbit_per_s=400")),
]
"""Not called the same, whether or not their outcomes differ."""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_what_is_called_the_same_run_has_the_same_outcome(one: Run, other: Run, seed: int) -> None:
    made, same = cell(one, seed), cell(other, seed)
    assert key(made) == key(same)
    outcome = run_cell(made)
    assert outcome.digest
    assert outcome_as(outcome, same) == run_cell(same)


@pytest.mark.parametrize("protocol", ["v2", "v3-n2-one"])
def test_a_link_is_no_limit_for_one_connection_that_is_slower(protocol: str) -> None:
    one = "link.per_connection_gbit_per_s=12.5"
    told = [cell((NIC, protocol, f"{one} link.gbit_per_s={gbit}")) for gbit in (12.5, 100, 400)]
    assert len(set(map(key, told))) == 1
    outcome = run_cell(told[0])
    assert [outcome_as(outcome, each) for each in told] == list(map(run_cell, told))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_may_differ_is_not_called_the_same(one: Run, other: Run) -> None:
    assert key(cell(one)) != key(cell(other))


def test_words_about_a_scenario_are_no_difference() -> None:
    scenario = cell((TWO, "v2", "")).scenario
    other = scenario.model_copy(update={"name": "other", "description": "other", "sources": {}})
    assert same_run(scenario, Protocol.parse("v2", scenario)) == same_run(other, Protocol.parse("v2", other))


def test_equal_runs_are_made_once_and_each_gets_its_own_names_and_bound() -> None:
    one, same, else_ = (cell((TWO, "v3-n2", f"firmware.engines={each}")) for each in (6, 64, 2))
    named = replace(same, scenario=same.scenario.model_copy(update={"name": "other"}))
    cells = [one, named, else_, replace(one, seed=2)]
    made: list[Cell] = []

    def make(some: list[Cell]) -> list[tuple[int, Outcome]]:
        made.extend(some)
        return [(at, run_cell(each)) for at, each in enumerate(some)]

    told = dict(made_once(cells, lambda some: iter(make(list(some)))))
    assert made == [one, else_, replace(one, seed=2)]
    assert told == {at: simulate(each.scenario, each.protocol, each.seed) for at, each in enumerate(cells)}
