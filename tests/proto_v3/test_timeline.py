# SPDX-License-Identifier: GPL-2.0-or-later
"""The timeline: phases that tile the downtime, the chain of causes, joins, what fell into the downtime, the digest."""

from __future__ import annotations

import asyncio
import inspect
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.timeline import NO_CAUSE, PHASES, Join, Mark, PathStep, Resource, Timeline, cause, caused_by, on_track
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run


class Recorder:
    """A timeline whose clock is set by hand."""

    def __init__(self) -> None:
        self.now = 0
        self.timeline = Timeline(lambda: self.now)

    def mark(self, mark: Mark, at: int) -> None:
        self.now = at
        self.timeline.mark(mark)

    def work(self, resource: Resource, what: str, start: int, end: int) -> int:
        self.now = end
        self.timeline.work(resource, what, start)
        return cause()


def nonzero(shares: dict[str, int]) -> dict[str, int]:
    return {name: share for name, share in shares.items() if share}


# --- phases ----------------------------------------------------------------------------------------------------------


def test_phases_run_from_mark_to_mark() -> None:
    recorder = Recorder()
    for mark, at in zip(Mark, (100, 110, 130, 160, 200, 250, 310), strict=True):
        recorder.mark(mark, at)
    assert recorder.timeline.phases_ns() == {
        "stop": 10,
        "drain": 20,
        "transfer": 30,
        "load": 40,
        "config": 50,
        "resume": 60,
    }
    assert recorder.timeline.downtime_ns == 210


def test_a_phase_whose_mark_came_early_takes_no_time() -> None:
    recorder = Recorder()
    for mark, at in zip(Mark, (100, 110, 130, 160, 200, 140, 310), strict=True):
        recorder.mark(mark, at)
    phases = recorder.timeline.phases_ns()
    assert phases["config"] == 0
    assert phases["resume"] == 110


@given(st.lists(st.integers(0, 1000), min_size=len(Mark), max_size=len(Mark)))
def test_phases_tile_the_downtime_whatever_the_order_of_the_marks(times: list[int]) -> None:
    recorder = Recorder()
    at = dict(zip(Mark, times, strict=True))
    at[Mark.RESUMED] += at[Mark.STOP_ORDERED]  # only a downtime below zero is impossible
    for mark, time in at.items():
        recorder.mark(mark, time)
    phases = recorder.timeline.phases_ns()
    assert list(phases) == list(PHASES)
    assert min(phases.values()) >= 0
    assert sum(phases.values()) == recorder.timeline.downtime_ns == at[Mark.RESUMED] - at[Mark.STOP_ORDERED]


@given(st.lists(st.integers(0, 1000), min_size=len(Mark), max_size=len(Mark)).map(sorted))
def test_no_phase_is_cut_where_the_marks_are_in_order(times: list[int]) -> None:
    recorder = Recorder()
    for mark, time in zip(Mark, times, strict=True):
        recorder.mark(mark, time)
    assert list(recorder.timeline.phases_ns().values()) == [end - start for start, end in pairwise(times)]


def test_a_mark_that_is_said_again_moves() -> None:
    recorder = Recorder()
    for mark, at in zip(Mark, range(0, 70, 10), strict=True):
        recorder.mark(mark, at)
    recorder.mark(Mark.LOADED, 45)
    assert recorder.timeline.phases_ns()["load"] == 15


def test_without_a_hand_over_there_is_no_downtime() -> None:
    recorder = Recorder()
    recorder.mark(Mark.STOP_ORDERED, 5)
    with pytest.raises(KeyError):
        _ = recorder.timeline.downtime_ns


# --- the critical path -----------------------------------------------------------------------------------------------


def test_the_critical_path_of_a_graph_made_by_hand() -> None:
    """A SAVE and a copy at the source, a frame on its way, a LOAD at the target; beside it a LOAD that nobody needs."""
    recorder = Recorder()
    timeline = recorder.timeline
    recorder.mark(Mark.STOP_ORDERED, 100)
    on_track("source")
    recorder.work(Resource.FIXED, "stop", 100, 110)
    recorder.work(Resource.FIRMWARE, "SAVE", 110, 140)
    recorder.work(Resource.COPY, "read", 140, 145)
    frame = timeline.span(Resource.LINK, "frame", 145, 165, track="connection")
    recorder.work(Resource.COPY, "read", 145, 190)  # goes on at the source, after the frame left

    on_track("target")
    caused_by(NO_CAUSE)
    recorder.work(Resource.LOAD, "LOAD beside", 120, 160)
    caused_by(frame)
    recorder.work(Resource.LOAD, "LOAD", 165, 200)
    recorder.mark(Mark.RESUMED, 200)

    assert timeline.critical_path() == [
        PathStep(Resource.FIXED, "stop", "source", 100, 110),
        PathStep(Resource.FIRMWARE, "SAVE", "source", 110, 140),
        PathStep(Resource.COPY, "read", "source", 140, 145),
        PathStep(Resource.LINK, "frame", "connection", 145, 165),
        PathStep(Resource.LOAD, "LOAD", "target", 165, 200),
    ]
    assert nonzero(timeline.critical_path_ns()) == {"fixed": 10, "firmware": 30, "copy": 5, "link": 20, "load": 35}
    assert timeline.in_downtime_ns(Resource.LOAD) == 75


def test_time_that_no_cause_covers_is_unexplained() -> None:
    recorder = Recorder()
    recorder.mark(Mark.STOP_ORDERED, 0)
    recorder.work(Resource.FIXED, "stop", 0, 10)
    recorder.work(Resource.LOAD, "LOAD", 14, 20)
    recorder.mark(Mark.RESUMED, 23)
    assert nonzero(recorder.timeline.critical_path_ns()) == {"fixed": 10, "load": 6, "unexplained": 7}


def test_the_path_is_cut_to_the_downtime() -> None:
    recorder = Recorder()
    recorder.work(Resource.FIRMWARE, "SAVE", 0, 60)
    recorder.mark(Mark.STOP_ORDERED, 40)
    recorder.work(Resource.LOAD, "LOAD", 60, 90)
    recorder.mark(Mark.RESUMED, 80)
    assert [(step.start_ns, step.end_ns) for step in recorder.timeline.critical_path()] == [(40, 60), (60, 80)]
    assert nonzero(recorder.timeline.critical_path_ns()) == {"firmware": 20, "load": 20}


def test_causes_that_overlap_are_counted_once() -> None:
    recorder = Recorder()
    recorder.mark(Mark.STOP_ORDERED, 0)
    recorder.work(Resource.LINK, "frame", 0, 70)
    recorder.work(Resource.LOAD, "LOAD", 50, 100)
    recorder.mark(Mark.RESUMED, 100)
    assert nonzero(recorder.timeline.critical_path_ns()) == {"link": 50, "load": 50}


def test_work_may_be_told_with_an_end_of_its_own() -> None:
    recorder = Recorder()
    recorder.mark(Mark.STOP_ORDERED, 0)
    recorder.now = 30
    recorder.timeline.work(Resource.LOAD, "LOAD queue", 0, 20)
    recorder.timeline.work(Resource.LOAD, "LOAD", 20)
    recorder.mark(Mark.RESUMED, 30)
    assert [(step.what, step.end_ns) for step in recorder.timeline.critical_path()] == [
        ("LOAD queue", 20),
        ("LOAD", 30),
    ]


def test_a_span_that_is_not_waited_for_leaves_the_cursor() -> None:
    recorder = Recorder()
    before = recorder.work(Resource.COPY, "read", 0, 10)
    recorder.timeline.span(Resource.LINK, "frame", 10, 20)
    assert cause() == before


SPANS = st.lists(
    st.tuples(st.sampled_from(Resource), st.integers(0, 100), st.integers(0, 100), st.integers(-1, 40)), max_size=40
)


@given(SPANS, st.integers(0, 100), st.integers(0, 100))
def test_the_shares_of_any_graph_sum_to_the_downtime(
    spans: list[tuple[Resource, int, int, int]], one: int, other: int
) -> None:
    recorder = Recorder()
    caused_by(NO_CAUSE)
    for number, (resource, start, length, parent) in enumerate(spans):
        caused_by(parent if parent < number else NO_CAUSE)
        recorder.work(resource, "work", start, start + length)
    recorder.mark(Mark.STOP_ORDERED, min(one, other))
    recorder.mark(Mark.RESUMED, max(one, other))
    shares = recorder.timeline.critical_path_ns()
    assert list(shares) == [resource.name.lower() for resource in Resource] + ["unexplained"]
    assert min(shares.values()) >= 0
    assert sum(shares.values()) == recorder.timeline.downtime_ns
    ends = [(step.start_ns, step.end_ns) for step in recorder.timeline.critical_path()]
    assert ends == sorted(ends)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


# --- inside the downtime ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "inside"),
    [(0, 90, 0), (0, 100, 0), (0, 130, 30), (120, 150, 30), (180, 900, 20), (200, 300, 0), (0, 900, 100)],
)
def test_only_what_is_inside_the_downtime_counts(start: int, end: int, inside: int) -> None:
    recorder = Recorder()
    recorder.work(Resource.LOAD, "LOAD", 0, 1000)
    recorder.work(Resource.SETUP, "critical set-up", start, end)
    recorder.timeline.blocked(start)
    recorder.mark(Mark.STOP_ORDERED, 100)
    recorder.mark(Mark.RESUMED, 200)
    assert recorder.timeline.in_downtime_ns(Resource.SETUP) == inside
    assert recorder.timeline.blocked_in_downtime_ns() == inside
    assert recorder.timeline.in_downtime_ns(Resource.LOAD) == 100


def test_work_of_several_at_once_is_summed() -> None:
    recorder = Recorder()
    recorder.mark(Mark.STOP_ORDERED, 0)
    recorder.work(Resource.LOCK, "lock wait", 0, 60)
    recorder.work(Resource.LOCK, "lock wait", 20, 60)
    recorder.timeline.blocked(30)
    recorder.timeline.blocked(40)
    recorder.mark(Mark.RESUMED, 100)
    assert recorder.timeline.in_downtime_ns(Resource.LOCK) == 100
    assert recorder.timeline.blocked_in_downtime_ns() == 50


def test_nothing_recorded_is_nothing_spent() -> None:
    recorder = Recorder()
    recorder.mark(Mark.STOP_ORDERED, 0)
    recorder.mark(Mark.RESUMED, 100)
    assert len(recorder.timeline) == 0
    assert recorder.timeline.in_downtime_ns(Resource.LOCK) == 0
    assert recorder.timeline.blocked_in_downtime_ns() == 0
    assert nonzero(recorder.timeline.critical_path_ns()) == {"unexplained": 100}


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_child_starts_from_its_parents_cursor_and_its_work_moves_only_its_own() -> None:
    async def main() -> None:
        timeline = Timeline(now_ns)
        timeline.work(Resource.FIXED, "parent", 0)
        parent = cause()

        async def child() -> int:
            assert cause() == parent
            timeline.work(Resource.COPY, "child", now_ns())
            return cause()

        assert await asyncio.create_task(child()) == parent + 1
        assert cause() == parent

    run(main())


def join_of(*delays_ns: int, own_ns: int) -> list[PathStep]:
    """The critical path of a body that works and, meanwhile, children that do: each for so long."""

    async def main() -> list[PathStep]:
        timeline = Timeline(now_ns)

        async def child(delay_ns: int) -> None:
            await sleep_ns(delay_ns)
            timeline.work(Resource.LOAD, "child", 0)

        timeline.mark(Mark.STOP_ORDERED)
        async with Join() as join:
            for number, delay_ns in enumerate(delays_ns):
                join.start(child(delay_ns), f"child {number}")
            await sleep_ns(own_ns)
            timeline.work(Resource.FIXED, "body", 0)
        timeline.mark(Mark.RESUMED)
        return timeline.critical_path()

    return run(main())


def test_a_join_that_waited_is_caused_by_the_child_that_ended_last() -> None:
    assert join_of(30, 50, 40, own_ns=10) == [PathStep(Resource.LOAD, "child", "child 1", 0, 50)]


def test_a_join_that_waited_for_one_of_them_only_is_caused_by_that_one() -> None:
    assert join_of(30, 50, own_ns=40) == [PathStep(Resource.LOAD, "child", "child 1", 0, 50)]


def test_a_join_that_did_not_wait_keeps_its_own_cause() -> None:
    assert join_of(30, 50, own_ns=60) == [PathStep(Resource.FIXED, "body", "main", 0, 60)]


def test_a_join_without_children_keeps_its_own_cause() -> None:
    assert join_of(own_ns=60) == [PathStep(Resource.FIXED, "body", "main", 0, 60)]


def cancelled_join(*ends_ns: int, cancelled_ns: int, own_ns: int) -> list[PathStep]:
    """As join_of, with one child more that works until it is cancelled."""

    async def main() -> list[PathStep]:
        timeline = Timeline(now_ns)

        async def child(delay_ns: int) -> None:
            await sleep_ns(delay_ns)
            timeline.work(Resource.LOAD, "child", 0)

        async def endless() -> None:
            while True:
                start = now_ns()
                await sleep_ns(1)
                timeline.work(Resource.RAM, "endless", start)

        timeline.mark(Mark.STOP_ORDERED)
        async with Join() as join:
            for number, delay_ns in enumerate(ends_ns):
                join.start(child(delay_ns), f"child {number}")
            task = join.start(endless(), "endless")
            asyncio.get_running_loop().call_later(cancelled_ns / 1e9, task.cancel)
            await sleep_ns(own_ns)
            timeline.work(Resource.FIXED, "body", 0)
        timeline.mark(Mark.RESUMED)
        return timeline.critical_path()

    return run(main())


def test_a_child_that_is_cancelled_causes_nothing_though_it_ended_last() -> None:
    assert cancelled_join(30, 50, cancelled_ns=50, own_ns=10) == [PathStep(Resource.LOAD, "child", "child 1", 0, 50)]


def test_a_join_that_waited_for_a_cancelled_child_only_keeps_its_own_cause() -> None:
    assert cancelled_join(cancelled_ns=60, own_ns=60) == [PathStep(Resource.FIXED, "body", "main", 0, 60)]


def test_a_child_that_is_cancelled_from_the_body_causes_nothing() -> None:
    """As the threads that wait for more, when there is no more."""

    async def main() -> list[PathStep]:
        timeline = Timeline(now_ns)

        async def waits() -> None:
            timeline.work(Resource.RAM, "before", 0)
            await asyncio.get_running_loop().create_future()

        timeline.mark(Mark.STOP_ORDERED)
        async with Join() as join:
            tasks = [join.start(waits(), "waits"), join.start(sleep_ns(1_000_000), "sleeps")]
            await sleep_ns(40)
            timeline.work(Resource.FIXED, "body", 0)
            for task in tasks:
                task.cancel()
        timeline.mark(Mark.RESUMED)
        return timeline.critical_path()

    assert run(main()) == [PathStep(Resource.FIXED, "body", "main", 0, 40)]


def test_a_wait_for_another_task_is_caused_by_what_it_did() -> None:
    async def main() -> list[PathStep]:
        timeline = Timeline(now_ns)
        handed_on: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def other() -> None:
            on_track("other")
            await sleep_ns(50)
            timeline.work(Resource.FIRMWARE, "SAVE", 0)
            handed_on.set_result(cause())

        timeline.mark(Mark.STOP_ORDERED)
        task = asyncio.create_task(other())
        caused_by(await handed_on)
        start = now_ns()
        await sleep_ns(10)
        timeline.work(Resource.COPY, "read", start)
        timeline.mark(Mark.RESUMED)
        await task
        return timeline.critical_path()

    assert run(main()) == [
        PathStep(Resource.FIRMWARE, "SAVE", "other", 0, 50),
        PathStep(Resource.COPY, "read", "main", 50, 60),
    ]


def test_a_join_gives_its_childrens_results_and_names() -> None:
    async def main() -> tuple[int, str]:
        async def answer() -> int:
            return 42

        async with Join() as join:
            task = join.start(answer(), "the answer")
        return task.result(), task.get_name()

    assert run(main()) == (42, "the answer")


def test_a_childs_error_cancels_the_others_and_is_raised_as_a_group() -> None:
    async def main() -> None:
        async def fails() -> None:
            await sleep_ns(10)
            raise OSError("broken")

        async with Join() as join:
            join.start(fails(), "fails")
            join.start(sleep_ns(1_000_000), "sleeps")

    with pytest.raises(ExceptionGroup) as caught:
        run(main(), limit_ns=1_000)
    assert [str(error) for error in caught.value.exceptions] == ["broken"]


def test_a_child_that_is_cancelled_before_it_began_is_closed() -> None:
    """Else Python warns, at some later time, that it was never awaited."""

    async def main() -> str:
        child = sleep_ns(10)

        async def fails() -> None:
            async with Join() as join:
                join.start(child, "child")
                raise OSError("before the child ran")

        with pytest.raises(ExceptionGroup):
            await fails()
        state = inspect.getcoroutinestate(child)
        child.close()
        return state

    assert run(main()) == inspect.CORO_CLOSED


# --- stages and the digest -------------------------------------------------------------------------------------------


def test_a_stage_ends_when_it_is_told() -> None:
    recorder = Recorder()
    recorder.now = 70
    recorder.timeline.stage("device_save", 20, index=1)
    (stage,) = recorder.timeline.stages
    assert (stage.name, stage.index, stage.start_ns, stage.end_ns) == ("device_save", 1, 20, 70)


def record(
    *,
    resource: Resource = Resource.LOAD,
    what: str = "LOAD",
    track: str = "target",
    start: int = 10,
    end: int = 20,
    parent: int = 0,
    mark: int = 30,
    marked_by: int = 1,
    stage: int = 5,
    blocked: int = 0,
) -> str:
    recorder = Recorder()
    caused_by(NO_CAUSE)
    on_track("source")
    recorder.work(Resource.COPY, "read", 0, 10)
    caused_by(parent)
    on_track(track)
    recorder.work(resource, what, start, end)
    recorder.now = mark
    caused_by(marked_by)
    recorder.timeline.mark(Mark.RESUMED)
    recorder.now = 40
    recorder.timeline.stage("stop", stage)
    recorder.timeline.blocked(40 - blocked)
    return recorder.timeline.digest()


def test_the_same_recording_gives_the_same_digest() -> None:
    assert record() == record()


@pytest.mark.parametrize(
    "change",
    [
        {"resource": Resource.SETUP},
        {"what": "SAVE"},
        {"track": "source"},
        {"start": 9},
        {"end": 21},
        {"parent": NO_CAUSE},
        {"mark": 31},
        {"marked_by": 0},
        {"stage": 6},
        {"blocked": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_changes_with_whatever_was_recorded(change: dict[str, Any]) -> None:
    assert record(**change) != record()
