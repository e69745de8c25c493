# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM process with devices of the kernel in it. However it ends, but by SIGKILL, it leaves them as it found them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sim.live.fd.calls import Calls
from sim.live.processes.children import answer_ping, be, send_report, until_gone
from sim.live.processes.report import VmmReport
from sim.live.processes.settings import Settings
from sim.live.processes.vmm import VmmProcess
from sim.real.backend import RealBackend
from sim.real.sysfs import DeviceEntry

CANCELS_WITHIN_S = 2.0
"""How long a migration whose supervisor is gone may take to stop; then the devices are put back all the same. Ours."""
ENDS_WITHIN_S = 30.0
"""Such a process is killed when it has not ended for this time: a device's last calls may take seconds. Ours."""


def real_vmm_main(
    name: str,
    lifeline: socket.socket,
    entries: Sequence[DeviceEntry],
    way: str | None,
    side: str,
    settings: Settings,
    migrate: Callable[..., Awaitable[VmmReport]],
    *args: Any,
) -> None:
    """The process; `migrate` is run_source or run_target, and `args` are what it takes beside the VMM."""

    async def work() -> None:
        supervisor = Calls(lifeline, "supervisor", answer_ping)
        devices = RealBackend(side, entries, way)
        vmm = VmmProcess(side, settings, devices, supervisor)
        reporting = await until_gone(supervisor, send_report(vmm, migrate(vmm, *args)))
        if not reporting.done():
            reporting.cancel()
            await asyncio.wait([reporting], timeout=CANCELS_WITHIN_S)
        with contextlib.suppress(OSError):
            await devices.put_back()

    be(name, settings.loop, work, killed=False)
