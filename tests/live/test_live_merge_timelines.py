# SPDX-License-Identifier: GPL-2.0-or-later
"""The timelines of several processes become one: whom a wait was for, clocks that differ, malformed parts."""

from __future__ import annotations

import contextvars
import copy
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.errors import LocalProtocolError, PeerProtocolError
from proto_v3.timeline import NO_CAUSE, Mark, PathStep, Resource, Stage, Timeline, cause, caused_by, on_track
from sim.live import merge_timelines as parts
from sim.live.merge_timelines import (
    MAX_NAME_CHARS,
    MAX_NAMES,
    MAX_STAGES,
    MAX_TIME_NS,
    ProcessTimeline,
    merge,
)

Exported = dict[str, Any]
SOURCE, SOURCE_DEVICE, TARGET, TARGET_DEVICE = NAMES = ("source", "source device", "target", "target device")


class Process:
    """A process with one task; each call gives the time at which its action is over, on the true clock."""

    def __init__(self, name: str, ahead_ns: int = 0) -> None:
        self.ahead_ns = ahead_ns
        self.now = 0
        self.part = ProcessTimeline(lambda: self.now + ahead_ns)
        self._context = contextvars.copy_context()
        self._do(caused_by, NO_CAUSE)
        self._do(on_track, name)

    def _do(self, what: Callable[..., Any], *args: Any) -> Any:
        return self._context.run(what, *args)

    def at(self, now: int) -> Process:
        self.now = now
        return self

    def work(self, resource: Resource, what: str, start: int, end: int) -> int:
        self.at(end)._do(self.part.work, resource, what, start + self.ahead_ns)
        return self.cause

    def sent(self, edge: str, count: int, at: int) -> None:
        self.at(at)._do(self.part.sent, edge, count)

    def waited_for(self, resource: Resource, what: str, edge: str, count: int, start: int, end: int) -> int:
        self.at(end)._do(self.part.waited_for, resource, what, edge, count, start + self.ahead_ns)
        return self.cause

    def mark(self, mark: Mark, at: int) -> None:
        self.at(at)._do(self.part.mark, mark)

    @property
    def cause(self) -> int:
        return int(self._do(cause))

    def export(self) -> Exported:
        return self.part.export()


def path(timeline: Timeline) -> list[tuple[str, str, int, int]]:
    return [(step.track, step.what, step.start_ns, step.end_ns) for step in timeline.critical_path()]


def spans(timeline: Timeline) -> list[tuple[str, int, int, int]]:
    recorded = timeline.recorded()
    columns = (recorded.spans[name].tolist() for name in ("what", "start_ns", "end_ns", "cause"))
    return [(recorded.names[what], *rest) for what, *rest in zip(*columns, strict=True)]


def walks_end(timeline: Timeline) -> bool:
    """Whether following the causes ends, from any span: by leaps that double in length."""
    after = timeline.recorded().spans["cause"]
    for _ in range(len(after).bit_length() + 1):
        after = np.where(after >= 0, after[after], NO_CAUSE) if len(after) else after
    return bool((after == NO_CAUSE).all())


# --- a small migration -----------------------------------------------------------------------------------------------


def migration(*ahead_ns: int, start: int = 0) -> list[Process]:
    """Stopped at 100; the device's 1000 bytes go through all four processes; the guest runs at the target at 230."""
    source, device, target, target_device = processes = [
        Process(name, ahead) for name, ahead in zip(NAMES, ahead_ns or (0, 0, 0, 0), strict=True)
    ]
    t = start
    source.mark(Mark.STOP_ORDERED, t + 100)
    source.work(Resource.FIXED, "stop", t + 100, t + 110)
    source.mark(Mark.STOPPED, t + 110)
    source.sent("calls 0", 1, t + 110)
    device.waited_for(Resource.COPY, "call", "calls 0", 1, t, t + 112)
    device.work(Resource.FIRMWARE, "SAVE", t + 112, t + 150)
    device.sent("data 0", 1000, t + 150)
    source.waited_for(Resource.COPY, "read", "data 0", 1000, t + 111, t + 153)
    source.mark(Mark.DRAINED, t + 153)
    source.work(Resource.COPY, "buffers", t + 153, t + 155)
    source.sent("connection 0", 1, t + 155)
    target.waited_for(Resource.LINK, "frame", "connection 0", 1, t + 5, t + 170)
    target.mark(Mark.TRANSFERRED, t + 170)
    target.work(Resource.COPY, "write", t + 170, t + 172)
    target.sent("data 0 there", 1000, t + 172)
    target_device.waited_for(Resource.COPY, "taken", "data 0 there", 1000, t + 6, t + 175)
    target_device.work(Resource.LOAD, "LOAD", t + 175, t + 220)
    target_device.sent("answers 0 there", 1, t + 220)
    target.waited_for(Resource.COPY, "answer", "answers 0 there", 1, t + 173, t + 223)
    for mark in (Mark.LOADED, Mark.CONFIGURED):
        target.mark(mark, t + 223)
    target.work(Resource.FIXED, "resume", t + 223, t + 230)
    target.mark(Mark.RESUMED, t + 230)
    return processes


PATH = [
    ("source", "stop", 100, 110),
    ("source device", "call", 110, 112),
    ("source device", "SAVE", 112, 150),
    ("source", "read", 150, 153),
    ("source", "buffers", 153, 155),
    ("target", "frame", 155, 170),
    ("target", "write", 170, 172),
    ("target device", "taken", 172, 175),
    ("target device", "LOAD", 175, 220),
    ("target", "answer", 220, 223),
    ("target", "resume", 223, 230),
]


def test_the_critical_path_leads_through_all_processes() -> None:
    merged = merge([process.export() for process in migration()])
    assert path(merged) == PATH
    assert merged.critical_path()[5] == PathStep(Resource.LINK, "frame", "target", 155, 170)
    shares = {name: share for name, share in merged.critical_path_ns().items() if share}
    assert shares == {"firmware": 38, "copy": 15, "link": 15, "load": 45, "fixed": 17}
    assert sum(shares.values()) == merged.downtime_ns == 130


def test_the_phases_of_a_migration_tile_its_downtime() -> None:
    merged = merge([process.export() for process in migration()])
    assert merged.phases_ns() == {"stop": 10, "drain": 43, "transfer": 17, "load": 53, "config": 0, "resume": 7}
    assert sum(merged.phases_ns().values()) == merged.downtime_ns


def test_what_no_process_tells_of_is_unexplained() -> None:
    """Between two spans of a task a process may not have run."""
    source, target = Process("source"), Process("target")
    source.mark(Mark.STOP_ORDERED, 0)
    source.work(Resource.FIXED, "stop", 2, 10)
    source.sent("connection 0", 1, 13)
    target.waited_for(Resource.LINK, "frame", "connection 0", 1, 0, 20)
    target.work(Resource.LOAD, "LOAD", 21, 30)
    target.mark(Mark.RESUMED, 30)
    shares = merge([source.export(), target.export()]).critical_path_ns()
    assert {name: share for name, share in shares.items() if share} == {
        "fixed": 8,
        "link": 7,
        "load": 9,
        "unexplained": 2 + 3 + 1,
    }


@pytest.mark.parametrize("ahead_ns", [(0, 1, -1, 1), (2, 0, 1, 0), (0, 5, 7, 9), (0, 0, -9, -9)])
def test_clocks_that_are_off_by_a_little_do_not_change_whom_the_path_leads_through(ahead_ns: tuple[int, ...]) -> None:
    merged = merge([process.export() for process in migration(*ahead_ns)])
    tracks = [track for track, *_ in path(merged)]
    assert [track for track, _ in groupby(tracks)] == [
        "source",
        "source device",
        "source",
        "target",
        "target device",
        "target",
    ]


def test_what_was_before_the_start_is_below_zero() -> None:
    merged = merge([process.export() for process in migration(start=-105)])
    assert merged.marks[Mark.STOP_ORDERED] == -5
    assert spans(merged)[0] == ("stop", -5, 5, NO_CAUSE)
    assert [step[2:] for step in path(merged)] == [(start - 105, end - 105) for _, _, start, end in PATH]


def test_the_order_of_the_parts_makes_no_difference_to_the_path() -> None:
    exported = [process.export() for process in migration()]
    assert path(merge(exported[::-1])) == PATH
    assert path(merge([exported[2], exported[0], exported[3], exported[1]])) == PATH


def test_msgpack_carries_a_part() -> None:
    exported = [process.export() for process in migration()]
    carried = [msgpack.unpackb(msgpack.packb(part)) for part in exported]
    assert carried == exported
    assert merge(carried).digest() == merge(exported).digest()


def test_a_part_alone_stays_as_it_was_recorded() -> None:
    part = migration()[0].part
    part.blocked(3)
    part.stage("device_save", 4, 2)
    assert merge([part.export()]).digest() == part.digest()


def test_a_timeline_of_what_another_one_recorded_is_the_same() -> None:
    part = migration()[2].part
    part.blocked(3)
    part.stage("device_load", 4, 1)
    assert Timeline.of(part.recorded(), lambda: 0).digest() == part.digest()


def test_no_part_and_parts_in_which_nothing_happened() -> None:
    assert len(merge([])) == 0
    merged = merge([ProcessTimeline().export(), migration()[0].export(), ProcessTimeline().export()])
    assert len(merged) == len(migration()[0].part)


def test_a_part_is_on_the_real_clock() -> None:
    part = ProcessTimeline()
    before = part.now_ns()
    part.sent("calls 0", 1)
    exported = part.export()["sent"]
    assert before <= int.from_bytes(exported["at_ns"], "little") <= part.now_ns()


def test_nothing_can_be_recorded_in_a_merged_timeline() -> None:
    with pytest.raises(LocalProtocolError):
        merge([]).mark(Mark.RESUMED)


# --- marks, stages, blocked ------------------------------------------------------------------------------------------


def test_a_mark_of_several_parts_is_the_latest_of_them_with_its_cause() -> None:
    early, late = Process("early"), Process("late")
    early.mark(Mark.STOP_ORDERED, 0)
    early.work(Resource.LOAD, "early", 0, 20)
    early.mark(Mark.RESUMED, 20)
    late.work(Resource.LOAD, "late", 5, 30)
    late.mark(Mark.RESUMED, 30)
    for exported in ([early.export(), late.export()], [late.export(), early.export()]):
        merged = merge(exported)
        assert merged.marks == {Mark.STOP_ORDERED: 0, Mark.RESUMED: 30}
        assert path(merged) == [("late", "late", 5, 30)]


def test_stages_are_united_in_the_order_in_which_they_ended() -> None:
    source, target = Process("source"), Process("target")
    target.at(40).part.stage("device_load", 20, 1)
    source.at(30).part.stage("device_save", 10, 0)
    merged = merge([target.export(), source.export()])
    assert merged.stages == [Stage("device_save", 0, 10, 30), Stage("device_load", 1, 20, 40)]


def test_sends_that_were_held_up_are_united() -> None:
    source, target = Process("source"), Process("target")
    source.mark(Mark.STOP_ORDERED, 10)
    source.at(30).part.blocked(5)
    target.at(60).part.blocked(40)
    target.mark(Mark.RESUMED, 50)
    assert merge([source.export(), target.export()]).blocked_in_downtime_ns() == 20 + 10


# --- whom a wait was for ---------------------------------------------------------------------------------------------


def pair() -> tuple[Process, Process]:
    """A sender that has worked until 20, and a receiver that has until 5."""
    sender, receiver = Process("sender"), Process("receiver")
    sender.work(Resource.FIRMWARE, "SAVE", 0, 20)
    receiver.work(Resource.COPY, "before", 0, 5)
    return sender, receiver


def received(sender: Process, receiver: Process, *others: Process) -> list[tuple[str, int, int, int]]:
    """The receiver's spans, with the numbers of the sender's after its own."""
    return spans(merge([process.export() for process in (receiver, sender, *others)]))[: len(receiver.part)]


def test_what_was_there_already_is_the_receivers_own_time() -> None:
    sender, receiver = pair()
    sender.sent("data", 10, 25)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 25, 40)
    assert received(sender, receiver)[1] == ("read", 25, 40, 0)


def test_a_wait_for_what_was_given_starts_when_it_was() -> None:
    sender, receiver = pair()
    sender.sent("data", 10, 26)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 25, 40)
    assert received(sender, receiver)[1] == ("read", 26, 40, 2)


def test_a_wait_that_nobody_ended_stays_as_it_is() -> None:
    sender, receiver = pair()
    sender.sent("data", 9, 25)
    sender.sent("other data", 10, 25)
    receiver.sent("data", 10, 25)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 10, 40)
    assert received(sender, receiver)[1] == ("read", 10, 40, 0)


def test_the_first_that_reached_the_count_gave_it() -> None:
    sender, receiver = pair()
    for count, at in ((3, 21), (8, 22), (12, 23), (15, 24)):
        sender.work(Resource.COPY, "write", at - 1, at)
        sender.sent("data", count, at)
    for count in (3, 4, 8, 9, 12, 15):
        receiver.waited_for(Resource.COPY, "read", "data", count, 10, 40)
    assert [(start, by - len(receiver.part)) for _, start, _, by in received(sender, receiver)[1:]] == [
        (21, 1),
        (22, 2),
        (22, 2),
        (23, 3),
        (23, 3),
        (24, 4),
    ]


def test_what_two_gave_was_given_by_the_first() -> None:
    sender, receiver = pair()
    other = Process("other")
    other.work(Resource.RAM, "pages", 0, 15)
    sender.sent("data", 10, 25)
    other.sent("data", 10, 24)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 10, 40)
    assert received(sender, receiver, other)[1] == ("read", 24, 40, len(receiver.part) + len(sender.part))
    assert received(other, receiver, sender)[1] == ("read", 24, 40, len(receiver.part))


def test_a_count_that_was_reached_before_is_nothing_new() -> None:
    sender, receiver = pair()
    sender.sent("data", 10, 25)
    sender.work(Resource.FIRMWARE, "SAVE", 25, 30)
    for count in (10, 7):
        sender.sent("data", count, 30)
    receiver.waited_for(Resource.COPY, "read", "data", 7, 10, 40)
    assert sender.part.export()["sent"]["count"] == (10).to_bytes(8, "little")
    assert received(sender, receiver)[1] == ("read", 25, 40, 2)


def test_what_was_told_too_late_is_a_wait_without_length() -> None:
    """The sender was not run between giving and saying so."""
    sender, receiver = pair()
    sender.sent("data", 10, 60)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 10, 40)
    assert received(sender, receiver)[1] == ("read", 40, 40, 2)


def test_a_sender_that_ended_after_the_wait_is_not_its_cause_but_what_it_did_before() -> None:
    sender, receiver = pair()
    sender.work(Resource.LINK, "send", 20, 41)
    sender.sent("data", 10, 41)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 10, 40)
    assert received(sender, receiver)[1] == ("read", 40, 40, 2)


def test_a_sender_that_did_all_after_the_wait_is_not_its_cause() -> None:
    """A clock that is far off: better a path that misses something than one that goes round."""
    sender, receiver = pair()
    sender.sent("data", 10, 21)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 6, 19)
    assert received(sender, receiver)[1] == ("read", 6, 19, 0)


def test_a_sender_that_nothing_caused_tells_the_time_only() -> None:
    _, receiver = pair()
    sender = Process("sender")
    sender.sent("data", 10, 25)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 10, 40)
    assert received(sender, receiver)[1] == ("read", 25, 40, 0)


def test_a_sender_that_waits_for_room_waits_for_the_receiver() -> None:
    source, target = Process("source"), Process("target")
    source.mark(Mark.STOP_ORDERED, 0)
    source.sent("connection 0", 1, 0)
    target.waited_for(Resource.LINK, "frame", "connection 0", 1, 0, 3)
    target.work(Resource.LOAD, "LOAD", 3, 50)
    target.sent("room of connection 0", 1, 50)
    source.waited_for(Resource.LINK, "room", "room of connection 0", 1, 1, 52)
    source.work(Resource.COPY, "send", 52, 60)
    source.mark(Mark.RESUMED, 60)
    assert path(merge([source.export(), target.export()])) == [
        ("target", "frame", 0, 3),
        ("target", "LOAD", 3, 50),
        ("source", "room", 50, 52),
        ("source", "send", 52, 60),
    ]


def test_a_cause_may_end_in_the_nanosecond_in_which_the_wait_does() -> None:
    sender, receiver = pair()
    sender.sent("data", 10, 20)
    receiver.waited_for(Resource.COPY, "read", "data", 10, 10, 20)
    assert received(sender, receiver)[1] == ("read", 20, 20, 2)


def test_two_that_wait_for_each_other_at_the_same_moment_do_not_make_a_circle() -> None:
    one, other = Process("one"), Process("other")
    one.waited_for(Resource.LINK, "frame", "there", 1, 0, 10)
    other.waited_for(Resource.LINK, "frame", "back", 1, 0, 10)
    one.sent("back", 1, 10)
    other.sent("there", 1, 10)
    assert walks_end(merge([one.export(), other.export()]))


# What a process does: works, gives to an edge, or waits for one; for how long; on which of three edges; and how much.
DEEDS = st.lists(
    st.tuples(st.sampled_from(["work", "sent", "waits"]), st.integers(0, 4), st.integers(0, 2), st.integers(0, 6)),
    max_size=30,
)


@given(st.lists(st.tuples(DEEDS, st.integers(-4, 4)), min_size=1, max_size=4))
def test_whatever_the_clocks_say_walking_ends_and_the_shares_sum_up(
    exported: list[tuple[list[tuple[str, int, int, int]], int]],
) -> None:
    processes = []
    for number, (deeds, off_ns) in enumerate(exported):
        process = Process(f"process {number}", off_ns)
        for deed, length, edge, count in deeds:
            now = process.now + length
            if deed == "work":
                process.work(Resource.COPY, "work", process.now, now)
            elif deed == "sent":
                process.sent(f"edge {edge}", count, now)
            else:
                process.waited_for(Resource.LINK, "wait", f"edge {edge}", count, process.now, now)
        process.mark(Mark.RESUMED, process.now)
        processes.append(process)
    processes[0].mark(Mark.STOP_ORDERED, 0)
    merged = merge([process.export() for process in processes])
    assert walks_end(merged)
    assert all(start <= end for _, start, end, _ in spans(merged))
    shares = merged.critical_path_ns()
    assert sum(shares.values()) == merged.downtime_ns
    assert all(share >= 0 for name, share in shares.items() if name != "unexplained" or merged.downtime_ns >= 0)


# --- malformed parts -------------------------------------------------------------------------------------------------

WRONG: list[object] = [None, True, -2, 1.5, 2**70, "x", "\n", b"", b"x", [], [0], [[]], {}, {"x": 0}, {0: 0}]


def whole() -> Exported:
    """A part that has something of everything."""
    processes = migration()
    part = processes[2].at(230).part
    part.stage("device_load", 170, 1)
    part.blocked(200)
    return processes[2].export()


def places(exported: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places in it, the whole one first."""
    yield at
    within = (
        exported.items() if isinstance(exported, dict) else enumerate(exported) if isinstance(exported, list) else ()
    )
    for key, value in within:
        yield from places(value, (*at, key))


def put(exported: Exported, place: tuple[Any, ...], value: object) -> Any:
    """A copy with something else in that place; `...` for nothing at all."""
    if not place:
        return value
    changed = inside = copy.deepcopy(exported)
    for key in place[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return changed


def column(exported: Exported, table: str, name: str, row: int, value: int) -> Exported:
    """A copy with another number in a column."""
    size = np.dtype(parts.TABLES[table][name]).itemsize
    data = bytearray(exported[table][name])
    data[row * size : (row + 1) * size] = value.to_bytes(size, "little", signed=True)
    changed: Exported = put(exported, (table, name), bytes(data))
    return changed


def refused(exported: object) -> bool:
    """Whether it is; one that is not must be as good as any. Any other error than PeerProtocolError goes through."""
    others = [process.export() for process in migration()[:2]]
    try:
        merged = merge([*others, exported])  # type: ignore[list-item]
    except PeerProtocolError:
        return True
    assert walks_end(merged)
    if Mark.RESUMED in merged.marks:
        assert sum(merged.critical_path_ns().values()) == merged.downtime_ns
    merged.digest()
    return False


def test_the_part_that_is_mutated_is_right_as_it_is() -> None:
    assert not refused(whole())
    assert all(column for table in parts.TABLES for column in whole()[table].values())


PLACES = list(places(whole()))


@pytest.mark.parametrize("place", [place for place in PLACES if place], ids=repr)
def test_a_part_from_which_something_is_missing_is_refused(place: tuple[Any, ...]) -> None:
    assert refused(put(whole(), place, ...))


@pytest.mark.parametrize("place", PLACES, ids=repr)
def test_a_part_with_something_of_a_wrong_kind_is_refused(place: tuple[Any, ...]) -> None:
    exported = whole()
    before: Any = exported
    for key in place:
        before = before[key]
    for wrong in WRONG:
        another_name = isinstance(before, str) and wrong == "x"
        assert refused(put(exported, place, wrong)) != another_name, wrong


@pytest.mark.parametrize("place", [place for place in PLACES if place], ids=repr)
def test_a_part_with_something_more_is_refused(place: tuple[Any, ...]) -> None:
    exported = whole()
    inside: Any = exported
    for key in place:
        inside = inside[key]
    if isinstance(inside, dict):
        assert refused(put(exported, (*place, "more"), 0))
    elif isinstance(inside, bytes):
        for wrong in (inside + b"\0", inside + inside, inside[:-1], inside[: len(inside) // 2]):
            assert refused(put(exported, place, wrong))


def test_a_key_more_is_refused() -> None:
    assert refused({**whole(), "more": 0})
    assert refused(put(whole(), (0,), 0))


LAST = len(migration()[2].part)

OUT_OF_RANGE = [
    *[("spans", "resource", 0, value) for value in (-1, len(Resource), 127, -128)],
    *[("spans", name, 0, value) for name in ("what", "track") for value in (-1, len(whole()["names"]), 2**15 - 1)],
    *[("spans", "cause", 0, value) for value in (-2, 0, 1, LAST, 2**62, -(2**63))],
    *[("spans", "cause", 2, value) for value in (2, 3)],
    *[("spans", name, 0, value) for name in ("start_ns", "end_ns") for value in (2**63 - 1, -(2**63), MAX_TIME_NS)],
    ("spans", "end_ns", 0, 4),
    ("blocked", "end_ns", 0, 199),
    ("blocked", "start_ns", 0, -MAX_TIME_NS - 1),
    *[("sent", "edge", 0, value) for value in (-1, len(whole()["edges"]))],
    *[("waits", "edge", 0, value) for value in (-1, len(whole()["edges"]))],
    *[(table, "count", 0, -1) for table in ("sent", "waits")],
    ("sent", "at_ns", 0, MAX_TIME_NS),
    *[("sent", "span", 0, value) for value in (-2, LAST, 2**62)],
    *[("waits", "span", 0, value) for value in (-1, LAST, LAST - 1, 2**62)],
    *[("marks", "mark", 0, value) for value in (-1, len(Mark))],
    *[("marks", "at_ns", 0, value) for value in (MAX_TIME_NS, -MAX_TIME_NS - 1)],
    *[("marks", "cause", 0, value) for value in (NO_CAUSE - 1, LAST)],
    *[("stages", "stage", 0, value) for value in (-1, 1)],
    *[("stages", "index", 0, value) for value in (-1, 2**31)],
    *[("stages", name, 0, value) for name in ("start_ns", "end_ns") for value in (MAX_TIME_NS, -MAX_TIME_NS - 1)],
    ("stages", "end_ns", 0, 169),
]


@pytest.mark.parametrize(("table", "name", "row", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(table: str, name: str, row: int, value: int) -> None:
    assert refused(column(whole(), table, name, row, value))


def test_a_mark_may_have_no_cause_but_is_there_once() -> None:
    assert not refused(column(whole(), "marks", "cause", 0, NO_CAUSE))
    exported = whole()
    first = exported["marks"]["mark"][0]
    assert refused(column(exported, "marks", "mark", 1, first))


def test_a_counter_that_shrinks_is_refused() -> None:
    sender = Process("sender")
    for count in (5, 6, 7):
        sender.sent("data", count, count)
        sender.sent("other data", 10 - count, count)
    exported = sender.export()
    assert not refused(exported)
    assert refused(column(exported, "sent", "count", 3, 4))


@pytest.mark.parametrize("span", [0, 1])
def test_waits_that_are_not_in_the_order_of_their_spans_are_refused(span: int) -> None:
    receiver = Process("receiver")
    for now in (5, 6):
        receiver.waited_for(Resource.COPY, "read", "data", now, 0, now)
    exported = receiver.export()
    assert not refused(exported)
    assert refused(column(column(exported, "waits", "span", 0, span), "waits", "span", 1, 0))


def test_names_are_few_and_short_and_differ() -> None:
    for key in ("names", "stage_names", "edges"):
        exported = whole()
        there = exported[key]
        for more in (["x" * (MAX_NAME_CHARS + 1)], ["a\x1b[2J"], [there[0]], [f"name {n}" for n in range(MAX_NAMES)]):
            assert refused({**exported, key: [*there, *more]})
        for more in (["x" * MAX_NAME_CHARS], [f"name {n}" for n in range(MAX_NAMES - len(there))]):
            assert not refused({**exported, key: [*there, *more]})


def test_parts_with_more_names_than_a_timeline_can_have_are_refused() -> None:
    exported = [{**ProcessTimeline().export(), "names": [f"{part}.{n}" for n in range(MAX_NAMES)]} for part in range(5)]
    assert len(merge(exported[:4])) == 0
    with pytest.raises(PeerProtocolError, match="number of names"):
        merge(exported)


def test_too_many_stages_are_refused() -> None:
    for count in (MAX_STAGES, MAX_STAGES + 1):
        stages = {name: data * count for name, data in whole()["stages"].items()}
        assert refused({**whole(), "stages": stages}) == (count > MAX_STAGES)


def test_absurd_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_ROWS", LAST)
    assert not refused(whole())
    monkeypatch.setattr(parts, "MAX_ROWS", LAST - 1)
    assert refused(whole())


@given(st.data())
def test_bytes_that_changed_on_the_way_are_refused_or_do_no_harm(data: st.DataObject) -> None:
    exported = whole()
    for _ in range(data.draw(st.integers(1, 4))):
        table = data.draw(st.sampled_from(sorted(parts.TABLES)))
        name = data.draw(st.sampled_from(sorted(parts.TABLES[table])))
        changed = bytearray(exported[table][name])
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        exported[table][name] = bytes(changed)
    refused(exported)


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_run_is_merged() -> None:
    """Two processes that hand 50,000 pieces on, one after the other: 200,000 spans in columns."""
    source, target = Process("source"), Process("target")
    source.mark(Mark.STOP_ORDERED, 0)
    rounds = 50_000
    for number in range(1, rounds + 1):
        now = source.now
        source.work(Resource.COPY, "read", now, now + 3)
        source.sent("connection 0", number, now + 3)
        target.waited_for(Resource.LINK, "frame", "connection 0", number, now, now + 5)
        target.work(Resource.LOAD, "LOAD", now + 5, now + 9)
        target.sent("room of connection 0", number, now + 9)
        source.waited_for(Resource.LINK, "room", "room of connection 0", number, now + 3, now + 10)
    target.mark(Mark.RESUMED, target.now)
    exported = [source.export(), target.export()]
    assert sum(sys.getsizeof(data) for part in exported for data in part["spans"].values()) < 29 * 200_000 + 10_000
    tracemalloc.start()
    merged = merge(exported)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * 29 * 200_000
    assert len(merged) == 4 * rounds
    assert walks_end(merged)
    shares = merged.critical_path_ns()
    assert {name: share for name, share in shares.items() if share} == {
        "copy": 3 * rounds,
        "link": 3 * rounds - 1,
        "load": 4 * rounds,
    }
