# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of protocols: every suffix that one may have, what it sets, and what that means.

Help, completion, `proto-v3 protocols` and the parser all read this table. It imports nothing, so that help and
completion are fast.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Changes = dict[str, dict[str, Any]]  # table, key, value
MAX_STREAMS = 64


@dataclass(frozen=True, slots=True)
class Suffix:
    """A suffix: the settings that it replaces, and what that means, in words."""

    changes: Changes
    what: str


CHUNKS = range(2, 17)
_CHUNKS = {
    f"chunks{n}": Suffix({"driver": {"chunks": n}}, f"the driver has {n} chunks a stream, so it saves so far ahead")
    for n in CHUNKS
}
_IN_CHUNKS = {"driver": {"precopy_image": "chunks", "initial": "critical"}}
_REINIT = "the VMM opts in to PRECOPY_INFOv2; on new critical data the driver "
_OF_THE_VMM: dict[str, Suffix] = {
    "parallel-stop": Suffix(
        {"vmm": {"parallel_stop": True, "parallel_config": True}},
        "all devices change their states at once when the guest is stopped, and their configs are loaded at once",
    ),
    "whole": Suffix(
        {"vmm": {"stop_rule": "whole"}}, "the guest is stopped when all that is left fits together (what v2 does)"
    ),
    "parts": Suffix(
        {"vmm": {"stop_rule": "parts"}},
        "the guest is stopped when RAM and each device's data also fit by themselves, and the first pass over each "
        "device is loaded (what v3 does)",
    ),
}
V2_SUFFIXES: dict[str, Suffix] = {
    "multifd": Suffix(
        {"vmm": {"multifd": True, "multifd_device_state": True}},
        "RAM and stop-copy data of the devices take connections of their own (QEMU 10.0)",
    ),
    "single": Suffix({"vmm": {"multifd_device_state": False}}, "all device data stays on the main connection"),
    "threads": Suffix(
        {"vmm": {"precopy_threads": True}},
        "a thread a device reads it before the stop, beside RAM; with multifd it sends on those channels",
    ),
    "early": Suffix(
        {"vmm": {"early_save": True}},
        "the save thread of each device starts when that device is stopped, not when all are; needs multifd",
    ),
    "reinit-flush": Suffix(
        {"vmm": {"reinit": True}, "driver": {"reinit": "flush"}},
        f"{_REINIT}counts unread bytes as initial, and the new ones follow (mlx5)",
    ),
    "reinit-invalidate": Suffix(
        {"vmm": {"reinit": True}, "driver": {"reinit": "invalidate"}},
        f"{_REINIT}drops unread dirty bytes, which are dirty again",
    ),
    "priority": Suffix(
        {"vmm": {"reinit": True}, "driver": {"reinit": "priority"}},
        f"{_REINIT}saves it at once, and gives it before dirty records of which nothing was read",
    ),
    "no-reinit": Suffix({"vmm": {"reinit": False}}, "the VMM does not opt in to PRECOPY_INFOv2"),
    "ack-reusable": Suffix(
        {"vmm": {"switchover_ack": "reusable"}},
        "the target must have loaded initial data before the stop, after a REINIT again (QEMU 11.1 with a "
        "machine type of 11.1 or newer); needs REINIT",
    ),
    "retry": Suffix(
        {"vmm": {"late_reinit": "retry"}},
        "if a REINIT comes after the order to stop, the guest is resumed, and stopped again later; needs -ack-reusable",
    ),
    "no-ack": Suffix({"vmm": {"switchover_ack": "off"}}, "the source does not wait for the target before the stop"),
    "ack": Suffix(
        {"vmm": {"switchover_ack": "one_shot"}},
        "the target must have loaded the first initial data before the stop (QEMU 8.1, or an older machine type)",
    ),
    "polls": Suffix({"vmm": {"precopy_user": "polls"}}, "the VMM asks for PRECOPY_INFO in every round"),
    "deduces": Suffix(
        {"vmm": {"precopy_user": "deduces"}},
        "the VMM asks for PRECOPY_INFO only when the remaining bytes seem to fit (QEMU)",
    ),
    "critical-first": Suffix(
        _IN_CHUNKS,
        "before the stop, too, the driver saves in chunks, critical records before dirty ones; only these are initial",
    ),
    **_OF_THE_VMM,
    **_CHUNKS,
}
V3_SUFFIXES: dict[str, Suffix] = {
    **{
        f"n{n}": Suffix({"v3": {"dirty_streams": n}}, f"{n} dirty streams a device, or threads that read its blocks")
        for n in range(1, MAX_STREAMS + 1)
    },
    "multifd": Suffix(
        {"vmm": {"multifd": True}}, "RAM takes vmm.multifd_channels connections of its own, as with v2-multifd"
    ),
    "blocks": Suffix(
        {"v3": {"blocks": True}}, "one fd of addressable blocks, which N threads read, in place of streams"
    ),
    "streams": Suffix({"v3": {"wire": "streams"}}, "each stream has a connection of its own"),
    "pool": Suffix({"v3": {"wire": "pool"}}, "all streams share v3.pool_connections connections"),
    "one": Suffix({"v3": {"wire": "one"}}, "everything takes one connection"),
    "keep": Suffix({"driver": {"epochs": "keep"}}, "a new epoch of critical data leaves earlier dirty data valid"),
    "invalidate": Suffix({"driver": {"epochs": "invalidate"}}, "a new epoch makes earlier dirty data invalid"),
    "retry": Suffix(
        {"v3": {"late_epoch": "retry"}},
        "if an epoch comes after the stop, the guest is resumed, and stopped again later",
    ),
    "proceed": Suffix(
        {"v3": {"late_epoch": "proceed"}}, "if an epoch comes after the stop, its data is loaded in the downtime"
    ),
    "critical-first": Suffix(
        _IN_CHUNKS,
        "before the stop, too, the driver saves in chunks; critical records have a stream of their own anyway",
    ),
    **_OF_THE_VMM,
    **_CHUNKS,
}
SUFFIXES = {"v2": V2_SUFFIXES, "v3": V3_SUFFIXES}
"""What may follow a protocol's name. If one begins like another, the longer one stands first."""
NUMBERED = re.compile(r"(n|chunks)(\d+)")
"""The suffixes that give a number, which lists show as one."""


def listed(version: str) -> dict[str, str]:
    """By the suffixes of a version, how a list shows them; of those that give a number, the first stands for all."""
    shown: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in SUFFIXES[version]:
        number = NUMBERED.fullmatch(name)
        of_kind = first.setdefault(number[1], name) if number else name
        shown[of_kind] = f"-{name}" if of_kind == name else f"-{of_kind} to -{name}"
    return shown


def in_words(version: str) -> str:
    """The suffixes of a version; those that give a number as one."""
    return ", ".join(listed(version).values())


HELP = f"v2, with any of {in_words('v2')}; v3, with any of {in_words('v3')}"
