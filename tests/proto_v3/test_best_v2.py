# SPDX-License-Identifier: GPL-2.0-or-later
"""v2's variants that QEMU does not have: what each one does, counted by hand, and what it must not do."""

from __future__ import annotations

from typing import Any

import pytest

from proto_v3.errors import UserError
from proto_v3.timeline import Mark, Stage
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.vmm.v2_precopy import V2Precopy
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from sim.clock.port import now_ns
from sim.device.driver import SimDriver
from sim.outcome import Outcome
from sim.run import VirtualRun
from sim.scenario.units import ns
from tests.build.hosts import KINDS
from tests.build.runs import kept_run
from tests.build.scenario import small_scenario

THREE: dict[str, Any] = {
    "device.0.count": 3,
    "device.0.stop_only_mib": 8.0,
    "vmm.bandwidth_gbit_per_s": 1000.0,
    "vmm.downtime_limit_ms": 100.0,
}
"""Three devices, all of whose state comes when they are stopped. Each takes 1 ms to P2P and 2 ms to STOP_COPY."""
NO_SESSION = {"device.0.features": ["STOP_COPY", "P2P"]}


def completed(changes: dict[str, Any], name: str) -> tuple[Outcome, VirtualRun]:
    outcome, kept = kept_run(small_scenario(changes), name)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.critical_path_ns["unexplained"] == 0
    assert not any(image.differences(state) for image, state in zip(kept.images, kept.states, strict=True))
    return outcome, kept


def stages(kept: VirtualRun, name: str) -> list[Stage]:
    """By device."""
    return sorted((stage for stage in kept.timeline.stages if stage.name == name), key=lambda stage: stage.index)


# --- early ------------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.best.1")
@pytest.mark.parametrize("session", [{}, NO_SESSION])
def test_an_early_save_thread_starts_when_its_device_is_stopped(session: dict[str, Any]) -> None:
    """The last device first: 1 ms for the vCPUs, 3 x 1 for P2P, then 2 for each."""
    starts = {}
    for name in ("v2-multifd", "v2-multifd-early"):
        _, kept = completed(THREE | session, name)
        (stop,) = stages(kept, "stop")
        starts[name] = [stage.start_ns - stop.start_ns for stage in stages(kept, "device_save")]
    assert starts["v2-multifd"] == [ns(10)] * 3
    assert starts["v2-multifd-early"] == [ns(10), ns(8), ns(6)]


@pytest.mark.rule("v2.best.1")
def test_the_target_hears_of_the_switchover_before_the_first_early_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, Kind]] = []
    states: list[tuple[int, State]] = []
    send, set_state = Channel.send, SimDriver.set_state

    async def sending(channel: Channel, frame: Frame) -> None:
        sent.append((now_ns(), frame.kind))
        await send(channel, frame)

    async def setting(driver: SimDriver, target: State) -> Any:
        fd = await set_state(driver, target)
        states.append((now_ns(), target))
        return fd

    monkeypatch.setattr(Channel, "send", sending)
    monkeypatch.setattr(SimDriver, "set_state", setting)
    completed(THREE, "v2-multifd-early")
    kinds = [kind for _, kind in sent]
    assert kinds.count(Kind.SWITCHOVER_START) == 1
    assert kinds.index(Kind.SWITCHOVER_START) < kinds.index(Kind.PACKET) < kinds.index(Kind.RAM_BEGIN)
    first_packet_ns = next(at for at, kind in sent if kind is Kind.PACKET)
    stopped_ns = [at for at, state in states if state is State.STOP_COPY]
    assert stopped_ns[0] < first_packet_ns < stopped_ns[-1], "while others are not stopped yet"


@pytest.mark.rule("v2.best.1")
def test_an_early_thread_takes_what_its_device_saves_while_others_are_stopped() -> None:
    """8 MiB take 80 ms. In the 100 ms before the next device is stopped, a driver with one chunk saves 1 MiB of them if
    nobody reads, and else all: two devices have 70 ms more ready when all are stopped."""
    slow = {"firmware.engines": 1, "firmware.save_mib_per_s": 100.0, "driver.chunks": 1, "device.0.quiesce_ms": 100.0}
    slow["vmm.bandwidth_window_ms"] = 400.0  # by then the target's devices are in RESUMING
    plain, early = (completed(THREE | slow, name)[0].downtime_ns for name in ("v2-multifd", "v2-multifd-early"))
    assert plain is not None
    assert early is not None
    assert plain - early == pytest.approx(ns(2 * 70), abs=ns(2))


@pytest.mark.rule("v2.best.1")
@pytest.mark.parametrize("changes", [{"device.0.count": 1}, {"device.0.quiesce_ms": 0.0}])
def test_where_no_device_waits_for_another_to_stop_early_threads_change_nothing(changes: dict[str, Any]) -> None:
    plain, early = (completed(THREE | changes, name)[0].downtime_ns for name in ("v2-multifd", "v2-multifd-early"))
    assert plain == early


# --- retry ------------------------------------------------------------------------------------------------------------

ACK = "v2-reinit-flush-ack-reusable"
LATE: dict[str, Any] = {
    "device.0.critical": {"objects": 4, "object_kib": 4.0, "setup_us": 50_000.0},
    "device.0.reconfigurations": {"during_stop_ms": [0.5], "objects_each": 3},
    "device.0.writes": {"pattern": "sequential", "mib_per_s": 1.0},
    "device.0.state_mib": 2.0,
    "ram.nonzero_gib": 0.0,
    "vmm.bandwidth_gbit_per_s": 8.0,
    "vmm.downtime_limit_ms": 1.0,
}
"""Three objects become new while the vCPUs are stopped, which takes a millisecond. To set them up takes 150 ms."""


@pytest.mark.rule("v2.best.2")
@pytest.mark.parametrize("multifd", ["", "-multifd", "-multifd-early"])
@pytest.mark.parametrize("policy", ["flush", "invalidate"])
def test_a_reinit_that_comes_too_late_costs_a_pause_and_not_the_migration(multifd: str, policy: str) -> None:
    name = f"v2{multifd}-reinit-{policy}-ack-reusable-retry"
    outcome, kept = completed(LATE, name)
    assert outcome.guest_runs_at == "target"
    assert (outcome.late_critical_objects, outcome.setup_in_downtime_ns) == (0, 0)
    counters = outcome.counters
    # The vCPUs stop in 1 ms, the device goes to P2P in 1 and back in no time, the vCPUs start in 1.
    assert counters.retries == 1
    assert counters.retries_stopped_ns == counters.stopped_in_vain_ns == pytest.approx(ns(3), abs=ns(0.01))
    (retry,), (stop,) = stages(kept, "retry"), stages(kept, "stop")
    assert retry.end_ns - retry.start_ns == counters.retries_stopped_ns
    assert stop.start_ns - retry.end_ns == pytest.approx(ns(150), abs=ns(8)), "the ack comes when they are set up"
    assert outcome.total_ns is not None
    assert outcome.downtime_ns == kept.timeline.downtime_ns < outcome.total_ns - counters.retries_stopped_ns


@pytest.mark.rule("v2.best.2")
@pytest.mark.parametrize(("stops", "most", "kind", "retries"), [(2, 3, "COMPLETED", 2), (2, 1, "FAILED", 1)])
def test_it_retries_as_often_as_it_may_and_then_fails(stops: int, most: int, kind: str, retries: int) -> None:
    late = LATE["device.0.reconfigurations"] | {"during_stops": stops}
    scenario = small_scenario(LATE | {"device.0.reconfigurations": late, "vmm.max_retries": most})
    outcome, _ = kept_run(scenario, f"{ACK}-retry")
    assert (outcome.kind, outcome.counters.retries) == (kind, retries)
    assert ("its ack comes too late" in outcome.reason) == (kind == "FAILED")
    assert outcome.guest_runs_at == ("target" if kind == "COMPLETED" else "source")
    assert (
        outcome.counters.stopped_in_vain_ns
        >= outcome.counters.retries_stopped_ns
        == pytest.approx(ns(3) * retries, abs=ns(0.01))
    )


@pytest.mark.rule("v2.best.2")
def test_without_a_late_reinit_a_retry_changes_nothing() -> None:
    changes = LATE | {"device.0.reconfigurations": {"at_s": [0.0045]}}
    assert completed(changes, ACK)[0].digest == completed(changes, f"{ACK}-retry")[0].digest


def test_a_guest_that_is_stopped_by_force_is_not_resumed() -> None:
    """No ack is waited for then (migration_can_switchover), so nobody looks for a late one."""
    outcome, _ = kept_run(small_scenario(LATE | {"vmm.force_after_s": 0.01}), f"{ACK}-retry")
    assert outcome.kind is OutcomeKind.COMPLETED
    assert (outcome.counters.retries, outcome.note.startswith("stopped by force")) == (0, True)


# --- one stop rule ----------------------------------------------------------------------------------------------------

LONG_LOAD: dict[str, Any] = {
    "driver.precopy_image": "whole",
    "driver.initial": "image",
    "firmware.load_mib_per_s": 80.0,
    "vmm.bandwidth_gbit_per_s": 8.0,
    "vmm.downtime_limit_ms": 1.0,
}
"""The first image is sent in some 10 ms. The target loads it, 100 ms, when its last byte is written."""


@pytest.mark.rule("v2.best.3")
@pytest.mark.parametrize(("version", "load_ms"), [("v2", 100), ("v2-multifd", 100), ("v3-n1", 100), ("v3-n2", 50)])
def test_by_parts_the_first_pass_is_loaded_before_the_stop_and_by_the_whole_in_the_downtime(
    version: str, load_ms: int
) -> None:
    whole, parts = (completed(LONG_LOAD, f"{version}-{rule}")[0].downtime_ns for rule in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert whole - parts == pytest.approx(ns(load_ms), abs=ns(12))


@pytest.mark.rule("v2.best.3")
@pytest.mark.parametrize(("version", "own"), [("v2", "whole"), ("v2-multifd", "whole"), ("v3-n2", "parts")])
def test_the_rule_that_a_protocol_has_by_itself_may_be_named(version: str, own: str) -> None:
    assert completed(LONG_LOAD, version)[0].digest == completed(LONG_LOAD, f"{version}-{own}")[0].digest


@pytest.mark.rule("v2.best.3")
@pytest.mark.parametrize(("version", "what"), [("v2", "dev"), ("v2-multifd", "dev"), ("v3-n1", "dev stream 1")])
def test_who_waits_for_a_part_says_for_which(version: str, what: str) -> None:
    scenario = small_scenario(LONG_LOAD | {"vmm.give_up_s": 0.08})
    assert kept_run(scenario, f"{version}-whole")[0].kind is OutcomeKind.COMPLETED
    outcome, _ = kept_run(scenario, f"{version}-parts")
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert f"; the first pass of {what} was not loaded at the target" in outcome.reason


# --- parallel stop ----------------------------------------------------------------------------------------------------

PROTOCOLS = ["v2", "v2-multifd", "v2-multifd-early", "v3-n1", "v3-blocks-n2"]
CALLS_NS = 5000
"""v3's final check is a call a device."""
SERIAL = {"firmware.state_commands": "serial"}


def stop_ns(changes: dict[str, Any], name: str) -> int:
    (stop,) = stages(completed(THREE | changes, name)[1], "stop")
    return stop.end_ns - stop.start_ns


@pytest.mark.rule("v2.best.4")
@pytest.mark.parametrize("session", [{}, NO_SESSION])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_parallel_stop_takes_as_long_as_that_of_one_device(name: str, session: dict[str, Any]) -> None:
    """1 ms for the vCPUs; for each of three devices 1 ms to P2P, and 2 ms to STOP_COPY when all are there."""
    assert stop_ns(session, name) == pytest.approx(ns(1 + 3 * 1 + 3 * 2), abs=CALLS_NS)
    assert stop_ns(session, f"{name}-parallel-stop") == pytest.approx(ns(1 + 1 + 2), abs=CALLS_NS)


@pytest.mark.rule("v2.best.4")
@pytest.mark.parametrize("name", PROTOCOLS)
def test_firmware_that_runs_one_state_command_of_a_pf_at_a_time_gives_a_parallel_stop_nothing(name: str) -> None:
    assert stop_ns(SERIAL, f"{name}-parallel-stop") == pytest.approx(ns(1 + 3 * 1 + 3 * 2), abs=CALLS_NS)
    other = small_scenario(THREE).device[0].model_dump(exclude_unset=True) | {"name": "other", "pf": 1, "count": 1}
    two_pfs = {"device.0.count": 2, "device.1": other, **SERIAL}
    assert stop_ns(two_pfs, f"{name}-parallel-stop") == pytest.approx(ns(1 + 2 * 1 + 2 * 2), abs=CALLS_NS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_serial_state_commands_cost_nothing_in_the_downtime_where_one_is_asked_for_at_a_time(name: str) -> None:
    """v3's target brings its devices to RESUMING at once, before pre-copy."""
    parallel, serial = (completed(THREE | how, name)[0] for how in ({}, SERIAL))
    assert parallel.downtime_ns == serial.downtime_ns
    if name.startswith("v2"):
        assert parallel.digest == serial.digest


@pytest.mark.rule("v2.best.4")
def test_a_parallel_stop_wakes_a_thread_a_device_in_each_pass_and_is_woken_itself() -> None:
    name = "v2-multifd-parallel-stop"
    slow = stop_ns({"host.wake_up_us": 50.0}, name)
    assert slow - stop_ns({}, name) == pytest.approx(ns(2 * 2 * 0.05), abs=10)


@pytest.mark.rule("v2.best.4")
@pytest.mark.parametrize("name", ["v2-reinit-flush-ack-reusable", "v2-multifd-early", "v3-n2"])
def test_no_device_is_stopped_before_all_are_in_p2p(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[State, int]] = []
    ended: list[tuple[State, int]] = []
    set_state = SimDriver.set_state

    async def setting(driver: SimDriver, target: State) -> Any:
        begun.append((target, now_ns()))
        fd = await set_state(driver, target)
        ended.append((target, now_ns()))
        return fd

    monkeypatch.setattr(SimDriver, "set_state", setting)
    completed(THREE, f"{name}-parallel-stop")
    in_p2p_ns = [at for state, at in ended if state is State.PRE_COPY_P2P]
    stop_ns = [at for state, at in begun if state is State.STOP_COPY]
    assert len(in_p2p_ns) == len(stop_ns) == 3
    assert max(in_p2p_ns) <= min(stop_ns) == max(stop_ns)


@pytest.mark.rule("v2.best.4")
@pytest.mark.parametrize("name", ["v2", "v2-multifd", "v3-n1"])
def test_configs_are_loaded_at_once_behind_their_devices_data(name: str) -> None:
    plain, at_once = (completed(THREE, each)[1] for each in (name, f"{name}-parallel-stop"))
    of_plain, of_each = stages(plain, "config_load"), stages(at_once, "config_load")
    assert sum(stage.end_ns - stage.start_ns for stage in of_each) == 3 * ns(3)
    assert max(stage.end_ns for stage in of_plain) - min(stage.start_ns for stage in of_plain) >= 3 * ns(3)
    if name == "v2":
        assert len({stage.start_ns for stage in of_each}) == 1


def test_of_several_late_devices_all_are_named_in_order_however_they_stop() -> None:
    scenario = small_scenario(LATE | {"device.0.count": 3, "vmm.downtime_limit_ms": 20.0})
    outcome, _ = kept_run(scenario, f"{ACK}-parallel-stop")
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason.startswith("source: dev0, dev1, dev2 reported REINIT after it was decided to stop")


# --- threads ----------------------------------------------------------------------------------------------------------

BESIDE_RAM: dict[str, Any] = {
    "driver.initial": "image",
    "ram.size_gib": 0.25,
    "ram.nonzero_gib": 0.25,
    "vmm.bandwidth_gbit_per_s": 8.0,
    "vmm.downtime_limit_ms": 20.0,
    "device.0.count": 2,
}
"""RAM takes 125 ms and more at 2 GiB/s. Each device has 8 MiB, of which a round of 5 ms reads one."""
NEWEST = "reinit-flush-ack-reusable"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Channel, Frame]]:
    """The frames of all channels, with the time."""
    frames: list[tuple[int, Channel, Frame]] = []
    send = Channel.send

    async def sending(channel: Channel, frame: Frame) -> None:
        frames.append((now_ns(), channel, frame))
        await send(channel, frame)

    monkeypatch.setattr(Channel, "send", sending)
    return frames


def acked_ns(sent: list[tuple[int, Channel, Frame]]) -> list[int]:
    return [at for at, _, frame in sent if frame.kind is Kind.SWITCHOVER_ACK]


@pytest.mark.rule("v2.best.5")
@pytest.mark.parametrize("multifd", ["", "-multifd"])
def test_threads_read_all_devices_while_ram_is_sent(multifd: str, sent: list[tuple[int, Channel, Frame]]) -> None:
    """In turns the last MiB of a device is read in the eighth round. Threads read as fast as the firmware saves."""
    completed(BESIDE_RAM, f"v2{multifd}-{NEWEST}")
    turns_ns = max(acked_ns(sent))
    sent.clear()
    completed(BESIDE_RAM, f"v2{multifd}-threads-{NEWEST}")
    assert len(acked_ns(sent)) == 2
    whole_save_ns = ns(8.2)  # two devices, two engines
    assert max(acked_ns(sent)) < 4 * whole_save_ns < 8 * ns(5) < turns_ns


@pytest.mark.rule("v2.best.5")
def test_what_threads_read_goes_on_the_channels_of_multifd(sent: list[tuple[int, Channel, Frame]]) -> None:
    _, kept = completed(BESIDE_RAM, f"v2-multifd-threads-{NEWEST}")
    stop_ns = kept.timeline.marks[Mark.STOP_ORDERED]
    main, *channels = kept.channels
    on_main = {frame.kind for _, channel, frame in sent if channel is main}
    assert not on_main & {Kind.DATA, Kind.PACKET, Kind.INIT_DATA_SENT, Kind.CONFIG}
    before = [frame for at, channel, frame in sent if channel in channels and at < stop_ns]
    assert {frame.kind for frame in before} - {Kind.SYNC} == {Kind.RAM, Kind.PACKET, Kind.INIT_DATA_SENT}
    for device in (0, 1):
        numbers = [f.value for _, ch, f in sent if f.device == device and ch in channels and f.kind in OF_A_DEVICE]
        assert sorted(numbers) == list(range(len(numbers))), "one after the other, the config last"


OF_A_DEVICE = (Kind.PACKET, Kind.INIT_DATA_SENT, Kind.CONFIG)


@pytest.mark.rule("v2.best.5")
@pytest.mark.parametrize("name", ["v2-multifd-threads-parts", f"v2-multifd-threads-{NEWEST}"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_channels_thread_that_waits_for_a_device_goes_on_behind_what_is_answered(name: str, channels: int) -> None:
    """With as many channels as devices no other thread is there to go on."""
    completed(BESIDE_RAM | {"vmm.multifd_load": "channel_threads", "vmm.multifd_channels": channels}, name)


@pytest.mark.rule("v2.best.5")
@pytest.mark.parametrize("multifd", ["", "-multifd", "-multifd-early"])
@pytest.mark.parametrize("policy", ["flush", "invalidate"])
@pytest.mark.parametrize("seed", range(4))
def test_with_threads_the_guest_is_not_stopped_before_the_newest_initial_data_is_loaded(
    multifd: str, policy: str, seed: int
) -> None:
    """However calls of the thread and of the migration thread meet at a device."""
    changes = BESIDE_RAM | {
        "device.0.critical": {"objects": 8, "object_kib": 256.0, "setup_us": 500.0},
        "device.0.reconfigurations": {"poisson_per_s": 60.0, "objects_each": 3},
        "device.0.writes": {"pattern": "hotspot", "mib_per_s": 200.0},
        "firmware.service_cv": 0.3,
        "vmm.precopy_idle_ms": 0.5,
    }
    name = f"v2{multifd}-threads-reinit-{policy}-ack-reusable-retry"
    outcome, kept = kept_run(small_scenario(changes | {"vmm.max_retries": 100}), name, seed)
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.critical_path_ns["unexplained"] == 0
    assert outcome.late_critical_objects == 0
    assert not any(image.differences(state) for image, state in zip(kept.images, kept.states, strict=True))


@pytest.mark.rule("v2.best.5")
def test_a_reinit_that_a_thread_finds_as_it_ends_sends_the_migration_back_to_its_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = V2Precopy._rounds
    ended: list[int] = []

    async def rounds_and_a_reinit(source: V2Precopy) -> None:
        await rounds(source)
        ended.append(now_ns())
        if len(ended) == 1:  # as ask() does in a thread that was at it
            source.known[0].requests += 1
            source.known[0].sent = False

    monkeypatch.setattr(V2Precopy, "_rounds", rounds_and_a_reinit)
    _, kept = completed(BESIDE_RAM, f"v2-multifd-threads-{NEWEST}")
    assert len(ended) == 2
    assert kept.timeline.marks[Mark.STOP_ORDERED] == ended[1]


@pytest.mark.rule("v2.best.5")
def test_each_packet_before_the_stop_costs_a_copy_at_both_sides_and_ends_cost_wake_ups() -> None:
    name = f"v2-multifd-threads-{NEWEST}"
    _, kept = completed(BESIDE_RAM | {"vmm.multifd_copy_gib_per_s": 1.0}, name)
    recorded = kept.timeline.recorded()
    copies = recorded.spans["what"] == recorded.names.index("multifd copy")
    before = recorded.spans["end_ns"] < kept.timeline.marks[Mark.STOP_ORDERED]
    took_ns = (recorded.spans["end_ns"] - recorded.spans["start_ns"])[copies & before].sum()
    assert took_ns == pytest.approx(2 * 2 * ns(8 * 1000 / 1024), rel=0.05), "two devices of 8 MiB, here and there"


@pytest.mark.rule("v2.best.5")
def test_a_stage_of_the_load_begins_with_the_stop_and_not_with_what_threads_read_before() -> None:
    _, kept = completed(BESIDE_RAM, "v2-multifd-threads")
    ordered_ns = kept.timeline.marks[Mark.STOP_ORDERED]
    for name in ("load_total", "load_writing", "load_waiting"):
        assert all(stage.end_ns - stage.start_ns <= stage.end_ns - ordered_ns for stage in stages(kept, name))


def test_threads_load_all_devices_at_once() -> None:
    scenario = small_scenario({"vmm.multifd_load_threads": 1})
    with pytest.raises(
        UserError, match=r"vmm.multifd_load_threads = 1: must be left out with a pre-copy thread a device"
    ):
        kept_run(scenario, "v2-multifd-threads")


ALL_OF_IT = f"v2-multifd-early-threads-parallel-stop-parts-{NEWEST}-retry"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v2-threads", "v2-multifd-threads", ALL_OF_IT])
def test_the_best_v2_leaves_any_kind_of_device_as_it_was_stopped(name: str, kind: str) -> None:
    changes = {"device.0.writes": {"pattern": "uniform", "mib_per_s": 20.0}, "vmm.bandwidth_gbit_per_s": 100.0}
    completed(KINDS[kind] | changes | {"vmm.downtime_limit_ms": 100.0, "device.0.critical.setup_us": 10.0}, name)
