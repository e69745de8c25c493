# SPDX-License-Identifier: GPL-2.0-or-later
"""The device's state, and nothing else: blocks and critical objects with versions, and the epoch.

At the source, `version` counts the writes to a block, and `saved` is the version that was last saved (-1: none). A
block is dirty while the two differ. At the target, `Image` holds the versions that were loaded. At the end of a run it
must equal the source's, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sim.device.guest import Activity, Int32
from sim.device.record_format import BlockRange
from sim.scenario.device import Device

Indices = NDArray[np.intp]


class Content(Protocol):
    """A device's state as bytes."""

    def write_blocks(self, written: Int32, version: Int32) -> None:
        """The guest wrote these blocks, some of them more than once; `version` has the newest of all blocks."""

    def write_objects(self, made_new: Int32, version: Int32) -> None:
        """The guest changed these critical objects; `version` has the newest of all objects."""


class DeviceState:
    """A device at the source; the guest writes to it until it is stopped."""

    def __init__(self, device: Device, activity: Activity) -> None:
        self.spec = device
        self.block_bytes = device.block_bytes
        self.object_bytes = device.critical.object_bytes
        self.version: Int32 = np.zeros(device.blocks, np.int32)
        self.saved: Int32 = np.full(device.blocks, -1, np.int32)
        self.object_version: Int32 = np.zeros(device.critical.objects, np.int32)
        self.object_saved: Int32 = np.full(device.critical.objects, -1, np.int32)
        self.activity = activity
        self.epoch = 1
        self.on_new_events: Callable[[], None] | None = None
        """Called when reconfigurations were added that next_reconfiguration_ns() did not know."""
        self.on_epochs: Callable[[int, int], None] | None = None
        """Called when epochs began, with the numbers of the first and the last of them."""
        self.content: Content | None = None
        """The bytes themselves, in live mode only."""
        self._writes = 0
        self._reconfigurations = 0
        self._stopped_ns: int | None = None
        self._stop_orders = 0

    def advance(self, now_ns: int) -> None:
        """Apply the guest's writes and reconfigurations up to now, or up to its stop."""
        if self._stopped_ns is not None:
            now_ns = min(now_ns, self._stopped_ns)
        writes = self.activity.writes_until(now_ns)
        if writes > self._writes:
            written = self.activity.write_blocks[self._writes : writes]
            np.add.at(self.version, written, 1)
            if self.content is not None:
                self.content.write_blocks(written, self.version)
            self._writes = writes
        events = self.activity.reconfigurations_until(now_ns)
        if events > self._reconfigurations:
            made_new = self.activity.reconfiguration_objects[self._reconfigurations : events]
            np.add.at(self.object_version, made_new, 1)
            if self.content is not None:
                self.content.write_objects(made_new, self.object_version)
            first = self.epoch + 1
            self.epoch += events - self._reconfigurations
            self._reconfigurations = events
            if self.on_epochs is not None:
                self.on_epochs(first, self.epoch)

    @property
    def written_bytes(self) -> int:
        """Bytes that the guest wrote so far; each write is a whole block."""
        return self._writes * self.block_bytes

    def touched_blocks(self, epoch: int) -> BlockRange:
        """The blocks whose earlier data is invalid since the reconfiguration that began this epoch."""
        first, count = self.activity.reconfiguration_blocks[epoch - 2]  # the device starts in epoch 1
        return BlockRange(int(first), int(count), epoch)

    def invalidate(self, blocks: BlockRange) -> None:
        """These blocks are dirty again, whatever was saved of them."""
        self.saved[blocks.slice] = -1

    def next_reconfiguration_ns(self) -> int | None:
        """Time of the guest's next reconfiguration; None if there is none."""
        times = self.activity.reconfiguration_ns
        if self._reconfigurations >= len(times):
            return None
        at = int(times[self._reconfigurations])
        return None if self._stopped_ns is not None and at > self._stopped_ns else at

    @property
    def guest_runs(self) -> bool:
        """Whether the vCPUs run."""
        return self._stopped_ns is None

    def order_stop(self, now_ns: int) -> None:
        """The vCPUs are about to be stopped: add the reconfigurations that the scenario has for this time."""
        self.advance(now_ns)  # the added ones come after what was applied
        self._stop_orders += 1
        plan = self.spec.reconfigurations
        if plan is not None and plan.during_stop_ms and self._stop_orders <= plan.during_stops:
            self.activity = self.activity.with_events_during_stop(now_ns)
            if self.on_new_events is not None:
                self.on_new_events()

    def stop(self, now_ns: int) -> None:
        """The vCPUs are stopped: nothing changes any more."""
        self.advance(now_ns)
        if self._stopped_ns is None:
            self._stopped_ns = now_ns

    def start(self) -> None:
        """Restart the guest after a failed migration. Planned writes that fell into the stop are applied now."""
        self._stopped_ns = None

    def dirty_blocks(self, stripe: slice, stopped: bool) -> Indices:
        """Numbers of the blocks of a stripe that have to be saved (again); the stop-only ones only if `stopped`."""
        last = len(self.version) if stopped else len(self.version) - self.spec.stop_only_blocks
        inside = slice(stripe.start, last, stripe.step)
        first, step = stripe.start or 0, stripe.step or 1
        return np.flatnonzero(self.version[inside] != self.saved[inside]) * step + first

    def dirty_objects(self) -> Indices:
        """Numbers of the critical objects that have to be saved (again)."""
        return np.flatnonzero(self.object_version != self.object_saved)

    def save_blocks(self, blocks: Indices) -> Int32:
        """Save these blocks; returns their versions."""
        versions = self.version[blocks]
        self.saved[blocks] = versions
        return versions

    def forget_saves(self, stripe: slice = slice(None), *, objects: bool = True) -> None:
        """All of a stripe has to be saved again: for a new session, or a driver that rereads."""
        self.saved[stripe] = -1
        if objects:
            self.object_saved.fill(-1)

    def unsave(self, blocks: Indices, objects: Indices) -> None:
        """Their saved data was dropped before anybody read it: they are dirty again."""
        self.saved[blocks] = -1
        self.object_saved[objects] = -1

    def save_objects(self, objects: Indices) -> Int32:
        """Save these critical objects; returns their versions."""
        versions = self.object_version[objects]
        self.object_saved[objects] = versions
        return versions


Place = Callable[[Indices, memoryview, NDArray[np.bool_]], None]
"""Called with numbers of blocks, the bytes of all of them, and a mask of those to be put in place."""


class Image:
    """The part of a device's state that is loaded at the target."""

    def __init__(self, device: Device) -> None:
        self.version: Int32 = np.full(device.blocks, -1, np.int32)
        self.object_version: Int32 = np.full(device.critical.objects, -1, np.int32)
        self.object_bytes = device.critical.object_bytes
        self.place: Place | None = None
        """Live, addressable blocks: copies the bytes of the loaded ones to their place."""

    @property
    def whole(self) -> bool:
        """Whether every block and every critical object was loaded."""
        return bool(np.all(self.version >= 0) and np.all(self.object_version >= 0))

    def differences(self, source: DeviceState) -> Difference:
        """Compare with the source's state as of the stop."""
        return Difference(
            blocks=int(np.count_nonzero(self.version != source.version)),
            objects=int(np.count_nonzero(self.object_version != source.object_version)),
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """Numbers of blocks and critical objects whose version is not the source's."""

    blocks: int
    objects: int

    def __bool__(self) -> bool:
        return bool(self.blocks or self.objects)
