# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that end otherwise than they should: the user cancels, an arc fails, a peer breaks the rules.

Whatever happens, never two sides run the guest, and one does at the end: the source, unless it had handed over.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.timeline import Mark
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.fsm import arcs
from proto_v3.vfio.uapi import State
from proto_v3.vmm.device_calls import RETURNS_WITHIN_S
from proto_v3.vmm.migration import ASKS_HUNG_S, OutcomeKind
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Kind, Payload
from sim.clock import virtual
from sim.clock.port import now_ns, sleep_ns
from sim.device.blocks import SaveBlocks
from sim.device.driver import SimDriver
from sim.device.save import SaveStream
from sim.device.save_v2 import V2Stream
from sim.device.save_v3 import V3Stream
from sim.device.stream import fails
from sim.host.machine import MachineModel
from sim.outcome import Outcome
from sim.scenario.scenario import Scenario
from sim.scenario.units import ns
from tests.build.runs import prepared
from tests.build.scenario import small_scenario

PROTOCOLS = [
    *("v2", "v2-multifd", "v2-multifd-reinit-flush-ack-reusable"),
    *("v3-n1", "v3-n3", "v3-n2-one-invalidate-retry", "v3-blocks-n2-pool"),
]
FEATURES = {
    "all": ["STOP_COPY", "P2P", "PRE_COPY"],
    "no P2P": ["STOP_COPY", "PRE_COPY"],
    "no PRE_COPY": ["STOP_COPY", "P2P"],
    "neither": ["STOP_COPY"],
}


def one(changes: dict[str, Any]) -> Scenario:
    """A device, all of whose state fits whenever it is asked for."""
    writes = {"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}}
    return small_scenario({"device.0.name": "first", "vmm.bandwidth_gbit_per_s": 1e6} | writes | changes)


def two(changes: dict[str, Any]) -> Scenario:
    """Two of them."""
    second = small_scenario().device[0].model_dump(exclude_none=True) | {"name": "second"}
    return one({"device.1": second} | changes)


class Watched:
    """A run under watch: who ran the guest, which arcs were taken, what fds were given out."""

    def __init__(self, scenario: Scenario, name: str) -> None:
        self.scenario = scenario
        self.run = prepared(scenario, name)
        self.arcs: dict[str, set[str]] = {"source": set(), "target": set()}
        self.fds: dict[str, list[DataFd]] = {"source": [], "target": []}
        self.most_running = 0
        self.stops = 0
        self.stood_still_ns = 0
        """From each order to stop until the vCPUs ran at the source again."""
        self._stopped_ns = 0

    def outcome(self) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            self._watch_vcpus(patch)
            self._watch_arcs(patch)
            outcome = virtual.run(self.run.outcome(), limit_ns=ns(60_000))
        assert self.most_running <= 1, "two sides ran the guest"
        return outcome

    def _watch_vcpus(self, patch: pytest.MonkeyPatch) -> None:
        start, stop = MachineModel.start_vcpus, MachineModel.stop_vcpus

        async def start_vcpus(machine: MachineModel) -> None:
            await start(machine)
            if machine is self.run.machines["source"]:
                self.stood_still_ns += now_ns() - self._stopped_ns
            self.most_running = max(self.most_running, sum(each.running for each in self.run.machines.values()))

        async def stop_vcpus(machine: MachineModel) -> None:
            self.stops += 1
            self._stopped_ns = now_ns()
            await stop(machine)

        patch.setattr(MachineModel, "start_vcpus", start_vcpus)
        patch.setattr(MachineModel, "stop_vcpus", stop_vcpus)

    def _watch_arcs(self, patch: pytest.MonkeyPatch) -> None:
        pay_for, set_state = SimDriver._pay_for, SimDriver.set_state

        async def paying(driver: SimDriver, hop: State) -> None:
            self.arcs[self._side(driver)].add(f"{driver._state.name} -> {hop.name}")
            await pay_for(driver, hop)

        async def setting(driver: SimDriver, target: State) -> DataFd | None:
            fd = await set_state(driver, target)
            if fd is not None:
                self.fds[self._side(driver)].append(fd)
            return fd

        patch.setattr(SimDriver, "_pay_for", paying)
        patch.setattr(SimDriver, "set_state", setting)

    def _side(self, driver: SimDriver) -> str:
        return "source" if driver in self.run.drivers else "target"

    def check_the_columns(self, outcome: Outcome, reset: Sequence[str] = ()) -> None:
        """How long the guest stood still in vain, and which of the source's devices were reset under it."""
        counters = outcome.counters
        assert counters.stopped_in_vain_ns == self.stood_still_ns
        assert counters.devices_reset_under_guest == len(reset)
        said = re.findall(
            r"source, (\w+) was reset under the guest, and what the guest had in it is lost \(", outcome.reason
        )
        assert said == list(reset)
        assert "\n" not in outcome.reason

    def check_the_source_goes_on(self) -> None:
        """Devices run on both sides, no session is open, and the guest writes on at the source."""
        for driver in (*self.run.drivers, *self.run.drivers_at_target):
            assert virtual.run(driver.state()) is State.RUNNING
            if driver.spec.max_dirty_streams:
                virtual.run(driver.set_streams(0))  # EBUSY if a session were open
        state = self.run.states[0]
        before = int(state.version.sum())
        state.advance(self.scenario.horizon_ns)
        assert int(state.version.sum()) > before


# --- the user cancels ------------------------------------------------------------------------------------------------

# What is written in one downtime limit can never be sent in one: pre-copy goes on until somebody ends it.
ENDLESS = {
    "device.0.state_mib": 32.0,
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 4000.0},
    "link.socket_buffer_mib": 1.0,
    "link.gbit_per_s": 1.0,
    "link.per_connection_gbit_per_s": 1.0,
}


@pytest.mark.rule("v2.vmm.13", "v3.9.3")
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_cancel_in_pre_copy_leaves_a_guest_that_noticed_nothing(name: str, devices: int) -> None:
    watched = Watched(small_scenario(ENDLESS | {"device.0.count": devices, "vmm.cancel_after_s": 0.3}), name)
    outcome = watched.outcome()
    assert outcome.kind is OutcomeKind.CANCELLED
    assert outcome.reason == ""
    assert outcome.guest_runs_at == "source"
    assert outcome.downtime_ns is None
    assert outcome.total_ns is not None
    assert ns(300) <= outcome.total_ns < ns(600), "at the end of a round at the latest"
    assert watched.stops == 0
    assert Mark.STOP_ORDERED not in watched.run.timeline.marks
    watched.check_the_source_goes_on()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_after_a_cancel_every_fd_is_stale(name: str) -> None:
    watched = Watched(small_scenario(ENDLESS | {"vmm.cancel_after_s": 0.1}), name)
    watched.outcome()
    (saved,), (loaded,) = watched.fds["source"], watched.fds["target"]
    with pytest.raises(OSError, match=os.strerror(19)):  # ENODEV
        virtual.run(saved.read(1))
    with pytest.raises(OSError, match=os.strerror(19)):
        virtual.run(loaded.write(b"", 1))
    assert not any(arc.startswith("RESUMING ->") for arc in watched.arcs["target"]), "only a reset leads out of it"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_cancel_that_comes_first_is_the_reason_and_else_giving_up_is(name: str) -> None:
    for cancel_s, kind in ((0.2, OutcomeKind.CANCELLED), (0.9, OutcomeKind.DID_NOT_CONVERGE)):
        scenario = small_scenario(ENDLESS | {"vmm.cancel_after_s": cancel_s, "vmm.give_up_s": 0.4})
        assert Watched(scenario, name).outcome().kind is kind


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_cancel_after_the_order_to_stop_has_no_effect(name: str) -> None:
    undisturbed = Watched(small_scenario(), name)
    outcome = undisturbed.outcome()
    for mark in (Mark.STOP_ORDERED, Mark.STOPPED, Mark.LOADED):
        at_s = (undisturbed.run.timeline.marks[mark] + 1000) / 1e9
        assert Watched(small_scenario({"vmm.cancel_after_s": at_s}), name).outcome() == outcome


@pytest.mark.slow
@pytest.mark.rule("v2.vmm.13")
@settings(max_examples=60)
@given(at_ms=st.floats(0.001, 60), name=st.sampled_from(PROTOCOLS))
def test_a_cancel_at_any_time_ends_it_in_pre_copy_or_changes_nothing(at_ms: float, name: str) -> None:
    changes = {"device.0.writes": {"pattern": "uniform", "mib_per_s": 100.0}}
    watched = Watched(small_scenario(changes | {"vmm.cancel_after_s": at_ms / 1e3}), name)
    outcome = watched.outcome()
    if outcome.kind is OutcomeKind.CANCELLED:
        assert watched.stops == 0
        assert outcome.guest_runs_at == "source"
        watched.check_the_source_goes_on()
    else:
        assert outcome == Watched(small_scenario(changes), name).outcome()


@pytest.mark.parametrize("cancels", [{}, {"vmm.cancel_after_s": 0.3}])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_call_that_times_out_is_a_failure_not_a_cancel(
    name: str, cancels: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def times_out(self: SaveStream) -> None:
        await sleep_ns(ns(1))
        raise fails(errno.ETIMEDOUT)  # which Python makes a TimeoutError

    if name.startswith("v3"):
        monkeypatch.setattr(V3Stream, "stream_info", times_out)
    else:
        monkeypatch.setattr(V2Stream, "precopy_info", times_out)
    outcome = Watched(small_scenario(ENDLESS | cancels), name).outcome()
    assert outcome.kind is OutcomeKind.FAILED
    what = "GET_STREAM_INFO" if name.startswith("v3") else "GET_PRECOPY_INFO"
    assert re.fullmatch(
        rf"source, dev( stream \d)?: {what} failed: ETIMEDOUT \(.*\); this left it in PRE_COPY", outcome.reason
    )
    assert outcome.guest_runs_at == "source"


# --- a call never returns --------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.vmm.13", "v3.9.3")
@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_device_that_does_not_answer_any_more_ends_the_migration_and_is_told_as_lost(
    name: str, cancels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 50 ms no call of the source's device returns, a reset included. The guest never stands still for it."""
    times = {"vmm.give_up_s": 0.4} | ({"vmm.cancel_after_s": 0.3} if cancels else {})
    watched = Watched(small_scenario(ENDLESS | times), name)

    def hanging(call: Callable[..., Any]) -> Callable[..., Any]:
        async def hangs(self: Any, *arguments: Any) -> Any:
            if now_ns() > ns(50) and self not in watched.run.drivers_at_target:
                await asyncio.Event().wait()
            return await call(self, *arguments)

        return hangs

    for kind, calls in (
        (SimDriver, ("set_state", "reset", "stop_copy_bytes", "set_streams")),
        (SaveStream, ("read",)),
        (SaveBlocks, ("read_blocks", "dirty_blocks")),
        (V2Stream, ("precopy_info",)),
        (V3Stream, ("stream_info",)),
    ):
        for call in calls:
            monkeypatch.setattr(kind, call, hanging(getattr(kind, call)))
    outcome = watched.outcome()
    assert outcome.total_ns is not None
    gone_ns = outcome.total_ns - ns(300 if cancels else 400)
    least = 3 if name.startswith("v3") else 2  # SET_STATE, the reset, and v3's way out of streams
    asked_s = 0 if cancels else ASKS_HUNG_S
    assert 0 <= gone_ns - ns((least * RETURNS_WITHIN_S + asked_s) * 1000) < ns(10)
    lost = "source, dev is lost to the guest (SET_STATE did not return for 5 s, and a reset did not return either)"
    assert outcome.reason.endswith(lost)
    if cancels:
        assert (outcome.kind, outcome.reason) == (OutcomeKind.CANCELLED, lost)
    else:
        assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
        assert re.match(r"given up after 0.4 s of pre-copy: .+ of dev.* has not returned for 0.3", outcome.reason)
    assert outcome.guest_runs_at == "source"
    assert watched.stops == 0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_where_one_call_hangs_the_reason_also_says_what_was_left_and_what_would_have_fitted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(self: Any, *arguments: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(SaveStream, "read", hangs)
    outcome = Watched(small_scenario(ENDLESS | {"vmm.give_up_s": 0.4}), name).outcome()
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    for told in (r"MiB left \(RAM .*dev ", "fits? a downtime limit of", r"read\(\) of dev.* has not returned for 0.3"):
        assert re.search(told, outcome.reason), outcome.reason


# --- an arc fails ----------------------------------------------------------------------------------------------------

# What a migration has the devices do, by the features that they have.
ARCS: dict[str, dict[str, list[str]]] = {
    "all": {
        "source": ["RUNNING -> PRE_COPY", "PRE_COPY -> PRE_COPY_P2P", "PRE_COPY_P2P -> STOP_COPY"],
        "target": [
            *("RUNNING -> RUNNING_P2P", "RUNNING_P2P -> STOP", "STOP -> RESUMING"),
            *("RESUMING -> STOP", "STOP -> RUNNING_P2P", "RUNNING_P2P -> RUNNING"),
        ],
    },
    "no P2P": {
        "source": ["RUNNING -> PRE_COPY", "PRE_COPY -> STOP_COPY"],
        "target": ["RUNNING -> STOP", "STOP -> RESUMING", "RESUMING -> STOP", "STOP -> RUNNING"],
    },
    "no PRE_COPY": {
        "source": ["RUNNING -> RUNNING_P2P", "RUNNING_P2P -> STOP", "STOP -> STOP_COPY"],
        "target": [
            *("RUNNING -> RUNNING_P2P", "RUNNING_P2P -> STOP", "STOP -> RESUMING"),
            *("RESUMING -> STOP", "STOP -> RUNNING_P2P", "RUNNING_P2P -> RUNNING"),
        ],
    },
    "neither": {
        "source": ["RUNNING -> STOP", "STOP -> STOP_COPY"],
        "target": ["RUNNING -> STOP", "STOP -> RESUMING", "RESUMING -> STOP", "STOP -> RUNNING"],
    },
}
LAST = "STOP_COPY -> STOP"
"""At the source, when the guest runs at the target already."""


def two_devices(features: str, faults: dict[int, list[dict[str, Any]]]) -> Scenario:
    """Of two devices alike, some arcs of one or of both fail; of one device if it has no P2P, for two are refused."""
    numbers = devices_with(features)
    changes: dict[str, Any] = {f"device.{at}.features": FEATURES[features] for at in numbers}
    changes |= {f"device.{at}.faults": faults[at] for at in faults if at in numbers}
    return (one if len(numbers) == 1 else two)(changes)


def devices_with(features: str) -> list[int]:
    """The numbers of the devices that may migrate together."""
    return [0, 1] if "P2P" in FEATURES[features] else [0]


@pytest.mark.rule("v3.12.5")
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_arcs_that_are_made_to_fail_below_are_all_that_a_migration_takes(name: str, features: str) -> None:
    watched = Watched(two_devices(features, {}), name)
    assert watched.outcome().kind is OutcomeKind.COMPLETED
    expected = ARCS[features]
    assert watched.arcs == {"source": {*expected["source"], LAST}, "target": set(expected["target"])}


@pytest.mark.rule("v2.vmm.12")
@pytest.mark.parametrize("leaves", ["before", "ERROR"])
@pytest.mark.parametrize(
    ("name", "features", "side", "arc"),
    [
        (name, features, side, arc)
        for features, sides in ARCS.items()
        for name in (PROTOCOLS if features == "all" else ["v2", "v3-n3"])
        for side, arcs in sides.items()
        for arc in arcs
    ],
)
def test_an_arc_that_fails_ends_the_migration_and_the_guest_runs_on_at_the_source(
    name: str, features: str, side: str, arc: str, leaves: str
) -> None:
    """Of the first device as of the second, so that the other one has not got so far, or has."""
    for device in devices_with(features):
        watched = Watched(two_devices(features, {device: [{"side": side, "arc": arc, "leaves": leaves}]}), name)
        outcome = watched.outcome()
        assert outcome.kind is OutcomeKind.FAILED
        left_in = leaves if leaves == "ERROR" else arc.partition(" ")[0]
        asked_for = rf"{arc} failed: EIO \(Input/output error\); this left it in {left_in}"
        on_a_path = (
            rf"\w+ -> \w+ failed: EIO \(Input/output error\); this left it in ERROR; first cause: {arc} failed: EIO"
        )
        name_of = ("first", "second")[device]
        assert re.match(rf"{side}, {name_of}: ({asked_for}|{on_a_path})(; source, |$)", outcome.reason), outcome.reason
        watched.check_the_columns(outcome, [name_of] if (side, leaves) == ("source", "ERROR") else [])
        assert outcome.guest_runs_at == "source"
        assert outcome.downtime_ns is None
        assert outcome.total_ns is not None
        assert outcome.total_ns < ns(1000), "both sides knew at once"
        watched.check_the_source_goes_on()


@pytest.mark.rule("v2.vmm.11")
@pytest.mark.parametrize("leaves", ["before", "ERROR"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_session_that_cannot_be_ended_after_the_hand_over_is_reset_and_the_migration_is_complete(
    name: str, leaves: str
) -> None:
    """vfio_save_cleanup: vfio_migration_set_state_or_reset, whose error ends nothing; the guest is gone from here."""
    fault = {"side": "source", "arc": LAST, "leaves": leaves}
    watched = Watched(two_devices("all", {0: [fault]}), name)
    outcome = watched.outcome()
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.guest_runs_at == "target"
    for driver in watched.run.drivers:
        assert virtual.run(driver.state()) in (State.STOP, State.RUNNING)


COMMANDS = {
    ("SAVE", "v2"): r"source, second: (read\(\)|GET_PRECOPY_INFO) failed: ENODEV \(.*\); this left it in \w+COPY",
    ("SAVE", "v3"): r"source, second( stream \d)?: \S+ failed: EIO \(.*\); this left it in ERROR",
    ("LOAD", "v2"): r"target, second: write\(\) failed: {errno} \(.*\); this left it in RESUMING",
    ("LOAD", "v3"): r"target, second( stream \d)?: write\(\) failed: ({errno}|EIO) \(.*\); this left it in ERROR",
}
"""How a VMM sees that a firmware command failed: mlx5's read() says ENODEV, v3's says EIO."""


@pytest.mark.parametrize(
    ("command", "after", "code"),
    [
        *(("SAVE", 0, "EBUSY"), ("SAVE", 3, "ENODEV"), ("SAVE", 5, "ETIMEDOUT")),
        *(("LOAD", 0, "ENOMEM"), ("LOAD", 3, "EBUSY")),
    ],
)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_command_that_fails_is_the_first_cause_whatever_the_call_says(
    name: str, command: str, after: int, code: str
) -> None:
    side = "source" if command == "SAVE" else "target"
    fault = {"side": side, "command": command, "after": after, "errno": code}
    watched = Watched(two_devices("all", {1: [fault]}), name)
    outcome = watched.outcome()
    assert outcome.kind is OutcomeKind.FAILED
    call = COMMANDS[command, name[:2]].format(errno=code)
    assert re.match(f"{call}; first cause: firmware {command} {after + 1}: {code}(; source, |$)", outcome.reason)
    watched.check_the_columns(outcome, ["second"] if (command, name[:2]) == ("SAVE", "v3") else [])
    watched.check_the_source_goes_on()


@pytest.mark.parametrize("code", ["EINVAL", "ENOMEM", "ENODEV", "ETIMEDOUT", "EBUSY"])
@pytest.mark.parametrize(("side", "arc"), [("source", "PRE_COPY_P2P -> STOP_COPY"), ("target", "RESUMING -> STOP")])
def test_the_reason_has_the_error_that_was_given(side: str, arc: str, code: str) -> None:
    fault = {"side": side, "arc": arc, "errno": code}
    told = (
        f"{side}, second: {arc} failed: {code} ({os.strerror(getattr(errno, code))}); this left it in {arc.split()[0]}"
    )
    for name in ("v2", "v3-n1"):
        assert Watched(two_devices("all", {1: [fault]}), name).outcome().reason == told


def test_of_two_sides_that_fail_the_first_in_time_stands_first() -> None:
    faults = [{"side": "target", "command": "LOAD"}, {"side": "source", "command": "SAVE", "after": 3}]
    reasons = []
    for other_way in (False, True):
        if other_way:
            faults = [{"side": "target", "command": "LOAD", "after": 2}, {"side": "source", "command": "SAVE"}]
        reasons.append(Watched(two_devices("all", {0: faults[:1], 1: faults[1:]}), "v3-n3").outcome().reason)
    assert [reason.partition(",")[0] for reason in reasons] == ["target", "source"]


@pytest.mark.rule("v2.vmm.12")
@pytest.mark.parametrize("leaves", ["before", "ERROR"])
@pytest.mark.parametrize("arc", ["STOP_COPY -> STOP", "STOP -> RUNNING_P2P", "RUNNING_P2P -> RUNNING"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_source_device_that_cannot_go_back_is_reset(name: str, arc: str, leaves: str) -> None:
    """The target fails at the very end, and of the way back from STOP_COPY an arc fails, too."""
    faults = [{"side": "target", "arc": "RESUMING -> STOP"}, {"side": "source", "arc": arc, "leaves": leaves}]
    watched = Watched(two_devices("all", {0: faults}), name)
    outcome = watched.outcome()
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.guest_runs_at == "source"
    watched.check_the_columns(outcome, ["first"])
    watched.check_the_source_goes_on()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_device_that_cannot_go_back_when_the_user_cancels_is_reset_and_the_guest_never_stopped(name: str) -> None:
    fault = {"side": "source", "arc": "PRE_COPY -> RUNNING"}
    watched = Watched(small_scenario(ENDLESS | {"vmm.cancel_after_s": 0.1, "device.0.faults": [fault]}), name)
    outcome = watched.outcome()
    assert outcome.guest_runs_at == "source"
    assert watched.stops == 0
    watched.check_the_columns(outcome, ["dev"])
    watched.check_the_source_goes_on()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_fault_on_an_arc_that_is_not_taken_changes_nothing(name: str) -> None:
    fault = {"side": "target", "arc": "STOP_COPY -> STOP"}
    with_fault = Watched(two_devices("all", {0: [fault]}), name).outcome()
    without = Watched(two_devices("all", {}), name).outcome()
    assert with_fault == without


@pytest.mark.slow
@pytest.mark.rule("v3.8.1")
@settings(max_examples=60)
@given(
    name=st.sampled_from(PROTOCOLS),
    features=st.sampled_from(sorted(FEATURES)),
    draws=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(["source", "target"]),
            st.integers(0, 17),
            st.sampled_from(["before", "ERROR"]),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=4,
    ),
    cancel_ms=st.none() | st.floats(1, 50),
)
def test_whatever_fails_one_side_runs_the_guest_at_the_end(
    name: str, features: str, draws: list[tuple[int, str, int, str, int]], cancel_ms: float | None
) -> None:
    there_are = sorted(f"{a.name} -> {b.name}" for a, b in arcs(two_devices(features, {}).device[0].flags))
    faults: dict[int, dict[tuple[str, str], dict[str, Any]]] = {0: {}, 1: {}}
    for device, side, number, leaves, times in draws:
        arc = there_are[number % len(there_are)]
        faults[device][side, arc] = {"side": side, "arc": arc, "leaves": leaves, "times": times}
    scenario = two_devices(features, {device: list(each.values()) for device, each in faults.items()})
    if cancel_ms is not None:
        vmm = scenario.vmm.model_copy(update={"cancel_after_s": cancel_ms / 1e3})
        scenario = scenario.model_copy(update={"vmm": vmm})
    watched = Watched(scenario, name)
    outcome = watched.outcome()
    assert outcome.guest_runs_at in ("source", "target"), "one of them, and not both"
    assert outcome.total_ns is not None
    assert outcome.total_ns < ns(2000)
    if outcome.guest_runs_at == "source":
        assert outcome.kind in (OutcomeKind.FAILED, OutcomeKind.CANCELLED)
        watched.check_the_source_goes_on()


# --- a peer that breaks the rules, or that is lost -------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_target_that_fails_while_the_source_still_sends_is_heard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With multifd and v3 the second device's connections are full when it fails; what it says goes the other way."""
    original = MachineModel.load_config

    async def fails(self: MachineModel, device: int) -> None:
        await original(self, device)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(MachineModel, "load_config", fails)
    full = {"device.0.state_mib": 2.0, "device.1.state_mib": 64.0, "link.socket_buffer_mib": 1.0}
    watched = Watched(two({"device.0.features": ["STOP_COPY", "P2P"]} | full), name)
    outcome = watched.outcome()
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason == "target: No space left on device (ENOSPC)"
    assert outcome.guest_runs_at == "source"
    watched.check_the_source_goes_on()


@pytest.mark.parametrize("after_reads", [1, 6])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_device_that_cannot_be_read_any_more_once_it_is_stopped_gives_the_guest_back(
    name: str, after_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM is through by then, and the target waits for more of the device."""
    reads = 0

    def failing(original: Callable[..., Coroutine[Any, Any, Payload]]) -> Callable[..., Coroutine[Any, Any, Payload]]:
        async def read(self: SaveStream | SaveBlocks, *asked: int) -> Payload:
            nonlocal reads
            data = await original(self, *asked)
            final = self._final if isinstance(self, SaveBlocks) else self._plan.final
            if final and now_ns() > watched.run.timeline.marks.get(Mark.STOPPED, math.inf) + ns(3):
                reads += 1
                if reads > after_reads:
                    raise OSError(5, os.strerror(5))
            return data

        return read

    monkeypatch.setattr(SaveStream, "read", failing(SaveStream.read))
    monkeypatch.setattr(SaveBlocks, "read_blocks", failing(SaveBlocks.read_blocks))
    little_ram = {"ram.size_gib": 0.002, "ram.nonzero_gib": 0.0, "ram.working_set_mib": 1.0}
    slow = {"device.0.features": ["STOP_COPY", "P2P"], "device.0.state_mib": 32.0}
    watched = Watched(two(little_ram | slow), name)
    outcome = watched.outcome()
    assert reads > after_reads
    assert outcome.kind is OutcomeKind.FAILED
    assert re.fullmatch(
        r"source, [\w ]+: .* failed: EIO \(Input/output error\); this left it in STOP_COPY", outcome.reason
    )
    watched.check_the_columns(outcome)
    assert outcome.guest_runs_at == "source"
    assert outcome.total_ns is not None
    assert outcome.total_ns < ns(1000), "the target was told"
    watched.check_the_source_goes_on()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_failed_is_told_and_not_that_the_peer_said_so(name: str) -> None:
    """Both sides fail: the target by itself, the source because it was told."""
    fault = {"side": "target", "arc": "STOP -> RESUMING", "errno": "ENOMEM"}
    outcome = Watched(two_devices("all", {0: [fault]}), name).outcome()
    told = "target, first: STOP -> RESUMING failed: ENOMEM (Cannot allocate memory); this left it in STOP"
    assert outcome.reason == told


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_target_that_fails_says_so_once_and_the_source_cancels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Kind] = []
    original = Channel.send_control

    async def send_control(self: Channel, kind: Kind, device: int = 0, stream: int = 0, value: int = 0) -> None:
        told.append(kind)
        await original(self, kind, device, stream, value)

    monkeypatch.setattr(Channel, "send_control", send_control)
    fault = {"side": "target", "arc": "STOP -> RESUMING"}
    Watched(two_devices("all", {0: [fault]}), name).outcome()
    assert (told.count(Kind.FAILED), told.count(Kind.CANCEL)) == (1, 1)
    assert told.index(Kind.FAILED) < told.index(Kind.CANCEL)


@pytest.mark.rule("v3.12.1")
def test_a_device_that_does_not_know_v3_is_refused_before_anything_is_touched() -> None:
    scenario = two_devices("all", {})
    old = scenario.device[1].model_copy(update={"max_dirty_streams": 0})
    watched = Watched(scenario.model_copy(update={"device": [scenario.device[0], old]}), "v3-n1")
    outcome = watched.outcome()
    assert outcome.kind is OutcomeKind.UNSUPPORTED
    assert outcome.guest_runs_at == "source"
    assert outcome.total_ns is not None
    assert outcome.total_ns < ns(1000)
    assert watched.stops == 0
    assert watched.arcs["source"] == set()
    watched.check_the_source_goes_on()


def test_failures_are_the_same_each_time() -> None:
    fault = {"side": "target", "arc": "RESUMING -> STOP"}
    one, other = (Watched(two_devices("all", {0: [fault]}), "v2-multifd").outcome() for _ in range(2))
    assert one == other
    assert replace(one, digest="") != replace(Watched(two_devices("all", {}), "v2-multifd").outcome(), digest="")
