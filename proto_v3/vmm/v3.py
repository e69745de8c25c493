# SPDX-License-Identifier: GPL-2.0-or-later
"""v3: what the two VMMs agree on. The source is in `proto_v3/vmm/v3_source.py`, the target in
`proto_v3/vmm/v3_target.py`.

A device has one critical fd and N dirty fds, all read at the same time. RAM and control have a connection of their own;
or RAM has those of multifd. Variant: a critical fd and one fd of addressable blocks, read by N threads. See
docs/protocol-v3.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from proto_v3.vfio.device import NO_STREAM_FLAGS, MigrationDevice
from proto_v3.vfio.uapi import StreamFlags
from proto_v3.vmm.device_calls import RETURNS_WITHIN_S
from proto_v3.vmm.multifd import Multifd
from proto_v3.wire.streams import Credits, Wire


@dataclass(frozen=True, slots=True)
class V3Options:
    """How a VMM uses v3."""

    wire_streams: int  # of each device: as many as it has dirty streams, or threads that read its blocks
    blocks: bool
    wire: Wire
    pool_connections: int
    credits: Credits
    max_retries: int
    """How many times the guest may be resumed because the final check found a newer epoch; 0 = never, continue the stop
    (`proceed`)."""
    force_after_ns: int | None = None
    """So long after the migration began, the guest is stopped as soon as what is left fits, be the critical data loaded
    or not, and is not resumed for a newer epoch. None: never."""
    multifd: Multifd | None = None
    """RAM goes over its channels, which are connections beside those of the streams."""

    @property
    def dirty_streams(self) -> int:
        """To opt in with, for each device; 1 with blocks."""
        return 1 if self.blocks else self.wire_streams

    @property
    def flags(self) -> StreamFlags:
        """To opt in with."""
        return StreamFlags.BLOCKS if self.blocks else NO_STREAM_FLAGS

    def connections(self, devices: int) -> int:
        """Connections needed for this number of devices, the first one included."""
        return self.without_multifd(devices) + (self.multifd.channels if self.multifd else 0)

    def without_multifd(self, devices: int) -> int:
        """The same, of the first one and the streams; those of multifd follow them."""
        match self.wire:
            case Wire.STREAMS:
                return 1 + devices * (1 + self.wire_streams)
            case Wire.POOL:
                return 1 + self.pool_connections
            case Wire.ONE:
                return 1


async def opt_out(devices: Sequence[MigrationDevice]) -> None:
    """Return the devices to v2, for the next user. One that refuses, or does not answer in time, is left as it is."""
    for device in devices:
        with contextlib.suppress(OSError):  # also TimeoutError
            async with asyncio.timeout(RETURNS_WITHIN_S):
                await device.set_streams(0)
