# SPDX-License-Identifier: GPL-2.0-or-later
"""A run as a Perfetto trace and as a table of spans: read back, and held against the timeline that they tell of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb

from experiments.cli import main
from experiments.trace.samples import MAX_SAMPLES, Samples
from experiments.trace.traced_run import TracedRun, spans, traced_run, write_trace
from experiments.trace.tracks import Slice, lanes, place
from proto_v3.timeline import NO_CAUSE, Mark, Resource
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.scenario import BUSY, ENDS_EARLY, small_scenario, small_text

PROTOCOLS = ["v2", "v2-multifd", "v3-n3-pool", "v3-blocks-n2"]


@dataclass
class Drawn:
    """What a trace file holds."""

    root: str = ""
    description: str = ""
    names: list[str] = field(default_factory=list)
    """Of all tracks, with their groups in front, in the file's order, lanes once."""
    slices: dict[str, list[tuple[int, int, str, str, int | None]]] = field(default_factory=lambda: defaultdict(list))
    """By track: start, end, name, category, span."""
    counters: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    units: dict[str, str] = field(default_factory=dict)
    arrows: dict[int, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    """By flow: `from` or `to`, and the span, in the file's order."""
    times_ns: list[int] = field(default_factory=list)


def read_back(file: Path) -> Drawn:
    """Parse a trace. Fails where slices on one of its tracks do not nest, or have no end."""
    trace = pb.Trace()
    trace.ParseFromString(file.read_bytes())
    drawn = Drawn()
    tracks: dict[int, Any] = {}
    interned = trace.packet[0].interned_data
    names = {each.iid: each.name for each in interned.event_names}
    categories = {each.iid: each.name for each in interned.event_categories}
    open_slices: dict[int, list[Any]] = defaultdict(list)

    def path(uuid: int) -> str:
        track = tracks[uuid]
        return f"{path(track.parent_uuid)}/{track.name}" if track.parent_uuid else ""

    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in tracks
            tracks[track.uuid] = track
            name = path(track.uuid)
            drawn.root, drawn.description = drawn.root or track.name, drawn.description or track.description
            drawn.names += [] if name in drawn.names else [name]
            if track.HasField("counter"):
                is_bytes = track.counter.unit == pb.CounterDescriptor.UNIT_SIZE_BYTES
                drawn.units[name] = "bytes" if is_bytes else track.counter.unit_name
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        name = path(event.track_uuid)
        drawn.times_ns.append(packet.timestamp)
        if event.type == pb.TrackEvent.TYPE_COUNTER:
            drawn.counters[name].append((packet.timestamp, event.counter_value))
        elif event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
            (annotation,) = event.debug_annotations or [None]
            span = None if annotation is None else annotation.int_value
            open_slices[event.track_uuid].append((packet, span))
            for flow in event.flow_ids:
                drawn.arrows[flow].append(("from", span))
            for flow in event.terminating_flow_ids:
                drawn.arrows[flow].append(("to", span))
        else:
            assert event.type == pb.TrackEvent.TYPE_SLICE_END
            began, span = open_slices[event.track_uuid].pop()
            (category,) = began.track_event.category_iids
            what = names[began.track_event.name_iid]
            drawn.slices[name].append((began.timestamp, packet.timestamp, what, categories[category], span))
            assert not open_slices[event.track_uuid], "a lane's slices do not overlap"
    assert not any(open_slices.values()), "every slice has an end"
    return drawn


def traced_and_drawn(folder: Path, scenario: Scenario, protocol: str) -> tuple[TracedRun, Drawn]:
    traced = traced_run(scenario, Protocol.parse(protocol, scenario), 1)
    write_trace(traced, folder / "x.perfetto-trace")
    return traced, read_back(folder / "x.perfetto-trace")


@pytest.fixture(scope="module", params=PROTOCOLS)
def busy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TracedRun, Drawn]:
    return traced_and_drawn(tmp_path_factory.mktemp("trace"), BUSY, request.param)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _task(track: str) -> str:
    """Whose command it is."""
    task = track.partition(" ")[2] or "main thread"
    return re.sub(r"^device (\d+)$", r"dev\1 device thread", task)


def test_every_span_is_drawn_once_where_and_when_it_was(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    engines = pl.col("resource").is_in(["firmware", "load"])
    told = (
        spans(traced)
        .with_columns(
            what=pl.when(engines)
            .then(pl.col("what") + " " + pl.col("track").map_elements(_task, pl.String))
            .otherwise("what")
        )
        .select("start_ns", "end_ns", "what", "resource", "span")
        .rows()
    )
    own = [each for name, track in drawn.slices.items() for each in track if not name.startswith("/downtime/")]
    assert Counter(each for each in own if each[4] is not None) == Counter(told)


def test_packets_are_in_order_of_time(busy: tuple[TracedRun, Drawn]) -> None:
    _, drawn = busy
    assert drawn.times_ns == sorted(drawn.times_ns)


def test_the_phases_tile_the_downtime(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    phases = drawn.slices["/downtime/phases"]
    assert {name: end - start for start, end, name, *_ in phases} == {
        name: took for name, took in traced.outcome.phases_ns.items() if took
    }
    assert [start for start, *_ in phases[1:]] == [end for _, end, *_ in phases[:-1]]
    assert phases[0][0] == traced.timeline.marks[Mark.STOP_ORDERED]


def test_the_critical_path_is_a_track(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    path = drawn.slices["/downtime/critical path"]
    assert [each[:4] for each in path] == [
        (step.start_ns, step.end_ns, step.what, step.resource.name.lower()) for step in traced.timeline.critical_path()
    ]
    assert [each[4] for each in path] == [span for span, _, _ in traced.timeline.critical_spans()]


def test_arrows_lead_from_each_cause_to_its_effect(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    spans = traced.timeline.recorded().spans
    causes = {span: cause for span, cause in enumerate(spans["cause"].tolist()) if cause != NO_CAUSE}
    for arrow in drawn.arrows.values():
        (_, cause), (_, effect) = arrow
        assert [way for way, _ in arrow] == ["from", "to"]
        assert causes.pop(effect) == cause
    for effect, cause in causes.items():  # those that would lead back in time are left out
        assert spans["start_ns"][cause] >= spans["start_ns"][effect]
    critical = {span for span, _, _ in traced.timeline.critical_spans()}
    assert critical & causes.keys() == set()


def test_stages_and_vcpus_are_drawn(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    stages = {(stage.start_ns, stage.end_ns, f"{stage.name} {stage.index}") for stage in traced.timeline.stages}
    assert {each[:3] for each in drawn.slices["/downtime/stages of the VMMs"]} == stages
    assert [each[2] for each in drawn.slices["/source host/guest/vCPUs"]] == ["running", "stopping", "stopped"]
    assert [each[2] for each in drawn.slices["/target host/guest/vCPUs"]] == ["stopped", "starting", "running"]
    ordered, resumed = (traced.timeline.marks[mark] for mark in (Mark.STOP_ORDERED, Mark.RESUMED))
    assert drawn.slices["/source host/guest/vCPUs"][0][:2] == (0, ordered)
    assert drawn.slices["/target host/guest/vCPUs"][1][1] == resumed


def test_the_title_tells_the_run(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    assert drawn.root == f"small {traced.outcome.protocol} seed 1"
    assert "COMPLETED" in drawn.description
    assert traced.outcome.digest in drawn.description


V2_TRACKS = """
/downtime/phases
/downtime/critical path
/downtime/stages of the VMMs
/source host/guest/vCPUs
/source host/VMM/RAM left
/source host/VMM/main thread
/source host/device dev/bytes left
/source host/device dev/unread bytes
/source host/device dev/dirty rate
/source host/firmware/engines
/link/bytes sent
/link/throughput
/link/connection 0
/link/connection 0 back
/link/sends that wait for room
/target host/guest/vCPUs
/target host/VMM/main thread
/target host/firmware/engines
"""

V3_TRACKS = """
/downtime/phases
/downtime/critical path
/downtime/stages of the VMMs
/source host/guest/vCPUs
/source host/VMM/RAM left
/source host/VMM/main thread
/source host/VMM/RAM
/source host/device dev/bytes left
/source host/device dev/unread bytes
/source host/device dev/dirty rate
/source host/device dev/stream 0
/source host/device dev/stream 1
/source host/device dev/stream 2
/source host/firmware/engines
/source host/locks/dev stream 1 waits
/source host/locks/dev stream 2 waits
/link/bytes sent
/link/throughput
/link/connection 0
/link/connection 0 back
/link/connection 1
/link/connection 2
/link/connection 3
/link/sends that wait for room
/target host/guest/vCPUs
/target host/VMM/main thread
/target host/device dev/device thread
/target host/device dev/stream 0
/target host/device dev/stream 1
/target host/device dev/stream 2
/target host/firmware/engines
"""


@pytest.mark.parametrize(("protocol", "expected"), [("v2", V2_TRACKS), ("v3-n2", V3_TRACKS)])
def test_tracks_stand_in_a_fixed_order_of_hosts_and_groups(tmp_path: Path, protocol: str, expected: str) -> None:
    _, drawn = traced_and_drawn(tmp_path, small_scenario({"driver.lock": "global"}), protocol)
    groups = {name.rpartition("/")[0] for name in drawn.names}
    assert [name for name in drawn.names if name not in groups and name] == expected.split("\n")[1:-1]


def test_a_pause_that_was_taken_back_shows_with_the_vcpus(tmp_path: Path) -> None:
    late = {"objects_each": 4, "during_stop_ms": [0.5]}
    scenario = small_scenario({"device.0.reconfigurations": late, "device.0.critical.setup_us": 2000.0})
    traced, drawn = traced_and_drawn(tmp_path, scenario, "v3-n1-retry")
    assert traced.outcome.counters.retries == 1
    states = [each[2] for each in drawn.slices["/source host/guest/vCPUs"]]
    assert states == ["running", "stopping", "stopped", "starting", "running", "stopping", "stopped"]


def test_vcpus_that_stop_in_no_time_are_drawn_by_the_marks(tmp_path: Path) -> None:
    at_once = {"vmm.vcpu_stop_ms": 0.0, "vmm.vcpu_start_ms": 0.0}
    _, drawn = traced_and_drawn(tmp_path, small_scenario(at_once), "v2")
    assert [each[2] for each in drawn.slices["/source host/guest/vCPUs"]] == ["running", "stopped"]
    assert next(each[2] for each in drawn.slices["/target host/guest/vCPUs"]) == "stopped"


@pytest.mark.parametrize("how", ENDS_EARLY)
def test_a_run_without_a_hand_over_has_no_downtime(tmp_path: Path, how: str) -> None:
    traced, drawn = traced_and_drawn(tmp_path, small_scenario(ENDS_EARLY[how]), "v2-reinit-flush-ack-reusable")
    assert traced.outcome.downtime_ns is None
    assert not {"/downtime/phases", "/downtime/critical path"} & set(drawn.names)
    assert len(traced.timeline) == sum(each[4] is not None for track in drawn.slices.values() for each in track)


# --- counters --------------------------------------------------------------------------------------------------------


def test_counters_tell_what_is_left_unread_dirtied_and_sent(busy: tuple[TracedRun, Drawn]) -> None:
    traced, drawn = busy
    state_bytes = (8 << 20) + 40 * 4096
    stopped = traced.timeline.marks[Mark.STOPPED]
    for device in ("dev0", "dev1", "dev2"):
        group = f"/source host/device {device}"
        left = drawn.counters[f"{group}/bytes left"]
        assert (left[0], left[-1][1]) == ((0, state_bytes), 0)
        unread = drawn.counters[f"{group}/unread bytes"]
        assert min(value for _, value in unread) >= 0
        assert unread[-1][1] == 0
        rates = drawn.counters[f"{group}/dirty rate"]
        assert {value for at, value in rates if at > stopped} == {0}
        assert 50 << 20 < max(value for _, value in rates) <= 100 << 20, "of the 100 MiB/s some hit the same block"
    sent = [value for _, value in drawn.counters["/link/bytes sent"]]
    assert sent == sorted(sent)
    assert sent[-1] == traced.outcome.counters.wire_bytes
    assert drawn.counters["/source host/VMM/RAM left"][0][1] == 64 << 20
    assert drawn.counters["/source host/VMM/RAM left"][-1][1] == 0
    assert max(value for _, value in drawn.counters["/link/throughput"]) > 0
    assert set(drawn.units.values()) == {"bytes", "bytes/s"}


def test_unread_bytes_are_what_the_driver_saved_ahead(tmp_path: Path) -> None:
    _, drawn = traced_and_drawn(tmp_path, small_scenario({"vmm.ram_budget_ms": 50.0, "ram.nonzero_gib": 0.05}), "v2")
    ahead = max(value for _, value in drawn.counters["/source host/device dev/unread bytes"])
    assert 1 << 20 < ahead < (2 << 20) + 4096, "two chunks of 1 MiB, with their headers"


@pytest.mark.slow
def test_a_long_run_has_no_more_looks_than_can_be_drawn() -> None:
    patient = small_scenario({"device.0.stop_only_mib": 8.0, "vmm.bandwidth_gbit_per_s": 0.1, "vmm.give_up_s": 9.0})
    samples = Samples()
    outcome = simulate(patient, Protocol.parse("v2", patient), 1, watch=samples.watch)
    assert outcome.kind == "DID_NOT_CONVERGE"
    at_ns = samples.counters()[0].at_ns
    assert MAX_SAMPLES / 2 < len(at_ns) <= MAX_SAMPLES
    assert len(set(at_ns[1:] - at_ns[:-1])) == 1


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "v2-reinit-invalidate-ack-reusable-polls", "v3-n2-invalidate-retry"])
@pytest.mark.parametrize("changes", [{}, *ENDS_EARLY.values()], ids=["completed", *ENDS_EARLY])
def test_a_run_that_is_watched_is_the_same_run(protocol: str, changes: dict[str, Any]) -> None:
    busy = {"device.0.writes": {"pattern": "uniform", "mib_per_s": 50.0}, "driver.lock": "device"}
    often = {"device.0.reconfigurations": {"at_s": [0.001, 0.01, 0.02]}}
    scenario = small_scenario(busy | often | changes)
    chosen = Protocol.parse(protocol, scenario)
    assert traced_run(scenario, chosen, 2).outcome == simulate(scenario, chosen, 2)


# --- lanes and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(0, 5), (5, 9)], [[(0, 5), (5, 9)]]),
        ([(0, 5), (4, 9), (6, 7)], [[(0, 5), (6, 7)], [(4, 9)]]),
        ([(3, 3), (3, 3), (3, 8), (0, 3)], [[(0, 3), (3, 3), (3, 3), (3, 8)]]),
        ([], []),
    ],
)
def test_lanes_are_as_few_as_do(times: list[tuple[int, int]], expected: list[list[tuple[int, int]]]) -> None:
    laid = lanes(Slice(start, end, "x", "y") for start, end in times)
    assert [[(each.start_ns, each.end_ns) for each in lane] for lane in laid] == expected


@pytest.mark.parametrize(
    ("resource", "track", "expected"),
    [
        (Resource.LINK, "connection 3 back", "link/connection 3 back"),
        (Resource.COPY, "source", "source host/VMM/main thread"),
        (Resource.COPY, "source vf1 stream 2", "source host/device vf1/stream 2"),
        (Resource.LOCK, "source vf1 stream 2", "source host/locks/vf1 stream 2 waits"),
        (Resource.FIRMWARE, "source vf1 producer 0", "source host/firmware/engines of PF 1"),
        (Resource.LOAD, "target device 1", "target host/firmware/engines of PF 1"),
        (Resource.FIXED, "target device 1", "target host/device vf1/device thread"),
        (Resource.FIXED, "target device 7", "target host/VMM/device 7"),
        (Resource.FIXED, "target load thread 0", "target host/VMM/load thread 0"),
        (Resource.FIXED, "main", "other/main"),
    ],
)
def test_a_span_is_drawn_by_what_it_uses(resource: Resource, track: str, expected: str) -> None:
    group, name, called = place(resource, "x", track, {"vf0": 0, "vf1": 1})
    assert called == (
        "x vf1 producer 0"
        if resource is Resource.FIRMWARE
        else "x vf1 device thread"
        if resource is Resource.LOAD
        else "x"
    )
    assert "/".join([*group, name]) == expected


# --- the table of spans ----------------------------------------------------------------------------------------------


def test_the_table_of_spans_has_them_all_with_causes_and_the_critical_path(busy: tuple[TracedRun, Drawn]) -> None:
    traced, _ = busy
    table = spans(traced)
    expected = {"run", "span", "resource", "what", "track", "start_ns", "end_ns", "cause", "on_critical_path"}
    assert set(table.columns) == expected
    assert table["span"].to_list() == list(range(len(traced.timeline)))
    assert set(table["run"]) == {f"small/{traced.outcome.protocol}/1"}
    assert table["cause"].null_count() >= 1
    assert table["cause"].min() == 0
    assert table["cause"].dtype == pl.Int64
    critical = table.filter("on_critical_path")
    assert critical["span"].to_list() == sorted({span for span, _, _ in traced.timeline.critical_spans()})
    assert set(table["resource"]) <= {resource.name.lower() for resource in Resource}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.toml").write_text(small_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trace(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["trace", "mine.toml", *arguments])


def test_the_command_writes_a_trace_and_says_where(here: Path) -> None:
    done = trace("--protocol", "v3", "--seed", "3", "--set", "v3.dirty_streams=2")
    assert done.exit_code == 0, done.output
    assert "small, v3-n2, seed 3: COMPLETED, downtime " in done.stdout
    assert "out/small-v3-n2-3.perfetto-trace" in done.stdout
    assert "https://ui.perfetto.dev" in done.stdout
    drawn = read_back(here / "out/small-v3-n2-3.perfetto-trace")
    assert drawn.root == "small v3-n2 seed 3"
    assert "/source host/device dev/stream 2" in drawn.names
    assert [path.name for path in (here / "out").iterdir()] == ["small-v3-n2-3.perfetto-trace"]


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_in_any_process(here: Path) -> None:
    assert trace("--protocol", "v2", "--trace", "a b/1.x", "--spans", "a b/1.parquet").exit_code == 0
    command = [sys.executable, "-m", "experiments.cli", "trace", "mine.toml", "--protocol", "v2"]
    subprocess.run(
        [*command, "--trace", "a b/2.x", "--spans", "a b/2.parquet"],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    assert (here / "a b/1.x").read_bytes() == (here / "a b/2.x").read_bytes()
    assert pl.read_parquet(here / "a b/1.parquet").equals(pl.read_parquet(here / "a b/2.parquet"), null_equal=True)
    assert pl.read_parquet_metadata(here / "a b/1.parquet")["schema_version"] == "1"


def test_a_run_that_failed_is_drawn_and_is_exit_status_1(here: Path) -> None:
    fault = 'device.0.faults=[{side = "target", arc = "RESUMING -> STOP"}]'
    done = trace("--protocol", "v2", "--set", fault)
    assert done.exit_code == 1
    assert "FAILED" in done.stdout
    assert "FAILED" in read_back(here / "out/small-v2-1.perfetto-trace").description


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--protocol", "v4"], "unknown protocol 'v4'"),
        (["--protocol", "v2", "--set", "link.mtu=9"], "link.mtu = 9: unknown key"),
        (["--protocol", "v2", "--trace", "."], "--trace .: must be the name of a file"),
        (["--protocol", "v2", "--trace", ""], "--trace '': must be the name of a file"),
        (["--protocol", "v2", "--spans", "mine.toml/x.parquet"], "--spans mine.toml/x.parquet: its folder cannot be"),
    ],
)
def test_a_mistake_is_told_in_a_line(here: Path, arguments: list[str], told: str) -> None:
    done = trace(*arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert "Traceback" not in done.output
    assert not list(here.glob("**/*.perfetto-trace")), "nothing is written"
