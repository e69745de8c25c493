# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls to the simulated device, in virtual time, through proto_v3's ioctls on bytes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from proto_v3.vfio.device import Ready
from proto_v3.vfio.ioctl import device_feature, get_dirty_blocks, get_precopy_info, get_stream, get_stream_info
from proto_v3.vfio.uapi import DeviceFeature, Feature, FeatureOp
from sim.clock.virtual import run
from sim.device.driver import SimDriver
from sim.device.record import Extent
from sim.device.stream import fails
from tests.build.hosts import Hosts
from tests.conformance.run import CALL_S, answers

CHECKS = {
    "device.0.max_dirty_streams": 0,
    "driver.precopy": "check",
    "driver.precopy_end": "0",
    "driver.check_bytes": 24,
}
"""mtty's way, samples/vfio-mdev/mtty.c: pre-copy gives a header of 24 bytes by which the target checks the device, and
read() answers 0 at its end."""
LIKE: dict[str, dict[str, Any]] = {
    "mtty": CHECKS,
    "vfio_v3_sample": {"device.0.max_dirty_streams": 8, "driver.initial": "image"},
}
"""The small scenario, changed into what each driver of the kernel is like."""


class SimulatedCalls:
    """tests.conformance.run.Calls."""

    def __init__(self, changes: dict[str, Any]) -> None:
        self._changes = changes
        self._device: SimDriver | None = None
        self._opted_in = False
        self._fds: dict[int, Any] = {}

    def _install(self, fd: Any) -> int:
        number = len(self._fds) + 100
        self._fds[number] = fd
        return number

    @property
    def device(self) -> SimDriver:
        assert self._device is not None
        return self._device

    async def open(self) -> None:
        """The simulated device is never closed: its sessions end, and another one is there."""
        if self._device is not None:
            await self._device.reset()
        self._device, self._opted_in = Hosts(self._changes).both, False

    async def feature(self, buffer: bytearray) -> None:
        async with asyncio.timeout(CALL_S):
            await device_feature(self.device, buffer, self._install)
        if DeviceFeature.unpack(buffer).flags == Feature.MIG_PRECOPY_INFOV2 | FeatureOp.SET:
            self._opted_in = True

    async def reset(self) -> None:
        await self.device.reset()

    async def ioctl(self, fd: int, name: str, buffer: bytearray) -> None:
        on = self._fds[fd]
        async with asyncio.timeout(CALL_S):
            match name:
                case "info":
                    await get_precopy_info(on, buffer, opted_in=self._opted_in)
                case "get_stream":
                    await get_stream(on, buffer, self._install)
                case "stream_info":
                    await get_stream_info(on, buffer)
                case _:
                    if not hasattr(on, "dirty_blocks"):  # a C driver looks for the call first
                        raise fails(errno.ENOTTY)
                    await get_dirty_blocks(on, buffer, bytearray())

    async def read(self, fd: int, size: int) -> Any:
        async with asyncio.timeout(CALL_S):
            return await self._fds[fd].read(size)

    async def write(self, fd: int, data: Any, piece: int) -> None:
        async with asyncio.timeout(CALL_S):
            await self._fds[fd].write(data, piece)

    async def poll(self, fd: int, timeout_ms: int) -> list[str]:
        found = await self._fds[fd].poll(timeout_ms * 1_000_000)
        return [name for ready, name in ((Ready.READABLE, "IN"), (Ready.NEW_EPOCH, "PRI")) if ready in found]

    async def close(self, fd: int) -> None:
        await self._fds[fd].close()

    def form(self, name: str, parts: list[Any]) -> Any:
        if name == "junk":
            return memoryview(bytes([0xFF]) * 64)
        whole = Extent([each for part in parts for each in part.parts])
        match name:
            case "cut":
                return whole[: len(whole) - 1]
            case "altered":
                first = whole.parts[0]
                return Extent([first._replace(record=replace(first.record, stream=7)), *whole.parts[1:]])
            case "more":
                return Extent([*whole.parts, whole.parts[-1]])
            case "twice":
                return Extent([*whole.parts, *whole.parts])
            case "empty":
                return Extent([])
            case _:
                return whole


def simulated_answers(driver: str, cases: Iterable[str]) -> dict[str, str]:
    """What the simulated device that is like `driver` answers."""

    async def told() -> dict[str, str]:
        return {case: answer async for case, answer in answers(SimulatedCalls(LIKE[driver]), cases)}

    return run(told())
