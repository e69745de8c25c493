# SPDX-License-Identifier: GPL-2.0-or-later
"""A VFIO device of the running kernel behind the port `MigrationDevice`: every call is an ioctl on the device fd.

An ioctl may block in the kernel for as long as its driver likes. So each device has a thread for its ioctls, which does
one after the other: the kernel's drivers serialise them by a mutex in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from typing import TypeVar

from typing_extensions import override

from proto_v3.timeline import Resource
from proto_v3.vfio.device import NO_STREAM_FLAGS, MigrationDevice
from proto_v3.vfio.uapi import (
    VFIO_DEVICE_RESET,
    Feature,
    FeatureMigDataSize,
    FeatureMigration,
    FeatureMigState,
    FeatureMigStreams,
    MigrationFlags,
    State,
    StreamFlags,
)
from sim.live.io import Worker
from sim.real.fd import DataFds, RealFd
from sim.real.ioctl import get_feature, set_feature

T = TypeVar("T")


class RealDevice(MigrationDevice):
    """A device by its fd, which the caller keeps open. It is made in a running event loop."""

    def __init__(self, name: str, fd: int, fds: DataFds) -> None:
        """`fds`: what all data fds of the VMM share."""
        self.name = name
        self.fd = fd
        self._fds = fds
        self.last_set_state_ns = 0, 0
        """When the last SET_STATE entered the kernel (perf_counter_ns()), and how long it was there."""
        self._worker: Worker | None = None
        self._blocks = False

    async def _in_thread(self, resource: Resource, what: str, job: Callable[[], T]) -> T:
        """Do it in the device's thread. If the caller is cancelled, it goes on, and the next call waits for it."""
        start_ns = self._fds.now_ns()
        if self._worker is None:
            self._worker = Worker(f"{self.name} ioctl")
        result = await self._fds.wait(self._worker.start(job))
        self._fds.timeline.work(resource, what, start_ns)
        return result

    @override
    async def migration_flags(self) -> MigrationFlags:
        job = lambda: get_feature(self.fd, Feature.MIGRATION, FeatureMigration)  # noqa: E731
        return (await self._in_thread(Resource.COPY, "GET MIGRATION", job)).flags

    @override
    async def state(self) -> State:
        job = lambda: get_feature(self.fd, Feature.MIG_DEVICE_STATE, FeatureMigState)  # noqa: E731
        return State((await self._in_thread(Resource.COPY, "GET MIG_DEVICE_STATE", job)).device_state)

    @override
    async def set_state(self, target: State) -> RealFd | None:
        start_ns = self._fds.now_ns()
        if self._worker is None:
            self._worker = Worker(f"{self.name} ioctl")
        setting = self._worker.start(lambda: self._set_state(target))
        try:
            number = await self._fds.wait(setting)
        except BaseException:
            setting.add_done_callback(_close_unwanted)
            raise
        self._fds.timeline.work(Resource.FIXED, f"to {target.name}", start_ns)
        return None if number < 0 else RealFd(number, self.name, self._fds, blocks=self._blocks)

    def _set_state(self, target: State) -> int:
        start_ns = time.perf_counter_ns()
        try:
            data = set_feature(self.fd, Feature.MIG_DEVICE_STATE, FeatureMigState(target))
        finally:
            self.last_set_state_ns = start_ns, time.perf_counter_ns() - start_ns
        return FeatureMigState.unpack(data).data_fd

    @override
    async def reset(self) -> None:
        await self._in_thread(Resource.FIXED, "VFIO_DEVICE_RESET", lambda: fcntl.ioctl(self.fd, VFIO_DEVICE_RESET))

    @override
    async def stop_copy_bytes(self) -> int:
        job = lambda: get_feature(self.fd, Feature.MIG_DATA_SIZE, FeatureMigDataSize)  # noqa: E731
        return (await self._in_thread(Resource.FIRMWARE, "GET MIG_DATA_SIZE", job)).stop_copy_length

    @override
    async def set_precopy_info_v2(self) -> None:
        job = lambda: set_feature(self.fd, Feature.MIG_PRECOPY_INFOV2)  # noqa: E731
        await self._in_thread(Resource.COPY, "SET MIG_PRECOPY_INFOv2", job)

    @override
    async def streams(self) -> FeatureMigStreams:
        job = lambda: get_feature(self.fd, Feature.MIG_STREAMS, FeatureMigStreams)  # noqa: E731
        return await self._in_thread(Resource.COPY, "GET MIG_STREAMS", job)

    @override
    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        asked = FeatureMigStreams(dirty_streams, flags)
        job = lambda: set_feature(self.fd, Feature.MIG_STREAMS, asked)  # noqa: E731
        await self._in_thread(Resource.COPY, "SET MIG_STREAMS", job)
        self._blocks = StreamFlags.BLOCKS in flags

    async def in_thread(self, job: Callable[[], T]) -> T:
        """Any other call on the device fd, in the device's thread, after those that were begun before."""
        return await self._in_thread(Resource.COPY, "ioctl", job)

    async def stop(self) -> None:
        """End the device's thread; returns when the calls that were begun have returned."""
        if self._worker is not None:
            worker, self._worker = self._worker, None
            await worker.stop()


def _close_unwanted(setting: asyncio.Future[int]) -> None:
    """The caller of SET_STATE has stopped waiting: nobody else will close the data fd."""
    if not setting.cancelled() and setting.exception() is None and setting.result() >= 0:
        with contextlib.suppress(OSError):
            os.close(setting.result())
