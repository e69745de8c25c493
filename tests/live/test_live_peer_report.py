# SPDX-License-Identifier: GPL-2.0-or-later
"""A target's report of any shape: it is read, or the run is FAILED with an error that names the field; never more."""

from __future__ import annotations

import asyncio
import copy
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from experiments.commands.live import delays, live_manifest, streams, table
from experiments.report import comparison, findings
from proto_v3.errors import PeerProtocolError
from proto_v3.timeline import NO_CAUSE, Mark, Resource, caused_by
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.wire.frames import Frame, Kind, encode_header
from sim.live.fd.store import DIGEST_BYTES
from sim.live.merge_timelines import TABLES, ProcessTimeline
from sim.live.plain import from_plain, to_plain
from sim.live.processes.comparison import BLOCK_BY_BLOCK
from sim.live.processes.peer_report import MALFORMED, MAX_NUMBER, peer_report
from sim.live.processes.report import Measured, ProcessReport, VmmReport
from sim.live.processes.settings import Settings
from sim.live.real_time import Delays
from sim.live.result import LiveResult, SideEnd, result
from sim.live.run import run_to
from sim.live.tcp.sockets import Granted
from sim.report import Counters, CriticalLoad, DeviceReport, SideReport
from sim.scenario.protocol import Protocol
from tests.build.live import live_scenario
from tests.build.wires import ACCEPT, ODD, TargetPeer, frame, listening, message, read_message

SCENARIO = live_scenario()
APPLIED = Protocol.parse("v3-n2", SCENARIO).applied(SCENARIO)
NOW_NS = 10**9
DIGESTS = [bytes(DIGEST_BYTES * (each.blocks + each.critical.objects)) for each in SCENARIO.devices]
SEEDS = 600


def process(at_ns: dict[Mark, int], stage: str) -> ProcessReport:
    now_ns = 0
    caused_by(NO_CAUSE)
    timeline = ProcessTimeline(lambda: now_ns)
    for mark, now_ns in at_ns.items():
        timeline.work(Resource.LOAD, "load", now_ns - 5)
        timeline.waited_for(Resource.LINK, "frame", f"edge {stage}", 1, now_ns - 3)
        timeline.sent("answers", now_ns)
        timeline.blocked(now_ns - 1)
        timeline.mark(mark)
        timeline.stage(stage, now_ns - 2)
    return ProcessReport(timeline.export(), Delays(3, 100, 1, 2, 3), 1000, 900)


def measured(name: str, at_ns: dict[Mark, int]) -> Measured:
    loads = [CriticalLoad(1, True, 2, 0, 100, 5, 6)] if name == "target" else []
    devices = [DeviceReport(each.name, each.whole_bytes, Counters(), loads) for each in SCENARIO.devices]
    side = SideReport(700, Counters(connections=3), devices)
    return Measured(side, process(at_ns, "ram_load"), process({}, "x"), [])


def source(peer: VmmReport | None) -> VmmReport:
    at_ns = {Mark.STOP_ORDERED: 100, Mark.STOPPED: 200, Mark.DRAINED: 300}
    return VmmReport(
        False, [], measured=measured("source", at_ns), digests=DIGESTS, kind=OutcomeKind.COMPLETED, peer=peer,
        sockets=[Granted(1, 2, None)],
    )  # fmt: skip


def target(at_ns: dict[Mark, int]) -> dict[str, Any]:
    report = VmmReport(True, [], measured=measured("target", at_ns), digests=DIGESTS, whole=True)
    plain: dict[str, Any] = to_plain(report)
    return plain


def honest() -> dict[str, Any]:
    """The report of a target that took everything in, as it comes from the wire."""
    at_ns = {Mark.TRANSFERRED: 400, Mark.LOADED: 500, Mark.CONFIGURED: 550, Mark.RESUMED: 600}
    return target(at_ns)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values in it."""
    if way:
        yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*way, key))


def at(report: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        report = report[key]
    return report


def shown(report: object) -> LiveResult:
    """What a user gets of a run whose target reports this; an error only where `peer_report` raises one."""
    run = result(APPLIED, 1, {"source": SideEnd(source(peer_report(report, SCENARIO, NOW_NS, BLOCK_BY_BLOCK)), [])}, [])
    frame = table([run], Settings())
    assert frame.height == 1
    live_manifest([run], Settings())
    assert findings.conclusion(frame)
    assert [*streams([run]), *delays([run]), *comparison.sections(SCENARIO, frame)]
    return run


def refusal(report: object) -> str:
    """What is wrong with it in words; empty if it can be shown."""
    try:
        run = shown(report)
    except PeerProtocolError as error:
        return str(error)
    return "" if run.outcome.kind in (OutcomeKind.COMPLETED, OutcomeKind.FAILED) else "?"


def is_refusal(words: str) -> bool:
    return words.startswith(f"{MALFORMED}: ") and "VmmReport" in words and words.isprintable()


@pytest.mark.quick
def test_an_honest_report_is_a_completed_run() -> None:
    outcome = shown(honest()).outcome
    assert (outcome.kind, outcome.downtime_ns) == (OutcomeKind.COMPLETED, 500)
    assert outcome.phases_ns["load"] == 100


@pytest.mark.parametrize("odd", range(len(ODD)))
def test_a_value_of_another_type_anywhere_is_named_or_does_no_harm(odd: int) -> None:
    whole = honest()
    assert is_refusal(refusal(ODD[odd]))
    for way in places(whole):
        report = copy.deepcopy(whole)
        at(report, way[:-1])[way[-1]] = ODD[odd]
        words = refusal(report)
        assert not words or is_refusal(words), way


def test_a_key_that_is_missing_or_too_many_is_named() -> None:
    whole = honest()
    for way in places(whole):
        if isinstance(at(whole, way[:-1]), dict):
            report = copy.deepcopy(whole)
            del at(report, way[:-1])[way[-1]]
            assert is_refusal(refusal(report)), way
            at(report, way[:-1])[f"{way[-1]} \x1b[2J"] = 1
            assert is_refusal(refusal(report)), way


@pytest.mark.parametrize("start", range(0, SEEDS, 200))
def test_columns_of_any_numbers_are_named_or_do_no_harm(start: int) -> None:
    """Times that run backwards or are still to come, causes in a circle, spans that are not there."""
    whole, refused = honest(), 0
    ways = [way for way in places(whole) if isinstance(at(whole, way), bytes) and "timeline" in way and at(whole, way)]
    for seed in range(start, start + 200):
        rng, report = random.Random(seed), copy.deepcopy(whole)
        for way in rng.sample(ways, rng.choice([1, 1, 2, 5])):
            data = at(report, way)
            numbers = np.frombuffer(data, f"<{TABLES[way[-2]][way[-1]]}").copy()
            numbers[rng.randrange(len(numbers))] = rng.choice([-1, 0, 1, 2, 3, 100, 127, -128])
            if rng.random() < 0.5:
                rng.shuffle(numbers)
            if numbers.itemsize == 8 and rng.random() < 0.5:
                numbers[rng.randrange(len(numbers))] = rng.choice([2**62, -(2**62), 2**40, -(2**40), 700, 50])
            at(report, way[:-1])[way[-1]] = numbers.tobytes()
        words = refusal(report)
        assert not words or is_refusal(words), seed
        refused += bool(words)
    assert 0 < refused < 200


@pytest.mark.parametrize(
    ("way", "value", "named"),
    [
        (("guest_runs",), 1, "VmmReport.guest_runs = 1: must be of type bool"),
        (("kind",), "DONE", "VmmReport.kind = 'DONE': must be"),
        (("measured", "side", "ended_ns"), NOW_NS * 3, "measured.side: a time of 3000000000 ns is still to come"),
        (("measured", "side", "ended_ns"), float("nan"), "VmmReport.measured.side.ended_ns = nan: must be of type int"),
        (("measured", "side", "counters", "reads"), -1, "measured.side.counters.reads = -1: is no number"),
        (("measured", "vmm", "cpu_ns"), MAX_NUMBER + 1, "measured.vmm.cpu_ns = .* is no number that a run can have"),
        (("measured", "side", "devices"), [], None),
        (("measured", "side", "devices", 0, "name"), "other", "measured.side.devices: must be none, or those of"),
        (("measured", "vmm", "timeline"), {}, "measured.vmm.timeline: the timeline of a process has a wrong keys"),
        (("measured", "vmm", "timeline", "stage_names"), ["=1+1"], "timeline: stage_names: '=1\\+1' must match"),
        (("measured", "vmm", "delays"), None, "VmmReport.measured.vmm.delays = None: must be of type dict"),
        (("digests",), [b"short"], "VmmReport.digests: must be none, or have"),
        (("peer",), honest(), "VmmReport.peer: must be None"),
        (("failures",), [{"text": "x"}], "VmmReport.failures.0.* is missing"),
    ],
)
def test_the_error_names_the_field(way: tuple[Any, ...], value: Any, named: str | None) -> None:
    report = honest()
    at(report, way[:-1])[way[-1]] = value
    if named is None:
        assert shown(report).outcome.kind is OutcomeKind.COMPLETED
    else:
        with pytest.raises(PeerProtocolError, match=named):
            peer_report(report, SCENARIO, NOW_NS, BLOCK_BY_BLOCK)


@pytest.mark.parametrize(("marks", "reason"), [({}, "no mark"), ({Mark.RESUMED: 50}, "resumed 50 ns before it was to")])
def test_a_downtime_that_cannot_be_is_a_failed_run(marks: dict[Mark, int], reason: str) -> None:
    others = dict.fromkeys((Mark.TRANSFERRED, Mark.LOADED, Mark.CONFIGURED), 40)
    outcome = shown(target(others | marks if marks else {})).outcome
    assert outcome.kind is OutcomeKind.FAILED
    assert reason in outcome.reason


class Liar(TargetPeer):
    """It takes part up to its result, which is wrong."""

    async def script(self, listener: socket.socket) -> None:
        reader, session = await self._take(listener)
        await reader.readexactly(32)
        offer = await read_message(reader)
        session.write(message("accept", **ACCEPT | {"boot_id": offer["boot_id"]}))
        _, data = await self._take(listener)
        session.write(message("connected"))
        while (await read_message(reader))["kind"] == "clockrequest":
            session.write(message("clockreply", at_ns=time.perf_counter_ns()))
        session.write(message("prepared"))
        while (await read_message(reader))["kind"] != "start":
            pass
        failed = encode_header(Frame(Kind.FAILED))
        session.write(message("started"))
        data.write(frame(failed, b""))
        session.write(message("result", report=honest() | {"failures": [{"text": "\x1b[2J"}]}))
        await reader.read()


def test_a_live_run_whose_target_reports_nonsense_is_failed() -> None:
    async def main() -> LiveResult:
        async with listening() as (listener, address):
            peer = Liar(lambda _, data: data)
            following = asyncio.create_task(peer.follow(peer.script(listener), asyncio.Event()))
            run = await run_to(SCENARIO, Protocol.parse("v2", SCENARIO), 1, Settings(), address)
            await following
            return run

    outcome = asyncio.run(main()).outcome
    assert outcome.kind is OutcomeKind.FAILED
    assert f"{MALFORMED}: VmmReport.failures.0." in outcome.reason
    assert outcome.guest_runs_at == "source"


def test_what_it_says_is_cleaned() -> None:
    report = honest() | {"failures": to_plain([])}
    report["note"] = "\x1b]0;pwn\x07\nthe guest runs here"
    assert from_plain(VmmReport, report).note == r"\x1b]0;pwn\x07 the guest runs here"
