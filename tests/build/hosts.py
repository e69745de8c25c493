# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the driver share: two hosts with the small scenario's devices, and a VMM's moves on their fds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any

import numpy as np
import pytest

from proto_v3.timeline import Timeline
from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import MigrationFlags, PrecopyInfo, State
from proto_v3.vmm.migration import read_some
from sim.clock.port import now_ns, sleep_ns
from sim.device.driver import SimDriver
from sim.device.firmware import FirmwareModel, VfFirmware
from sim.device.guest import make_activity
from sim.device.record import HEADER_BYTES, STOP_COPY_SIZE_BYTES, V3_HEADER_BYTES, Extent, Record, RecordSlice
from sim.device.record_format import RecordEnd
from sim.device.state import DeviceState, Image
from sim.device.stream import DriverContext
from sim.resource import Lock, Memory
from sim.scenario.scenario import Scenario
from sim.scenario.times import device_times
from sim.scenario.units import GIB, KIB, MIB
from tests.build.scenario import small_scenario

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000
ALL = 1 << 40
"""More than there is to read."""
BLOCKS, BLOCK_BYTES, CHUNK_BYTES = 128, 64 * KIB, MIB
OBJECTS_BYTES = 4 * 4 * KIB
"""Of all four critical objects."""
STATE_BYTES = BLOCKS * BLOCK_BYTES + OBJECTS_BYTES
FIRST_BYTES = STOP_COPY_SIZE_BYTES + HEADER_BYTES
"""The record that announces how much STOP_COPY will give, before any image."""
V3_END_BYTES = V3_HEADER_BYTES + RecordEnd.SIZE
"""The END record of a stream of v3; v2's is a header alone."""
CALL_NS = 1 * US
PRECOPY = (State.PRE_COPY, State.PRE_COPY_P2P)

WHOLE = {"driver.precopy_image": "whole", "driver.initial": "image"}
"""mlx5's way: one SAVE an image before the stop, and all of the first one is initial."""
KINDS: dict[str, dict[str, Any]] = {
    "mlx5": WHOLE,
    "whole images, critical objects initial": {"driver.precopy_image": "whole"},
    "chunks, the whole first image initial": {"driver.initial": "image"},
    "chunks": {},
    "virtio": {**WHOLE, "driver.precopy": "reread", "driver.reread_ms": 10.0},
    "qat": {"driver.precopy": "check", "driver.precopy_end": "0"},
    "hisi_acc": {"driver.precopy": "check", "driver.check_bytes": 40},
    "a sloppy driver": {**WHOLE, "driver.precopy_end": "0"},
    "no P2P": {**WHOLE, "device.0.features": ["STOP_COPY", "PRE_COPY"]},
    "pds: no pre-copy": {"device.0.features": ["STOP_COPY", "P2P"]},
    "STOP_COPY alone": {"device.0.features": ["STOP_COPY"]},
}
"""Drivers, by what the small scenario has to be changed in."""


def copy_ns(size: int) -> int:
    return round(size / (4 * GIB) * 1e9)


def save_ns(payload_bytes: int) -> int:
    return 10 * US + round((payload_bytes + HEADER_BYTES) / MIB / 1024 * 1e9)


def load_ns(payload_bytes: int) -> int:
    return 10 * US + round((payload_bytes + HEADER_BYTES) / MIB / 2048 * 1e9)


class Hosts:
    """Source and target with the small scenario's devices, changed: drivers, device states, images, timeline."""

    def __init__(self, changes: dict[str, Any] | None = None, *, seed: int = 1) -> None:
        self.scenario = scenario = small_scenario(changes)
        self.timeline = Timeline(now_ns)
        here, there = self._contexts(scenario), self._contexts(scenario)
        global_lock = Lock(self.timeline)
        self.states = [
            DeviceState(device, make_activity(device, scenario.horizon_ns, np.random.default_rng(seed)))
            for device in scenario.devices
        ]
        self.images = [Image(device) for device in scenario.devices]
        self.sources = [
            SimDriver(device, scenario.driver, context, global_lock, state=state)
            for device, context, state in zip(scenario.devices, here, self.states, strict=True)
        ]
        self.targets = [
            SimDriver(device, scenario.driver, context, Lock(self.timeline), image=image)
            for device, context, image in zip(scenario.devices, there, self.images, strict=True)
        ]
        self.source, self.target, self.state, self.image = (
            self.sources[0], self.targets[0], self.states[0], self.images[0],
        )  # fmt: skip
        self.both = SimDriver(
            scenario.devices[0], scenario.driver, here[0], global_lock, state=self.state, image=self.image
        )
        """A device that can be saved and loaded, as a real one can."""

    def _contexts(self, scenario: Scenario) -> list[DriverContext]:
        firmware = FirmwareModel(scenario.firmware, np.random.default_rng(1), self.timeline)
        host = scenario.host
        memory = Memory(host.copy_gib_per_s * GIB, host.memory_gib_per_s * GIB, self.timeline)
        call_ns = round(scenario.driver.call_us * US)
        return [
            DriverContext(VfFirmware(firmware, at, times.load_finish_ns), memory, self.timeline, times, call_ns)
            for at, times in enumerate(device_times(scenario))
        ]

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
    return [first, *[await first.get_stream(index) for index in range(dirty_streams)]]


async def opted_in(driver: SimDriver) -> DataFd:
    """The data fd of a session in PRE_COPY that reports REINIT."""
    await driver.set_precopy_info_v2()
    (fd,) = await session(driver, State.PRE_COPY)
    return fd


async def read(fd: DataFd, max_bytes: int = ALL) -> Extent:
    data = await fd.read(max_bytes)
    assert isinstance(data, Extent)
    return data


async def read_all(fd: DataFd, max_bytes: int = ALL) -> list[RecordSlice]:
    """Read to the end, be it temporary or not."""
    parts: list[RecordSlice] = []
    while (data := await read_some(fd, max_bytes)) is not None and len(data):
        assert isinstance(data, Extent)
        parts += data.parts
    return parts


async def saved(hosts: Hosts, dirty_streams: int = 0) -> list[list[RecordSlice]]:
    """The whole stream of an idle device, per fd."""
    fds = await session(hosts.source, State.STOP_COPY, dirty_streams)
    return [await read_all(fd) for fd in fds]


def records(parts: Iterable[RecordSlice]) -> list[Record]:
    """The records that the parts complete."""
    return [part.record for part in parts if part.stop == part.record.size_bytes]


def blocks(parts: Iterable[RecordSlice]) -> list[int]:
    return [block for record in records(parts) for block in record.blocks.tolist()]


def objects(parts: Iterable[RecordSlice]) -> list[int]:
    return [number for record in records(parts) for number in record.objects.tolist()]


def size(parts: Iterable[RecordSlice]) -> int:
    return sum(part.stop - part.start for part in parts)


def told(info: PrecopyInfo) -> tuple[int, int, bool]:
    return info.initial_bytes, info.dirty_bytes, info.reinit


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


async def still_waits(call: Coroutine[Any, Any, Any], wait_ns: int = 1 * SECOND) -> asyncio.Task[Any]:
    """Start a call that does not return for so long; the task that it waits in."""
    waiting = asyncio.create_task(call)
    await sleep_ns(wait_ns)
    assert not waiting.done()
    return waiting


async def move(hosts: Hosts, precopy_ns: int, read_bytes: int = MIB, *, streams: int = 0, asks: bool = True) -> int:
    """A migration of the first device, on one fd or several, to RUNNING at the target; what was read.

    In pre-copy it asks what is left whenever nothing is, which makes the device save what became dirty.
    """
    precopy = MigrationFlags.PRE_COPY in await hosts.source.migration_flags()
    to = await session(hosts.target, State.RESUMING, streams)
    fds = await session(hosts.source, State.PRE_COPY, streams) if precopy else []
    moved = 0

    async def carry(fd: DataFd, to: DataFd) -> None:
        nonlocal moved
        while True:
            stopped = await hosts.source.state() is State.STOP_COPY
            data = await read_some(fd, read_bytes)
            if data is not None and len(data):
                moved += len(data)
                await to.write(data, 32 * KIB)
            elif stopped:
                return
            else:
                with contextlib.suppress(OSError):  # EINVAL: stopped just now
                    await (fd.stream_info() if streams else fd.precopy_info()) if asks else None
                await fd.poll(1 * MS)

    async with asyncio.TaskGroup() as carriers:
        for index, fd in enumerate(fds):
            carriers.create_task(carry(fd, to[index]))
        await sleep_ns(precopy_ns)
        hosts.state.order_stop(now_ns())
        await sleep_ns(1 * MS)
        hosts.state.stop(now_ns())
        if not precopy:
            fds = await session(hosts.source, State.STOP_COPY, streams)
            for index, fd in enumerate(fds):
                carriers.create_task(carry(fd, to[index]))
        await hosts.source.set_state(State.STOP_COPY)
    await hosts.target.set_state(State.RUNNING)
    return moved
