"""v3: what the two VMMs agree on. The source is in `proto_v3/vmm/v3_source.py`, the target in
`proto_v3/vmm/v3_target.py`.

Per device a critical fd and N dirty fds, read at once; RAM and control on a connection of their own. Or, as a variant,
a critical fd and one of addressable blocks, read by N threads. See docs/protocol-v3.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from proto_v3.vfio.device import NO_STREAM_FLAGS, MigrationDevice
from proto_v3.vfio.uapi import StreamFlags
from proto_v3.wire.streams import Credits, Wire


@dataclass(frozen=True, slots=True)
class V3Options:
    """How a VMM uses v3."""

    wire_streams: int
    """Of each device: as many as it has dirty streams, or threads that read its blocks."""
    blocks: bool
    wire: Wire
    pool_connections: int
    credits: Credits
    max_retries: int
    """So often the guest is resumed when the last look finds a new epoch; 0: it goes on with the stop (`proceed`)."""

    @property
    def dirty_streams(self) -> int:
        """To opt in with: of each device; 1 with blocks."""
        return 1 if self.blocks else self.wire_streams

    @property
    def asked(self) -> str:
        """What was asked of the devices, in words."""
        return "addressable blocks" if self.blocks else str(self.dirty_streams)

    @property
    def flags(self) -> StreamFlags:
        """To opt in with."""
        return StreamFlags.BLOCKS if self.blocks else NO_STREAM_FLAGS

    def connections(self, devices: int) -> int:
        """How many are needed for so many devices."""
        match self.wire:
            case Wire.STREAMS:
                return 1 + devices * (1 + self.wire_streams)
            case Wire.POOL:
                return 1 + self.pool_connections
            case Wire.ONE:
                return 1

    def with_credits(self, critical_bytes: int, dirty_bytes: int) -> V3Options:
        """With the credits that the target gives."""
        return replace(self, credits=Credits(critical_bytes, dirty_bytes))


async def opt_out(devices: Sequence[MigrationDevice]) -> None:
    """The devices are v2's again, for whoever migrates them next; one that refuses is left as it is."""
    for device in devices:
        with contextlib.suppress(OSError):
            await device.set_streams(0)
