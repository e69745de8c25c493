# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls that a VMM makes at its devices: which have not returned, and which failed.

A call can take for ever: an ioctl that waits for firmware cannot be interrupted. Whoever stops waiting for a call can
name it. Of a call that fails the kernel tells user space an errno and nothing else. The VMM knows which call it was,
and can ask for the state that the device is in now, as QEMU does (hw/vfio/migration.c, vfio_migration_set_state).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

from proto_v3.errors import leaves
from proto_v3.vfio import fsm
from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import State

NAMES = {
    "migration_flags": "GET MIGRATION",
    "state": "GET MIG_DEVICE_STATE",
    "set_state": "SET MIG_DEVICE_STATE",
    "reset": "VFIO_DEVICE_RESET",
    "stop_copy_bytes": "GET MIG_DATA_SIZE",
    "set_precopy_info_v2": "SET MIG_PRECOPY_INFOv2",
    "streams": "GET MIG_STREAMS",
    "set_streams": "SET MIG_STREAMS",
    "read": "read()",
    "write": "write()",
    "poll": "poll()",
    "close": "close()",
    "precopy_info": "GET_PRECOPY_INFO",
    "stream_info": "GET_STREAM_INFO",
    "get_stream": "GET_STREAM",
    "geometry": "GET_DIRTY_BLOCKS",
    "dirty_blocks": "GET_DIRTY_BLOCKS",
    "read_blocks": "pread()",
}
"""The kernel's name of each call of a device and of its data fds (proto_v3.vfio.device)."""

RETURNS_WITHIN_S = 5.0
"""How long a VMM that gives up, or recovers, waits for each call that closes a session or asks for a state. After that
it goes on without. Ours: QEMU waits for ever, in an ioctl that cannot be interrupted."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call at a device, or at one of its data fds."""

    where: str
    """`nic0`, or `nic0 stream 2`."""
    what: str
    """In the kernel's words, as `read()`; of SET_STATE the states, as `PRE_COPY -> RUNNING`."""
    since_ns: int


class DeviceCallError(OSError):
    """A call at a device failed, with this errno."""

    def __init__(self, device: _CalledDevice, call: Call, error: OSError, target: State | None) -> None:
        """`target`: of SET_STATE, the state that was asked for."""
        code = error.errno or errno.EIO
        super().__init__(code, os.strerror(code))
        self.device = device.name
        self.at_ns = device.calls.now_ns()
        told = error.strerror
        self.cause = told if told and told != self.strerror else ""
        """What the driver said besides the errno. Only a simulated one says anything."""
        self._of = device
        self._where = call.where
        self._what = call.what
        self._target = target
        self._state: State | None = None

    async def look(self) -> None:
        """Ask for the state that the device is in now. Where that is on the path of SET_STATE, it shows the arc that
        failed."""
        if self._state is not None:
            return
        with contextlib.suppress(OSError):  # also TimeoutError
            async with asyncio.timeout(RETURNS_WITHIN_S):
                await self._look(self._of.state)

    async def _look(self, began: State) -> None:
        self._state = self._of.state = await self._of.inner.state()
        if self._target is not None:
            steps = fsm.path(began, self._target, await self._of.inner.migration_flags())
            arcs = dict(zip([began, *steps], steps, strict=False))
            if self._state in arcs:
                self._what = f"{self._state.name} -> {arcs[self._state].name}"

    @property
    def what(self) -> str:
        """What failed, and with which errno; not where."""
        return f"{self._what} failed: {errno.errorcode.get(self.errno or 0, f'errno {self.errno}')}"

    def __str__(self) -> str:
        text = f"{self._where}: {self.what} ({self.strerror})"
        return text if self._state is None else f"{text}; this left it in {self._state.name}"


async def look(error: BaseException) -> None:
    """Ask for the state of each device of which a call failed: before anything else is done to it."""
    for each in leaves(error):
        if isinstance(each, DeviceCallError):
            await each.look()


class DeviceCalls:
    """The calls of one side."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self._at_work: dict[object, Call] = {}
        self._given_up: tuple[int, list[Call]] = (0, [])
        """When a caller stopped waiting last, and for which calls then: several threads stop at once."""

    def watch(self, device: MigrationDevice) -> MigrationDevice:
        """The same device, with its calls and those of its data fds noted here. One that fails raises DeviceCallError.

        Only ENOMSG of read() and pread() stays an OSError: it is the temporary end in pre-copy, and no failure.
        """
        return cast(MigrationDevice, _Watched(_CalledDevice(self, device), device.name, device))

    def hung(self, least_ns: float = 0, *, poll: bool = False) -> str:
        """The call that has not returned for longest, in words; empty if none is at work for `least_ns`.

        poll() may wait for ever, and counts only with `poll`, if there is no other. A call that its caller gave up at
        this very moment counts, too.
        """
        calls = list(self._at_work.values())
        if self._given_up[0] == self.now_ns():
            calls += self._given_up[1]
        calls = [call for call in calls if poll or call.what != "poll()"]
        longest = min(calls, key=lambda call: (call.what == "poll()", call.since_ns), default=None)
        if longest is None or self.now_ns() - longest.since_ns < least_ns:
            return ""
        return (
            f"{longest.what} of {longest.where} has not returned for {(self.now_ns() - longest.since_ns) / 1e9:.3g} s"
        )

    async def note(self, call: Call, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await the call."""
        key = object()
        self._at_work[key] = call
        try:
            return await coroutine
        except asyncio.CancelledError:
            given_up_ns, calls = self._given_up
            self._given_up = self.now_ns(), [*(calls if given_up_ns == self.now_ns() else []), call]
            raise
        finally:
            del self._at_work[key]


class _CalledDevice:
    """A device, and the state that its VMM last put it in, or found it in."""

    def __init__(self, calls: DeviceCalls, inner: MigrationDevice) -> None:
        self.calls = calls
        self.name = inner.name
        self.inner = inner
        self.state = State.RUNNING


class _Watched:
    """A device or a data fd whose calls are watched. Everything else of it is as it is."""

    def __init__(self, device: _CalledDevice, where: str, inner: Any) -> None:
        self._device, self._where, self._inner = device, where, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in NAMES:
            return value
        watched = functools.partial(self._call, name, value)
        setattr(self, name, watched)
        return watched

    async def _call(self, name: str, method: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        device = self._device
        target: State | None = arguments[0] if name == "set_state" else None
        what = NAMES[name] if target is None else f"{device.state.name} -> {target.name}"
        call = Call(self._where, what, device.calls.now_ns())
        try:
            result = await device.calls.note(call, method(*arguments))
        except DeviceCallError:
            raise
        except OSError as error:
            if name in ("read", "read_blocks") and error.errno == errno.ENOMSG:
                raise
            raise DeviceCallError(device, call, error, target) from error
        match name:
            case "set_state":
                device.state = arguments[0]
                return result if result is None else _Watched(device, self._where, result)
            case "reset":
                device.state = State.RUNNING
            case "get_stream":
                return _Watched(device, f"{self._where} stream {arguments[0] + 1}", result)
        return result
