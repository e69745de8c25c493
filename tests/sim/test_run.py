# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs: every shipped scenario comes out right, and one that does not is told by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from proto_v3.timeline import Mark, Stage, Timeline, cause, caused_by
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.vmm.switchover import Backlog, RamBacklog, StreamBacklog, Switchover
from proto_v3.vmm.v3_blocks import BlockReaders
from proto_v3.vmm.v3_source import V3Source, _Stream
from proto_v3.vmm.v3_target import V3Target
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload
from sim.clock import port as clock
from sim.clock import virtual
from sim.device.blocks import LoadBlocks
from sim.device.load import LoadSession, LoadStream
from sim.device.load_v3 import V3LoadSession
from sim.device.record import Record
from sim.outcome import Outcome
from sim.run import simulate
from sim.scenario.file import load, shipped
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB, ns
from tests.build.runs import kept_run, prepared, run
from tests.build.scenario import small_scenario

BLOCKS = "v3-blocks-n4-pool"
DIFFER = ("mlx5-2vf", "favours-v2", "late-reconfig", "nic-reconfig", "stop-only", "szmigiero-4vf")
"""Of the shipped scenarios those that differ in more than sizes."""
BEST_V2 = "v2-multifd-early-threads-parallel-stop-parts-reinit-flush-ack-reusable-retry"
PROTOCOLS = ("v2", "v2-multifd", BEST_V2, "v3-n1", "v3-n4", "v3-n1-multifd", "v3-n4-one-invalidate", BLOCKS)

# The guest is stopped when less than 1 MiB is left: after a pre-copy of all of the state, at least once.
STEADY = {"vmm.bandwidth_gbit_per_s": 8.0, "vmm.downtime_limit_ms": 1.0}


def check_accounts(outcome: Outcome, scenario: Scenario) -> None:
    """What must hold for every completed run."""
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.downtime_ns is not None
    assert sum(outcome.phases_ns.values()) == outcome.downtime_ns
    assert sum(outcome.critical_path_ns.values()) == outcome.downtime_ns
    assert outcome.critical_path_ns["unexplained"] == 0
    assert min(*outcome.phases_ns.values(), *outcome.critical_path_ns.values()) >= 0
    assert outcome.total_ns is not None
    assert outcome.total_ns >= outcome.downtime_ns
    state_bytes = sum(device.blocks * device.block_bytes for device in scenario.devices)
    assert outcome.counters.wire_bytes >= outcome.counters.device_bytes >= state_bytes
    assert outcome.counters.device_bytes_resent >= 0
    assert outcome.guest_runs_at == "target"


# --- the shipped scenarios -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        (name, protocol)
        for at, name in enumerate(shipped())
        for protocol in (PROTOCOLS if name in DIFFER else (("v2", "v3-n4")[at % 2],))
    ],
)
def test_shipped_scenarios_complete_and_the_target_has_what_the_guest_wrote(name: str, protocol: str) -> None:
    scenario = load(name)
    outcome, kept = kept_run(scenario, protocol)
    check_accounts(outcome, scenario)
    stopped_ns = kept.timeline.marks[Mark.STOP_ORDERED] + ns(scenario.vmm.vcpu_stop_ms)
    for spec, state, image in zip(scenario.devices, kept.states, kept.images, strict=True):
        # Reckoned from the guest's plan alone, not from what the device or the protocol remember.
        activity = state.activity
        writes = int(stopped_ns * activity.writes_per_s // 1e9)
        assert np.array_equal(image.version, np.bincount(activity.write_blocks[:writes], minlength=spec.blocks))
        events = int((activity.reconfiguration_ns <= stopped_ns).sum())
        objects = activity.reconfiguration_objects[:events].ravel()
        assert np.array_equal(image.object_version, np.bincount(objects, minlength=spec.critical.objects))


def test_shipped_scenarios_are_the_three_of_the_readme() -> None:
    assert {"mlx5-2vf", "nic-reconfig", "vgpu-32g"} <= shipped().keys()


# --- a target that differs is a failure ------------------------------------------------------------------------------

WRONG_BLOCKS = (
    "target, dev stream 1: write() failed: EBADMSG (Bad message); this left it in ERROR; "
    "first cause: blocks: the END's digest is not that of the versions that came"
)
"""With addressable blocks the target's driver sees it by itself: EBADMSG."""
Load = Callable[[Any, Record], Coroutine[Any, Any, None]]


def replace_load(patch: pytest.MonkeyPatch, by: Callable[[Load], Load]) -> None:
    """Put something around what the target's driver does with a whole record, v2's and v3's."""
    for kind in (LoadSession, V3LoadSession):
        patch.setattr(kind, "load", by(kind.load))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("what", "harm"),
    [
        ("blocks", lambda session, record: _forget(session.image.version, record.blocks)),
        ("objects", lambda session, record: _forget(session.image.object_version, record.objects)),
    ],
)
def test_one_block_or_object_that_was_not_loaded_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, protocol: str, what: str, harm: Callable[[LoadSession, Record], None]
) -> None:
    def harmed(original: Load) -> Load:
        async def load(self: LoadSession, record: Record) -> None:
            await original(self, record)
            harm(self, record)

        return load

    replace_load(monkeypatch, harmed)
    outcome = run(small_scenario(), protocol)
    assert outcome.kind is OutcomeKind.FAILED
    difference = "Difference(blocks=1, objects=0)" if what == "blocks" else "Difference(blocks=0, objects=1)"
    if (protocol, what) == (BLOCKS, "blocks"):
        assert outcome.reason == WRONG_BLOCKS
    else:
        assert outcome.reason == f"the target's state differs from the source's: dev: {difference}"
    assert outcome.downtime_ns is None
    assert outcome.phases_ns == {}


def _forget(versions: np.ndarray, loaded: np.ndarray) -> None:
    if 3 in loaded:
        versions[3] = -1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stale_block_fails_the_run(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    scenario = small_scenario(STEADY | {"device.0.writes": {"pattern": "sequential", "mib_per_s": 100.0}})

    def old_first(original: Load) -> Load:
        async def load(self: LoadSession, record: Record) -> None:
            before = self.image.version[record.blocks]
            await original(self, record)
            again = before >= 0  # a block that comes a second time keeps what came first
            self.image.version[record.blocks[again]] = before[again]

        return load

    assert run(scenario, protocol).kind is OutcomeKind.COMPLETED
    replace_load(monkeypatch, old_first)
    outcome = run(scenario, protocol)
    assert outcome.kind is OutcomeKind.FAILED
    if protocol == BLOCKS:
        assert outcome.reason == WRONG_BLOCKS
    else:
        assert "differs from the source's: dev: Difference(blocks=" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stream_without_its_end_fails_the_run(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    def without_end(original: Load) -> Load:
        async def load(self: LoadSession, record: Record) -> None:
            if not record.end:
                await original(self, record)

        return load

    replace_load(monkeypatch, without_end)
    outcome = run(small_scenario(), protocol)
    assert outcome.kind is OutcomeKind.FAILED
    if protocol.startswith("v2"):
        why = "RESUMING -> RUNNING_P2P failed: EIO (Input/output error); this left it in ERROR"
        cause = "RESUMING -> STOP: the stream did not come to its END"
    else:  # the critical stream's is one of them
        why = "RESUMING -> STOP failed: ENODATA (No data available); this left it in ERROR"
        cause = f"{2 if protocol in ('v3-n1', 'v3-n1-multifd', BLOCKS) else 5} of its streams did not come to their END"
    assert outcome.reason == f"target, dev: {why}; first cause: {cause}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("lost", [0, 5], ids=["first", "sixth"])
def test_a_lost_payload_fails_the_run(monkeypatch: pytest.MonkeyPatch, protocol: str, lost: int) -> None:
    calls = 0

    def losing(original: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
        async def write(self: Any, payload: Payload, piece_bytes: int) -> None:
            nonlocal calls
            calls += 1
            if calls != lost + 1:
                await original(self, payload, piece_bytes)

        return write

    for kind in (LoadStream, LoadBlocks):
        monkeypatch.setattr(kind, "write", losing(kind.write))
    outcome = run(small_scenario(), protocol)
    if protocol.startswith("v3") and not lost:  # critical data: everything else waits for it, and no guest is stopped
        assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
        assert "; the first pass of dev " in outcome.reason
        return
    assert outcome.kind is OutcomeKind.FAILED
    if protocol.startswith("v2"):
        told = (
            "target, dev: write() failed: EINVAL (Invalid argument); this left it in RESUMING; first cause: stream 0: "
        )
        assert outcome.reason.startswith(told)
    elif protocol == BLOCKS and lost:
        assert outcome.reason == WRONG_BLOCKS
    else:
        # EPROTO where the record goes on; the other streams then find a device that failed, which is no news.
        call = r"target, dev( stream \d)?: write\(\) failed: (EILSEQ|EPROTO) \([^)]*\); this left it in ERROR"
        cause = r"stream \d: byte \d+ of record \d+ of stream \d came where byte \d+ of record \d+ was due"
        assert re.fullmatch(f"{call}; first cause: {cause}", outcome.reason)


def test_a_target_that_breaks_the_protocol_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original = V3Target.load_config

    async def impatient(self: V3Target, device: int) -> None:
        await self.channels[0].send_control(Kind.RESUMED)
        await original(self, device)

    monkeypatch.setattr(V3Target, "load_config", impatient)
    outcome = run(small_scenario(), "v3-n1")
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason.startswith("source: RESUMED came on the return path")
    assert outcome.guest_runs_at == "source"


# --- a migration that cannot converge --------------------------------------------------------------------------------

# What is written in one downtime limit can never be sent in one.
TOO_BUSY = {
    "device.0.state_mib": 64.0,
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 4000.0},
    "link.gbit_per_s": 1.0,
    "link.per_connection_gbit_per_s": 1.0,
    "vmm.give_up_s": 1.0,
}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_writes_beyond_the_link_do_not_converge_and_the_guest_goes_on(protocol: str, devices: int) -> None:
    scenario = small_scenario(TOO_BUSY | {"device.0.count": devices})
    outcome, kept = kept_run(scenario, protocol)
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert outcome.downtime_ns is None
    assert outcome.phases_ns == outcome.critical_path_ns == {}
    assert outcome.stages == ()
    assert outcome.counters.device_bytes_resent == 0
    assert outcome.total_ns is not None
    assert outcome.total_ns >= scenario.vmm.give_up_s * 1e9
    told = re.match(r"given up after 1 s of pre-copy: (.+) MiB left \(RAM (.+), dev0? ([^),]+)", outcome.reason)
    assert told is not None, outcome.reason
    whole, ram, device = map(float, told.groups())
    assert 64 * devices * 0.9 < whole < 64 * devices * 1.2, "all of it is dirty again at any moment"
    assert ram + device < whole + 0.5
    fits, at = map(
        float, re.findall(r"([\d.]+) MiB fit a downtime limit of 20 ms at ([\d.]+) MiB/s", outcome.reason)[0]
    )
    assert fits == pytest.approx(at * 0.02, rel=0.02)
    assert at < 1.7 * 119.2, "1 Gbit/s, and buffers that are filled"
    assert "only a stopped device" not in outcome.reason
    assert Mark.STOP_ORDERED not in kept.timeline.marks
    for driver, state in zip(kept.drivers, kept.states, strict=True):
        assert virtual.run(driver.state()) is State.RUNNING
        virtual.run(driver.set_streams(0))  # EBUSY if a session were open
        before = int(state.version.sum())
        state.advance(scenario.horizon_ns)
        assert int(state.version.sum()) > before


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_stop_only_state_beyond_the_limit_does_not_converge(protocol: str) -> None:
    """With the bandwidth given, the threshold is exact: 8 MiB of stop-only state, or as much as is allowed."""
    changes = {"device.0.stop_only_mib": 8.0, "vmm.bandwidth_gbit_per_s": 8.0, "ram.nonzero_gib": 0.0}
    fits_ms = 8 * MIB / 1e9 * 1e3 + 1
    assert run(small_scenario(changes | {"vmm.downtime_limit_ms": fits_ms}), protocol).kind is OutcomeKind.COMPLETED
    too_short = small_scenario(changes | {"vmm.downtime_limit_ms": fits_ms - 1})
    outcome = run(too_short, protocol)
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert outcome.reason.replace("8.001", "8") == (  # addressable blocks have larger headers
        "given up after 2 s of pre-copy: 8 MiB left (RAM 0, dev 8); 8 MiB fit a downtime limit of 8.38861 ms at the "
        "given 953.7 MiB/s; dev has 8 MiB that pre-copy does not give: they can never fit"
    )


@pytest.mark.parametrize("features", [["STOP_COPY"], ["STOP_COPY", "P2P"], ["STOP_COPY", "P2P", "PRE_COPY"]])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_state_far_beyond_the_limit_does_not_converge_with_or_without_pre_copy(
    protocol: str, features: list[str]
) -> None:
    """1 GiB that can only be saved when stopped, 20 ms, 40 Gbit/s: a tenth of it would be too much."""
    changes = {"device.0.features": features, "device.0.state_mib": 1024.0, "device.0.stop_only_mib": 1024.0}
    outcome = run(small_scenario(changes), protocol)
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert "dev has 1024 MiB that pre-copy does not give: they can never fit" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_state_that_is_dirtied_again_and_again_is_not_taken_for_what_only_a_stopped_device_gives(protocol: str) -> None:
    """Of 64 MiB, 32 can be read only when stopped; all of it is always dirty."""
    reason = run(small_scenario(TOO_BUSY | {"device.0.stop_only_mib": 32.0, "ram.nonzero_gib": 0.0}), protocol).reason
    told = re.search(r"dev has ([\d.]+) MiB that pre-copy does not give", reason)
    assert told is None or float(told[1]) == pytest.approx(32, abs=0.2)
    assert told is not None or "the most that was measured" in reason, "it would have fitted then"


@pytest.mark.parametrize(
    ("protocol", "due"),
    [
        ("v2", "the target did not take what was sent for 1.9"),
        ("v2-multifd-ack", "the target has not acknowledged that the initial data is loaded"),
        ("v2-multifd-reinit-flush-ack-reusable", "the newest initial data of dev is loaded"),
        ("v3-n2", "the critical data of dev (epoch 1) was not loaded"),
        ("v3-blocks-n2", "the critical data of dev (epoch 1) was not loaded"),
    ],
)
def test_critical_data_that_holds_up_the_stop_is_the_reason(protocol: str, due: str) -> None:
    """Its set-up takes 20 s, ten times as long as the migration may take."""
    slow = {"device.0.critical.objects": 200, "device.0.critical.setup_us": 100_000.0}
    outcome = run(small_scenario(slow), protocol)
    assert outcome.kind is OutcomeKind.DID_NOT_CONVERGE
    assert due in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_firmware_is_saving_counts_as_left(protocol: str) -> None:
    """Four MiB are in one SAVE for two seconds; 0.1 Gbit/s would send a sixteenth of that within the limit."""
    slow = {"driver.chunk_mib": 4, "firmware.save_mib_per_s": 2.0, "vmm.give_up_s": 30.0}
    outcome = run(small_scenario(slow | {"vmm.bandwidth_gbit_per_s": 0.1}), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.phases_ns["drain"] < 100e6


@pytest.mark.rule("v3.6.2", "v3.6.3")
@pytest.mark.parametrize("protocol", ["v3-n1", "v3-n4", "v3-n4-pool", "v3-n4-one", "v3-blocks-n4"])
def test_v3_stops_the_guest_when_critical_data_is_loaded_and_the_rest_fits_by_v2s_rule(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """All that is left at the rate of all connections together, and each part by itself; by a cheap look and by an
    exact one, for which the cheap one has to fit."""
    scenario = small_scenario(
        {
            "device.0.count": 2,
            "device.0.writes": {"pattern": "uniform", "mib_per_s": 400.0},
            "device.0.reconfigurations": {"poisson_per_s": 100.0, "objects_each": 2},
            "ram.nonzero_gib": 0.03,
            "ram.dirty_mib_per_s": 50.0,
            "vmm.downtime_limit_ms": 1.5,
        }
    )
    kept = prepared(scenario, protocol)
    looks: list[tuple[str, int, bool]] = []
    parts: set[int] = set()
    asks: list[tuple[int, int]] = []
    dry_looks: set[tuple[bool, bool]] = set()
    samples = sent_of_devices = 0
    sent: dict[Kind, int] = {Kind.RAM: 0, Kind.DATA: 0}
    send, sample, fits = Channel.send, Switchover.sample, V3Source._fits
    sample_part = {kind: kind.sample for kind in (RamBacklog, StreamBacklog)}
    ask_dry = V3Source._ask_dry

    async def sending(self: Channel, frame: Frame) -> None:
        await send(self, frame)
        if frame.kind in sent:
            sent[frame.kind] += len(frame.payload)

    def sampled(self: Switchover, now_ns: int, bytes_sent: int) -> None:
        nonlocal samples, sent_of_devices
        samples += 1
        sent_of_devices = 0
        assert now_ns == clock.now_ns()
        assert bytes_sent == sum(channel.bytes_sent for channel in kept.channels)
        sample(self, now_ns, bytes_sent)

    def sampled_part(self: Backlog, now_ns: int, bytes_sent: int, left_bytes: int) -> None:
        nonlocal sent_of_devices
        assert isinstance(kept.source, V3Source)
        parts.add(id(self))
        if self is kept.source._rule.ram:
            assert (bytes_sent, left_bytes) == (sent[Kind.RAM], kept.machines["source"].ram.pending_bytes())
        else:
            sent_of_devices += bytes_sent
            assert sent_of_devices <= sent[Kind.DATA]
        sample_part[type(self)](self, now_ns, bytes_sent, left_bytes)  # type: ignore[index]

    def asked(self: V3Source, device_bytes: int) -> bool:
        ram_bytes = kept.machines["source"].ram.pending_bytes()
        exact = bool(looks) and looks[-1][0] == "estimate" and looks[-1][2]
        if exact:  # it made the devices tell, and so it is what they have but for what was written meanwhile
            left = sum(stream.left_bytes() for driver in kept.drivers for stream in driver._saving.streams)
            assert device_bytes <= left <= device_bytes + MIB
        else:
            assert self._ready
        result = fits(self, device_bytes)
        rule = self._rule
        each = [rule.ram.fits(ram_bytes), *(backlog.fits(part.unread_bytes) for part, backlog in rule.parts)]
        assert result == (ram_bytes + device_bytes < rule.whole.threshold_bytes and all(each))
        looks.append(("exact" if exact else "estimate", clock.now_ns(), result))
        return result

    def asking(ask: Callable[[Any], Coroutine[Any, Any, None]]) -> Callable[[Any], Coroutine[Any, Any, None]]:
        async def asked_part(self: Any) -> None:
            asks.append((id(self), self.unread_bytes))
            await ask(self)

        return asked_part

    async def asked_dry(self: V3Source) -> None:
        """Those that are drained are asked for more, but only once RAM fits."""
        dry = {id(part) for part in self._parts if part.unread_bytes == 0}
        ram_bytes = kept.machines["source"].ram.pending_bytes()
        ram_fits = self._rule.whole.fits(ram_bytes) and self._rule.ram.fits(ram_bytes)
        asks.clear()
        await ask_dry(self)
        assert not any(unread for _, unread in asks)
        assert {part for part, _ in asks} >= dry if ram_fits else not asks
        dry_looks.add((ram_fits, bool(dry)))

    monkeypatch.setattr(_Stream, "ask", asking(_Stream.ask))
    monkeypatch.setattr(BlockReaders, "ask", asking(BlockReaders.ask))
    monkeypatch.setattr(V3Source, "_ask_dry", asked_dry)
    monkeypatch.setattr(Channel, "send", sending)
    monkeypatch.setattr(Switchover, "sample", sampled)
    for kind in sample_part:
        monkeypatch.setattr(kind, "sample", sampled_part)
    monkeypatch.setattr(V3Source, "_fits", asked)
    check_accounts(virtual.run(kept.outcome()), scenario)
    assert looks[-1] == ("exact", kept.timeline.marks[Mark.STOP_ORDERED], True)
    assert len(looks) > 10, "many looks before that"
    assert {look[::2] for look in looks} >= {("estimate", False), ("estimate", True), ("exact", True)}
    dirty = 1 if "n1" in protocol or "blocks" in protocol else 4
    assert len(parts) == 1 + 2 * dirty, "RAM, and the dirty streams of two devices"
    assert dry_looks >= {(True, True), (False, True)}, "some are drained before RAM fits, and after"
    assert samples > sum(look[0] == "estimate" for look in looks), "and some when it was not ready"


@pytest.mark.rule("v3.6.2")
@pytest.mark.parametrize("protocol", ["v3-n1", "v3-n4", "v3-n4-pool"])
def test_v3_does_not_stop_with_more_of_a_stream_left_than_it_saves_within_the_limit(protocol: str) -> None:
    """RAM is fast, and all streams run dry while it moves: that says nothing of how soon they are through again."""
    changes = {
        "device.0.state_mib": 16.0,
        "device.0.writes": {"pattern": "uniform", "mib_per_s": 60.0},
        "firmware.save_mib_per_s": 100.0,
        "firmware.engines": 1.0,
        "ram.nonzero_gib": 0.06,
        "ram.send_gib_per_s": 0.2,
        "vmm.downtime_limit_ms": 30.0,
        "vmm.bandwidth_window_ms": 10.0,
        "vmm.give_up_s": 30.0,
    }
    outcome = run(small_scenario(changes), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.critical_path_ns["firmware"] < 1.2 * 30e6


@pytest.mark.rule("v3.6.2", "v3.6.8")
def test_v3_does_not_stop_a_gpu_while_its_first_image_is_on_its_way_into_the_target() -> None:
    """It is read four streams wide, its LOAD takes a second, and much of it has to be saved once more."""
    changes = {
        "device.0.state_mib": 16384.0,
        "device.0.stop_only_mib": 512.0,
        "device.0.writes.mib_per_s": 2000.0,
        "device.0.reconfigurations.poisson_per_s": 0.0,
        "firmware.save_mib_per_s": 6000.0,
        "ram.size_gib": 4.0,
        "ram.nonzero_gib": 1.0,
        "ram.dirty_mib_per_s": 50.0,
        "ram.working_set_mib": 256.0,
        "vmm.read_mib": 8.0,
        "v3.critical_credit_mib": 8.0,
    }
    gpu = load("nic-reconfig", [f"{key}={value}" for key, value in changes.items()])
    outcome = run(gpu, "v3-n4")
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.phases_ns["drain"] < 300e6


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_streams_that_have_carried_nothing_yet_are_not_expected_to_be_fast(protocol: str) -> None:
    """The first chunk takes half a second; RAM, which is fast, says nothing about how fast the rest will come."""
    outcome = run(small_scenario({"firmware.save_mib_per_s": 2.0, "vmm.give_up_s": 30.0}), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.phases_ns["drain"] < 1e9


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ram_that_was_not_sent_yet_is_not_expected_to_be_fast(protocol: str) -> None:
    """The same the other way round: eight frames of RAM take two seconds each, the device is through at once."""
    slow = {"ram.send_gib_per_s": 0.5 / 1024, "vmm.ram_budget_ms": 50.0, "vmm.give_up_s": 60.0}
    outcome = run(small_scenario(slow), protocol)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.phases_ns["drain"] < 5e9, "at most the frame that is being made, and one more"


# --- a device that cannot --------------------------------------------------------------------------------------------


@pytest.mark.rule("v3.12.4")
@pytest.mark.parametrize(("has", "asked"), [(0, 1), (3, 4), (16, 64)])
def test_more_streams_than_the_device_has_are_unsupported(has: int, asked: int) -> None:
    scenario = small_scenario({"device.0.max_dirty_streams": has})
    outcome, kept = kept_run(scenario, f"v3-n{asked}")
    assert outcome.kind is OutcomeKind.UNSUPPORTED
    assert outcome.reason == f"dev has {has} dirty streams; {asked} were asked for"
    assert outcome.downtime_ns is None
    assert outcome.counters.device_bytes == 0
    assert virtual.run(kept.drivers[0].state()) is State.RUNNING


@pytest.mark.rule("v3.12.4")
def test_one_device_of_several_that_cannot_is_named() -> None:
    other = small_scenario({"device.0.name": "old", "device.0.max_dirty_streams": 0}).device[0]
    scenario = small_scenario().model_copy(update={"device": [*small_scenario().device, other]})
    outcome = run(scenario, "v3-n2")
    assert outcome.kind is OutcomeKind.UNSUPPORTED
    assert outcome.reason == "old has 0 dirty streams; 2 were asked for"
    assert run(scenario, "v2").kind is OutcomeKind.COMPLETED


def test_as_many_streams_as_the_device_has_are_supported() -> None:
    assert run(small_scenario({"device.0.max_dirty_streams": 3}), "v3-n3").kind is OutcomeKind.COMPLETED


# --- what an outcome tells -------------------------------------------------------------------------------------------


@cache
def mlx5(protocol: str) -> Outcome:
    return run(load("mlx5-2vf"), protocol)


def test_v2_tells_the_stages_of_a_vmms_trace() -> None:
    outcome = mlx5("v2")
    stages = {(stage.name, stage.index): stage for stage in outcome.stages}
    per_device = {(name, i) for name in ("device_save", "device_load", "config_load") for i in (0, 1)}
    whole = {(name, 0) for name in ("setup", "stop", "ram_save", "ram_load", "saved_to_loaded", "announce_and_start")}
    assert stages.keys() == whole | per_device
    assert stages["device_save", 0].end_ns <= stages["device_save", 1].start_ns, "saved one after the other"
    assert stages["device_load", 0].end_ns <= stages["device_load", 1].start_ns, "loaded one after the other"
    assert stages["config_load", 0].end_ns <= stages["config_load", 1].start_ns, "config under one lock"
    assert stages["stop", 0].end_ns - stages["stop", 0].start_ns == outcome.phases_ns["stop"]


def test_v3_loads_config_under_one_lock() -> None:
    scenario = small_scenario({"device.0.count": 3})
    configs = sorted((s for s in run(scenario, "v3-n2").stages if s.name == "config_load"), key=_ends)
    assert len(configs) == 3
    assert min(late.end_ns - early.end_ns for early, late in pairwise(configs)) >= ns(scenario.device[0].config_load_ms)


def _ends(stage: Stage) -> int:
    return stage.end_ns


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_times_are_those_of_the_calls(protocol: str) -> None:
    """Each read that gave data costs at least the call; all of them copy all bytes at the thread's rate."""
    scenario = small_scenario()
    outcome = run(scenario, protocol)
    copying_ns = outcome.counters.device_bytes / (scenario.host.copy_gib_per_s * (1 << 30)) * 1e9
    calls_ns = outcome.counters.reads * scenario.driver.call_us * 1e3
    assert outcome.counters.read_copy_ns == pytest.approx(copying_ns + calls_ns, rel=1e-3)
    assert outcome.counters.reads >= outcome.counters.device_bytes / (scenario.vmm.read_mib * MIB)


def test_bytes_sent_again_are_what_was_written_again() -> None:
    idle, busy = (
        run(small_scenario(STEADY | {"device.0.writes": {"pattern": "sequential", "mib_per_s": rate}}), "v2")
        for rate in (0.001, 100.0)
    )
    assert idle.counters.device_bytes_resent < 64 * 1024, "headers only"
    assert busy.counters.device_bytes_resent > idle.counters.device_bytes_resent + 64 * 1024


def test_keep_is_handed_the_timeline_of_the_outcome() -> None:
    kept: list[Timeline] = []
    outcome = simulate(small_scenario(), Protocol("v2", 2, {}), 1, keep=kept.append)
    (timeline,) = kept
    assert timeline.digest() == outcome.digest
    assert timeline.downtime_ns == outcome.downtime_ns


def test_an_outcome_depends_on_scenario_protocol_and_seed_alone() -> None:
    scenario = small_scenario({"firmware.service_cv": 0.3})
    assert run(scenario, "v3-n2", 7) == run(scenario, "v3-n2", 7)
    assert replace(run(scenario, "v3-n2", 8), seed=7) != run(scenario, "v3-n2", 7)


def test_a_run_takes_no_cause_over_from_its_caller() -> None:
    scenario = load("favours-v2", ["device.0.state_mib=16", "device.0.stop_only_mib=16"])
    protocol = Protocol.parse("v2", scenario)
    alone = simulate(scenario, protocol, 1)
    before = cause()
    caused_by(7)
    try:
        assert simulate(scenario, protocol, 1).digest == alone.digest
    finally:
        caused_by(before)
