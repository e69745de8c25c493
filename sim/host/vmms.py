# SPDX-License-Identifier: GPL-2.0-or-later
"""The two VMMs' sides of a migration, made from a scenario and a protocol, for any clock and transport."""

from __future__ import annotations

from collections.abc import Sequence

from proto_v3.vmm.migration import Side, Source, Target
from proto_v3.vmm.negotiate import negotiated_source, negotiated_target
from proto_v3.vmm.v2_source import V2Source
from proto_v3.vmm.v2_target import V2Target
from proto_v3.wire.channel import Channel
from sim.report import Counters, DeviceReport, SideReport
from sim.scenario.device import Device
from sim.scenario.protocol import AppliedScenario
from sim.scenario.scenario import Scenario


def target_device(scenario: Scenario, device: Device) -> Device:
    """The target's device: like the source's, except for its largest number of streams."""
    limit = scenario.v3.target_max_dirty_streams
    return device if limit is None else device.model_copy(update={"max_dirty_streams": limit})


def connections(applied: AppliedScenario) -> int:
    """Number of connections that the source makes, with the main channel; enough for v2 if it may fall back to it."""
    scenario = applied.scenario
    count = scenario.v2_options().channels
    if applied.protocol.version != 3:
        return count
    needed = scenario.v3_options().connections(len(scenario.devices))
    return max(count, needed) if scenario.v3.target_knows == "v2" else needed


async def make_source(side: Side, channels: Sequence[Channel], applied: AppliedScenario) -> tuple[Source, str]:
    """The source, ready to run, and a note, as that it fell back to v2; empty if there is nothing to note.

    v3 first agrees with the target on the protocol. Raises what proto_v3.vmm.negotiate.negotiated_source raises.
    """
    scenario = applied.scenario
    v2 = scenario.v2_options()
    if applied.protocol.version == 3:
        return await negotiated_source(side, channels, scenario.v3_options(), v2)
    return V2Source(side, channels, v2), ""


async def make_target(side: Side, channels: Sequence[Channel], applied: AppliedScenario) -> Target | None:
    """The target, ready to run; None if the source gave up before.

    Raises what proto_v3.vmm.negotiate.negotiated_target raises.
    """
    scenario = applied.scenario
    v2 = scenario.v2_options()
    if applied.protocol.version == 3:
        v3 = scenario.v3_options() if scenario.v3.target_knows == "v3" else None
        return await negotiated_target(side, channels, v3, v2)
    return V2Target(side, channels, v2)


def side_report(
    name: str,
    counters: Counters,
    channels: Sequence[Channel],
    ended_ns: int,
    devices: list[DeviceReport],
    resets: list[str],
) -> SideReport:
    """What a side (`source` or `target`) knows at its end. `counters` and `resets` are those of its VMM's Side."""
    counters.messages = sum(channel.messages_sent for channel in channels)
    if name == "source":
        counters.wire_bytes = sum(channel.bytes_sent for channel in channels)
        counters.connections = len(channels)
    return SideReport(ended_ns, counters, devices, resets)
