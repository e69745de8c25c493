# SPDX-License-Identifier: GPL-2.0-or-later
"""One timeline of spans, from which the downtime, its phases and its critical path are computed.

A *span* is work on one resource, with a start, an end, and a *cause*: the span whose end allowed this one to start.
Every task has a cursor, the last span that had to end before now:

- Work moves the cursor to the span just recorded.
- A wait for data or for room moves it to the span that provided them. The cause travels with the chunk, the frame, the
  credit, or the task that is joined.
- A wait for a resource that somebody else uses (a lock, a command slot) is a span of that resource. The question is
  which resource holds the migration up, not who used it at the time.

So the causes form a chain from the end of the downtime back to its start, and this chain is the critical path. Time
that the chain does not cover is reported as `unexplained`. In virtual time it is 0, and a test checks that.

Times are integer nanoseconds of one clock. Spans are kept in columns, because a large run has millions.
"""

from __future__ import annotations

import asyncio
import enum
from array import array
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

NO_CAUSE = -1
T = TypeVar("T")
Work = tuple[Coroutine[Any, Any, None], str]
"""What a task does, and the name of the track that its spans are drawn on."""

_cursor: ContextVar[int] = ContextVar("timeline_cursor", default=NO_CAUSE)
_track: ContextVar[str] = ContextVar("timeline_track", default="main")


class Resource(enum.IntEnum):
    """What a span uses; the classes of the critical path."""

    FIRMWARE = 0  # SAVE in the source's firmware, its queue included
    LOCK = 1  # waiting for a lock of the driver
    COPY = 2  # copies to or from user space, and the cost of the calls
    LINK = 3  # serialisation, propagation and queueing on the network
    LOAD = 4  # LOAD in the target's firmware, its queue included
    SETUP = 5  # set-up of critical objects at the target
    RAM = 6  # the VMM preparing pages of guest RAM
    FIXED = 7  # stop, state transitions, config load, resume


class Mark(enum.StrEnum):
    """Moments between the phases of the downtime, in order."""

    STOP_ORDERED = "stop_ordered"  # the order to stop the vCPUs: the downtime starts
    STOPPED = "stopped"  # vCPUs stopped, every device in STOP_COPY
    DRAINED = "drained"  # the source read the last byte of RAM and devices
    TRANSFERRED = "transferred"  # the last byte reached the target
    LOADED = "loaded"  # the last device's data is loaded
    CONFIGURED = "configured"  # the last device's config is loaded
    RESUMED = "resumed"  # the device runs at the target: the downtime ends


PHASES: dict[str, Mark] = {
    "stop": Mark.STOPPED,
    "drain": Mark.DRAINED,
    "transfer": Mark.TRANSFERRED,
    "load": Mark.LOADED,
    "config": Mark.CONFIGURED,
    "resume": Mark.RESUMED,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A named part of one side's work, as a VMM would trace it (QEMU's vmstate_downtime_save and _load)."""

    name: str
    index: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class PathStep:
    """A piece of the critical path: `what` ran on `track`, using `resource`."""

    resource: Resource
    what: str
    track: str
    start_ns: int
    end_ns: int


SPAN_COLUMNS = {"resource": "b", "what": "h", "track": "h", "start_ns": "q", "end_ns": "q", "cause": "q"}
"""The columns of spans and their types, named as in `array` and numpy. `what` and `track` are indices of names."""
BLOCKED_COLUMNS = {"start_ns": "q", "end_ns": "q"}


@dataclass(frozen=True, slots=True)
class Recorded:
    """The contents of a timeline as data, to send them elsewhere or merge them with those of another."""

    names: list[str]
    spans: dict[str, NDArray[Any]]
    """Keys and types: SPAN_COLUMNS. The cause of a span is the index of a span, or NO_CAUSE."""
    blocked: dict[str, NDArray[Any]]  # keys and types: BLOCKED_COLUMNS
    marks: dict[Mark, tuple[int, int]]  # time and cause
    stages: list[Stage]


class _Numbers(dict[str, int]):
    """Names by number, in the order in which they were first asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self)
        return number


class Timeline:
    """Spans, marks and stages of one run. `now_ns` is the clock of all times."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self.marks: dict[Mark, int] = {}
        self.stages: list[Stage] = []
        self._mark_cause: dict[Mark, int] = {}
        self._names = _Numbers()
        self._spans = {name: array(code) for name, code in SPAN_COLUMNS.items()}
        self._blocked = {name: array(code) for name, code in BLOCKED_COLUMNS.items()}
        self._appends = tuple(column.append for column in self._spans.values())  # bound once: span() is called most

    @classmethod
    def of(cls, recorded: Recorded, now_ns: Callable[[], int]) -> Self:
        """A timeline with these contents. They are not checked: indices must be in range, and causes form no cycle."""
        timeline = cls(now_ns)
        timeline._names.update((name, index) for index, name in enumerate(recorded.names))
        for columns, values in ((timeline._spans, recorded.spans), (timeline._blocked, recorded.blocked)):
            for name, column in columns.items():
                column.frombytes(values[name].astype(column.typecode, copy=False).tobytes())
        timeline.marks = {mark: at_ns for mark, (at_ns, _) in recorded.marks.items()}
        timeline._mark_cause = {mark: cause for mark, (_, cause) in recorded.marks.items()}
        timeline.stages = list(recorded.stages)
        return timeline

    def recorded(self) -> Recorded:
        """A copy of everything recorded up to now."""
        return Recorded(
            names=list(self._names),
            spans={name: np.array(column) for name, column in self._spans.items()},
            blocked={name: np.array(column) for name, column in self._blocked.items()},
            marks={mark: (at_ns, self._mark_cause[mark]) for mark, at_ns in self.marks.items()},
            stages=list(self.stages),
        )

    def __len__(self) -> int:
        return len(self._spans["cause"])

    # --- recording -------------------------------------------------------------------------------------------------

    def work(self, resource: Resource, what: str, start_ns: int, end_ns: int | None = None) -> None:
        """Record work of the current task, from `start_ns` to now or `end_ns`. It becomes the task's cursor."""
        _cursor.set(self.span(resource, what, start_ns, self.now_ns() if end_ns is None else end_ns))

    def span(self, resource: Resource, what: str, start_ns: int, end_ns: int, track: str = "") -> int:
        """Record a span that the current task caused and does not wait for (a frame on its way). The cursor stays."""
        names = self._names
        add_resource, add_what, add_track, add_start, add_end, add_cause = self._appends
        add_resource(resource)
        add_what(names[what])
        add_track(names[track or _track.get()])
        add_start(start_ns)
        add_end(end_ns)
        add_cause(_cursor.get())
        return len(self._spans["cause"]) - 1

    def blocked(self, start_ns: int) -> None:
        """Record that a send waited from `start_ns` until now for room in a full connection."""
        self._blocked["start_ns"].append(start_ns)
        self._blocked["end_ns"].append(self.now_ns())

    def mark(self, mark: Mark) -> None:
        """Record that a phase ends now. If marked more than once (by each of several streams), the last time holds."""
        self.marks[mark] = self.now_ns()
        self._mark_cause[mark] = _cursor.get()

    def stage(self, name: str, start_ns: int, index: int = 0) -> None:
        """Record a stage of a VMM's work, from `start_ns` to now."""
        self.stages.append(Stage(name, index, start_ns, self.now_ns()))

    # --- reading ---------------------------------------------------------------------------------------------------

    @property
    def downtime_ns(self) -> int:
        """From the order to stop the vCPUs to the device running at the target. KeyError if there was no hand-over."""
        return self.marks[Mark.RESUMED] - self.marks[Mark.STOP_ORDERED]

    def phases_ns(self) -> dict[str, int]:
        """Nanoseconds of each phase of the downtime. Their sum is the downtime.

        A phase ends at its mark. If its mark is before the end of the previous phase (with parallel streams one
        device's config may load while another still transfers), it ends there and takes no time of its own.
        """
        bound = self.marks[Mark.STOP_ORDERED]
        end = self.marks[Mark.RESUMED]
        phases = {}
        for name, mark in PHASES.items():
            at = min(max(bound, self.marks[mark]), end)
            phases[name] = at - bound
            bound = at
        return phases

    def critical_spans(self) -> list[tuple[int, int, int]]:
        """The chain of causes through the downtime, in order of time: of each span its index, start and end there."""
        start, until = self.marks[Mark.STOP_ORDERED], self.marks[Mark.RESUMED]
        chain: list[tuple[int, int, int]] = []
        span = self._mark_cause[Mark.RESUMED]
        while span != NO_CAUSE and until > start:
            begin, end = max(self._spans["start_ns"][span], start), min(self._spans["end_ns"][span], until)
            if begin < end:
                chain.append((span, begin, end))
                until = begin
            span = self._spans["cause"][span]
        return chain[::-1]

    def critical_path(self) -> list[PathStep]:
        """The chain of causes through the downtime, in order of time."""
        names = list(self._names)
        resource, what, track = (self._spans[column] for column in ("resource", "what", "track"))
        return [
            PathStep(Resource(resource[span]), names[what[span]], names[track[span]], begin, end)
            for span, begin, end in self.critical_spans()
        ]

    def critical_path_ns(self) -> dict[str, int]:
        """Nanoseconds of the critical path by resource, `unexplained` last. Their sum is the downtime."""
        shares = {resource.name.lower(): 0 for resource in Resource}
        names, resource = list(shares), self._spans["resource"]
        for span, begin, end in self.critical_spans():
            shares[names[resource[span]]] += end - begin
        shares["unexplained"] = self.downtime_ns - sum(shares.values())
        return shares

    def in_downtime_ns(self, resource: Resource) -> int:
        """Nanoseconds of a resource's work inside the downtime, on the critical path or not."""
        return int(self._inside_downtime(self._spans)[np.array(self._spans["resource"]) == resource].sum())

    def blocked_in_downtime_ns(self) -> int:
        """Nanoseconds that sends waited for full connections in the downtime, summed over connections."""
        return int(self._inside_downtime(self._blocked).sum())

    def _inside_downtime(self, columns: dict[str, array[int]]) -> NDArray[np.int64]:
        start_ns, end_ns = np.array(columns["start_ns"]), np.array(columns["end_ns"])
        begin, until = self.marks[Mark.STOP_ORDERED], self.marks[Mark.RESUMED]
        inside: NDArray[np.int64] = np.minimum(end_ns, until) - np.maximum(start_ns, begin)
        return inside.clip(min=0)

    def digest(self) -> str:
        """A fingerprint of everything recorded: equal for two runs that did the same at the same times."""
        digest = sha256(repr((self.marks, self._mark_cause, self.stages, self._names)).encode())
        for column in (*self._spans.values(), *self._blocked.values()):
            digest.update(column.tobytes())
        return digest.hexdigest()


# --- the cursor ------------------------------------------------------------------------------------------------------


def cause() -> int:
    """The current task's cursor, to pass on with whatever another task waits for."""
    return _cursor.get()


def caused_by(span: int) -> None:
    """Record that the current task waited, and that `span` ended the wait."""
    _cursor.set(span)


def on_track(name: str) -> None:
    """Draw the current task's spans on this track from now on."""
    _track.set(name)


class Join:
    """A TaskGroup. If its end has to be waited for, the child that finished last is the cause.

    A cancelled child finished nothing and causes nothing. Each child runs on a track of its own name.
    Errors and cancellation are those of asyncio.TaskGroup.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._last: int | None = None

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last = None
        await self._group.__aexit__(kind, error, trace)
        if self._last is not None:
            _cursor.set(self._last)

    def start(self, work: Coroutine[Any, Any, T], track: str) -> asyncio.Task[T]:
        """Start a child task."""
        task = self._group.create_task(self._run(work, track), name=track)
        task.add_done_callback(lambda _: work.close())  # if the task is cancelled before it starts, `work` never ran
        return task

    async def _run(self, work: Coroutine[Any, Any, T], track: str) -> T:
        _track.set(track)
        result = await work
        self._last = _cursor.get()
        return result
