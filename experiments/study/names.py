# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of the experiments, for lists, help and completion. It imports nothing."""

QUESTIONS = {
    "reconfiguration": "set-up in the downtime against the rate of reconfigurations",
    "read_scaling": "is read() the bottleneck, and when?",
    "kernel_read": "read() measured in a real kernel, beside its simulation",
    "state_and_dirty_rate": "what converges, from 64 MiB to 64 GiB",
    "switchover_hazard": "how often critical data comes too late, and what it costs",
    "channels": "dedicated connections, a pool, or one",
    "reorder_memory": "what waits at the target, and its bound",
    "buffer_and_chunk": "read sizes from 4 KiB to 128 MiB, chunks",
    "many_devices": "1 to 16 VFs on one PF and on several",
    "ablation": "from v2 to v3, one step at a time",
    "sensitivity": "which parameters the conclusions hang on",
}
"""Each with its question in a few words, in the order of the report."""
