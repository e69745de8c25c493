# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest has what the other tests of this folder need: devices can be created, named and removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.mdev import Mdev, SampleMdev


def test_an_mtty_has_a_cdev_and_a_group(make_mtty: Callable[[], Mdev]) -> None:
    first, second = make_mtty(), make_mtty()
    for device in (first, second):
        assert device.cdev.is_char_device()
        assert device.group.is_char_device()
    assert first.cdev != second.cdev
    assert Path("/dev/iommu").is_char_device()


def test_a_removed_device_is_gone(make_mtty: Callable[[], Mdev]) -> None:
    device = make_mtty()
    node = device.cdev
    device.remove()
    assert not device.sysfs.exists()
    assert not node.exists()


@pytest.mark.lockdep
def test_a_sample_device_takes_its_parameters_and_leaves_the_modules_as_they_were(
    make_sample: Callable[..., SampleMdev],
) -> None:
    parameter = Path("/sys/module/vfio_v3_sample/parameters/size_kib")
    before = parameter.read_text()
    device = make_sample(size_kib=1024)
    assert device.cdev.is_char_device()
    assert "1024" in (device.debugfs / "params").read_text()
    assert parameter.read_text() == before
