# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's trace log (log backend), in both forms that it has had.

QEMU 10: `pid@seconds.microseconds:event arguments`, with -msg timestamp=on. QEMU 11.1: an ISO 8601 time, a blank, the
event. Other lines, such as warnings, are left out.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.real.qemu.calls import ends_of_runs

OLD = re.compile(r"\d+@(?P<time>\d+\.\d{6}):(?P<name>[a-z]\w+)(?: (?P<args>.*))?")
NEW = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6})Z (?P<name>[a-z]\w+)(?: (?P<args>.*))?")

PATTERNS = (
    "vfio_migration_*",
    "vfio_query_*",
    "vfio_save_*",
    "vfio_load_*",
    "vfio_send_*",
    "vfio_state_pending*",
    "vfio_vmstate_*",
    "vmstate_downtime_checkpoint*",
    "vm_state_notify*",
    "migrate_set_state*",
    "migrate_error*",
    "migrate_transferred*",
    "migrate_pending_*",
    "migration_thread_low_pending*",
    "migration_cancel*",
    "loadvm_approve_*",
    "savevm_send_switchover_start*",
    "qemu_savevm_query_pending*",
    "source_return_path_thread_*",
)
"""What is traced: the migration's decisions, and what is done to the devices. A name that ends in a star may be of an
event that a version lacks."""


REPEATED = re.compile(r"(?:Z |:)(vfio_load_state|vfio_load_state_device_data|vfio_save_iterate|vfio_save_block)\b")
"""Events of each read or write of the data, or of each round."""
IDLE = re.compile(
    r"(?:Z |:)(vfio_save_iterate|vfio_save_block_precopy_empty_hit|vfio_state_pending\w*|vfio_query_\w+"
    r"|migrate_pending_\w+|migrate_transferred|qemu_savevm_query_pending)\b(?!.*reinit 1)"
)
"""Events of a loop that waits."""


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One event."""

    time_us: int
    name: str
    args: str

    def value(self, key: str) -> int | None:
        """A number in the arguments: `exact=1` or `exact 1`. None if it is not there."""
        found = re.search(rf"\b{re.escape(key)}[= ](-?\d+)", self.args)
        return int(found[1]) if found else None


def parse(lines: Iterable[str]) -> list[TraceEvent]:
    """The events in these lines."""
    events = []
    for line in lines:
        if found := NEW.fullmatch(line.rstrip()):
            at = datetime.datetime.fromisoformat(found["time"]).replace(tzinfo=datetime.UTC)
            time_us = int(at.timestamp()) * 1_000_000 + at.microsecond
        elif found := OLD.fullmatch(line.rstrip()):
            seconds, _, micros = found["time"].partition(".")
            time_us = int(seconds) * 1_000_000 + int(micros)
        else:
            continue
        events.append(TraceEvent(time_us, found["name"], (found["args"] or "").strip()))
    return events


def thinned(lines: Iterable[str]) -> list[str]:
    """The lines without most of those of REPEATED and of IDLE.

    Where events of REPEATED follow each other, the first and the last of each name stay. Of a long run of IDLE ones,
    both ends stay.
    """
    kept: list[str] = []
    for repeated, run in itertools.groupby(lines, lambda line: REPEATED.search(line) is not None):
        part = list(run)
        kept += _ends(part) if repeated else part
    return ends_of_runs(kept, lambda line: IDLE.search(line) is not None)


def _ends(lines: list[str]) -> list[str]:
    names = [found[1] if (found := REPEATED.search(line)) else "" for line in lines]
    last = {name: index for index, name in enumerate(names)}
    return [line for index, line in enumerate(lines) if index in (names.index(names[index]), last[names[index]])]


def named(events: Sequence[TraceEvent], *names: str) -> list[TraceEvent]:
    """The events of these names."""
    return [event for event in events if event.name in names]
