# SPDX-License-Identifier: GPL-2.0-or-later
"""What one side's log says of one migration, in numbers. Times are microseconds of that side's clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

SOURCE, TARGET = "source", "target"


class Stretch(NamedTuple):
    """From one event to another."""

    begin_us: int
    end_us: int

    @property
    def us(self) -> int:
        """How long."""
        return self.end_us - self.begin_us


class Transition(NamedTuple):
    """A SET_STATE of a device."""

    current: str
    """The state before, as far as the log shows it; empty: not known."""
    target: str
    """The state that was asked for: `STOP_COPY`."""
    begin_us: int | None
    """None: only its end was seen (QMP)."""
    end_us: int
    ok: bool = True
    """The device is in the state that was asked for."""


class Piece(NamedTuple):
    """Bytes that were written into a device, and when."""

    begin_us: int
    end_us: int
    bytes: int
    """0: not known (multifd)."""

    @property
    def us(self) -> int:
        """How long."""
        return self.end_us - self.begin_us


class Window(NamedTuple):
    """A window of the source's bandwidth (migrate_transferred)."""

    end_us: int
    bytes: int
    ms: int
    given_bytes_per_ms: int
    """avail-switchover-bandwidth, or the measured one; 0: not told."""
    threshold_bytes: int
    device_bytes: int
    """What was read of devices since the migration began, until then."""

    @property
    def bytes_per_ms(self) -> float:
        """As measured."""
        return self.bytes / self.ms


class Report(NamedTuple):
    """What GET_PRECOPY_INFO or MIG_DATA_SIZE said of a device."""

    at_us: int
    initial_bytes: int
    dirty_bytes: int
    reinit: bool = False


class Size(NamedTuple):
    """A MIG_DATA_SIZE."""

    at_us: int
    bytes: int


@dataclass(slots=True)
class DeviceFacts:
    """Of one device, at one side."""

    name: str
    flags: int | None = None
    """VFIO_DEVICE_FEATURE_MIGRATION's (vfio_migration_init)."""
    info_v2: bool | None = None
    """Whether QEMU opted in to PRECOPY_INFOv2."""
    transitions: list[Transition] = field(default_factory=list)
    # at the source
    setup_us: int | None = None
    buffer_bytes: int = 0
    sizes: list[Size] = field(default_factory=list)
    """The first MIG_DATA_SIZE and the last one."""
    reports: list[Report] = field(default_factory=list)
    """The first PRECOPY_INFO, each one with REINIT, and the last one."""
    dirtied_bytes: int = 0
    dirtied_us: int = 0
    """What was written to it from one report to the next, after it was drained, and in which time."""
    drained_us: int | None = None
    """When read() had nothing more to give, the last time before the stop."""
    pieces_crc: int = 0
    """Of the sizes in which its data was read, or written, in their order."""
    precopy_bytes: int = 0
    precopy_blocks: int = 0
    first_pass_bytes: int | None = None
    """What was read until, for the first time, nothing more was announced."""
    first_pass_us: int | None = None
    beyond: tuple[int, int] | None = None
    """The last MIG_DATA_SIZE before the stop, and what it has beyond the PRECOPY_INFO that was asked for with it."""
    left_bytes: int = 0
    """What pre-copy had left to give when the guest was stopped, as far as it was told."""
    told_bytes: int | None = None
    """Its part of what query-migrate says was transferred."""
    stop_bytes: int = 0
    """By read()s after the guest was stopped."""
    stop_blocks: int = 0
    last_block_us: int | None = None
    save: Stretch | None = None
    """The drain of a stopped device on the main channel (vfio_save_complete_precopy)."""
    save_thread: Stretch | None = None
    """The same with multifd (vfio_save_complete_precopy_thread)."""
    sent_initial_us: list[int] = field(default_factory=list)
    # at the target
    pieces: list[Piece] = field(default_factory=list)
    """write()s of what came in pre-copy and after the stop: of each the block's time."""
    approved_us: list[int] = field(default_factory=list)
    load_thread: Stretch | None = None
    arrived: int = 0
    """Packets of multifd that came."""
    first_arrived_us: int | None = None
    last_arrived_us: int | None = None
    waiting_us: int = 0
    """Multifd: from `starved` to the next write()."""
    loaded_us: int | None = None
    """Multifd: all its data is written."""
    config: Stretch | None = None

    def to(self, *targets: str) -> Transition | None:
        """The last transition to one of these states that came about."""
        return next((each for each in reversed(self.transitions) if each.target in targets and each.ok), None)


def stops(device: DeviceFacts) -> list[Transition]:
    """What stopped it, in order: to P2P, to STOP or STOP_COPY."""
    last = device.to("STOP_COPY", "STOP")
    if last is None:
        return []
    final = next(each for each in device.transitions if each.target in ("STOP", "STOP_COPY") and each.ok)
    p2p = device.to("PRE_COPY_P2P", "RUNNING_P2P")
    return [each for each in (p2p, final) if each is not None and each.end_us <= final.end_us]


def starts(device: DeviceFacts) -> list[Transition]:
    """What started it at the target, in order. What comes when the guest runs is no part of it."""
    begin = device.to("RESUMING")
    after = device.transitions if begin is None else device.transitions[device.transitions.index(begin) + 1 :]
    end = next((at for at, each in enumerate(after, 1) if each.target == "RUNNING" and each.ok), len(after))
    return [each for each in after[:end] if each.target in ("STOP", "RUNNING_P2P", "RUNNING")]


@dataclass(slots=True)
class SideFacts:
    """One migration in one log."""

    side: str = ""
    """SOURCE or TARGET; empty: the log does not show it."""
    begin_us: int = 0
    """Of the first event."""
    end_us: int = 0
    set_back_us: int = 0
    """The most that an event is before the one in front of it."""
    begun: bool = False
    """The log has its beginning (new state setup)."""
    statuses: list[tuple[int, str]] = field(default_factory=list)
    """migrate_set_state: when, and the state."""
    marks: dict[str, int] = field(default_factory=dict)
    """vmstate_downtime_checkpoint: by its name, when."""
    moments: dict[str, int] = field(default_factory=dict)
    """Other single events: when."""
    stopped_us: int | None = None
    """When the vCPUs were told to stop for the hand-over (vm_state_notify)."""
    started_us: int | None = None
    """At the target: when the guest's state became running."""
    devices: dict[str, DeviceFacts] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    syncs: list[tuple[Stretch, int]] = field(default_factory=list)
    """RAM's bitmap syncs, each with the dirty pages of its period."""
    final_syncs: list[tuple[Stretch, int]] = field(default_factory=list)
    """Those after the guest was stopped."""
    first_pending_bytes: int | None = None
    """What was pending of RAM and devices' pre-copy when the iterations began."""
    first_device_pending_bytes: int = 0
    decided: tuple[int, int] | None = None
    """The last exact figure before the stop: when, and the bytes."""
    final_ram_bytes: int | None = None
    """Of RAM, what was left when the guest was stopped."""
    acks_us: list[int] = field(default_factory=list)
    ack_kind: str = "off"
    saves_us: dict[str, int] = field(default_factory=dict)
    """QEMU's own figures: by `ram` and `devices` (all others that are no VFIO device) their save, us."""
    loads_us: dict[str, int] = field(default_factory=dict)
    rp_sent: dict[int, list[int]] = field(default_factory=dict)
    """Target: messages on the return path, by type."""
    multifd: bool = False
    """Devices' stop-copy data went by multifd."""
    error: str = ""
    traced: bool = False
    """It has trace events; else there are QMP events only."""

    @property
    def status(self) -> str:
        """How it ended, as far as the log shows: completed, failed, cancelled, or the last state."""
        ends = [state for _, state in self.statuses if state in ("completed", "failed", "cancelled")]
        return ends[-1] if ends else self.statuses[-1][1] if self.statuses else ""
