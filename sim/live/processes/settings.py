# SPDX-License-Identifier: GPL-2.0-or-later
"""How the processes of a live run are run, and what a scenario asks of them."""

from __future__ import annotations

from dataclasses import dataclass

from sim.host.machine import ZERO_PAGE_BYTES
from sim.live.tcp.handshake import Limits
from sim.live.tcp.sockets import SocketSettings
from sim.scenario.scenario import Scenario
from sim.scenario.units import GIB, NS_PER_S, PAGE_BYTES

FRAME_SLACK_BYTES = 128 << 10
"""Of a frame beside its data: the header of a record, and the versions of addressable blocks (8 bytes each)."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files with this side's certificate and key, and with the certificates that it trusts."""

    cert: str
    key: str
    ca: str


@dataclass(frozen=True, slots=True)
class Settings:
    """How the processes of a side are run."""

    io: str = "threads"
    loop: str = "uvloop"
    tls: Tls | None = None
    silent_s: float = 10.0
    """A process or a peer that does not answer for this time is given up."""
    handshake_s: float = 30.0
    after_stop_s: float = 120.0
    """A migration that lasts longer than vmm.give_up_s plus this is ended, in any phase."""
    max_give_up_s: float = 3600.0
    """The largest vmm.give_up_s that a target accepts: nobody else gets its place for that time."""
    once: bool = False
    """A target that refuses an offer waits for no other source."""
    progress: bool = False
    """Send progress notes."""
    max_state_bytes: int = 4 * GIB
    """The memory that a target takes for a migration (sim.live.processes.memory)."""

    def limits(self, frame_bytes: int) -> Limits:
        """Of a session in which no frame is larger than this."""
        return Limits(handshake_s=self.handshake_s, silent_s=self.silent_s, frame_bytes=frame_bytes)


def frame_bytes(scenario: Scenario) -> int:
    """The largest payload that a source sends."""
    ram_scan = scenario.ram.scan_bytes_per_s * scenario.vmm.ram_budget_ns / NS_PER_S / PAGE_BYTES * ZERO_PAGE_BYTES
    block = max(device.block_bytes for device in scenario.devices)
    largest = max(scenario.vmm.read_bytes, scenario.ram.frame_bytes, ram_scan, block)
    return round(largest * (1 + 1 / 128)) + FRAME_SLACK_BYTES


def socket_settings(scenario: Scenario) -> SocketSettings:
    """Socket options for the scenario's connections: the kernel's pacing, and its buffers."""
    link = scenario.link
    return SocketSettings(
        buffer_bytes=link.socket_buffer_bytes // 2,  # the scenario counts the sender's and the receiver's together
        max_rate_bytes_per_s=round(link.per_connection_bytes_per_s),
    )
