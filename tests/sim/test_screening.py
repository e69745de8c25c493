# SPDX-License-Identifier: GPL-2.0-or-later
"""Screened runs: what they cost, and that their downtimes are those of the others."""

from statistics import mean

import pytest

from sim.run import simulate
from sim.scenario import screening
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.screening import screened

REUSABLE = "v2-multifd-reinit-flush-ack-reusable"
PLAIN = ["v2", "v2-multifd", "v2-multifd-chunks4", "v3-n1", "v3-n4", "v3-n4-pool", "v3-blocks-n4"]
SEVERAL = [*PLAIN, "v2-multifd-early", "v2-multifd-early-parallel-stop", "v3-n4-parallel-stop"]
RECONFIGURED = [
    "v2",
    "v2-multifd",
    f"{REUSABLE}-retry",
    "v3-n1",
    "v3-n4",
    "v3-n4-retry",
]
COMPARED = {
    "mlx5-2vf": SEVERAL,
    "szmigiero-4vf": SEVERAL,
    "szmigiero-16vf": ["v2", "v2-multifd", "v2-multifd-early", "v3-n1", "v3-n4"],
    "nic-reconfig": RECONFIGURED,
    "vgpu-32g": ["v2", "v2-multifd", "v3-n1", "v3-n4"],
    "virtio-context": ["v2", "v2-multifd", "v3-n1", "v3-n4", "v3-n4-pool"],
}
"""The scenarios of the decision table, with protocols of its rows."""
SEEDS = {"nic-reconfig": range(1, 5)}
"""When its guest is stopped hangs on single reconfigurations, so means are compared; one seed does for the others."""
SMALL_VGPU = ["device.0.state_mib=2048", "ram.size_gib=4", "ram.nonzero_gib=1"]


def loaded(name: str) -> Scenario:
    """A scenario of the table; the vGPU's state is smaller, for time."""
    return load(name, SMALL_VGPU if name == "vgpu-32g" else ())


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        pytest.param(name, each, marks=[pytest.mark.slow] if name in SEEDS else [])
        for name, some in COMPARED.items()
        for each in some
    ],
)
def test_downtimes_are_within_half_a_percent(name: str, protocol: str) -> None:
    scenario = loaded(name)
    ratios = []
    for seed in SEEDS.get(name, [1]):
        whole, coarse = (
            simulate(each, Protocol.parse(protocol, each), seed) for each in (scenario, screened(scenario))
        )
        assert coarse.kind is whole.kind
        assert whole.downtime_ns is not None
        assert coarse.downtime_ns is not None
        ratios.append(coarse.downtime_ns / whole.downtime_ns)
    assert mean(ratios) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("protocol", ["v2-multifd", "v3-n4"])
def test_a_large_state_takes_a_quarter_of_the_reads(protocol: str) -> None:
    large = ["device.0.state_mib=1024", "device.0.stop_only_mib=1024", "vmm.downtime_limit_ms=60000"]
    scenario = load("mlx5-2vf", ["device.0.count=1", *large])
    whole, coarse = (
        simulate(each, Protocol.parse(protocol, each), 1).counters.reads for each in (scenario, screened(scenario))
    )
    assert whole - coarse == 1024 - 256


@pytest.mark.parametrize(
    ("settings", "frames", "reads"),
    [
        ([], 4, 4),
        (["vmm.read_mib=2"], 4, 2),
        (["link.socket_buffer_mib=6.5"], 3, 3),
        (["link.socket_buffer_mib=1.5"], 1, 1),
        (["v3.critical_credit_mib=2"], 4, 4),
        (["v3.critical_credit_mib=2", 'v3.wire="pool"'], 4, 1),
        (["driver.precopy_image=chunks"], 4, 4),
        (["device.0.writes={pattern='uniform', mib_per_s=10.0}"], 1, 4),
        (["driver.precopy_image=chunks", "device.0.writes={pattern='uniform', mib_per_s=10.0}"], 1, 1),
    ],
)
def test_pieces_fit_twice_into_what_bounds_them(settings: list[str], frames: int, reads: int) -> None:
    coarse = screened(load("mlx5-2vf", ["device.0.stop_only_mib=50", *settings]))
    assert (screening.frames_at_once(coarse), screening.reads_at_once(coarse)) == (frames, reads)


def test_nothing_is_made_as_one_unless_it_is_asked_for() -> None:
    scenario = load("mlx5-2vf")
    assert (screening.frames_at_once(scenario), screening.reads_at_once(scenario)) == (1, 1)
    assert screening.part_bytes(scenario) is None
