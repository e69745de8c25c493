# SPDX-License-Identifier: GPL-2.0-or-later
"""The changes that could be made, in order of what they cost to make, and which of them mean something where."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from proto_v3.errors import UserError
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import did_you_mean

AS_IT_IS = "as it is"
"""The first row: v2 as the scenario sets it up."""


def _always(scenario: Scenario) -> str:
    return ""


def _few_chunks(scenario: Scenario) -> str:
    chunks = scenario.driver.chunks
    return "" if chunks < 4 else f"the driver has {chunks} chunks"


def _reconfigured(scenario: Scenario) -> str:
    return "" if any(device.reconfigurations for device in scenario.devices) else "nothing reconfigures the devices"


def _several_devices(scenario: Scenario) -> str:
    return "" if len(scenario.devices) > 1 else "there is one device"


def _moves_before_the_stop(scenario: Scenario) -> str:
    moves = any("PRE_COPY" in each.features and each.stop_only_blocks < each.blocks for each in scenario.devices)
    return "" if moves or not _reconfigured(scenario) else "the devices give nothing before the stop"


@dataclass(frozen=True, slots=True)
class ProposedChange:
    """A change of VMM, driver or interface."""

    name: str
    """What tables and options call it."""
    what: str
    """What it does, in a phrase."""
    where: str
    """Where it would be made: a setting, QEMU, the driver, firmware, the uAPI."""
    needs: str = ""
    """What it needs that nobody has measured; empty: nothing."""
    v2: tuple[str, ...] = ()
    """The suffixes that it adds to v2's name."""
    instead_of: str = ""
    """The suffix of a change above that it takes the place of, in v2's name."""
    v3: tuple[str, ...] = ()
    """The suffixes that it adds to v3's name, in a row below."""
    streams: str = ""
    """It makes the protocol v3, with this suffix for its streams; in place of that of a row above."""
    nothing: Callable[[Scenario], str] = _always
    """Why it changes nothing in a scenario; empty if it changes something."""


LADDER = (
    ProposedChange(
        "multifd",
        "RAM and each device's stop-copy data take connections of their own",
        "setting",
        v2=("multifd",),
        v3=("multifd",),
    ),
    ProposedChange(
        "reinit-ack",
        "the driver tells of new critical data, and the target must have loaded it before the stop",
        "setting",
        v2=("reinit-flush", "ack-reusable"),
        nothing=_reconfigured,
    ),
    ProposedChange(
        "chunks4",
        "four chunks a device in place of two, which firmware saves into while others are read",
        "driver",
        needs="whether one VF has several SAVEs in flight",
        v2=("chunks4",),
        v3=("chunks4",),
        nothing=_few_chunks,
    ),
    ProposedChange(
        "early",
        "each device's save begins when that device is stopped, and not when all are",
        "QEMU",
        v2=("early",),
        nothing=_several_devices,
    ),
    ProposedChange(
        "retry",
        "critical data that comes after the stop resumes the guest, and does not fail the migration",
        "QEMU",
        v2=("retry",),
        v3=("retry",),
        nothing=_reconfigured,
    ),
    ProposedChange(
        "parallel-stop",
        "all devices are stopped at once, and their configs loaded at once",
        "QEMU",
        needs="whether firmware stops several VFs of a PF at once",
        v2=("parallel-stop",),
        v3=("parallel-stop",),
        nothing=_several_devices,
    ),
    ProposedChange(
        "parts",
        "the guest is stopped when RAM and each device's data also fit by themselves, as v3 does",
        "QEMU",
        v2=("parts",),
    ),
    ProposedChange(
        "threads",
        "before the stop, each device is read by a thread of its own, beside RAM",
        "QEMU",
        v2=("threads",),
        nothing=_moves_before_the_stop,
    ),
    ProposedChange(
        "critical-first",
        "critical records go first, and in chunks",
        "driver",
        needs="whether firmware saves the critical part by itself",
        v2=("critical-first",),
        v3=("critical-first",),
        nothing=_reconfigured,
    ),
    ProposedChange(
        "priority",
        "in the one fd, critical records overtake dirty ones that were not read",
        "driver, both ends",
        needs="as critical-first",
        v2=("priority",),
        instead_of="reinit-flush",
        nothing=_reconfigured,
    ),
    ProposedChange(
        "v3-n1",
        "a second fd for critical data; one dirty stream",
        "uAPI, all",
        needs="a driver and firmware that keep critical data apart",
        streams="n1",
    ),
    ProposedChange(
        "v3-n4",
        "four dirty streams a device",
        "uAPI, all",
        needs="whether one VF has several SAVEs in flight",
        streams="n4",
    ),
    ProposedChange(
        "v3-blocks",
        "one fd of addressable blocks, read by four threads, in place of four streams",
        "uAPI, all",
        needs="whether firmware saves any block that is asked for",
        streams="blocks-n4",
    ),
)
"""From the cheapest to the dearest; each is made on top of those above it."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A row of the table: what is run, or why nothing is."""

    name: str
    protocol: str
    """The name of the protocol: v2 or v3 with this change and those above."""
    change: ProposedChange | None = None
    """None: as it is."""
    nothing: str = ""
    """Why it is not run: it changes nothing here, or cannot be had. Empty: it is run."""


def rungs(scenario: Scenario, only: Collection[str] | None = None) -> list[Rung]:
    """The rows for a scenario: as it is, and each change on top of those above it.

    `only` are the names of the changes to be made; None: all. UserError for a name that is none of them.
    """
    known = [change.name for change in LADDER]
    for name in only or ():
        if name not in known:
            raise UserError(f"change {name!r}: must be one of {', '.join(known)}{did_you_mean(name, known)}")
    protocol = Protocol.parse("v2", scenario)
    made, rows = list[ProposedChange](), [Rung(AS_IT_IS, protocol.name)]
    for change in LADDER:
        if only is not None and change.name not in only:
            continue
        nothing, above = change.nothing(scenario), protocol
        if not nothing:
            try:
                protocol = Protocol.parse(protocol_of([*made, change]), scenario)
                if _same(protocol, above, scenario):
                    nothing = "the scenario has it"
            except UserError as error:
                nothing = str(error)
        if nothing:
            protocol = above
        else:
            made.append(change)
        rows.append(Rung(change.name, protocol.name, change, nothing))
    return rows


def _same(one: Protocol, other: Protocol, scenario: Scenario) -> bool:
    return one.version == other.version and one.applied(scenario).scenario == other.applied(scenario).scenario


def protocol_of(changes: Collection[ProposedChange]) -> str:
    """The name of the protocol with all of these changes."""
    streams = [change.streams for change in changes if change.streams]
    if not streams:
        gone = {change.instead_of for change in changes}
        return "-".join(["v2", *(suffix for change in changes for suffix in change.v2 if suffix not in gone)])
    return "-".join(["v3", streams[-1], *(suffix for change in changes for suffix in change.v3)])
