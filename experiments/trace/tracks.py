# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each span of a run is drawn: tracks and counters in groups, in a fixed order; lanes on which nothing overlaps.

A span is drawn once, by what it uses. Firmware commands are drawn in the engines, a lane for each command under way (if
there are more commands than engines, they share them); waits for locks with the locks; frames with their connection;
everything else with the thread or stream that did it. On top are the phases of the downtime, its critical path and the
VMMs' stages. Each host has a track that shows whether the guest runs there.
"""

from __future__ import annotations

import enum
import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from proto_v3.timeline import Mark, Recorded, Resource, Timeline

Group = tuple[str, ...]
"""Names of groups, from the outermost to the innermost."""
Devices = Mapping[str, int]
"""Names of the devices, in their order, and the PF of each."""
LINK: Group = ("link",)
DOWNTIME: Group = ("downtime",)
RUNNING, STOPPING, STOPPED, STARTING = "running", "stopping", "stopped", "starting"


def at_host(side: str, inner: str) -> Group:
    """A group of the host of `source` or `target`: `guest`, `VMM`, `device NAME`, `firmware`, `locks`."""
    return (f"{side} host", inner)


class Slice(NamedTuple):
    """Something with a start and an end."""

    start_ns: int
    end_ns: int
    name: str
    category: str
    span: int | None = None
    """The number of the span that it is a part of, if any."""
    whole: bool = False
    """Whether it is the whole span."""


@dataclass(frozen=True, slots=True)
class Track:
    """Slices that are drawn together, in lanes. Slices of one lane do not overlap."""

    group: Group
    name: str
    lanes: list[list[Slice]]


class Unit(enum.StrEnum):
    """The unit of a counter."""

    BYTES = "bytes"
    BYTES_PER_S = "bytes/s"


@dataclass(frozen=True, slots=True)
class Counter:
    """A value over time."""

    group: Group
    name: str
    unit: Unit
    at_ns: NDArray[np.int64]
    """Ascending."""
    values: NDArray[np.int64]


def arranged(timeline: Timeline, devices: Devices, counters: Sequence[Counter]) -> list[Track | Counter]:
    """All tracks of a run and its counters, in the order in which they are drawn: group by group, counters first."""
    recorded = timeline.recorded()
    placed: dict[tuple[Group, str], list[Slice]] = {}
    for place, drawn in [*_downtime(timeline), *_guest(recorded), *_blocked(recorded), *_spans(recorded, devices)]:
        placed.setdefault(place, []).append(drawn)
    tracks = [Track(group, name, lanes(slices)) for (group, name), slices in placed.items()]
    return sorted([*counters, *tracks], key=lambda each: _order(each, devices))


def lanes(slices: Iterable[Slice]) -> list[list[Slice]]:
    """The least number of lanes: each slice goes to the first lane that is free at its start."""
    filled: list[list[Slice]] = []
    busy: list[tuple[int, int]] = []  # a heap: when the lane becomes free, its index
    free: list[int] = []  # a heap
    for drawn in sorted(slices, key=lambda each: (each.start_ns, each.end_ns)):
        while busy and busy[0][0] <= drawn.start_ns:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane = len(filled)
            filled.append([])
        filled[lane].append(drawn)
        heapq.heappush(busy, (drawn.end_ns, lane))
    return filled


# --- places ----------------------------------------------------------------------------------------------------------

Placed = tuple[tuple[Group, str], Slice]


def _spans(recorded: Recorded, devices: Devices) -> Iterable[Placed]:
    columns = (recorded.spans[name].tolist() for name in ("resource", "what", "track", "start_ns", "end_ns"))
    places: dict[tuple[int, int, int], tuple[Group, str, str]] = {}
    for span, (resource, what, track, start_ns, end_ns) in enumerate(zip(*columns, strict=True)):
        name = recorded.names[what]
        key = (resource, what, track)
        if key not in places:
            places[key] = place(Resource(resource), name, recorded.names[track], devices)
        group, on, drawn = places[key]
        yield (group, on), Slice(start_ns, end_ns, drawn, Resource(resource).name.lower(), span, True)


def place(resource: Resource, what: str, track: str, devices: Devices) -> tuple[Group, str, str]:
    """The group and the track of a span, from its track in the timeline and its resource; and its name there."""
    side, _, task = track.partition(" ")
    if side not in ("source", "target"):
        return LINK if resource is Resource.LINK else ("other",), track, what
    task = re.sub(r"^device (\d+)$", lambda found: _device_thread(int(found[1]), devices), task) or "main thread"
    name, _, own = task.partition(" ")
    if what == "guest runs":
        return at_host(side, "guest"), "until it reconfigures a device", what
    if resource is Resource.LOCK:
        return at_host(side, "locks"), f"{task} waits", what
    if resource in (Resource.FIRMWARE, Resource.LOAD):
        several = name in devices and len(set(devices.values())) > 1
        engines = f"engines of PF {devices[name]}" if several else "engines"
        return at_host(side, "firmware"), engines, f"{what} {task}"
    if name in devices and own:
        return at_host(side, f"device {name}"), own, what
    return at_host(side, "VMM"), task, what


def _device_thread(index: int, devices: Devices) -> str:
    """The track's name, with the device's name in place of its number."""
    return f"{list(devices)[index]} device thread" if index < len(devices) else f"device {index}"


def _order(drawn: Track | Counter, devices: Devices) -> tuple[list[int], list[str | int]]:
    """The sort key: the downtime, the source, the link, the target; in a host, the guest first."""
    outer = [DOWNTIME[0], "source host", LINK[0], "target host", "other"]
    inner = ["guest", "VMM", *(f"device {device}" for device in devices), "firmware", "locks"]
    first = ["phases", "critical path", "main thread", "vCPUs"]
    ranks = [outer.index(drawn.group[0]), *(inner.index(part) for part in drawn.group[1:])]
    if isinstance(drawn, Counter):  # counters keep their order
        return [*ranks, -1], []
    ranks.append(first.index(drawn.name) if drawn.name in first else len(first))
    return ranks, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", drawn.name)]


# --- slices that are no spans ----------------------------------------------------------------------------------------


def _downtime(timeline: Timeline) -> Iterable[Placed]:
    for stage in timeline.stages:
        name = f"{stage.name} {stage.index}"
        yield (DOWNTIME, "stages of the VMMs"), Slice(stage.start_ns, stage.end_ns, name, "stage")
    if Mark.RESUMED not in timeline.marks:  # no hand-over, so no downtime
        return
    bound = timeline.marks[Mark.STOP_ORDERED]
    for name, took_ns in timeline.phases_ns().items():
        if took_ns:
            yield (DOWNTIME, "phases"), Slice(bound, bound + took_ns, name, "phase")
        bound += took_ns
    recorded = timeline.recorded()
    for span, begin, end in timeline.critical_spans():
        what = recorded.names[recorded.spans["what"][span]]
        category = Resource(recorded.spans["resource"][span]).name.lower()
        yield (DOWNTIME, "critical path"), Slice(begin, end, what, category, span)


def _blocked(recorded: Recorded) -> Iterable[Placed]:
    for start_ns, end_ns in zip(recorded.blocked["start_ns"], recorded.blocked["end_ns"], strict=True):
        yield (LINK, "sends that wait for room"), Slice(int(start_ns), int(end_ns), "send held up", "link")


def _guest(recorded: Recorded) -> Iterable[Placed]:
    """Whether the vCPUs run at each host, from the spans of stopping and starting them and from the marks."""
    turns = {"vCPUs stop": (STOPPING, STOPPED), "vCPUs start": (STARTING, RUNNING)}
    moments = {"source": [(0, RUNNING)], "target": [(0, STOPPED)]}
    columns = (recorded.spans[name].tolist() for name in ("what", "track", "start_ns", "end_ns"))
    for what, track, start_ns, end_ns in zip(*columns, strict=True):
        if turn := turns.get(recorded.names[what]):
            during, after = turn
            moments[recorded.names[track].partition(" ")[0]] += [(start_ns, during), (end_ns, after)]
    for side, mark, state in (("source", Mark.STOP_ORDERED, STOPPED), ("target", Mark.RESUMED, RUNNING)):
        if mark in recorded.marks and state not in [reached for _, reached in moments[side]]:  # it takes no time
            moments[side].append((recorded.marks[mark][0], state))
    last_ns = int(max(recorded.spans["end_ns"], default=0))
    for side, turned in moments.items():
        turned.sort(key=lambda moment: moment[0])
        ends = [at for at, _ in turned[1:]] + [last_ns]
        for (at, state), until in zip(turned, ends, strict=True):
            if at < until:
                yield (at_host(side, "guest"), "vCPUs"), Slice(at, until, state, "guest")
