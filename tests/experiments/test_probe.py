# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 probe`: its tables and its file, from a simulated device; what it refuses; how a signal ends it.

tests/real/test_probe.py has it on devices of a kernel.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from experiments.commands import probe as command
from proto_v3.errors import UserError
from sim.clock.virtual import run
from sim.real.probe import Measurements, NotRunningError, PortTiming, ProbeSettings, Tell, probe
from sim.real.sysfs import DeviceEntry
from sim.scenario.file import load
from tests.build.cli import proto_v3
from tests.build.hosts import WHOLE, Hosts

NAME = "0000:3b:00.2"


def entry(name: str, driver: str = "mlx5_vfio_pci") -> DeviceEntry:
    return DeviceEntry(name, Path("/sys"), driver, driver, None, None)


def simulated(settings: ProbeSettings, to: DeviceEntry | None) -> Measurements:
    async def measured() -> Measurements:
        device = Hosts({**WHOLE, "device.0.max_dirty_streams": 4}).both
        return await probe(device, settings, PortTiming(), to=None if to is None else device)

    return run(measured())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with one device, which is simulated; the arguments of each probe."""
    calls: list[Any] = []

    async def probe_devices(
        of: DeviceEntry, to: DeviceEntry | None, way: str | None, settings: ProbeSettings, *, reset: bool, tell: Tell
    ) -> Measurements:
        calls.append((of.name, to, way, settings, reset))
        tell("the time of each arc")
        return await asyncio.to_thread(simulated, settings, to)  # a virtual loop needs a thread of its own

    monkeypatch.setattr(command, "find", entry)
    monkeypatch.setattr(command, "probe_devices", probe_devices)
    return calls


def test_it_prints_what_matters_then_tables(device: list[Any], tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "probe", NAME, "--load-into", NAME, COLUMNS="150")
    assert done.returncode == 0, done.stderr
    assert "It has STOP_COPY, P2P, PRE_COPY; v3 with up to 4 dirty streams." in done.stdout
    assert "It is stopped, PRE_COPY to STOP_COPY, in 3 ms." in done.stdout
    for title in ("Features", "MIG_DATA_SIZE", "Arcs of the state machine", "PRECOPY_INFO over time", "A load"):
        assert f"\n{title}\n" in done.stdout
    assert "PRE_COPY -> PRE_COPY_P2P" in done.stdout
    assert done.stderr == "the time of each arc\n"
    assert list(tmp_path.iterdir()) == []


def test_json_has_all_of_it_and_quiet_the_conclusion(device: list[Any], tmp_path: Path) -> None:
    document = json.loads(proto_v3(tmp_path, "probe", NAME, "--json", "--read-kib", "256,1024").stdout)
    assert (document["device"], document["driver"]) == (NAME, "mlx5_vfio_pci")
    tables = document["tables"]
    assert [row["read_kib"] for row in tables["reads"]["rows"] if not row["dirty_streams"]] == [256, 1024]
    assert {row["dirty_streams"] for row in tables["reads"]["rows"]} == {0, 1, 2, 4}
    assert all(row["median_mib_per_s"] > 0 for row in tables["reads"]["rows"])
    assert "loads" not in tables
    quiet = proto_v3(tmp_path, "probe", NAME, "--quiet")
    assert quiet.stderr == ""
    assert "Features" not in quiet.stdout
    assert "It has STOP_COPY" in quiet.stdout


def test_the_scenario_has_what_was_measured_and_runs(device: list[Any], tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "probe", NAME, "--scenario-out", "mine.toml", "--extends", "mlx5-2vf")
    assert done.returncode == 0, done.stderr
    made = load(str(tmp_path / "mine.toml"))
    assert made.devices[0].suspend_ms == 1.0
    source = made.sources["device.0.suspend_ms"]
    assert source.startswith("measured: the time of PRE_COPY -> PRE_COPY_P2P, median of 6, 1 to 1 ms; proto-v3 probe")
    assert NAME in source
    assert made.sources["link.gbit_per_s"] == load("mlx5-2vf").sources["link.gbit_per_s"]
    compared = proto_v3(tmp_path, "compare", "mine.toml", "--seeds", "1", "--protocols", "v2", "--jobs", "1")
    assert compared.returncode == 0, compared.stderr
    again = proto_v3(tmp_path, "probe", NAME, "--scenario-out", "mine.toml")
    assert again.returncode == 2
    assert "mine.toml: is there already; nothing was done" in again.stderr
    assert len(device) == 1, "it was not measured again"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--read-kib", "64,x"], "--read-kib 64,x: must be sizes in KiB"),
        (["--read-kib", "0"], "--read-kib 0: must be sizes in KiB"),
        (["--read-kib", "1e9"], "--read-kib 1e9: must be sizes in KiB"),
        (["--scenario-out", "mine.txt"], "--scenario-out mine.txt: must be the name of a .toml file"),
        (["--scenario-out", "no/mine.toml"], "--scenario-out no/mine.toml: there is no folder no"),
        (["--extends", "mlx6"], "did you mean mlx5?"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_device_is_touched(
    device: list[Any], tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = proto_v3(tmp_path, "probe", NAME, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert device == []


def test_a_load_needs_a_device_of_the_same_driver(
    device: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find", lambda name: entry(name, name))
    done = proto_v3(tmp_path, "probe", "mtty", "--load-into", "mlx5")
    assert done.returncode == 2
    assert "--load-into mlx5: its driver is mlx5, that of mtty is mtty" in done.stderr
    assert device == []


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "probe", "0000:ff:1f.7")
    assert done.returncode == 2
    assert done.stderr.startswith("proto-v3: error: 0000:ff:1f.7: there is no such device; VFIO devices here: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError(f"{NAME}: is in use by another process, as a VMM"), 2),
        (OSError(5, "PRE_COPY -> PRE_COPY_P2P failed"), 1),
        (NotRunningError(5, f"{NAME}: is left in ERROR: only a reset leads to RUNNING"), 1),
    ],
)
def test_an_error_is_one_line(
    device: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def fails(*_: Any, **__: Any) -> Measurements:
        raise error

    monkeypatch.setattr(command, "probe_devices", fails)
    done = proto_v3(tmp_path, "probe", NAME, "--quiet")
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert str(error).partition("] ")[2] in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_once_and_more_of_them_change_nothing(
    device: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    cancelled: list[bool] = []

    async def waits(*_: Any, **__: Any) -> Measurements:
        try:
            asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), number)
            await asyncio.sleep(60)
        finally:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.05)  # as put_back
            cancelled.append(True)
        raise AssertionError

    monkeypatch.setattr(command, "probe_devices", waits)
    done = proto_v3(tmp_path, "probe", NAME)
    assert done.returncode == 128 + number
    assert cancelled == [True]
    assert f"interrupted: {NAME} is in RUNNING, as found" in done.stderr
    assert done.stdout == ""
