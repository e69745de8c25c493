"""The timelines of several processes, each on its own clock, become one.

A process records in a `ProcessTimeline`. What goes from one process to another is an *edge*: a named counter that
only grows (bytes given on a data fd, frames sent on a connection, calls made on a control socket, room made for a
sender). The giver says when the edge reached a count, and which span made it; the taker, that it waited for a
count. `merge` finds for each wait who ended it: the wait then starts when what it waited for was given, and its
cause is the giver's span. So the chain of causes leads through all processes. A wait for what was there already is
the taker's own time, and stays as it is.

Why following the causes ends, whatever the clocks say. Call the latest end of a part's spans so far a span's `latest`.
A cause in the same part was recorded before, so its `latest` is not larger. A wait is given a cause in another part
only if that one's `latest` is smaller; or the same, but then the cause is the first of its part to have it, and not a
wait: from there, the next step leads to a smaller one. So no step goes up, none goes round.

A part may come from another host: whatever is wrong with it is refused with PeerProtocolError.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from reprlib import repr as short
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from proto_v3.errors import LocalProtocolError, PeerProtocolError
from proto_v3.timeline import (
    BLOCKED_COLUMNS,
    NO_CAUSE,
    SPAN_COLUMNS,
    Mark,
    Recorded,
    Resource,
    Stage,
    Timeline,
    cause,
    caused_by,
)

Ints = NDArray[np.int64]
Table = dict[str, NDArray[Any]]

GAVE_COLUMNS = {"edge": "h", "count": "q", "at_ns": "q", "by": "q"}
GOT_COLUMNS = {"edge": "h", "count": "q", "span": "q"}
TABLES = {"spans": SPAN_COLUMNS, "blocked": BLOCKED_COLUMNS, "gave": GAVE_COLUMNS, "got": GOT_COLUMNS}
KEYS = {"names", "edges", "marks", "stages", *TABLES}

MAX_ROWS = 20_000_000
"""Of each table: 580 MB of spans."""
MAX_NAMES = 8_000
"""Of spans and tracks, and of edges, in a part: those of four parts fit a column of names."""
MAX_ALL_NAMES = 2**15
MAX_NAME_CHARS = 200
MAX_STAGES = 100_000
MAX_INDEX = 2**31
MAX_TIME_NS = 2**60
"""36 years; sums of four of these fit 64 bits."""
BACK = 8
"""How many causes back a giver is looked for that had ended when the wait did."""
NEVER = 2**63 - 1
LATEST = 0
"""For `got`: not a certain count, but what was given last before the wait ended. For room that others made."""


class ProcessTimeline(Timeline):
    """The timeline of one process, on its own clock."""

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        super().__init__(now_ns)
        self._edges: dict[str, int] = {}
        self._reached: list[int] = []
        self._gave: dict[str, array[int]] = {name: array(kind) for name, kind in GAVE_COLUMNS.items()}
        self._got: dict[str, array[int]] = {name: array(kind) for name, kind in GOT_COLUMNS.items()}

    def gave(self, edge: str, count: int, at_ns: int | None = None) -> None:
        """The current task's cursor is what made the edge reach `count`, now or, if it is told later, at `at_ns`.

        Nothing new if it had reached it before. To be said of the moment before the bytes go, for they may be there
        before the call returns: what lies between is the taker's wait, on the resource that it names.
        """
        number = self._edge(edge)
        if count <= self._reached[number]:
            return
        self._reached[number] = count
        gave = self._gave
        gave["edge"].append(number)
        gave["count"].append(count)
        gave["at_ns"].append(self.now_ns() if at_ns is None else at_ns)
        gave["by"].append(cause())

    def got(
        self, resource: Resource, what: str, edge: str, count: int, start_ns: int, end_ns: int | None = None
    ) -> None:
        """Record that the current task waited since `start_ns`, until now if no end is given, for another process to
        make the edge reach `count`, or for anything that it gave (LATEST).

        It becomes the task's cursor. Its cause is the task's own for now; `merge` finds the giver.
        """
        span = self.span(resource, what, start_ns, self.now_ns() if end_ns is None else end_ns)
        caused_by(span)
        got = self._got
        got["edge"].append(self._edge(edge))
        got["count"].append(count)
        got["span"].append(span)

    def export(self) -> dict[str, Any]:
        """All of it, for `merge` in another process: what msgpack can carry; columns are little-endian bytes."""
        told = self.recorded()
        tables: dict[str, dict[str, Any]] = {
            "spans": told.spans,
            "blocked": told.blocked,
            "gave": self._gave,
            "got": self._got,
        }
        return {
            "names": told.names,
            "edges": list(self._edges),
            "marks": {str(mark): list(at) for mark, at in told.marks.items()},
            "stages": [[stage.name, stage.index, stage.start_ns, stage.end_ns] for stage in told.stages],
            **{name: _bytes(tables[name], columns) for name, columns in TABLES.items()},
        }

    def _edge(self, name: str) -> int:
        number = self._edges.setdefault(name, len(self._edges))
        if number == len(self._reached):
            self._reached.append(-1)
        return number


def merge(parts: Sequence[tuple[dict[str, Any], int]], start_ns: int) -> Timeline:
    """One timeline of several parts, as `ProcessTimeline.export` gave them, in nanoseconds since `start_ns` of the
    first's clock.

    Beside each part: the nanoseconds to add to its times to get to the first one's clock. What was before the start
    has times below zero. A mark that several parts have is the latest of them. Nothing can be recorded any more.
    Raises PeerProtocolError if a part is malformed.
    """
    read: list[_Read] = []
    names: dict[str, int] = {}
    for part, offset_ns in parts:
        if abs(offset_ns - start_ns) > MAX_TIME_NS:
            raise _malformed("clock", offset_ns)
        one = _Read.of(part)
        read.append(one.moved(offset_ns - start_ns, sum(len(other.spans["cause"]) for other in read), names))
    if len(names) > MAX_ALL_NAMES:
        raise _malformed("number of names", len(names))
    spans = _concatenated([part.spans for part in read], SPAN_COLUMNS)
    _resolve(spans, read)
    recorded = Recorded(
        names=list(names),
        spans=spans,
        blocked=_concatenated([part.blocked for part in read], BLOCKED_COLUMNS),
        marks=_latest_marks(read),
        stages=sorted((stage for part in read for stage in part.stages), key=lambda stage: stage.end_ns),
    )
    return Timeline.of(recorded, _over)


def _latest_marks(parts: Sequence[_Read]) -> dict[Mark, tuple[int, int]]:
    marks: dict[Mark, tuple[int, int]] = {}
    for part in parts:
        for mark, at in part.marks.items():
            if mark not in marks or at[0] > marks[mark][0]:
                marks[mark] = at
    return marks


def _over() -> NoReturn:
    raise LocalProtocolError("a merged timeline is about what is over: nothing can be recorded in it")


def _bytes(table: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    told = {name: np.asarray(table[name]).astype(f"<{kind}").tobytes() for name, kind in columns.items()}
    return {"rows": len(table[next(iter(columns))]), **told}


def _concatenated(tables: Sequence[Table], columns: dict[str, str]) -> Table:
    return {
        name: np.concatenate([np.empty(0, kind), *(table[name] for table in tables)]) for name, kind in columns.items()
    }


# --- who gave what was waited for ------------------------------------------------------------------------------------


def _resolve(spans: Table, parts: Sequence[_Read]) -> None:
    """Give each wait the start and the cause that it has by what others gave, in place."""
    latest_in = [np.maximum.accumulate(part.spans["end_ns"]) for part in parts]
    latest = np.concatenate([np.empty(0, np.int64), *latest_in])
    first = np.concatenate([np.empty(0, np.bool_), *(np.diff(ends, prepend=ends[:1] - 1) > 0 for ends in latest_in)])
    for part in parts:
        first[part.got["span"]] = False
    own_cause = spans["cause"].copy()

    def before(giver: Ints, wait: Ints) -> NDArray[np.bool_]:
        """See the top of the file. NO_CAUSE is before nothing."""
        same = (latest[giver] == latest[wait]) & first[giver]
        earlier: NDArray[np.bool_] = (giver != NO_CAUSE) & ((latest[giver] < latest[wait]) | same)
        return earlier

    for number, part in enumerate(parts):
        ended_ns = spans["end_ns"][part.got["span"]]
        given_ns, by = _givers(part, ended_ns, [*parts[:number], *parts[number + 1 :]])
        waited = given_ns > spans["start_ns"][part.got["span"]]
        waited &= given_ns != NEVER
        wait, given_ns, by = part.got["span"][waited], given_ns[waited], by[waited]
        uncaused = by == NO_CAUSE
        # A giver that recorded its sending when it was through with it, or whose clock is a little late, seems to have
        # ended after the wait: then what it did before that is the cause.
        for _ in range(BACK):
            late = (by != NO_CAUSE) & ~before(by, wait)
            by[late] = own_cause[by[late]]
        known = before(by, wait)
        begins = known | uncaused  # of a giver that nothing caused, the time is known at least
        spans["start_ns"][wait[begins]] = np.minimum(given_ns, spans["end_ns"][wait])[begins]
        spans["cause"][wait[known]] = by[known]


def _givers(taker: _Read, ended_ns: Ints, others: Sequence[_Read]) -> tuple[Ints, Ints]:
    """For each wait of a part: when the first of the others gave what it waited for, or NEVER, and which span did."""
    rows_of = dict(_by_edge(taker.got, taker.edges))
    given_ns: Ints = np.full(len(taker.got["span"]), NEVER, np.int64)
    by: Ints = np.full(len(given_ns), NO_CAUSE, np.int64)
    for other in others:
        for edge, gave in _by_edge(other.gave, other.edges):
            rows = rows_of.get(edge)
            if rows is None:
                continue
            reached = np.searchsorted(other.gave["count"][gave], taker.got["count"][rows])
            last = np.searchsorted(np.maximum.accumulate(other.gave["at_ns"][gave]), ended_ns[rows], "right") - 1
            reached = np.where(taker.got["count"][rows] == LATEST, last, reached)
            found = (reached >= 0) & (reached < len(gave))
            rows, giving = rows[found], gave[reached[found]]
            sooner = other.gave["at_ns"][giving] < given_ns[rows]
            given_ns[rows[sooner]] = other.gave["at_ns"][giving[sooner]]
            by[rows[sooner]] = other.gave["by"][giving[sooner]]
    return given_ns, by


def _by_edge(table: Table, edges: Sequence[str]) -> Iterator[tuple[str, Ints]]:
    """Each edge that occurs, and its rows, in the order in which they were recorded."""
    order = np.argsort(table["edge"], kind="stable")
    bounds = np.searchsorted(table["edge"][order], np.arange(len(edges) + 1))
    for edge, (begin, end) in zip(edges, pairwise(bounds.tolist()), strict=True):
        if begin < end:
            yield edge, order[begin:end]


# --- reading what may come from another host -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Read:
    """A part, as it was told, checked."""

    names: list[str]
    edges: list[str]
    marks: dict[Mark, tuple[int, int]]
    stages: list[Stage]
    spans: Table
    blocked: Table
    gave: Table
    got: Table

    @classmethod
    def of(cls, told: object) -> _Read:
        """PeerProtocolError if it is malformed."""
        if not isinstance(told, dict) or set(told) != KEYS:
            raise _malformed("keys", list(told) if isinstance(told, dict) else told)
        tables = {name: _table(told[name], columns, name) for name, columns in TABLES.items()}
        spans, gave, got = tables["spans"], tables["gave"], tables["got"]
        count = len(spans["cause"])
        names, edges = _names(told["names"], "names"), _names(told["edges"], "edges")
        _check_within(spans["resource"], min(Resource), max(Resource) + 1, "resource")
        for column in ("what", "track"):
            _check_within(spans[column], 0, len(names), column)
        _check_within(spans["cause"], NO_CAUSE, np.arange(count), "cause")  # each came before what it caused
        _check_within(gave["by"], NO_CAUSE, count, "by")
        _check_within(got["span"], 0, count, "span")
        if np.any(np.diff(got["span"]) <= 0):
            raise _malformed("order of", "got")
        for table, told_of in ((gave, "gave"), (got, "got")):
            _check_within(table["edge"], 0, len(edges), f"edge of {told_of}")
            _check_within(table["count"], 0, NEVER, f"count of {told_of}")
        for edge, rows in _by_edge(gave, edges):
            if np.any(np.diff(gave["count"][rows]) < 0):
                raise _malformed("edge, for it shrinks:", edge)
        return cls(
            names=names, edges=edges, marks=_marks(told["marks"], count), stages=_stages(told["stages"]), **tables
        )

    def moved(self, by_ns: int, base: int, names: dict[str, int]) -> _Read:
        """Its times moved, its spans counted from `base`, its names numbered as in `names`, which grows."""
        number = np.array([names.setdefault(name, len(names)) for name in self.names], np.int32)
        spans = self.spans
        return _Read(
            names=self.names,
            edges=self.edges,
            marks={
                mark: (at_ns + by_ns, caused + base if caused != NO_CAUSE else NO_CAUSE)
                for mark, (at_ns, caused) in self.marks.items()
            },
            stages=[Stage(s.name, s.index, s.start_ns + by_ns, s.end_ns + by_ns) for s in self.stages],
            spans={
                "resource": spans["resource"],
                "what": number[spans["what"]],
                "track": number[spans["track"]],
                "start_ns": spans["start_ns"] + by_ns,
                "end_ns": spans["end_ns"] + by_ns,
                "cause": _counted(spans["cause"], base),
            },
            blocked={column: times + by_ns for column, times in self.blocked.items()},
            gave={**self.gave, "at_ns": self.gave["at_ns"] + by_ns, "by": _counted(self.gave["by"], base)},
            got={**self.got, "span": self.got["span"] + base},
        )


def _counted(index: Ints, base: int) -> Ints:
    return np.where(index == NO_CAUSE, NO_CAUSE, index + base)


def _malformed(what: str, value: object) -> PeerProtocolError:
    return PeerProtocolError(f"the timeline of a process has a wrong {what} {short(value)}")


def _table(told: object, columns: dict[str, str], name: str) -> Table:
    """The columns, all of the promised length, with times that can be; no span or stretch ends before it starts."""
    if not isinstance(told, dict) or set(told) != {"rows", *columns}:
        raise _malformed(name, told)
    rows = _whole(told["rows"], 0, MAX_ROWS, f"number of rows of {name}")
    table: Table = {}
    for column, kind in columns.items():
        data = told[column]
        if not isinstance(data, bytes) or len(data) != rows * np.dtype(kind).itemsize:
            raise _malformed(f"column of {rows} {name}: {column}", data)
        table[column] = np.frombuffer(data, f"<{kind}").astype(kind)
        if column.endswith("_ns"):
            _check_within(table[column], -MAX_TIME_NS, MAX_TIME_NS, column)
    if "end_ns" in columns and np.any(table["end_ns"] < table["start_ns"]):
        raise _malformed("end in", name)
    return table


def _check_within(values: NDArray[Any], low: int, end: int | Ints, what: str) -> None:
    wrong = (values < low) | (values >= end)
    if wrong.any():
        raise _malformed(what, int(values[wrong][0]))


def _whole(told: object, low: int, high: int, what: str) -> int:
    if type(told) is not int or not low <= told <= high:
        raise _malformed(what, told)
    return told


def _name(told: object, what: str) -> str:
    if not isinstance(told, str) or len(told) > MAX_NAME_CHARS or not told.isprintable():
        raise _malformed(what, told)
    return told


def _names(told: object, what: str) -> list[str]:
    if not isinstance(told, list) or len(told) > MAX_NAMES:
        raise _malformed(what, told)
    names = [_name(name, what) for name in told]
    if len(set(names)) < len(names):
        raise _malformed(f"{what}: one is twice in", names)
    return names


def _marks(told: object, count: int) -> dict[Mark, tuple[int, int]]:
    if not isinstance(told, dict) or not set(told) <= set(Mark):
        raise _malformed("marks", told)
    marks = {}
    for name, at in told.items():
        if not isinstance(at, list) or len(at) != 2:
            raise _malformed(name, at)
        at_ns = _whole(at[0], -MAX_TIME_NS, MAX_TIME_NS, name)
        marks[Mark(name)] = (at_ns, _whole(at[1], NO_CAUSE, count - 1, f"cause of {name}"))
    return marks


def _stages(told: object) -> list[Stage]:
    if not isinstance(told, list) or len(told) > MAX_STAGES:
        raise _malformed("stages", told)
    stages = []
    for stage in told:
        if not isinstance(stage, list) or len(stage) != 4:
            raise _malformed("stage", stage)
        name, index = _name(stage[0], "stage"), _whole(stage[1], 0, MAX_INDEX, "stage's index")
        start_ns = _whole(stage[2], -MAX_TIME_NS, MAX_TIME_NS, "stage's start")
        stages.append(Stage(name, index, start_ns, _whole(stage[3], start_ns, MAX_TIME_NS, "stage's end")))
    return stages
