# SPDX-License-Identifier: GPL-2.0-or-later
"""Screening: the same model in larger pieces, for sweeps over many plausible devices.

What a run costs are its frames and its reads. With guest RAM in frames of 4 MiB, and data fds read by 4 MiB, in place
of 1 MiB, it takes a half to a third of the time. A piece stays as small as it is where its size is part of what is
modelled: v2's reads before the stop, one a device in each round; all of v2's reads of a small state; a read of
addressable blocks, which is a SAVE of its own; and what `_fixed` names. Then downtimes stay within 0.5 %
(tests/sim/test_screening.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sim.scenario.scenario import Scenario

PIECES = 4
"""So many frames or reads are one when runs are screened."""
PIECES_IN_A_BUFFER = 2
"""At least so many fit into a connection's buffer, or into a credit: one is sent while the next one is received."""


def screened(scenario: Scenario) -> Scenario:
    """The scenario as it is screened: `vmm.pieces_at_once = 4`."""
    return scenario.model_copy(update={"vmm": scenario.vmm.model_copy(update={"pieces_at_once": PIECES})})


def frames_at_once(scenario: Scenario) -> int:
    """Frames of RAM that are one: none where a device is written to. v3 may then stop the guest in the middle of a pass
    over RAM, and what is left of it at that moment hangs on the size of a frame."""
    return 1 if _written(scenario) else _at_once(scenario, scenario.link.socket_buffer_mib, scenario.ram.frame_mib)


def reads_at_once(scenario: Scenario) -> int:
    """Reads of a data fd that are one."""
    v3, room_mib = scenario.v3, scenario.link.socket_buffer_mib
    if v3.wire != "streams":
        room_mib = min(room_mib, v3.critical_credit_mib, v3.dirty_credit_mib)
    return _at_once(scenario, room_mib, scenario.vmm.read_mib)


def part_bytes(scenario: Scenario) -> int | None:
    """A connection takes the parts of a frame of so many bytes each, as it has room: what a frame would be otherwise.
    None: it takes whole frames."""
    return None if reads_at_once(scenario) == 1 else scenario.vmm.read_bytes


def _at_once(scenario: Scenario, room_mib: float, piece_mib: float) -> int:
    asked = scenario.vmm.pieces_at_once
    if asked == 1 or _fixed(scenario):
        return 1
    return max(1, min(asked, int(room_mib / PIECES_IN_A_BUFFER // piece_mib)))


def _fixed(scenario: Scenario) -> bool:
    """Whether the devices are written to, and saved by chunks before the stop. Each pass is then as fast as chunks are
    read and sent beside each other, and what the guest dirties meanwhile decides when it is stopped."""
    return scenario.driver.precopy_image == "chunks" and _written(scenario)


def _written(scenario: Scenario) -> bool:
    return any(device.writes for device in scenario.device)
