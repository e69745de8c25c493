# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared connections: which of them takes the next frame."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from proto_v3.errors import PeerProtocolError
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import LEAST_BYTES, MIN_FRAMES, Credits, SharedInStreams, SharedOutStreams
from sim.clock.port import sleep_ns
from tests.build.scenario import virtual


class Wire:
    """Takes any frame at once."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    async def send(self, frame: Frame) -> int:
        self.frames.append(frame)
        return 1


async def carried(connections: int, frames: int) -> list[list[Frame]]:
    """What each connection took, of frames that come one after the other, each when the one before is gone."""
    wires = [Wire() for _ in range(connections)]
    channels: list[Channel] = list(wires)  # type: ignore[arg-type]
    streams = SharedOutStreams(channels, 1, Credits(1 << 20, 1 << 20))
    senders = [asyncio.create_task(work) for work, _ in streams.work()]
    await sleep_ns(1)
    for at in range(frames):
        await streams.carry(Frame(Kind.DATA, value=at), critical=False)
        await sleep_ns(1)
    for sender in senders:
        sender.cancel()
    await asyncio.wait(senders)
    return [wire.frames for wire in wires]


@pytest.mark.rule("v3.10.5")
@virtual
async def test_connections_that_are_free_take_turns() -> None:
    """Else one socket is filled before the next one gets anything, and a bounded credit fills few of them."""
    took = await carried(4, 40)
    assert [len(frames) for frames in took] == [10, 10, 10, 10]
    assert Counter(frame.value for frames in took for frame in frames) == Counter(range(40)), "each frame once"


@virtual
async def test_one_connection_takes_all_in_order() -> None:
    (took,) = await carried(1, 10)
    assert [frame.value for frame in took] == list(range(10))


@pytest.mark.rule("v3.10.5")
@virtual
async def test_frames_that_come_together_are_dealt_out() -> None:
    """Many readers hand in at once: the first connection must not take all of it."""
    wires = [Wire() for _ in range(4)]
    channels: list[Channel] = list(wires)  # type: ignore[arg-type]
    streams = SharedOutStreams(channels, 1, Credits(1 << 20, 1 << 20))
    senders = [asyncio.create_task(work) for work, _ in streams.work()]
    await sleep_ns(1)
    await asyncio.gather(*(streams.carry(Frame(Kind.DATA, value=at), critical=False) for at in range(4)))
    for sender in senders:
        sender.cancel()
    await asyncio.wait(senders)
    assert [len(wire.frames) for wire in wires] == [1, 1, 1, 1]


@pytest.mark.rule("v3.10.4")
@virtual
async def test_what_waits_at_the_target_is_bounded_in_frames_too() -> None:
    """Frames without payload cost no credit, and a peer may send any number of them ahead of the one that is due."""
    credit = 64 * LEAST_BYTES
    streams = SharedInStreams(Wire(), [], 1, 2, Credits(credit, credit), lambda size: None)  # type: ignore[arg-type]
    most = MIN_FRAMES + 64
    for place in range(2, 2 + most):
        assert streams.arrived(Frame(Kind.DATA, 0, 1, place=place))
    with pytest.raises(PeerProtocolError, match=f"{most} frames wait"):
        streams.arrived(Frame(Kind.DATA, 0, 1, place=2 + most))
    assert streams.arrived(Frame(Kind.DATA, 0, 0, place=2)), "another class has room of its own"
