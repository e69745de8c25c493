# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the downtime of a real migration went: its phases, as the simulator has them, and its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.logs.clocks import Clocks
from experiments.logs.facts import DeviceFacts, starts, stops
from experiments.logs.pair import Pair
from proto_v3.timeline import PHASES, Mark

US_PER_MS = 1000


@dataclass(frozen=True, slots=True)
class Step:
    """Something that one side did in the downtime."""

    name: str
    device: int | None
    side: str
    begin_ms: float
    """Since the order to stop the vCPUs."""
    ms: float
    stage: str = ""
    """The column of a table of runs that is the same of a simulated run; empty: it has none."""


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The downtime of a real migration."""

    marks_ms: dict[Mark, float]
    """Since the order to stop the vCPUs. What the logs do not show is not in it."""
    steps: list[Step]

    @property
    def downtime_ms(self) -> float | None:
        """Until the guest runs at the target. None: the logs do not show it."""
        return self.marks_ms.get(Mark.RESUMED)

    @property
    def phases_ms(self) -> dict[str, float]:
        """Of each phase; they add up to the downtime. A phase whose end is not known is part of the next one."""
        phases, bound, end = {}, 0.0, self.downtime_ms
        for name, mark in PHASES.items():
            at = self.marks_ms.get(mark, bound)
            at = max(bound, at if end is None else min(at, end))
            phases[name] = at - bound
            bound = at
        return phases


def stop_us(pair: Pair) -> int:
    """When the guest was ordered to stop, on the source's clock."""
    source = pair.source
    if "src-downtime-start" in source.marks:
        return source.marks["src-downtime-start"]
    if source.stopped_us is not None:
        return source.stopped_us
    begins = [each.begin_us or each.end_us for device, _ in pair.devices for each in stops(device)]
    return min(begins)


def waterfall(pair: Pair, clocks: Clocks) -> Waterfall:
    """The phases and steps."""
    start_us = stop_us(pair)

    def ms(time_us: int, side: str = "source") -> float:
        return ((time_us if side == "source" else clocks.of_target(time_us)) - start_us) / US_PER_MS

    marks = {Mark.STOP_ORDERED: 0.0}
    for mark, side, times_us in _marks(pair):
        if times_us:
            marks[mark] = ms(max(times_us), side)
    steps = [
        Step(name, device, side, ms(begin, side), (end - begin) / US_PER_MS, stage)
        for name, device, side, begin, end, stage in _steps(pair, start_us)
    ]
    return Waterfall(marks, sorted(steps, key=lambda step: step.begin_ms))


def _marks(pair: Pair) -> Iterator[tuple[Mark, str, list[int]]]:
    """When each phase ended: the side, and the times of which the last counts."""
    here, there = [each for each, _ in pair.devices], [each for _, each in pair.devices]
    source, target = pair.source, pair.target
    stopped = [each.end_us for device in here for each in stops(device)]
    yield Mark.STOPPED, "source", _mark(source.marks, "src-vm-stopped") or stopped
    saved = [each.end_us for device in here for each in (device.save, device.save_thread) if each is not None]
    yield Mark.DRAINED, "source", _mark(source.marks, "src-iterable-saved") or saved
    yield Mark.TRANSFERRED, "target", [device.last_arrived_us for device in there if device.last_arrived_us]
    loaded = [device.pieces[-1].end_us for device in there if device.pieces]
    yield Mark.LOADED, "target", [*loaded, *(device.loaded_us for device in there if device.loaded_us)]
    yield Mark.CONFIGURED, "target", [device.config.end_us for device in there if device.config is not None]
    runs = _mark(target.marks, "dst-precopy-bh-vm-started")
    if not runs and all(device.to("RUNNING") for device in there):
        runs = [each.end_us for device in there for each in starts(device)]
    yield Mark.RESUMED, "target", runs


def _mark(marks: dict[str, int], name: str) -> list[int]:
    return [marks[name]] if name in marks else []


def _steps(pair: Pair, start_us: int) -> Iterator[tuple[str, int | None, str, int, int, str]]:
    """Name, device, side, begin, end, column."""
    source, target = pair.source, pair.target
    if "src-vm-stopped" in source.marks:
        yield "stop of vCPUs and devices", None, "source", start_us, source.marks["src-vm-stopped"], "stage_stop_0_ns"
    for at, (here, there) in enumerate(pair.devices):
        for each in stops(here):
            if each.begin_us is not None:
                yield f"to {each.target}", at, "source", each.begin_us, each.end_us, ""
        save = here.save or here.save_thread
        if save is not None:
            yield "save", at, "source", save.begin_us, save.end_us, f"stage_device_save_{at}_ns"
        yield from _load(at, there, target.moments.get("switchover start"))
        if there.config is not None:
            begin_us, end_us = there.config
            yield "config", at, "target", begin_us, end_us, f"stage_config_load_{at}_ns"
        for each in starts(there):
            if each.begin_us is not None:
                yield f"to {each.target}", at, "target", each.begin_us, each.end_us, ""
    for facts, times_us, name in ((source, source.saves_us, "save"), (target, target.loads_us, "load")):
        if "ram" in times_us:
            end_us = facts.moments["RAM done"]
            yield f"{name} of RAM", None, facts.side, end_us - times_us["ram"], end_us, f"stage_ram_{name}_0_ns"
    for sync, _ in source.final_syncs:
        yield "last sync of RAM", None, "source", sync.begin_us, sync.end_us, ""


def _load(at: int, device: DeviceFacts, switched_us: int | None) -> Iterator[tuple[str, int, str, int, int, str]]:
    """The load of what was saved after the stop."""
    if device.arrived:
        if device.pieces:
            begin_us, end_us = device.pieces[0].begin_us, device.pieces[-1].end_us
            yield "load", at, "target", begin_us, end_us, f"stage_load_total_{at}_ns"
        return
    late = [piece for piece in device.pieces if switched_us is not None and piece.begin_us >= switched_us]
    if late:
        yield "load", at, "target", late[0].begin_us, late[-1].end_us, f"stage_device_load_{at}_ns"
