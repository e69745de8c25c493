# SPDX-License-Identifier: GPL-2.0-or-later
"""v2 as QEMU drives it: the loop of reads, estimates and exact figures, the stop, switchover-acks, REINIT.

The first half runs one VMM against devices, RAM and a wire that do what the test wrote down; the second, migrations.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from proto_v3.errors import LostAfterCommitError, PeerFailedError, PeerProtocolError, leaves
from proto_v3.timeline import Mark, Timeline
from proto_v3.vfio.uapi import MigrationFlags, PrecopyFlags, PrecopyInfo, State
from proto_v3.vmm.migration import STARTS, OutcomeKind, Side, UnsupportedError
from proto_v3.vmm.switchover import SwitchoverSettings
from proto_v3.vmm.v2 import Ack, V2Options
from proto_v3.vmm.v2_precopy import UNKNOWN_STOP_COPY_BYTES
from proto_v3.vmm.v2_source import LateAckError, V2Source
from proto_v3.vmm.v2_target import V2Target
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind, Payload, decode, encode_header
from sim.clock import virtual as clock
from sim.clock.port import now_ns, sleep_ns
from sim.device.record import Bulk
from sim.device.save_v2 import V2Stream
from sim.outcome import Outcome
from sim.run import VirtualRun
from sim.scenario.units import KIB, MIB, ns
from tests.build.runs import kept_run
from tests.build.scenario import small_scenario, virtual

MS = 1_000_000
NO_PRE_COPY = MigrationFlags.STOP_COPY | MigrationFlags.P2P
PRE_COPY = NO_PRE_COPY | MigrationFlags.PRE_COPY
REINIT = PrecopyFlags.REINIT

SETTINGS = SwitchoverSettings(
    downtime_limit_ns=1 * MS,
    bandwidth_window_ns=0,  # the first round ends the first window: the given bandwidth holds
    idle_round_ns=10 * MS,
    precopy_idle_ns=10 * MS,
    decision_interval_ns=10 * MS,
    give_up_ns=1000 * MS,
    read_bytes=MIB,
    write_bytes=32 * KIB,
    ram_budget_ns=3 * MS,
    given_bandwidth_bytes_per_s=1e9,
)
"""A million bytes fit."""
PLAIN = V2Options()


# --- one VMM and what the test wrote down ----------------------------------------------------------------------------


@dataclass
class Device:
    """A device and its data fd. What is asked of it goes to the log, with what was asked."""

    name: str
    log: list[tuple[Any, ...]]
    unread: int = 0
    """Bytes that read() gives in pre-copy, and after it."""
    infos: Sequence[PrecopyInfo] = ()
    """PRECOPY_INFO's answers in turn; the last one again and again. None given: what is unread, as dirty bytes."""
    size: int = 0
    """MIG_DATA_SIZE; below 0 it fails."""
    size_at_first: int = 1 << 30
    """The same, when it is asked for the first time: before the session."""
    flags: MigrationFlags = PRE_COPY
    end_of_precopy: str = "ENOMSG"
    is_in: State = State.RUNNING
    asked: int = 0

    async def migration_flags(self) -> MigrationFlags:
        return self.flags

    async def state(self) -> State:
        return self.is_in

    async def set_state(self, target: State) -> Device | None:
        self.log.append((self.name, "set_state", target))
        session = self.is_in in (State.PRE_COPY, State.PRE_COPY_P2P)
        self.is_in = target
        return self if target in (State.PRE_COPY, State.STOP_COPY, State.RESUMING) and not session else None

    async def reset(self) -> None:
        self.log.append((self.name, "reset"))
        self.is_in = State.RUNNING

    async def set_precopy_info_v2(self) -> None:
        self.log.append((self.name, "opt in"))

    async def stop_copy_bytes(self) -> int:
        size, self.size_at_first = self.size_at_first or self.size, 0
        if size == self.size:
            self.log.append((self.name, "MIG_DATA_SIZE"))
        if size < 0:
            raise OSError(errno.EIO, "no size")
        return size

    async def precopy_info(self) -> PrecopyInfo:
        self.log.append((self.name, "PRECOPY_INFO"))
        self.asked += 1
        if not self.infos:
            return PrecopyInfo(0, self.unread)
        return self.infos[min(self.asked, len(self.infos)) - 1]

    async def read(self, max_bytes: int) -> Payload:
        self.log.append((self.name, "read", max_bytes))
        size = min(max_bytes, self.unread)
        self.unread -= size
        if not size and self.is_in is State.PRE_COPY and self.end_of_precopy == "ENOMSG":
            raise OSError(errno.ENOMSG, "nothing for now")
        return Bulk(size)

    async def write(self, payload: Payload, piece_bytes: int) -> None:
        self.log.append((self.name, "write", len(payload), piece_bytes))


@dataclass
class Machine:
    """A guest without devices, and its RAM: frames of 1000 bytes that take a millisecond each."""

    log: list[tuple[Any, ...]]
    running: bool = True
    frames: int = 0
    passes: int = 0
    loaded: int = 0
    set_up_ns: int = 0

    @property
    def ram(self) -> Machine:
        return self

    def pending_bytes(self) -> int:
        return 1000 * self.frames

    async def sync(self) -> None:
        self.log.append(("ram", "sync"))

    async def final_sync(self) -> None:
        self.log.append(("ram", "final sync"))

    async def final_scan(self) -> None: ...

    async def take(self, budget_ns: int) -> Payload | None:
        if not self.frames:
            self.passes += 1
            return None
        self.frames -= 1
        await sleep_ns(MS)
        return Bulk(1000)

    async def load(self, payload: Payload) -> None:
        self.loaded += len(payload)

    async def set_up(self) -> None:
        await sleep_ns(self.set_up_ns)

    async def buffer_device_data(self, size_bytes: int) -> None: ...

    async def copy_packet(self, size_bytes: int) -> None: ...

    async def wake_up(self) -> None: ...

    async def sync_channels(self, count: int) -> None: ...

    async def close_channels(self, count: int) -> None: ...

    async def stop_vcpus(self) -> None:
        self.log.append(("vcpus", "stop"))
        self.running = False

    async def start_vcpus(self) -> None:
        self.log.append(("vcpus", "start"))
        self.running = True

    async def load_other_devices(self) -> None:
        self.log.append(("other devices", "load"))

    async def load_config(self, device: int) -> None:
        self.log.append((f"config {device}", "load"))


class Wire:
    """One end of a connection: what is sent is kept; what is heard comes from the test, or answers what was sent."""

    def __init__(self, answer: Callable[[Frame], list[Frame]], ns_per_byte: int = 1) -> None:
        self.sent: list[Frame] = []
        self._answer = answer
        self._ns_per_byte = ns_per_byte
        self._heard: asyncio.Queue[Frame] = asyncio.Queue()

    def hear(self, *frames: Frame) -> None:
        for frame in frames:
            self._heard.put_nowait(frame)

    async def send(self, header: bytes, payload: Payload) -> None:
        await sleep_ns(len(payload) * self._ns_per_byte)
        frame = decode(header, payload)
        self.sent.append(frame)
        self.hear(*self._answer(frame))

    async def recv(self) -> tuple[bytes, Payload]:
        frame = await self._heard.get()
        return encode_header(frame), frame.payload

    def told(self, *kinds: Kind) -> list[tuple[Kind, int, int]]:
        """Kind, device and value of the frames of some kinds."""
        return [(frame.kind, frame.device, frame.value) for frame in self.sent if frame.kind in kinds]


def resumes(frame: Frame) -> list[Frame]:
    """A target that runs the guest as soon as it has everything."""
    return [Frame(Kind.RESUMED)] if frame.kind is Kind.END else []


def fails_at(kind: Kind) -> Callable[[Frame], list[Frame]]:
    """A target that fails at this frame."""
    return lambda frame: [Frame(Kind.FAILED)] if frame.kind is kind else []


@dataclass
class Source:
    """A source VMM, and the devices and the wire around it."""

    devices: list[Device]
    log: list[tuple[Any, ...]]
    options: V2Options = PLAIN
    settings: SwitchoverSettings = SETTINGS
    answer: Callable[[Frame], list[Frame]] = resumes
    ns_per_byte: int = 1
    frames: int = 0
    set_up_ns: int = 0
    timeline: Timeline = field(default_factory=lambda: Timeline(now_ns))

    async def migrate(self) -> OutcomeKind:
        self.wire = Wire(self.answer, self.ns_per_byte)
        self.machine = Machine(self.log, frames=self.frames, set_up_ns=self.set_up_ns)
        side = Side(self.machine, self.devices, self.settings, self.timeline)  # type: ignore[arg-type]
        self.vmm = V2Source(side, [Channel(self.wire)], self.options)
        return await self.vmm.run()

    def of(self, *what: Any) -> list[tuple[Any, ...]]:
        """The log's entries about some calls, in order."""
        return [entry for entry in self.log if entry[1] in what]


def source(*devices: dict[str, Any], **settings: Any) -> Source:
    """A source with devices a, b and so on."""
    log: list[tuple[Any, ...]] = []
    made = [Device("abcdef"[at], log, **keys) for at, keys in enumerate(devices)]
    changed = {key: settings.pop(key) for key in list(settings) if key in SwitchoverSettings.__slots__}
    return Source(made, log, settings=replace(SETTINGS, **changed), **settings)


# --- QEMU's loop -----------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.vmm.1")
@virtual
async def test_a_round_is_one_read_of_at_most_the_buffer_on_each_device() -> None:
    vmm = source({"unread": 7 * MIB // 2}, {"unread": 5 * MIB // 4}, downtime_limit_ns=0)
    await vmm.migrate()
    assert {entry[2] for entry in vmm.of("read")} == {MIB}
    data = [(frame.device, len(frame.payload)) for frame in vmm.wire.sent if frame.kind is Kind.DATA]
    assert data == [(0, MIB), (1, MIB), (0, MIB), (1, MIB // 4), (0, MIB), (0, MIB // 2)]
    # Each device is read once more, and has nothing, in the round that ends pre-copy.
    assert [entry[0] for entry in vmm.of("read")][:10] == ["a", "b"] * 5


@virtual
async def test_the_buffer_is_the_settings() -> None:
    vmm = source({"unread": 5000}, read_bytes=2000, downtime_limit_ns=0)
    await vmm.migrate()
    assert [len(frame.payload) for frame in vmm.wire.sent if frame.kind is Kind.DATA] == [2000, 2000, 1000]


@pytest.mark.rule("v2.vmm.1")
@pytest.mark.parametrize(("size", "largest"), [(600, 600), (5000, 2000), (-1, 2000)])
@virtual
async def test_the_buffer_is_no_larger_than_what_the_device_says_it_has_before_it_starts(
    size: int, largest: int
) -> None:
    vmm = source({"unread": 5000, "size_at_first": size}, read_bytes=2000, downtime_limit_ns=0)
    await vmm.migrate()
    assert {entry[2] for entry in vmm.of("read")} == {largest}


@pytest.mark.rule("v2.vmm.1")
@virtual
async def test_a_round_sends_ram_for_its_budget_before_it_reads() -> None:
    vmm = source({"unread": 10}, {"unread": 10}, frames=5, downtime_limit_ns=0)
    await vmm.migrate()
    sent = [(frame.kind.name, frame.device) for frame in vmm.wire.sent if len(frame.payload)]
    assert sent == [("RAM", 0)] * 3 + [("DATA", 0), ("DATA", 1)] + [("RAM", 0)] * 2


@pytest.mark.rule("v2.vmm.2", "v2.vmm.5")
@virtual
async def test_bytes_read_are_taken_off_the_initial_ones_first_and_then_off_the_dirty_ones() -> None:
    """A million bytes fit; 5.5 MiB are announced, so after five reads half a MiB is left, and only then it asks."""
    told = PrecopyInfo(5 * MIB // 2, 3 * MIB)
    vmm = source({"unread": 6 * MIB, "infos": [told, PrecopyInfo(0, 0)]}, options=V2Options(ack=Ack.ONE_SHOT))
    vmm.answer = lambda frame: [Frame(Kind.SWITCHOVER_ACK)] if frame.kind is Kind.INIT_DATA_SENT else resumes(frame)
    await vmm.migrate()
    asked = [entry[1] for entry in vmm.log if entry[1] in ("PRECOPY_INFO", "read", "MIG_DATA_SIZE", "stop")]
    assert asked[:9] == ["PRECOPY_INFO", *["read"] * 5, "MIG_DATA_SIZE", "PRECOPY_INFO", "stop"]
    sent = [frame.kind.name for frame in vmm.wire.sent if frame.kind in (Kind.DATA, Kind.INIT_DATA_SENT)]
    assert sent[:5] == ["DATA", "DATA", "DATA", "INIT_DATA_SENT", "DATA"], "the third read has the last initial bytes"


def exact_looks(vmm: Source) -> int:
    """How often the exact figure was asked for, without the last look of one that was given up: for the reason."""
    return len(vmm.of("sync")) - (vmm.vmm.reason != "")


@pytest.mark.rule("v2.vmm.2")
@virtual
async def test_a_read_beyond_what_was_announced_leaves_nothing_and_never_less() -> None:
    """Else the first device's surplus would hide what the second still has."""
    vmm = source(
        {"unread": 9 * MIB, "infos": [PrecopyInfo(0, MIB // 2)]},
        {"unread": 9 * MIB, "infos": [PrecopyInfo(0, MIB + 1_100_000)]},
        give_up_ns=3 * MS,  # a round takes two
    )
    await vmm.migrate()
    assert exact_looks(vmm) == 0, "1.1 million bytes are left of the second"
    vmm = source({"unread": 9 * MIB, "infos": [PrecopyInfo(0, MIB // 2)]}, give_up_ns=1_500_000)
    await vmm.migrate()
    assert exact_looks(vmm) == 1


@pytest.mark.rule("v2.vmm.2")
@pytest.mark.parametrize("end", ["ENOMSG", "0"])
@virtual
async def test_the_temporary_end_counts_as_empty_whatever_was_announced(end: str) -> None:
    """By the header it is ENOMSG; mtty and qat give 0 bytes instead."""
    vmm = source({"unread": 0, "infos": [PrecopyInfo(MIB, 99 * MIB), PrecopyInfo(0, 0)], "end_of_precopy": end})
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert vmm.of("PRECOPY_INFO", "read", "MIG_DATA_SIZE")[:4] == [
        ("a", "PRECOPY_INFO"),
        ("a", "read", MIB),
        ("a", "MIG_DATA_SIZE"),
        ("a", "PRECOPY_INFO"),
    ]


@pytest.mark.rule("v2.vmm.3", "v2.vmm.4")
@virtual
async def test_the_exact_figure_is_asked_for_only_once_the_estimate_fits() -> None:
    vmm = source({"unread": 3 * MIB}, {"unread": 2 * MIB, "flags": NO_PRE_COPY, "size": 1})
    await vmm.migrate()
    asked = [entry for entry in vmm.log if entry[1] in ("PRECOPY_INFO", "read", "MIG_DATA_SIZE", "sync", "stop")]
    read, info = ("a", "read", MIB), ("a", "PRECOPY_INFO")
    exact = [("ram", "sync"), ("a", "MIG_DATA_SIZE"), info, ("b", "MIG_DATA_SIZE")]
    # 3 MiB, 2, 1 (more than a million bytes), 0.
    assert asked[:9] == [info, read, read, read, *exact, ("vcpus", "stop")]


@pytest.mark.rule("v2.vmm.3")
@virtual
async def test_an_exact_figure_that_does_not_fit_sends_it_back_to_iterate() -> None:
    """MIG_DATA_SIZE says more than what was announced: what only a stopped device gives."""
    vmm = source({"unread": MIB, "size": 1_000_000}, give_up_ns=55 * MS)
    assert await vmm.migrate() is OutcomeKind.DID_NOT_CONVERGE
    assert len(vmm.of("MIG_DATA_SIZE")) == 8, "twice after 1 ms, then after each pause of 10"
    vmm = source({"unread": MIB, "size": 999_999}, give_up_ns=55 * MS)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert len(vmm.of("MIG_DATA_SIZE")) == 1


@virtual
async def test_a_user_that_polls_asks_in_every_round() -> None:
    vmm = source({"unread": 3 * MIB}, options=V2Options(polls=True))
    await vmm.migrate()
    asked = [entry[1] for entry in vmm.log if entry[1] in ("PRECOPY_INFO", "read", "stop")]
    # Before the first round, behind each read, and once more with the exact figure.
    assert asked[: asked.index("stop")] == ["PRECOPY_INFO", *["read", "PRECOPY_INFO"] * 3, "PRECOPY_INFO"]


@virtual
async def test_polling_sees_what_became_dirty_where_deducing_does_not() -> None:
    """The device is written to: what it tells in the second round is more than what it told at first."""
    infos = [PrecopyInfo(0, MIB), *[PrecopyInfo(0, 9 * MIB)] * 20]
    polls, deduces = (
        source(
            {"unread": 99 * MIB, "infos": infos, "size": 9 * MIB}, options=V2Options(polls=polls), give_up_ns=1_500_000
        )
        for polls in (True, False)
    )
    await polls.migrate()
    await deduces.migrate()
    assert exact_looks(polls) == 0
    assert exact_looks(deduces) == 1


@pytest.mark.rule("v2.vmm.3")
@pytest.mark.parametrize(("limit_ns", "kind"), [(0, "DID_NOT_CONVERGE"), (1, "COMPLETED")])
@virtual
async def test_a_size_that_cannot_be_had_counts_as_100_gib(limit_ns: int, kind: str) -> None:
    """At 1e9 bytes a second, a nanosecond is a byte; what just reaches the threshold does not fit."""
    assert UNKNOWN_STOP_COPY_BYTES == 100 * 1024**3
    limit_ns += UNKNOWN_STOP_COPY_BYTES + 7
    vmm = source({"size": -1}, {"size": 7}, downtime_limit_ns=limit_ns, give_up_ns=30 * MS)
    assert (await vmm.migrate()).name == kind


@pytest.mark.rule("v2.vmm.4")
@pytest.mark.parametrize("given", [None, 1e9])
@virtual
async def test_nothing_is_decided_before_the_first_window_is_over(given: float | None) -> None:
    """A byte a nanosecond: 300 MB fit, and that is what is left after 50 ms; but the window takes 100."""
    vmm = source({"unread": 350_000_000}, downtime_limit_ns=300 * MS, bandwidth_window_ns=100 * MS)
    vmm.settings = replace(vmm.settings, given_bandwidth_bytes_per_s=given)
    times: list[int] = []
    vmm.devices[0].stop_copy_bytes = _noting(times, vmm.devices[0].stop_copy_bytes)  # type: ignore[method-assign]
    start = now_ns()
    await vmm.migrate()
    read_ns = MIB
    assert 100 * MS <= times[1] - start < 100 * MS + read_ns, "the first one is for the buffer, at set-up"


@pytest.mark.rule("v2.vmm.4")
@virtual
async def test_the_first_window_begins_with_the_migration_and_counts_its_set_up() -> None:
    vmm = source({"unread": 320_000_000}, downtime_limit_ns=300 * MS, bandwidth_window_ns=100 * MS)
    vmm.set_up_ns = 60 * MS
    await vmm.migrate()
    assert 100 * MS <= vmm.timeline.marks[Mark.STOP_ORDERED] < 102 * MS


def _noting(times: list[int], call: Callable[..., Any]) -> Callable[..., Any]:
    async def noted(*args: Any) -> Any:
        times.append(now_ns())
        return await call(*args)

    return noted


@pytest.mark.rule("v2.vmm.4")
@virtual
async def test_the_bandwidth_counts_all_bytes_of_the_last_window() -> None:
    """0.5 GB/s, whatever of it RAM and whatever a device: 50 MB fit 100 ms."""
    for unread, kind in ((49_000_000, "COMPLETED"), (51_000_000, "DID_NOT_CONVERGE")):
        vmm = source({"unread": 100_000_000, "size": unread}, ns_per_byte=2, given_bandwidth_bytes_per_s=None)
        vmm.settings = replace(
            vmm.settings, downtime_limit_ns=100 * MS, give_up_ns=190 * MS, bandwidth_window_ns=100 * MS
        )
        assert (await vmm.migrate()).name == kind


@pytest.mark.rule("v2.vmm.4")
@virtual
async def test_an_idle_loop_counts_18_bytes_a_round_for_ram_and_for_each_device_in_pre_copy() -> None:
    """A round in 10 ms counts 36 bytes, 11 rounds in the first window: some 4,000 bytes fit the limit of a second."""
    for size, kind in ((3500, "COMPLETED"), (4500, "DID_NOT_CONVERGE")):
        vmm = source({"size": size}, {"flags": NO_PRE_COPY}, given_bandwidth_bytes_per_s=None)
        vmm.settings = replace(
            vmm.settings, downtime_limit_ns=1000 * MS, give_up_ns=900 * MS, bandwidth_window_ns=100 * MS
        )
        assert (await vmm.migrate()).name == kind


@pytest.mark.rule("v2.vmm.19")
@pytest.mark.parametrize(
    ("frames_a_window", "order", "windows"),
    [(None, "RRRDRRRR", 0), (2, "RRRRRRRD", 3), (3, "RRRRRRRD", 2), (4, "RRRDRRRR", 1)],
    ids=["no limit", "RAM stops before its time is over", "RAM fills it", "RAM leaves a frame"],
)
@virtual
async def test_ram_that_fills_the_window_leaves_the_devices_no_turn(
    frames_a_window: int | None, order: str, windows: int
) -> None:
    """A round has time for three frames of RAM; a window of 10 ms has room for some frames of 1000 bytes."""
    vmm = source({"unread": 10}, frames=7, downtime_limit_ns=0, bandwidth_window_ns=10 * MS)
    most = None if frames_a_window is None else frames_a_window * 1000 * 100.0
    vmm.settings = replace(vmm.settings, max_bandwidth_bytes_per_s=most)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert "".join(frame.kind.name[0] for frame in vmm.wire.sent if frame.kind in (Kind.RAM, Kind.DATA)) == order
    assert vmm.timeline.marks[Mark.STOP_ORDERED] // (10 * MS) == windows


@pytest.mark.rule("v2.vmm.19")
@virtual
async def test_a_device_that_fills_the_window_leaves_the_next_one_no_turn_before_it_is_over() -> None:
    vmm = source({"unread": 2000}, {"unread": 10}, downtime_limit_ns=0, bandwidth_window_ns=10 * MS)
    vmm.settings = replace(vmm.settings, max_bandwidth_bytes_per_s=2000 * 100.0)
    times: list[int] = []
    vmm.devices[1].read = _noting(times, vmm.devices[1].read)  # type: ignore[method-assign]
    start = now_ns()
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert times[0] - start == 10 * MS


@pytest.mark.rule("v2.vmm.19")
@virtual
async def test_what_comes_after_the_stop_has_no_limit() -> None:
    """60,000 bytes fit, and take 60 us; in pre-copy they would take 60 windows."""
    vmm = source({"unread": 60_000, "size": 60_000}, read_bytes=1000, bandwidth_window_ns=10 * MS)
    vmm.settings = replace(vmm.settings, max_bandwidth_bytes_per_s=1000 * 100.0)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    ordered_ns = vmm.timeline.marks[Mark.STOP_ORDERED]
    assert ordered_ns == 10 * MS
    assert now_ns() - ordered_ns < MS


# --- the stop --------------------------------------------------------------------------------------------------------


@pytest.mark.rule("v2.vmm.8", "v2.vmm.9")
@virtual
async def test_devices_stop_in_two_passes_and_then_ram_and_each_device_go_in_turn() -> None:
    vmm = source({"size": 1}, {"flags": NO_PRE_COPY, "size": 1}, {"size": 1}, frames=1)
    vmm.devices[0].unread = vmm.devices[2].unread = 2 * MIB
    vmm.devices[1].unread = 3000
    vmm.settings = replace(vmm.settings, downtime_limit_ns=100 * MS)  # all of it fits after the first round
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    at = vmm.log.index(("vcpus", "stop"))
    states = [entry for entry in vmm.log[at:] if entry[1] == "set_state"]
    assert states == [
        ("c", "set_state", State.PRE_COPY_P2P),  # the last one first, in both passes
        ("b", "set_state", State.RUNNING_P2P),
        ("a", "set_state", State.PRE_COPY_P2P),
        ("c", "set_state", State.STOP_COPY),
        ("b", "set_state", State.STOP),  # it has no pre-copy: its session begins when its turn comes
        ("a", "set_state", State.STOP_COPY),
        ("b", "set_state", State.STOP_COPY),
        *[(name, "set_state", State.STOP) for name in "abc"],
    ]
    begun = [frame.kind for frame in vmm.wire.sent].index(Kind.RAM_BEGIN)
    told = [(frame.kind.name, frame.device, len(frame.payload)) for frame in vmm.wire.sent[begun:]]
    assert told == [
        ("RAM_BEGIN", 0, 0),
        ("RAM_END", 0, 0),
        *[("DEVICE_BEGIN", 0, 0), ("DATA", 0, MIB), ("STREAM_END", 0, 0)],
        *[("DEVICE_BEGIN", 1, 0), ("DATA", 1, 3000), ("STREAM_END", 1, 0)],
        *[("DEVICE_BEGIN", 2, 0), ("DATA", 2, MIB), ("STREAM_END", 2, 0)],
        *[("CONFIG", device, 0) for device in range(3)],
        ("END", 0, 0),
    ]


@pytest.mark.rule("v2.vmm.11")
@virtual
async def test_stop_copy_is_left_only_when_the_guest_runs_at_the_target() -> None:
    def answer(frame: Frame) -> list[Frame]:
        vmm.log.append(("wire", frame.kind.name))
        return resumes(frame)

    vmm = source({"unread": 10}, answer=answer)
    await vmm.migrate()
    assert vmm.log[-2:] == [("wire", "END"), ("a", "set_state", State.STOP)]


@pytest.mark.rule("v2.vmm.17")
@virtual
async def test_a_device_is_set_up_before_the_next_one_is_touched() -> None:
    vmm = source(
        *[each | {"size_at_first": 0} for each in ({}, {"flags": NO_PRE_COPY}, {})], options=V2Options(reinit=True)
    )
    await vmm.migrate()
    assert vmm.log[:9] == [
        *[("a", "opt in"), ("c", "opt in")],  # before the migration: the device is realized
        *[("a", "MIG_DATA_SIZE"), ("a", "set_state", State.PRE_COPY), ("a", "PRECOPY_INFO")],
        ("b", "MIG_DATA_SIZE"),
        *[("c", "MIG_DATA_SIZE"), ("c", "set_state", State.PRE_COPY), ("c", "PRECOPY_INFO")],
    ]


@pytest.mark.rule("v2.vmm.3")
@virtual
async def test_exact_figures_are_asked_for_device_by_device_the_size_first() -> None:
    vmm = source({}, {})
    await vmm.migrate()
    at = vmm.log.index(("ram", "sync"))
    both = [(name, what) for name in "ab" for what in ("MIG_DATA_SIZE", "PRECOPY_INFO")]
    assert vmm.log[at + 1 : at + 5] == both


@virtual
async def test_only_who_wants_reinit_opts_in_and_only_devices_with_pre_copy_are_asked() -> None:
    for reinit in (False, True):
        vmm = source({}, {"flags": NO_PRE_COPY}, options=V2Options(reinit=reinit))
        await vmm.migrate()
        assert vmm.of("opt in") == ([("a", "opt in")] if reinit else [])


@pytest.mark.rule("v2.vmm.17")
@pytest.mark.parametrize(("code", "goes_on"), [(errno.ENOTTY, True), (errno.EIO, False)])
@virtual
async def test_a_kernel_without_precopy_info_v2_is_used_without(code: int, goes_on: bool) -> None:
    vmm = source({"unread": 10}, options=V2Options(reinit=True, ack=Ack.REUSABLE), answer=acks)

    async def refuses() -> None:
        raise OSError(code, "no such feature")

    vmm.devices[0].set_precopy_info_v2 = refuses  # type: ignore[method-assign]
    if goes_on:
        assert await vmm.migrate() is OutcomeKind.COMPLETED
    else:
        with pytest.raises(OSError, match="SET MIG_PRECOPY_INFOv2 failed: EIO"):
            await vmm.migrate()


# --- switchover-ack, at the source -----------------------------------------------------------------------------------


def hear_at(vmm: Source, at_s: float, *frames: Frame) -> None:
    """Have the target say something at a time."""
    asyncio.get_running_loop().call_later(at_s, lambda: vmm.wire.hear(*frames))


@virtual
async def test_without_the_ack_nobody_says_that_the_initial_data_was_sent() -> None:
    vmm = source({"unread": 10, "infos": [PrecopyInfo(10, 0), PrecopyInfo(0, 0, flags=REINIT), PrecopyInfo(0, 0)]})
    await vmm.migrate()
    assert vmm.wire.told(Kind.INIT_DATA_SENT) == []


@pytest.mark.rule("v2.vmm.5")
@virtual
async def test_a_one_shot_ack_is_waited_for_and_one_does_for_all_devices() -> None:
    infos = [PrecopyInfo(10, 0), PrecopyInfo(0, 0)]
    vmm = source(*[{"unread": 10, "infos": infos}] * 3, options=V2Options(ack=Ack.ONE_SHOT))
    hear_at(vmm, 0.2005, Frame(Kind.SWITCHOVER_ACK))
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert vmm.wire.told(Kind.INIT_DATA_SENT) == [(Kind.INIT_DATA_SENT, device, 1) for device in range(3)]
    assert 200 * MS < vmm.timeline.marks[Mark.STOP_ORDERED] <= 211 * MS


@virtual
async def test_an_ack_that_never_comes_is_waited_for_until_it_gives_up() -> None:
    for ack in (Ack.ONE_SHOT, Ack.REUSABLE):
        options = V2Options(reinit=ack is Ack.REUSABLE, ack=ack)
        vmm = source({"unread": 10, "size_at_first": 10}, options=options, give_up_ns=300 * MS)
        assert await vmm.migrate() is OutcomeKind.DID_NOT_CONVERGE
        assert Mark.STOP_ORDERED not in vmm.timeline.marks
        assert vmm.vmm.reason == (
            "given up after 0.3 s of pre-copy: 0 MiB left (RAM 0, a 0); 0.9537 MiB fit a downtime limit of 1 ms at the "
            "given 953.7 MiB/s; the target has not acknowledged that "
            + ("the initial data is loaded" if ack is Ack.ONE_SHOT else "the newest initial data of a is loaded")
        )


@pytest.mark.rule("v2.vmm.5")
@virtual
async def test_a_one_shot_ack_is_not_asked_for_again_after_a_reinit() -> None:
    infos = [PrecopyInfo(10, 0), PrecopyInfo(5, 0, flags=REINIT), PrecopyInfo(0, 0)]
    vmm = source({"unread": 10, "infos": infos}, options=V2Options(reinit=True, ack=Ack.ONE_SHOT))
    vmm.answer = lambda frame: [Frame(Kind.SWITCHOVER_ACK)] if frame.kind is Kind.INIT_DATA_SENT else resumes(frame)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert vmm.wire.told(Kind.INIT_DATA_SENT) == [(Kind.INIT_DATA_SENT, 0, 1)]


REUSABLE = V2Options(reinit=True, ack=Ack.REUSABLE)


def acks(frame: Frame) -> list[Frame]:
    """A target that has loaded everything at once."""
    if frame.kind is Kind.INIT_DATA_SENT:
        return [Frame(Kind.SWITCHOVER_ACK, frame.device, value=frame.value)]
    return resumes(frame)


@pytest.mark.rule("v2.vmm.6")
@virtual
async def test_a_reusable_ack_is_asked_for_again_after_each_reinit() -> None:
    infos = [PrecopyInfo(10, 0), PrecopyInfo(5, 0, flags=REINIT), PrecopyInfo(5, 0, flags=REINIT), PrecopyInfo(0, 0)]
    vmm = source({"unread": 30, "infos": infos}, {"unread": 10}, options=REUSABLE, read_bytes=10, answer=acks)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert vmm.wire.told(Kind.INIT_DATA_SENT) == [
        (Kind.INIT_DATA_SENT, 0, 1),
        (Kind.INIT_DATA_SENT, 1, 1),
        (Kind.INIT_DATA_SENT, 0, 2),
        (Kind.INIT_DATA_SENT, 0, 3),
    ]


@pytest.mark.rule("v2.vmm.6")
@virtual
async def test_only_the_newest_ack_of_every_device_lets_the_guest_be_stopped() -> None:
    reinit = [PrecopyInfo(10, 0), PrecopyInfo(5, 0, flags=REINIT), PrecopyInfo(0, 0)]
    vmm = source({"unread": 20, "infos": reinit}, {"unread": 10}, options=REUSABLE)
    for at_s, device, value in [(0.1005, 0, 1), (0.2005, 1, 1), (0.3005, 0, 2)]:
        hear_at(vmm, at_s, Frame(Kind.SWITCHOVER_ACK, device, value=value))
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert 300 * MS < vmm.timeline.marks[Mark.STOP_ORDERED] <= 311 * MS


@virtual
async def test_a_device_without_pre_copy_needs_no_ack() -> None:
    vmm = source({"unread": 10}, {"unread": 10, "flags": NO_PRE_COPY}, options=REUSABLE, answer=acks)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    assert vmm.wire.told(Kind.INIT_DATA_SENT) == [(Kind.INIT_DATA_SENT, 0, 1)]


@pytest.mark.rule("v2.vmm.6", "v2.vmm.7")
@virtual
async def test_a_reinit_that_is_found_once_the_vcpus_are_stopped_fails_the_migration_and_the_guest_goes_on() -> None:
    vmm = source({}, {}, options=REUSABLE, answer=acks)
    late = vmm.devices[1]
    ask = late.precopy_info

    async def precopy_info() -> PrecopyInfo:
        return replace(await ask(), flags=PrecopyFlags(0) if vmm.machine.running else REINIT)

    late.precopy_info = precopy_info  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup) as raised:
        await vmm.migrate()
    (error,) = leaves(raised.value)
    assert isinstance(error, LateAckError)
    assert str(error) == (
        "b reported REINIT after it was decided to stop: its ack comes too late (switchover-ack was requested by 1 "
        "device during switchover)"
    )
    at = vmm.log.index(("vcpus", "stop"))
    both_start = [(name, "set_state", state) for state in STARTS for name in "ab"]
    assert vmm.log[at:] == [
        ("vcpus", "stop"),
        ("b", "PRECOPY_INFO"),  # before PRE_COPY_P2P, where mlx5 reports none
        ("b", "set_state", State.PRE_COPY_P2P),
        ("a", "PRECOPY_INFO"),
        ("a", "set_state", State.PRE_COPY_P2P),
        *[(name, "set_state", State.STOP_COPY) for name in "ba"],
        ("ram", "final sync"),  # only then it fails
        ("b", "set_state", State.RUNNING),
        ("a", "set_state", State.RUNNING),
        *both_start,
        ("vcpus", "start"),
    ]
    assert vmm.wire.sent[-1].kind is Kind.CANCEL


@pytest.mark.rule("v2.best.2")
@virtual
async def test_with_a_retry_the_same_goes_back_to_pre_copy_from_p2p_and_stops_again_when_the_ack_is_there() -> None:
    vmm = source({}, {}, options=replace(REUSABLE, max_retries=1), answer=acks)
    late = vmm.devices[1]
    ask, stops = late.precopy_info, 0

    async def precopy_info() -> PrecopyInfo:
        nonlocal stops
        stops += not vmm.machine.running
        info = await ask()
        return replace(info, flags=REINIT) if (stops, vmm.machine.running) == (1, False) else info

    late.precopy_info = precopy_info  # type: ignore[method-assign]
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    first, second = (at for at, entry in enumerate(vmm.log) if entry == ("vcpus", "stop"))
    taken_back = [
        ("vcpus", "stop"),
        *[entry for name in "ba" for entry in [(name, "PRECOPY_INFO"), (name, "set_state", State.PRE_COPY_P2P)]],
        *[(name, "set_state", State.PRE_COPY) for name in "ab"],
        ("vcpus", "start"),
    ]
    assert vmm.log[first : first + len(taken_back)] == taken_back
    states = [entry[2] for entry in vmm.log[second:] if entry[1] == "set_state"]
    assert states == [*[State.PRE_COPY_P2P] * 2, *[State.STOP_COPY] * 2, *[State.STOP] * 2]
    assert vmm.wire.told(Kind.INIT_DATA_SENT) == [(Kind.INIT_DATA_SENT, *each) for each in [(0, 1), (1, 1), (1, 2)]]


@pytest.mark.rule("v2.vmm.7", "v2.vmm.8")
@virtual
async def test_each_device_is_asked_once_more_right_before_its_p2p_the_last_one_first() -> None:
    vmm = source({}, {}, {"flags": NO_PRE_COPY}, options=REUSABLE, answer=acks)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    at = vmm.log.index(("vcpus", "stop"))
    assert vmm.log[at + 1 : at + 9] == [
        ("c", "set_state", State.RUNNING_P2P),  # it has no pre-copy, and so nothing to be asked
        ("b", "PRECOPY_INFO"),
        ("b", "set_state", State.PRE_COPY_P2P),
        ("a", "PRECOPY_INFO"),
        ("a", "set_state", State.PRE_COPY_P2P),
        ("c", "set_state", State.STOP),
        ("b", "set_state", State.STOP_COPY),
        ("a", "set_state", State.STOP_COPY),
    ]


@virtual
async def test_a_device_without_p2p_is_not_asked_once_more() -> None:
    flags = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY
    vmm = source({"flags": flags}, options=REUSABLE, answer=acks)
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    at = vmm.log.index(("vcpus", "stop"))
    assert vmm.log[at + 1] == ("a", "set_state", State.STOP_COPY)


@pytest.mark.rule("v2.vmm.7")
@pytest.mark.parametrize("ack", [Ack.OFF, Ack.ONE_SHOT])
@virtual
async def test_who_has_no_reusable_ack_does_not_look_again(ack: Ack) -> None:
    vmm = source({}, options=V2Options(reinit=True, ack=ack))
    hear_at(vmm, 0.001, Frame(Kind.SWITCHOVER_ACK))
    assert await vmm.migrate() is OutcomeKind.COMPLETED
    at = vmm.log.index(("vcpus", "stop"))
    assert ("a", "PRECOPY_INFO") not in vmm.log[at:]


@pytest.mark.rule("v2.vmm.12")
@virtual
async def test_a_guest_that_starts_again_takes_its_devices_through_p2p_once_more() -> None:
    vmm = source({"unread": 10}, {"flags": NO_PRE_COPY}, answer=fails_at(Kind.END))
    with pytest.raises(ExceptionGroup):
        await vmm.migrate()
    at = vmm.log.index(("b", "set_state", State.STOP_COPY))
    assert [entry for entry in vmm.log[at + 1 :] if entry[1] != "read"] == [
        ("b", "set_state", State.RUNNING),
        ("a", "set_state", State.RUNNING),
        *[(name, "set_state", state) for state in STARTS for name in "ab"],
        ("vcpus", "start"),
    ]


@virtual
async def test_a_device_without_p2p_is_in_running_again_once() -> None:
    vmm = source({"flags": MigrationFlags.STOP_COPY}, answer=fails_at(Kind.END))
    with pytest.raises(ExceptionGroup):
        await vmm.migrate()
    assert vmm.of("set_state", "start")[-2:] == [("a", "set_state", State.RUNNING), ("vcpus", "start")]


@pytest.mark.rule("v2.vmm.18")
@virtual
async def test_several_devices_of_which_one_has_no_p2p_are_refused_before_anything_is_done() -> None:
    vmm = source({}, {"flags": PRE_COPY & ~MigrationFlags.P2P})
    with pytest.raises(
        UnsupportedError, match=r"^b: no P2P. Multiple VFIO devices migration is supported only if all "
    ):
        await vmm.migrate()
    assert vmm.log == []
    assert [frame.kind for frame in vmm.wire.sent] == [Kind.CANCEL], "the target goes, too"


@pytest.mark.rule("v2.vmm.12")
@virtual
async def test_a_device_that_was_reset_under_the_guest_is_left_alone_from_then_on() -> None:
    vmm = source({"unread": 10}, {"unread": 10}, answer=fails_at(Kind.END))
    broken = vmm.devices[1]
    put = broken.set_state

    async def set_state(target: State) -> Device | None:
        if target is State.RUNNING:
            raise OSError(errno.EIO, "stuck")
        return await put(target)

    broken.set_state = set_state  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup):
        await vmm.migrate()
    at = vmm.log.index(("b", "reset"))
    assert [entry for entry in vmm.log[at:] if entry[0] == "b"] == [("b", "reset")]
    assert vmm.vmm.counters.devices_reset_under_guest == 1
    assert vmm.machine.running


# --- what the target tells -------------------------------------------------------------------------------------------

ON_RETURN_PATH = {Kind.SWITCHOVER_ACK, Kind.LOADED, Kind.RESUMED, Kind.FAILED}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in ON_RETURN_PATH], ids=lambda kind: kind.name)
@virtual
async def test_what_does_not_belong_on_the_return_path_ends_the_migration(kind: Kind) -> None:
    vmm = source({"size": 1 << 30})
    hear_at(vmm, 0.05, Frame(kind))
    with pytest.raises(ExceptionGroup) as raised:
        await vmm.migrate()
    (error,) = raised.value.exceptions
    assert isinstance(error, PeerProtocolError)
    assert str(error) == f"{kind.name} came on the return path, where it is not due"
    assert vmm.machine.running
    assert vmm.devices[0].is_in is State.RUNNING


@virtual
async def test_a_target_that_says_that_it_runs_before_the_end_breaks_the_protocol() -> None:
    vmm = source({"size": 1 << 30})
    hear_at(vmm, 0.05, Frame(Kind.RESUMED))
    with pytest.raises(ExceptionGroup) as raised:
        await vmm.migrate()
    assert raised.group_contains(PeerProtocolError, match="RESUMED")
    assert vmm.machine.running


@virtual
async def test_an_ack_for_a_device_that_does_not_exist_ends_the_migration() -> None:
    vmm = source({"size": 1 << 30}, options=REUSABLE)
    hear_at(vmm, 0.05, Frame(Kind.SWITCHOVER_ACK, 1, value=1))
    with pytest.raises(ExceptionGroup) as raised:
        await vmm.migrate()
    assert raised.group_contains(PeerProtocolError, match="SWITCHOVER_ACK came on the return path")


@pytest.mark.rule("v2.vmm.14")
@pytest.mark.parametrize("when", [Kind.SETUP, Kind.RAM_BEGIN, Kind.END])
@virtual
async def test_a_target_that_failed_gives_the_guest_back_even_after_the_end(when: Kind) -> None:
    """END says that the target may run the guest; a target that says FAILED does not."""
    vmm = source({"unread": 10}, answer=lambda frame: [Frame(Kind.FAILED)] if frame.kind is when else [])
    with pytest.raises(ExceptionGroup) as raised:
        await vmm.migrate()
    assert raised.group_contains(PeerFailedError, match="the target failed")
    assert vmm.machine.running
    assert vmm.devices[0].is_in is State.RUNNING


@pytest.mark.rule("v2.vmm.14")
@virtual
async def test_after_the_end_a_connection_that_breaks_does_not_give_the_guest_back() -> None:
    """The target may run it: whether it does, nobody here knows."""
    vmm = source({"unread": 10}, answer=lambda frame: [Frame(Kind.SETUP)] if frame.kind is Kind.END else [])
    why = r"^the target may run the guest, .*\(SETUP came on the return path, where it is not due\): it stays stopped"
    with pytest.raises(LostAfterCommitError, match=why):
        await vmm.migrate()
    assert not vmm.machine.running
    assert vmm.devices[0].is_in is State.STOP_COPY


@virtual
async def test_what_fails_after_the_target_said_that_it_runs_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest runs there: nothing is taken back here, and nobody has to look whether it does."""
    vmm = source({"unread": 10})
    put = Device.set_state

    async def fails_at_the_end(device: Device, target: State) -> Device | None:
        if target is State.STOP:
            raise OSError(errno.EIO, "no way out")
        return await put(device, target)

    async def no_reset(device: Device) -> None:
        raise OSError(errno.ENOTTY, "no reset either")

    monkeypatch.setattr(Device, "set_state", fails_at_the_end)
    monkeypatch.setattr(Device, "reset", no_reset)
    with pytest.raises(OSError, match="VFIO_DEVICE_RESET failed: ENOTTY"):
        await vmm.migrate()
    assert not vmm.machine.running
    assert Kind.CANCEL not in [frame.kind for frame in vmm.wire.sent]


@virtual
async def test_the_target_hears_of_a_failure_even_if_the_devices_here_cannot_be_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vmm = source({"unread": 10})

    async def never(*_: Any) -> None:
        raise OSError(errno.EIO, "dead")

    monkeypatch.setattr(Device, "set_state", never)
    monkeypatch.setattr(Device, "reset", never)
    with pytest.raises((OSError, ExceptionGroup)):
        await vmm.migrate()
    assert vmm.wire.sent[-1].kind is Kind.CANCEL


# --- the target ------------------------------------------------------------------------------------------------------


def the_end(devices: int) -> list[Frame]:
    """All that a source sends once its guest is stopped, of RAM and devices that have nothing more."""
    of_devices = [Frame(kind, at) for at in range(devices) for kind in (Kind.DEVICE_BEGIN, Kind.STREAM_END)]
    configs = [Frame(Kind.CONFIG, at) for at in range(devices)]
    return [Frame(Kind.RAM_BEGIN), Frame(Kind.RAM_END), *of_devices, *configs, Frame(Kind.END)]


@dataclass
class Target:
    """A target VMM that hears what the test has it hear."""

    log: list[tuple[Any, ...]] = field(default_factory=list)
    options: V2Options = PLAIN
    flags: tuple[MigrationFlags, ...] = (PRE_COPY, PRE_COPY)

    async def receive(self, *frames: Frame, whole: bool = True) -> bool:
        """`frames`, after SETUP; and where the last one is END, all that comes before it, as it is when `whole`."""
        self.wire = Wire(lambda frame: [])
        frames = (Frame(Kind.SETUP, value=len(self.flags)), *frames)
        if whole and frames[-1].kind is Kind.END:
            frames = (*frames[:-1], *the_end(len(self.flags)))
        self.wire.hear(*frames)
        self.machine = Machine(self.log, running=False)
        self.devices = [Device("abcdef"[at], self.log, flags=flags) for at, flags in enumerate(self.flags)]
        side = Side(self.machine, self.devices, SETTINGS, Timeline(now_ns))  # type: ignore[arg-type]
        return await V2Target(side, [Channel(self.wire)], self.options).run()


@pytest.mark.rule("v2.vmm.9")
@virtual
async def test_the_target_writes_what_comes_in_its_order_in_pieces_of_32_kib() -> None:
    vmm = Target()
    frames = [Frame(Kind.DATA, device, payload=Bulk(size)) for device, size in ((0, MIB), (1, 5), (0, 70_000))]
    assert await vmm.receive(*frames, Frame(Kind.RAM, payload=Bulk(4096)), Frame(Kind.END))
    writes = [entry for entry in vmm.log if entry[1] == "write"]
    set_up, to_a, to_b, again = (len(encode_header(frame)) for frame in (Frame(Kind.SETUP, value=2), *frames))
    # The buffer of 32 KiB is filled with frames as they come: the first write() of a MiB ends where the buffer does.
    first = 32 * KIB - (set_up + to_a)
    assert writes[:3] == [
        ("a", "write", first, 32 * KIB),
        ("a", "write", MIB - first, 32 * KIB),
        ("b", "write", 5, 32 * KIB),
    ]
    assert 1 + -(-(MIB - first) // (32 * KIB)) == 33
    rest = 32 * KIB - (set_up + to_a + MIB + to_b + 5 + again) % (32 * KIB)
    assert writes[3:] == [("a", "write", rest, 32 * KIB), ("a", "write", 70_000 - rest, 32 * KIB)]
    assert vmm.machine.loaded == 4096


@pytest.mark.rule("v2.vmm.9", "v2.vmm.16")
@virtual
async def test_other_devices_come_before_config_and_the_guest_runs_before_it_is_told() -> None:
    vmm = Target()
    assert await vmm.receive(Frame(Kind.END))
    assert vmm.log[2:] == [
        ("other devices", "load"),
        ("config 0", "load"),
        ("config 1", "load"),
        ("a", "set_state", State.RUNNING_P2P),  # leaves RESUMING: the load is checked, of all, before one runs
        ("b", "set_state", State.RUNNING_P2P),
        ("a", "set_state", State.RUNNING),
        ("b", "set_state", State.RUNNING),
        ("vcpus", "start"),
    ]
    assert [frame.kind for frame in vmm.wire.sent] == [Kind.RESUMED]


@virtual
async def test_a_device_without_p2p_goes_to_running_at_once() -> None:
    vmm = Target(flags=(MigrationFlags.STOP_COPY,))
    assert await vmm.receive(Frame(Kind.END))
    assert vmm.log[-2:] == [("a", "set_state", State.RUNNING), ("vcpus", "start")]


@pytest.mark.rule("v2.vmm.5")
@virtual
async def test_one_shot_is_answered_once_when_the_last_device_that_needs_it_is_through() -> None:
    vmm = Target(options=V2Options(ack=Ack.ONE_SHOT), flags=(PRE_COPY, MigrationFlags.STOP_COPY, PRE_COPY))

    def sent(device: int) -> Frame:
        return Frame(Kind.INIT_DATA_SENT, device, value=1)

    await vmm.receive(sent(0), Frame(Kind.DATA, 2, payload=Bulk(5)), sent(2), Frame(Kind.END))
    assert vmm.wire.told(Kind.SWITCHOVER_ACK) == [(Kind.SWITCHOVER_ACK, 0, 0)]
    await vmm.receive(sent(0), Frame(Kind.CANCEL))
    assert vmm.wire.told(Kind.SWITCHOVER_ACK) == [], "one of them is not through"


@virtual
async def test_one_shot_is_answered_at_once_where_no_device_has_pre_copy() -> None:
    vmm = Target(options=V2Options(ack=Ack.ONE_SHOT), flags=(MigrationFlags.STOP_COPY,))
    await vmm.receive(Frame(Kind.END))
    assert [frame.kind for frame in vmm.wire.sent] == [Kind.SWITCHOVER_ACK, Kind.RESUMED]


@virtual
async def test_a_reusable_ack_says_which_request_it_answers() -> None:
    vmm = Target(options=REUSABLE)
    requests = [(0, 1), (1, 1), (1, 2), (0, 2)]
    await vmm.receive(*[Frame(Kind.INIT_DATA_SENT, device, value=value) for device, value in requests], Frame(Kind.END))
    assert vmm.wire.told(Kind.SWITCHOVER_ACK) == [(Kind.SWITCHOVER_ACK, *request) for request in requests]


@pytest.mark.rule("v2.best.3")
@virtual
async def test_the_end_of_a_first_pass_is_answered_when_all_before_it_is_written() -> None:
    vmm = Target()
    data = Frame(Kind.DATA, 1, payload=Bulk(5))
    await vmm.receive(data, Frame(Kind.FIRST_PASS_SENT, 1), data, Frame(Kind.FIRST_PASS_SENT, 0), Frame(Kind.END))
    answered = [(Kind.FIRST_PASS_LOADED, 1, 0), (Kind.FIRST_PASS_LOADED, 0, 0)]
    assert vmm.wire.told(Kind.FIRST_PASS_LOADED) == answered


DUE_IN_PRECOPY = {Kind.DATA, Kind.RAM, Kind.INIT_DATA_SENT, Kind.FIRST_PASS_SENT, Kind.RAM_BEGIN, Kind.CANCEL}


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        *[
            (Frame(kind), rf"{kind.name} came on the main channel, where it is not due \(pre-copy\)")
            for kind in Kind
            if kind not in DUE_IN_PRECOPY
        ],
        (Frame(Kind.DATA, 2, payload=Bulk(5)), "frame for device 2; there are 2"),
        (Frame(Kind.INIT_DATA_SENT, 0, value=1), "INIT_DATA_SENT came, but switchover-ack is not used"),
    ],
    ids=lambda value: value.kind.name if isinstance(value, Frame) else "",
)
@virtual
async def test_what_the_target_cannot_take_is_refused_told_and_leaves_its_devices_reset(frame: Frame, why: str) -> None:
    vmm = Target()
    with pytest.raises(ExceptionGroup) as raised:
        await vmm.receive(frame, whole=False)
    assert raised.group_contains(PeerProtocolError, match=f"^{why}$")
    assert [frame.kind for frame in vmm.wire.sent] == [Kind.FAILED]
    assert vmm.log[-2:] == [("a", "reset"), ("b", "reset")]
    assert not vmm.machine.running


@virtual
async def test_a_cancelled_target_resets_its_devices_and_says_nothing() -> None:
    vmm = Target()
    assert await vmm.receive(Frame(Kind.DATA, 0, payload=Bulk(5)), Frame(Kind.CANCEL)) is False
    assert vmm.log[-2:] == [("a", "reset"), ("b", "reset")]
    assert vmm.wire.sent == []


# --- migrations: when the guest is stopped ---------------------------------------------------------------------------

Sent = list[tuple[int, Channel, Frame]]
"""When, on which end, what."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Every frame of the run."""
    frames: Sent = []
    original = Channel.send

    async def send(self: Channel, frame: Frame) -> None:
        frames.append((now_ns(), self, frame))
        await original(self, frame)

    monkeypatch.setattr(Channel, "send", send)
    return frames


def migrated(changes: dict[str, Any], name: str) -> tuple[Outcome, VirtualRun]:
    return kept_run(small_scenario(changes), name)


# All critical data of a device takes 200 ms to set up, its bytes are sent in 10; a million bytes fit.
LONG_SET_UP = {
    "device.0.critical": {"objects": 4, "object_kib": 4.0, "setup_us": 50_000.0},
    "device.0.state_mib": 2.0,
    "ram.nonzero_gib": 0.0,
    "vmm.bandwidth_gbit_per_s": 8.0,
    "vmm.downtime_limit_ms": 1.0,
}
ACKS = ["v2-ack", "v2-multifd-ack", "v2-ack-polls", "v2-reinit-flush-ack-reusable", "v2-reinit-invalidate-ack-reusable"]


@pytest.mark.rule("v2.vmm.19")
@pytest.mark.parametrize("name", ["v2", "v2-multifd", "v2-multifd-threads"])
def test_a_migration_sends_no_more_than_max_bandwidth_before_the_stop(name: str, sent: Sent) -> None:
    """With multifd too: QEMU counts the bytes of all channels. The frame that fills a window may be of 1 MiB. A thread
    beside may have a packet of 1 MiB, and the header of the next record, on their way, which do not count before they
    are sent."""
    changes = {"ram.nonzero_gib": 0.0625, "vmm.max_bandwidth_mib_per_s": 100.0, "vmm.bandwidth_window_ms": 100.0}
    outcome, kept = migrated(changes, name)
    assert outcome.kind is OutcomeKind.COMPLETED
    stop_ns = kept.timeline.marks[Mark.STOP_ORDERED]
    window_ns = ns(100)
    for begin_ns in range(0, stop_ns, window_ns):
        end_ns = min(begin_ns + window_ns, stop_ns)
        size = sum(len(frame.payload) for at, _, frame in sent if begin_ns <= at < end_ns)
        assert size <= 11 * MIB + (MIB + 64 * KIB if "threads" in name else 0)
    assert stop_ns > ns(500), "64 MiB of RAM, at 10 a window"


@pytest.mark.parametrize("name", ["v2", "v2-multifd", "v2-polls", "v2-reinit-flush"])
def test_without_an_ack_the_guest_is_stopped_while_the_target_still_sets_up(name: str, sent: Sent) -> None:
    outcome, kept = migrated(LONG_SET_UP, name)
    assert kept.timeline.marks[Mark.STOP_ORDERED] < ns(20)
    assert outcome.setup_in_downtime_ns > ns(180)
    assert outcome.late_critical_objects == 4
    assert not any(frame.kind is Kind.INIT_DATA_SENT for _, _, frame in sent)


@pytest.mark.rule("v2.vmm.5")
@pytest.mark.parametrize("name", ACKS)
def test_with_an_ack_the_guest_is_stopped_only_when_the_initial_data_is_loaded(name: str, sent: Sent) -> None:
    outcome, kept = migrated(LONG_SET_UP, name)
    assert outcome.kind is OutcomeKind.COMPLETED
    (acked_ns,) = (at for at, _, frame in sent if frame.kind is Kind.SWITCHOVER_ACK)
    assert ns(200) < acked_ns < kept.timeline.marks[Mark.STOP_ORDERED] < ns(215)
    assert outcome.setup_in_downtime_ns == 0
    assert outcome.late_critical_objects == 0


@pytest.mark.parametrize(("name", "acks"), [("v2-ack", 1), ("v2-multifd-ack", 1), ("v2-reinit-flush-ack-reusable", 3)])
def test_a_one_shot_ack_is_one_for_all_devices_and_a_reusable_one_is_one_for_each(
    name: str, acks: int, sent: Sent
) -> None:
    outcome, kept = migrated(LONG_SET_UP | {"device.0.count": 3}, name)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert sum(frame.kind is Kind.SWITCHOVER_ACK for _, _, frame in sent) == acks
    assert sum(frame.kind is Kind.INIT_DATA_SENT for _, _, frame in sent) == 3
    assert kept.timeline.marks[Mark.STOP_ORDERED] > ns(3 * 200), "their initial data is set up in turn"
    assert outcome.late_critical_objects == 0


@pytest.mark.parametrize("name", ["v2-ack", "v2-reinit-flush-ack-reusable"])
def test_an_ack_is_not_waited_for_where_no_device_has_pre_copy(name: str, sent: Sent) -> None:
    """All of it is sent once the devices are stopped, and so all critical data is late."""
    changes = LONG_SET_UP | {"device.0.features": ["STOP_COPY", "P2P"], "vmm.downtime_limit_ms": 100.0}
    outcome, kept = migrated(changes, name)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert kept.timeline.marks[Mark.STOP_ORDERED] < ns(20)
    assert (outcome.late_critical_objects, outcome.late_critical_bytes) == (4, 4 * 4 * KIB)
    assert outcome.setup_in_downtime_ns == ns(200)
    assert not any(frame.kind is Kind.INIT_DATA_SENT for _, _, frame in sent)


# --- migrations: reconfigured in pre-copy ----------------------------------------------------------------------------

# Two objects become new while the initial image is on its way, behind the initial critical data.
IN_PRE_COPY = LONG_SET_UP | {"device.0.reconfigurations": {"at_s": [0.0045], "objects_each": 2}}
POLICIES, USERS = ["flush", "invalidate"], ["polls", "deduces"]


@pytest.fixture
def reinits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """When PRECOPY_INFO reported REINIT."""
    times: list[int] = []
    original = V2Stream.precopy_info

    async def precopy_info(self: V2Stream) -> PrecopyInfo:
        info = await original(self)
        if info.reinit:
            times.append(now_ns())
        return info

    monkeypatch.setattr(V2Stream, "precopy_info", precopy_info)
    return times


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ack", ["no-ack", "ack", "ack-reusable"])
def test_whoever_opted_in_sees_a_reconfiguration_once_and_before_the_stop(
    ack: str, policy: str, user: str, reinits: list[int]
) -> None:
    outcome, kept = migrated(IN_PRE_COPY, f"v2-reinit-{policy}-{ack}-{user}")
    assert outcome.kind is OutcomeKind.COMPLETED
    (seen_ns,) = reinits
    assert ns(4.5) < seen_ns <= kept.timeline.marks[Mark.STOP_ORDERED]


@pytest.mark.parametrize("name", ["v2", "v2-polls", "v2-ack"])
def test_without_the_opt_in_nobody_is_told_of_a_reconfiguration(name: str, reinits: list[int]) -> None:
    outcome, _ = migrated(IN_PRE_COPY, name)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert reinits == []


def test_an_object_that_becomes_new_between_two_records_of_one_image_is_told_of_and_counted(reinits: list[int]) -> None:
    """Eight objects in four records of 1 MiB, a millisecond each; object 2 becomes new while the third is saved."""
    critical = {"objects": 8, "object_kib": 512.0, "setup_us": 100.0}
    changes = IN_PRE_COPY | {
        "device.0.critical": critical,
        "device.0.reconfigurations": {"at_s": [0.0035], "objects_each": 1},
        "driver.chunks": 8,
        "vmm.downtime_limit_ms": 2.0,
    }
    outcome, kept = kept_run(small_scenario(changes), "v2-reinit-flush", 4)
    assert kept.states[0].activity.reconfiguration_objects.tolist() == [[2]], "seed 4; saved with the second record"
    last = kept.drivers_at_target[0].critical_loads[-1]
    assert len(reinits) == 1
    assert outcome.critical_lag_max_ns == last.end_ns - ns(3.5)


def test_polling_sees_it_sooner_than_deducing(reinits: list[int]) -> None:
    migrated(IN_PRE_COPY, "v2-reinit-flush-polls")
    migrated(IN_PRE_COPY, "v2-reinit-flush-deduces")
    polls_ns, deduces_ns = reinits
    assert polls_ns < deduces_ns


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("multifd", ["", "-multifd"])
def test_a_reusable_ack_is_asked_for_again_and_the_guest_not_stopped_until_the_newest_came(
    policy: str, user: str, multifd: str, sent: Sent
) -> None:
    outcome, kept = migrated(IN_PRE_COPY, f"v2{multifd}-reinit-{policy}-ack-reusable-{user}")
    assert outcome.kind is OutcomeKind.COMPLETED
    told = [(at, frame.value) for at, _, frame in sent if frame.kind is Kind.SWITCHOVER_ACK]
    assert [value for _, value in told] == [1, 2]
    assert ns(300) < told[-1][0] < kept.timeline.marks[Mark.STOP_ORDERED], "200 ms for four objects, then for two"
    assert outcome.late_critical_objects == 0
    assert outcome.setup_in_downtime_ns == 0


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_one_shot_ack_leaves_what_comes_after_it_to_the_downtime(policy: str, user: str, sent: Sent) -> None:
    outcome, kept = migrated(IN_PRE_COPY, f"v2-reinit-{policy}-ack-{user}")
    assert [frame.value for _, _, frame in sent if frame.kind is Kind.INIT_DATA_SENT] == [1]
    assert ns(200) < kept.timeline.marks[Mark.STOP_ORDERED] < ns(215)
    assert (outcome.late_critical_objects, outcome.late_critical_bytes) == (2, 2 * 4 * KIB)
    assert outcome.setup_in_downtime_ns == ns(100)


# --- migrations: reconfigured once it was decided to stop ------------------------------------------------------------

# While the order to stop the vCPUs is carried out, which takes a millisecond, three objects become new.
DURING_STOP = LONG_SET_UP | {"device.0.reconfigurations": {"during_stop_ms": [0.5], "objects_each": 3}}


@pytest.mark.rule("v2.vmm.6")
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("multifd", ["", "-multifd"])
def test_a_reusable_ack_that_would_come_too_late_fails_the_migration_and_the_guest_runs_on(
    policy: str, user: str, multifd: str
) -> None:
    changes = DURING_STOP | {"device.0.writes": {"pattern": "sequential", "mib_per_s": 1.0}}
    outcome, kept = migrated(changes, f"v2{multifd}-reinit-{policy}-ack-reusable-{user}")
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason.startswith(
        "source: dev reported REINIT after it was decided to stop: its ack comes too late ("
    )
    assert outcome.guest_runs_at == "source"
    assert outcome.downtime_ns is None
    # The vCPUs stop in 1 ms, the device in 1 and 2, the last RAM sync takes 0.1; back, it goes through P2P, 1, once
    # more; the vCPUs start in 1.
    assert outcome.counters.stopped_in_vain_ns == pytest.approx(ns(1 + 1 + 2 + 0.1 + 1 + 1), abs=ns(0.01))
    for driver in (*kept.drivers, *kept.drivers_at_target):
        assert clock.run(driver.state()) is State.RUNNING
    (state,) = kept.states
    before = int(state.version.sum())
    state.advance(ns(1000))
    assert int(state.version.sum()) > before, "the guest writes on"


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("ack", ["ack", "reinit-flush-ack", "reinit-invalidate-ack", "multifd-reinit-flush-ack"])
def test_without_a_reusable_ack_the_same_completes_with_the_set_up_in_the_downtime(ack: str, user: str) -> None:
    outcome, _ = migrated(DURING_STOP, f"v2-{ack}-{user}")
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.guest_runs_at == "target"
    assert (outcome.late_critical_objects, outcome.late_critical_bytes) == (3, 3 * 4 * KIB)
    assert outcome.setup_in_downtime_ns == ns(150)
    # From half a millisecond after the order: the rest of the stop, RAM's last pass on a single channel, set-up.
    ram_ms = 0.0 if "multifd" in ack else 0.3
    assert outcome.critical_lag_max_ns == pytest.approx(ns(0.5 + 1.0 + 2.0 + ram_ms + 150), abs=ns(0.2))
    assert outcome.critical_lag_mean_ns == outcome.critical_lag_max_ns


def test_a_driver_that_never_reports_reinit_leaves_a_reusable_ack_without_its_warning() -> None:
    outcome, _ = migrated(
        DURING_STOP | {"driver.reinit": "none", "vmm.reinit": True, "vmm.switchover_ack": "reusable"}, "v2"
    )
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.late_critical_objects == 3


def test_what_would_come_after_the_vcpus_are_stopped_does_not_come() -> None:
    late = {"device.0.reconfigurations": {"during_stop_ms": [1.5], "objects_each": 3}}
    outcome, _ = migrated(LONG_SET_UP | late, "v2-reinit-flush-ack-reusable")
    assert outcome.kind is OutcomeKind.COMPLETED
    assert (outcome.late_critical_objects, outcome.critical_lag_max_ns) == (0, 0)


def test_one_device_of_several_that_is_late_is_named() -> None:
    other = small_scenario(LONG_SET_UP).device[0].model_dump(exclude_none=True)
    changes = LONG_SET_UP | {
        "device.1": other | {"name": "other", "reconfigurations": {"during_stop_ms": [0.5], "objects_each": 1}}
    }
    outcome, _ = migrated(changes, "v2-reinit-flush-ack-reusable")
    assert outcome.reason == (
        "source: other reported REINIT after it was decided to stop: its ack comes too late (switchover-ack was "
        "requested by 1 device during switchover)"
    )


# --- migrations: how late critical data is ---------------------------------------------------------------------------


def test_late_objects_and_lags_are_those_that_can_be_counted_by_hand() -> None:
    """Two reconfigurations of two objects, one in pre-copy behind the only ack, one during the stop.

    Both are late; the target sets up four, two and two objects, one after the other and with little between them.
    """
    changes = LONG_SET_UP | {
        "device.0.reconfigurations": {"at_s": [0.0045], "during_stop_ms": [0.5], "objects_each": 2}
    }
    outcome, kept = migrated(changes, "v2-reinit-flush-ack")
    assert (outcome.late_critical_objects, outcome.late_critical_bytes) == (4, 4 * 4 * KIB)
    assert outcome.setup_in_downtime_ns == ns(200)
    stop_ordered_ns = kept.timeline.marks[Mark.STOP_ORDERED]
    # The first two begin when the first four are through, which is when the ack is sent: half a round trip before it
    # comes, and not a millisecond before the order to stop.
    first_ns = stop_ordered_ns + ns(100) - ns(4.5)
    second_ns = ns(200) - ns(0.5)
    assert outcome.critical_lag_max_ns == pytest.approx(first_ns, abs=ns(1.5))
    assert outcome.critical_lag_mean_ns == pytest.approx((first_ns + second_ns) / 2, abs=ns(1.5))


@pytest.mark.parametrize("name", ["v2", "v2-multifd", "v2-ack", "v3-n2"])
def test_without_reconfigurations_there_is_no_lag(name: str) -> None:
    outcome, _ = migrated(LONG_SET_UP, name)
    assert (outcome.critical_lag_max_ns, outcome.critical_lag_mean_ns) == (0, 0)


@pytest.mark.parametrize("name", ["v2", "v2-reinit-flush-ack", "v3-n2"])
def test_lags_of_several_devices_are_counted_together(name: str) -> None:
    """Of two devices only one is reconfigured, once: the mean over all reconfigurations is that one's lag."""
    plain = small_scenario(LONG_SET_UP).device[0].model_dump(exclude_none=True)
    changes = IN_PRE_COPY | {"device.1": plain | {"name": "plain"}}
    outcome, _ = migrated(changes, name)
    assert outcome.kind is OutcomeKind.COMPLETED
    assert outcome.critical_lag_mean_ns == outcome.critical_lag_max_ns > ns(100)
