# SPDX-License-Identifier: GPL-2.0-or-later
"""No target runs a guest of which a frame was left out, came twice or came early: the guest stays at the source."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest

from proto_v3.errors import PeerProtocolError
from proto_v3.vmm.migration import OutcomeKind
from proto_v3.vmm.order import RAM, Order
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind
from sim.clock import virtual
from sim.outcome import Outcome
from sim.scenario.units import ns
from tests.build.runs import prepared
from tests.build.scenario import small_scenario

PROTOCOLS = [
    "v2",
    "v2-ack",
    "v2-multifd",
    "v2-multifd-reinit-flush-ack-reusable",
    "v2-parts",
    "v2-multifd-early",
    "v2-multifd-threads-parts-reinit-flush-ack-reusable",
    "v3-n2",
    "v3-n2-one",
    "v3-blocks-n2",
    "v3-n1-multifd",
]
SECOND = small_scenario().device[0].model_dump(exclude_unset=True) | {
    "name": "second",
    "features": ["STOP_COPY", "P2P"],
}
SCENARIO = small_scenario({"device.1": SECOND, "device.0.state_mib": 2.0, "device.1.state_mib": 1.0})
MAY_BE_LEFT_OUT = {Kind.CANCEL, Kind.INIT_DATA_SENT, Kind.EPOCH_SENT, Kind.FIRST_PASS_SENT}
"""Without these the guest is stopped later, or not at all."""
MAY_COME_EARLY = {Kind.SETUP, Kind.EPOCH_SENT}
"""SETUP is the first one. The critical stream has EPOCH_SENT where its bytes end, wherever that is."""


@dataclass
class Wrong:
    """A source that does something wrong with its frame number `at`, of those without pages or device data."""

    name: str
    how: str = ""
    at: int = -1
    kinds: list[Kind] = field(default_factory=list)
    """Of these frames, in order."""

    def outcome(self) -> Outcome:
        run = prepared(SCENARIO, self.name)
        send = Channel.send

        async def wrongly(channel: Channel, frame: Frame) -> None:
            if channel not in run.channels or frame.kind in (Kind.HELLO, Kind.RAM, Kind.DATA, Kind.PACKET):
                await send(channel, frame)
                return
            self.kinds.append(frame.kind)
            at = len(self.kinds) - 1
            if self.how == "early" and at == 0:
                await send(channel, frame)
                await send(run.channels[0], Frame(all_kinds(self.name)[self.at], 0, value=1))
            elif not (self.how == "missing" and at == self.at):
                await send(channel, frame)
            if self.how == "doubled" and at == self.at:
                await send(channel, frame)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Channel, "send", wrongly)
            return virtual.run(run.outcome(), limit_ns=ns(60_000))


@functools.cache
def all_kinds(name: str) -> list[Kind]:
    """The frames of an undisturbed run."""
    undisturbed = Wrong(name)
    assert undisturbed.outcome().kind is OutcomeKind.COMPLETED
    return undisturbed.kinds


@pytest.mark.rule("v2.vmm.15", "v3.8.4")
@pytest.mark.parametrize("how", ["missing", "doubled", "early"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_target_that_gets_not_what_is_due_leaves_the_guest_at_the_source(name: str, how: str) -> None:
    tried = set()
    for at, kind in enumerate(all_kinds(name)):
        if kind in (MAY_BE_LEFT_OUT if how == "missing" else MAY_COME_EARLY if how == "early" else ()):
            continue
        if kind in (Kind.END, Kind.COMMIT) and how != "early":
            continue  # nothing comes after these, and nothing is read
        if how == "doubled" and kind is Kind.STREAM_END and name in ("v3-n2", "v3-blocks-n2", "v3-n1-multifd"):
            continue  # a stream that ended is read no more, and it has the connection for itself
        tried.add(kind)
        outcome = Wrong(name, how, at).outcome()
        what = f"{kind.name} {how} ({at})"
        assert outcome.kind is OutcomeKind.FAILED, what
        assert outcome.guest_runs_at == "source", what
        assert outcome.reason, what
    assert {Kind.RAM_BEGIN, Kind.RAM_END} <= tried


def test_what_is_not_in_the_table_changes_nothing() -> None:
    order = Order(RAM, "set-up", "here")
    order.take(Kind.SETUP)
    for kind in (Kind.SETUP, Kind.RAM_END, Kind.END, Kind.CONFIG):
        with pytest.raises(PeerProtocolError, match=rf"^{kind.name} came here, where it is not due \(pre-copy\)$"):
            order.take(kind)
    assert order.state == "pre-copy"
