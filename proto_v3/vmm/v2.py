# SPDX-License-Identifier: GPL-2.0-or-later
"""v2: the options of its users. The source is in `v2_precopy.py` and `v2_source.py`, the target in
`v2_target.py`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from proto_v3.vmm.multifd import Multifd


class Ack(enum.StrEnum):
    """Whether the target must have loaded the initial data before the guest is stopped (QEMU's switchover-ack)."""

    OFF = "off"
    ONE_SHOT = "one_shot"
    """Asked for once, when the initial bytes first reach 0; one answer for all devices. QEMU 8.1, and 11.1 with a
    machine type older than 11.1."""
    REUSABLE = "reusable"
    """Asked for anew after each REINIT, and checked once more during the switchover. QEMU 11.1 with a machine type of
    11.1 or newer."""


@dataclass(frozen=True, slots=True)
class V2Options:
    """The options of a user of v2."""

    reinit: bool = False  # opt in to PRECOPY_INFOv2
    ack: Ack = Ack.OFF
    polls: bool = False
    """Ask for PRECOPY_INFO in every round. Otherwise, like QEMU, only when the rest seems to fit."""
    multifd: Multifd | None = None
    max_retries: int = 0
    """With a reusable ack: how many times the guest may be resumed because a device needs an ack after it was decided
    to stop; 0 = never, the migration fails (QEMU 11.1). Not in QEMU: vfio_vmstate_change_prepare sees the REINIT,
    vfio_vmstate_change would leave the devices in P2P, and migration_completion_precopy start the VM again and return
    to migration_iteration_run."""
    precopy_threads: bool = False
    """Each device has a thread that reads it in pre-copy, beside RAM. Not in QEMU: it would take the place of
    vfio_save_iterate, with the loop of vfio_multifd_save_complete_precopy_thread; the target's load thread
    (vfio_load_bufs_thread) would run from set-up on."""
    early_save: bool = False
    """With multifd for device state: a device's save thread starts when that device is stopped, not when all are. Not
    in QEMU: vfio_vmstate_change would call multifd_spawn_device_state_save_thread, as
    qemu_savevm_state_complete_precopy_iterable does."""

    @property
    def channels(self) -> int:
        """Connections needed."""
        return 1 + (self.multifd.channels if self.multifd else 0)

    @property
    def devices_by_multifd(self) -> Multifd | None:
        """Multifd, if it carries the devices' stop-copy data."""
        return self.multifd if self.multifd and self.multifd.device_state else None
