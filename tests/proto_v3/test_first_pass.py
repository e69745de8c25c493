# SPDX-License-Identifier: GPL-2.0-or-later
"""v3's first pass over a device: said once behind the data of each wire stream, and loaded when all were answered."""

from __future__ import annotations

import asyncio

import pytest

from proto_v3.vmm.first_pass import FirstPass
from proto_v3.wire.frames import Frame, Kind


class Sent:
    """A wire stream that keeps what is sent."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    async def send(self, frame: Frame) -> None:
        self.frames.append(frame)


@pytest.mark.rule("v3.6.8")
def test_a_first_pass_is_loaded_when_the_target_has_answered_for_each_of_its_wire_streams() -> None:
    first, wire = FirstPass(3, [1, 2]), Sent()
    assert asyncio.run(first.ran_dry(wire, 1))
    assert not asyncio.run(first.ran_dry(wire, 1)), "only the first time"
    assert first.answered(1)
    assert not first.loaded, "the other one is still read"
    assert not first.answered(2), "it was not sent yet"
    assert asyncio.run(first.ran_dry(wire, 2))
    assert not first.loaded
    assert first.answered(2)
    assert first.loaded
    assert not first.answered(2), "a second answer is not due"
    assert wire.frames == [Frame(Kind.FIRST_PASS_SENT, 3, 1), Frame(Kind.FIRST_PASS_SENT, 3, 2)]
