# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that need a kernel with VFIO, mtty and the sample driver: `make real` runs them in a guest.

Elsewhere they are one skipped test. In the guest, each test fails during which the kernel complained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kernel.guest import COMPLAINT
from tests.real import mdev
from tests.real.sample import MakeOpen, SampleDevice

HERE = Path(__file__).resolve().parent
IN_GUEST = "PROTO_V3_GUEST" in os.environ


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside of a guest, all tests of this folder are one, and it is skipped."""
    here = [item for item in items if item.path.is_relative_to(HERE)]
    if here and not IN_GUEST:
        here[0].add_marker(pytest.mark.skip(reason="the tests of tests/real run in a guest: make real"))
        items[:] = [item for item in items if item is here[0] or item not in here]


@pytest.fixture
def make_mtty() -> Iterator[Callable[[], mdev.Mdev]]:
    """A function that creates an mtty device. All are removed at the end of the test."""
    made: list[mdev.Mdev] = []

    def make() -> mdev.Mdev:
        made.append(mdev.create_mtty())
        return made[-1]

    yield make
    remove_all(made)


@pytest.fixture
def make_sample() -> Iterator[Callable[..., mdev.SampleMdev]]:
    """A function that creates a device of the sample driver; its arguments are parameters of the module, such as
    `size_kib=1024, lock="device"`. All are removed at the end of the test.
    """
    if not mdev.supported(mdev.SAMPLE):
        pytest.skip(f"this kernel has no module {mdev.SAMPLE_MODULE}")
    made: list[mdev.SampleMdev] = []

    def make(**parameters: int | str) -> mdev.SampleMdev:
        made.append(mdev.create_sample(**parameters))
        return made[-1]

    yield make
    remove_all(made)


@pytest.fixture
def make_open(make_sample: Callable[..., mdev.SampleMdev]) -> Iterator[MakeOpen]:
    """A function that creates and opens a device of the sample driver, of 1 MiB unless its arguments, parameters of
    the module, say something else.
    """
    made: list[SampleDevice] = []

    def make(**parameters: int | str) -> SampleDevice:
        sizes: dict[str, int | str] = {"size_kib": 1024, "block_kib": 16, "chunk_kib": 256}
        made.append(SampleDevice(make_sample(**(sizes | parameters))))
        return made[-1]

    yield make
    for device in made:
        device.close()


def remove_all(devices: Sequence[mdev.Mdev]) -> None:
    for device in devices:
        if device.sysfs.exists():
            device.remove()


@pytest.fixture(autouse=True)
def quiet_kernel() -> Iterator[None]:
    """The kernel logs no BUG, WARNING or lockdep report while a test runs."""
    if not IN_GUEST:
        yield
        return
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(log, 0, os.SEEK_END)
        yield
        complaints = [record for record in records(log) if COMPLAINT.search(record)]
    finally:
        os.close(log)
    assert complaints == []


def records(log: int) -> Iterator[str]:
    """The records that /dev/kmsg has from here on: the text of each, without its header."""
    while True:
        try:
            record = os.read(log, 8192)
        except BlockingIOError:
            return
        except BrokenPipeError:  # overwritten before it was read: the next read() gives the oldest there is
            continue
        yield record.decode(errors="replace").partition(";")[2].partition("\n")[0]
