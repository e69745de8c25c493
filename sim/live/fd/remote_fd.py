"""What all data fds of a VMM share: the descriptor that was passed, and ioctls by calls to the device process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from typing_extensions import override

from proto_v3.vfio.device import DataFd
from proto_v3.vfio.uapi import GetStream, PrecopyInfo, StreamInfo, Structure
from sim.live.fd.calls import Calls, Reply
from sim.live.fd.data_fd import Descriptor, descriptor
from sim.live.merge_timelines import ProcessTimeline
from sim.report import Counters

S = TypeVar("S", bound=Structure)


class Devices:
    """What the data fds of a VMM share: the calls, the way of moving bytes, the timeline."""

    def __init__(self, calls: Calls, side: str, io: str, timeline: ProcessTimeline, read_bytes: int) -> None:
        self.calls = calls
        self.side = side
        self.io = io
        self.timeline = timeline
        self.read_bytes = read_bytes
        self.fds: list[RemoteFd] = []
        """All that were passed so far."""

    def close(self) -> None:
        """Close all data fds."""
        for fd in self.fds:
            fd.drop()


class RemoteFd(DataFd):
    """A data fd of a live device; read (`remote_read`) or written (`remote_write`)."""

    blocks_kind: type[RemoteFd]
    """The kind that get_stream() returns for addressable blocks."""

    def __init__(self, device: int, name: str, number: int, fds: Sequence[int], devices: Devices) -> None:
        """`device`, `number`: as calls name the device and this fd; `fds` were passed with it."""
        self.counters = Counters()
        """Of this end: calls that returned data, bytes, and all of their time as firmware_ns."""
        self.name = f"{devices.side} {name} fd {number}"
        self._name = name
        self._device = device
        self._number = number
        self._devices = devices
        self._calls = devices.calls
        self._timeline = devices.timeline
        self._fd: Descriptor = descriptor(fds[0], self.name, devices.io)
        self._streams: dict[int, RemoteFd] = {}
        """Of the critical fd: the others that it returned, by number."""
        devices.fds.append(self)

    def _ask(self, name: str, **more: object) -> asyncio.Future[Reply]:
        """A call that is answered when something happens; the answer wakes whoever waits at the fd."""
        asked = self._calls.begin(name, fd=self._number, **more)
        asked.add_done_callback(lambda _: self._fd.wake())
        return asked

    async def _ioctl(self, name: str, argument: S) -> S:
        answer = await self._calls.call(name, device=self._device, fd=self._number, buffer=argument.pack())
        return type(argument).unpack(answer.body["buffer"])

    @override
    async def precopy_info(self) -> PrecopyInfo:
        return await self._ioctl("precopy_info", PrecopyInfo(0, 0))

    @override
    async def stream_info(self) -> StreamInfo:
        return await self._ioctl("stream_info", StreamInfo(0, 0))

    @override
    async def get_stream(self, index: int) -> RemoteFd:
        argument = GetStream(GetStream.SIZE, 0, index).pack()
        answer = await self._calls.call("get_stream", device=self._device, fd=self._number, buffer=argument)
        number = GetStream.unpack(answer.body["buffer"]).fd
        if number not in self._streams:
            kind = self.blocks_kind if answer.body["blocks"] else type(self)
            self._streams[number] = kind(self._device, self._name, number, answer.fds, self._devices)
        return self._streams[number]

    @override
    async def close(self) -> None:
        await self._calls.call("close", fd=self._number)

    def drop(self) -> None:
        """Close the descriptor without a call to the driver."""
        self._fd.close()
