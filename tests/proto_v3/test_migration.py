# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations: properties over random machines, and phases that can be reckoned on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto_v3.timeline import Mark, Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.clock import virtual
from sim.device.load_v3 import V3LoadSession
from sim.device.record import HEADER_BYTES, Record
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB, ns
from tests.build.runs import prepared, run
from tests.build.scenario import small_scenario, with_p2p

PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4")
# All that can be set of v2 and of v3 is in one of these at least.
WAYS = (
    *("v2", "v2-ack", "v2-reinit-flush", "v2-reinit-invalidate-polls", "v2-reinit-flush-ack-reusable"),
    *("v2-multifd", "v2-multifd-ack-polls", "v2-multifd-reinit-invalidate-ack-reusable", "v2-multifd-reinit-flush-ack"),
    *("v3-n1", "v3-n3", "v3-n8", "v3-n4-invalidate-retry", "v3-n2-pool-retry", "v3-n3-one-invalidate"),
    *("v3-blocks-n2", "v3-blocks-n4-pool-invalidate-retry", "v3-blocks-n3-one"),
)


# --- any machine -----------------------------------------------------------------------------------------------------

FEATURES = [
    ["STOP_COPY"],
    ["STOP_COPY", "P2P"],
    ["STOP_COPY", "PRE_COPY"],
    ["STOP_COPY", "P2P", "PRE_COPY"],
]


@st.composite
def devices(draw: st.DrawFn, name: str) -> dict[str, Any]:
    state_mib = draw(st.sampled_from([0.05, 1.0, 3.3, 8.0]))
    stop_only = draw(st.sampled_from([0.0, 0.3, 1.0]))
    objects = draw(st.sampled_from([0, 1, 4, 40]))
    device: dict[str, Any] = {
        "name": name,
        "count": draw(st.integers(1, 2)),
        "pf": draw(st.integers(0, 1)),
        "features": draw(st.sampled_from(FEATURES)),
        "max_dirty_streams": 16,
        "state_mib": state_mib,
        "stop_only_mib": stop_only * state_mib,
        "block_kib": draw(st.sampled_from([4, 64, 512])),
        "suspend_ms": draw(st.sampled_from([0.0, 1.0])),
        "quiesce_ms": draw(st.sampled_from([0.0, 2.0])),
        "resume_ms": draw(st.sampled_from([0.0, 2.0])),
        "config_load_ms": draw(st.sampled_from([0.0, 3.0])),
        "critical": {
            "objects": objects,
            "object_kib": draw(st.sampled_from([0.5, 4.0, 1500.0])),
            "setup_us": draw(st.sampled_from([0.0, 100.0])),
        },
    }
    if state_mib * (1 - stop_only) >= 1 and draw(st.booleans()):
        pattern = draw(st.sampled_from(["uniform", "hotspot", "sequential"]))
        device["writes"] = {"pattern": pattern, "mib_per_s": draw(st.sampled_from([1.0, 100.0, 2000.0]))}
    if objects:
        when = st.sampled_from(
            [{}, {"poisson_per_s": 50.0}, {"poisson_per_s": 2000.0}, {"at_s": [0.0, 0.004, 0.02, 9]}]
        )
        device["reconfigurations"] = draw(when) | {
            "during_stop_ms": draw(st.sampled_from([[], [], [0.5]])),
            "objects_each": draw(st.sampled_from(sorted({1, objects}))),
        }
    return device


@st.composite
def machines(draw: st.DrawFn) -> Scenario:
    """One to four devices, of one kind or two, with any features, locks, engines, buffers and costs."""
    changes: dict[str, Any] = {
        "device": with_p2p([draw(devices(name)) for name in ["a", "b"][: draw(st.integers(1, 2))]]),
        "ram.nonzero_gib": draw(st.sampled_from([0.0, 0.001, 0.02])),
        "ram.dirty_mib_per_s": draw(st.sampled_from([0.0, 50.0, 5000.0])),
        "firmware.engines": draw(st.integers(1, 4)),
        "firmware.save_mib_per_s": draw(st.sampled_from([100.0, 1000.0, 100_000.0])),
        "firmware.load_mib_per_s": draw(st.sampled_from([100.0, 1000.0, 100_000.0])),
        "firmware.load_finish_ms": draw(st.sampled_from([0.0, 5.0])),
        "firmware.service_cv": draw(st.sampled_from([0.0, 0.03, 1.0])),
        "driver.chunk_mib": draw(st.integers(1, 3)) if draw(st.booleans()) else 1,
        "driver.chunks": draw(st.integers(1, 3)),
        "driver.lock": draw(st.sampled_from(["none", "per_fd", "device", "global"])),
        "driver.call_us": draw(st.sampled_from([0.0, 1.0])),
        "driver.precopy": draw(st.sampled_from(["incremental", "incremental", "reread", "check"])),
        "driver.reread_ms": draw(st.sampled_from([1.0, 50.0])),
        "driver.precopy_image": draw(st.sampled_from(["whole", "chunks"])),
        "driver.precopy_end": draw(st.sampled_from(["ENOMSG", "0"])),
        "driver.initial": draw(st.sampled_from(["image", "critical"])),
        "host.copy_gib_per_s": draw(st.sampled_from([0.1, 8.0])),
        "link.per_connection_gbit_per_s": draw(st.sampled_from([1.0, 40.0])),
        "link.round_trip_us": draw(st.sampled_from([0.0, 50.0, 5000.0])),
        "link.socket_buffer_mib": draw(st.sampled_from([1.0, 1.5, 64.0])),
        "vmm.read_mib": draw(st.sampled_from([0.01, 1.0])),
        "vmm.vcpu_stop_ms": draw(st.sampled_from([0.0, 1.0])),
        "vmm.vcpu_start_ms": draw(st.sampled_from([0.0, 1.0])),
        "vmm.downtime_limit_ms": draw(st.sampled_from([1.0, 20.0, 300.0])),
        "vmm.give_up_s": 0.3,
        "vmm.multifd_channels": draw(st.integers(2, 5)),
        "vmm.multifd_dedicated": draw(st.integers(0, 1)),
        "vmm.other_load_ms": draw(st.sampled_from([0.0, 2.0])),
        "vmm.device_buffer_gib_per_s": draw(st.sampled_from([0.5, 100.0])),
    }
    if draw(st.booleans()):
        changes["vmm.multifd_load"] = "channel_threads"
    else:
        changes["vmm.multifd_load_threads"] = draw(st.integers(0, 2))
    for device in changes["device"]:
        if changes["driver.chunk_mib"] * 1024 % device["block_kib"]:
            device["block_kib"] = 64
    return small_scenario(changes)


@pytest.mark.slow
@settings(max_examples=25)
@given(scenario=machines(), name=st.sampled_from(WAYS), seed=st.integers(0, 3))
def test_any_machine_ends_and_its_accounts_add_up(scenario: Scenario, name: str, seed: int) -> None:
    # That the target's image is the source's is what makes a run COMPLETED; see test_run.
    kept: list[Timeline] = []
    outcome = simulate(scenario, Protocol.parse(name, scenario), seed, keep=kept.append)
    needs_bitmap = "blocks" in name and scenario.driver.precopy != "incremental"
    assert (outcome.kind is OutcomeKind.UNSUPPORTED) == needs_bitmap
    if needs_bitmap:
        assert outcome.reason.endswith(" has no addressable blocks; addressable blocks were asked for")
        assert outcome.guest_runs_at == "source"
        return
    if outcome.kind is OutcomeKind.FAILED:
        assert "its ack comes too late" in outcome.reason
        assert "ack-reusable" in name
        assert outcome.guest_runs_at == "source"
        return
    if outcome.kind is OutcomeKind.DID_NOT_CONVERGE:
        assert outcome.reason.startswith(f"given up after {scenario.vmm.give_up_s:g} s of pre-copy: ")
        assert outcome.downtime_ns is None
        assert outcome.guest_runs_at == "source"
        assert Mark.STOP_ORDERED not in kept[0].marks
        assert outcome.total_ns is not None
        assert outcome.total_ns >= scenario.vmm.give_up_s * 1e9
        return
    assert outcome.reason == ""
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.guest_runs_at == "target"
    assert outcome.downtime_ns is not None
    assert sum(outcome.phases_ns.values()) == outcome.downtime_ns
    assert sum(outcome.critical_path_ns.values()) == outcome.downtime_ns
    assert outcome.critical_path_ns["unexplained"] == 0
    assert min(*outcome.phases_ns.values(), *outcome.critical_path_ns.values()) >= 0
    devices = scenario.devices
    state_bytes = sum(device.blocks * device.block_bytes for device in devices)
    assert outcome.counters.wire_bytes >= outcome.counters.device_bytes >= state_bytes
    slowest = max(device.suspend_ms + device.quiesce_ms for device in devices)
    assert outcome.phases_ns["stop"] >= ns(scenario.vmm.vcpu_stop_ms + slowest)
    # Config is loaded one device at a time, and after the last device that was stopped can be no other order.
    assert outcome.downtime_ns >= outcome.phases_ns["stop"] + ns(scenario.vmm.vcpu_start_ms)


# What the critical path may lead through, beside what the small scenario has.
SOME: dict[str, dict[str, Any]] = {
    "small": {},
    "several devices that load slowly": {"device.0.count": 4, "firmware.load_mib_per_s": 200.0},
    "a slow link": {"device.0.count": 2, "link.gbit_per_s": 2.0, "link.per_connection_gbit_per_s": 1.0},
    "one lock and a slow copy": {"device.0.count": 2, "driver.lock": "global", "host.copy_gib_per_s": 0.3},
    "much to set up": {"device.0.critical": {"objects": 40, "object_kib": 64.0, "setup_us": 2000.0}},
    "busy": {
        "device.0.count": 2,
        "device.0.writes": {"pattern": "hotspot", "mib_per_s": 200.0},
        "device.0.reconfigurations": {"poisson_per_s": 100.0, "objects_each": 2},
        "firmware.service_cv": 0.3,
    },
    "as mlx5": {"device.0.count": 2, "driver.precopy_image": "whole", "driver.initial": "image"},
    "without pre-copy": {"device.0.features": ["STOP_COPY"], "vmm.bandwidth_gbit_per_s": 1e6},
    "much RAM": {"ram.nonzero_gib": 0.06, "ram.dirty_mib_per_s": 50.0, "vmm.downtime_limit_ms": 100.0},
    "slow buffers": {"vmm.device_buffer_gib_per_s": 0.1, "vmm.other_load_ms": 5.0},
}


def check_downtime(outcome: Outcome) -> None:
    """Phases and critical path both account for all of it."""
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.critical_path_ns["unexplained"] == 0
    assert sum(outcome.phases_ns.values()) == sum(outcome.critical_path_ns.values()) == outcome.downtime_ns


@pytest.mark.parametrize("some", SOME)
@pytest.mark.parametrize("name", WAYS)
def test_every_nanosecond_of_the_downtime_is_accounted_for_in_every_mode(name: str, some: str) -> None:
    """Of the first seed that no reusable ack ends."""
    outcomes = (run(small_scenario(SOME[some]), name, seed) for seed in range(1, 9))
    check_downtime(next(outcome for outcome in outcomes if "its ack comes too late" not in outcome.reason))


@pytest.mark.parametrize("load", ["channel_threads", "device_threads"])
@pytest.mark.parametrize("dedicated", [0, 2])
@pytest.mark.parametrize("slow", ["several devices that load slowly", "a slow link", "one lock and a slow copy"])
def test_multifd_in_all_its_ways_is_accounted_for(slow: str, dedicated: int, load: str) -> None:
    multifd = {"vmm.multifd_channels": 4, "vmm.multifd_dedicated": dedicated, "vmm.multifd_load": load}
    check_downtime(run(small_scenario(SOME[slow] | multifd), "v2-multifd"))


LATE = {
    "device.0.critical": {"objects": 4, "object_kib": 4096.0, "setup_us": 100.0},
    "device.0.reconfigurations": {"during_stop_ms": [0.3], "objects_each": 4},
    "device.0.suspend_ms": 0.0,
    "device.0.quiesce_ms": 0.0,
}


@pytest.mark.parametrize(
    "name",
    [
        "v2",
        "v2-multifd",
        "v2-reinit-flush-ack",
        "v3-n1",
        "v3-n4",
        "v3-n4-pool-invalidate",
        "v3-blocks-n4",
        "v3-n4-one-retry",
    ],
)
def test_a_reconfiguration_during_the_stop_that_all_waits_for_is_accounted_for(name: str) -> None:
    """16 MiB of critical data: what is late is the critical path, from the guest's deed on."""
    check_downtime(run(small_scenario(LATE), name))


# A reconfiguration each millisecond, at the very instants at which the VMM and the firmware act.
IN_STEP = small_scenario(
    {
        "device.0.critical": {"objects": 8, "object_kib": 4.0, "setup_us": 100.0},
        "device.0.writes": {"pattern": "uniform", "mib_per_s": 64_000 / 1024},
        "device.0.reconfigurations": {"at_s": [i / 1000 for i in range(300)], "objects_each": 4},
        "device.0.suspend_ms": 0.0,
        "device.0.quiesce_ms": 0.0,
        "driver.call_us": 0.0,
        "firmware.save_command_us": 0.0,
        "vmm.downtime_limit_ms": 2.0,
    }
)


@pytest.mark.slow
@pytest.mark.rule("v3.5.2")
@settings(max_examples=20)
@given(scenario=machines(), name=st.sampled_from([way for way in WAYS if way.startswith("v3")]))
@example(scenario=IN_STEP, name="v3-n1")
@example(scenario=IN_STEP, name="v3-n4")
@example(scenario=IN_STEP, name="v3-n2-pool-invalidate-retry")
@example(scenario=IN_STEP, name="v3-blocks-n4")
def test_v3_loads_nothing_dirty_before_the_critical_data_of_its_epoch(scenario: Scenario, name: str) -> None:
    """Reckoned from the guest's plan: in epoch e the first e - 1 reconfigurations have happened."""
    run = prepared(scenario, name)
    original = V3LoadSession.load
    early: list[str] = []
    loaded = 0

    async def watched(self: V3LoadSession, record: Record) -> None:
        nonlocal loaded
        await original(self, record)
        loaded += 1
        if len(record.blocks):
            (activity,) = (s.activity for s, image in zip(run.states, run.images, strict=True) if image is self.image)
            new = activity.reconfiguration_objects[: record.epoch - 1].ravel()
            if (self.image.object_version < np.bincount(new, minlength=self.image.object_version.size)).any():
                early.append(f"stream {record.stream}, record {record.sequence}, epoch {record.epoch}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V3LoadSession, "load", watched)
        outcome = virtual.run(run.outcome())
    assert loaded or outcome.kind is not OutcomeKind.COMPLETED
    assert early == []


# --- phases on paper -------------------------------------------------------------------------------------------------

# One device whose state can only be saved when it is stopped, next to no RAM, and a limit that is never in the way.
STOPPED = {
    "ram.size_gib": 0.001,
    "ram.nonzero_gib": 0.0,
    "ram.working_set_mib": 0.001,
    "ram.final_sync_ms": 0.0,
    "ram.final_scan_ms": 0.0,
    "device.0.state_mib": 64.0,
    "device.0.stop_only_mib": 64.0,
    "device.0.critical.objects": 0,
    "vmm.bandwidth_gbit_per_s": 1e6,
}
# Whatever is not put to the test takes next to no time.
FAST = {
    "firmware.save_mib_per_s": 1e7,
    "firmware.save_command_us": 0.0,
    "firmware.load_mib_per_s": 1e7,
    "firmware.load_command_us": 0.0,
    "firmware.load_finish_ms": 0.0,
    "driver.call_us": 0.0,
    "host.copy_gib_per_s": 1e5,
    "host.memory_gib_per_s": 1e5,
    "link.gbit_per_s": 1e6,
    "link.per_connection_gbit_per_s": 1e6,
    "link.round_trip_us": 0.0,
    "link.socket_buffer_mib": 64.0,
}


def moved_ms(outcome: Outcome) -> float:
    """From the guest stopped to its devices loaded."""
    return sum(outcome.phases_ns[phase] for phase in ("drain", "transfer", "load")) / 1e6


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_stop_config_and_resume_are_the_machines_own_costs(protocol: str) -> None:
    costs = {"vmm.vcpu_stop_ms": 3.0, "device.0.suspend_ms": 5.0, "device.0.quiesce_ms": 7.0, "vmm.vcpu_start_ms": 11.0}
    scenario = small_scenario(STOPPED | FAST | costs | {"device.0.config_load_ms": 13.0})
    phases = run(scenario, protocol).phases_ns
    assert phases["stop"] == ns(3.0 + 5.0 + 7.0)
    assert phases["config"] == ns(13.0)
    assert phases["resume"] == pytest.approx(ns(11.0), abs=1000)


def test_devices_are_stopped_one_after_the_other() -> None:
    scenario = small_scenario(STOPPED | {"device.0.count": 5})
    phases = run(scenario, "v2").phases_ns
    assert phases["stop"] == ns(1.0 + 5 * (1.0 + 2.0))
    assert phases["config"] == 5 * ns(3.0)


def test_v3_resumes_a_round_trip_later_than_v2() -> None:
    """LOADED and COMMIT: the price of at most one side running."""
    scenario = small_scenario(STOPPED | {"link.round_trip_us": 4000.0})
    v2, v3 = (run(scenario, protocol).phases_ns["resume"] for protocol in ("v2", "v3-n1"))
    assert v2 == ns(1.0)
    assert v3 - v2 == pytest.approx(ns(4.0), abs=1000)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_downtime_is_no_less_than_any_one_resource_needs(protocol: str) -> None:
    scenario = small_scenario(STOPPED)
    outcome = run(scenario, protocol)
    streams = {"v3-n4": 4}.get(protocol, 1)
    at_once = min(streams, scenario.firmware.engines)
    host, link = scenario.host, scenario.link
    channels = scenario.vmm.multifd_channels if protocol == "v2-multifd" else streams
    connections = min(channels, link.gbit_per_s / link.per_connection_gbit_per_s)
    needed_ms = {
        "firmware": 64 / scenario.firmware.save_mib_per_s / at_once * 1e3,
        "load": 64 / scenario.firmware.load_mib_per_s / at_once * 1e3 + scenario.firmware.load_finish_ms,
        "link": 64 * MIB * 8 / (link.per_connection_gbit_per_s * 1e9) / connections * 1e3,
        "copy": 64 / (host.copy_gib_per_s * 1024) / streams * 1e3,
    }
    assert moved_ms(outcome) >= max(needed_ms.values())
    # One after the other is the most that it could be.
    assert moved_ms(outcome) <= 2 * sum(needed_ms.values())


# What one resource alone gives, in ms for 64 MiB in records of 1 MiB.
ALONE: dict[str, tuple[Mapping[str, Any], float]] = {
    "firmware": ({"firmware.save_mib_per_s": 640.0}, 100.0),
    "command": ({"firmware.save_command_us": 1000.0}, 64.0),
    "load": ({"firmware.load_mib_per_s": 640.0}, 100.0),
    "finish": ({"firmware.load_finish_ms": 50.0}, 50.0),
    "link": ({"link.gbit_per_s": 1.0, "link.per_connection_gbit_per_s": 1.0}, 64 * MIB * 8 / 1e6),
    "copy": ({"host.copy_gib_per_s": 0.625, "host.memory_gib_per_s": 0.625, "vmm.read_mib": 0.0625}, 100.0),
}


@pytest.mark.parametrize("resource", ALONE)
@pytest.mark.parametrize("protocol", ["v2", "v3-n1"])
def test_one_slow_resource_gives_the_time_and_is_the_critical_path(protocol: str, resource: str) -> None:
    slow, expected_ms = ALONE[resource]
    outcome = run(small_scenario(STOPPED | FAST | slow), protocol)
    assert moved_ms(outcome) == pytest.approx(expected_ms, rel=0.03)
    name = {"command": "firmware", "finish": "load"}.get(resource, resource)
    assert outcome.critical_path_ns[name] / 1e6 == pytest.approx(expected_ms, rel=0.03)


def test_the_drain_is_the_firmwares_time_to_within_a_chunk() -> None:
    """Copy and link keep up: but for the last chunk, all of it is hidden behind the firmware's."""
    scenario = small_scenario(STOPPED | {"firmware.save_command_us": 500.0})
    records = 64 * (500e3 + (MIB + HEADER_BYTES) / MIB / 1024 * 1e9)
    chunk_ns = records / 64
    assert records <= run(scenario, "v2").phases_ns["drain"] <= records + chunk_ns


@pytest.mark.rule("v3.3.12", "v3.7.2")
@pytest.mark.parametrize("engines", [1, 3, 4])
@pytest.mark.parametrize("lock", ["none", "per_fd"])
def test_n_streams_and_f_engines_save_n_or_f_times_as_fast(engines: int, lock: str) -> None:
    slow = {"firmware.save_mib_per_s": 640.0, "firmware.engines": engines, "driver.lock": lock}
    scenario = small_scenario(STOPPED | FAST | slow)
    for streams in (1, 2, 4, 8):
        drain_ms = run(scenario, f"v3-n{streams}").phases_ns["drain"] / 1e6
        # 64 records over 3 engines, or in 8 streams of 8: the last turn may not be a full one.
        assert drain_ms == pytest.approx(100.0 / min(streams, engines), rel=0.1), f"{streams} streams"


@pytest.mark.rule("v3.3.12")
@pytest.mark.parametrize("lock", ["device", "global"])
def test_under_one_lock_more_streams_buy_nothing_where_the_copy_binds(lock: str) -> None:
    slow = {"host.copy_gib_per_s": 0.625, "firmware.engines": 8, "driver.lock": lock}
    one, eight = (run(small_scenario(STOPPED | FAST | slow), f"v3-n{streams}") for streams in (1, 8))
    assert eight.phases_ns["drain"] == pytest.approx(one.phases_ns["drain"], rel=0.03)
    assert eight.critical_path_ns["lock"] + eight.critical_path_ns["copy"] > 0.9 * eight.phases_ns["drain"]
    assert eight.counters.read_lock_ns > one.counters.read_lock_ns == 0


@pytest.mark.rule("v3.3.12")
@pytest.mark.parametrize("lock", ["none", "per_fd"])
def test_without_one_lock_streams_copy_at_once_where_the_copy_binds(lock: str) -> None:
    slow = {"host.copy_gib_per_s": 0.625, "firmware.engines": 8, "driver.lock": lock}
    one, eight = (run(small_scenario(STOPPED | FAST | slow), f"v3-n{streams}") for streams in (1, 8))
    assert eight.phases_ns["drain"] == pytest.approx(one.phases_ns["drain"] / 8, rel=0.1)
    assert eight.counters.read_lock_ns == 0


def test_memory_bounds_all_copies_together() -> None:
    slow = {"host.copy_gib_per_s": 0.625, "host.memory_gib_per_s": 1.25, "firmware.engines": 8, "driver.lock": "none"}
    one, eight = (run(small_scenario(STOPPED | FAST | slow), f"v3-n{streams}") for streams in (1, 8))
    assert eight.phases_ns["drain"] == pytest.approx(one.phases_ns["drain"] / 2, rel=0.1)


def test_a_devices_lock_is_its_own_and_the_global_one_is_shared() -> None:
    slow = {"host.copy_gib_per_s": 0.625, "device.0.count": 4, "firmware.engines": 8}
    machine = STOPPED | FAST | slow | {"device.0.suspend_ms": 0.0, "device.0.quiesce_ms": 0.0}
    own, shared = (
        run(small_scenario(machine | {"driver.lock": lock}), "v3-n1").phases_ns["drain"]
        for lock in ("device", "global")
    )
    assert shared == pytest.approx(4 * own, rel=0.03)


@pytest.mark.rule("v2.driver.16")
def test_devices_of_two_pfs_do_not_share_engines() -> None:
    machine = STOPPED | FAST | {"firmware.save_mib_per_s": 640.0, "firmware.engines": 1}
    device = small_scenario(machine).device[0].model_dump(exclude_none=True)
    drains = []
    for pf in (0, 1):
        scenario = small_scenario(machine | {"device.1": device | {"name": "other", "pf": pf}})
        drains.append(run(scenario, "v3-n1").phases_ns["drain"])
    assert drains[0] == pytest.approx(2 * drains[1], rel=0.1)


def test_connections_share_the_link_but_each_has_its_limit() -> None:
    link = {"link.gbit_per_s": 4.0, "link.per_connection_gbit_per_s": 1.0}
    scenario = small_scenario(STOPPED | FAST | link | {"link.socket_buffer_mib": 1.0})
    one_connection_ms = 64 * MIB * 8 / 1e6
    for streams, fold in ((1, 1), (2, 2), (4, 4), (8, 4)):
        moved = moved_ms(run(scenario, f"v3-n{streams}"))
        assert moved == pytest.approx(one_connection_ms / fold, rel=0.1), f"{streams} streams"


# --- more of anything does not make v2 slower ------------------------------------------------------------------------

# With one device, nothing written, and the limit out of the way, v2 is a line of servers with bounded queues between
# them and no decision in it: when one of them is faster, nothing comes later.
SPEEDS: dict[str, list[float]] = {
    "link.per_connection_gbit_per_s": [0.5, 1.0, 3.0, 10.0, 40.0],
    "link.socket_buffer_mib": [1.0, 2.0, 4.0, 16.0],
    "firmware.save_mib_per_s": [50.0, 200.0, 1000.0, 5000.0],
    "firmware.load_mib_per_s": [50.0, 200.0, 1000.0, 5000.0],
    "host.copy_gib_per_s": [0.05, 0.3, 1.0, 16.0],
    "driver.chunks": [1, 2, 4],
}


@pytest.mark.parametrize("key", SPEEDS)
def test_v2_is_no_slower_for_a_faster_part(key: str) -> None:
    downtimes = [run(small_scenario(STOPPED | {key: value}), "v2").downtime_ns for value in SPEEDS[key]]
    assert downtimes == sorted(downtimes, reverse=True)  # type: ignore[type-var]
    assert downtimes[-1] < downtimes[0]  # type: ignore[operator]


# --- when the guest is stopped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_critical_set_up_is_in_the_downtime_for_v2_only(protocol: str) -> None:
    """A reconfiguration a little before the end of pre-copy: v3 waits until it is set up at the target."""
    changes = {
        "device.0.critical": {"objects": 50, "object_kib": 4.0, "setup_us": 1000.0},
        "device.0.reconfigurations": {"at_s": [0.01, 0.02], "objects_each": 50},
        "ram.nonzero_gib": 0.03,
        "vmm.downtime_limit_ms": 5.0,
    }
    outcome = run(small_scenario(changes), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED
    if protocol.startswith("v2"):
        assert outcome.setup_in_downtime_ns >= ns(50.0)
    else:
        assert outcome.setup_in_downtime_ns == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_given_bandwidth_is_used_in_place_of_the_measured_one(protocol: str) -> None:
    stop_only = {"device.0.stop_only_mib": 4.0, "ram.nonzero_gib": 0.0}
    kinds = [run(small_scenario(stop_only | {"vmm.bandwidth_gbit_per_s": gbit}), protocol).kind for gbit in (1.0, 3.0)]
    # 4 MiB in 20 ms need 1.7 Gbit/s.
    assert kinds == [OutcomeKind.DID_NOT_CONVERGE, OutcomeKind.COMPLETED]
