"""The simulated driver and its data fds, held against the contract in proto_v3/device.py."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import small_scenario, virtual
from hypothesis import given, settings
from hypothesis import strategies as st

from proto_v3.device import DataFd, Ready
from proto_v3.fsm import path
from proto_v3.migration import read_some
from proto_v3.timeline import Mark, Timeline
from proto_v3.uapi import MigrationFlags, State
from sim.clock import now_ns, sleep_ns, sleep_until_ns
from sim.device import DeviceState, Image
from sim.driver import SimDriver
from sim.firmware import FirmwareModel
from sim.guest import make_activity
from sim.record import HEADER_BYTES, Bulk, Extent, Part, Record
from sim.resource import Lock, Memory
from sim.scenario import GIB, KIB, MIB, Scenario
from sim.stream import Surroundings

US, MS = 1_000, 1_000_000
ALL = 1 << 40
"""More than there is to read."""
BLOCKS, BLOCK_BYTES, CHUNK_BYTES = 128, 64 * KIB, MIB
OBJECT_BYTES = 4 * 4 * KIB
"""Of all four critical objects."""
STATE_BYTES = BLOCKS * BLOCK_BYTES + OBJECT_BYTES
CALL_NS = 1 * US
SAVE_CHUNK_NS = 10 * US + round((CHUNK_BYTES + HEADER_BYTES) / MIB / 1024 * 1e9)
LOAD_CHUNK_NS = 10 * US + round((CHUNK_BYTES + HEADER_BYTES) / MIB / 2048 * 1e9)
PRECOPY = (State.PRE_COPY, State.PRE_COPY_P2P)


def copy_ns(size: int) -> int:
    return round(size / (4 * GIB) * 1e9)


class Hosts:
    """Source and target with the small scenario's devices, changed: drivers, device states, images, timeline."""

    def __init__(self, changes: dict[str, Any] | None = None, *, seed: int = 1) -> None:
        self.scenario = scenario = small_scenario(changes)
        self.timeline = Timeline(now_ns)
        here, there = self._around(scenario), self._around(scenario)
        global_lock = Lock(self.timeline)
        self.states = [
            DeviceState(device, make_activity(device, scenario.horizon_ns, np.random.default_rng(seed)))
            for device in scenario.devices
        ]
        self.images = [Image(device) for device in scenario.devices]
        self.sources = [
            SimDriver(device, scenario.driver, here, global_lock, state=state)
            for device, state in zip(scenario.devices, self.states, strict=True)
        ]
        self.targets = [
            SimDriver(device, scenario.driver, there, Lock(self.timeline), image=image)
            for device, image in zip(scenario.devices, self.images, strict=True)
        ]
        self.source, self.target, self.state, self.image = (
            self.sources[0], self.targets[0], self.states[0], self.images[0],
        )  # fmt: skip
        self.both = SimDriver(
            scenario.devices[0], scenario.driver, here, global_lock, state=self.state, image=self.image
        )
        """A device that can be saved and loaded, as a real one can."""

    def _around(self, scenario: Scenario) -> Surroundings:
        firmware = FirmwareModel(scenario.firmware, np.random.default_rng(1), self.timeline)
        host = scenario.host
        memory = Memory(host.copy_gib_per_s * GIB, host.memory_gib_per_s * GIB, self.timeline)
        return Surroundings(firmware, memory, self.timeline, round(scenario.driver.call_us * US))

    async def stop(self) -> None:
        """Stop vCPUs and devices, as a VMM does."""
        for state in self.states:
            state.stop(now_ns())
        for source in self.sources:
            await source.set_state(State.STOP_COPY)


async def session(driver: SimDriver, state: State, dirty_streams: int = 0) -> list[DataFd]:
    """Open a session; its data fds, the critical one first."""
    if dirty_streams:
        await driver.set_streams(dirty_streams)
    first = await driver.set_state(state)
    assert first is not None
    return [first, *[await driver.get_stream(index) for index in range(dirty_streams)]]


async def read(fd: DataFd, max_bytes: int = ALL) -> Extent:
    data = await fd.read(max_bytes)
    assert isinstance(data, Extent)
    return data


async def read_all(fd: DataFd, max_bytes: int = ALL) -> list[Part]:
    """Read to the end, be it temporary or not."""
    parts: list[Part] = []
    while (data := await read_some(fd, max_bytes)) is not None and len(data):
        assert isinstance(data, Extent)
        parts += data.parts
    return parts


async def saved(hosts: Hosts, dirty_streams: int = 0) -> list[list[Part]]:
    """The whole stream of an idle device, per fd."""
    fds = await session(hosts.source, State.STOP_COPY, dirty_streams)
    return [await read_all(fd) for fd in fds]


def records(parts: Iterable[Part]) -> list[Record]:
    """The records that the parts complete."""
    return [part.record for part in parts if part.stop == part.record.size_bytes]


def blocks(parts: Iterable[Part]) -> list[int]:
    return [block for record in records(parts) for block in record.blocks.tolist()]


def size(parts: Iterable[Part]) -> int:
    return sum(part.stop - part.start for part in parts)


async def fails_with(code: int, call: Awaitable[Any]) -> None:
    with pytest.raises(OSError, match=rf"^\[Errno {code}\] "):
        await call


async def fails_somehow(call: Awaitable[Any]) -> None:
    """Where the error's number is not the test's matter."""
    with pytest.raises(OSError, match="Errno"):
        await call


async def took_ns(call: Coroutine[Any, Any, Any]) -> int:
    start = now_ns()
    await call
    return now_ns() - start


# --- arcs ------------------------------------------------------------------------------------------------------------

BEGINS_A_SESSION = {
    (State.RUNNING, State.PRE_COPY),
    (State.RUNNING_P2P, State.PRE_COPY_P2P),
    (State.STOP, State.STOP_COPY),
    (State.STOP, State.RESUMING),
}
REACHABLE = [
    (current, target)
    for current in State
    for target in State
    if State.ERROR not in (current, target)
    and current is not State.RESUMING  # can be left only with an image, see below
    and not (current is State.STOP_COPY and target in PRECOPY)
]


@pytest.mark.parametrize(
    ("current", "target"), REACHABLE, ids=[f"{current.name} to {target.name}" for current, target in REACHABLE]
)
@virtual
async def test_a_data_fd_comes_where_the_last_arc_begins_a_session_and_nowhere_else(
    current: State, target: State
) -> None:
    driver = Hosts().both
    await driver.set_state(current)
    steps = [current, *path(current, target, await driver.migration_flags())]
    fd = await driver.set_state(target)
    assert (fd is not None) == (tuple(steps[-2:]) in BEGINS_A_SESSION)
    assert await driver.state() is target


@virtual
async def test_a_session_keeps_its_fd_to_the_end() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    for state in (State.PRE_COPY_P2P, State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY):
        assert await hosts.source.set_state(state) is None
        assert len(await fd.read(1)) == 1


@pytest.mark.parametrize("target", [State.ERROR, State.PRE_COPY_P2P])
@virtual
async def test_a_way_that_there_is_not_is_refused_and_changes_nothing(target: State) -> None:
    hosts = Hosts({"device.0.features": ["STOP_COPY", "PRE_COPY"]})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await fails_with(errno.EINVAL, hosts.source.set_state(target))
    assert await hosts.source.state() is State.PRE_COPY
    assert len(await fd.read(1)) == 1
    assert now_ns() < 1 * MS


@pytest.mark.parametrize(
    ("features", "current", "target", "cost_ms"),
    [
        ("P2P PRE_COPY", State.RUNNING, State.PRE_COPY, 0),
        ("P2P PRE_COPY", State.RUNNING, State.RUNNING_P2P, 1),
        ("P2P PRE_COPY", State.RUNNING, State.STOP, 3),
        ("P2P PRE_COPY", State.RUNNING, State.STOP_COPY, 3),
        ("P2P PRE_COPY", State.RUNNING, State.PRE_COPY_P2P, 1),
        ("P2P PRE_COPY", State.PRE_COPY, State.PRE_COPY_P2P, 1),
        ("P2P PRE_COPY", State.PRE_COPY, State.STOP_COPY, 3),
        ("P2P PRE_COPY", State.PRE_COPY, State.RUNNING, 0),
        ("P2P PRE_COPY", State.PRE_COPY, State.STOP, 3),
        ("P2P PRE_COPY", State.PRE_COPY_P2P, State.STOP_COPY, 2),
        ("P2P PRE_COPY", State.PRE_COPY_P2P, State.RUNNING, 0),
        ("P2P PRE_COPY", State.STOP_COPY, State.STOP, 0),
        ("P2P PRE_COPY", State.STOP, State.RUNNING, 0),
        ("P2P", State.RUNNING, State.STOP_COPY, 3),
        ("PRE_COPY", State.RUNNING, State.STOP, 3),
        ("PRE_COPY", State.PRE_COPY, State.STOP_COPY, 3),
        ("", State.RUNNING, State.STOP_COPY, 3),
    ],
)
@virtual
async def test_arcs_cost_what_the_scenario_says(features: str, current: State, target: State, cost_ms: int) -> None:
    """Suspending takes 1 ms, quiescing 2 ms; a device without P2P does both at once."""
    hosts = Hosts({"device.0.features": ["STOP_COPY", *features.split()]})
    await hosts.source.set_state(current)
    assert await took_ns(hosts.source.set_state(target)) == cost_ms * MS


@virtual
async def test_the_cost_of_arcs_is_on_the_timeline() -> None:
    hosts = Hosts()
    hosts.timeline.mark(Mark.STOP_ORDERED)
    await hosts.source.set_state(State.STOP)
    hosts.timeline.mark(Mark.RESUMED)
    assert hosts.timeline.critical_path_ns()["fixed"] == hosts.timeline.downtime_ns == 3 * MS


@pytest.mark.parametrize(
    ("features", "streams", "expected"),
    [
        (["STOP_COPY"], 0, MigrationFlags.STOP_COPY),
        (["P2P", "STOP_COPY"], 0, MigrationFlags.STOP_COPY | MigrationFlags.P2P),
        (["STOP_COPY", "PRE_COPY"], 2, MigrationFlags(1 | 4 | 8)),
    ],
)
@virtual
async def test_a_device_tells_its_features(features: list[str], streams: int, expected: MigrationFlags) -> None:
    hosts = Hosts({"device.0.features": features, "device.0.max_dirty_streams": streams})
    assert await hosts.source.migration_flags() == expected
    assert await hosts.source.max_dirty_streams() == streams


@pytest.mark.parametrize(("use", "state"), [("source", State.RESUMING), ("target", State.PRE_COPY)])
@virtual
async def test_a_device_that_cannot_open_the_session_fails_on_the_way(use: str, state: State) -> None:
    driver: SimDriver = getattr(Hosts(), use)
    await fails_with(errno.EIO, driver.set_state(state))


# --- opting in to streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [-1, 17, 1 << 40])
@virtual
async def test_more_streams_than_the_device_has_are_refused(count: int) -> None:
    await fails_with(errno.EINVAL, Hosts().source.set_streams(count))


@pytest.mark.parametrize("state", [State.PRE_COPY, State.PRE_COPY_P2P, State.STOP_COPY, State.RESUMING])
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_the_number_of_streams_cannot_be_changed_in_a_session(state: State, streams: int) -> None:
    driver = Hosts().both
    await session(driver, state, streams)
    for count in (0, 1, 17):
        await fails_with(errno.EBUSY, driver.set_streams(count))


@virtual
async def test_the_number_of_streams_can_be_changed_after_a_session_and_zero_opts_out() -> None:
    driver = Hosts().source
    await session(driver, State.PRE_COPY, 2)
    await driver.set_state(State.RUNNING)
    await session(driver, State.PRE_COPY, 16)
    await driver.set_state(State.RUNNING)
    await driver.set_streams(0)
    (fd,) = await session(driver, State.STOP_COPY)
    assert sorted(set(blocks(await read_all(fd)))) == list(range(BLOCKS))


@pytest.mark.parametrize("state", [State.PRE_COPY, State.RESUMING])
@virtual
async def test_a_stream_that_there_is_not_is_refused(state: State) -> None:
    driver = Hosts().both
    await driver.set_streams(2)
    await fails_with(errno.EINVAL, driver.get_stream(0))
    await driver.set_state(state)
    for index in (-1, 2, 16):
        await fails_with(errno.EINVAL, driver.get_stream(index))
    assert await driver.get_stream(0) is not await driver.get_stream(1)


@virtual
async def test_there_are_no_streams_without_opting_in_nor_after_the_session() -> None:
    driver = Hosts().source
    await session(driver, State.PRE_COPY)
    await fails_with(errno.EINVAL, driver.get_stream(0))
    await driver.set_state(State.RUNNING)
    await session(driver, State.PRE_COPY, 1)
    await driver.set_state(State.RUNNING)
    await fails_with(errno.EINVAL, driver.get_stream(0))


# --- what a stream holds ---------------------------------------------------------------------------------------------


@virtual
async def test_v2_is_one_stream_critical_objects_first_then_blocks_then_the_end() -> None:
    (parts,) = await saved(Hosts())
    assert blocks(parts) == list(range(BLOCKS))
    first, *middle, last = records(parts)
    assert first.objects.tolist() == [0, 1, 2, 3]
    assert all(len(record.blocks) == 16 for record in middle)
    assert last.end
    assert size(parts) == STATE_BYTES + 10 * HEADER_BYTES


@pytest.mark.parametrize("streams", [1, 2, 3, 16])
@virtual
async def test_v3_has_critical_objects_on_their_own_and_each_block_once_on_a_dirty_stream(streams: int) -> None:
    critical, *dirty = await saved(Hosts(), streams)
    assert [record.objects.tolist() for record in records(critical)] == [[0, 1, 2, 3], []]
    assert records(critical)[0].epoch_complete
    assert sorted(block for parts in dirty for block in blocks(parts)) == list(range(BLOCKS))
    assert all(records(parts)[-1].end for parts in [critical, *dirty])
    assert not any(record.end for parts in dirty for record in records(parts)[:-1])


@pytest.mark.parametrize("streams", [2, 3, 16])
@virtual
async def test_a_blocks_home_is_its_number_modulo_the_streams(streams: int) -> None:
    _, *dirty = await saved(Hosts(), streams)
    homes = {block: index for index, parts in enumerate(dirty) for block in blocks(parts)}
    assert homes == {block: block % streams for block in range(BLOCKS)}


@virtual
async def test_a_block_keeps_its_home_through_the_session() -> None:
    hosts = Hosts({"device.0.writes": {"pattern": "uniform", "mib_per_s": 100.0}})
    _, *dirty = await session(hosts.source, State.PRE_COPY, 3)
    first = [set(blocks(await read_all(fd))) for fd in dirty]
    await sleep_ns(50 * MS)
    await hosts.stop()
    last = [set(blocks(await read_all(fd))) for fd in dirty]
    assert all(again and again <= home for again, home in zip(last, first, strict=True))


@virtual
async def test_blocks_of_the_stopped_device_only_come_in_stop_copy() -> None:
    hosts = Hosts({"device.0.stop_only_mib": 2.0})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert blocks(await read_all(fd)) == list(range(96))
    await hosts.stop()
    assert blocks(await read_all(fd)) == list(range(96, BLOCKS))


@pytest.mark.parametrize("streams", [0, 4])
@virtual
async def test_a_session_after_one_that_was_cancelled_has_everything_again(streams: int) -> None:
    """It goes to another image, which has nothing of the first."""
    hosts = Hosts()
    for fd in await session(hosts.source, State.PRE_COPY, streams):
        await read_all(fd)
    await hosts.source.set_state(State.RUNNING)
    assert await hosts.source.stop_copy_bytes() == STATE_BYTES
    again = [await read_all(fd) for fd in await session(hosts.source, State.STOP_COPY, streams)]
    assert sorted(block for parts in again for block in blocks(parts)) == list(range(BLOCKS))
    assert records(again[0])[0].objects.tolist() == [0, 1, 2, 3]


# --- read ------------------------------------------------------------------------------------------------------------


@virtual
async def test_the_end_is_temporary_in_pre_copy() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    for _ in range(3):
        await fails_with(errno.ENOMSG, fd.read(ALL))


@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_the_end_is_for_ever_in_stop_copy(streams: int) -> None:
    hosts = Hosts()
    fds = await session(hosts.source, State.PRE_COPY, streams)
    await hosts.stop()
    for fd in fds:
        await read_all(fd)
        for _ in range(3):
            assert len(await fd.read(ALL)) == 0
            await sleep_ns(10 * MS)
            assert await fd.poll() & Ready.READABLE


@virtual
async def test_the_end_is_for_ever_though_the_guest_would_have_reconfigured_the_device_later() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.05]}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await sleep_ns(10 * MS)
    await hosts.stop()
    await sleep_until_ns(60 * MS)
    reading = asyncio.create_task(read_all(critical))
    await sleep_ns(10 * MS)
    assert reading.done()
    assert records(reading.result())[-1].end


@virtual
async def test_the_end_is_not_told_before_the_data_of_a_stop_that_comes_within_the_call() -> None:
    hosts = Hosts({"driver.call_us": 1000.0, "device.0.stop_only_mib": 2.0, "device.0.quiesce_ms": 0.5})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await hosts.source.set_state(State.PRE_COPY_P2P)
    reading = asyncio.create_task(read_some(fd, ALL))
    await hosts.stop()
    assert await hosts.source.state() is State.STOP_COPY
    data = await reading
    assert data is None or len(data)
    parts = data.parts if isinstance(data, Extent) else []
    assert blocks([*parts, *await read_all(fd)]) == list(range(96, BLOCKS))


@pytest.mark.parametrize("max_bytes", [1, 16, 17, 100_000, ALL])
@virtual
async def test_a_read_gives_at_least_one_byte_and_at_most_what_was_asked_for(max_bytes: int) -> None:
    (fd,) = await session(Hosts({"device.0.state_mib": 0.0625}).source, State.STOP_COPY)
    for _ in range(20):
        assert 1 <= len(await fd.read(max_bytes)) <= max_bytes
        if max_bytes > 17:
            break


@settings(max_examples=30)
@given(st.integers(20 * KIB, 3 * MIB), st.sampled_from([0, 1, 3]))
@virtual
async def test_the_stream_is_the_same_however_it_is_cut(max_bytes: int, streams: int) -> None:
    whole, cut = await saved(Hosts(), streams), []
    for fd in await session(Hosts().source, State.STOP_COPY, streams):
        cut.append(await read_all(fd, max_bytes))
    for one, other in zip(whole, cut, strict=True):
        assert blocks(one) == blocks(other)
        at = [0, 0]  # record and offset
        for part in other:
            assert [part.record.sequence, part.start] == at
            at = [at[0], part.stop] if part.stop < part.record.size_bytes else [at[0] + 1, 0]


@virtual
async def test_read_waits_for_a_save_that_began_before_the_guest_was_stopped() -> None:
    """Also when a reconfiguration that the stop forestalled would have come meanwhile."""
    hosts = Hosts({"device.0.critical.object_kib": 256.0, "device.0.reconfigurations": {"at_s": [0.0005]}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await sleep_until_ns(100 * US)
    hosts.state.stop(now_ns())
    await sleep_until_ns(600 * US)
    assert len(await critical.read(ALL)) == MIB + HEADER_BYTES


@virtual
async def test_read_waits_while_the_device_is_saving() -> None:
    (fd,) = await session(Hosts({"device.0.critical.objects": 0}).source, State.PRE_COPY)
    assert await took_ns(fd.read(64 * KIB)) == SAVE_CHUNK_NS + CALL_NS + copy_ns(64 * KIB)


@pytest.mark.parametrize("chunks", [1, 2, 5])
@virtual
async def test_the_device_saves_so_many_chunks_ahead_of_the_reader_and_no_more(chunks: int) -> None:
    (fd,) = await session(Hosts({"driver.chunks": chunks, "device.0.state_mib": 32.0}).source, State.PRE_COPY)
    for first_bytes in (OBJECT_BYTES, CHUNK_BYTES, CHUNK_BYTES):
        await sleep_ns(100 * MS)
        ahead = await read(fd)
        assert len(records(ahead.parts)) == chunks
        assert len(ahead) == first_bytes + (chunks - 1) * CHUNK_BYTES + chunks * HEADER_BYTES


@virtual
async def test_a_chunk_is_free_again_when_its_last_byte_is_read() -> None:
    (fd,) = await session(Hosts({"device.0.critical.objects": 0, "driver.chunks": 1}).source, State.PRE_COPY)
    await sleep_ns(100 * MS)
    assert len(await fd.read(CHUNK_BYTES)) == CHUNK_BYTES
    await sleep_ns(100 * MS)
    assert len(await fd.read(ALL)) == HEADER_BYTES
    assert await took_ns(fd.read(1)) == SAVE_CHUNK_NS + CALL_NS


@virtual
async def test_what_reading_took_is_told_by_its_parts() -> None:
    hosts = Hosts()
    start = now_ns()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    parts: list[Part] = []
    for _ in range(9):
        parts += (await read(fd)).parts
    (counts,) = hosts.source.read_counts
    assert counts.calls == 9
    assert counts.bytes == size(parts)
    assert counts.firmware_ns + counts.copy_ns == now_ns() - start
    assert counts.copy_ns == pytest.approx(9 * CALL_NS + copy_ns(size(parts)), abs=9)
    assert counts.lock_ns == 0


@virtual
async def test_all_the_time_that_reading_to_the_end_takes_is_on_the_timeline() -> None:
    hosts = Hosts()
    hosts.timeline.mark(Mark.STOP_ORDERED)
    (fd,) = await session(hosts.source, State.STOP_COPY)
    await read_all(fd)
    hosts.timeline.mark(Mark.RESUMED)
    assert hosts.timeline.critical_path_ns()["unexplained"] == 0


# --- stale fds -------------------------------------------------------------------------------------------------------

ENDS_A_SESSION = [
    (State.PRE_COPY, State.RUNNING),
    (State.PRE_COPY, State.STOP),
    (State.PRE_COPY_P2P, State.RUNNING_P2P),
    (State.STOP_COPY, State.STOP),
    (State.STOP_COPY, State.RUNNING),
    (State.PRE_COPY, State.RESUMING),
]


@pytest.mark.parametrize(
    ("state", "then"), ENDS_A_SESSION, ids=[f"{one.name} to {other.name}" for one, other in ENDS_A_SESSION]
)
@pytest.mark.parametrize("drained", [False, True])
@virtual
async def test_an_fd_whose_session_is_over_answers_enodev(state: State, then: State, drained: bool) -> None:
    driver = Hosts().both
    fds = await session(driver, state, 2)
    if drained:
        for fd in fds:
            await read_all(fd)
    await driver.set_state(then)
    for fd in fds:
        await fails_with(errno.ENODEV, fd.read(ALL))
        await fails_with(errno.ENODEV, fd.precopy_info())
        await fails_with(errno.ENODEV, fd.stream_info())


@virtual
async def test_an_fd_stays_stale_when_there_is_a_new_session() -> None:
    hosts = Hosts()
    (old,) = await session(hosts.source, State.PRE_COPY)
    await hosts.source.set_state(State.RUNNING)
    (new,) = await session(hosts.source, State.PRE_COPY)
    await fails_with(errno.ENODEV, old.read(ALL))
    assert len(await new.read(1)) == 1


@virtual
async def test_an_fd_that_was_loaded_from_answers_enodev_also_in_the_next_session() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)
    await hosts.target.set_state(State.STOP)
    await fails_with(errno.ENODEV, fd.write(Extent(parts), 32 * KIB))
    await session(hosts.target, State.RESUMING)
    await fails_with(errno.ENODEV, fd.write(Extent(parts), 32 * KIB))


@virtual
async def test_fds_are_open_in_one_direction_only() -> None:
    hosts = Hosts()
    (saving,) = await session(hosts.source, State.PRE_COPY)
    (loading,) = await session(hosts.target, State.RESUMING)
    await fails_with(errno.EBADF, saving.write(Extent([]), 1))
    await fails_with(errno.EBADF, loading.read(1))
    assert await loading.poll(5) is Ready.NOTHING


# --- precopy_info and stream_info ------------------------------------------------------------------------------------


@virtual
async def test_precopy_info_is_for_pre_copy_only() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await fd.precopy_info()
    await hosts.source.set_state(State.PRE_COPY_P2P)
    await fd.precopy_info()
    await hosts.source.set_state(State.STOP_COPY)
    await fails_with(errno.EINVAL, fd.precopy_info())


@virtual
async def test_neither_info_is_for_resuming() -> None:
    (fd,) = await session(Hosts().target, State.RESUMING)
    await fails_with(errno.EINVAL, fd.precopy_info())
    await fails_with(errno.EINVAL, fd.stream_info())


@virtual
async def test_stream_info_is_for_stop_copy_too() -> None:
    hosts = Hosts()
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await hosts.stop()
    await sleep_ns(100 * MS)
    assert (await critical.stream_info()).epoch == 1
    assert (await dirty.stream_info()).pending_bytes >= BLOCKS * BLOCK_BYTES
    await read_all(dirty)
    assert (await dirty.stream_info()).pending_bytes == 0


@virtual
async def test_initial_bytes_come_before_dirty_bytes_in_the_stream() -> None:
    (fd,) = await session(Hosts().source, State.PRE_COPY)
    await sleep_ns(100 * MS)  # until the producer waits for a free chunk
    info = await fd.precopy_info()
    assert info.initial_bytes == OBJECT_BYTES + HEADER_BYTES
    initial = await read(fd, info.initial_bytes)
    assert [record.objects.tolist() for record in records(initial.parts)] == [[0, 1, 2, 3]]
    assert (await fd.precopy_info()).initial_bytes == 0
    assert (await read(fd)).parts[0].record.blocks.tolist() == list(range(16))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2 * MS), st.integers(0, MIB)), min_size=5, max_size=40))
@virtual
async def test_initial_bytes_start_non_zero_and_only_fall(steps: list[tuple[int, int]]) -> None:
    """Also when the guest reconfigures the device: v2 without the opt-in to REINIT cannot tell."""
    changes = {"device.0.critical.objects": 600, "device.0.reconfigurations": {"at_s": [0.001, 0.01, 0.02]}}
    (fd,) = await session(Hosts(changes).source, State.PRE_COPY)
    told = [(await fd.precopy_info()).initial_bytes]
    for delay, max_bytes in steps:
        await sleep_ns(delay)
        if max_bytes:
            await read_some(fd, max_bytes)
        told.append((await fd.precopy_info()).initial_bytes)
    assert told[0] > 0
    assert told == sorted(told, reverse=True)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2 * MS), st.integers(0, MIB)), max_size=20), st.sampled_from([0, 1, 3]))
@virtual
async def test_what_is_pending_is_all_that_was_not_read_yet(steps: list[tuple[int, int]], streams: int) -> None:
    """Of an idle device; what is being saved just now counts too."""
    fds = await session(Hosts().source, State.PRE_COPY, streams)
    got, told = 0, set()
    for number, (delay, max_bytes) in enumerate(steps):
        await sleep_ns(delay)
        if max_bytes and (data := await read_some(fds[number % len(fds)], max_bytes)) is not None:
            got += len(data)
        if streams:
            pending = sum([(await fd.stream_info()).pending_bytes for fd in fds])
        else:
            info = await fds[0].precopy_info()
            pending = info.initial_bytes + info.dirty_bytes
        told.add(got + pending)
    assert told <= {sum([size(await read_all(fd)) for fd in fds]) + got}


@virtual
async def test_precopy_info_makes_the_device_save_what_became_dirty_and_read_does_not() -> None:
    hosts = Hosts({"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await sleep_ns(10 * MS)
    await fails_with(errno.ENOMSG, fd.read(ALL))
    assert not await fd.poll(1 * MS)
    info = await fd.precopy_info()
    assert info.initial_bytes == 0
    assert info.dirty_bytes > 0
    assert size(await read_all(fd)) == info.dirty_bytes
    await fails_with(errno.ENOMSG, fd.read(ALL))


@virtual
async def test_precopy_info_starts_no_save_before_all_earlier_data_is_read() -> None:
    hosts = Hosts({"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    first: list[Part] = []
    while size(first) < STATE_BYTES:
        await fd.precopy_info()
        first += (await read(fd, 100_000)).parts
    assert blocks(first) == list(range(BLOCKS))
    await fails_with(errno.ENOMSG, fd.read(ALL))


@virtual
async def test_under_v2_a_reconfiguration_is_dirty_bytes_like_any_others() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}})
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    await fd.precopy_info()
    await sleep_until_ns(110 * MS)
    assert await fd.poll(1 * MS) is Ready.NOTHING
    await fails_with(errno.ENOMSG, fd.read(ALL))
    info = await fd.precopy_info()
    assert (info.initial_bytes, info.dirty_bytes) == (0, OBJECT_BYTES // 2 + HEADER_BYTES)
    assert len(records(await read_all(fd))[0].objects) == 2


@virtual
async def test_stream_info_makes_a_drained_dirty_stream_save_its_own_blocks() -> None:
    hosts = Hosts({"device.0.writes": {"pattern": "sequential", "mib_per_s": 10.0}})
    _, one, other = await session(hosts.source, State.PRE_COPY, 2)
    await read_all(one)
    await read_all(other)
    await sleep_ns(50 * MS)
    assert (await one.stream_info()).pending_bytes > 0
    assert len(blocks(await read_all(one))) > 0
    await fails_with(errno.ENOMSG, other.read(ALL))


@virtual
async def test_the_estimate_for_stop_copy_is_what_pre_copy_does_not_give() -> None:
    hosts = Hosts({"device.0.stop_only_mib": 2.0})
    assert await hosts.source.stop_copy_bytes() == STATE_BYTES
    (fd,) = await session(hosts.source, State.PRE_COPY)
    assert await hosts.source.stop_copy_bytes() == 2 * MIB
    await read_all(fd)
    assert await hosts.source.stop_copy_bytes() == 2 * MIB
    await hosts.stop()
    assert size(await read_all(fd)) == 2 * MIB + 3 * HEADER_BYTES
    assert await hosts.source.stop_copy_bytes() == 0
    assert await hosts.target.stop_copy_bytes() == 0


# --- poll ------------------------------------------------------------------------------------------------------------


@virtual
async def test_poll_returns_when_its_time_is_over() -> None:
    (fd,) = await session(Hosts().source, State.PRE_COPY)
    await read_all(fd)
    for timeout in (0, 1, 5 * MS):
        start = now_ns()
        assert await fd.poll(timeout) is Ready.NOTHING
        assert now_ns() - start == timeout


@virtual
async def test_poll_returns_when_data_is_saved() -> None:
    (fd,) = await session(Hosts({"device.0.critical.objects": 0}).source, State.PRE_COPY)
    assert await fd.poll(0) is Ready.NOTHING
    assert await fd.poll() is Ready.READABLE
    assert now_ns() == SAVE_CHUNK_NS
    assert await fd.poll() is Ready.READABLE


@virtual
async def test_poll_returns_when_the_device_stops() -> None:
    hosts = Hosts()
    (fd,) = await session(hosts.source, State.PRE_COPY)
    await read_all(fd)
    polling = asyncio.create_task(fd.poll())
    await sleep_ns(10 * MS)
    assert not polling.done()
    await hosts.stop()
    assert await polling is Ready.READABLE


@virtual
async def test_a_new_epoch_is_told_on_the_critical_fd_alone_until_it_was_asked_for() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1, 0.2]}})
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    for fd in (critical, dirty):
        await read_all(fd)
        assert (await fd.stream_info()).epoch == 1
    assert await critical.poll(1 * MS) is Ready.NOTHING
    waiting = asyncio.create_task(dirty.poll())
    assert Ready.NEW_EPOCH in await critical.poll()
    assert now_ns() == 100 * MS
    assert await critical.poll() is not Ready.NOTHING
    assert (await critical.stream_info()).epoch == 2
    await read_all(critical)
    assert await critical.poll(1 * MS) is Ready.NOTHING
    assert not waiting.done()
    waiting.cancel()


@virtual
async def test_a_new_epochs_critical_data_is_saved_without_being_asked_for() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    await critical.stream_info()
    await sleep_until_ns(150 * MS)
    assert Ready.READABLE in await critical.poll(0)
    (record,) = records(await read_all(critical))
    assert (record.epoch, record.epoch_complete, len(record.objects)) == (2, True, 2)


@virtual
async def test_a_new_epoch_is_pending_from_when_it_began_until_it_is_read() -> None:
    """Else a VMM would say that it sent an epoch which the firmware was still saving."""
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1], "objects_each": 2}})
    critical, _ = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    told: list[tuple[int, bool]] = []
    await sleep_until_ns(100 * MS - 5 * CALL_NS)
    while not told or told[-1][0] == 1 or now_ns() < 101 * MS:
        info = await critical.stream_info()
        told.append((info.epoch, info.pending_bytes > 0))
    assert set(told) == {(1, False), (2, True)}
    await read_all(critical)
    assert (await critical.stream_info()).pending_bytes == 0


# --- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lock", "one_fd", "two_fds", "two_devices"),
    [("none", 1, 1, 1), ("per_fd", 2, 1, 1), ("device", 2, 2, 1), ("global", 2, 2, 2)],
)
@virtual
async def test_which_reads_take_turns(lock: str, one_fd: int, two_fds: int, two_devices: int) -> None:
    """Two reads at once take as long as so many one after the other."""
    piece = 256 * KIB
    hosts = Hosts({"driver.lock": lock, "device.0.count": 2, "device.0.critical.objects": 0})
    _, one, other = await session(hosts.sources[0], State.PRE_COPY, 2)
    _, elsewhere = await session(hosts.sources[1], State.PRE_COPY, 1)
    await sleep_ns(100 * MS)
    for second, turns in ((one, one_fd), (other, two_fds), (elsewhere, two_devices)):
        both = asyncio.gather(*(asyncio.create_task(fd.read(piece)) for fd in (one, second)))
        assert await took_ns(_wait(both)) == turns * (CALL_NS + copy_ns(piece))
    lock_ns = sum(counts.lock_ns for source in hosts.sources for counts in source.read_counts)
    assert lock_ns == (one_fd + two_fds + two_devices - 3) * (CALL_NS + copy_ns(piece))


async def _wait(future: asyncio.Future[Any]) -> None:
    await future


@pytest.mark.parametrize("lock", ["none", "per_fd", "device", "global"])
@pytest.mark.parametrize("max_bytes", [100_000, ALL])
@virtual
async def test_of_several_readers_of_one_fd_each_byte_goes_to_one(lock: str, max_bytes: int) -> None:
    (fd,) = await session(Hosts({"driver.lock": lock}).source, State.PRE_COPY)
    readers = [asyncio.create_task(read_all(fd, max_bytes)) for _ in range(3)]
    parts = [part for reader in readers for part in await reader]
    whole = STATE_BYTES + 9 * HEADER_BYTES
    assert size(parts) == whole
    assert len({(part.record.sequence, part.start) for part in parts}) == len(parts)


@virtual
async def test_waiting_for_another_reader_is_told_as_waiting_for_the_lock() -> None:
    hosts = Hosts({"driver.lock": "device", "device.0.critical.objects": 0})
    _, one, other = await session(hosts.source, State.PRE_COPY, 2)
    await sleep_ns(100 * MS)

    async def read_four_times(fd: DataFd) -> None:
        for _ in range(4):
            await fd.read(64 * KIB)

    hosts.timeline.mark(Mark.STOP_ORDERED)
    await asyncio.gather(*(asyncio.create_task(read_four_times(fd)) for fd in (one, other)))
    hosts.timeline.mark(Mark.RESUMED)
    assert sum(counts.lock_ns for counts in hosts.source.read_counts) == 7 * (CALL_NS + copy_ns(64 * KIB))


# --- write -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_kib", [32, 64, 1024, 4096])
@virtual
async def test_a_write_costs_its_calls_its_copy_and_the_load_that_it_completes(piece_kib: int) -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    chunk = Extent(parts)[: CHUNK_BYTES + HEADER_BYTES]
    calls = -(-len(chunk) // (piece_kib * KIB))
    assert await took_ns(fd.write(chunk, piece_kib * KIB)) == pytest.approx(
        calls * CALL_NS + copy_ns(len(chunk)) + LOAD_CHUNK_NS, abs=2
    )
    assert (hosts.image.version[:16] == 0).all()
    assert (hosts.image.version[16:] == -1).all()


@virtual
async def test_a_record_is_loaded_when_its_last_byte_is_written() -> None:
    hosts = Hosts({"device.0.critical.objects": 0})
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    most = Extent(parts)[:CHUNK_BYTES]
    assert await took_ns(fd.write(most, MIB)) == CALL_NS + copy_ns(CHUNK_BYTES)
    assert (hosts.image.version == -1).all()
    await fd.write(Extent(parts)[CHUNK_BYTES : CHUNK_BYTES + HEADER_BYTES], MIB)
    assert (hosts.image.version[:16] == 0).all()


@virtual
async def test_critical_objects_are_set_up_one_by_one() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    record = Extent(parts)[: OBJECT_BYTES + HEADER_BYTES]
    load_ns = 10 * US + round(len(record) / MIB / 2048 * 1e9)
    assert await took_ns(fd.write(record, MIB)) == pytest.approx(
        CALL_NS + copy_ns(len(record)) + load_ns + 4 * 100 * US, abs=2
    )
    assert (hosts.image.object_version == 0).all()


@virtual
async def test_a_device_is_finished_once_when_its_last_stream_ended() -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    await fds[0].write(Extent(streams[0]), MIB)
    await fds[1].write(Extent(streams[1]), MIB)
    *most, end = streams[2]
    await fds[2].write(Extent(most), MIB)
    assert end.record.end
    assert await took_ns(fds[2].write(Extent([end]), MIB)) == pytest.approx(CALL_NS + 5 * MS, abs=10)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


def altered(parts: list[Part], how: str) -> Extent:
    """A stream of v2 that is not what was saved; the first record stays."""
    first, second, third, *rest = parts
    match how:
        case "a record is missing":
            return Extent([first, third, *rest])
        case "two records changed places":
            return Extent([first, third, second, *rest])
        case "a record comes again":
            return Extent([first, first, second, third, *rest])
        case "bytes are missing inside a record":
            return Extent([first, replace(second, stop=100), replace(second, start=101), third, *rest])
        case "bytes are missing at the end of a record":
            return Extent([first, replace(second, stop=100), third, *rest])
        case "bytes are missing at the start of a record":
            return Extent([first, replace(second, start=1), third, *rest])
        case "bytes come again":
            return Extent([first, replace(second, stop=100), replace(second, start=99), third, *rest])
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "a record is missing",
        "two records changed places",
        "a record comes again",
        "bytes are missing inside a record",
        "bytes are missing at the end of a record",
        "bytes are missing at the start of a record",
        "bytes come again",
    ],
)
@virtual
async def test_a_stream_that_is_not_as_it_was_saved_is_refused(how: str) -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fails_with(errno.EINVAL, fd.write(altered(parts, how), 32 * KIB))
    assert (hosts.image.object_version == 0).all()
    assert (hosts.image.version[16:] == -1).all()
    await fails_somehow(hosts.target.set_state(State.STOP))
    assert await hosts.target.state() is State.ERROR


@virtual
async def test_another_streams_bytes_are_refused() -> None:
    hosts = Hosts()
    streams = await saved(hosts, 2)
    fds = await session(hosts.target, State.RESUMING, 2)
    for fd, other in zip(fds, (1, 2, 0), strict=True):
        await fails_with(errno.EINVAL, fd.write(Extent(streams[other]), 32 * KIB))
    assert (hosts.image.version == -1).all()


@pytest.mark.parametrize("payload", [Bulk(100), memoryview(b"bytes")])
@virtual
async def test_bytes_that_no_driver_made_are_refused(payload: Any) -> None:
    (fd,) = await session(Hosts().target, State.RESUMING)
    await fails_with(errno.EINVAL, fd.write(payload, 32 * KIB))


# --- leaving RESUMING ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [0, 2])
@pytest.mark.parametrize("target", [State.STOP, State.RUNNING])
@virtual
async def test_a_whole_image_can_be_run(streams: int, target: State) -> None:
    hosts = Hosts()
    saved_streams = await saved(hosts, streams)
    for fd, parts in zip(await session(hosts.target, State.RESUMING, streams), saved_streams, strict=True):
        await fd.write(Extent(parts), 32 * KIB)
    await hosts.target.set_state(target)
    assert await hosts.target.state() is target
    assert not hosts.image.differences(hosts.state)


@pytest.mark.parametrize(("streams", "short"), [(0, 0), (2, 0), (2, 1), (2, 2)])
@virtual
async def test_an_image_of_which_one_stream_is_short_fails_and_leaves_the_device_in_error(
    streams: int, short: int
) -> None:
    hosts = Hosts()
    saved_streams = await saved(hosts, streams)
    fds = await session(hosts.target, State.RESUMING, streams)
    for index, (fd, parts) in enumerate(zip(fds, saved_streams, strict=True)):
        await fd.write(Extent(parts[:-1] if index == short else parts), 32 * KIB)
    await fails_with(errno.EIO, hosts.target.set_state(State.RUNNING))
    assert await hosts.target.state() is State.ERROR
    await fails_with(errno.EINVAL, hosts.target.set_state(State.RUNNING))
    for fd in fds:
        await fails_with(errno.ENODEV, fd.write(Extent(saved_streams[0]), 32 * KIB))


@virtual
async def test_a_cut_end_is_no_end() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts)[: size(parts) - 1], 32 * KIB)
    await fails_somehow(hosts.target.set_state(State.STOP))
    assert await hosts.target.state() is State.ERROR


# --- holding back ----------------------------------------------------------------------------------------------------


@virtual
async def test_a_dirty_record_waits_until_its_epochs_critical_data_is_loaded() -> None:
    hosts = Hosts()
    critical, dirty = await saved(hosts, 1)
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = asyncio.create_task(to_dirty.write(Extent(dirty), 32 * KIB))
    await sleep_ns(500 * MS)
    assert not writing.done()
    assert (hosts.image.version == -1).all()
    await to_critical.write(Extent(critical), 32 * KIB)
    assert (hosts.image.object_version == 0).all()
    await writing
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_a_dirty_record_of_a_later_epoch_waits_for_that_one() -> None:
    hosts = Hosts({"device.0.reconfigurations": {"at_s": [0.1]}, "device.0.stop_only_mib": 2.0})
    fds = await session(hosts.source, State.PRE_COPY, 1)
    early = [await read_all(fd) for fd in fds]
    await sleep_until_ns(150 * MS)
    await hosts.stop()
    late = [await read_all(fd) for fd in fds]
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    await to_critical.write(Extent(early[0]), 32 * KIB)
    await to_dirty.write(Extent(early[1]), 32 * KIB)
    writing = asyncio.create_task(to_dirty.write(Extent(late[1]), 32 * KIB))
    await sleep_ns(500 * MS)
    assert not writing.done()
    assert (hosts.image.version[96:] == -1).all()
    await to_critical.write(Extent(late[0]), 32 * KIB)
    await writing
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_an_epochs_dirty_data_waits_for_all_of_its_critical_data() -> None:
    hosts = Hosts({"device.0.critical.objects": 600})
    critical, dirty = await saved(hosts, 1)
    first, second, third, end = critical
    assert [part.record.epoch_complete for part in critical] == [False, False, True, False]
    to_critical, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = asyncio.create_task(to_dirty.write(Extent(dirty), 32 * KIB))
    await to_critical.write(Extent([first, second]), 32 * KIB)
    await sleep_ns(500 * MS)
    assert (hosts.image.version == -1).all()
    await to_critical.write(Extent([third, end]), 32 * KIB)
    await writing


@virtual
async def test_a_write_that_waits_ends_when_the_session_does() -> None:
    hosts = Hosts()
    _, dirty = await saved(hosts, 1)
    _, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = asyncio.create_task(to_dirty.write(Extent(dirty), 32 * KIB))
    await sleep_ns(500 * MS)
    await fails_somehow(hosts.target.set_state(State.STOP))
    await sleep_ns(1 * MS)
    assert writing.done()
    await fails_somehow(writing)


# --- cancelling ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 30 * MS), st.sampled_from([0, 1, 3]), st.integers(1, 2 * MIB), st.booleans())
@virtual
async def test_a_cancelled_session_ends_at_once_and_leaves_nothing_running(
    at: int, streams: int, max_bytes: int, precopy_p2p: bool
) -> None:
    changes = {
        "device.0.writes": {"pattern": "uniform", "mib_per_s": 50.0},
        "device.0.reconfigurations": {"at_s": [0.005, 0.5]},
    }
    hosts = Hosts(changes)
    errors: list[int | None] = []

    async def read_on(fd: DataFd) -> None:
        try:
            while True:
                if await read_some(fd, max(max_bytes, 64 * KIB)) is None:
                    await fd.stream_info()
                    await fd.poll(10 * MS)
        except OSError as error:
            errors.append(error.errno)

    fds = await session(hosts.source, State.PRE_COPY, streams)
    readers = [asyncio.create_task(read_on(fd)) for fd in fds]
    await sleep_ns(at)
    if precopy_p2p:
        await hosts.source.set_state(State.PRE_COPY_P2P)
    cancelled = now_ns()
    await hosts.source.set_state(State.RUNNING)
    await asyncio.wait(readers)
    assert now_ns() - cancelled <= CALL_NS + copy_ns(2 * MIB + 1 * MIB)  # a copy that has begun is finished
    assert errors == [errno.ENODEV] * len(fds)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await hosts.source.state() is State.RUNNING


@virtual
async def test_who_waits_for_a_cancelled_session_is_woken() -> None:
    hosts = Hosts()
    critical, dirty = await session(hosts.source, State.PRE_COPY, 1)
    await read_all(critical)
    await critical.stream_info()
    polling = asyncio.create_task(critical.poll())
    await read_all(dirty)
    await sleep_ns(10 * MS)
    assert not polling.done()
    await hosts.source.set_state(State.RUNNING)
    await polling
    await fails_with(errno.ENODEV, critical.read(1))


# --- reset ---------------------------------------------------------------------------------------------------------

EVERY_STATE = [state for state in State if state is not State.ERROR]


@pytest.mark.parametrize("state", EVERY_STATE, ids=[state.name for state in EVERY_STATE])
@pytest.mark.parametrize("streams", [0, 2])
@virtual
async def test_a_reset_leads_from_any_state_to_running_and_leaves_nothing_open(state: State, streams: int) -> None:
    driver = Hosts().both
    await driver.set_streams(streams)
    fd = await driver.set_state(state)
    await driver.reset()
    assert await driver.state() is State.RUNNING
    if fd is not None:
        call = fd.write(Extent([]), 1) if state is State.RESUMING else fd.read(1)
        await fails_with(errno.ENODEV, call)
    await driver.set_streams(1)
    await sleep_ns(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual
async def test_a_reset_leads_out_of_error_and_the_device_can_be_loaded_again() -> None:
    hosts = Hosts()
    (parts,) = await saved(hosts)
    await session(hosts.target, State.RESUMING)
    await fails_with(errno.EIO, hosts.target.set_state(State.STOP))
    await hosts.target.reset()
    assert await hosts.target.state() is State.RUNNING
    (fd,) = await session(hosts.target, State.RESUMING)
    await fd.write(Extent(parts), 32 * KIB)
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)


@virtual
async def test_a_reset_ends_a_write_that_waits() -> None:
    hosts = Hosts()
    _, dirty = await saved(hosts, 1)
    _, to_dirty = await session(hosts.target, State.RESUMING, 1)
    writing = asyncio.create_task(to_dirty.write(Extent(dirty), 32 * KIB))
    await sleep_ns(500 * MS)
    await hosts.target.reset()
    await fails_with(errno.ENODEV, writing)
    assert (hosts.image.version == -1).all()


# --- all together ----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    streams=st.sampled_from([0, 1, 2, 5]),
    precopy_ns=st.integers(0, 60 * MS),
    read_kib=st.integers(16, 2048),
    chunks=st.integers(1, 4),
    lock=st.sampled_from(["none", "per_fd", "device", "global"]),
    seed=st.integers(0, 1000),
)
@virtual
async def test_whatever_the_order_of_events_the_image_is_the_device_as_it_was_stopped(
    streams: int, precopy_ns: int, read_kib: int, chunks: int, lock: str, seed: int
) -> None:
    changes = {
        "driver.chunks": chunks,
        "driver.lock": lock,
        "firmware.service_cv": 0.5,
        "device.0.stop_only_mib": 1.0,
        "device.0.critical.objects": 300,
        "device.0.critical.setup_us": 5.0,
        "device.0.writes": {"pattern": "hotspot", "mib_per_s": 200.0},
        "device.0.reconfigurations": {"poisson_per_s": 100.0, "objects_each": 20},
    }
    hosts = Hosts(changes, seed=seed)
    sources = await session(hosts.source, State.PRE_COPY, streams)
    targets = await session(hosts.target, State.RESUMING, streams)

    async def carry(source: DataFd, target: DataFd) -> None:
        while (data := await read_some(source, read_kib * KIB)) is None or len(data):
            if data is None:
                await source.stream_info()
                await source.poll(1 * MS)
            else:
                await target.write(data, 32 * KIB)

    async with asyncio.TaskGroup() as carriers:
        for source, target in zip(sources, targets, strict=True):
            carriers.create_task(carry(source, target))
        await sleep_ns(precopy_ns)
        await hosts.stop()
    await hosts.target.set_state(State.RUNNING)
    assert not hosts.image.differences(hosts.state)
    assert await hosts.source.stop_copy_bytes() == 0
