# SPDX-License-Identifier: GPL-2.0-or-later
"""How the states of devices are compared at the end of a completed migration: each side sends digests of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from sim.live.fd.store import DIGEST_BYTES, differences
from sim.scenario.device import Device


class StateComparison(Protocol):
    """What a digest is. A device's digest is bytes, which may come from another host."""

    def wrong(self, devices: Sequence[Device], digests: Sequence[bytes]) -> str:
        """What the digests of these devices must be, if they are not; else nothing."""

    def difference(self, device: Device, source: bytes, target: bytes) -> str:
        """Where the states differ, in words; empty if they are equal. ValueError if a digest is malformed."""


class BlockByBlock(StateComparison):
    """A device's digest has one entry for each block and critical object (sim.live.fd.store)."""

    @override
    def wrong(self, devices: Sequence[Device], digests: Sequence[bytes]) -> str:
        sizes = [(device.blocks + device.critical.objects) * DIGEST_BYTES for device in devices]
        if [len(each) for each in digests] in ([], sizes):
            return ""
        return f"must be none, or have {sizes} bytes, by device"

    @override
    def difference(self, device: Device, source: bytes, target: bytes) -> str:
        return differences(source, target, device.blocks)


BLOCK_BY_BLOCK = BlockByBlock()
