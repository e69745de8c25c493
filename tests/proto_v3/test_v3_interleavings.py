# SPDX-License-Identifier: GPL-2.0-or-later
"""v3: whatever the streams are delayed by, and however they are cut, the target has the source's state at the end.

At two levels. Driver to driver, with carriers of the tests' own, which keep the order in a stream and nothing else. And
whole migrations, where each frame is delayed at random, and only the order on a connection is kept.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto_v3.timeline import Mark
from proto_v3.vfio.device import BlocksFd, DataFd
from proto_v3.vfio.uapi import State
from proto_v3.vmm.migration import OutcomeKind, read_some
from proto_v3.wire.frames import MAX_HEADER_BYTES, Frame, Kind, Payload, decode
from proto_v3.wire.streams import OutStream, OwnOutStreams, SharedOutStreams, Wire
from sim.clock import virtual
from sim.clock.port import now_ns, sleep_ns
from sim.device.guest import Activity
from sim.device.record import Extent
from sim.host.link import _OneWay
from sim.scenario.scenario import Scenario
from sim.scenario.units import BYTES_PER_S_PER_GBIT, GIB, MIB, ns
from tests.build.hosts import MS, US, Hosts, session
from tests.build.memory_bounds import blocks_record, bounds, critical_record, dirty_record
from tests.build.scenario import small_scenario, with_p2p
from tests.build.v3_hosts import LoadWatch, opened_blocks, reconfigure, writes
from tests.build.v3_runs import Raw, Tap, TappedRun

# --- driver to driver ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What happens to one device, and how its streams are carried."""

    streams: int
    """0: addressable blocks."""
    readers: int
    """Of each stream, or of the blocks."""
    changes: dict[str, Any]
    events: dict[int, tuple[int, int]]
    objects: list[int]
    written: list[int]
    looks: list[tuple[int, int]]
    """Before the stop: how long pre-copy goes on, and how long the device is in P2P before it goes back."""
    precopy_ns: int
    stop_ns: int
    """From P2P to STOP_COPY."""
    seed: int


DRIVERS: dict[str, list[Any]] = {
    "driver.precopy": ["incremental", "incremental", "incremental", "reread", "check"],
    "driver.reread_ms": [5.0],
    "driver.precopy_image": ["chunks", "whole"],
    "driver.lock": ["none", "per_fd", "device", "global"],
    "driver.chunks": [1, 2, 3],
    "driver.epochs": ["keep", "invalidate"],
    "device.0.state_mib": [0.01, 0.5, 3.0],
    "device.0.block_kib": [16, 64],
    "device.0.critical.object_kib": [1.0, 600.0],
    "device.0.critical.objects": [1, 5],
    "device.0.critical.setup_us": [0.0, 2000.0],
    "firmware.engines": [1, 2, 40],
    "firmware.save_mib_per_s": [100.0, 10_000.0],
    "firmware.load_mib_per_s": [100.0, 10_000.0],
    "firmware.service_cv": [0.0, 0.5],
}


@st.composite
def plans(draw: st.DrawFn, streams: st.SearchStrategy[int]) -> Plan:
    changes = {key: draw(st.sampled_from(values)) for key, values in DRIVERS.items()}
    count_of_streams = draw(streams)
    if not count_of_streams:  # blocks need a driver that knows which of them changed
        changes["driver.precopy"] = "incremental"
    changes["device.0.stop_only_mib"] = changes["device.0.state_mib"] * draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    device = small_scenario(changes).device[0]
    count = device.blocks
    times = st.sampled_from([0, 1, MS, 7 * MS]) | st.integers(0, 30 * MS)
    events = {}
    for at in draw(st.lists(times, max_size=6, unique=True)):
        first = draw(st.integers(0, count - 1))
        events[at] = draw(st.sampled_from([(0, count), (first, 1), (first, count - first), (first, 0)]))
    objects = sorted(draw(st.sets(st.integers(0, device.critical.objects - 1), min_size=1)))
    writable = count - device.stop_only_blocks
    written = draw(st.lists(st.integers(0, max(0, writable - 1)), max_size=20 if writable else 0))
    looks = draw(st.lists(st.tuples(times, st.integers(0, 5 * MS)), max_size=3))
    return Plan(
        count_of_streams,
        draw(st.integers(1, 4)),
        changes,
        events,
        objects,
        written,
        looks,
        draw(times),
        draw(st.integers(0, 2 * MS)),
        draw(st.integers(0, 1 << 32)),
    )


class Carriers:
    """Carries the streams of one device from its source driver to its target driver."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.hosts = Hosts(plan.changes)
        self.chance = random.Random(plan.seed)
        self.stopped = False
        self.largest: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        """Of each stream: the most bytes of a write, and the most calls that one took."""
        self.critical_writes: list[tuple[int, Extent, int]] = []
        """Of each write of critical data: how long it took, the bytes, the size of its pieces."""

    def some_bytes(self) -> int:
        """Mostly much, sometimes next to nothing."""
        if self.chance.random() < 0.05:
            return self.chance.randint(1, 99)
        return int(2 ** self.chance.uniform(13, 22))

    async def some_time(self, scale_ns: int) -> None:
        if scale_ns:
            await sleep_ns(int(scale_ns * self.chance.expovariate(1.0)))

    def scale_ns(self) -> int:
        """Of a stream's delays; some are much slower than others."""
        return self.chance.choice([0, 0, 10 * US, 300 * US, 5 * MS])

    def run(self) -> None:
        """In virtual time."""
        with pytest.MonkeyPatch.context() as patch:
            invalidates = self.plan.changes["driver.epochs"] == "invalidate"
            LoadWatch(patch).watch(self.hosts.state, self.hosts.image, invalidates=invalidates)
            virtual.run(self.migration(), limit_ns=ns(20_000))

    async def migration(self) -> None:
        plan, hosts = self.plan, self.hosts
        reconfigure(hosts.state, plan.events, plan.objects)
        writes(hosts.state, plan.written, per_s=1000.0)
        async with asyncio.TaskGroup() as carriers:
            if plan.streams:
                fds = await session(hosts.source, State.PRE_COPY, plan.streams)
                to = await session(hosts.target, State.RESUMING, plan.streams)
                for stream, (fd, there) in enumerate(zip(fds, to, strict=True)):
                    self.carry(carriers, stream, fd, there)
            else:
                critical, blocks = await opened_blocks(hosts.source, State.PRE_COPY)
                to_critical, to_blocks = await opened_blocks(hosts.target, State.RESUMING)
                self.carry(carriers, 0, critical, to_critical)
                carriers.create_task(self.carry_blocks(blocks, to_blocks))
            await self.guest()
        await hosts.target.set_state(State.RUNNING)
        assert not hosts.image.differences(hosts.state)

    async def guest(self) -> None:
        """Pre-copy, looks in P2P that end it not, and the stop."""
        hosts = self.hosts
        for precopy_ns, p2p_ns in self.plan.looks:
            await sleep_ns(precopy_ns)
            hosts.state.stop(now_ns())
            await hosts.source.set_state(State.PRE_COPY_P2P)
            await sleep_ns(p2p_ns)
            await hosts.source.set_state(State.PRE_COPY)
            hosts.state.start()
        await sleep_ns(self.plan.precopy_ns)
        hosts.state.stop(now_ns())
        await hosts.source.set_state(State.PRE_COPY_P2P)
        await sleep_ns(self.plan.stop_ns)
        await hosts.source.set_state(State.STOP_COPY)
        self.stopped = True

    # --- a stream -------------------------------------------------------------------------------------------------

    def carry(self, carriers: asyncio.TaskGroup, stream: int, fd: DataFd, to: DataFd) -> None:
        pieces: asyncio.Queue[Payload | None] = asyncio.Queue()
        turn = asyncio.Lock()
        asks = stream == 0 or self.chance.random() < 0.7
        for _ in range(self.plan.readers):
            carriers.create_task(self.read(fd, pieces, turn, self.scale_ns(), asks))
        carriers.create_task(self.write(stream, pieces, to, self.scale_ns()))

    async def read(
        self, fd: DataFd, pieces: asyncio.Queue[Payload | None], turn: asyncio.Lock, scale_ns: int, asks: bool
    ) -> None:
        """One of several readers: they take turns, which keeps the order."""
        while True:
            async with turn:
                data = await read_some(fd, self.some_bytes())
                if data is not None:
                    pieces.put_nowait(data if len(data) else None)
            if data is None:
                if asks:
                    await fd.stream_info()
                await fd.poll(None if self.chance.random() < 0.5 else 1 * MS)
            elif not len(data):
                return
            await self.some_time(scale_ns)

    async def write(self, stream: int, pieces: asyncio.Queue[Payload | None], to: DataFd, scale_ns: int) -> None:
        while (data := await pieces.get()) is not None:
            while len(data):
                await self.some_time(scale_ns)
                size, piece_bytes = self.some_bytes(), self.some_bytes()
                piece, data = data[:size], data[size:]
                self.note(stream, piece, piece_bytes)
                start = now_ns()
                await to.write(piece, piece_bytes)
                if stream == 0:
                    assert isinstance(piece, Extent)
                    self.critical_writes.append((now_ns() - start, piece, piece_bytes))
        await to.close()

    def note(self, stream: int, data: Payload, piece_bytes: int) -> None:
        size, calls = self.largest[stream]
        self.largest[stream] = max(size, len(data)), max(calls, -(-len(data) // piece_bytes))

    # --- blocks ---------------------------------------------------------------------------------------------------

    async def carry_blocks(self, fd: BlocksFd, to: BlocksFd) -> None:
        """Readers that each write what they read, after a while; and one that asks what to read."""
        wanted: set[int] = set()
        final = False

        async def reader(scale_ns: int) -> None:
            while wanted or not final:
                if not wanted:
                    await sleep_ns(100 * US)
                    continue
                first = self.chance.choice(sorted(wanted))
                count = 1
                while first + count in wanted and count < self.chance.randint(1, 64):
                    count += 1
                wanted.difference_update(range(first, first + count))
                data = await fd.read_blocks(first, count)
                await self.some_time(scale_ns)
                piece_bytes = self.some_bytes()
                self.note(1, data, piece_bytes)
                await to.write(data, piece_bytes)

        async with asyncio.TaskGroup() as readers:
            for _ in range(self.plan.readers):
                readers.create_task(reader(self.scale_ns()))
            while not final:
                await sleep_ns(self.chance.randint(1, 5 * MS))
                stopped = self.stopped
                told = await fd.dirty_blocks()
                bits = np.unpackbits(np.frombuffer(told.bitmap, np.uint8), count=told.blocks, bitorder="little")
                wanted.update(np.flatnonzero(bits).tolist())
                final = stopped
        end = await fd.read(1 << 20)
        await to.write(end, len(end))
        await to.close()

    # --- what holds -----------------------------------------------------------------------------------------------

    def check_memory(self) -> None:
        """The driver's; the VMM is these tests themselves."""
        scenario = self.hosts.scenario
        epochs = 1 + len(self.plan.events)
        device = scenario.devices[0]
        most = critical_record(scenario, device, epochs)
        if self.plan.streams:
            v3 = scenario.v3.model_copy(update={"dirty_streams": self.plan.streams})
            scenario = scenario.model_copy(update={"v3": v3})
            most += sum(dirty_record(scenario, device, stream) for stream in range(self.plan.streams))
        else:
            most += self.plan.readers * blocks_record(device, 64)
        assert self.hosts.target.counters[0].peak_held_bytes <= most

    def check_critical_writes(self) -> None:
        """With engines for all streams, a write of critical data takes what it costs: its calls and its copy, where the
        memory may be booked for one write of each other stream; and the LOADs and set-ups of the records that it
        completes. Whether dirty streams wait for their epoch, and how many, makes no difference."""
        scenario = self.hosts.scenario
        host, firmware, device = scenario.host, scenario.firmware, scenario.devices[0]
        memory_ns_per_byte = 1e9 / (host.memory_gib_per_s * GIB)
        others_ns = sum(
            (self.plan.readers if not self.plan.streams else 1) * (calls * US + size * memory_ns_per_byte)
            for stream, (size, calls) in self.largest.items()
            if stream
        )
        for took_ns, data, piece_bytes in self.critical_writes:
            copy_ns = max(len(data) / (host.copy_gib_per_s * GIB) * 1e9, len(data) * memory_ns_per_byte + others_ns)
            load_ns = 0.0
            for part in data.parts:
                record = part.record
                if record.end:
                    load_ns += ns(firmware.load_finish_ms)  # where it is the last stream's END
                elif part.stop == record.size_bytes:
                    load_ns += firmware.load_command_us * 1e3
                    load_ns += record.size_bytes / (firmware.load_mib_per_s * MIB) * 1e9
                    load_ns += len(record.objects) * device.critical.setup_us * 1e3
            rounding_ns = 4 + len(data.parts)
            assert took_ns <= -(-len(data) // piece_bytes) * US + copy_ns + load_ns + rounding_ns


@pytest.mark.slow
@pytest.mark.rule("v3.3.3")
@settings(max_examples=50)
@given(plans(st.integers(1, 16)))
def test_streams_may_be_delayed_and_cut_as_one_likes(plan: Plan) -> None:
    carriers = Carriers(plan)
    carriers.run()
    carriers.check_memory()


@pytest.mark.slow
@pytest.mark.rule("v3.11.2")
@settings(max_examples=40)
@given(plans(st.just(0)))
def test_blocks_may_be_read_and_written_in_any_order_by_any_number_of_threads(plan: Plan) -> None:
    carriers = Carriers(plan)
    carriers.run()
    carriers.check_memory()


ROOMY = {"firmware.engines": 40, "firmware.service_cv": 0.0, "driver.call_us": 1.0}


@pytest.mark.slow
@pytest.mark.rule("v3.5.1")
@settings(max_examples=40)
@given(plans(st.integers(0, 16)))
def test_critical_data_waits_for_no_dirty_data_in_the_driver(plan: Plan) -> None:
    carriers = Carriers(replace(plan, changes=plan.changes | ROOMY))
    carriers.run()
    carriers.check_critical_writes()


# --- whole migrations ------------------------------------------------------------------------------------------------


class Delays(Tap):
    """Delays each frame at random, in both directions; on some connections much more than on others."""

    def __init__(self, seed: int, longest_ns: int) -> None:
        self._chance = random.Random(seed)
        self._longest_ns = longest_ns
        self._scale_ns: dict[tuple[str, int], int] = {}
        self._critical: dict[int, list[Frame]] = defaultdict(list)
        self.run: TappedRun | None = None

    async def raw(self, to: str, connection: int, header: bytes, payload: Payload) -> list[Raw]:
        way = (to, connection)
        if way not in self._scale_ns:
            self._scale_ns[way] = self._longest_ns // self._chance.choice([1, 10, 100, 1 << 40])
        await sleep_ns(int(self._chance.random() ** 3 * self._scale_ns[way]))
        frame = decode(header, payload)
        if frame.stream == 0 and frame.kind in (Kind.DATA, Kind.EPOCH_SENT):
            self._critical[frame.device].append(frame)
        elif frame.kind is Kind.EPOCH_LOADED and self.run is not None:
            assert self._loaded(frame.device, self.run) >= frame.value, "not before write() of it returned"
        return [(header, payload)]

    def _loaded(self, device: int, run: TappedRun) -> int:
        loads = run.drivers_at_target[device].critical_loads
        return max((load.epoch for load in loads if load.complete), default=0)

    def check_epochs(self) -> None:
        """EPOCH_SENT goes behind all critical data of its epoch."""
        for frames in self._critical.values():
            complete = told = 0
            for frame in sorted(frames, key=lambda frame: frame.place):
                if frame.kind is Kind.EPOCH_SENT:
                    assert told < frame.value <= complete
                    told = frame.value
                    continue
                assert isinstance(frame.payload, Extent)
                for part in frame.payload.parts:
                    if part.record.epoch_complete and part.stop == part.record.size_bytes:
                        complete = part.record.epoch


def until(activity: Activity, end_ns: int) -> Activity:
    """What the guest does up to then, and nothing after it."""
    events = activity.reconfigurations_until(end_ns)
    return replace(
        activity,
        write_blocks=activity.write_blocks[: activity.writes_until(end_ns)],
        reconfiguration_ns=activity.reconfiguration_ns[:events],
        reconfiguration_objects=activity.reconfiguration_objects[:events],
        reconfiguration_blocks=activity.reconfiguration_blocks[:events],
    )


class CutRun(TappedRun):
    """A migration whose guest rests from a time on."""

    def __init__(self, scenario: Scenario, name: str, tap: Tap, end_ns: int, seed: int = 1) -> None:
        super().__init__(scenario, name, tap, seed)
        self._end_ns = end_ns
        self.loads: LoadWatch | None = None

    def _connect(self) -> Any:
        for state, image in zip(self.states, self.images, strict=True):
            state.activity = until(state.activity, self._end_ns)
            if self.loads is not None:
                self.loads.watch(state, image, invalidates=self.scenario.driver.epochs == "invalidate")
        return super()._connect()

    def check_memory(self, peak_reorder_bytes: int, peak_held_bytes: int) -> None:
        epochs = max(state.epoch for state in self.states)
        most = bounds(self.scenario, epochs)
        assert peak_reorder_bytes <= most.reorder_bytes
        assert peak_held_bytes <= most.held_bytes


NAMES = [
    *("v3-n1-streams-keep-retry", "v3-n1-one-invalidate", "v3-n2-pool-invalidate-retry", "v3-n3-streams-invalidate"),
    *("v3-n4-one-keep-retry", "v3-n5-pool-keep", "v3-n8-streams-invalidate-retry", "v3-n16-pool-invalidate"),
    *("v3-n16-one-invalidate-retry", "v3-blocks-n1-keep", "v3-blocks-n3-streams-invalidate-retry"),
    *("v3-blocks-n4-pool-invalidate", "v3-blocks-n16-one-invalidate-retry"),
]
ACTIVITY_ENDS_NS = ns(40)


@st.composite
def machines(draw: st.DrawFn) -> Scenario:
    """One to three devices, of one kind or two."""

    def device(name: str) -> dict[str, Any]:
        made: dict[str, Any] = {
            "name": name,
            "count": draw(st.integers(1, 2 if name == "a" else 1)),
            "features": ["STOP_COPY", "P2P", "PRE_COPY"]
            if draw(st.integers(0, 4))
            else draw(st.sampled_from([["STOP_COPY"], ["STOP_COPY", "PRE_COPY"], ["STOP_COPY", "P2P"]])),
            "max_dirty_streams": 16,
            "state_mib": draw(st.sampled_from([0.1, 1.0, 4.0])),
            "stop_only_mib": draw(st.sampled_from([0.0, 0.0, 0.01])),
            "block_kib": draw(st.sampled_from([16, 64])),
            "suspend_ms": 0.5,
            "quiesce_ms": 0.5,
            "config_load_ms": 1.0,
            "critical": {
                "objects": draw(st.sampled_from([1, 4, 40])),
                "object_kib": draw(st.sampled_from([0.5, 200.0])),
                "setup_us": draw(st.sampled_from([0.0, 500.0])),
            },
            "reconfigurations": {
                "poisson_per_s": draw(st.sampled_from([0.0, 50.0, 400.0])),
                "during_stop_ms": draw(st.sampled_from([[], [0.5], [0.1, 0.9]])),
                "during_stops": draw(st.integers(1, 5)),
                "invalidates_share": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
            },
        }
        if draw(st.booleans()):
            made["writes"] = {"pattern": "uniform", "mib_per_s": draw(st.sampled_from([10.0, 500.0]))}
        return made

    return small_scenario(
        {
            "device": with_p2p([device(name) for name in "ab"[: draw(st.integers(1, 2))]]),
            "ram.nonzero_gib": draw(st.sampled_from([0.0, 0.004])),
            "ram.size_gib": 0.0078125,
            "ram.frame_mib": draw(st.sampled_from([0.1, 1.0])),
            "ram.dirty_mib_per_s": draw(st.sampled_from([0.0, 50.0])),
            "firmware.engines": draw(st.integers(1, 4)),
            "firmware.save_mib_per_s": draw(st.sampled_from([200.0, 5000.0])),
            "firmware.load_mib_per_s": draw(st.sampled_from([200.0, 5000.0])),
            "firmware.service_cv": draw(st.sampled_from([0.0, 0.5])),
            "driver.lock": draw(st.sampled_from(["none", "per_fd", "device", "global"])),
            "driver.call_us": draw(st.sampled_from([1.0, 100.0])),
            "driver.precopy_image": draw(st.sampled_from(["chunks", "whole"])),
            "link.per_connection_gbit_per_s": draw(st.sampled_from([1.0, 40.0])),
            "link.round_trip_us": draw(st.sampled_from([0.0, 50.0, 2000.0])),
            "link.socket_buffer_mib": draw(st.sampled_from([1.0, 16.0])),
            "vmm.read_mib": draw(st.sampled_from([0.1, 1.0])),
            "vmm.bandwidth_gbit_per_s": draw(st.sampled_from([2.0, 1000.0])),
            "vmm.downtime_limit_ms": 300.0,
            "vmm.give_up_s": 4.0,
            "v3.pool_connections": draw(st.integers(1, 5)),
            "v3.critical_credit_mib": draw(st.sampled_from([1.0, 4.0])),
            "v3.dirty_credit_mib": draw(st.sampled_from([1.0, 3.0, 64.0])),
        }
    )


@pytest.mark.slow
@pytest.mark.rule("v3.3.3", "v3.6.1", "v3.10.3")
@settings(max_examples=50)
@given(
    scenario=machines(),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 1 << 20),
    longest_ns=st.sampled_from([0, ns(0.1), ns(1), ns(10)]),
)
def test_frames_may_be_delayed_as_one_likes(scenario: Scenario, name: str, seed: int, longest_ns: int) -> None:
    delays = Delays(seed, longest_ns)
    delays.run = run = CutRun(scenario, name, delays, ACTIVITY_ENDS_NS, seed)
    with pytest.MonkeyPatch.context() as patch:
        run.loads = LoadWatch(patch)
        outcome = run.end()
    # COMPLETED: the target's state is the source's as of the stop (sim/outcome.py); no more than that is to be had
    # where what is left fits the downtime in the end.
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.guest_runs_at == "target"
    run.check_memory(outcome.counters.peak_reorder_bytes, outcome.counters.peak_held_bytes)
    delays.check_epochs()


# --- all variants leave the same image -------------------------------------------------------------------------------

VARIANTS = [
    *("v2", "v2-reinit-flush", "v2-reinit-invalidate", "v2-multifd", "v2-multifd-reinit-flush"),
    *(
        f"v3-n{n}-{wire}-{policy}"
        for n, wire, policy in itertools.product((1, 2, 4, 8, 16), ("streams", "pool", "one"), ("keep", "invalidate"))
    ),
    *(
        f"v3-blocks-n{n}-{wire}-{policy}"
        for (n, wire), policy in itertools.product(((1, "streams"), (4, "pool"), (16, "one")), ("keep", "invalidate"))
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_all_variants_leave_the_same_image_of_a_guest_that_rests_before_any_of_them_stops_it(seed: int) -> None:
    """RAM alone takes longer than the guest is active. What it did is reckoned here, too, from its activity alone."""
    end_ns = ns(30)
    device = {
        "state_mib": 4.0,
        "stop_only_mib": 0.5,
        "critical.objects": 8,
        "writes": {"pattern": "hotspot", "mib_per_s": 300.0},
        "reconfigurations": {"poisson_per_s": 300.0, "objects_each": 3, "invalidates_share": 0.4},
    }
    changes = {f"device.0.{key}": value for key, value in device.items()}
    ram = {"ram.size_gib": 0.5, "ram.scan_gib_per_s": 8.0, "ram.dirty_mib_per_s": 0.0}
    scenario = small_scenario(changes | ram | {"device.0.count": 2, "vmm.downtime_limit_ms": 5.0})
    expected: list[tuple[bytes, bytes]] = []
    for name in VARIANTS:
        run = CutRun(scenario, name, Tap(), end_ns, seed)
        outcome = run.end()
        assert outcome.kind is OutcomeKind.COMPLETED, (name, outcome.reason)
        assert run.timeline.marks[Mark.STOP_ORDERED] > end_ns, name
        if not expected:
            expected = [done(state.activity, len(state.version), len(state.object_version)) for state in run.states]
            assert expected[0] != expected[1]
        images = [(image.version.tobytes(), image.object_version.tobytes()) for image in run.images]
        assert images == expected, name


def done(activity: Activity, blocks: int, objects: int) -> tuple[bytes, bytes]:
    """The versions of all blocks and objects after an activity."""
    made = np.bincount(activity.write_blocks, minlength=blocks), np.zeros(objects, np.int64)
    np.add.at(made[1], activity.reconfiguration_objects, 1)
    assert made[0].any()
    assert made[1].any()
    return made[0].astype(np.int32).tobytes(), made[1].astype(np.int32).tobytes()


# --- over the wire ---------------------------------------------------------------------------------------------------


def window_ns(scenario: Scenario, frame_bytes: int) -> float:
    """A window W: after so long, all that is in flight now on the C connections has come, and its room is there again.

        W = max(B / c, C x B / l) + round trip

    B is a connection's socket buffer, or one frame if that is larger; c what one connection carries; l what the link
    carries, which is first come, first served.
    """
    link = scenario.link
    buffer = max(link.socket_buffer_mib * MIB, frame_bytes + MAX_HEADER_BYTES)
    connections = scenario.v3_options().connections(len(scenario.devices))
    of_connection = buffer / (link.per_connection_gbit_per_s * BYTES_PER_S_PER_GBIT)
    of_link = connections * buffer / (link.gbit_per_s * BYTES_PER_S_PER_GBIT)
    return max(of_connection, of_link) * 1e9 + link.round_trip_us * 1e3


def windows(scenario: Scenario) -> int:
    """In how many windows a critical frame has come, from send() on, of D devices' critical wire streams, if their own
    connections have room and their credit is not used up, which is up to critical data alone.

        a connection a stream    1        all that was booked on the link before it
        a pool                   D + 2    the dirty frame that each connection waits to take; the critical frames of
                                          the other devices; its own room; its way
        one connection           2 D + 3  as before; and before each frame one of RAM, in turn with the wire streams
    """
    devices = len(scenario.devices)
    return {Wire.STREAMS: 1, Wire.POOL: devices + 2, Wire.ONE: 2 * devices + 3}[scenario.v3_options().wire]


class Postmark:
    """When each critical frame was handed to its wire stream, and when it came to the target."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: dict[int, list[int]] = defaultdict(list)
        self.came: dict[int, dict[int, int]] = defaultdict(dict)
        for kind in (OwnOutStreams, SharedOutStreams):
            patch.setattr(kind, "stream", self.stream_of(kind.stream))
        arrive = _OneWay._arrive

        def arrived(way: _OneWay, header: bytes, payload: Payload, span: int) -> None:
            frame = decode(header, payload)
            if frame.stream == 0 and frame.kind in (Kind.DATA, Kind.EPOCH_SENT, Kind.STREAM_END):
                came = self.came[frame.device]
                came[(frame.place or len(came) + 1) - 1] = now_ns()
            arrive(way, header, payload, span)

        patch.setattr(_OneWay, "_arrive", arrived)

    def stream_of(self, original: Any) -> Any:
        def stream(streams: Any, device: int, number: int) -> OutStream:
            out: Any = original(streams, device, number)
            if number:
                return out  # type: ignore[no-any-return]
            send = out.send

            async def noted(frame: Frame) -> None:
                self.sent[device].append(now_ns())
                await send(frame)

            out = type("Noted", (), {"send": staticmethod(noted)})()
            return out  # type: ignore[no-any-return]

        return stream

    def longest_ns(self, end_ns: int) -> int:
        """What had not come when the migration was given up may not have waited for longer either."""
        return max(
            self.came[device].get(place, end_ns) - sent
            for device, times in self.sent.items()
            for place, sent in enumerate(times)
        )


# Dirty data without end: the target loads slowly, all buffers and credits are full, and frames queue up.
FLOODED: dict[str, Any] = {
    "device.0.state_mib": 48.0,
    "device.0.writes": {"pattern": "uniform", "mib_per_s": 4000.0},
    "device.0.reconfigurations": {"poisson_per_s": 150.0, "objects_each": 2},
    "firmware.engines": 32,
    "firmware.load_mib_per_s": 5.0,
    "firmware.save_mib_per_s": 10_000.0,
    "link.gbit_per_s": 10.0,
    "link.per_connection_gbit_per_s": 2.5,
    "link.socket_buffer_mib": 1.0,
    "vmm.give_up_s": 0.3,
    "ram.size_gib": 0.5,
    "ram.nonzero_gib": 0.25,
    "v3.dirty_credit_mib": 16.0,
}


@pytest.mark.rule("v3.5.1", "v3.5.3", "v3.10.4", "v3.10.5", "v3.10.6")
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    "name", ["v3-n16-streams", "v3-n16-pool", "v3-n16-one", "v3-blocks-n16-pool", "v3-blocks-n16-one"]
)
def test_critical_data_waits_for_no_dirty_data_on_the_wire(name: str, devices: int) -> None:
    scenario = small_scenario(FLOODED | {"device.0.count": devices})
    with pytest.MonkeyPatch.context() as patch:
        postmark = Postmark(patch)
        run = TappedRun(scenario, name, Tap())
        end_ns = run.end().total_ns
    assert end_ns is not None
    assert sum(map(len, postmark.sent.values())) > 30
    frame_bytes = blocks_record(scenario.devices[0], MIB // scenario.devices[0].block_bytes)
    most_ns = windows(run.scenario) * window_ns(run.scenario, frame_bytes)
    assert postmark.longest_ns(end_ns) <= most_ns


@pytest.mark.rule("v3.10.3", "v3.10.4")
@pytest.mark.parametrize("wire", ["streams", "pool", "one"])
def test_the_bound_on_the_vmms_memory_is_reached_and_not_passed(wire: str) -> None:
    """Where the target is slow. Of what a critical stream might have there, its data here takes next to nothing."""
    little_ram = {"ram.size_gib": 0.01, "ram.nonzero_gib": 0.0}
    run = TappedRun(small_scenario(FLOODED | little_ram | {"device.0.count": 2}), f"v3-n4-{wire}", Tap())
    outcome = run.end()
    most = bounds(run.scenario, max(state.epoch for state in run.states))
    options = run.scenario.v3_options()
    of_critical = 2 * (MIB if wire == "streams" else options.credits.critical_bytes)
    assert 0.99 * (most.reorder_bytes - of_critical) <= outcome.counters.peak_reorder_bytes <= most.reorder_bytes
    assert 0.9 * most.held_bytes <= outcome.counters.peak_held_bytes <= most.held_bytes


@pytest.mark.slow
@settings(max_examples=30)
@given(
    name=st.sampled_from([name for name in NAMES if "n1-" not in name]),
    how=st.sampled_from(["cancel", "SAVE", "LOAD"]),
    when=st.integers(0, 200),
    buffer_mib=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 1 << 20),
    longest_ns=st.sampled_from([0, ns(1), ns(10)]),
)
@example("v3-blocks-n16-one-invalidate-retry", "cancel", 44, 1.0, 1000, ns(10))  # RAM was sent behind CANCEL
def test_a_migration_that_ends_early_ends_at_once_however_full_the_connections_are(
    name: str, how: str, when: int, buffer_mib: float, seed: int, longest_ns: int
) -> None:
    """The user cancels after so many milliseconds, or so many commands of the firmware later one fails."""
    changes: dict[str, Any] = {"link.socket_buffer_mib": buffer_mib, "device.0.count": 2, "vmm.give_up_s": 0.25}
    if how == "cancel":
        changes["vmm.cancel_after_s"] = (when + 1) / 1e3
    else:
        side = "source" if how == "SAVE" else "target"
        changes["device.0.faults"] = [{"side": side, "command": how, "after": when}]
    run = TappedRun(small_scenario(FLOODED | changes), name, Delays(seed, longest_ns), seed)
    outcome = run.end()
    assert outcome.kind in (OutcomeKind.CANCELLED, OutcomeKind.FAILED, OutcomeKind.DID_NOT_CONVERGE)
    assert outcome.total_ns is not None
    assert outcome.total_ns < ns(2000)
    run.check_the_guest_goes_on_at_the_source(outcome)
