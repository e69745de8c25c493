# SPDX-License-Identifier: GPL-2.0-or-later
"""What `proto-v3 fit` reads beside QEMU's trace: QMP events, the driver's functions, what QEMU was told."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from experiments.commands.fit import conclusion
from experiments.logs.cmdline import QemuSettings, read_settings
from experiments.logs.driver import FUNCTIONS, LOAD, RESUME, SAVE, SAVED, SUSPEND, of_migration, parse_calls, read_calls
from experiments.logs.events import TraceEvent, event_of
from experiments.logs.how import PATTERNS, how
from experiments.logs.machine import machine_of
from experiments.logs.quantity import Certainty
from proto_v3.errors import UserError
from tests.build.fit_cases import known_logs
from tests.real.qemu import pairs

SUSPENDS, RESUMES, LOADS, SAVES = FUNCTIONS
MIB = 1 << 20
SIDES = ("source", "target")

# --- events -----------------------------------------------------------------------------------------------------------


def test_qmp_events_as_the_monitor_and_as_virsh_print_them() -> None:
    data = {"device-state": "stop-copy", "device-id": "vf0", "qom-path": "/machine/peripheral/vf0"}
    stamp = {"seconds": 1796075562, "microseconds": 543708}
    line = json.dumps({"timestamp": stamp, "event": "VFIO_MIGRATION", "data": data})
    virsh = f"event VFIO_MIGRATION at 1796075562.543708 for domain 'vm': {json.dumps(data)}"
    for each in (line, virsh):
        assert event_of(each) == TraceEvent(1796075562543708, "QMP:VFIO_MIGRATION", "(vf0) stop-copy")
    stamped = f"2026-11-30 21:52:42.543+0000: event VFIO_MIGRATION for domain 'vm': {json.dumps(data)}"
    assert event_of(stamped) == TraceEvent(1796075562543000, "QMP:VFIO_MIGRATION", "(vf0) stop-copy")
    assert event_of(stamped.replace("-30", "-45")) is None
    nameless = json.dumps({"timestamp": stamp, "event": "VFIO_MIGRATION", "data": {**data, "device-id": ""}})
    event = event_of(nameless)
    assert event is not None
    assert event.device == "vf0"
    for bad in ('{"event": "STOP"}', '{"event": 1}', "{", '{"event": "X", "timestamp": {"seconds": "a"}}', "[1, 2]"):
        assert event_of(bad) is None


@pytest.mark.parametrize(
    "prefix", ["", "Nov 30 18:36:53 host qemu-kvm[77]: ", "2026-11-30T18:36:59.000001Z host qemu[77]: ", "\ufeff"]
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_what_a_systems_log_puts_around_a_line_is_left_out(prefix: str, end: str) -> None:
    old = "77@1796075562.543708:vfio_save_block  (a0) data_size 24"
    new = "2026-11-30T21:52:42.543708Z vfio_save_block  (a0) data_size 24"
    for line in (old, new):
        assert event_of(f"{prefix}{line}{end}") == TraceEvent(1796075562543708, "vfio_save_block", "(a0) data_size 24")


def test_a_time_at_a_whole_second_has_no_fraction() -> None:
    event = event_of("2026-11-30T21:52:42Z vfio_save_block  (a0) data_size 24")
    assert event == TraceEvent(1796075562000000, "vfio_save_block", "(a0) data_size 24")


def test_events_alone_tell_stops_and_resumes_and_no_rates() -> None:
    folder = pairs.FOLDER / "events-11.1"
    machine = machine_of(str(folder / "source.jsonl"), str(folder / "target.jsonl"))
    traced = machine_of(str(folder / "source.log.gz"), str(folder / "target.log.gz"))
    sharp = {each.key: each.value for each in traced.quantities}
    found = {each.key: each for each in machine.quantities}
    for key in ("device.0.suspend_ms", "device.0.quiesce_ms", "device.1.quiesce_ms"):
        assert found[key].value == pytest.approx(sharp[key], abs=10), key
    assert found["device.0.resume_ms"].kind is Certainty.BOUNDED
    assert found["firmware.save_mib_per_s"].kind is found["firmware.load_mib_per_s"].kind is Certainty.UNKNOWN
    assert any("QMP events only" in note for note in machine.notes)


def _devices_events(side: str, folder: Path, later_s: int = 0) -> str:
    """A file with the VFIO_MIGRATION events of a side alone, by a clock that is so much ahead."""
    events = [json.loads(line) for line in (pairs.FOLDER / f"events-11.1/{side}.jsonl").read_text().splitlines()]
    kept = [event for event in events if event["event"] == "VFIO_MIGRATION"]
    for event in kept:
        event["timestamp"]["seconds"] += later_s
    file = folder / f"{side}.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in kept))
    return str(file)


def test_events_of_devices_alone_tell_what_all_events_tell(tmp_path: Path) -> None:
    """What the devices do as QEMU is quit is no part of the migration; no event of QEMU's own tells that it is over."""
    folder = pairs.FOLDER / "events-11.1"
    every = machine_of(str(folder / "source.jsonl"), str(folder / "target.jsonl"))
    alone = machine_of(_devices_events("source", tmp_path), _devices_events("target", tmp_path))
    traced = machine_of(str(folder / "source.log.gz"), str(folder / "target.log.gz"))
    assert (
        alone.waterfall.downtime_ms == every.waterfall.downtime_ms == pytest.approx(traced.waterfall.downtime_ms, abs=5)
    )
    for key in ("resume_ms", "suspend_ms", "quiesce_ms"):
        one, other = ({each.key: each for each in machine.quantities}[f"device.0.{key}"] for machine in (alone, every))
        assert one == other


@pytest.mark.parametrize("options", ["", "--pretty", "--timestamp", "--pretty --timestamp"])
def test_what_virsh_prints_tells_what_qmp_does(options: str, tmp_path: Path) -> None:
    files = []
    for side in ("source", "target"):
        events = Path(_devices_events(side, tmp_path)).read_text(encoding="utf-8").splitlines()
        lines = []
        for event in map(json.loads, events):
            at_s, at_us = event["timestamp"]["seconds"], event["timestamp"]["microseconds"]
            data = json.dumps(event["data"], indent=2 if "pretty" in options else None)
            stamp = datetime.fromtimestamp(at_s, UTC).strftime(f"%Y-%m-%d %H:%M:%S.{at_us // 1000:03d}+0000: ")
            known = f"event {event['event']} at {at_s}.{at_us:06d} for"
            head = f"{stamp}event {event['event']} for" if "timestamp" in options else known
            lines.append(f"{head} domain 'vm': {data}\n")
        files.append(tmp_path / f"{side}.txt")
        files[-1].write_text("".join([*lines, "events received: 7\n"]), encoding="utf-8")
    here, there = (machine_of(*each) for each in (map(str, files), (str(tmp_path / f"{side}.jsonl") for side in SIDES)))
    for one, other in zip(here.quantities, there.quantities, strict=True):
        assert (one.key, one.kind) == (other.key, other.kind)
        if isinstance(other.value, float):
            assert one.value == pytest.approx(other.value, abs=2.1 if "timestamp" in options else 0), one.key


def test_a_downtime_over_clocks_that_nothing_bounds_from_below_is_at_least_that(tmp_path: Path) -> None:
    source, target = _devices_events("source", tmp_path), _devices_events("target", tmp_path, -169)
    machine = machine_of(source, target)
    assert machine.clocks.one_sided
    assert machine.clocks.offset_us > -169e6
    assert machine.waterfall.downtime_ms is not None
    assert (
        next(conclusion(machine, [])) == f"The guest stood still for at least {machine.waterfall.downtime_ms:.1f} ms."
    )
    assert "at least" in machine.scenario.description


def test_with_events_alone_what_qemu_was_told_is_all_there_is_of_its_settings() -> None:
    folder = pairs.FOLDER / "events-11.1"
    told = [
        "-m 1G -machine pc-q35-11.1",
        '[{"capability": "switchover-ack", "state": true}]',
        '{"downtime-limit": 500}',
    ]
    vmm = machine_of(str(folder / "source.jsonl"), str(folder / "target.jsonl"), cmdline=told).scenario.vmm
    assert (vmm.downtime_limit_ms, vmm.switchover_ack, vmm.reinit) == (500, "reusable", True)


# --- the driver's functions -------------------------------------------------------------------------------------------

BPFTRACE = f"""\
Attaching 9 probes...
{SUSPENDS} 77 1000000 3000000
{SAVES} 77 4000000 4000000
{SAVES} 77 5000000 5000000
{SAVED} 0 9000000 9000000
{SAVED} 0 11000000 11000000
{LOADS} 88 1000000 2500000
{RESUMES} 88 3000000 3200000
"""
GRAPH = f"""\
# tracer: function_graph
    12.000001 |   3)               |  {SAVES} [mlx5_vfio_pci]() {{
    12.000009 |   3)   8.000 us    |  }}
    12.005001 |   1)   2.000 us    |  {SAVED} [mlx5_vfio_pci]();
    12.100000 |   3) * 12345.678 us |  {SUSPENDS} [mlx5_vfio_pci]();
    12.200000 |   3)               |  {LOADS} [mlx5_vfio_pci]() {{
    12.200001 |   3)   1.000 us    |    mutex_lock();
    12.202000 |   3) # 2000.000 us |  }}
"""
KPROBES = f"""\
 qemu-system-x86-1234    [003] d..1.   100.000000: in_x: ({SUSPENDS}+0x0/0x120 [mlx5_vfio_pci])
 qemu-system-x86-99      [001] d..1.   100.001000: in_y: ({LOADS}+0x0/0x120 [mlx5_vfio_pci])
 qemu-system-x86-1234    [003] d..1.   100.002000: out_x: (mlx5vf_pci_step+0x4e/0x300 [mlx5_vfio_pci] <- {SUSPENDS})
 qemu-system-x86-99      [001] d..1.   100.004000: out_y: (mlx5vf_resume_write+0x4e/0x300 [mlx5_vfio_pci] <- {LOADS})
 qemu-system-x86-1234    [003] d..1.   100.010000: in_z: ({SAVES}+0x0/0x120 [mlx5_vfio_pci])
 kworker/u16-7           [000] d..1.   100.015000: in_w: ({SAVED}+0x0/0x120 [mlx5_vfio_pci])
"""


EVER = dict.fromkeys(FUNCTIONS.values(), (0, 1 << 63))
S_NS = 1_000_000_000


@pytest.mark.parametrize("text", [BPFTRACE, GRAPH, KPROBES])
@pytest.mark.parametrize("later_s", [0, 3])
def test_calls_at_other_times_are_left_out_if_the_file_tells_the_wall_clock(text: str, later_s: int) -> None:
    """The host began an hour before the migration; the driver was asked then, or 3 s later."""
    all_of_them = parse_calls(text.splitlines(True))
    last_ns = max(call.end_ns or 0 for call in parse_calls(["clock 0 0\n", *text.splitlines(True)]))
    clock = f"clock {last_ns} {5000 * S_NS + later_s * S_NS}\n"
    there = parse_calls([clock, *text.splitlines(True)])
    assert [call.ns for call in there] == [call.ns for call in all_of_them]
    found, told = of_migration(there, dict.fromkeys(FUNCTIONS.values(), (4999 * S_NS, 5001 * S_NS)))
    count = len(all_of_them)
    assert sum(map(len, found.values())) == (0 if later_s else count)
    kept, others = (0, count) if later_s else (count, 0)
    assert told == f"--driver: {kept} calls are of this migration, {others} others are left out"


def test_each_host_has_its_own_clock_and_its_own_calls() -> None:
    """LOAD is the target's: what the source's log shows does not matter."""
    there = parse_calls(["clock 0 1000000000\n", *BPFTRACE.splitlines(True)])
    spans = {kind: (0, 1) if kind in (SUSPEND, SAVE) else (S_NS, 2 * S_NS) for kind in FUNCTIONS.values()}
    assert of_migration(there, spans)[0].keys() == {LOAD, RESUME}


def test_a_save_without_its_callback_does_not_shift_the_later_ones() -> None:
    """It began 90 s before the migration, which has four of 5 ms."""
    begins_ns = [100 * S_NS + at * 60_000_000 for at in range(4)]
    lines = ["clock 0 0\n", f"{SAVES} 7 {10 * S_NS} {10 * S_NS}\n"]
    for begin_ns in begins_ns:
        end_ns = begin_ns + 5_000_000
        lines += [f"{SAVES} 7 {begin_ns} {begin_ns}\n", f"{SAVED} 0 {end_ns} {end_ns}\n"]
    span = 99 * S_NS, 101 * S_NS
    spans = dict.fromkeys(FUNCTIONS.values(), span)
    found, told = of_migration(parse_calls(lines, span), spans)
    assert found == {SAVE: [5_000_000] * 4}
    assert told == "--driver: 4 calls are of this migration, 0 others are left out"


def test_a_call_that_began_before_the_migration_is_not_of_it() -> None:
    lines = ["clock 0 0\n", f"{SUSPENDS} 7 {10 * S_NS} {100 * S_NS}\n", f"{SAVES} 7 {10 * S_NS} {10 * S_NS}\n"]
    lines.append(f"{SAVED} 0 {100 * S_NS} {100 * S_NS}\n")
    spans = dict.fromkeys(FUNCTIONS.values(), (99 * S_NS, 101 * S_NS))
    for span in (None, spans[SAVE]):
        found, told = of_migration(parse_calls(lines, span), spans)
        assert found == {}
        assert told == "--driver: 0 calls are of this migration, 2 others are left out"


def test_each_line_clock_counts_from_there_on() -> None:
    """The host began anew; the first one counts for what is before it, too."""
    call = f"{LOADS} 88 1000000 2000000\n"
    found = parse_calls([call, f"clock 0 {S_NS}\n", call, f"clock 0 {5 * S_NS}\n", call])
    assert [call.end_ns for call in found] == [S_NS + 2_000_000, S_NS + 2_000_000, 5 * S_NS + 2_000_000]


@pytest.mark.parametrize(
    ("text", "times_us"),
    [
        (BPFTRACE, {SUSPEND: [2000], SAVE: [5000, 6000], LOAD: [1500], RESUME: [200]}),
        (GRAPH, {SAVE: [5000], SUSPEND: [12345.678], LOAD: [2000]}),
        (KPROBES, {SUSPEND: [2000], LOAD: [3000], SAVE: [5000]}),
        ("nothing\n", {}),
    ],
)
def test_how_long_the_functions_took(text: str, times_us: dict[str, list[float]]) -> None:
    found, told = of_migration(parse_calls(text.splitlines(True)), EVER)
    assert told == "" or told.endswith("no line `clock` tells when they were")
    assert {kind: [each / 1000 for each in times] for kind, times in found.items()} == {
        kind: pytest.approx(times, abs=0.5) for kind, times in times_us.items()
    }


def test_with_the_drivers_functions_rates_are_measured(tmp_path: Path) -> None:
    source, target, run = known_logs(tmp_path)
    whole = sum(device.whole_bytes for device in run.scenario.devices)
    save_ns, load_ns = (round(whole / (rate * MIB) * 1e9 / 8) for rate in (400, 200))
    lines, at_ns = [], 0
    for _ in range(8):
        lines += [f"{SAVES} 1 {at_ns} {at_ns}", f"{SAVED} 0 {at_ns + save_ns} {at_ns + save_ns}"]
        lines.append(f"{LOADS} 2 {at_ns} {at_ns + load_ns}")
        at_ns += save_ns
    file = tmp_path / "driver.txt"
    file.write_text("\n".join(lines) + "\n")
    found = {each.key: each for each in machine_of(source, target, driver=[str(file)]).quantities}
    for key, rate in (("firmware.save_mib_per_s", 400), ("firmware.load_mib_per_s", 200)):
        assert found[key].kind is Certainty.MEASURED
        assert found[key].value == pytest.approx(rate, rel=0.02)


def test_a_driver_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--driver .*none: cannot be read"):
        read_calls([str(tmp_path / "none")])
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(UserError, match=r"--driver .*x: has no time of mlx5vf_cmd_suspend_vhca"):
        read_calls([str(tmp_path / "x")])


# --- what QEMU was told -----------------------------------------------------------------------------------------------

DEVICE = "vfio-pci,host=0000:08:00.2,x-migration-multifd-transfer=on,x-migration-max-queued-buffers-size=64M"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("-device vfio-pci-nohotplug,x-migration-multifd-transfer=on", QemuSettings(multifd_transfer=True)),
        ("-m 4096 -machine pc-q35-11.1,accel=kvm", QemuSettings(ram_bytes=4 << 30, machine="pc-q35-11.1")),
        ("qemu -m size=8388608k,slots=2 -M type=pc", QemuSettings(ram_bytes=8 << 30, machine="pc")),
        (f"-device {DEVICE}", QemuSettings(multifd_transfer=True, max_queued_bytes=64 << 20)),
        (
            '-device \'{"driver": "vfio-pci", "x-migration-multifd-transfer": true}\' -m 1G',
            QemuSettings(ram_bytes=1 << 30, multifd_transfer=True),
        ),
        ("-global migration.x-downtime-limit=500", QemuSettings(downtime_limit_ms=500)),
        ('{"return": {"downtime-limit": 400, "max-bandwidth": 0}}', QemuSettings(downtime_limit_ms=400)),
        (
            '{"execute": "migrate-set-parameters", "arguments": {"multifd-channels": 5, "max-bandwidth": 1000}}',
            QemuSettings(channels=5, max_bandwidth_bytes_per_s=1000),
        ),
        (
            '[{"capability": "multifd", "state": true}, {"capability": "return-path", "state": false}]',
            QemuSettings(multifd=True),
        ),
        (
            '{"status": "completed", "ram": {"normal-bytes": 99, "x": 1}, "vfio": {"transferred": 77}}',
            QemuSettings(normal_bytes=99, vfio_bytes=77),
        ),
    ],
)
def test_arguments_and_answers_of_qemu(text: str, settings: QemuSettings, tmp_path: Path) -> None:
    assert read_settings([text]) == settings
    (tmp_path / "file").write_text(text)
    assert read_settings([str(tmp_path / "file")]) == settings


@pytest.mark.parametrize("text", ["", "hello", "{}", "[[[[", "-m lots", '-device "vfio', '{"downtime-limit": "x"}'])
def test_what_tells_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--cmdline .* has nothing that is known"):
        read_settings([text])


@pytest.mark.parametrize(
    "text", ["-m 1k", '{"multifd-channels": 0}', '{"ram": {"normal-bytes": -1}}', "multifd: on\nreturn-path: on"]
)
def test_what_no_qemu_has_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--cmdline .*: it has nothing that is known") as refusal:
        read_settings([text])
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--cmdline none/there\.txt: there is no such file"):
        read_settings(["none/there.txt"])


def test_a_value_that_no_scenario_may_have_names_the_key(tmp_path: Path) -> None:
    source, target, _ = known_logs(tmp_path)
    with pytest.raises(UserError, match=r"what the logs and --cmdline tell: .*\s+ram\.size_gib = "):
        machine_of(source, target, cmdline=["-m 99999999T"])


def test_what_qemu_was_told_comes_first(tmp_path: Path) -> None:
    source, target, _ = known_logs(tmp_path, None, "v2-multifd")
    told = ["-m 2G", '{"downtime-limit": 123, "multifd-channels": 6, "avail-switchover-bandwidth": 1250000000}']
    scenario = machine_of(source, target, cmdline=told).scenario
    assert (scenario.ram.size_gib, scenario.vmm.downtime_limit_ms, scenario.vmm.multifd_channels) == (2, 123, 6)
    assert scenario.vmm.bandwidth_gbit_per_s == 10


# --- how --------------------------------------------------------------------------------------------------------------


def test_how_names_all_that_is_read() -> None:
    text = how()
    for each in (*PATTERNS, *FUNCTIONS, SAVED, "-msg timestamp=on", "VFIO_MIGRATION", "--cmdline", "--driver"):
        assert each in text
    rig = {each.rstrip("*") for each in pairs.PATTERNS}
    assert {each.rstrip("*") for each in PATTERNS} <= rig, "what the kept logs were made with"
