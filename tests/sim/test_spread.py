# SPDX-License-Identifier: GPL-2.0-or-later
"""How a host varies from run to run: factors as asked for, the same for every protocol, and nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.runs.frame import row
from sim.host.host import seeds
from sim.host.spread import SIDES, SPAWN_KEY, HostPart, factors, of_host
from sim.scenario.scenario import Scenario
from tests.build.runs import kept_run, run
from tests.build.scenario import small_scenario

PROTOCOLS = ("v2", "v2-multifd", "v3-n2")
CV = 0.3


def varied(spread_cv: float = CV) -> Scenario:
    return small_scenario({"host.spread_cv": spread_cv, "vmm.other_load_ms": 2.0, "device.0.resume_ms": 1.5})


def test_the_factors_have_mean_one_and_the_cv_asked_for() -> None:
    drawn = np.array([list(factors(CV, seed, side).values()) for seed in range(1000) for side in SIDES])
    assert drawn.shape == (2000, len(HostPart))
    assert (drawn > 0).all()
    assert drawn.mean(axis=0) == pytest.approx(1, abs=4 * CV / np.sqrt(2000))
    # The error of a sample's s is about s (kurtosis - 1)^0.5 / 2 / n^0.5; with cv = 0.3 a lognormal's kurtosis is 4.6.
    assert drawn.std(axis=0) == pytest.approx(CV, rel=4 * 1.9 / 2 / np.sqrt(2000))


def test_hosts_parts_and_seeds_have_factors_of_their_own() -> None:
    drawn = [factors(CV, seed, side)[part] for seed in (1, 2) for side in SIDES for part in HostPart]
    assert len(set(drawn)) == len(drawn)
    assert factors(CV, 1, "source") == factors(CV, 1, "source")


def test_they_are_drawn_from_a_stream_that_nothing_else_uses() -> None:
    keys = [child.spawn_key for child in seeds(1)]
    assert keys == [(0,), (1,), (2,)]
    assert (SPAWN_KEY,) not in keys


def test_all_fixed_times_of_a_host_are_multiplied_by_their_parts_factor() -> None:
    scenario, seed = varied(), 5
    for side in SIDES:
        host, of = of_host(scenario, seed, side), factors(CV, seed, side)
        assert host.vmm.setup_ms == scenario.vmm.setup_ms * of[HostPart.SET_UP]
        assert host.vmm.vcpu_stop_ms == scenario.vmm.vcpu_stop_ms * of[HostPart.VCPUS]
        assert host.ram.final_sync_ms == scenario.ram.final_sync_ms * of[HostPart.RAM]
        assert host.vmm.other_load_ms == scenario.vmm.other_load_ms * of[HostPart.CONFIG]
        for device, own in zip(scenario.device, host.device, strict=True):
            assert own.suspend_ms == device.suspend_ms * of[HostPart.STATES]
            assert own.config_load_ms == device.config_load_ms * of[HostPart.CONFIG]
        untouched = ("link", "host", "driver", "v3")
        assert all(getattr(host, name) is getattr(scenario, name) for name in untouched)
        assert host.firmware == scenario.firmware  # its growth of state commands is 0 here


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_takes_its_hosts_times(protocol: str) -> None:
    """The stop is the source's, the resume the target's, by the same factors whatever the protocol."""
    scenario, seed = varied(), 7
    source, target = (of_host(scenario, seed, side) for side in SIDES)
    took = row(run(scenario, protocol, seed=seed))
    device = source.device[0]
    stop_ms = source.vmm.vcpu_stop_ms + device.suspend_ms + device.quiesce_ms
    assert took["phase_stop_ns"] == pytest.approx(stop_ms * 1e6, abs=2000)
    resume_ms = target.device[0].resume_ms + target.vmm.vcpu_start_ms
    round_trip_ns = 100_000 if protocol.startswith("v3") else 0  # COMMIT
    assert took["phase_resume_ns"] == pytest.approx(resume_ms * 1e6 + round_trip_ns, abs=2000)


def test_without_spread_two_seeds_take_the_same_time_and_the_scenario_is_left_as_it_is() -> None:
    scenario = varied(0.0)
    assert of_host(scenario, 1, "source") is scenario
    for protocol in PROTOCOLS:
        downtimes = {run(scenario, protocol, seed=seed).downtime_ns for seed in (1, 2)}
        assert len(downtimes) == 1


def test_what_the_guest_does_and_how_commands_vary_does_not_move() -> None:
    changes = {"firmware.service_cv": 0.2, "device.0.writes": {"pattern": "uniform", "mib_per_s": 10.0}}
    plain, spread = (
        kept_run(small_scenario(changes | {"host.spread_cv": spread_cv}), "v3-n2")[1] for spread_cv in (0.0, CV)
    )
    assert len(plain.states[0].activity.write_blocks) > 0
    assert (plain.states[0].activity.write_blocks == spread.states[0].activity.write_blocks).all()
    for of_plain, of_spread in zip(plain.drivers, spread.drivers, strict=True):
        factors_of = [driver._context.firmware._pf._factors for driver in (of_plain, of_spread)]
        assert (factors_of[0] == factors_of[1]).all()
