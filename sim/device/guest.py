# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest does to its devices: drawn from the seed before the run, and equal for every protocol.

Writes have a constant rate and are one whole block each. They are an array of block numbers: the k-th write is at
(k + 1) / rate. Nothing runs at these times: `DeviceState` applies the writes when its state is requested.
Reconfigurations are times and, for each, the critical objects that it changes: neighbours, from one drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sim.scenario.device import Device, Writes
from sim.scenario.units import NS_PER_S, ns

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Activity:
    """The guest's activity on one device, up to the horizon.

    `write_blocks`: int32 (writes,), block numbers in order of time. `writes_per_s`: their rate.
    `reconfiguration_ns`: int64 (events,), ascending. `reconfiguration_objects`: int32 (events, objects each).
    """

    write_blocks: Int32
    writes_per_s: float
    reconfiguration_ns: Int64
    reconfiguration_objects: Int32
    during_stop_ns: Int64
    """Reconfigurations during the stop: nanoseconds after the order to stop the vCPUs, ascending."""
    during_stop_objects: Int32
    reconfiguration_blocks: Int64
    """int64 (events, 2): first block and number of blocks whose earlier data it makes invalid (`epochs = invalidate`).
    """
    during_stop_blocks: Int64

    @property
    def busy(self) -> bool:
        """Whether there is any activity."""
        return bool(len(self.write_blocks) or len(self.reconfiguration_ns) or len(self.during_stop_ns))

    def writes_until(self, at_ns: int) -> int:
        """Number of writes up to a time."""
        return min(len(self.write_blocks), int(at_ns * self.writes_per_s // NS_PER_S))

    def reconfigurations_until(self, at_ns: int) -> int:
        """Number of reconfigurations up to a time."""
        return int(np.searchsorted(self.reconfiguration_ns, at_ns, side="right"))

    def with_events_during_stop(self, ordered_ns: int) -> Activity:
        """A copy with the reconfigurations of a stop that was ordered at `ordered_ns`, in order among the others."""
        times = np.concatenate([self.reconfiguration_ns, ordered_ns + self.during_stop_ns])
        objects = np.concatenate([self.reconfiguration_objects, self.during_stop_objects])
        order = np.argsort(times, kind="stable")
        blocks = np.concatenate([self.reconfiguration_blocks, self.during_stop_blocks])
        return replace(
            self,
            reconfiguration_ns=times[order],
            reconfiguration_objects=objects[order],
            reconfiguration_blocks=blocks[order],
        )


def make_activity(device: Device, horizon_ns: int, rng: np.random.Generator) -> Activity:
    """Draw a device's activity up to the horizon."""
    writable = device.blocks - device.stop_only_blocks
    # Separate generators: adding reconfigurations does not change the writes.
    writes_rng, events_rng, ranges_rng = rng.spawn(3)
    blocks, per_s = _writes(device.writes, writable, device.block_bytes, horizon_ns, writes_rng)
    times, objects = _reconfigurations(device, horizon_ns, events_rng)
    plan = device.reconfigurations
    late = np.array(sorted(ns(at) for at in plan.during_stop_ms) if plan else [], np.int64)
    late_objects = _objects(device, len(late), events_rng)
    touched = _ranges(device, len(times), ranges_rng)
    late_touched = _ranges(device, len(late), ranges_rng)
    return Activity(blocks, per_s, times, objects, late, late_objects, touched, late_touched)


def _writes(
    writes: Writes | None, blocks: int, block_bytes: int, horizon_ns: int, rng: np.random.Generator
) -> tuple[Int32, float]:
    if writes is None or not writes.mib_per_s:
        return np.empty(0, np.int32), 0.0
    per_s = writes.bytes_per_s / block_bytes
    count = int(per_s * horizon_ns // NS_PER_S)
    if writes.pattern == "sequential":
        first = int(rng.integers(blocks))
        return ((first + np.arange(count, dtype=np.int64)) % blocks).astype(np.int32), per_s
    if writes.pattern == "uniform":
        return rng.integers(blocks, size=count, dtype=np.int32), per_s
    hot_blocks = max(1, round(blocks * writes.hot_fraction))
    hot = rng.random(count) < writes.hot_share
    chosen = rng.integers(blocks, size=count, dtype=np.int32)
    chosen[hot] = rng.integers(hot_blocks, size=int(hot.sum()), dtype=np.int32)
    return chosen, per_s


def _reconfigurations(device: Device, horizon_ns: int, rng: np.random.Generator) -> tuple[Int64, Int32]:
    plan = device.reconfigurations
    if plan is None:
        return np.empty(0, np.int64), _objects(device, 0, rng)
    if plan.at_s:
        given = (round(at * NS_PER_S) for at in plan.at_s)
        times = np.array(sorted(at for at in given if at < horizon_ns), np.int64)
    else:
        count = rng.poisson(plan.poisson_per_s * horizon_ns / NS_PER_S)
        times = np.sort(rng.integers(horizon_ns, size=count, dtype=np.int64))
    return times, _objects(device, len(times), rng)


def _objects(device: Device, events: int, rng: np.random.Generator) -> Int32:
    """int32 (events, objects each): neighbours, from one drawn at random."""
    plan = device.reconfigurations
    if plan is None:
        return np.empty((0, 1), np.int32)
    first = rng.integers(device.critical.objects, size=(events, 1))
    objects = (first + np.arange(plan.objects_each)) % device.critical.objects
    return objects.astype(np.int32)


def _ranges(device: Device, events: int, rng: np.random.Generator) -> Int64:
    """int64 (events, 2): first block and count, the range anywhere among the blocks."""
    share = device.reconfigurations.invalidates_share if device.reconfigurations else 0.0
    count = round(device.blocks * share)
    first = rng.integers(device.blocks - count + 1, size=events)
    return np.stack([first, np.full(events, count)], axis=1)
