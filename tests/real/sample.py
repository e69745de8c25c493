# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's sample device in the running kernel, by raw system calls, and what its debugfs folder says of it.

For tests of the driver itself: only the structures of the headers are the project's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import select
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Self

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import Feature, FeatureOp, State, StreamFlags
from sim.device.record_format import RecordClass, RecordHeader
from tests.real.mdev import SampleMdev

VFIO_DEVICE_BIND_IOMMUFD = ord(";") << 8 | 118  # include/uapi/linux/vfio.h, Linux 7.3


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a device's log: one call, when it ended."""

    number: int
    time_ns: int  # CLOCK_REALTIME
    tid: int
    text: str


class SampleFd:
    """A data fd. Every call is the kernel's; an errno is an OSError."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.last_fd = 0
        """What the last GET_STREAM left in `fd`."""
        self.last_blocks = uapi.GetDirtyBlocks(0, 0, 0, 0, 0)
        """What the last GET_DIRTY_BLOCKS left."""

    def read(self, size: int) -> bytes:
        """One read()."""
        return os.read(self.number, size)

    def read_all(self, size: int = 1 << 20) -> bytes:
        """Read until ENOMSG or the end."""
        parts = []
        try:
            while part := self.read(size):
                parts.append(part)
        except OSError as error:
            if error.errno != errno.ENOMSG:
                raise
        return b"".join(parts)

    def write(self, data: bytes) -> int:
        """One write()."""
        return os.write(self.number, data)

    def write_all(self, data: bytes) -> None:
        """Write until everything is taken."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.number, view) :]

    def poll(self, timeout_ms: int = 0) -> int:
        """poll()'s events, 0 if there are none."""
        poll = select.poll()
        poll.register(self.number, select.POLLIN | select.POLLPRI | select.POLLOUT)
        return dict(poll.poll(timeout_ms)).get(self.number, 0)

    def nonblocking(self) -> Self:
        """Set O_NONBLOCK."""
        os.set_blocking(self.number, False)
        return self

    def precopy_info(self, argsz: int = 24) -> uapi.PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO."""
        answer = bytearray(struct.pack("=IIQQ", argsz, 0, 0, 0))
        fcntl.ioctl(self.number, uapi.VFIO_MIG_GET_PRECOPY_INFO, answer)
        return uapi.PrecopyInfo.unpack(answer)

    # --- v3 -------------------------------------------------------------------------------------------------------

    def get_stream(self, index: int, argsz: int = uapi.GetStream.SIZE, flags: int = 0) -> SampleFd:
        """VFIO_MIG_GET_STREAM."""
        argument = bytearray(uapi.GetStream(argsz, flags, index, 0).pack())
        try:
            fcntl.ioctl(self.number, uapi.VFIO_MIG_GET_STREAM, argument)
        finally:
            self.last_fd = uapi.GetStream.unpack(argument).fd
        return SampleFd(self.last_fd)

    def stream_info(self, argsz: int = uapi.StreamInfo.SIZE, flags: int = 0) -> uapi.StreamInfo:
        """VFIO_MIG_GET_STREAM_INFO."""
        argument = bytearray(struct.pack("=IIQQ", argsz, flags, 0, 0))
        fcntl.ioctl(self.number, uapi.VFIO_MIG_GET_STREAM_INFO, argument)
        return uapi.StreamInfo.unpack(argument)

    def dirty_blocks(self, room: int) -> tuple[uapi.GetDirtyBlocks, list[int]]:
        """VFIO_MIG_GET_DIRTY_BLOCKS with room for so many bits: the answer, and the blocks that it reported."""
        bitmap = bytearray(max(1, -(-room // 8)))
        address = ctypes.addressof(ctypes.c_char.from_buffer(bitmap))
        argument = bytearray(uapi.GetDirtyBlocks(uapi.GetDirtyBlocks.SIZE, 0, 0, room, address).pack())
        try:
            fcntl.ioctl(self.number, uapi.VFIO_MIG_GET_DIRTY_BLOCKS, argument)
        finally:
            self.last_blocks = uapi.GetDirtyBlocks.unpack(argument)
        blocks = [block for block in range(room) if bitmap[block // 8] >> block % 8 & 1]
        return self.last_blocks, blocks

    def ioctl_at(self, number: int, address: int) -> str:
        """An ioctl with its argument at this address; the name of its errno."""
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.ioctl(self.number, ctypes.c_ulong(number), ctypes.c_void_p(address))
        return errno.errorcode[ctypes.get_errno()] if done else "ok"

    def read_blocks(self, first: int, count: int, block_bytes: int) -> bytes:
        """pread() of these blocks."""
        return os.pread(self.number, 48 + count * (8 + block_bytes), first * block_bytes)

    def __del__(self) -> None:
        self.close()  # an fd keeps the memory of its device

    def close(self) -> None:
        """Close it, once."""
        if self.number >= 0:
            os.close(self.number)
        self.number = -1


class SampleDevice:
    """One device, open by its cdev and bound to an iommufd."""

    def __init__(self, mdev: SampleMdev) -> None:
        self.mdev = mdev
        self.open()

    def open(self) -> None:
        """Open it and bind it to an iommufd, as when it is made."""
        self.number = os.open(self.mdev.cdev, os.O_RDWR | os.O_CLOEXEC)
        self._iommufd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self.number, VFIO_DEVICE_BIND_IOMMUFD, bytearray(struct.pack("=IIiIQ", 24, 0, self._iommufd, 0, 0)))

    def close(self) -> None:
        """Close the device and its iommufd, once."""
        for number in (self.number, self._iommufd):
            if number >= 0:
                os.close(number)
        self.number = self._iommufd = -1

    # --- calls ----------------------------------------------------------------------------------------------------

    def feature(self, feature: int, op: FeatureOp, data: bytes = b"") -> bytes:
        """VFIO_DEVICE_FEATURE; the data as it is after the call."""
        header = uapi.DeviceFeature(uapi.DeviceFeature.SIZE + len(data), feature | op)
        argument = bytearray(header.pack() + data)
        fcntl.ioctl(self.number, uapi.VFIO_DEVICE_FEATURE, argument)
        return bytes(argument[uapi.DeviceFeature.SIZE :])

    def flags(self) -> uapi.MigrationFlags:
        """VFIO_DEVICE_FEATURE_MIGRATION."""
        data = self.feature(Feature.MIGRATION, FeatureOp.GET, bytes(uapi.FeatureMigration.SIZE))
        return uapi.FeatureMigration.unpack(data).flags

    def state(self) -> State:
        """The state."""
        data = self.feature(Feature.MIG_DEVICE_STATE, FeatureOp.GET, bytes(uapi.FeatureMigState.SIZE))
        return State(uapi.FeatureMigState.unpack(data).device_state)

    def set_state(self, state: State) -> SampleFd | None:
        """SET_STATE; the data fd, if the arc returns one."""
        data = self.feature(Feature.MIG_DEVICE_STATE, FeatureOp.SET, uapi.FeatureMigState(state).pack())
        fd = uapi.FeatureMigState.unpack(data).data_fd
        return SampleFd(fd) if fd >= 0 else None

    def begin(self, state: State) -> SampleFd:
        """SET_STATE into a state whose arc returns a data fd."""
        fd = self.set_state(state)
        assert fd is not None
        return fd

    def data_size(self) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DATA_SIZE."""
        data = self.feature(Feature.MIG_DATA_SIZE, FeatureOp.GET, bytes(uapi.FeatureMigDataSize.SIZE))
        return uapi.FeatureMigDataSize.unpack(data).stop_copy_length

    def opt_in_to_reinit(self) -> None:
        """VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2."""
        self.feature(Feature.MIG_PRECOPY_INFOV2, FeatureOp.SET)

    def streams(self) -> uapi.FeatureMigStreams:
        """VFIO_DEVICE_FEATURE_MIG_STREAMS, GET."""
        data = self.feature(Feature.MIG_STREAMS, FeatureOp.GET, bytes(uapi.FeatureMigStreams.SIZE))
        return uapi.FeatureMigStreams.unpack(data)

    def set_streams(self, dirty_streams: int, flags: int = 0) -> None:
        """The same, SET."""
        self.feature(
            Feature.MIG_STREAMS, FeatureOp.SET, uapi.FeatureMigStreams(dirty_streams, StreamFlags(flags)).pack()
        )

    def begin_all(self, state: State, dirty_streams: int, flags: int = 0) -> list[SampleFd]:
        """Opt in, and begin a session with several streams: the critical fd, then the dirty ones."""
        self.set_streams(dirty_streams, flags)
        critical = self.begin(state)
        return [critical, *(critical.get_stream(index) for index in range(dirty_streams))]

    def reset(self) -> None:
        """VFIO_DEVICE_RESET."""
        fcntl.ioctl(self.number, uapi.VFIO_DEVICE_RESET)

    # --- debugfs --------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """A hash of the whole state; of a stopped device it stays the same."""
        return self.mdev.digest()

    def reconfigure(self, how: str = "") -> None:
        """As a guest that makes new critical data: a new epoch. "keep", or "invalidate FIRST COUNT", or as by the
        parameters."""
        (self.mdev.debugfs / "reconfigure").write_text(f"{how}\n", encoding="ascii")

    def dirty(self, first: int, count: int = 1) -> None:
        """As a guest that changes blocks."""
        self.mdev.dirty(first, count)

    def set(self, **values: int | str) -> None:
        """Change parameters of this device."""
        for name, value in values.items():
            (self.mdev.debugfs / "params").write_text(f"{name} {value}\n", encoding="ascii")

    def params(self) -> dict[str, str]:
        """The parameters of this device."""
        lines = (self.mdev.debugfs / "params").read_text(encoding="ascii").splitlines()
        return {name: value for name, _, value in (line.partition(" ") for line in lines)}

    def log(self) -> list[LogLine]:
        """The calls so far."""
        parts = [line.split(" ", 3) for line in self.mdev.log()]
        return [LogLine(int(number), int(time_ns), int(tid), text) for number, time_ns, tid, text in parts]

    def counters(self) -> dict[int, dict[str, int]]:
        """What was done on the data fds of each number."""
        lines = self.mdev.counters().splitlines()
        rows = [{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)} for line in lines]
        return {row.pop("fd"): row for row in rows}


MakeOpen = Callable[..., SampleDevice]


def errno_of(call: Callable[..., object], *arguments: object) -> str:
    """The name of the errno that the call fails with; "ok" if it does not."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def records(data: bytes) -> list[bytes]:
    """The records of a stream."""
    found = []
    while data:
        size = RecordHeader.SIZE + RecordHeader.unpack(data).length
        found.append(data[:size])
        data = data[size:]
    return found


def with_header(record: bytes, **changes: int) -> bytes:
    """The record with other values in its header."""
    return replace(RecordHeader.unpack(record), **changes).pack() + record[RecordHeader.SIZE :]


def in_thread(call: Callable[..., object], *arguments: object) -> Future[object]:
    """The call in a thread of its own."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


_PRIME = 0x9E3779B185EBCA87
_MASK = (1 << 64) - 1


def _mix(digest: int, word: int) -> int:
    product = (digest ^ word) * _PRIME & _MASK
    return (product << 29 | product >> 35) & _MASK


def _digest(digest: int, data: bytes) -> int:
    """The driver's sample_digest()."""
    lanes = [1, 2, 3, 4]
    whole = len(data) // 32 * 32
    for at in range(0, whole, 8):
        lanes[at // 8 % 4] = _mix(lanes[at // 8 % 4], int.from_bytes(data[at : at + 8], "little"))
    for word in (*lanes, *data[whole:], len(data)):
        digest = _mix(digest, word)
    return digest


def digest_of(before: Sequence[bytes]) -> int:
    """The digest of the END behind these records: of their headers, and of the numbers of DIRTY records' blocks."""
    digest = 0
    for record in before:
        header = RecordHeader.unpack(record)
        digest = _digest(digest, record[: RecordHeader.SIZE])
        if header.record_class == RecordClass.DIRTY:
            (count,) = struct.unpack_from("<Q", record, RecordHeader.SIZE)
            digest = _digest(digest, record[RecordHeader.SIZE :][: 8 + 8 * count])
    return digest
