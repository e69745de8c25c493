# SPDX-License-Identifier: GPL-2.0-or-later
"""What sides report: every counter reaches the table of runs, and reports travel, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import msgpack
import polars as pl
import pytest

from experiments.runs import frame as table
from proto_v3.errors import PeerProtocolError
from proto_v3.timeline import PHASES, Resource, Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.live.plain import MAX_INT, MAX_TEXT_CHARS, from_plain, to_plain
from sim.live.processes.report import Measured, ProcessReport, StreamReport, VmmReport
from sim.live.real_time import Delays
from sim.live.tcp.sockets import Granted
from sim.outcome import Outcome, RunReport, ended, reason_of
from sim.report import Counters, CriticalLoad, DeviceReport, DriverMessage, Failure, SideReport
from sim.run import simulate
from sim.scenario.protocol import Protocol
from tests.build.scenario import small_scenario

COUNTERS = [each.name for each in fields(Counters)]
SCENARIO = small_scenario()


@cache
def run(protocol: str) -> Outcome:
    return simulate(SCENARIO, Protocol.parse(protocol, SCENARIO), 1)


def counters(name: str, value: int) -> Counters:
    return Counters(**{name: value})


# --- from the fields to the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTERS)
def test_whoever_counts_it_a_counter_reaches_the_table_of_runs(name: str) -> None:
    """As the sum of all parts; of a peak, as the largest. A new field is tested without a change here."""
    source = SideReport(1, counters(name, 1), [DeviceReport("a", 0, counters(name, 4))])
    target = SideReport(1, counters(name, 2), [DeviceReport("a", 0, counters(name, 8))])
    row = table.row(ended(RunReport("s", "v2", 1, Timeline(lambda: 0), source, target), OutcomeKind.FAILED))
    (column,) = [key for key, value in counters(name, 1).columns().items() if value]
    assert row[column] == (8 if name.startswith("peak_") else 15)
    assert sum(value for key, value in row.items() if key in Counters().columns()) == row[column], "in no other column"


def test_a_stop_after_which_the_guest_runs_at_the_target_was_not_in_vain() -> None:
    """The source does not know it, where what the target said last is lost."""
    source = SideReport(1, Counters(retries_stopped_ns=2, stopped_in_vain_ns=9))
    for where, in_vain_ns in (("", 9), ("source", 9), ("target", 2)):
        run = RunReport("s", "v2", 1, Timeline(lambda: 0), source, guest_runs_at=where)
        assert ended(run, OutcomeKind.FAILED).counters.stopped_in_vain_ns == in_vain_ns


def test_of_one_device_and_of_lost_connections_the_first_failure_is_told_in_order_of_time() -> None:
    log = [DriverMessage(1, "firmware SAVE 4: ETIMEDOUT"), DriverMessage(9, "something later")]
    source = SideReport(9, Counters(), [DeviceReport("a", 0, Counters(), log=log)])
    run = RunReport("s", "v3-n2", 1, Timeline(lambda: 0), source)
    failures = [
        Failure("source", "source: connection 1", 8, lost=True),
        Failure("target", "target: connection 0", 7, lost=True),
        Failure("source", "source, a stream 1: poll() failed", 6, device="a"),
        Failure("source", "source, a: read() failed", 5, device="a"),
        Failure("target", "target: the other side failed", 2, echo=True),
    ]
    told = "source, a: read() failed; first cause: firmware SAVE 4: ETIMEDOUT; target: connection 0"
    assert reason_of(run, failures) == told
    assert reason_of(run, failures[-1:]) == "target: the other side failed"
    assert reason_of(run, []) == ""


def columns_of_a_row(outcome: Outcome) -> list[str]:
    """By the fields of the outcome and of its counters."""
    columns: list[str] = []
    for each in fields(Outcome):
        match each.name:
            case "kind":
                columns.append("outcome")
            case "phases_ns":
                columns += [f"phase_{name}_ns" for name in PHASES]
            case "critical_path_ns":
                columns += [f"path_{name.name.lower()}_ns" for name in Resource] + ["path_unexplained_ns"]
            case "counters":
                columns += Counters().columns()
            case "stages":
                columns += [f"stage_{stage.name}_{stage.index}_ns" for stage in outcome.stages]
            case name:
                columns.append(name)
    return columns


@pytest.mark.parametrize("protocol", ["v2", "v3-n2"])
def test_a_row_has_what_the_fields_say_in_their_order(protocol: str) -> None:
    outcome = run(protocol)
    assert list(table.row(outcome)) == columns_of_a_row(outcome)
    failed = replace(outcome, kind=OutcomeKind.FAILED, stages=())
    assert list(table.row(failed)) == columns_of_a_row(failed)


def test_the_columns_of_the_kept_tables_are_there_in_their_order_and_of_their_types() -> None:
    """A new counter may stand between them."""
    schema = pl.read_parquet_schema("results/mlx5-2vf/runs.parquet")
    kept = {name: kind for name, kind in schema.items() if not name.startswith("stage_")}
    frame = table.table([run("v2")])
    assert [(name, kind) for name, kind in frame.schema.items() if name in kept] == list(kept.items())


def test_every_counter_says_its_unit_or_counts_things() -> None:
    things = {
        "retries",
        "devices_reset_under_guest",
        "late_final_checks",
        "connections",
        "messages",
        "wakeups",
        "reads",
    }
    assert {name for name in Counters().columns() if "_ns" not in name and "bytes" not in name} == things


# --- over a wire ------------------------------------------------------------------------------------------------------


def report() -> VmmReport:
    """A report in which every field has a value, no number twice."""
    number = iter(range(1, 1000))
    process = ProcessReport(
        {"names": ["a"], "rows": b"\0"}, Delays(*(next(number) for _ in range(5))), next(number), next(number)
    )
    device = DeviceReport(
        "a",
        next(number),
        Counters(**{name: next(number) for name in COUNTERS}),
        [CriticalLoad(next(number), True, *(next(number) for _ in range(5)))],
        [next(number)],
        [DriverMessage(next(number), "a command failed")],
    )
    side = SideReport(next(number), Counters(**{name: next(number) for name in COUNTERS}), [device], ["a was reset"])
    return VmmReport(
        guest_runs=True,
        failures=[Failure("source", "why", next(number), echo=True, device="a", cause="w")],
        measured=Measured(side, process, process, [StreamReport("fd", Counters(reads=next(number)))]),
        digests=[b"12345678"],
        kind=OutcomeKind.COMPLETED,
        note="fell back",
        peer=None,
        clock_uncertainty_ns=next(number),
        sockets=[Granted(next(number), next(number), None)],
    )


def sent() -> Any:
    return msgpack.unpackb(msgpack.packb(to_plain(report())))


def test_a_report_arrives_as_it_was_sent() -> None:
    assert from_plain(VmmReport, sent()) == report()


def places(value: Any, name: str = "VmmReport") -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every field: the map in which it stands, its key, and what errors call it. Not below what may be anything."""
    if isinstance(value, list):
        for at, item in enumerate(value):
            yield from places(item, f"{name}.{at}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield value, key, f"{name}.{key}"
            if key != "timeline":
                yield from places(inner, f"{name}.{key}")


def refusal(body: Any) -> str:
    with pytest.raises(PeerProtocolError) as refused:
        from_plain(VmmReport, body)
    return str(refused.value)


def test_whatever_field_is_missing_or_of_another_type_is_refused_by_its_name() -> None:
    count = len(list(places(sent())))
    assert count > 3 * len(COUNTERS)
    for at in range(count):
        for how in ("missing", "wrong"):
            body = sent()
            table, key, name = list(places(body))[at]
            if how == "missing":
                del table[key]
                assert refusal(body) == f"{name} is missing"
            else:
                table[key] = 1.5
                assert refusal(body).startswith(f"{name} = 1.5: must be ")


@pytest.mark.parametrize("value", [MAX_INT + 1, -MAX_INT - 1, 2**64 - 1, True, "1", None])
def test_a_counter_that_is_no_number_of_its_kind_is_refused(value: object) -> None:
    body = sent()
    body["measured"]["side"]["counters"]["retries"] = value
    assert refusal(body).startswith("VmmReport.measured.side.counters.retries = ")


@pytest.mark.parametrize("body", [None, [], {1: 2}, "report", {"guest_runs": True}])
def test_what_is_no_report_is_refused(body: object) -> None:
    assert refusal(body).startswith("VmmReport")


def test_what_a_report_does_not_have_is_refused() -> None:
    assert refusal(sent() | {"more": 1}) == "VmmReport has an unknown field 'more'"
    assert refusal(sent() | {"kind": "DONE"}).startswith("VmmReport.kind = 'DONE': must be COMPLETED or ")
    assert len(from_plain(VmmReport, sent() | {"note": "x" * 100_000}).note) <= MAX_TEXT_CHARS
