# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated device answers as drivers of a real kernel did, call by call, but for what is listed.

The kernel's answers are kept in tests/data/conformance. In the guest, tests/real/test_conformance.py asks it again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from proto_v3.vfio import fsm
from proto_v3.vfio.uapi import MigrationFlags, State
from tests.conformance.calls import ALL, GROUPS, STATES, TARGETS
from tests.conformance.differences import DIFFERENCES, Answers, Judged, judge
from tests.conformance.record import Record, read, records, write
from tests.conformance.simulated import LIKE, simulated_answers

V2 = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY
RECORDS = [pytest.param(path, id=path.stem) for path in records()]


@cache
def simulated(driver: str) -> Answers:
    return {group: simulated_answers(driver, cases) for group, cases in GROUPS.items()}


@cache
def judged(path: Path) -> Judged:
    record = read(path)
    return judge(record.driver, record.release, record.answers, simulated(record.driver))


def test_each_record_is_of_a_driver_that_is_simulated() -> None:
    assert {read(path).driver for path in records()} == set(LIKE)


@pytest.mark.parametrize("path", RECORDS)
def test_a_record_has_an_answer_to_each_call(path: Path) -> None:
    record = read(path)
    assert {group: list(cases) for group, cases in sorted_cases(record.answers).items()} == {
        group: sorted(cases) for group, cases in GROUPS.items()
    }, "renew it in the guest: python -m tests.conformance.record"


def sorted_cases(answers: Answers) -> dict[str, list[str]]:
    return {group: sorted(cases) for group, cases in answers.items()}


@pytest.mark.slow
@pytest.mark.rule("v2.contract.2", "v2.contract.3", "v2.contract.4", "v2.contract.5", "v2.contract.8")
@pytest.mark.parametrize("path", RECORDS)
def test_the_simulated_device_answers_as_the_driver_but_for_what_is_listed(path: Path) -> None:
    assert judged(path).unlisted == []


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDS)
def test_what_is_listed_differs_in_as_many_cases_as_it_says(path: Path) -> None:
    assert judged(path).stale == {}


@pytest.mark.rule("v2.contract.2", "v2.contract.3")
@pytest.mark.parametrize("path", RECORDS)
def test_all_cells_of_the_state_machine_are_the_kernels(path: Path) -> None:
    """The next state of each pair, as proto_v3's table has it."""
    cells = read(path).answers["cells"]
    for start in STATES:
        case = f"save, RESUMING, write whole {ALL}" if start == "RESUMING" else start
        for name in TARGETS:
            target = State[name] if name in State.__members__ else int(name, 0)
            try:
                hops = [State[start], *fsm.path(State[start], target, V2)]
                opens = len(hops) > 1 and tuple(hops[-2:]) in fsm.BEGINS_SESSION
                expected = f"ok{', a fd' * opens}; {name}"
            except fsm.InvalidTransitionError:
                expected = f"EINVAL; {start}"
            assert cells[f"{case}: {name}; state"] == expected


def test_a_case_stands_once() -> None:
    cases = Counter(case for cases in GROUPS.values() for case in cases)
    assert [case for case, count in cases.items() if count > 1] == []


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_answer_that_is_not_listed_is_told_and_so_is_a_listed_one_that_is_gone() -> None:
    release = "7.3.4"
    same = simulated("mtty")
    found = judge("mtty", release, same, same)
    assert found.unlisted == []
    assert set(found.stale) == {each for each in DIFFERENCES if each.holds_for("mtty", release)} != set()
    case = "RUNNING: STOP; state"
    other = {**same, "cells": {**same["cells"], case: "EIO; ERROR"}}
    assert judge("mtty", release, other, same).unlisted == [("cells", case, "EIO; ERROR", "ok; STOP")]


@pytest.mark.parametrize(
    ("since", "until", "release", "holds"),
    [
        ("7.1", "", "7.3.4", True),
        ("7.1", "", "6.12.1", False),
        ("7.1", "7.3", "7.2.9-rc1", True),
        ("7.1", "7.3", "7.3.0", False),
    ],
)
def test_a_difference_is_of_a_driver_and_of_versions_of_the_kernel(
    since: str, until: str, release: str, holds: bool
) -> None:
    one = replace(DIFFERENCES[0], since=since, until=until)
    assert one.holds_for(one.driver, release) == holds
    assert not one.holds_for("another", release)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record("mtty", "7.3.4", {"a": "1"}, simulated("mtty"))
    write(record, tmp_path / record.name)
    assert read(tmp_path / "mtty-7.3.4.json") == record
