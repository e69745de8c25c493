# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's sample device in the running kernel, by raw system calls, and what its debugfs folder says of it.

For tests of the driver itself: nothing of `sim` is used, only the structures of `proto_v3.vfio.uapi`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import select
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from proto_v3.vfio import uapi
from proto_v3.vfio.uapi import Feature, FeatureOp, State

MODULE = Path("/sys/module/vfio_v3_sample")
TYPE = Path("/sys/class/mdev_bus/vfio_v3_sample/mdev_supported_types/vfio_v3_sample-1")
MDEVS = Path("/sys/bus/mdev/devices")
DEBUGFS = Path("/sys/kernel/debug/vfio_v3_sample")

VFIO_DEVICE_BIND_IOMMUFD = ord(";") << 8 | 118  # include/uapi/linux/vfio.h, Linux 7.3
VFIO_REGION_SHIFT = 40
"""The driver's own, see kernel/driver/config.c."""


def set_parameters(**values: int | str) -> None:
    """Set module parameters: those of the devices that are created from now on."""
    for name, value in values.items():
        (MODULE / "parameters" / name).write_text(f"{value}\n", encoding="ascii")


def parameters() -> dict[str, str]:
    """The module's parameters as they are."""
    return {path.name: path.read_text(encoding="ascii").strip() for path in (MODULE / "parameters").iterdir()}


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

    def read(self, size: int) -> bytes:
        """One read()."""
        return os.read(self.number, size)

    def read_all(self, size: int = 1 << 20) -> bytes:
        """Read until ENOMSG or the end."""
        parts = []
        with contextlib.suppress(OSError) as _:
            while part := self._read_unless_dry(size):
                parts.append(part)
        return b"".join(parts)

    def _read_unless_dry(self, size: int) -> bytes:
        try:
            return self.read(size)
        except OSError as error:
            if error.errno == errno.ENOMSG:
                return b""
            raise

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

    def close(self) -> None:
        """Close it, once."""
        if self.number >= 0:
            os.close(self.number)
        self.number = -1


class SampleDevice:
    """One device, open by its cdev and bound to an iommufd."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.debugfs = DEBUGFS / name
        cdev = next((MDEVS / name / "vfio-dev").iterdir()).name
        self.number = os.open(f"/dev/vfio/devices/{cdev}", os.O_RDWR | os.O_CLOEXEC)
        self._iommufd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self.number, VFIO_DEVICE_BIND_IOMMUFD, bytearray(struct.pack("=IIiIQ", 24, 0, self._iommufd, 0, 0)))

    def close(self) -> None:
        """Close the device and its iommufd."""
        for number in (self.number, self._iommufd):
            os.close(number)

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

    def reset(self) -> None:
        """VFIO_DEVICE_RESET."""
        fcntl.ioctl(self.number, uapi.VFIO_DEVICE_RESET)

    # --- debugfs --------------------------------------------------------------------------------------------------

    def _write(self, name: str, text: str) -> None:
        (self.debugfs / name).write_text(text, encoding="ascii")

    def digest(self) -> str:
        """A hash of the whole state; of a stopped device it stays the same."""
        return (self.debugfs / "digest").read_text(encoding="ascii").strip()

    def reconfigure(self) -> None:
        """As a guest that makes new critical data: a new epoch."""
        self._write("reconfigure", "1")

    def dirty(self, first: int, count: int = 1) -> None:
        """As a guest that changes blocks."""
        self._write("write", f"{first} {count}")

    def set(self, **values: int | str) -> None:
        """Change parameters of this device."""
        for name, value in values.items():
            self._write("params", f"{name} {value}")

    def params(self) -> dict[str, str]:
        """The parameters of this device."""
        lines = (self.debugfs / "params").read_text(encoding="ascii").splitlines()
        return {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in lines}

    def log(self) -> list[LogLine]:
        """The calls so far."""
        lines = (self.debugfs / "log").read_text(encoding="ascii").splitlines()
        parts = [line.split(" ", 3) for line in lines]
        return [LogLine(int(number), int(time_ns), int(tid), text) for number, time_ns, tid, text in parts]

    def clear_log(self) -> None:
        """Forget the calls so far."""
        self._write("log", "0")

    def counters(self) -> dict[int, dict[str, int]]:
        """What was done on the data fds of each number."""
        lines = (self.debugfs / "counters").read_text(encoding="ascii").splitlines()
        rows = [{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)} for line in lines]
        return {row.pop("fd"): row for row in rows}


@contextlib.contextmanager
def sample_devices(count: int = 1, **values: int | str) -> Iterator[list[SampleDevice]]:
    """Devices with these parameters, opened; removed at the end. The module's parameters are put back."""
    before = parameters()
    set_parameters(**values)
    names = [str(uuid.uuid4()) for _ in range(count)]
    devices: list[SampleDevice] = []
    try:
        for name in names:
            (TYPE / "create").write_text(name, encoding="ascii")
            devices.append(SampleDevice(name))
        yield devices
    finally:
        set_parameters(**{name: before[name] or " " for name in values})
        for device in devices:
            device.close()
        for name in names:
            if (MDEVS / name).exists():
                (MDEVS / name / "remove").write_text("1", encoding="ascii")


def libc() -> ctypes.CDLL:
    """The C library, for system calls that Python has no function for."""
    return ctypes.CDLL(None, use_errno=True)
