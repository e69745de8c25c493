# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 probe` on devices of this kernel: what it measures against the driver's parameters, and how it leaves them.

An emulated time is the least that a call can take, and an emulated rate the most: these bounds hold on a busy machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.commands import probe
from proto_v3.vfio.uapi import Feature, FeatureMigState, State
from sim.real.ioctl import get_feature, set_feature
from sim.real.probe_device import probe_devices
from sim.real.sysfs import find
from sim.real.vfio import OpenDevices
from sim.scenario.file import load
from tests.build.cli import proto_v3
from tests.real.mdev import Mdev, SampleMdev

QUICK = ["--repeats", "1", "--precopy-s", "0.1", "--read-kib", "1024"]
US_PER_MS = 1000


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return proto_v3(Path("/"), "probe", *arguments)


def state_of(device: Mdev) -> State:
    """In which the device was left. mtty keeps it when it is closed."""
    with OpenDevices([find(device.uuid)]) as opened:
        return State(get_feature(opened.devices[0].fd, Feature.MIG_DEVICE_STATE, FeatureMigState).device_state)


def tables(done: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    assert done.returncode == 0, done.stderr
    return {key: table["rows"] for key, table in json.loads(done.stdout)["tables"].items()}


def test_mtty(make_mtty: Callable[[], Mdev], tmp_path: Path) -> None:
    device, file = make_mtty(), tmp_path / "mtty.toml"
    found = tables(command(device.uuid, *QUICK, "--json", "--load-into", device.uuid, "--scenario-out", str(file)))
    (size,) = {row["stop_copy_bytes"] for row in found["sizes"]}
    assert {row["bytes"] for row in found["reads"]} == {size}
    assert {row["bytes"] for row in found["loads"]} == {size}
    first, *later = found["precopy_info"]
    assert (first["initial_bytes"], first["dirty_bytes"]) == (24, 0)
    assert {(row["initial_bytes"], row["dirty_bytes"]) for row in later} == {(0, 0)}
    assert state_of(device) is State.RUNNING
    driver = load(str(file)).driver
    assert (driver.precopy, driver.check_bytes, driver.precopy_end) == ("check", 24, "0")


EMULATED = {
    **{"size_kib": 4096, "save_mib_s": 100, "load_mib_s": 200, "engines": 4, "command_us": 10},
    **{"quiesce_us": 3000, "suspend_us": 5000, "stop_us": 7000, "resume_us": 9000, "load_finish_us": 11000},
}
AHEAD = 1.1
"""The first SAVE may begin a little before SET_STATE returns."""
ARCS = {
    "PRE_COPY -> PRE_COPY_P2P": "quiesce_us",
    "RUNNING -> RUNNING_P2P": "quiesce_us",
    "PRE_COPY_P2P -> STOP_COPY": "suspend_us",
    "RUNNING_P2P -> STOP": "stop_us",
    "STOP -> RUNNING_P2P": "resume_us",
}


def test_the_sample_driver(make_sample: Callable[..., SampleMdev], tmp_path: Path) -> None:
    device, file = make_sample(**EMULATED), tmp_path / "sample.toml"
    before = device.digest()
    found = tables(command(device.uuid, "--json", "--load-into", device.uuid, "--scenario-out", str(file)))
    assert device.digest() == before
    assert state_of(device) is State.RUNNING
    for row in found["arcs"]:
        if parameter := ARCS.get(row["arc"]):
            assert row["least"] * US_PER_MS >= EMULATED[parameter], row
    one = [row["most"] for row in found["reads"] if row["dirty_streams"] in (0, 1)]
    assert 0 < max(one) <= EMULATED["save_mib_s"] * AHEAD
    assert max(row["most"] for row in found["reads"]) <= EMULATED["save_mib_s"] * EMULATED["engines"] * AHEAD
    for row in found["loads"]:
        assert 0 < row["mib_per_s"] <= EMULATED["load_mib_s"]
        assert row["finish_ms"] * US_PER_MS >= EMULATED["load_finish_us"]
    assert all(row["bytes"] >= EMULATED["size_kib"] << 10 for row in found["reads"])
    made = load(str(file))
    assert made.devices[0].max_dirty_streams == 8
    assert made.devices[0].state_mib == pytest.approx(4, rel=0.05)
    assert made.devices[0].suspend_ms >= 3
    assert made.devices[0].quiesce_ms >= 5
    assert made.driver.precopy == "incremental"
    assert 1 <= made.firmware.engines_of_a_vf <= EMULATED["engines"]


@pytest.mark.parametrize("parameters", [{"precopy": 0}, {"p2p": 0}, {"precopy": 0, "p2p": 0, "streams": 0}])
def test_a_device_that_lacks_features(make_sample: Callable[..., SampleMdev], parameters: dict[str, int]) -> None:
    device = make_sample(size_kib=256, **parameters)
    found = tables(command(device.uuid, *QUICK, "--json"))
    assert ("precopy_info" in found) == bool(parameters.get("precopy", 1))
    arcs = {row["arc"] for row in found["arcs"]}
    assert ("RUNNING -> STOP" in arcs) == (parameters.get("p2p") == 0)
    assert any(row["dirty_streams"] for row in found["reads"]) == ("streams" not in parameters)
    assert state_of(device) is State.RUNNING


def test_what_the_device_writes_is_seen(make_sample: Callable[..., SampleMdev], tmp_path: Path) -> None:
    device, file = make_sample(size_kib=65536, dirty_kib_s=8192), tmp_path / "sample.toml"
    done = command(device.uuid, "--repeats", "1", "--quiet", "--scenario-out", str(file))
    assert done.returncode == 0, done.stderr
    writes = load(str(file)).devices[0].writes
    assert writes is not None
    assert 8 / 4 < writes.mib_per_s < 8 * 4, "8 MiB a second, in whole blocks, on a machine that may be busy"


def test_another_device_has_its_own_state_again(make_sample: Callable[..., SampleMdev]) -> None:
    here, there = make_sample(size_kib=256), make_sample(size_kib=256)
    there.dirty(0, 3)
    digests = here.digest(), there.digest()
    assert digests[0] != digests[1]
    found = tables(command(here.uuid, *QUICK, "--json", "--load-into", there.uuid))
    assert len(found["loads"]) == 1
    assert (here.digest(), there.digest()) == digests
    assert {state_of(here), state_of(there)} == {State.RUNNING}


def test_a_device_that_a_vmm_has_open_is_not_touched(make_sample: Callable[..., SampleMdev]) -> None:
    device = make_sample(size_kib=256)
    with OpenDevices([find(device.uuid)]):
        done = command(device.uuid)
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any("set_state" in line for line in device.log())


def test_ctrl_c_in_each_step_leaves_it_running_with_its_state(
    make_sample: Callable[..., SampleMdev], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_sample(size_kib=256, save_mib_s=20, load_mib_s=20, quiesce_us=2000)
    before, steps, at = device.digest(), [""], 0

    async def interrupted(*arguments: Any, tell: Callable[[str], None], **more: Any) -> Any:
        def told(text: str) -> None:
            tell(text)
            steps.append(text)
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGINT)

        return await probe_devices(*arguments, tell=told, **more)

    monkeypatch.setattr(probe, "probe_devices", interrupted)
    while len(steps) >= at:  # until it is done before its turn
        at, steps = at + 1, []
        done = command(device.uuid, "--load-into", device.uuid, *QUICK)
        assert device.digest() == before, steps
        assert state_of(device) is State.RUNNING, steps
        if len(steps) >= at:
            assert done.returncode == 128 + signal.SIGINT, done.stderr
            assert f"{device.uuid} is in RUNNING, as found" in done.stderr
    assert done.returncode == 0, done.stderr
    assert at > 8


def test_a_device_that_was_left_in_another_state_is_said_and_reset_only_if_it_may_be(
    make_mtty: Callable[[], Mdev],
) -> None:
    device = make_mtty()
    with OpenDevices([find(device.uuid)]) as opened:
        set_feature(opened.devices[0].fd, Feature.MIG_DEVICE_STATE, FeatureMigState(State.STOP))
    done = command(device.uuid, *QUICK)
    assert done.returncode == 2
    assert f"{device.uuid}: is in STOP, not in RUNNING" in done.stderr
    assert state_of(device) is State.STOP
    assert command(device.uuid, *QUICK, "--reset").returncode == 0
    assert state_of(device) is State.RUNNING


@pytest.mark.parametrize("by", ["cdev", "group"])
def test_it_is_opened_by_cdev_or_by_group(make_mtty: Callable[[], Mdev], by: str) -> None:
    device = make_mtty()
    assert command(device.uuid, *QUICK, "--by", by, "--quiet").returncode == 0
    assert state_of(device) is State.RUNNING


@pytest.mark.parametrize("reset", [(), ("--reset",)])
def test_error_is_said_and_left_by_a_reset_alone(make_sample: Callable[..., SampleMdev], reset: Sequence[str]) -> None:
    device = make_sample(size_kib=256, fault="arc:3")
    done = command(device.uuid, *QUICK, *reset)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    if reset:
        assert "was in ERROR, and was reset" in done.stderr
    else:
        assert "is left in ERROR: only a reset leads to RUNNING" in done.stderr
    assert state_of(device) is State.RUNNING, "also where it was not reset: a close does it, of this driver"
