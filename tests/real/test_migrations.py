# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations between VFIO devices of the guest's kernel, by the VMM of `proto-v3 real`: the target's state is the
source's, or the run FAILED with exactly one side running; and each device is left as it was found."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from proto_v3.errors import UserError
from proto_v3.vfio.uapi import Feature, FeatureMigState, State
from proto_v3.vmm.migration import OutcomeKind
from sim.live.processes.settings import Settings
from sim.live.tcp.sockets import listen
from sim.real.ioctl import get_feature
from sim.real.run import RealResult, SideDevices, run_here, run_to, serve_one
from sim.real.scenario import ProbedDevice, check_alike, loaded, of_devices, probed
from sim.real.sysfs import find
from sim.real.vfio import CDEV, GROUP, WAYS, OpenDevices
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from tests.build.cli import proto_v3
from tests.build.live import Seen, hit
from tests.real.mdev import Mdev, SampleMdev

HANG_S = 120.0
"""A run that takes longer never ends: not a bound on how long it may take."""
STATE = {"size_kib": 2048, "critical_kib": 64}
BUSY = STATE | {"dirty_kib_s": 1000}
SLOW = BUSY | {"save_mib_s": 2}
"""A device whose pre-copy takes a second."""
EVENTS = {"device.0.reconfigurations.at_s": "[0.05, 0.2]"}
PROTOCOLS = (
    "v2",
    pytest.param("v2-multifd", marks=pytest.mark.slow),
    "v2-multifd-reinit-flush-ack-reusable",
    "v2-priority-ack-reusable",
    "v3-n1",
    "v3-n2",
    "v3-n4",
    "v3-n8",
    "v3-n4-pool",
    "v3-n2-one",
    "v3-blocks",
)
PRE_COPY, STOP_COPY = "PRE_COPY", "STOP_COPY"
SOURCE, TARGET = "source VMM", "target VMM"
Act = Callable[[Seen], Any]


def side(*devices: Mdev, way: str | None = None) -> SideDevices:
    return SideDevices([find(each.uuid) for each in devices], way)


def scenario_of(found: Sequence[ProbedDevice], changes: Mapping[str, str]) -> Scenario:
    values = {"vmm.give_up_s": "60", "device.0.critical.objects": "1"} | dict(changes)
    return of_devices(loaded(None, [f"{key}={value}" for key, value in values.items()]), found)


def migrate(
    source: SideDevices,
    target: SideDevices,
    protocol: str,
    changes: Mapping[str, str] | None = None,
    act: Act | None = None,
    settings: Settings | None = None,
) -> RealResult:
    """A run to its end, in which `act` takes part."""
    check_alike(source.entries, target.entries)
    found, _ = probed(source.entries, source.way)
    scenario = scenario_of(found, changes or {})
    seen = Seen()

    async def started(children: Sequence[Any]) -> None:
        seen.know(children)
        if act is not None:
            await act(seen)

    async def run() -> RealResult:
        async with asyncio.timeout(HANG_S):
            parsed, how = Protocol.parse(protocol, scenario), settings or Settings()
            return await run_here(scenario, parsed, 1, how, source, target, seen.watch, started)

    return asyncio.run(run())


def state_of(device: Mdev) -> State:
    """The state that a device is in; mtty keeps it while nobody has it open."""
    with OpenDevices([find(device.uuid)]) as devices:
        return State(get_feature(devices.devices[0].fd, Feature.MIG_DEVICE_STATE, FeatureMigState).device_state)


def last_state(device: SampleMdev) -> str:
    """The state that the last call of the driver's log led to."""
    for line in reversed(device.log()):
        if " reset " in line:
            return "RUNNING"
        if found := re.search(r"set_state \w+->(\w+).*-> 0$", line):
            return found[1]
    return "RUNNING"


# --- mtty -------------------------------------------------------------------------------------------------------------

LINE, MODEM, SCRATCH, DATA = 3, 4, 7, 0
"""Registers of an 8250: of each port of mtty in its own region."""
REGION = 1 << 40
"""mtty's regions are this far apart in the device fd (samples/vfio-mdev/mtty.c, MTTY_VFIO_PCI_OFFSET_SHIFT)."""


def put(device: Mdev, text: bytes) -> None:
    """Write what can be read again: registers, and bytes in the FIFO, which the loopback gives back."""
    with OpenDevices([find(device.uuid)]) as devices:
        fd = devices.devices[0].fd
        for register, value in ((LINE, 0x1B), (MODEM, 0x10), (SCRATCH, text[0])):
            os.pwrite(fd, bytes([value]), register)
        for each in text:
            os.pwrite(fd, bytes([each]), DATA)


def got(device: Mdev, size: int) -> bytes:
    """The registers, and `size` bytes of the FIFO."""
    with OpenDevices([find(device.uuid)]) as devices:
        fd = devices.devices[0].fd
        registers = [os.pread(fd, 1, register) for register in (LINE, MODEM, SCRATCH)]
        return b"".join([*registers, *(os.pread(fd, 1, DATA) for _ in range(size))])


@pytest.mark.parametrize("way", WAYS)
def test_mtty_moves_with_all_that_is_in_it(make_mtty: Callable[[], Mdev], way: str) -> None:
    source, target = make_mtty(), make_mtty()
    put(source, b"hello")
    result = migrate(side(source, way=way), side(target, way=way), "v2")
    assert result.live.outcome.kind is OutcomeKind.COMPLETED, result.live.outcome.reason
    assert result.compared == [False], "mtty does not say what its state is"
    assert (state_of(source), state_of(target), result.put_back) == (State.RUNNING, State.RUNNING, [])
    assert got(target, 5)[2:] == b"hhello"


def test_two_devices_by_multifd(make_mtty: Callable[[], Mdev]) -> None:
    sources, targets = [make_mtty(), make_mtty()], [make_mtty(), make_mtty()]
    for each, text in zip(sources, (b"one", b"two"), strict=True):
        put(each, text)
    result = migrate(side(*sources), side(*targets), "v2-multifd")
    assert result.live.outcome.kind is OutcomeKind.COMPLETED, result.live.outcome.reason
    assert [got(each, 3)[3:] for each in targets] == [b"one", b"two"]
    assert {state_of(each) for each in [*sources, *targets]} == {State.RUNNING}


def test_mtty_has_no_v3(make_mtty: Callable[[], Mdev]) -> None:
    source, target = make_mtty(), make_mtty()
    result = migrate(side(source), side(target), "v3-n2")
    assert result.live.outcome.kind is OutcomeKind.UNSUPPORTED
    assert result.live.outcome.guest_runs_at == "source"


# --- the sample driver ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_target_is_the_source_under_a_guest_that_writes_and_reconfigures(
    make_sample: Callable[..., SampleMdev], protocol: str
) -> None:
    source, target = make_sample(**BUSY), make_sample(**BUSY)
    result = migrate(side(source), side(target), protocol, EVENTS)
    outcome = result.live.outcome
    assert outcome.kind is OutcomeKind.COMPLETED, outcome.reason
    assert outcome.guest_runs_at == "target"
    assert result.compared == [True]
    assert result.put_back == []
    assert (last_state(source), last_state(target)) == ("RUNNING", "RUNNING")
    assert sum(outcome.critical_path_ns.values()) == outcome.downtime_ns
    assert re.search(r"dirty_kib_s\s1000", (target.debugfs / "params").read_text()), "put back after the comparison"


def test_two_devices_by_v3(make_sample: Callable[..., SampleMdev]) -> None:
    sources, targets = ([make_sample(**BUSY) for _ in range(2)] for _ in range(2))
    result = migrate(side(*sources), side(*targets), "v3-n2", EVENTS)
    assert result.live.outcome.kind is OutcomeKind.COMPLETED, result.live.outcome.reason
    assert result.compared == [True, True]


def check_failed(result: RealResult, at: str, devices: Sequence[SampleMdev]) -> None:
    """The run FAILED, the guest runs at one side, or with its VMM it is gone; no device is left in a migration."""
    outcome = result.live.outcome
    assert outcome.kind is OutcomeKind.FAILED, outcome.reason
    assert outcome.guest_runs_at == at, outcome.reason
    for each in devices:
        assert state_of(each) is State.RUNNING


async def until(device: SampleMdev, state: str) -> None:
    """Until a call brought the device to this state."""
    while not any(f"->{state} " in line for line in device.log()):
        await asyncio.sleep(0.01)


STAGES = {PRE_COPY: SLOW, STOP_COPY: STATE | {"save_mib_s": 2, "precopy": 0}}
"""Devices that are in this state for a second."""
STOPS = {"vmm.downtime_limit_ms": "600000"}
"""The guest is stopped, however slow the machine is."""


def product(short: Sequence[tuple[str, ...]], *values: Sequence[str]) -> list[Any]:
    """All combinations of the values; those that are not in `short` are marked slow."""
    return [pytest.param(*each, marks=() if each in short else pytest.mark.slow) for each in itertools.product(*values)]


V2_V3_BLOCKS = ("v2", "v3-n4", "v3-blocks")
KILLS = [
    ("v2", SOURCE, PRE_COPY),
    ("v2", TARGET, STOP_COPY),
    ("v3-n4", SOURCE, STOP_COPY),
    ("v3-n4", TARGET, PRE_COPY),
    ("v3-blocks", SOURCE, PRE_COPY),
    ("v3-blocks", TARGET, STOP_COPY),
]
"""Each pair of a protocol, a side and a stage."""


@pytest.mark.parametrize(
    ("protocol", "killed", "stage"), product(KILLS, V2_V3_BLOCKS, (SOURCE, TARGET), (PRE_COPY, STOP_COPY))
)
def test_a_vmm_that_is_killed_leaves_the_devices_running(
    make_sample: Callable[..., SampleMdev], protocol: str, killed: str, stage: str
) -> None:
    source, target = make_sample(**STAGES[stage]), make_sample(**STAGES[stage])

    async def kill(seen: Seen) -> None:
        await until(source, stage)
        assert hit(seen.children[killed])

    result = migrate(side(source), side(target), protocol, STOPS, kill, Settings(silent_s=20.0))
    check_failed(result, "source" if killed == TARGET else "", [source, target])
    assert "was killed by SIGKILL" in result.live.outcome.reason


@pytest.mark.parametrize("protocol", [pytest.param("v2", marks=pytest.mark.slow), "v3-n2"])
def test_a_target_that_is_stopped_is_given_up(make_sample: Callable[..., SampleMdev], protocol: str) -> None:
    source, target = make_sample(**SLOW), make_sample(**BUSY)

    async def stop(seen: Seen) -> None:
        await until(source, "PRE_COPY")
        assert hit(seen.children["target VMM"], signal.SIGSTOP)

    result = migrate(side(source), side(target), protocol, act=stop, settings=Settings(silent_s=2.0))
    check_failed(result, "source", [source, target])


async def carried(source: SideDevices, target: SideDevices, protocol: str, cut: Callable[[], Any]) -> RealResult:
    """A run of two supervisors as on two machines, whose connections are cut when `cut` returns."""
    found, _ = probed(source.entries, source.way)
    scenario = scenario_of(found, STOPS)
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    with contextlib.closing(listen(("127.0.0.1", 0))) as listener:
        address = listener.getsockname()[:2]

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, onward = await asyncio.open_connection(*address)
            writers.extend([writer, onward])
            await asyncio.gather(carry(reader, onward), carry(there, writer))

        server = await asyncio.start_server(met, "127.0.0.1", 0)
        between = server.sockets[0].getsockname()[:2]
        how = Settings(silent_s=20.0)
        async with asyncio.timeout(HANG_S), asyncio.TaskGroup() as group:
            serving = group.create_task(serve_one(listener, how, target))
            running = group.create_task(run_to(scenario, Protocol.parse(protocol, scenario), 1, how, source, between))
            await cut()
            for each in writers:
                each.transport.abort()
            result = await running
            end, _ = await serving
        server.close()
    assert end.report is not None
    assert not end.report.guest_runs
    return result


CUTS = [("v2", STOP_COPY), ("v3-n4", PRE_COPY), ("v3-blocks", STOP_COPY)]


@pytest.mark.parametrize(("protocol", "stage"), product(CUTS, V2_V3_BLOCKS, (PRE_COPY, STOP_COPY)))
def test_connections_that_are_cut_leave_the_guest_at_the_source(
    make_sample: Callable[..., SampleMdev], protocol: str, stage: str
) -> None:
    source, target = make_sample(**STAGES[stage]), make_sample(**STAGES[stage])
    result = asyncio.run(carried(side(source), side(target), protocol, lambda: until(source, stage)))
    check_failed(result, "source", [source, target])


@pytest.mark.parametrize("protocol", V2_V3_BLOCKS)
def test_a_cancelled_migration_leaves_the_guest_where_it_is(
    make_sample: Callable[..., SampleMdev], protocol: str
) -> None:
    source, target = make_sample(**STATE, save_mib_s=1), make_sample(**STATE)
    before = source.digest()
    result = migrate(side(source), side(target), protocol, {"vmm.cancel_after_s": "0.3"})
    assert result.live.outcome.kind is OutcomeKind.CANCELLED, result.live.outcome.reason
    assert result.live.outcome.guest_runs_at == "source"
    assert source.digest() == before
    assert (last_state(source), last_state(target)) == ("RUNNING", "RUNNING")


FAULTS = [("v2", "load:2"), ("v3-n4", "save:2"), ("v3-blocks", "load:2")]


@pytest.mark.parametrize(("protocol", "fault"), product(FAULTS, V2_V3_BLOCKS, ("save:2", "load:2")))
def test_firmware_that_fails_ends_the_migration(
    make_sample: Callable[..., SampleMdev], protocol: str, fault: str
) -> None:
    at = "source" if fault.startswith("save") else "target"
    faults = {"source": "", "target": ""} | {at: fault}
    chunks = {"chunk_kib": 64}
    source, target = (make_sample(**STATE, **chunks, fault=faults[each]) for each in ("source", "target"))
    result = migrate(side(source), side(target), protocol)
    check_failed(result, "source", [source, target])


# --- the command ------------------------------------------------------------------------------------------------------


def command(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", "real", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )


def test_the_command_says_what_it_did(make_sample: Callable[..., SampleMdev], tmp_path: Path) -> None:
    source, target = make_sample(**BUSY), make_sample(**STATE)
    done = command(tmp_path, source.uuid, "--to", target.uuid, "--protocols", "v2,v3-n2", "--json", "--out", "o")
    told, errors = done.communicate(timeout=HANG_S)
    assert done.returncode == 0, errors
    document = json.loads(told)
    assert any("digest of its state is the same" in line for line in document["conclusion"])
    manifest = json.loads((tmp_path / "o/manifest.json").read_text())
    real = manifest["real"]
    assert real["kernel"].startswith(f"Linux {os.uname().release}")
    assert real["opened_by"] == "cdev and iommufd"
    assert [each["name"] for each in (*real["source"], *real["target"])] == [source.uuid, target.uuid]
    assert "size_kib" in real["modules"]["vfio_v3_sample"]["parameters"]
    assert (tmp_path / "o/real.png").exists()


def test_two_commands_as_on_two_machines(make_mtty: Callable[[], Mdev], tmp_path: Path) -> None:
    source, target = make_mtty(), make_mtty()
    put(source, b"over there")
    there = command(tmp_path, target.uuid, "--listen", "127.0.0.1:22099", "--once")
    assert there.stderr is not None
    assert "listening on 127.0.0.1:22099" in there.stderr.readline()
    here = command(tmp_path, source.uuid, "--connect", "127.0.0.1:22099", "--quiet", "--out", "o")
    told, errors = here.communicate(timeout=HANG_S)
    assert here.returncode == 0, errors
    assert "v2" in told
    _, said = there.communicate(timeout=HANG_S)
    assert (there.returncode, "the guest runs here" in said) == (0, True), said
    assert got(target, 10)[3:] == b"over there"


def test_ctrl_c_leaves_the_devices_running(make_sample: Callable[..., SampleMdev], tmp_path: Path) -> None:
    source, target = make_sample(**SLOW), make_sample(**STATE)
    run = command(tmp_path, source.uuid, "--to", target.uuid, "--protocols", "v3-n4", "--out", "o")
    while not any("RESUMING" in line for line in target.log()):
        assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=HANG_S)
    assert run.returncode == 130, errors
    assert (last_state(source), last_state(target)) == ("RUNNING", "RUNNING")
    assert not (tmp_path / "o").exists()


def test_a_supervisor_that_is_killed_leaves_the_devices_to_its_processes_which_put_them_back(
    make_sample: Callable[..., SampleMdev], tmp_path: Path
) -> None:
    source, target = make_sample(**SLOW), make_sample(**STATE)
    run = command(tmp_path, source.uuid, "--to", target.uuid, "--protocols", "v2", "--out", "o")
    while not any("RESUMING" in line for line in target.log()):
        assert run.poll() is None, run.communicate()
    run.kill()
    run.communicate(timeout=HANG_S)  # its processes have its stdout and stderr: they are gone then
    assert (last_state(source), last_state(target)) == ("RUNNING", "RUNNING")
    for device in (source, target):
        assert state_of(device) is State.RUNNING


def test_a_users_mistake_is_one_line(make_mtty: Callable[[], Mdev], tmp_path: Path) -> None:
    device, other = make_mtty(), make_mtty()
    mistakes = {
        ("nothing", "--to", other.uuid): "nothing: there is no such device; VFIO devices here: ",
        (device.uuid, "--to", device.uuid): f"{device.uuid}: is named twice",
        (device.uuid,): "--to, --connect: give one of the two",
    }
    for arguments, line in mistakes.items():
        done = proto_v3(tmp_path, "real", *arguments)
        assert done.returncode == 2, done.stderr
        assert line in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_device_in_use_is_refused_in_words(make_mtty: Callable[[], Mdev], way: str) -> None:
    entry = find(make_mtty().uuid)
    with OpenDevices([entry], way), pytest.raises(UserError, match="in use"), OpenDevices([entry], way):
        pass
    with OpenDevices([entry], CDEV if way == GROUP else GROUP):
        pass
