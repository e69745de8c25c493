# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole migrations whose connections a test listens to, delays or tampers with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from proto_v3.vfio.uapi import State
from proto_v3.wire.channel import Channel, Transport
from proto_v3.wire.frames import Frame, Payload, decode, encode_header
from sim.clock import virtual
from sim.outcome import Outcome
from sim.run import VirtualRun
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import ns

Raw = tuple[bytes, Payload]
"""A header and a payload."""


def raw(frame: Frame) -> Raw:
    return encode_header(frame), frame.payload


class Tap:
    """What happens to what comes; this one does nothing to it. `to` is the side that receives."""

    async def raw(self, to: str, connection: int, header: bytes, payload: Payload) -> Sequence[Raw]:
        """What is delivered in place of a header and its payload."""
        return [raw(frame) for frame in await self.frame(to, connection, decode(header, payload))]

    async def frame(self, to: str, connection: int, frame: Frame) -> Sequence[Frame]:
        """What is delivered in place of a frame."""
        return [frame]


class _Tapped:
    """A transport with a tap on what it receives."""

    def __init__(self, inner: Transport, tap: Tap, to: str, connection: int) -> None:
        self.send = inner.send
        self._inner = inner
        self._tap = tap
        self._to = to
        self._connection = connection
        self._due: deque[Raw] = deque()

    async def recv(self) -> Raw:
        while not self._due:
            self._due += await self._tap.raw(self._to, self._connection, *await self._inner.recv())
        return self._due.popleft()


class TappedRun(VirtualRun):
    """A migration with a tap on all connections, both ways."""

    def __init__(self, scenario: Scenario, name: str, tap: Tap, seed: int = 1) -> None:
        protocol = Protocol.parse(name, scenario)
        super().__init__(protocol.applied(scenario), seed)
        self._tap = tap

    def _connect(self) -> tuple[list[Channel], list[Channel]]:
        here, there = super()._connect()
        for to, channels in (("source", here), ("target", there)):
            for connection, channel in enumerate(channels):
                channel._transport = _Tapped(channel._transport, self._tap, to, connection)
        return here, there

    def end(self) -> Outcome:
        """Run it."""
        return virtual.run(self.outcome(), limit_ns=ns(60_000))

    def check_the_guest_goes_on_at_the_source(self, outcome: Outcome) -> None:
        """All devices run, no session is open, those of the target were reset; the guest runs at the source alone."""
        assert outcome.guest_runs_at == "source"
        for driver in (*self.drivers, *self.drivers_at_target):
            assert virtual.run(driver.state()) is State.RUNNING
            virtual.run(driver.set_streams(0))  # EBUSY if a session were open
        for driver in self.drivers_at_target:
            assert driver._breaks, "reset"
        for state in self.states:
            before = int(state.version.sum())
            state.advance(self.scenario.horizon_ns)
            assert int(state.version.sum()) > before, "it writes on"

    def check_nothing_was_touched(self) -> None:
        """No device left RUNNING, and the guest was never stopped."""
        assert not self.timeline.marks
        for driver in (*self.drivers, *self.drivers_at_target):
            assert not driver.counters
            assert virtual.run(driver.state()) is State.RUNNING
        assert self.machines["source"].running
        assert not self.machines["target"].running
