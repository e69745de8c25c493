# SPDX-License-Identifier: GPL-2.0-or-later
"""Merge the timelines of several processes into one: a Lamport-clock merge with clock error.

The processes count nanoseconds from the same moment, as far as their clocks are known to each other.

A process records in a `ProcessTimeline`. What goes from one process to another is an *edge*: a named counter that only
grows (bytes written to a data fd, frames sent on a connection, calls made on a control socket, room made for a sender).
The sender records when it made the edge reach a count, and its span that did; the receiver records that it waited for a
count. `merge` finds the send that ended each wait. The wait then starts when that was sent, and its cause is the
sender's span, so the chain of causes leads through all processes. A wait for what was there already stays as it is: it
is the receiver's own time.

An example. Each process records its part of the upper table; the lower one is merged (times in ns, on one clock):

    process   span     start   end   cause       edge
    source    SAVE         0    20   -           sent: `frames` is 1, at 20, by SAVE
    target    frame        5    26   -           waited for: `frames` to be 1
    target    LOAD        26    40   frame

    target    frame       20    26   SAVE        on the path from 0 to 40: SAVE 20 ns, frame 6 ns, LOAD 14 ns

A send that is recorded when it returns, or a sender's clock that is late by a little, can make the sender's span end
after the wait that it ended. Had SAVE ended at 30 here, the cause of the frame would be what SAVE itself was caused by,
or what that was caused by, up to BACK steps: the first of them that had ended.

Why following the causes ends, whatever the clocks say. Let `latest` of a span be the latest end of all spans that its
process had recorded up to it, itself included. A cause in the same process was recorded before, so its `latest` is not
larger. A wait is given a cause in another process only if the cause's `latest` is smaller; or equal, but then the cause
is the first span of its process that has this `latest`, and not a wait: so the step after it leads to a smaller one. No
step increases `latest`, and no chain of steps with an equal `latest` comes back to a span.

A timeline may come from another host: whatever is wrong with it is refused with PeerProtocolError.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
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

MARKS = tuple(Mark)
TABLES = {
    "spans": SPAN_COLUMNS,
    "blocked": BLOCKED_COLUMNS,
    "marks": {"mark": "b", "at_ns": "q", "cause": "q"},
    "stages": {"stage": "h", "index": "q", "start_ns": "q", "end_ns": "q"},
    "sent": {"edge": "h", "count": "q", "at_ns": "q", "span": "q"},
    "waits": {"edge": "h", "count": "q", "span": "q"},
}
"""The columns of what a process exports. `what` and `track` count in its `names`, `stage` in its `stage_names`,
`edge` in its `edges`, `mark` in MARKS; `cause` and `span` count its spans."""
NAMES = ("names", "stage_names", "edges")

MAX_ROWS = 20_000_000
"""Of each table: 580 MB of spans."""
MAX_STAGES = 100_000
MAX_SPANS = 300_000
"""The most that one process records of what a source sends, spans and stages together: some 20 MB. It fits a result
(sim.live.tcp.messages)."""
MAX_NAMES = 8_000
"""Of each kind in a part: the names of four parts fit a column of names."""
MAX_ALL_NAMES = 2**15
MAX_NAME_CHARS = 200
MAX_INDEX = 2**31
MAX_COUNT = 2**63 - 1
MAX_TIME_NS = 2**60
"""36 years."""
BACK = 8
"""The most steps back along the sender's causes, in search of a span that ended before the wait did."""
LATEST = 0
"""As a count that is waited for: whatever was sent last before the wait ended. For room that others made."""


class ProcessTimeline(Timeline):
    """The timeline of one process."""

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        super().__init__(now_ns)
        self._edges: dict[str, int] = {}
        self._reached: list[int] = []
        """The count of each edge."""
        self._sent: dict[str, array[int]] = {name: array(kind) for name, kind in TABLES["sent"].items()}
        self._waits: dict[str, array[int]] = {name: array(kind) for name, kind in TABLES["waits"].items()}

    @property
    def full(self) -> bool:
        """Whether it has as much as one process may record. Who receives must take no more then."""
        return len(self) + len(self.stages) >= MAX_SPANS

    def sent(self, edge: str, count: int, at_ns: int | None = None) -> None:
        """Record that the current task's cursor made the edge reach `count`, now or, if it is recorded later, `at_ns`.

        A count that the edge had reached before is not recorded. Give the moment before the bytes go, for they may
        arrive before the call returns: what lies between is the receiver's wait, on the resource that it names.
        """
        number = self._edge(edge)
        if count <= self._reached[number]:
            return
        self._reached[number] = count
        sent = self._sent
        sent["edge"].append(number)
        sent["count"].append(count)
        sent["at_ns"].append(self.now_ns() if at_ns is None else at_ns)
        sent["span"].append(cause())

    def waited_for(
        self, resource: Resource, what: str, edge: str, count: int, start_ns: int, end_ns: int | None = None
    ) -> None:
        """Record that the current task waited from `start_ns` to `end_ns`, or until now, for another process to make
        the edge reach `count`, or to send anything (LATEST).

        The wait becomes the task's cursor. Its cause is the task's own for now; `merge` finds the sender.
        """
        span = self.span(resource, what, start_ns, self.now_ns() if end_ns is None else end_ns)
        caused_by(span)
        waits = self._waits
        waits["edge"].append(self._edge(edge))
        waits["count"].append(count)
        waits["span"].append(span)

    def export(self) -> dict[str, Any]:
        """Everything, for `merge` in another process, as msgpack can carry it. Columns are little-endian bytes."""
        recorded = self.recorded()
        stages = dict.fromkeys(stage.name for stage in recorded.stages)
        number = {name: at for at, name in enumerate(stages)}
        tables: dict[str, dict[str, Any]] = {
            "spans": recorded.spans,
            "blocked": recorded.blocked,
            "marks": _by_column("marks", [(MARKS.index(mark), *at) for mark, at in recorded.marks.items()]),
            "stages": _by_column("stages", [(number[s.name], s.index, s.start_ns, s.end_ns) for s in recorded.stages]),
            "sent": self._sent,
            "waits": self._waits,
        }
        return {
            "names": recorded.names,
            "stage_names": list(stages),
            "edges": list(self._edges),
            **{name: _bytes(table, TABLES[name]) for name, table in tables.items()},
        }

    def _edge(self, name: str) -> int:
        number = self._edges.setdefault(name, len(self._edges))
        if number == len(self._reached):
            self._reached.append(-1)
        return number


def _bytes(table: dict[str, Any], kinds: dict[str, str]) -> dict[str, bytes]:
    return {name: np.asarray(table[name]).astype(f"<{kind}").tobytes() for name, kind in kinds.items()}


def _by_column(table: str, rows: Sequence[tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: [row[at] for row in rows] for at, name in enumerate(TABLES[table])}


# --- merging ----------------------------------------------------------------------------------------------------------


def merge(parts: Iterable[dict[str, Any]]) -> Timeline:
    """One timeline of several parts: what `ProcessTimeline.export` returned in each process.

    Of a mark that several parts have, the latest counts. Nothing can be recorded in the merged timeline. Raises
    PeerProtocolError if a part is malformed.
    """
    records: list[ProcessRecord] = []
    names: dict[str, int] = {}
    edges: dict[str, int] = {}
    spans_before = 0
    for part in parts:
        record = ProcessRecord.of(part)
        record.renumber(spans_before, names, edges)
        records.append(record)
        spans_before += len(record.tables["spans"]["cause"])
    if len(names) > MAX_ALL_NAMES:
        raise _malformed("number of names", len(names))
    spans = _concatenated("spans", records)
    _resolve_waits(spans, records)
    stages = [stage for record in records for stage in record.stages()]
    recorded = Recorded(
        names=list(names),
        spans=spans,
        blocked=_concatenated("blocked", records),
        marks=_latest_marks(records),
        stages=sorted(stages, key=lambda stage: stage.end_ns),
    )
    return Timeline.of(recorded, _no_clock)


def _latest_marks(records: Iterable[ProcessRecord]) -> dict[Mark, tuple[int, int]]:
    marks: dict[Mark, tuple[int, int]] = {}
    for record in records:
        for mark, at in record.marks():
            if mark not in marks or at[0] > marks[mark][0]:
                marks[mark] = at
    return marks


def _no_clock() -> NoReturn:
    raise LocalProtocolError("a merged timeline is about what is over: nothing can be recorded in it")


def _concatenated(table: str, records: Iterable[ProcessRecord]) -> Table:
    return {
        name: np.concatenate([np.empty(0, kind), *(record.tables[table][name] for record in records)])
        for name, kind in TABLES[table].items()
    }


def _resolve_waits(spans: Table, records: Sequence[ProcessRecord]) -> None:
    """Give each wait the start and the cause that it has by what others sent, in place."""
    wait, sent_ns, sender = _senders(spans, records)
    is_before = _order(spans, records)
    own_cause = spans["cause"].copy()
    waited = sent_ns > spans["start_ns"][wait]  # else it was there already
    wait, sent_ns, sender = wait[waited], sent_ns[waited], sender[waited]
    without_cause = sender == NO_CAUSE
    for _ in range(BACK):
        late = (sender != NO_CAUSE) & ~is_before(sender, wait)
        sender[late] = own_cause[sender[late]]
    known = is_before(sender, wait)
    starts = known | without_cause  # of a sender that nothing caused, at least the time is known
    spans["start_ns"][wait[starts]] = np.minimum(sent_ns, spans["end_ns"][wait])[starts]
    spans["cause"][wait[known]] = sender[known]


def _order(spans: Table, records: Sequence[ProcessRecord]) -> Callable[[Ints, Ints], NDArray[np.bool_]]:
    """Whether a sender's span may be the cause of a wait: by `latest`, see the top of the file. NO_CAUSE never may."""
    latest_of = [np.maximum.accumulate(record.tables["spans"]["end_ns"]) for record in records]
    latest = np.concatenate([np.empty(0, np.int64), *latest_of])
    first = np.concatenate([np.empty(0, np.bool_), *(np.diff(ends, prepend=ends[:1] - 1) > 0 for ends in latest_of)])
    for record in records:
        first[record.tables["waits"]["span"]] = False

    def is_before(sender: Ints, wait: Ints) -> NDArray[np.bool_]:
        equal = (latest[sender] == latest[wait]) & first[sender]
        before: NDArray[np.bool_] = (sender != NO_CAUSE) & ((latest[sender] < latest[wait]) | equal)
        return before

    return is_before


def _senders(spans: Table, records: Sequence[ProcessRecord]) -> tuple[Ints, Ints, Ints]:
    """A table of waits, by columns: the wait, when another process first sent what it waited for, and by which span.

    Waits for what no other process sent are not in it.
    """
    columns: list[tuple[Ints, Ints, Ints]] = [(np.empty(0, np.int64),) * 3]
    waits_of, sent_of = ([_by_edge(record.tables[table]) for record in records] for table in ("waits", "sent"))
    for receiver, sender in permutations(range(len(records)), 2):
        for edge in waits_of[receiver].keys() & sent_of[sender].keys():
            waits, sent = waits_of[receiver][edge], sent_of[sender][edge]
            reached = np.searchsorted(sent["count"], waits["count"])
            sent_until_ns = np.maximum.accumulate(sent["at_ns"])
            last = np.searchsorted(sent_until_ns, spans["end_ns"][waits["span"]], "right") - 1
            reached = np.where(waits["count"] == LATEST, last, reached)
            found = (reached >= 0) & (reached < len(sent["count"]))
            by = reached[found]
            columns.append((waits["span"][found], sent["at_ns"][by], sent["span"][by]))
    wait, sent_ns, span = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((sent_ns, wait))  # stable: of several senders at one time, the first process counts
    wait, first = np.unique(wait[order], return_index=True)
    return wait, sent_ns[order][first], span[order][first]


def _by_edge(table: Table) -> dict[int, Table]:
    """The table's rows of each edge that occurs, in the order in which they were recorded."""
    order = np.argsort(table["edge"], kind="stable")
    edges, starts = np.unique(table["edge"][order], return_index=True)
    rows_of = zip(edges.tolist(), np.split(order, starts[1:]), strict=False)  # an empty table has one part, and no edge
    return {edge: {name: column[rows] for name, column in table.items()} for edge, rows in rows_of}


# --- reading what may come from another host --------------------------------------------------------------------------


@dataclass(slots=True)
class ProcessRecord:
    """What one process recorded, read and checked."""

    names: list[str]
    stage_names: list[str]
    edges: list[str]
    tables: dict[str, Table]

    def marks(self) -> list[tuple[Mark, tuple[int, int]]]:
        """The marks, each with its time and cause."""
        rows = zip(*(column.tolist() for column in self.tables["marks"].values()), strict=True)
        return [(MARKS[mark], (at_ns, caused)) for mark, at_ns, caused in rows]

    def stages(self) -> list[Stage]:
        """The stages."""
        rows = zip(*(column.tolist() for column in self.tables["stages"].values()), strict=True)
        return [Stage(self.stage_names[stage], *rest) for stage, *rest in rows]

    @classmethod
    def of(cls, part: object) -> ProcessRecord:
        """What `ProcessTimeline.export` returned. PeerProtocolError if it is malformed."""
        if not isinstance(part, dict) or set(part) != {*NAMES, *TABLES}:
            raise _malformed("keys", list(part) if isinstance(part, dict) else part)
        names, stage_names, edges = (_names(part[kind], kind) for kind in NAMES)
        record = cls(names, stage_names, edges, {name: _table(part[name], name) for name in TABLES})
        record._check()
        return record

    def _check(self) -> None:
        spans, marks, sent, waits = (self.tables[name] for name in ("spans", "marks", "sent", "waits"))
        count = len(spans["cause"])
        for table, column, low, end in (
            ("spans", "resource", min(Resource), max(Resource) + 1),
            ("spans", "what", 0, len(self.names)),
            ("spans", "track", 0, len(self.names)),
            ("spans", "cause", NO_CAUSE, np.arange(count)),  # each was recorded before what it caused
            ("marks", "mark", 0, len(MARKS)),
            ("marks", "cause", NO_CAUSE, count),
            ("stages", "stage", 0, len(self.stage_names)),
            ("stages", "index", 0, MAX_INDEX),
            ("sent", "edge", 0, len(self.edges)),
            ("sent", "count", 0, MAX_COUNT),
            ("sent", "span", NO_CAUSE, count),
            ("waits", "edge", 0, len(self.edges)),
            ("waits", "count", 0, MAX_COUNT),
            ("waits", "span", 0, count),
        ):
            _check_within(self.tables[table][column], low, end, f"{column} of {table}")
        if np.any(np.diff(waits["span"]) <= 0):
            raise _malformed("order of", "waits")
        if len(set(marks["mark"].tolist())) < len(marks["mark"]):
            raise _malformed("marks: one is twice in", self.marks())
        for edge, rows in _by_edge(sent).items():
            if np.any(np.diff(rows["count"]) < 0):
                raise _malformed("edge, for it shrinks:", self.edges[edge])

    def renumber(self, base: int, names: dict[str, int], edges: dict[str, int]) -> None:
        """Count its spans from `base`, and number its names and edges as in these dicts, which grow."""
        name_numbers, edge_numbers = _numbered(self.names, names), _numbered(self.edges, edges)
        for table in self.tables.values():
            for column, values in table.items():
                if column in ("cause", "span"):
                    values[values != NO_CAUSE] += base
                elif column in ("what", "track"):
                    table[column] = name_numbers[values]
                elif column == "edge":
                    table[column] = edge_numbers[values]


def _numbered(names: Sequence[str], numbers: dict[str, int]) -> NDArray[np.int32]:
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)


def _malformed(what: str, value: object) -> PeerProtocolError:
    return PeerProtocolError(f"the timeline of a process has a wrong {what} {short(value)}")


def _table(columns: object, name: str) -> Table:
    """The columns, all of one length, with times that are possible; no span ends before it starts."""
    kinds = TABLES[name]
    if not isinstance(columns, dict) or set(columns) != set(kinds):
        raise _malformed(name, columns)
    table: Table = {}
    rows = -1
    for column, kind in kinds.items():
        data = columns[column]
        size = np.dtype(kind).itemsize
        if not isinstance(data, bytes) or len(data) % size or rows not in (-1, len(data) // size):
            raise _malformed(f"column of {name}: {column}", data)
        rows = len(data) // size
        if rows > (MAX_STAGES if name == "stages" else MAX_ROWS):
            raise _malformed(f"number of rows of {name}", rows)
        table[column] = np.frombuffer(data, f"<{kind}").astype(kind)
        if column.endswith("_ns"):
            _check_within(table[column], -MAX_TIME_NS, MAX_TIME_NS, f"{column} of {name}")
    if "end_ns" in kinds and np.any(table["end_ns"] < table["start_ns"]):
        raise _malformed("end in", name)
    return table


def _check_within(values: NDArray[Any], low: int, end: int | Ints, what: str) -> None:
    wrong = (values < low) | (values >= end)
    if wrong.any():
        raise _malformed(what, int(values[wrong][0]))


def _names(names: object, kind: str) -> list[str]:
    if not isinstance(names, list) or len(names) > MAX_NAMES:
        raise _malformed(kind, names)
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise _malformed(kind, name)
    if len(set(names)) < len(names):
        raise _malformed(f"{kind}: one is twice in", names)
    return names
