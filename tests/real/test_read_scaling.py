# SPDX-License-Identifier: GPL-2.0-or-later
"""N threads that read N data fds keep min(N, engines) of the firmware's commands busy, or one under one lock over them.

Counts and no times: the rates, on an idle machine, are measured by benchmarks/real_read.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from proto_v3.vfio.uapi import State
from tests.real.mdev import SampleMdev
from tests.real.sample import SampleDevice

SIZE_KIB, RECORD_KIB, SAVE_MIB_S = 8192, 1024, 10
"""A command takes 100 ms, so that those of all streams, begun one after the other, run at the same time."""


@contextlib.contextmanager
def opened(mdev: SampleMdev) -> Iterator[SampleDevice]:
    device = SampleDevice(mdev)
    try:
        yield device
    finally:
        device.close()


def read_all(device: SampleDevice, streams: int) -> list[int]:
    """Stop the device and read each of its data fds to the end in a thread; the bytes of each."""
    fds = device.begin_all(State.STOP_COPY, streams) if streams else [device.begin(State.STOP_COPY)]
    with ThreadPoolExecutor(len(fds)) as threads:
        sizes = [len(data) for data in threads.map(lambda fd: fd.read_all(), fds)]
    for fd in fds:
        fd.close()
    return sizes


@pytest.mark.lockdep
@pytest.mark.parametrize(
    ("lock", "lock_over", "engines", "streams", "at_once"),
    [
        ("fd", "copy", 8, 0, 1),
        ("fd", "copy", 8, 1, 2),
        ("fd", "copy", 8, 4, 5),
        ("fd", "copy", 2, 4, 2),
        ("fd", "command", 8, 4, 5),
        ("device", "copy", 8, 4, 5),
        ("device", "command", 8, 4, 1),
        ("global", "command", 8, 4, 1),
    ],
)
def test_as_many_commands_run_at_once_as_streams_engines_and_locks_let(
    make_sample: Callable[..., SampleMdev], lock: str, lock_over: str, engines: int, streams: int, at_once: int
) -> None:
    """v3's critical stream is one of them: its data is a record as large as the others."""
    mdev = make_sample(
        size_kib=SIZE_KIB,
        critical_kib=RECORD_KIB,
        chunk_kib=RECORD_KIB,
        save_mib_s=SAVE_MIB_S,
        engines=engines,
        lock=lock,
        lock_over=lock_over,
    )
    with opened(mdev) as device:
        sizes = read_all(device, streams)
        assert len(sizes) == 1 + streams
        assert sum(sizes) > (SIZE_KIB + RECORD_KIB) * 1024
        assert int((mdev.debugfs / "commands_at_once").read_text()) == at_once
        counters = device.counters()
        assert [counters[fd]["read_bytes"] for fd in range(1 + streams)] == sizes
        waited = sum(each["lock_wait_ns"] for each in counters.values())
        if lock == "fd" and lock_over == "copy":  # a fd's one reader has its lock for itself
            assert waited == 0
        if lock != "fd" and lock_over == "command":  # a command of another stream is waited for to its end
            assert waited > 10**9 / SAVE_MIB_S
