# SPDX-License-Identifier: GPL-2.0-or-later
"""The one rule of v2 and v3: by the whole, and by parts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.vmm.first_pass import FirstPass
from proto_v3.vmm.stop_rule import StopRule
from proto_v3.wire.frames import Frame
from tests.proto_v3.test_switchover import SETTINGS

MS = 1_000_000


@dataclass
class Part:
    device: int = 0
    what: str = "stream 1"
    sent_bytes: int = 0
    unread_bytes: int = 0
    first_pass: FirstPass = field(default_factory=lambda: FirstPass(0, [1]))

    async def send(self, frame: Frame) -> None:
        """As a wire stream."""

    def loaded(self) -> Part:
        asyncio.run(self.first_pass.ran_dry(self, 1))
        assert self.first_pass.answered(1)
        return self


def rule(*parts: Part, by_parts: bool = True) -> StopRule:
    """After 100 ms in which 30 MB were sent, 20 of them RAM: 30 MB fit 100 ms, of RAM 20 and of each part what it
    sent."""
    made = StopRule(replace(SETTINGS, downtime_limit_ns=100 * MS), 0, by_parts=by_parts)
    for part in parts:
        made.add(part, 0)
    made.sample(100 * MS, 30_000_000, 20_000_000, 1)
    return made


@pytest.mark.rule("v2.best.3")
@given(st.integers(0, 40_000_000), st.integers(0, 40_000_000))
def test_by_the_whole_only_the_sum_counts(ram_bytes: int, device_bytes: int) -> None:
    slow = Part(unread_bytes=device_bytes)
    assert rule(slow, by_parts=False).fits(ram_bytes, device_bytes) == (ram_bytes + device_bytes < 30_000_000)


@pytest.mark.rule("v2.best.3", "v3.6.8")
@pytest.mark.parametrize(
    ("ram", "unread", "unsaved", "fits"),
    [
        (19_000_000, 9_000_000, 0, True),
        (21_000_000, 8_000_000, 0, False),  # RAM by itself: 20 MB in 100 ms
        (1_000_000, 11_000_000, 0, False),  # the part by itself: 10 MB
        (19_000_000, 9_900_000, 2_000_000, False),  # together
        (0, 5_000_000, 14_000_000, True),  # the part's take 50 ms; in the other 50, 15 MB can be saved and sent
        (0, 5_000_000, 16_000_000, False),
    ],
)
def test_by_parts_each_must_fit_by_itself_too(ram: int, unread: int, unsaved: int, fits: bool) -> None:
    part = Part(sent_bytes=10_000_000, unread_bytes=unread).loaded()
    assert rule(part).fits(ram, unread + unsaved) is fits
    assert bool(rule(part).held_up(["dev"], ram, unread + unsaved)) is (
        not fits and ram + unread + unsaved < 30_000_000
    )


@pytest.mark.rule("v2.best.3", "v3.6.8")
def test_by_parts_nothing_fits_before_the_first_pass_is_loaded() -> None:
    part = Part(sent_bytes=10_000_000)
    assert not rule(part).fits(0, 0)
    assert rule(part).held_up(["dev"], 0, 0) == ["the first pass of dev stream 1 was not loaded at the target"]
    assert rule(part.loaded()).fits(0, 0)


def test_the_settings_say_by_which_if_the_protocol_should_not() -> None:
    for asked, own, by in [(None, True, True), (None, False, False), (True, False, True), (False, True, False)]:
        assert StopRule(replace(SETTINGS, by_parts=asked), 0, by_parts=own).by_parts is by
