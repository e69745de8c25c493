"""The calls that a VMM makes at its devices: which have not returned, and since when.

A call can take for ever: an ioctl that waits for firmware cannot be interrupted. Whoever stops waiting for a call can
name it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from proto_v3.vfio.device import MigrationDevice
from proto_v3.vfio.uapi import State


@dataclass(frozen=True, slots=True)
class Call:
    """A call at a device, or at one of its data fds."""

    where: str
    """`nic0`, or `nic0 stream 2`."""
    what: str
    """As `set_state(PRE_COPY)` or `read()`."""
    since_ns: int


class CallsAtWork:
    """The calls of one side that have not returned."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self._at_work: dict[object, Call] = {}
        self._given_up: tuple[int, Call] | None = None  # the last one, and when its caller stopped waiting

    def watch(self, device: MigrationDevice) -> MigrationDevice:
        """The same device, with its calls and those of its data fds noted here."""
        watched: MigrationDevice = _Watched(self, device.name, device)
        return watched

    def hung(self, least_ns: float) -> str:
        """The call that has not returned for longest, in words; empty if none is at work for `least_ns`.

        poll() may wait for ever, and does not count. A call that its caller gave up at this very moment does.
        """
        calls = list(self._at_work.values())
        if self._given_up is not None and self._given_up[0] == self.now_ns():
            calls.append(self._given_up[1])
        longest = min((call for call in calls if call.what != "poll()"), key=lambda call: call.since_ns, default=None)
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
            self._given_up = self.now_ns(), call
            raise
        finally:
            del self._at_work[key]


class _Watched:
    """A device or a data fd whose calls are noted. Everything else of it is as it is."""

    def __init__(self, calls: CallsAtWork, where: str, inner: Any) -> None:
        self._calls, self._where, self._inner = calls, where, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(value):
            return value
        watched = functools.partial(self._call, name, value)
        setattr(self, name, watched)
        return watched

    async def _call(self, name: str, method: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        state = arguments[0].name if name == "set_state" and isinstance(arguments[0], State) else ""
        call = Call(self._where, f"{name}({state})", self._calls.now_ns())
        result = await self._calls.note(call, method(*arguments))
        if not hasattr(result, "poll"):  # no data fd
            return result
        where = f"{self._where} stream {arguments[0] + 1}" if name == "get_stream" else self._where
        return _Watched(self._calls, where, result)
