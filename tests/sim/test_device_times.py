# SPDX-License-Identifier: GPL-2.0-or-later
"""A device's fixed times: what grows with the VFs of its PF and with its size, as formulas, and in whole runs."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.runs.frame import row
from sim.scenario.times import DeviceTimes, device_times
from tests.build.runs import run
from tests.build.scenario import small_scenario

MS = 1_000_000
FIXED = {
    "device.0.suspend_ms": 1.0,
    "device.0.quiesce_ms": 2.0,
    "device.0.resume_ms": 4.0,
    "device.0.config_load_ms": 3.0,
    "firmware.load_finish_ms": 5.0,
}


def times_of(changes: dict[str, Any]) -> list[DeviceTimes]:
    return device_times(small_scenario(FIXED | changes))


def test_without_growth_they_are_the_devices_own() -> None:
    own = DeviceTimes(1 * MS, 2 * MS, 4 * MS, 5 * MS, 3 * MS)
    assert times_of({"device.0.count": 3, "device.0.vectors": 65}) == [own] * 3


@pytest.mark.parametrize("vfs", [1, 2, 4])
def test_a_state_command_grows_with_the_vfs_of_its_pf(vfs: int) -> None:
    """The published fit: suspend = quiesce = 20 + 11.5 n ms, n VFs of the PF."""
    fit = {"device.0.suspend_ms": 20.0, "device.0.quiesce_ms": 20.0, "firmware.state_command_ms_per_vf": 11.5}
    each = round((20 + 11.5 * vfs) * MS)
    times = times_of(fit | {"device.0.count": vfs})
    assert [(one.suspend_ns, one.quiesce_ns, one.resume_ns) for one in times] == [(each, each, 4 * MS)] * vfs


@pytest.mark.parametrize(
    ("share", "suspend_ms", "quiesce_ms"), [(0.0, 41, 2), (0.25, 31, 12), (0.5, 21, 22), (1.0, 1, 42)]
)
def test_what_is_added_to_both_state_commands_may_be_shared_otherwise(
    share: float, suspend_ms: int, quiesce_ms: int
) -> None:
    growth = {"firmware.state_command_ms_per_vf": 20.0, "firmware.quiesce_share": share}
    (times,) = times_of(growth)
    assert (times.suspend_ns, times.quiesce_ns) == (suspend_ms * MS, quiesce_ms * MS)


def test_vfs_of_another_pf_and_their_vectors_do_not_count() -> None:
    other = small_scenario(FIXED).model_dump(exclude_unset=True)["device"][0] | {"name": "other", "pf": 1}
    growth = {"firmware.state_command_ms_per_vf": 10.0, "firmware.state_command_us_per_pf_vector": 1000.0}
    times = times_of({"device.0.count": 2, "device.0.vectors": 3, "device.1": other | {"vectors": 7}} | growth)
    assert [one.suspend_ns // MS for one in times] == [1 + 20 + 6, 1 + 20 + 6, 1 + 10 + 7]


def test_what_grows_with_the_size_of_a_vf() -> None:
    growth = {
        "firmware.state_command_us_per_vector": 100.0,
        "firmware.load_finish_us_per_vector": 200.0,
        "vmm.config_load_us_per_vector": 300.0,
    }
    sized = DeviceTimes(11 * MS, 12 * MS, 4 * MS, 25 * MS, 33 * MS)
    assert times_of(growth | {"device.0.vectors": 100, "device.0.count": 2}) == [sized] * 2
    assert times_of(growth) == times_of({})


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n2"])
def test_a_run_takes_what_they_say(protocol: str) -> None:
    """Its state is all in the downtime; two state commands of 10 ms more each, the end of the load, and the config."""
    at = FIXED | {
        "device.0.vectors": 10,
        "device.0.features": ["STOP_COPY", "P2P"],
        "vmm.downtime_limit_ms": 200.0,
        "vmm.bandwidth_gbit_per_s": 10.0,
        "ram.nonzero_gib": 0.0,  # or more of it may be left at the stop: the target enters RESUMING later, too
    }
    grown = at | {
        "firmware.state_command_ms_per_vf": 4.0,
        "firmware.state_command_us_per_vector": 200.0,
        "firmware.state_command_us_per_pf_vector": 400.0,
        "firmware.load_finish_us_per_vector": 7000.0,
        "vmm.config_load_us_per_vector": 2000.0,
    }
    before, after = (row(run(small_scenario(keys), protocol)) for keys in (at, grown))
    assert after["phase_stop_ns"] - before["phase_stop_ns"] == 2 * 10 * MS
    assert after["phase_config_ns"] - before["phase_config_ns"] == 20 * MS
    assert after["downtime_ns"] - before["downtime_ns"] == (2 * 10 + 70 + 20) * MS


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n2"])
def test_the_stop_of_several_vfs_is_the_sum(protocol: str) -> None:
    """vCPUs 1 ms, and for each of n VFs twice 20 + 11.5 n ms: the fit's quadratic growth."""
    fit = {"device.0.suspend_ms": 20.0, "device.0.quiesce_ms": 20.0, "firmware.state_command_ms_per_vf": 11.5}
    for vfs in (1, 2, 4):
        took = row(run(small_scenario(FIXED | fit | {"device.0.count": vfs}), protocol))
        # v3 asks each device once more for its epoch, a call of 1 us.
        assert took["phase_stop_ns"] == pytest.approx((1 + vfs * 2 * (20 + 11.5 * vfs)) * MS, abs=vfs * 1000)
