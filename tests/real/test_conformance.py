# SPDX-License-Identifier: GPL-2.0-or-later
"""The same calls to the drivers of this kernel and to the simulated device: alike, but for what is listed."""

from __future__ import annotations

from collections.abc import Callable

from tests.conformance.calls import GROUPS
from tests.conformance.differences import judge
from tests.conformance.record import FOLDER, Record, ask, read
from tests.conformance.simulated import simulated_answers
from tests.real.mdev import Mdev, SampleMdev

SAMPLE_KIB = 256
"""Of state: enough for several blocks a stream, and little to write."""


def conforms(record: Record) -> None:
    simulated = {group: simulated_answers(record.driver, cases) for group, cases in GROUPS.items()}
    judged = judge(record.driver, record.release, record.answers, simulated)
    assert judged.unlisted == []
    assert judged.stale == {}
    kept = FOLDER / record.name
    if kept.exists():
        assert read(kept).answers == record.answers, f"renew {kept.name}: python -m tests.conformance.record"


def test_mtty(make_mtty: Callable[[], Mdev]) -> None:
    conforms(ask(make_mtty().uuid))


def test_the_sample_driver(make_sample: Callable[..., SampleMdev]) -> None:
    conforms(ask(make_sample(size_kib=SAMPLE_KIB).uuid))
