# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU was seen to do, by kept records of migrations in a real kernel (tests/data/qemu/).

The rules of docs/v2.md hold, and the project's VMMs make the same calls on the simulated device.
"""

from __future__ import annotations

import dataclasses

import pytest

from experiments.logs.events import TraceEvent
from experiments.logs.events import parse as parse_trace
from tests.real.qemu import simulated
from tests.real.qemu.calls import LoggedCall, merged, parse
from tests.real.qemu.cases import BY_NAME, CASES, Act, End
from tests.real.qemu.compare import compare, conditions_of
from tests.real.qemu.facts import FACTS, shown_by
from tests.real.qemu.kept import kept, records
from tests.real.qemu.phases import Phase, phased
from tests.real.qemu.run import ended_as_expected, is_example
from tests.real.qemu.trace import thinned

NAMES = [path.name for path in kept()]
COMPARED = [name for name in NAMES if End.REFUSED not in records()[name].case.ends]
SIMULATED = [name for name in COMPARED if records()[name].case.act in (None, Act.CANCEL_PRECOPY)]
"""Not those whose target is killed, or that are cancelled later than the simulation can be."""


def test_there_is_a_record_of_each_case_and_version() -> None:
    assert sorted(NAMES) == sorted(f"{case.name}-{version}" for case in CASES for version in case.versions)


@pytest.mark.parametrize("name", NAMES)
def test_qemu_ended_as_the_case_says(name: str) -> None:
    seen = records()[name]
    assert ended_as_expected(seen.case, seen.record)
    assert is_example(seen.case, seen.record)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, FACTS.index(fact), id=f"{name}-{fact.name}")
        for name in NAMES
        for fact in shown_by(records()[name])
    ],
)
def test_the_rule_holds(name: str, number: int) -> None:
    FACTS[number].check(records()[name])


def test_each_fact_is_shown_by_a_record() -> None:
    shown = {fact.name for seen in records().values() for fact in shown_by(seen)}
    assert [fact.name for fact in FACTS if fact.name not in shown] == []


@pytest.mark.parametrize("name", SIMULATED)
def test_the_project_makes_the_same_calls_on_the_simulated_device(name: str) -> None:
    seen = records()[name]
    ours = simulated.migrate(seen.case, name.rpartition("-")[2])
    assert (ours.source_runs, ours.target_runs) == (seen.record.source_runs, seen.record.target_runs)
    findings = compare(seen.phases, phased(ours.calls), conditions_of(seen.case, same_driver=False))
    assert [str(finding) for finding in findings if finding.wrong] == []


# --- the comparison finds what differs --------------------------------------------------------------------------------


def differing(name: str, calls: list[LoggedCall]) -> list[str]:
    """The aspects in which these calls differ from the record's own, against the rules."""
    seen = records()[name]
    findings = compare(seen.phases, phased(calls), conditions_of(seen.case, same_driver=True))
    return [f"{finding.rule.phase}, {finding.rule.aspect}" for finding in findings if finding.wrong]


def swapped(calls: list[LoggedCall], phase: Phase) -> list[LoggedCall]:
    """The same calls, the devices' names exchanged in one phase."""
    part = set(phased(calls)[phase])
    other = {"a0": "a1", "a1": "a0", "b0": "b1", "b1": "b0"}
    return [dataclasses.replace(call, device=other[call.device]) if call in part else call for call in calls]


def test_a_record_is_like_itself() -> None:
    for name in COMPARED:
        assert differing(name, records()[name].record.calls) == []


@pytest.mark.parametrize(
    ("phase", "aspect"),
    [
        (Phase.STOP, "order"),
        (Phase.DRAIN, "order"),
        (Phase.END, "states"),
        (Phase.TARGET_SETUP, "order"),
        (Phase.RESUME, "states"),
    ],
)
def test_another_order_of_the_devices_is_found(phase: Phase, aspect: str) -> None:
    calls = swapped(records()["ack-11.1"].record.calls, phase)
    assert f"{phase}, {aspect}" in differing("ack-11.1", calls)


def test_a_call_that_is_missing_is_found() -> None:
    calls = records()["ack-11.1"].record.calls
    look = next(call for call in phased(calls)[Phase.STOP] if call.name == "precopy_info")
    assert differing("ack-11.1", [call for call in calls if call is not look]) == ["stop, order"]


def test_larger_writes_are_found_and_a_few_more_are_not() -> None:
    calls = records()["ack-11.1"].record.calls
    writes = [call for call in calls if call.name == "write"]
    first, second = writes[0], writes[1]
    joined = dataclasses.replace(first, result=first.result + second.result)
    fewer = [joined if call is first else call for call in calls if call is not second]
    assert differing("ack-11.1", fewer) == ["target: load, largest write"]
    halves = dataclasses.replace(second, result=second.result // 2)
    more = [half for call in calls for half in ([halves, halves] if call is second else [call])]
    assert differing("ack-11.1", more) == []


def test_one_pass_out_of_resuming_is_found() -> None:
    calls = records()["ack-11.1"].record.calls
    once = [call for call in calls if call.arc != ("RESUMING", "RUNNING_P2P")]
    assert differing("ack-11.1", once) == ["target: resume, states"]


# --- the logs ---------------------------------------------------------------------------------------------------------


def test_a_line_of_the_drivers_log() -> None:
    (call,) = parse(["12 1790000000123456789 311 set_state RUNNING->PRE_COPY fd=1 -> 0"], "a0")
    assert call == LoggedCall("a0", "set_state", "RUNNING->PRE_COPY fd=1", 0, 1790000000123456789, 311, 12)
    assert call.arc == ("RUNNING", "PRE_COPY")
    assert call.value("fd") == 1
    assert parse([str(call)]) == [call]


@pytest.mark.parametrize(
    ("line", "args", "result"),
    [
        ("3 5 7 read fd=0 size=1048576 -> -42", "fd=0 size=1048576", -42),
        ("3 5 7 reset -> 0", "", 0),
        ("3 5 7 release fd=0", "fd=0", 0),
    ],
)
def test_results_and_arguments_may_be_missing(line: str, args: str, result: int) -> None:
    (call,) = parse([line], "b1")
    assert (call.args, call.result) == (args, result)


def test_what_is_no_line_of_a_log_is_refused() -> None:
    with pytest.raises(ValueError, match="not a call"):
        parse(["set_state RUNNING"], "a0")
    with pytest.raises(ValueError, match="not a call"):
        parse(["3 5 7 reset -> 0"])  # of which device?


def test_logs_of_several_devices_are_merged_by_time() -> None:
    logs = [parse(["0 10 1 open -> 0", "1 30 1 close"], "a0"), parse(["0 20 1 open -> 0"], "b0")]
    assert [(call.device, call.name) for call in merged(logs)] == [("a0", "open"), ("b0", "open"), ("a0", "close")]


def test_both_forms_of_qemus_trace() -> None:
    old = "40@1796060701.000123:vfio_state_pending_exact  (a0) precopy 12344 postcopy 0 stopcopy size 56"
    new = "2026-11-30T17:45:01.000123Z vfio_state_pending  (a0) stopcopy size 56, exact 1, final 0"
    (first, second) = parse_trace([old, "qemu-system-x86_64: warning: no event", new])
    assert first == TraceEvent(1796060701000123, "vfio_state_pending_exact", first.args)
    assert second == TraceEvent(1796060701000123, "vfio_state_pending", second.args)
    assert first.value("stopcopy size") == second.value("stopcopy size") == 56
    assert second.value("exact") == 1
    assert second.value("dirty") is None


def test_of_repeated_events_the_first_and_the_last_stay() -> None:
    block = "40@1.000000:vfio_save_block  (a0) data_size"
    lines = [f"{block} 1", f"{block} 2", f"{block} 3", "40@1.000000:migrate_set_state new state device", f"{block} 4"]
    assert thinned(lines) == [lines[0], lines[2], lines[3], lines[4]]
    assert thinned(lines[:2]) == lines[:2]


def test_cases_have_names_of_their_own() -> None:
    assert len(BY_NAME) == len(CASES)
