# SPDX-License-Identifier: GPL-2.0-or-later
"""How a key of the model would be measured on a real machine, in a few words."""

from __future__ import annotations

import re

HOW = {
    r"firmware\.vf_engines": ("how many SAVEs of one VF run at once", "start 1, 2 and 4 SAVEs of one VF; time each"),
    r"firmware\.(save_|load_)?engines": (
        "how many commands of a PF run at once",
        "save 1, 2 and 4 VFs of a PF at once; time each SAVE by bpftrace (proto-v3 fit --how)",
    ),
    r"firmware\.save_.*": ("the time of a SAVE by its bytes", "bpftrace on the driver's SAVE (proto-v3 fit --how)"),
    r"firmware\.load_finish.*|driver\.finish_again_ms": (
        "the end of a device's load",
        "what its last write() takes more than the others (proto-v3 probe DEVICE --load-into)",
    ),
    r"firmware\.load_.*": ("the time of a LOAD by its bytes", "bpftrace on the driver's LOAD (proto-v3 fit --how)"),
    r"firmware\.state_command_.*|firmware\.quiesce_share|device\..*\.(suspend|quiesce)_ms": (
        "what suspend and quiesce take, and how it grows with the VFs",
        "stop 1, 2, 4, ... VFs of a PF; time both arcs of each (proto-v3 probe DEVICE)",
    ),
    r"firmware\.state_commands": (
        "how many VFs of a PF firmware stops at once",
        "suspend 1, 2 and 4 VFs of a PF from threads at once; time each",
    ),
    r"firmware\.service_cv": ("how much firmware's times vary", "time a hundred equal SAVEs (proto-v3 probe DEVICE)"),
    r"driver\.stop_copy_size": (
        "what MIG_DATA_SIZE is after pre-copy",
        "ask for it before and after the first image was read (proto-v3 probe DEVICE)",
    ),
    r"driver\.unread_context": (
        "whether an unread context is sent",
        "bytes read after the stop, against the size of a context (proto-v3 fit, of one migration)",
    ),
    r"driver\.precopy_image": (
        "how large an image in pre-copy is",
        "PRECOPY_INFO when pre-copy begins (proto-v3 probe DEVICE)",
    ),
    r"driver\.(lock|chunks)|device\..*\.block_kib": (
        "what the driver locks, and how far and in which grain it saves ahead",
        "its source; else read() by N threads (proto-v3 probe DEVICE)",
    ),
    r"vmm\.downtime_limit_ms": (
        "which downtime limit its users set",
        "query-migrate-parameters of QEMU (proto-v3 fit --cmdline)",
    ),
    r"driver\.call_us|host\.copy_gib_per_s": (
        "what a read() copies by the second",
        "read() of ready data by sizes (proto-v3 probe DEVICE --read-kib)",
    ),
    r"host\.spread_cv": ("how much a host's times vary", "twenty migrations of the same guest, their logs by fit"),
    r"host\.wake_up_us": ("how long a thread takes to wake up", "perf sched latency while a guest migrates"),
    r"link\..*|vmm\.bandwidth_gbit_per_s": (
        "what a connection carries",
        "iperf3 between the hosts, one connection and several",
    ),
    r"ram\..*": ("the rates of guest RAM", "QEMU's migration_bitmap_sync events (proto-v3 fit --how)"),
    r"device\..*\.state_mib|device\..*\.stop_only_mib": (
        "the device's state, and how much of it moves before the stop",
        "bytes read before and after the stop (proto-v3 fit, of one migration)",
    ),
    r"device\..*\.writes\..*": (
        "how fast a guest makes state dirty",
        "PRECOPY_INFO over time, with the guest's load (proto-v3 fit, of one migration)",
    ),
    r"device\..*\.reconfigurations\..*": (
        "how often a guest reconfigures the device",
        "count REINIT of PRECOPY_INFOv2, or the guest's own commands",
    ),
    r"device\..*\.critical\..*": (
        "what the target takes to set up critical objects",
        "bpftrace on the driver's LOAD of an image with few and with many queues",
    ),
    r"(device\..*|vmm)\.config_load.*|vmm\.other_load_ms": (
        "what loading the config takes",
        "vmstate_downtime_load of QEMU (proto-v3 fit --how)",
    ),
    r"device\..*\.vectors": ("how many vectors a VF has", "lspci -vv"),
    r"vmm\.vcpu_.*": ("what stopping the vCPUs takes", "vmstate_downtime_checkpoint of QEMU (proto-v3 fit --how)"),
    r"vmm\.multifd.*|vmm\.device_buffer.*": (
        "what QEMU's channels cost",
        "one migration by 2, 8 and 16 channels (proto-v3 fit, of each)",
    ),
}
"""By pattern of a key: what it is, and how to measure it. The first that fits counts."""


def what_it_is(key: str) -> str:
    """A key in words; without words for it, its name."""
    return _found(key)[0]


def how_to_measure(key: str) -> str:
    """How to find the value of a key on a machine."""
    return _found(key)[1]


def _found(key: str) -> tuple[str, str]:
    for pattern, words in HOW.items():
        if re.fullmatch(pattern, key):
            return words
    return key.rpartition(".")[2], "proto-v3 fit, of a migration; its source says what is known (proto-v3 scenarios)"
