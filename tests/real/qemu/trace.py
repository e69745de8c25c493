# SPDX-License-Identifier: GPL-2.0-or-later
"""What is traced of a migration of QEMU's, and which lines of its log are kept."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from tests.real.qemu.calls import ends_of_runs

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
