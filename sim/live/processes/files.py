# SPDX-License-Identifier: GPL-2.0-or-later
"""The open files that the processes of a live run need, held against the limit before they are started."""

from __future__ import annotations

import resource

from proto_v3.errors import UserError
from sim.host.vmms import connections
from sim.scenario.protocol import AppliedScenario

FILES, FILES_A_DATA_FD, FILES_A_CONNECTION = 32, 3, 2
"""Of a VMM process, as measured: a data fd has a socket to the device process, and two eventfds for its thread; a
connection has its socket, and an eventfd for its thread."""


def allow_files() -> None:
    """Let this process open as many files as the machine allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_files(applied: AppliedScenario) -> None:
    """UserError if a process of the run would need more open files than it may have."""
    v3 = applied.scenario.v3_options() if applied.protocol.version == 3 else None
    data_fds = len(applied.scenario.devices) * (1 + (v3.dirty_streams if v3 else 0))
    needed = FILES + FILES_A_DATA_FD * data_fds + FILES_A_CONNECTION * connections(applied)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and needed > most:
        raise UserError(
            f"{applied.protocol.name}: a process of this live run needs {needed} open files, and may have {most}: "
            f"raise the limit (ulimit -n {needed}), or take fewer devices, streams or connections"
        )
