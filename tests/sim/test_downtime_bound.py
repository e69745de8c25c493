# SPDX-License-Identifier: GPL-2.0-or-later
"""The bound: no run is below it, runs that one resource holds up are at it, and it follows the scenario's figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.runs.frame import row
from proto_v3.vmm.migration import OutcomeKind
from sim.scenario.file import load, shipped
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.theory.downtime_bound import DowntimeBound, LowerBound, lower_bound, queue_ns
from sim.theory.work import stops_ns
from tests.build.runs import run
from tests.build.scenario import small_scenario

MS = 1_000_000
RESOURCES = ["firmware", "copy", "lock", "link", "load", "ram", "config"]
PROTOCOLS = [
    "v2", "v2-multifd", "v2-multifd-early", "v2-multifd-threads", "v2-single", "v2-ack",
    "v3-n1", "v3-n4", "v3-n8-pool", "v3-n2-one",
    "v3-n4-invalidate", "v3-n4-retry", "v3-blocks-n4", "v3-blocks-n2-pool", "v3-n2-pool-multifd",
]  # fmt: skip
MOST_MIB = 512.0
"""A larger state is cut to this, so that the runs are quick."""


def bound_of(scenario: Scenario, protocol: str) -> DowntimeBound:
    parsed = Protocol.parse(protocol, scenario)
    return lower_bound(parsed.applied(scenario))


def ratio(scenario: Scenario, protocol: str) -> float:
    """Downtime over bound; the downtime is no less."""
    outcome = run(scenario, protocol)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.downtime_ns is not None
    assert outcome.bound_ns == bound_of(scenario, protocol).total_ns
    assert outcome.downtime_ns >= outcome.bound_ns > 0, outcome.bound_by
    return outcome.downtime_ns / outcome.bound_ns


def even(name: str) -> Scenario:
    """A shipped scenario with service times that do not vary, and not more state than a quick run can have."""
    scenario = load(name)
    devices = [
        device.model_copy(update={"state_mib": min(device.state_mib, MOST_MIB)})
        if device.stop_only_mib < MOST_MIB
        else device.model_copy(update={"state_mib": MOST_MIB, "stop_only_mib": MOST_MIB})
        for device in scenario.device
    ]
    firmware = scenario.firmware.model_copy(update={"service_cv": 0.0})
    return scenario.model_copy(update={"firmware": firmware, "device": devices})


# --- no run is below it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("at", "name"), list(enumerate(shipped())))
def test_no_shipped_scenario_is_below_its_bound(at: int, name: str) -> None:
    """Each with some of the protocols, in turn. A driver that reads all of its context again has no blocks."""
    rereads = load(name).driver.precopy == "reread"
    for protocol in {"v2", "v3-n4"}.union((PROTOCOLS * 2)[at % len(PROTOCOLS) :][:2]):
        if rereads and "blocks" in protocol:
            continue
        ratio(even(name), protocol)


@pytest.mark.parametrize(
    ("name", "protocol", "by", "most"),
    [
        ("favours-v2", "v2", "link", 1.01),
        ("favours-v2", "v3-n4", "link", 1.05),
        ("horon-switchover-ack", "v3-n4", "firmware", 1.02),
        ("live-biglock", "v3-n4", "lock", 1.05),
        ("mlx5-2vf", "v2-multifd", "config", 1.01),
        ("mlx5-2vf", "v2", "load", 1.25),
        ("szmigiero-1vf", "v2-multifd", "firmware", 1.01),
        ("vmware-v100-1gb", "v3-n2-one", "link", 1.02),
    ],
)
def test_how_near_it_is_where_it_is_known_what_holds_a_run_up(name: str, protocol: str, by: str, most: float) -> None:
    scenario = even(name)
    assert ratio(scenario, protocol) < most
    assert bound_of(scenario, protocol).resource == by


FEATURES = [["STOP_COPY", "P2P", "PRE_COPY"], ["STOP_COPY", "PRE_COPY"], ["STOP_COPY", "P2P"], ["STOP_COPY"]]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small ones, of devices, drivers, firmware and networks of all kinds."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    link = one_of(1.0, 10.0, 400.0)
    state = one_of(1.0, 4.0)
    changes = {
        "firmware.engines": one_of(1.0, 1.5, 8.0),
        "firmware.save_engines": one_of(1.0, 2.5, 8.0),
        "firmware.load_engines": one_of(1.0, 2.5, 8.0),
        "firmware.vf_engines": one_of(1.0, 1.5, 8.0),
        "firmware.state_command_ms_per_vf": one_of(0.0, 5.0),
        "firmware.state_commands": one_of("parallel", "serial"),
        "vmm.parallel_stop": one_of(False, True),
        "vmm.parallel_config": one_of(False, True),
        "firmware.state_command_us_per_pf_vector": one_of(0.0, 70.0),
        "firmware.load_finish_us_per_vector": one_of(0.0, 300.0),
        "vmm.config_load_us_per_vector": one_of(0.0, 300.0),
        "device.0.vectors": one_of(0, 65),
        "vmm.multifd_sync_us_per_channel": one_of(0.0, 1000.0),
        "vmm.multifd_close_us_per_channel": one_of(0.0, 5000.0),
        "host.wake_up_us": one_of(0.0, 200.0),
        "firmware.save_mib_per_s": one_of(100.0, 1024.0, 1e6),
        "firmware.load_mib_per_s": one_of(100.0, 1024.0, 1e6),
        "firmware.save_command_us": one_of(0.0, 700.0),
        "firmware.load_command_us": one_of(0.0, 700.0),
        "firmware.load_finish_ms": one_of(0.0, 30.0),
        "driver.lock": one_of("none", "per_fd", "device", "global"),
        "driver.call_us": one_of(0.0, 100.0),
        "driver.precopy": one_of("incremental", "incremental", "reread", "check"),
        "driver.reread_ms": 5.0,
        "driver.precopy_image": one_of("whole", "chunks"),
        "driver.initial": one_of("image", "critical"),
        "driver.chunks": one_of(1, 2, 5),
        "host.copy_gib_per_s": one_of(0.05, 4.0),
        "link.gbit_per_s": link,
        "link.per_connection_gbit_per_s": min(link, one_of(1.0, 400.0)),
        "link.round_trip_us": one_of(0.0, 5000.0),
        "vmm.other_load_ms": one_of(0.0, 20.0),
        "vmm.read_mib": one_of(0.0625, 0.3, 1.0, 8.0),
        "link.socket_buffer_mib": 8.0,
        "v3.critical_credit_mib": 8.0,
        "vmm.device_buffer_gib_per_s": one_of(0.1, 2.5),
        "vmm.multifd_dedicated": one_of(0, 1),
        "vmm.multifd_load_threads": one_of(0, 1),
        "vmm.bandwidth_gbit_per_s": 8.0,
        "vmm.downtime_limit_ms": 200.0,
        "device.0.count": one_of(1, 3),
        "device.0.features": one_of(*FEATURES),
        "device.0.state_mib": state,
        "device.0.stop_only_mib": state * one_of(0.0, 0.5, 1.0),
        "device.0.block_kib": one_of(16, 512),
        "device.0.suspend_ms": one_of(0.0, 20.0),
        "device.0.quiesce_ms": one_of(0.0, 20.0),
        "device.0.resume_ms": one_of(0.0, 2.0),
        "device.0.config_load_ms": one_of(0.0, 25.0),
        "device.0.critical": {"objects": one_of(0, 40), "object_kib": one_of(0.5, 300.0), "setup_us": 2000.0},
        "ram.final_sync_ms": one_of(0.0, 10.0),
    }
    other = small_scenario().model_dump(exclude_unset=True)["device"][0]
    if "P2P" in changes["device.0.features"]:
        changes["device.1"] = other | {"name": "other", "pf": one_of(0, 1), "stop_only_mib": one_of(0.0, 8.0)}
    else:  # several would be refused
        changes["device.0.count"] = 1
    return small_scenario(changes)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(scenarios(), st.sampled_from([*PROTOCOLS, "v3-n7", "v3-blocks-n1"]))
def test_no_run_is_below_its_bound(scenario: Scenario, protocol: str) -> None:
    assume("threads" not in protocol or not scenario.vmm.multifd_load_threads)  # refused
    outcome = run(scenario, protocol)
    assume(outcome.downtime_ns is not None)
    assert outcome.downtime_ns is not None
    assert outcome.bound_ns is not None
    assert outcome.downtime_ns >= outcome.bound_ns, bound_of(scenario, protocol)


def test_all_critical_data_counts_where_a_driver_only_checks_whatever_epochs_begin_before_the_stop() -> None:
    changes = {
        "driver.precopy": "check",
        "device.0.critical": {"objects": 40, "object_kib": 300.0, "setup_us": 100.0},
        "device.0.reconfigurations": {"at_s": [0.005], "objects_each": 2},
        "device.0.state_mib": 1.0,
        "driver.lock": "global",
        "host.copy_gib_per_s": 0.1,
        "ram.nonzero_gib": 0.0625,
        "ram.send_gib_per_s": 0.125,
        "vmm.downtime_limit_ms": 20.0,
        "vmm.bandwidth_gbit_per_s": 10.0,
    }
    for protocol in ("v3-n1", "v3-n4-retry"):
        scenario = small_scenario(changes)
        ratio(scenario, protocol)
        idle = small_scenario({key: value for key, value in changes.items() if "reconf" not in key})
        assert bound_of(scenario, protocol) == bound_of(idle, protocol)


def test_one_read_may_take_several_records_of_critical_data() -> None:
    changes = {
        "device.0.critical": {"objects": 512, "object_kib": 256.0, "setup_us": 0.0},
        "device.0.count": 2,
        "device.0.features": ["STOP_COPY", "P2P"],
        "driver.chunk_mib": 1,
        "driver.chunks": 8,
        "driver.lock": "global",
        "driver.call_us": 4000.0,
        "vmm.read_mib": 8.0,
        "link.socket_buffer_mib": 8.0,
        "v3.critical_credit_mib": 8.0,
        "vmm.downtime_limit_ms": 10_000.0,
        "firmware.save_mib_per_s": 50_000.0,
        "firmware.load_mib_per_s": 50_000.0,
    }
    ratio(small_scenario(changes), "v3-blocks-n4")


# --- runs that one resource holds up ---------------------------------------------------------------------------------

# All in the downtime, with next to nothing of a fixed cost; 64 MiB, and each resource fast.
FAST = {
    "ram.nonzero_gib": 0.0005,
    "device.0.state_mib": 64.0,
    "device.0.stop_only_mib": 64.0,
    "device.0.suspend_ms": 0.0,
    "device.0.quiesce_ms": 0.0,
    "device.0.config_load_ms": 0.0,
    "firmware.engines": 8.0,
    "firmware.save_mib_per_s": 50_000.0,
    "firmware.load_mib_per_s": 50_000.0,
    "firmware.load_finish_ms": 0.0,
    "host.copy_gib_per_s": 40.0,
    "host.memory_gib_per_s": 160.0,
    "link.gbit_per_s": 800.0,
    "link.per_connection_gbit_per_s": 400.0,
    "vmm.bandwidth_gbit_per_s": 100.0,
    "vmm.downtime_limit_ms": 1000.0,
}
SLOW: dict[str, dict[str, Any]] = {
    "firmware": {"firmware.save_mib_per_s": 50.0},
    "copy": {"host.copy_gib_per_s": 0.1},
    "lock": {"host.copy_gib_per_s": 0.1, "driver.lock": "global"},
    "link": {"link.gbit_per_s": 1.0, "link.per_connection_gbit_per_s": 1.0},
    "load": {"firmware.load_mib_per_s": 50.0, "firmware.engines": 1.0},
    "ram": {"ram.final_scan_ms": 500.0},
    "config": {"device.0.config_load_ms": 200.0},
}
ONE_READER = ["v2", "v2-multifd", "v3-n1"]
TIGHT = [
    *[(slow, protocol) for slow in ("firmware", "link", "load") for protocol in (*ONE_READER, "v3-n4")],
    ("ram", "v2-multifd"), ("ram", "v3-n4"), ("copy", "v2"),
    ("lock", "v2-multifd"), ("lock", "v3-n1"), ("lock", "v3-n4"), ("lock", "v3-blocks-n4"),
    ("config", "v2-multifd"), ("config", "v3-n4"), ("copy", "v3-n1"), ("copy", "v2-multifd"),
]  # fmt: skip


@pytest.mark.parametrize(("slow", "protocol"), TIGHT)
def test_a_run_that_one_resource_holds_up_is_at_the_bound(slow: str, protocol: str) -> None:
    count = 2 if slow in ("lock", "config") else 1
    scenario = small_scenario(FAST | SLOW[slow] | {"device.0.count": count})
    bound = bound_of(scenario, protocol)
    assert list(bound.by_resource_ns) == RESOURCES
    assert bound.resource == slow
    assert bound.total_ns == bound.by_resource_ns[slow] == max(bound.by_resource_ns.values())
    assert ratio(scenario, protocol) < 1.05


# --- it follows the figures ------------------------------------------------------------------------------------------


def by(changes: dict[str, Any], protocol: str, resource: str) -> int:
    return bound_of(small_scenario(FAST | changes), protocol).by_resource_ns[resource]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("slow", ["firmware", "copy", "link", "load"])
def test_it_grows_with_the_state_as_its_resource_needs(slow: str, protocol: str) -> None:
    half = {"device.0.stop_only_mib": 32.0, "device.0.state_mib": 32.0}
    one, two, four = (
        by(SLOW[slow] | change, protocol, slow)
        for change in (half, {}, {"device.0.stop_only_mib": 128.0, "device.0.state_mib": 128.0})
    )
    assert one < two
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_state_that_pre_copy_can_move_is_not_counted() -> None:
    for protocol in PROTOCOLS:
        moved = {"device.0.stop_only_mib": 0.0}
        assert by(SLOW["firmware"] | moved, protocol, "firmware") < 4 * MS
        for all_of_it in ({"driver.precopy": "reread"}, {"device.0.features": ["STOP_COPY", "P2P"]}):
            if "blocks" not in protocol:
                stopped = by(SLOW["firmware"] | moved | all_of_it, protocol, "firmware")
                assert stopped >= by(SLOW["firmware"], protocol, "firmware") * 0.99


def test_saving_is_shared_by_streams_up_to_the_engines() -> None:
    def saves_ns(protocol: str, engines: float) -> int:
        return by(SLOW["firmware"] | {"firmware.engines": engines}, protocol, "firmware") - by({}, protocol, "firmware")

    alone = saves_ns("v3-n1", 8.0)
    for n in (2, 4, 8):
        assert saves_ns(f"v3-n{n}", 8.0) == pytest.approx(alone / n, rel=0.03)
        assert saves_ns(f"v3-blocks-n{n}", 8.0) == pytest.approx(alone / n, rel=0.05)
    of_one = SLOW["firmware"] | {"firmware.vf_engines": 2.0}
    capped_ns = by(of_one, "v3-n8", "firmware") - by({"firmware.vf_engines": 2.0}, "v3-n8", "firmware")
    assert capped_ns == pytest.approx(alone / 2, rel=0.03)
    assert saves_ns("v3-n8", 2.5) == pytest.approx(alone / 2.5, rel=0.03)
    assert saves_ns("v2", 8.0) == pytest.approx(saves_ns("v2", 1.0), rel=0.01)


def test_two_devices_share_a_pf_and_not_two() -> None:
    one_pf = SLOW["firmware"] | {"firmware.engines": 1.0, "device.0.count": 2}
    other = small_scenario(FAST).model_dump(exclude_unset=True)["device"][0]
    two_pfs = one_pf | {"device.0.count": 1, "device.1": other | {"name": "other", "pf": 1}}
    single = one_pf | {"device.0.count": 1}
    assert by(one_pf, "v2-multifd", "firmware") == pytest.approx(2 * by(single, "v2-multifd", "firmware"), rel=0.02)
    assert by(two_pfs, "v2-multifd", "firmware") == pytest.approx(by(single, "v2-multifd", "firmware"), rel=0.02)
    # On one channel one is read after the other, whatever they share.
    assert by(two_pfs, "v2", "firmware") == pytest.approx(2 * by(single, "v2", "firmware"), rel=0.05)


@pytest.mark.parametrize(
    ("lock", "protocol", "readers"),
    [("none", "v3-n4", 4), ("per_fd", "v3-n4", 4), ("device", "v3-n4", 1), ("global", "v3-n4", 1),
     ("none", "v3-blocks-n4", 4), ("per_fd", "v3-blocks-n4", 1), ("none", "v2", 1)],
)  # fmt: skip
def test_copies_go_on_at_once_as_the_lock_allows(lock: str, protocol: str, readers: int) -> None:
    slow = bound_of(small_scenario(FAST | SLOW["copy"] | {"driver.lock": lock}), protocol)
    copying_ns = max(slow.by_resource_ns[each] for each in ("copy", "lock"))
    assert copying_ns == pytest.approx(64 / 1024 / 0.1 * 1e9 / readers, rel=0.05)


@pytest.mark.parametrize(
    ("protocol", "connections"),
    [("v2", 1), ("v2-multifd", 2), ("v3-n1", 1), ("v3-n4", 4), ("v3-n8-pool", 4), ("v3-n4-one", 1)],
)
def test_the_link_is_shared_as_the_protocol_uses_connections(protocol: str, connections: int) -> None:
    linked_ns = by({"link.per_connection_gbit_per_s": 1.0}, protocol, "link")
    assert linked_ns == pytest.approx(64 * 2**20 * 8 / connections, rel=0.03)


def test_load_threads_are_counted() -> None:
    four = {"device.0.count": 4, "firmware.load_finish_ms": 100.0}
    assert by(four, "v2-multifd", "load") < 110 * MS
    assert by(four | {"vmm.multifd_load_threads": 1}, "v2-multifd", "load") > 400 * MS
    assert by(four | {"firmware.engines": 2.0}, "v3-n4", "load") > 200 * MS


def test_a_source_that_fell_back_has_the_bound_of_v2() -> None:
    back = small_scenario(FAST | {"v3": {"target_knows": "v2"}})
    assert bound_of(back, "v3-n4") == bound_of(back, "v2")


def test_devices_are_stopped_in_turn_the_last_one_first() -> None:
    features = {
        "vmm.vcpu_stop_ms": 5.0,
        "device.0.suspend_ms": 1.0,
        "device.0.quiesce_ms": 2.0,
        "device.0.count": 2,
    }
    without = small_scenario(features | {"device.0.features": ["STOP_COPY"]})
    assert stops_ns(small_scenario(features)) == [11 * MS, 9 * MS]
    assert stops_ns(without) == [11 * MS, 8 * MS]


def test_in_a_parallel_stop_only_devices_that_share_serial_firmware_wait_for_each_other() -> None:
    changes = {"device.0.suspend_ms": 1.0, "device.0.quiesce_ms": 2.0, "device.0.count": 2, "vmm.parallel_stop": True}
    other = small_scenario(changes).device[0].model_dump(exclude_unset=True) | {"name": "other", "pf": 1, "count": 1}
    assert stops_ns(small_scenario(changes | {"device.1": other})) == [4 * MS] * 3
    serial = small_scenario(changes | {"device.1": other, "firmware.state_commands": "serial"})
    assert stops_ns(serial) == [7 * MS, 5 * MS, 5 * MS]


def test_the_lemmas_are_those_of_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "theory.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE))
    lemmas = ((name, re.match(r"Lemma (\d+): ", method.__doc__ or "")) for name, method in vars(LowerBound).items())
    stated = {lemma[1]: name for name, lemma in lemmas if lemma}
    assert stated == documented
    assert list(documented) == [str(number) for number in range(1, len(documented) + 1)]


def test_what_can_begin_late_is_still_to_be_done() -> None:
    assert queue_ns([]) == 0
    assert queue_ns([(10, 5, 1)]) == 16
    assert queue_ns([(10, 5, 1), (0, 3, 7)]) == 16
    assert queue_ns([(10, 5, 1), (0, 3, 17)]) == 21
    assert queue_ns([(10, 5, 1), (0, 30, 7)]) == 37
    assert queue_ns([(10, 5, 0)]) == 0


# --- in the outcome --------------------------------------------------------------------------------------------------


def test_a_table_tells_the_bound_and_how_far_above_it_a_run_is() -> None:
    outcome = run(small_scenario(FAST), "v3-n4")
    told = row(outcome)
    assert (told["bound_ns"], told["bound_by"]) == (outcome.bound_ns, outcome.bound_by)
    assert told["bound_ratio"] == told["downtime_ns"] / told["bound_ns"] >= 1


def test_a_run_that_did_not_complete_has_none() -> None:
    told = row(run(small_scenario({"vmm.cancel_after_s": 0.001}), "v2"))
    assert (told["outcome"], told["bound_ns"], told["bound_by"], told["bound_ratio"]) == ("CANCELLED", None, "", None)


@pytest.mark.slow
def test_the_docs_say_how_far_above_their_bound_shipped_scenarios_are() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
    told = re.search(
        r"`szmigiero-4vf` (\S+) with v2, (\S+) with N = 4; `mlx5-2vf` (\S+) with v2, .*, (\S+) with multifd;",
        " ".join(docs.split()),
    )
    assert told is not None
    runs = (("szmigiero-4vf", "v2"), ("szmigiero-4vf", "v3-n4"), ("mlx5-2vf", "v2"), ("mlx5-2vf", "v2-multifd"))
    for (name, protocol), words in zip(runs, told.groups(), strict=True):
        assert run(load(name), protocol).bound_ratio == pytest.approx(float(words), abs=0.02), name
