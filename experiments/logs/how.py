# SPDX-License-Identifier: GPL-2.0-or-later
"""How to get the logs that `proto-v3 fit` reads: the text of `proto-v3 fit --how`."""

from __future__ import annotations

from experiments.logs.driver import FUNCTIONS, SAVE, SAVED

PATTERNS = (
    "vfio_migration_*",
    "vfio_query_*",
    "vfio_save_*",
    "vfio_load_*",
    "vfio_send_*",
    "vfio_state_pending*",
    "vfio_vmstate_*",
    "vmstate_downtime_*",
    "vm_state_notify",
    "migration_bitmap_sync_*",
    "migration_thread_low_pending",
    "migrate_set_state",
    "migrate_error",
    "migrate_transferred",
    "migrate_pending_*",
    "migrate_send_rp_message",
    "qemu_savevm_query_pending",
    "savevm_send_switchover_start",
    "source_return_path_thread_*",
    "loadvm_approve_*",
    "loadvm_process_command",
)
"""What is traced, at both ends. One that a version of QEMU does not have costs a warning."""
TOO_MANY = ("migration_transferred_bytes", "savevm_section_*", "multifd_*")
"""Events that come too often to be logged; they slow the migration down."""


def how() -> str:
    """The text."""
    traced = " \\\n".join(f"    -trace {pattern!r}" for pattern in PATTERNS)
    return f"""\
What `proto-v3 fit SOURCE.log TARGET.log` needs: the logs of one migration that completed, of both ends.

1. QEMU's trace events (10.0 or newer, with the log backend, as distributions build it). Add to both command lines:

    -msg timestamp=on -D /tmp/qemu-SIDE.log \\
{traced}

   With libvirt: the same in <qemu:commandline> of the domain; the events are then in /var/log/libvirt/qemu/DOMAIN.log.
   In a running QEMU: `trace-event NAME on` in the monitor (HMP), for each of them; -msg must have been given before.
   Not: {", ".join(TOO_MANY)}.
   The capability return-path (and switchover-ack, if you use it) lets the two hosts' clocks be set against each other.

2. Without trace events: VFIO_MIGRATION events over QMP. -device vfio-pci,...,migration-events=on at both ends, the
   capability `events`, and all that the monitor sends, one JSON object a line, into a file for each end; or
   `virsh qemu-monitor-event --loop > SIDE.log`. These tell stops and resumes; no sizes, no rates.

3. Sharper: what the driver's functions take, SAVE and LOAD by themselves (--driver FILE, a file for
   each host). The first line says what the wall clock shows, so that calls of other times are left out; without it all
   calls in the file count. Of what is migrated at the same time nothing is left out: no other VF meanwhile.

    python3 -c 'import time; print("clock", time.monotonic_ns(), time.time_ns())' > driver.txt
    bpftrace -e '{bpftrace()}' >> driver.txt

   or the function_graph tracer:

    cd /sys/kernel/tracing; echo mono > trace_clock; echo {" ".join(FUNCTIONS)} {SAVED} > set_ftrace_filter
    echo funcgraph-abstime > trace_options; echo function_graph > current_tracer; cat trace_pipe >> driver.txt

   or kprobes:

    echo mono > /sys/kernel/tracing/trace_clock; for f in {" ".join(FUNCTIONS)} {SAVED}; do
        echo "p:in_$f $f" >> /sys/kernel/tracing/kprobe_events; echo "r:out_$f $f" >> /sys/kernel/tracing/kprobe_events
    done; echo 1 > /sys/kernel/tracing/events/kprobes/enable; cat /sys/kernel/tracing/trace_pipe >> driver.txt

4. What QEMU was told (--cmdline, may be repeated): its arguments, as in `tr '\\0' ' ' < /proc/PID/cmdline`, or a file
   with them; and what query-migrate-parameters and query-migrate return, as JSON.

Nothing of it is kept but numbers: devices are called vf0, vf1 (--rename NAME,NAME calls them otherwise).
"""


def bpftrace() -> str:
    """A program that prints a line for each call: the function, the thread, its begin and end in ns."""
    waited = [function for function, kind in FUNCTIONS.items() if kind != SAVE]
    both = " ".join(
        f"kprobe:{function} {{ @{function}[tid] = nsecs; }} kretprobe:{function} /@{function}[tid]/ "
        f'{{ printf("{function} %d %lld %lld\\n", tid, @{function}[tid], nsecs); delete(@{function}[tid]); }}'
        for function in waited
    )
    (save,) = [function for function, kind in FUNCTIONS.items() if kind == SAVE]
    once = " ".join(
        f'kprobe:{function} {{ printf("{function} %d %lld %lld\\n", tid, nsecs, nsecs); }}'
        for function in (save, SAVED)
    )
    return f"{both} {once}"
