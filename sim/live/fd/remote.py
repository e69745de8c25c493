# SPDX-License-Identifier: GPL-2.0-or-later
"""A device as its VMM sees it: ioctls by calls to the device process, data fds as descriptors that were passed.

These are the ports of `proto_v3.vfio.device`, so the protocols cannot tell it from the simulated one.
"""

from __future__ import annotations

from typing_extensions import override

from proto_v3.vfio.device import NO_STREAM_FLAGS, MigrationDevice
from proto_v3.vfio.uapi import (
    DeviceFeature,
    Feature,
    FeatureMigDataSize,
    FeatureMigration,
    FeatureMigState,
    FeatureMigStreams,
    FeatureOp,
    MigrationFlags,
    State,
    StreamFlags,
)
from sim.live.fd.calls import Reply
from sim.live.fd.remote_fd import Devices, RemoteFd, S
from sim.live.fd.remote_read import RemoteReadFd
from sim.live.fd.remote_write import RemoteWriteFd


class RemoteDevice(MigrationDevice):
    """A live device; its state machine and features by VFIO_DEVICE_FEATURE."""

    def __init__(self, index: int, name: str, devices: Devices) -> None:
        self.name = name
        self._index = index
        self._devices = devices

    async def _get(self, feature: Feature, kind: type[S]) -> S:
        answer = await self._feature(feature | FeatureOp.GET, bytes(kind.SIZE))
        return kind.unpack(answer.body["buffer"][DeviceFeature.SIZE :])

    async def _set(self, feature: Feature, data: bytes = b"") -> Reply:
        return await self._feature(feature | FeatureOp.SET, data)

    async def _feature(self, flags: int, data: bytes) -> Reply:
        header = DeviceFeature(DeviceFeature.SIZE + len(data), flags).pack()
        return await self._devices.calls.call("feature", device=self._index, buffer=header + data)

    @override
    async def migration_flags(self) -> MigrationFlags:
        return (await self._get(Feature.MIGRATION, FeatureMigration)).flags

    @override
    async def state(self) -> State:
        return State((await self._get(Feature.MIG_DEVICE_STATE, FeatureMigState)).device_state)

    @override
    async def set_state(self, target: State) -> RemoteFd | None:
        answer = await self._set(Feature.MIG_DEVICE_STATE, FeatureMigState(target).pack())
        number = FeatureMigState.unpack(answer.body["buffer"][DeviceFeature.SIZE :]).data_fd
        if number < 0:
            return None
        kind = RemoteWriteFd if target is State.RESUMING else RemoteReadFd
        return kind(self._index, self.name, number, answer.fds, self._devices)

    @override
    async def reset(self) -> None:
        await self._devices.calls.call("reset", device=self._index)
        self._devices.was_reset(self._index)

    @override
    async def stop_copy_bytes(self) -> int:
        return (await self._get(Feature.MIG_DATA_SIZE, FeatureMigDataSize)).stop_copy_length

    @override
    async def set_precopy_info_v2(self) -> None:
        await self._set(Feature.MIG_PRECOPY_INFOV2)

    @override
    async def streams(self) -> FeatureMigStreams:
        return await self._get(Feature.MIG_STREAMS, FeatureMigStreams)

    @override
    async def set_streams(self, dirty_streams: int, flags: StreamFlags = NO_STREAM_FLAGS) -> None:
        await self._set(Feature.MIG_STREAMS, FeatureMigStreams(dirty_streams, flags).pack())
