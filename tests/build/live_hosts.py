# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of live devices share: a device process and its VMM in one process and loop, on either way of waiting.

The same script can be run on a live device and on a virtual one (`Rig`), so that what they answer can be compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from proto_v3.vfio.device import BlocksFd, DataFd
from proto_v3.vfio.uapi import State, StreamFlags
from proto_v3.vmm.migration import read_some
from proto_v3.wire.frames import Payload
from sim.clock import virtual as clock
from sim.clock.port import now_ns, sleep_ns
from sim.device.driver import SimDriver
from sim.device.record import Extent, RecordSlice
from sim.device.state import DeviceState, Image
from sim.device.stream import DriverContext
from sim.live.fd.calls import Calls
from sim.live.fd.remote import RemoteDevice
from sim.live.fd.remote_fd import Devices
from sim.live.fd.save import Layout, SavedData
from sim.live.fd.store import DIGEST_BYTES, StateStore
from sim.live.merge_timelines import ProcessTimeline as Timeline
from sim.live.processes.device_process import DeviceProcess
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB
from tests.build.hosts import Hosts
from tests.build.loops import run
from tests.build.scenario import small_scenario

READ_BYTES = 8 * MIB
"""The most that one read() gives."""

QUICK: dict[str, Any] = {
    "device.0.state_mib": 0.0625,
    "device.0.block_kib": 1,
    "device.0.suspend_ms": 0.0,
    "device.0.quiesce_ms": 0.0,
    "device.0.critical.setup_us": 0.0,
    "firmware.save_mib_per_s": 100_000.0,
    "firmware.load_mib_per_s": 100_000.0,
    "firmware.save_command_us": 0.0,
    "firmware.load_command_us": 0.0,
    "firmware.load_finish_ms": 0.0,
    "driver.chunks": 64,
    "host.copy_gib_per_s": 1000.0,
    "host.memory_gib_per_s": 1000.0,
    "driver.call_us": 0.0,
}
"""The small scenario with next to no time in it, and a state that fits a socket."""


def quick(changes: dict[str, Any] | None = None) -> Scenario:
    return small_scenario(QUICK | (changes or {}))


# --- a device and its VMM ---------------------------------------------------------------------------------------------


class Live:
    """A device process and what a VMM has of it."""

    def __init__(
        self, process: DeviceProcess, calls: Calls, devices: Devices, scenario: Scenario, index: int = 0
    ) -> None:
        self.process = process
        self.calls = calls
        self.devices = devices
        self.scenario = scenario
        self._index = index
        self.device = RemoteDevice(index, scenario.devices[index].name, devices)
        inside = process._devices[index]
        self.driver: SimDriver = inside.driver
        self.store: StateStore = inside.store
        self._state = inside.state

    def of(self, index: int) -> Live:
        """Another device of the same host."""
        return Live(self.process, self.calls, self.devices, self.scenario, index)

    @property
    def state(self) -> DeviceState:
        assert isinstance(self._state, DeviceState)
        return self._state

    @property
    def image(self) -> Image:
        assert isinstance(self._state, Image)
        return self._state

    async def settle(self) -> None:
        """Until the driver has nothing more to put into its data fds."""
        for data in list(self.process._data.values()):
            if isinstance(data, SavedData):
                await data.idle()

    async def write(self, fd: DataFd, parts: Sequence[RecordSlice], piece_bytes: int = 1 << 20) -> None:
        await fd.write(self.bytes_of(parts), piece_bytes)

    def bytes_of(self, parts: Sequence[RecordSlice]) -> memoryview:
        """A run of a stream, with the bytes of a store that is filled."""
        filled = StateStore(self.scenario.devices[self._index], filled=True)
        return memoryview(b"".join(Layout(filled).pieces(Extent(list(parts)))))

    async def digests(self) -> bytes:
        told: bytes = (await self.calls.call("digests")).body["digests"][self._index]
        return told


@asynccontextmanager
async def live(side: str, scenario: Scenario, io: str = "threads", *, seed: int = 1) -> AsyncIterator[Live]:
    """A device process in this process, and its VMM's end."""
    here, there = socket.socketpair()
    process = DeviceProcess(side)
    serving = asyncio.create_task(process.serve(there))
    calls = Calls(here, "device process")
    timeline = Timeline()
    devices = Devices(calls, side, io, timeline, READ_BYTES)
    try:
        await calls.call("init", scenario=scenario.to_json(), seed=seed)
        await calls.call("start", zero_ns=time.perf_counter_ns())
        calls.trace(timeline, side)
        yield Live(process, calls, devices, scenario)
    finally:
        devices.close()
        calls.close()
        await serving


class Virtual:
    """The same of a device in virtual time."""

    def __init__(self, side: str, scenario_changes: dict[str, Any], *, seed: int = 1) -> None:
        hosts = _WithTables(QUICK | scenario_changes, seed=seed)
        self.scenario = hosts.scenario
        self.device = hosts.source if side == "source" else hosts.target
        self.state, self.image = hosts.state, hosts.image

    async def settle(self) -> None:
        """See Live."""
        await sleep_ns(1_000_000_000)

    async def write(self, fd: DataFd, parts: Sequence[RecordSlice], piece_bytes: int = 1 << 20) -> None:
        await fd.write(Extent(list(parts)), piece_bytes)


class _WithTables(Hosts):
    """Records are as long as in live mode."""

    def _contexts(self, scenario: Scenario) -> list[DriverContext]:
        return [replace(each, tables=True) for each in super()._contexts(scenario)]


Rig = Live | Virtual
Script = Callable[[Any], Awaitable[Any]]


def on_both(
    script: Script, side: str, changes: dict[str, Any] | None = None, *, io: str = "threads", loop: str = "uvloop"
) -> Any:
    """What a script gives on a virtual device, after checking that it gives the same on a live one."""
    changes = changes or {}
    virtual: list[Any] = []
    alive: list[Any] = []

    async def in_virtual_time() -> None:
        virtual.append(await script(Virtual(side, changes)))

    async def in_real_time() -> None:
        async with live(side, quick(changes), io) as rig:
            alive.append(await script(rig))

    clock.run(in_virtual_time())
    run(in_real_time, loop)
    (there,), (here,) = virtual, alive
    if isinstance(there, list):
        for at, (expected, got) in enumerate(zip(there, here, strict=True)):
            assert got == expected, f"answer {at}: {got}, in virtual time {expected}"
    assert here == there
    return there


# --- what scripts are made of -----------------------------------------------------------------------------------------


async def code_of(call: Awaitable[Any]) -> Any:
    """The name of the errno that a call gives, or what it gives."""
    try:
        return await call
    except OSError as error:
        return errno.errorcode[error.errno or 0]


async def opened(rig: Any, state: State, streams: int = 0, *, blocks: bool = False) -> list[Any]:
    """Open a session; its data fds, the critical one first."""
    if streams:
        await rig.device.set_streams(streams, StreamFlags.BLOCKS if blocks else StreamFlags(0))
    first = await rig.device.set_state(state)
    assert first is not None
    return [first, *[await first.get_stream(index) for index in range(streams)]]


async def drained(fd: DataFd, max_bytes: int = READ_BYTES) -> tuple[int, str]:
    """Read until there is nothing more: how many bytes came, and how it ended."""
    size = 0
    while True:
        try:
            data = await fd.read(max_bytes)
        except OSError as error:
            return size, errno.errorcode[error.errno or 0]
        if not len(data):
            return size, "0"
        size += len(data)


async def exactly(fd: DataFd, size: int) -> list[Payload]:
    """So many bytes, in as many reads as it takes."""
    got: list[Payload] = []
    while size:
        data = await fd.read(size)
        assert len(data)
        got.append(data)
        size -= len(data)
    return got


def guest_writes(rig: Any, blocks: Sequence[int]) -> None:
    """The guest writes to these blocks, now."""
    state: DeviceState = rig.state
    written = np.array(blocks, np.int32)
    np.add.at(state.version, written, 1)
    if state.content is not None:
        state.content.write_blocks(written, state.version)


def guest_reconfigures(rig: Any, objects: Sequence[int], blocks: tuple[int, int] = (0, 0)) -> None:
    """The guest reconfigures the device, now: objects that it makes new, and blocks, the first and how many."""
    state: DeviceState = rig.state
    activity = state.activity
    now = now_ns()
    event = np.array([list(objects)], np.int32)
    objects_so_far = activity.reconfiguration_objects.reshape(-1, len(objects))
    state.activity = replace(
        activity,
        reconfiguration_ns=np.append(activity.reconfiguration_ns, now),
        reconfiguration_objects=np.concatenate([objects_so_far, event]),
        reconfiguration_blocks=np.concatenate([activity.reconfiguration_blocks.reshape(-1, 2), [blocks]]),
    )
    state.advance(now)


def guest_stops(rig: Any) -> None:
    rig.state.stop(now_ns())


class Gate:
    """SAVEs of a live device wait until they are let through."""

    def __init__(self, rig: Live) -> None:
        self._open = asyncio.Event()
        self.waiting = asyncio.Event()
        firmware: Any = rig.driver._context.firmware
        self._firmware, self._save = firmware, firmware.save
        firmware.save = self._wait

    async def _wait(self, size_bytes: int) -> None:
        self.waiting.set()
        await self._open.wait()
        await self._save(size_bytes)

    def open(self) -> None:
        self._open.set()
        self._firmware.save = self._save


async def waits(rig: Live, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a call that does not return, however often the device process answers others; the task that it waits in."""
    task = asyncio.create_task(call)
    for _ in range(20):
        await rig.calls.call("ping")
    assert not task.done()
    return task


# --- moving a state ---------------------------------------------------------------------------------------------------


class Move:
    """A whole state from a live source to a live target, by copying what the fds give; the guest writes meanwhile."""

    def __init__(self, source: Live, target: Live, rng: random.Random, *, rounds: int = 3) -> None:
        self.source = source
        self.target = target
        self._rng = rng
        self._left = rounds
        self._enough = asyncio.Event()
        """Every stream was drained a few times."""
        self._stopped = asyncio.Event()
        self.moved = 0
        self.read_bytes: Callable[[], int] = self._some
        self.between: Callable[[Payload], Payload] = lambda data: data
        """What becomes of the bytes on their way."""

    def _some(self) -> int:
        """Sizes of read(), as different as can be."""
        return self._rng.choice([1, 7, 33, 1000, 4097, 65_536, 1 << 20, READ_BYTES])

    async def v2(self) -> None:
        (to,) = await opened(self.target, State.RESUMING)
        (fd,) = await opened(self.source, State.PRE_COPY)
        await self._run([(fd, to, fd.precopy_info)])

    async def v3(self, streams: int) -> None:
        to = await opened(self.target, State.RESUMING, streams)
        fds = await opened(self.source, State.PRE_COPY, streams)
        await self._run([(a, b, a.stream_info) for a, b in zip(fds, to, strict=True)])
        for each in to:
            await each.close()

    async def blocks(self, readers: int) -> None:
        to, to_blocks = await opened(self.target, State.RESUMING, 1, blocks=True)
        fd, blocks = await opened(self.source, State.PRE_COPY, 1, blocks=True)
        await self._run([(fd, to, fd.stream_info)], self._carry_blocks(blocks, to_blocks, readers))
        for each in (to, to_blocks):
            await each.close()

    async def _run(self, fds: Sequence[tuple[Any, Any, Any]], beside: Coroutine[Any, Any, None] | None = None) -> None:
        self._left *= len(fds)
        async with asyncio.TaskGroup() as group:
            for each in fds:
                group.create_task(self._carry(*each))
            if beside is not None:
                group.create_task(beside)
            await self._enough.wait()
            await self.source.calls.call("guest", what="order_stop")
            await self.source.device.set_state(State.PRE_COPY_P2P)
            await self.source.calls.call("guest", what="stop")
            await self.source.device.set_state(State.STOP_COPY)
            self._stopped.set()

    async def _carry(self, fd: DataFd, to: DataFd, info: Callable[[], Awaitable[Any]]) -> None:
        while True:
            data = await read_some(fd, self.read_bytes())
            if data is not None and not len(data) and self._stopped.is_set():
                return
            if data is None or not len(data):  # for now
                self._left -= 1
                if self._left <= 0:
                    self._enough.set()
                with contextlib.suppress(OSError):  # EINVAL: it was stopped just now
                    await info()
                await fd.poll(1_000_000)
                continue
            self.moved += len(data)
            data = self.between(data)
            await to.write(data, self._rng.choice([1 + len(data) // 3, len(data)]))

    async def _carry_blocks(self, fd: BlocksFd, to: BlocksFd, readers: int) -> None:
        wanted: set[int] = set()

        async def ask() -> None:
            told = await fd.dirty_blocks()
            bits = np.unpackbits(np.frombuffer(told.bitmap, np.uint8), count=told.blocks, bitorder="little")
            wanted.update(np.flatnonzero(bits).tolist())

        async def read() -> None:
            while wanted:
                first, count, most = min(wanted), 0, self._rng.randint(1, 20)
                while count < most and first + count in wanted:
                    wanted.remove(first + count)
                    count += 1
                data = await fd.read_blocks(first, count)
                self.moved += len(data)
                await to.write(self.between(data), self._rng.choice([1 + len(data) // 3, len(data)]))

        last = False
        while not last:
            last = self._stopped.is_set()
            await ask()
            async with asyncio.TaskGroup() as group:
                for _ in range(readers):
                    group.create_task(read())
        end = await fd.read(READ_BYTES)
        await to.write(end, len(end))
        assert not len(await fd.read(READ_BYTES))


@asynccontextmanager
async def both(changes: dict[str, Any], io: str = "threads", *, seed: int = 1) -> AsyncIterator[tuple[Live, Live]]:
    """Source and target with the same device."""
    scenario = quick(changes)
    async with live("target", scenario, io, seed=seed) as target, live("source", scenario, io, seed=seed) as source:
        yield source, target


async def wrong(source: Live, target: Live) -> list[int]:
    """Blocks, and behind them critical objects, whose bytes differ."""
    return differing(await source.digests(), await target.digests())


def differing(source: bytes, target: bytes) -> list[int]:
    """Which digests differ."""
    assert len(source) == len(target)
    here, there = (np.frombuffer(each, np.uint64) for each in (source, target))
    assert here.itemsize == DIGEST_BYTES
    return np.flatnonzero(here != there).tolist()
