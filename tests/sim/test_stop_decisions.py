# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration that does not go by the book: a limit that rises, a stop by force, sizes that are wrong, a guest that
resets its device, a kernel that knows no REINIT."""

from __future__ import annotations

from typing import Any

import pytest

from proto_v3.errors import UserError
from proto_v3.vmm.migration import OutcomeKind
from sim.outcome import Outcome
from sim.scenario.units import MIB
from tests.build.hosts import MS
from tests.build.runs import kept_run, run
from tests.build.scenario import small_scenario

PROTOCOLS = ["v2", "v2-multifd", "v3-n1", "v3-n4", "v3-blocks-n2"]
BEYOND = {"device.0.writes": {"mib_per_s": 8000.0}, "driver.stop_copy_size": "left", "vmm.give_up_s": 1.0}
"""The guest writes more than any link carries."""


def moved(protocol: str, *changes: dict[str, Any]) -> Outcome:
    merged: dict[str, Any] = {}
    for each in changes:
        merged |= each
    return run(small_scenario(merged), protocol)


def stop_ordered_ns(outcome: Outcome) -> int:
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.total_ns is not None
    assert outcome.downtime_ns is not None
    return outcome.total_ns - outcome.downtime_ns


# --- a stop by force -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("after_s", [0.2, 0.7])
def test_a_guest_is_stopped_by_force_in_the_round_in_which_its_time_is_over(protocol: str, after_s: float) -> None:
    beyond = BEYOND | {"vmm.downtime_limit_ms": 1.0}
    assert moved(protocol, beyond).kind is OutcomeKind.DID_NOT_CONVERGE
    outcome = moved(protocol, beyond, {"vmm.force_after_s": after_s})
    late_ns = stop_ordered_ns(outcome) - after_s * 1000 * MS
    assert 0 <= late_ns < 30 * MS
    assert outcome.note.startswith("stopped by force with ")
    assert outcome.over_limit_ratio is not None
    assert outcome.over_limit_ratio > 2


SLOW_SETUP = {
    "device.0.critical": {"objects": 4, "object_kib": 4.0, "setup_us": 150_000.0},
    "device.0.state_mib": 1.0,  # all that is sent has room in the socket: the source looks at its clock
    "ram.nonzero_gib": 1 / 1024,
}


@pytest.mark.parametrize("protocol", ["v2-ack", "v2-reinit-flush-ack-reusable", "v3-n1"])
def test_by_force_no_ack_and_no_epoch_is_waited_for(protocol: str) -> None:
    """Set-up takes 600 ms, and is in the downtime then."""
    outcome = moved(protocol, SLOW_SETUP, {"vmm.force_after_s": 0.3})
    assert stop_ordered_ns(outcome) >= 300 * MS
    assert outcome.setup_in_downtime_ns is not None
    assert 250 * MS < outcome.setup_in_downtime_ns < 350 * MS
    assert outcome.note.count("critical data of dev") == protocol.startswith("v3"), "told once"
    waited = moved(protocol, SLOW_SETUP)
    assert stop_ordered_ns(waited) > 600 * MS
    assert waited.setup_in_downtime_ns == 0


def test_by_force_a_reinit_of_the_last_moment_does_not_fail_the_migration() -> None:
    late = {"device.0.reconfigurations": {"during_stop_ms": [0.2]}}
    protocol = "v2-reinit-flush-ack-reusable"
    assert moved(protocol, late).kind is OutcomeKind.FAILED
    outcome = moved(protocol, late, BEYOND, {"vmm.force_after_s": 0.2, "vmm.downtime_limit_ms": 1.0})
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.late_reconfigured_objects == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_time_that_is_not_reached_changes_nothing(protocol: str) -> None:
    assert moved(protocol, {"vmm.force_after_s": 1.9}).digest == moved(protocol).digest


# --- a limit that rises ----------------------------------------------------------------------------------------------

STEPS = {"vmm.downtime_steps": [{"after_s": 0.3, "limit_ms": 30.0}, {"after_s": 0.9, "limit_ms": 60.0}]}


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n1", "v3-n4"])
@pytest.mark.parametrize(("state_mib", "step"), [(8.0, 0), (24.0, 1), (56.0, 2)])
def test_the_guest_is_stopped_at_the_first_step_at_which_its_state_fits(
    protocol: str, state_mib: float, step: int
) -> None:
    """State that only a stopped device gives, at 8 Gbit/s: 9.5, 28 and 57 MiB fit 10, 30 and 60 ms."""
    state = {"device.0.state_mib": state_mib, "device.0.stop_only_mib": state_mib, "vmm.bandwidth_gbit_per_s": 8.0}
    outcome = moved(protocol, state, STEPS, {"vmm.downtime_limit_ms": 10.0})
    after_ns, limit_ms = [(0, 10), (300 * MS, 30), (900 * MS, 60)][step]
    assert after_ns <= stop_ordered_ns(outcome) < after_ns + 40 * MS
    assert outcome.downtime_limit_ns == limit_ms * MS
    assert outcome.over_limit_ratio == pytest.approx(outcome.downtime_ns / (limit_ms * MS))  # type: ignore[operator]


def test_a_migration_that_does_not_converge_tells_the_limit_that_it_had_at_the_end() -> None:
    steps = {"vmm.downtime_steps": [{"after_s": 0.5, "limit_ms": 1.5}]}
    outcome = moved("v2", BEYOND, steps, {"vmm.downtime_limit_ms": 1.0})
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert "a downtime limit of 1.5 ms" in outcome.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vmm.downtime_steps": [{"after_s": 2.0, "limit_ms": 1.0}, {"after_s": 1.0, "limit_ms": 2.0}]}, "must grow"),
        ({"vmm.downtime_steps": [{"after_s": 2.0}]}, "limit_ms"),
        (
            {"vmm.downtime_steps": [{"after_s": 1.0, "limit_ms": 9.0}, {"after_s": 2.0, "limit_ms": 90.0}]},
            "downtime_steps: after_s = 2: must be less than give_up_s = 2",
        ),
        ({"vmm.force_after_s": 2.0}, "must be less than give_up_s = 2"),
        (
            {"driver.precopy": "reread", "driver.finish_again_ms": 9.0, "firmware.load_finish_ms": 8.0},
            r"finish_again_ms = 9: must be at most what the end of a load takes the first time, 8 ms for device\.0",
        ),
        ({"driver.stop_copy_size_factor": 0.0}, "stop_copy_size_factor"),
        ({"device.0.guest_resets_at_s": [-1.0]}, "guest_resets_at_s"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_scenario(changes)


# --- sizes that are wrong --------------------------------------------------------------------------------------------

STOP_ONLY = {"device.0.state_mib": 64.0, "device.0.stop_only_mib": 64.0, "vmm.bandwidth_gbit_per_s": 8.0}


@pytest.mark.parametrize("protocol", ["v2", "v2-multifd", "v3-n1", "v3-n4"])
def test_by_a_size_that_is_too_small_the_guest_is_stopped_too_early_and_by_one_too_large_never(protocol: str) -> None:
    """64 MiB do not fit 50 ms at 8 Gbit/s, a half of them does; and a half of what fits 100 ms."""
    limit = {"vmm.downtime_limit_ms": 50.0}
    assert moved(protocol, STOP_ONLY, limit).kind is OutcomeKind.DID_NOT_CONVERGE
    for factor in (0.5, 0.05):
        too_small = moved(protocol, STOP_ONLY, limit, {"driver.stop_copy_size_factor": factor})
        assert too_small.kind is OutcomeKind.COMPLETED
        assert too_small.downtime_ns is not None
        assert too_small.downtime_ns > 64 / 1024 * 1000 * MS / (2 if "n4" in protocol else 1)
    fits = {"vmm.downtime_limit_ms": 100.0}
    assert moved(protocol, STOP_ONLY, fits).kind is OutcomeKind.COMPLETED
    too_large = moved(protocol, STOP_ONLY, fits, {"driver.stop_copy_size_factor": 2.0})
    assert too_large.kind is OutcomeKind.DID_NOT_CONVERGE
    assert f"dev {2 * 64}" in too_large.reason


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "v2-ack", "v2-reinit-flush-ack-reusable"])
@pytest.mark.parametrize("factor", [0.0, 0.01, 30.0])
def test_whatever_precopy_info_says_the_target_has_what_the_guest_wrote(protocol: str, factor: float) -> None:
    busy = {
        "device.0.writes": {"mib_per_s": 100.0},
        "device.0.reconfigurations": {"at_s": [0.03, 0.05]},
        "driver.precopy_info_factor": factor,
        "vmm.downtime_limit_ms": 60.0,
    }
    outcome, kept = kept_run(small_scenario(busy), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert not kept.images[0].differences(kept.states[0])
    assert outcome.counters.device_bytes > 8 * MIB


# --- a guest that resets its device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "v2-ack"])
@pytest.mark.parametrize("at_s", [0.02, 0.1])
def test_a_guest_that_resets_its_device_in_pre_copy_fails_the_migration_and_goes_on(protocol: str, at_s: float) -> None:
    outcome = moved(protocol, BEYOND, {"device.0.guest_resets_at_s": [at_s], "vmm.downtime_limit_ms": 1.0})
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.guest_runs_at == "source"
    assert outcome.counters.stopped_in_vain_ns == 0
    assert outcome.counters.devices_reset_under_guest == 0, "by the guest, not under it"
    assert outcome.reason.startswith("source, dev")
    assert "ENODEV" in outcome.reason
    assert "first cause: the guest reset the device" in outcome.reason
    assert outcome.total_ns is not None
    assert at_s * 1000 * MS <= outcome.total_ns < (at_s * 1000 + 60) * MS


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_before_the_session_after_it_and_without_pre_copy_a_reset_is_the_guests_own_matter(protocol: str) -> None:
    never = moved(protocol)
    for at_s in (0.0001, 1.5):
        assert moved(protocol, {"device.0.guest_resets_at_s": [at_s]}).downtime_ns == never.downtime_ns
    no_precopy = {"device.0.features": ["STOP_COPY", "P2P"]}
    assert moved(protocol, no_precopy, {"device.0.guest_resets_at_s": [0.01]}).kind is OutcomeKind.COMPLETED


# --- a kernel without MIG_PRECOPY_INFOv2 -----------------------------------------------------------------------------


def test_a_kernel_without_precopy_info_v2_is_used_as_by_a_vmm_that_did_not_ask() -> None:
    busy = {"device.0.reconfigurations": {"at_s": [0.02, 0.04, 0.06]}, "device.0.writes": {"mib_per_s": 300.0}}
    unknown = moved("v2-reinit-flush-ack", busy, {"driver.precopy_info_v2": False})
    assert unknown.kind is OutcomeKind.COMPLETED
    assert unknown.digest == moved("v2-ack", busy).digest
