"""A VMM process's guest: it runs in the device process, and the supervisor is informed when it runs."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from sim.host.machine import Guest, MachineModel
from sim.live.fd.calls import Calls


class GuestThere(Guest):
    """A guest that writes to its devices in the device process."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @override
    async def order_stop(self) -> None:
        await self._calls.call("guest", what="order_stop")

    @override
    async def stop(self) -> None:
        await self._calls.call("guest", what="stop")

    @override
    async def start(self) -> None:
        await self._calls.call("guest", what="start")


class LiveMachine(MachineModel):
    """A VMM's guest. `on_run` is called with whether it runs: before it starts, and after it has stopped."""

    def __init__(self, *args: Any, on_run: Callable[[bool], None], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._on_run = on_run
        on_run(self.running)

    @override
    async def stop_vcpus(self) -> None:
        await super().stop_vcpus()
        self._on_run(False)

    @override
    async def start_vcpus(self) -> None:
        self._on_run(True)
        await super().start_vcpus()


class Pages:
    """Pages of RAM as bytes of which only the number matters. They are never written, so they take no memory."""

    def __init__(self) -> None:
        self._zeros = memoryview(b"")

    def __call__(self, size_bytes: int) -> memoryview:
        """`size_bytes` zeros."""
        if size_bytes > len(self._zeros):
            self._zeros = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return self._zeros[:size_bytes]
