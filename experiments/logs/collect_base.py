# SPDX-License-Identifier: GPL-2.0-or-later
"""Events, one by one, into the facts of each migration that a log has. What a log of any length leaves is small: of
what repeats, sums and ends are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from experiments.logs.events import QMP, TraceEvent
from experiments.logs.facts import SOURCE, TARGET, DeviceFacts, SideFacts, Transition

VMSTATE = re.compile(r"type=(\S+) idstr=(\S+) instance_id=-?\d+ downtime=(\d+)")
ASKED = re.compile(r"new state (\w+)")
GIVEN = re.compile(r"\) state (\w+)")
STATES = {
    "stop": "STOP",
    "running": "RUNNING",
    "stop-copy": "STOP_COPY",
    "resuming": "RESUMING",
    "running-p2p": "RUNNING_P2P",
    "pre-copy": "PRE_COPY",
    "pre-copy-p2p": "PRE_COPY_P2P",
}
"""A device's state as QMP has it, and as the kernel."""
MULTIFD = re.compile(r"vfio_(save_complete_precopy_thread|load_state_device_buffer|load_bufs_thread)_")
ENDS = ("completed", "failed", "cancelled")
"""After one of these states, what the devices do is no part of the migration."""


class BaseCollector:
    """Takes the events of one log in their order. `migrations` has what they say, one entry a migration.

    A method `_on_EVENT` takes the events of that name.
    """

    def __init__(self) -> None:
        self.migrations: list[SideFacts] = []
        self._before = SideFacts()
        """Of the time before the first migration: what the devices have."""
        self._now = self._before
        self._ended = False
        self._asked: dict[str, tuple[int, str]] = {}
        self._states: dict[str, str] = {}
        self._sync_us: int | None = None
        self._loading: dict[str, int] = {}
        self._config: dict[str, int] = {}
        self._starved: dict[str, int] = {}
        self._threads: dict[str, int] = {}
        self._saving: dict[str, int] = {}
        self._load_threads: dict[str, int] = {}
        self._last_qmp = 0, ""
        """The last step of a device that QMP told: when it ended, and the state."""
        self._dirty: dict[str, int] = {}
        """By device: since when what became dirty is not reported yet."""
        self._unread: dict[str, int] = {}
        """By device: bytes that it reported, and that were not read since."""
        self._take: dict[str, Callable[[TraceEvent], None]] = {
            name.removeprefix("_on_"): getattr(self, name) for name in dir(self) if name.startswith("_on_")
        }

    def take(self, events: Iterable[TraceEvent]) -> list[SideFacts]:
        """All of them; returns the migrations."""
        for event in events:
            take = self._take.get(event.name.replace(":", "_"))
            if take is not None:
                back_us = self._now.end_us - event.time_us
                take(event)
                self._now.set_back_us = max(self._now.set_back_us, back_us)
                self._now.end_us = event.time_us
                self._now.begin_us = self._now.begin_us or event.time_us
                self._now.multifd |= MULTIFD.match(event.name) is not None
                self._now.traced |= not event.name.startswith(QMP)
        if not self.migrations:  # the beginning is cut off
            self.migrations.append(self._before)
        return self.migrations

    def _begin(self) -> None:
        """A migration begins."""
        self._now, self._ended = SideFacts(begun=True), False
        for name, device in self._before.devices.items():
            self._now.devices[name] = DeviceFacts(name, device.flags, device.info_v2)
        self.migrations.append(self._now)
        for kept in (
            *(self._asked, self._loading, self._config, self._starved, self._threads, self._saving),
            *(self._load_threads, self._dirty, self._unread, self._states),
        ):
            kept.clear()

    def _device(self, event: TraceEvent) -> DeviceFacts:
        name = event.device
        return self._now.devices.setdefault(name, DeviceFacts(name))

    @property
    def _stopped(self) -> bool:
        """The guest was told to stop for the hand-over."""
        return "src-downtime-start" in self._now.marks or self._now.stopped_us is not None

    # --- both sides ---------------------------------------------------------------------------------------------------

    def _on_migrate_set_state(self, event: TraceEvent) -> None:
        state = event.args.removeprefix("new state ")
        self._status(event.time_us, state)

    def _status(self, at_us: int, state: str) -> None:
        if state == "setup":
            self._begin()
        self._now.statuses.append((at_us, state))
        self._ended |= state in ENDS

    def _on_migrate_error(self, event: TraceEvent) -> None:
        self._now.error = self._now.error or event.args.removeprefix("error=")

    def _on_vmstate_downtime_checkpoint(self, event: TraceEvent) -> None:
        self._now.marks[event.args] = event.time_us
        self._now.side = SOURCE if event.args.startswith("src-") else TARGET

    def _on_vm_state_notify(self, event: TraceEvent) -> None:
        if event.value("running") == 0 and "finish-migrate" in event.args:
            self._now.stopped_us = event.time_us
            self._now.side = SOURCE
        elif event.value("running") == 1 and self._now.side == TARGET and not self._ended:
            self._now.started_us = event.time_us

    def _on_vfio_migration_init(self, event: TraceEvent) -> None:
        device = self._device(event)
        if found := re.search(r"mig_flags 0x([0-9a-f]+)", event.args):
            device.flags = int(found[1], 16)
        device.info_v2 = event.value("precopy_info_v2_used") == 1
        kept = self._before.devices.setdefault(device.name, DeviceFacts(device.name))  # a new process may have others
        kept.flags, kept.info_v2 = device.flags, device.info_v2

    def _on_vfio_migration_realize(self, event: TraceEvent) -> None:
        self._device(event)

    def _on_vfio_migration_set_state(self, event: TraceEvent) -> None:
        if found := ASKED.search(event.args):
            self._asked[event.device] = event.time_us, found[1]

    def _on_vfio_migration_set_device_state(self, event: TraceEvent) -> None:
        found, device = GIVEN.search(event.args), self._device(event)
        if found is None:
            return
        begin_us, asked = self._asked.pop(event.device, (None, found[1]))
        self._moved(device, Transition("", asked, begin_us, event.time_us, asked == found[1]), found[1])

    def _moved(self, device: DeviceFacts, moved: Transition, state: str) -> None:
        current = self._states.get(device.name, "")
        self._states[device.name] = state
        if self._ended:
            return
        if current != state or not moved.ok:  # SET_STATE to the state that it has is no ioctl
            device.transitions.append(moved._replace(current=current))
        if moved.target == "RESUMING":
            self._now.side = TARGET
        elif moved.target in ("PRE_COPY", "STOP_COPY"):
            self._now.side = SOURCE

    def _on_vfio_vmstate_change(self, event: TraceEvent) -> None:
        if not self._ended:
            self._now.moments["last vmstate change"] = event.time_us

    def _vmstate(self, event: TraceEvent, times_us: dict[str, int]) -> None:
        if found := VMSTATE.match(event.args):
            vfio, us = found[2].endswith("/vfio"), int(found[3])
            if found[1] == "iterable" and found[2] == "ram":
                times_us["ram"] = us
                self._now.moments["RAM done"] = event.time_us
            elif found[1] == "non-iterable" and not vfio:
                times_us["devices"] = times_us.get("devices", 0) + us
