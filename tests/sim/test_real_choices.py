# SPDX-License-Identifier: GPL-2.0-or-later
"""What a real run makes of its scenario, of what the devices say, and of the other side's offer and digests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from proto_v3.errors import UserError
from proto_v3.vfio.uapi import MigrationFlags
from sim.live.processes.remote_backend import RemoteBackend
from sim.live.tcp.messages import Run
from sim.real.backend import RAM_AND_STATE, RAM_DIGEST_BYTES, RealBackend, is_compared
from sim.real.sample import SampleFiles
from sim.real.scenario import ProbedDevice, check_alike, check_used, loaded, of_devices
from sim.real.sysfs import DeviceEntry
from sim.scenario.protocol import Protocol

ALL = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY


def entry(name: str, driver: str = "mtty") -> DeviceEntry:
    return DeviceEntry(name, Path("/sys/devices") / name, driver, driver, None, None)


def device(name: str, driver: str = "mtty", streams: int = 0, image_bytes: int = 96) -> ProbedDevice:
    return ProbedDevice(entry(name, driver), ALL, streams, image_bytes)


# --- the scenario -----------------------------------------------------------------------------------------------------


def test_the_devices_take_the_place_of_the_scenarios() -> None:
    scenario = of_devices(loaded(None, []), [device("a"), device("b", "vfio_v3_sample", 8, 1 << 20)])
    mtty, sample = scenario.devices
    assert (mtty.name, mtty.features, mtty.max_dirty_streams) == ("mtty0", ["STOP_COPY", "P2P", "PRE_COPY"], 0)
    assert (sample.name, sample.max_dirty_streams, sample.state_mib) == ("vfio_v3_sample1", 8, 1.0)
    assert mtty.state_mib == 1 / 1024, "at least a KiB"
    assert Protocol.parse("v3-n8", scenario).applied(scenario)


def test_of_the_scenarios_devices_only_events_and_config_stay() -> None:
    settings = ["device.0.reconfigurations.at_s=[0.5]", "device.0.critical.objects=1", "device.0.config_load_ms=7"]
    scenario = of_devices(loaded("live-paced", settings), [device("a")])
    (mtty,) = scenario.devices
    assert mtty.name == "mtty"
    assert mtty.reconfigurations is not None
    assert (mtty.reconfigurations.at_s, mtty.config_load_ms, mtty.writes) == ([0.5], 7.0, None)
    assert (scenario.published, scenario.vmm) == ([], loaded("live-paced", settings).vmm)


def test_the_vmm_of_a_real_run_costs_nothing_of_its_own() -> None:
    vmm = loaded(None, []).vmm
    assert (vmm.setup_ms, vmm.vcpu_stop_ms, vmm.vcpu_start_ms, vmm.other_load_ms) == (0, 0, 0, 0)


def test_a_driver_with_a_long_name_has_a_name_in_tables() -> None:
    scenario = of_devices(loaded(None, []), [device("a", "a" * 50), device("b", "a" * 50)])
    assert [each.name for each in scenario.devices] == ["a" * 28 + "0", "a" * 28 + "1"]


def test_a_setting_that_a_real_run_does_not_use_is_refused() -> None:
    check_used(["vmm.downtime_limit_ms=1", "device.0.reconfigurations.at_s=[1]", "ram.size_gib=1", "v3.max_retries=1"])
    for key in (
        "firmware.engines",
        "link.gbit_per_s",
        "device.0.state_mib",
        "device.0.writes.mib_per_s",
        "vmm",
        "name",
    ):
        with pytest.raises(UserError, match=f"--set {key}: a real run has its own"):
            check_used([f"{key} = 1"])


def test_both_sides_have_the_same_drivers_and_no_device_twice() -> None:
    check_alike([entry("a"), entry("b", "x")], [entry("c"), entry("d", "x")])
    with pytest.raises(UserError, match="have the drivers mtty, x, the target's x, mtty"):
        check_alike([entry("a"), entry("b", "x")], [entry("c", "x"), entry("d")])
    with pytest.raises(UserError, match="a: is named twice"):
        check_alike([entry("a")], [entry("a")])
    with pytest.raises(UserError, match="c: is named twice"):
        check_alike([entry("a"), entry("b")], [entry("c"), entry("c")])


# --- who takes part in what -------------------------------------------------------------------------------------------


def test_a_target_takes_the_drivers_that_it_has() -> None:
    async def work() -> None:
        target = RealBackend("target", [entry("a"), entry("b", "x")], None)
        target.check(Run("{}", "v2", 1, "mtty,x"))
        with pytest.raises(UserError, match="have the drivers x,mtty, this target's mtty,x"):
            target.check(Run("{}", "v2", 1, "x,mtty"))
        with pytest.raises(UserError, match="the source simulates its devices"):
            target.check(Run("{}", "v2", 1))

    asyncio.run(work())


def test_a_target_that_simulates_takes_no_real_source() -> None:
    target = RemoteBackend.__new__(RemoteBackend)
    target.check(Run("{}", "v2", 1))
    with pytest.raises(UserError, match=r"migrates devices of a kernel \(mtty\)"):
        target.check(Run("{}", "v2", 1, "mtty"))


# --- the comparison ---------------------------------------------------------------------------------------------------

DEVICES = of_devices(loaded(None, []), [device("a"), device("b")]).devices
RAM, OTHER = b"r" * RAM_DIGEST_BYTES, b"o" * RAM_DIGEST_BYTES


def test_ram_is_always_compared_and_the_state_where_both_drivers_tell_it() -> None:
    differ = RAM_AND_STATE.difference
    assert differ(DEVICES[0], RAM, RAM) == ""
    assert differ(DEVICES[0], RAM, OTHER) == "the guest's RAM is another"
    assert differ(DEVICES[0], RAM + b"1f", RAM + b"1f") == ""
    assert differ(DEVICES[0], RAM + b"1f", RAM) == "", "the other end does not say"
    assert (
        differ(DEVICES[0], RAM + b"1f", RAM + b"2e") == "its driver's digest is 1f at the source and 2e at the target"
    )
    assert [is_compared(RAM + b"1", RAM + b"2"), is_compared(RAM + b"1", RAM), is_compared(RAM, RAM)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("digests", [[RAM], [RAM, RAM, RAM], [RAM, b"short"], [RAM, RAM + bytes(129)]])
def test_digests_of_a_wrong_shape_are_refused(digests: list[bytes]) -> None:
    assert "must be none, or 2 of 32 to 160 bytes" in RAM_AND_STATE.wrong(DEVICES, digests)
    assert RAM_AND_STATE.wrong(DEVICES, []) == ""
    assert RAM_AND_STATE.wrong(DEVICES, [RAM, RAM + bytes(128)]) == ""


# --- the sample driver's files ----------------------------------------------------------------------------------------


def test_the_sample_drivers_files(tmp_path: Path) -> None:
    folder = tmp_path / "sys/kernel/debug/vfio_v3_sample/a"
    assert SampleFiles.of(entry("a", "vfio_v3_sample"), tmp_path) is None, "debugfs is not there"
    folder.mkdir(parents=True)
    assert SampleFiles.of(entry("a", "mtty"), tmp_path) is None
    files = SampleFiles.of(entry("a", "vfio_v3_sample"), tmp_path)
    assert files is not None
    (folder / "params").write_text("size_kib 4096\nlock fd\n")
    (folder / "digest").write_text("0123abcd\n")
    assert (files.parameters(), files.digest()) == ({"size_kib": "4096", "lock": "fd"}, b"0123abcd")
    files.set_parameter("dirty_kib_s", "0")
    files.reconfigure()
    assert ((folder / "params").read_text(), (folder / "reconfigure").read_text()) == ("dirty_kib_s 0", "1")
