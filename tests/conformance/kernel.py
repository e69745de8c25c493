# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls to a device of the running kernel."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from proto_v3.vfio.uapi import (
    VFIO_DEVICE_FEATURE,
    VFIO_DEVICE_RESET,
    VFIO_MIG_GET_DIRTY_BLOCKS,
    VFIO_MIG_GET_PRECOPY_INFO,
    VFIO_MIG_GET_STREAM,
    VFIO_MIG_GET_STREAM_INFO,
)
from sim.real.sysfs import find
from sim.real.vfio import OpenDevices
from tests.conformance.run import CALL_S, answers

IOCTLS = {
    "info": VFIO_MIG_GET_PRECOPY_INFO,
    "get_stream": VFIO_MIG_GET_STREAM,
    "stream_info": VFIO_MIG_GET_STREAM_INFO,
    "dirty_blocks": VFIO_MIG_GET_DIRTY_BLOCKS,
}
MOST_BYTES = 1 << 24
"""Of a read(): memory is taken for them."""
EVENTS = {
    name: getattr(select, f"EPOLL{name}") for name in ("IN", "PRI", "OUT", "ERR", "HUP", "RDHUP")
}  # RDNORM and its like say the same again


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A system call that sleeps, interrupted by a signal: TimeoutError."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class KernelCalls:
    """tests.conformance.run.Calls."""

    def __init__(self, name: str) -> None:
        """`name`: as sim.real.sysfs.find() knows the device."""
        self._entry = find(name)
        self._open: OpenDevices | None = None
        self._device = -1

    async def open(self) -> None:
        self.shut()
        self._open = OpenDevices([self._entry])
        self._device = self._open.devices[0].fd
        await self.reset()  # mtty keeps its state when it is closed

    def shut(self) -> None:
        """Close the device."""
        if self._open is not None:
            self._open.close()
            self._open = None

    async def feature(self, buffer: bytearray) -> None:
        with at_most(CALL_S):
            fcntl.ioctl(self._device, VFIO_DEVICE_FEATURE, buffer)

    async def reset(self) -> None:
        fcntl.ioctl(self._device, VFIO_DEVICE_RESET)

    async def ioctl(self, fd: int, name: str, buffer: bytearray) -> None:
        with at_most(CALL_S):
            fcntl.ioctl(fd, IOCTLS[name], buffer)

    async def read(self, fd: int, size: int) -> bytes:
        with at_most(CALL_S):
            return os.read(fd, min(size, MOST_BYTES))  # not readv(), which with 0 bytes does not reach the driver

    async def write(self, fd: int, data: Any, piece: int) -> None:
        view = memoryview(data)
        with at_most(CALL_S):
            written = 0
            while True:
                written += os.write(fd, view[written : written + piece])
                if written == len(view):
                    return

    async def poll(self, fd: int, timeout_ms: int) -> list[str]:
        with select.epoll() as epoll:
            epoll.register(fd, select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP)
            found = dict(epoll.poll(timeout_ms / 1000))
        return [name for name, bit in EVENTS.items() if found.get(fd, 0) & bit]

    async def close(self, fd: int) -> None:
        os.close(fd)

    def form(self, name: str, parts: list[Any]) -> bytes:
        whole = b"".join(parts)
        match name:
            case "cut":
                return whole[:-1]
            case "altered" if whole:
                return bytes([whole[0] ^ 0xFF]) + whole[1:]
            case "more":
                return whole + whole[-1:]
            case "twice":
                return whole + whole
            case "junk":
                return bytes([0xFF]) * 64
            case "empty":
                return b""
            case _:
                return whole


def kernel_answers(name: str, cases: Iterable[str]) -> dict[str, str]:
    """What the device of the running kernel answers."""

    async def told() -> dict[str, str]:
        calls = KernelCalls(name)
        try:
            return {case: answer async for case, answer in answers(calls, cases)}
        finally:
            calls.shut()

    return asyncio.run(told())
