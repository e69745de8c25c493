# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes left, dirtied and sent, sampled while a run goes on, without changing it.

A timeline knows when something was done, not how many bytes it was. Therefore a task beside the run samples its parts,
and keeps no more samples than can be drawn: when there are many, it drops every other one and takes the next ones half
as often. The time after the order to stop has samples of its own, closer together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from experiments.trace.tracks import LINK, Counter, Group, Unit, at_host
from proto_v3.timeline import Mark
from sim.clock.port import now_ns, sleep_ns
from sim.device.driver import SimDriver
from sim.device.state import DeviceState
from sim.run import VirtualRun
from sim.scenario.units import NS_PER_S, ns

MAX_SAMPLES = 4000
"""Of each of the two stretches: before and after the order to stop."""
FIRST_INTERVALS_NS = (ns(1.0), ns(0.1))
"""Between samples: before the order to stop the vCPUs, and after it."""
DIRTY_WINDOW_NS = ns(100.0)
SENT_WINDOW_NS = ns(10.0)
SENT = "bytes sent"


@dataclass(slots=True)
class _Stretch:
    interval_ns: int
    at_ns: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)

    def add(self, at_ns: int, row: list[int]) -> None:
        self.at_ns.append(at_ns)
        self.rows.append(row)
        if len(self.rows) > MAX_SAMPLES:
            self.at_ns, self.rows = self.at_ns[::2], self.rows[::2]
            self.interval_ns *= 2


class Samples:
    """The samples of one run. `watch` is an argument of sim.run.simulate."""

    def __init__(self) -> None:
        self._names: list[tuple[Group, str, Unit]] = []
        self._stretches = [_Stretch(interval_ns) for interval_ns in FIRST_INTERVALS_NS]

    async def watch(self, run: VirtualRun) -> None:
        """Take samples until the guest runs at the target, or until the guest's activity ends."""
        for driver in run.drivers:
            group = at_host("source", f"device {driver.name}")
            self._names += [(group, name, Unit.BYTES) for name in ("bytes left", "unread bytes")]
            self._names.append((group, "dirty rate", Unit.BYTES_PER_S))
        self._names += [(at_host("source", "VMM"), "RAM left", Unit.BYTES), (LINK, SENT, Unit.BYTES)]
        marks = run.timeline.marks
        while Mark.RESUMED not in marks and now_ns() <= run.scenario.horizon_ns:
            stretch = self._stretches[Mark.STOP_ORDERED in marks]
            stretch.add(now_ns(), _sample(run))
            await sleep_ns(stretch.interval_ns)

    def counters(self) -> list[Counter]:
        """All counters, in the order of the devices."""
        at_ns = np.array([at for stretch in self._stretches for at in stretch.at_ns], np.int64)
        rows = [row for stretch in self._stretches for row in stretch.rows]
        table = np.array(rows, np.int64).reshape(len(rows), len(self._names))
        counters = [Counter(*name, at_ns, table[:, at]) for at, name in enumerate(self._names)]
        return counters + [_throughput(counter) for counter in counters if counter.name == SENT]


def _sample(run: VirtualRun) -> list[int]:
    """One value for each name, in their order."""
    source = run.machines["source"]
    row = []
    for driver, state in zip(run.drivers, run.states, strict=True):
        row += [_remaining_bytes(driver, state, source.running), driver.held_bytes()[0]]
        row.append(_dirty_bytes_per_s(state) if source.running else 0)
    return [*row, source.ram.pending_bytes(), sum(channel.bytes_sent for channel in run.channels)]


def _remaining_bytes(driver: SimDriver, state: DeviceState, running: bool) -> int:
    """Bytes that would still have to be read from a device if it were stopped now, without the headers of unsaved data.

    With addressable blocks, a block that is being saved no longer counts.
    """
    dirty = state.version != state.saved
    new = state.object_version != state.object_saved
    if running:  # the guest did it, but the state has not been advanced to now
        activity = state.activity
        dirty[activity.write_blocks[state.written_bytes // state.block_bytes : activity.writes_until(now_ns())]] = True
        events = slice(state.epoch - 1, activity.reconfigurations_until(now_ns()))
        new[activity.reconfiguration_objects[events]] = True
    to_save = int(np.count_nonzero(dirty)) * state.block_bytes + int(np.count_nonzero(new)) * state.object_bytes
    return sum(driver.held_bytes()) + to_save


def _dirty_bytes_per_s(state: DeviceState) -> int:
    """The rate of distinct blocks that the guest wrote in the last DIRTY_WINDOW_NS."""
    at_ns = now_ns()
    window_ns = min(DIRTY_WINDOW_NS, at_ns)
    first, last = (state.activity.writes_until(at) for at in (at_ns - window_ns, at_ns))
    if first == last:
        return 0
    blocks = len(np.unique(state.activity.write_blocks[first:last]))
    return blocks * state.block_bytes * NS_PER_S // window_ns


def _throughput(sent: Counter) -> Counter:
    """The rate of bytes handed to the connections in the last SENT_WINDOW_NS, or since the sample before."""
    last = np.arange(len(sent.at_ns))
    first = np.searchsorted(sent.at_ns, sent.at_ns - SENT_WINDOW_NS, side="right") - 1
    first = np.clip(first, 0, np.maximum(last - 1, 0))
    took_ns = np.maximum(sent.at_ns[last] - sent.at_ns[first], 1)
    per_s = (sent.values[last] - sent.values[first]) * (NS_PER_S / took_ns)
    return Counter(sent.group, "throughput", Unit.BYTES_PER_S, sent.at_ns, per_s.astype(np.int64))
