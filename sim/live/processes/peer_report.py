# SPDX-License-Identifier: GPL-2.0-or-later
"""What a target reports, as a source receives it: read and checked, before anything is computed from it.

A report of any other shape raises PeerProtocolError with the field, its value, and what it must be. One that passes can
be merged with the source's, summed and shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from proto_v3.errors import PeerProtocolError
from sim.live.merge_timelines import ProcessRecord
from sim.live.plain import from_plain
from sim.live.processes.comparison import StateComparison
from sim.live.processes.report import ProcessReport, VmmReport
from sim.scenario.scenario import Scenario

MALFORMED = "what the target reports is malformed"
MAX_NUMBER = 2**48
"""78 hours, or 256 TiB: sums over all that fits a message stay within 64 bits."""
MAX_STAGES = 2000
STAGE = re.compile(r"[a-z0-9_]{1,32}")
"""A stage's name becomes a column of the table of runs."""
SLACK_NS = 1_000_000_000
"""A target's clock may be that much ahead of what the source knows of it."""


def peer_report(report: object, scenario: Scenario, now_ns: int, comparison: StateComparison) -> VmmReport:
    """The target's report of a run of this scenario, of which it is `now_ns`, with digests for this comparison.
    PeerProtocolError if it is malformed."""
    try:
        read = from_plain(VmmReport, report)
    except PeerProtocolError as error:
        raise PeerProtocolError(f"{MALFORMED}: {error}") from None
    if wrong := comparison.wrong(scenario.devices, read.digests):
        raise PeerProtocolError(f"{MALFORMED}: VmmReport.digests: {wrong}")
    for wrong in _wrong(read, scenario, now_ns + SLACK_NS):
        raise PeerProtocolError(f"{MALFORMED}: VmmReport.{wrong}")
    return read


def _wrong(report: VmmReport, scenario: Scenario, until_ns: int) -> Iterator[str]:
    yield from _wrong_numbers(report, "")
    if report.peer is not None:
        yield "peer: must be None, a target has received no report"
    if report.measured is None:
        return
    side, names = report.measured.side, [device.name for device in scenario.devices]
    if [device.name for device in side.devices] not in ([], names):
        yield f"measured.side.devices: must be none, or those of the scenario, {', '.join(names)}"
    times_ns = [side.ended_ns, *(load.end_ns for device in side.devices for load in device.critical_loads)]
    if max(times_ns) > until_ns:
        yield f"measured.side: a time of {max(times_ns)} ns is still to come"
    for name in ("vmm", "device"):
        process: ProcessReport | None = getattr(report.measured, name)
        if process is not None:
            yield from (f"measured.{name}.timeline: {wrong}" for wrong in _wrong_timeline(process, until_ns))


def _wrong_numbers(value: object, name: str) -> Iterator[str]:
    """Numbers that no run has. A time may be before the run's own beginning."""
    if is_dataclass(value):
        for each in fields(value):
            yield from _wrong_numbers(getattr(value, each.name), f"{name}.{each.name}" if name else each.name)
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from _wrong_numbers(each, f"{name}.{at}")
    elif isinstance(value, int) and not (-MAX_NUMBER if name.endswith("_ns") else 0) <= value <= MAX_NUMBER:
        yield f"{name} = {value}: is no number that a run can have"


def _wrong_timeline(process: ProcessReport, until_ns: int) -> Iterator[str]:
    try:
        record = ProcessRecord.of(process.timeline)
    except PeerProtocolError as error:
        yield str(error)
        return
    for table, columns in record.tables.items():
        for column in ("end_ns", "at_ns"):
            if column in columns and len(columns[column]) and int(columns[column].max()) > until_ns:
                yield f"{column} of {table}: {columns[column].max()} ns is still to come"
    for name in record.stage_names:
        if not STAGE.fullmatch(name):
            yield f"stage_names: {name!r} must match {STAGE.pattern}"
    if len(record.stages()) > MAX_STAGES:
        yield f"stages: {len(record.stages())} of them; there must be at most {MAX_STAGES}"
