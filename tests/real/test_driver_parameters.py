# SPDX-License-Identifier: GPL-2.0-or-later
"""Parameters, faults, times and log of the sample driver."""

from __future__ import annotations

import time

import pytest

from proto_v3.vfio.uapi import State
from tests.real.mdev import SAMPLE_PARAMETERS
from tests.real.sample import MakeOpen, errno_of, in_thread

S = State
LONG_S = 10.0


def test_a_parameter_has_limits_and_names(make_open: MakeOpen) -> None:
    for name, value, due in (
        ("engines", "0", "ERANGE"),
        ("streams", "65", "ERANGE"),
        ("lock", "none", "EINVAL"),
        ("size_kib", "x", "EINVAL"),
        ("size_kib", "-1", "EINVAL"),
    ):
        assert (name, errno_of((SAMPLE_PARAMETERS / name).write_text, value)) == (name, due)
    device = make_open(lock="device", lock_over="command")
    params = device.params()
    assert (params["lock"], params["lock_over"], params["size_kib"], params["fault"]) == (
        "device",
        "command",
        "1024",
        "",
    )
    device.set(engines=3)
    assert device.params()["engines"] == "3"
    assert errno_of(lambda: device.set(size_kib=4)) == "EPERM"
    assert errno_of(lambda: device.set(nothing=4)) == "ENOENT"
    assert errno_of(lambda: device.set(engines=0)) == "ERANGE"
    assert errno_of(lambda: make_open(size_kib=1000, block_kib=16)) == "EINVAL"


def test_a_fault_hits_the_call_that_it_names(make_open: MakeOpen) -> None:
    device = make_open(fault="read:2")
    out = device.begin(S.PRE_COPY)
    assert [errno_of(out.read, 10) for _ in range(3)] == ["ok", "EIO", "ok"]
    device.set(fault="set_state:1")
    assert errno_of(device.set_state, S.STOP_COPY) == "EIO"
    assert device.state() is S.PRE_COPY
    device.set(fault="arc:2")
    assert errno_of(device.set_state, S.STOP_COPY) == "EIO"
    assert device.state() is S.ERROR
    device.reset()
    for fault, call in (
        ("mig_data_size:1", device.data_size),
        ("precopy_info:1", device.begin(S.PRE_COPY).precopy_info),
    ):
        device.set(fault=fault)
        assert errno_of(call) == "EIO"
        assert errno_of(call) == "ok"


def test_a_load_that_fails_in_v3_fails_the_device(make_open: MakeOpen) -> None:
    source, target = make_open(), make_open(fault="load:2", load_mib_s=100)
    out, into = source.begin_all(S.STOP_COPY, 1), target.begin_all(S.RESUMING, 1)
    into[0].write_all(out[0].read_all())
    assert errno_of(into[1].write_all, out[1].read_all()) == "EIO"
    assert target.state() is S.ERROR


def test_an_arc_takes_its_time(make_open: MakeOpen) -> None:
    device = make_open(quiesce_us=60_000, suspend_us=90_000, resume_us=120_000, run_us=30_000)
    out = device.begin(S.PRE_COPY)
    for state, due_s in ((S.STOP_COPY, 0.15), (S.STOP, 0.0), (S.RUNNING, 0.15)):
        start = time.monotonic()
        device.set_state(state)
        assert time.monotonic() - start >= due_s
    out.close()


def test_commands_take_their_time_on_as_many_engines_as_there_are(make_open: MakeOpen) -> None:
    device = make_open(engines=2, command_us=20_000)
    fds = device.begin_all(S.STOP_COPY, 8)
    for reading in [in_thread(fd.read_all) for fd in fds]:
        reading.result(LONG_S)
    assert (device.mdev.debugfs / "commands_at_once").read_text().strip() == "2"
    counters = device.counters()
    assert sum(each["commands"] for each in counters.values()) == 9 + 8 + 1
    assert all(each["command_ns"] >= 20_000_000 for each in counters.values())


@pytest.mark.parametrize(("firmware", "at_once"), [((1, 1), 2), ((1, 2), 4), ((0, 0), 4)])
def test_devices_of_one_firmware_share_its_engines(
    make_open: MakeOpen, firmware: tuple[int, int], at_once: int
) -> None:
    devices = [make_open(firmware=number, engines=2, command_us=20_000) for number in firmware]
    for device in devices:
        (device.mdev.debugfs / "commands_at_once").write_text("0")
    fds = [fd for device in devices for fd in device.begin_all(S.STOP_COPY, 8)]
    for reading in [in_thread(fd.read_all) for fd in fds]:
        reading.result(LONG_S)
    counts = [int((device.mdev.debugfs / "commands_at_once").read_text()) for device in devices]
    assert (max(counts) if firmware[0] == firmware[1] != 0 else sum(counts)) == at_once


@pytest.mark.parametrize(("lock", "lock_over"), [("fd", "command"), ("device", "command"), ("device", "copy")])
def test_a_lock_over_the_command_makes_commands_take_turns(make_open: MakeOpen, lock: str, lock_over: str) -> None:
    device = make_open(lock=lock, lock_over=lock_over, command_us=20_000)
    fds = device.begin_all(S.STOP_COPY, 4)
    for reading in [in_thread(fd.read_all) for fd in fds[1:]]:
        reading.result(LONG_S)
    at_once = int((device.mdev.debugfs / "commands_at_once").read_text())
    if (lock, lock_over) == ("device", "command"):
        assert at_once == 1
        assert sum(each["lock_wait_ns"] for each in device.counters().values()) > 20_000_000
    else:
        assert at_once > 1


def test_the_log_has_a_line_a_call(make_open: MakeOpen) -> None:
    device = make_open()
    out = device.begin(S.PRE_COPY)
    out.read(100)
    device.set_state(S.RUNNING)
    out.close()
    texts = [line.text for line in device.log()]
    assert texts == [
        "open -> 0",
        "set_state RUNNING->PRE_COPY fd=1 -> 0",
        "read fd=0 size=100 -> 100",
        "set_state PRE_COPY->RUNNING fd=0 -> 0",
        "release fd=0",
    ]
    first = device.log()[0]
    assert abs(first.time_ns - time.time_ns()) < 60 * 10**9
    assert [line.number for line in device.log()] == list(range(5))
    device.mdev.clear_log()
    device.data_size()
    assert [line.number for line in device.log()] == [5]


def test_the_log_forgets_its_oldest_lines(make_open: MakeOpen) -> None:
    device = make_open(log_lines=16)
    for _ in range(50):
        device.data_size()
    assert [line.number for line in device.log()] == list(range(35, 51))
