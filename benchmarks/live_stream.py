# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a stream goes from a device's fd to the target's device, beside a bare relay with as many processes.

The relay is the least that moves bytes along the same path: four processes, a UNIX socket pair, TCP over loopback, a
UNIX socket pair, `recv_into` and `sendall` of one read's size in a loop. The live run is a migration whose device is
unpaced, all of whose state moves after the stop: v2's one stream, and v3 with N = 1 and 4. Both move as many bytes,
with reads and sockets of the same size, in turn, in one run of this script; what counts is the ratio. v2's buffer at
the target is so large that no payload is cut at its end: the relay writes what it has in one call, too.

    python benchmarks/live_stream.py [--rounds 5] [--mib 1024] [--io loop|threads] [--read-mib 1,4]
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from proto_v3.timeline import Mark, Resource
from proto_v3.vmm.migration import OutcomeKind
from sim.live.fd.copy import data_fd
from sim.live.processes.settings import Settings
from sim.live.result import LiveResult
from sim.live.run import run_here
from sim.live.tcp.sockets import SocketSettings, listen
from sim.scenario.file import parse
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.units import MIB

ROOM = 8 * MIB
"""In a data fd, of the relay's as of the live run's: driver.chunk_mib."""
PROTOCOLS = ("v2", "v3-n1", "v3-n4")
AIM = 0.95
"""Of the relay, with reads of 4 MiB."""

UNPACED = """
name = "unpaced"
description = "A device that is as fast as memory, all of whose state moves after the stop"
extends = "mlx5"
[ram]
size_gib = 0.001
nonzero_gib = 0.001
dirty_mib_per_s = 0.0
working_set_mib = 1.0
sync_ms = 0.0
final_sync_ms = 0.0
[[device]]
name = "device"
state_mib = {mib}.0
stop_only_mib = {mib}.0
block_kib = 64
suspend_ms = 0.0
quiesce_ms = 0.0
config_load_ms = 0.0
[firmware]
engines = 256.0
save_mib_per_s = 1e9
save_command_us = 0.0
load_mib_per_s = 1e9
load_command_us = 0.0
load_finish_ms = 0.0
service_cv = 0.0
[driver]
chunk_mib = 8
lock = "none"
[host]
copy_gib_per_s = 1e6
memory_gib_per_s = 1e6
[link]
gbit_per_s = 10000.0
per_connection_gbit_per_s = 10000.0
socket_buffer_mib = {socket_mib}.0
[vmm]
read_mib = {read_mib}.0
write_kib = 1048576
setup_ms = 0.0
vcpu_stop_ms = 0.0
vcpu_start_ms = 0.0
other_load_ms = 0.0
device_buffer_gib_per_s = 1e9
bandwidth_gbit_per_s = 10000.0
downtime_limit_ms = 100000.0
"""


def scenario(mib: int, read_mib: int) -> Scenario:
    """The unpaced device."""
    sizes = {"socket_mib": 4 * read_mib, "read_mib": read_mib}
    return parse(UNPACED.format(mib=mib, **sizes), "unpaced")


# --- the relay --------------------------------------------------------------------------------------------------------


def memory(total: int) -> memoryview:
    """As a live device's: there before the first byte moves, in huge pages."""
    made = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(made)
    np.frombuffer(view, np.uint8).fill(1)
    return view


def source(out: socket.socket, total: int, piece: int, ready: Any, go: Any, cpu_s: Any) -> None:
    state = memory(total)
    ready.release()
    go.wait()
    began_s = time.process_time()
    for at in range(0, total, piece):
        out.sendall(state[at : at + piece])
    with cpu_s.get_lock():
        cpu_s.value += time.process_time() - began_s
    out.shutdown(socket.SHUT_WR)


def relay_to_tcp(into: socket.socket, address: tuple[str, int], piece: int, ready: Any, cpu_s: Any) -> None:
    out = socket.create_connection(address)
    SocketSettings(buffer_bytes=2 * piece).apply(out)
    ready.release()
    relay(into, out, piece, cpu_s)


def relay_from_tcp(listener: socket.socket, out: socket.socket, piece: int, ready: Any, cpu_s: Any) -> None:
    into, _ = listener.accept()
    SocketSettings(buffer_bytes=2 * piece).apply(into)
    ready.release()
    relay(into, out, piece, cpu_s)


def relay(into: socket.socket, out: socket.socket, piece: int, cpu_s: Any) -> None:
    buffer = memoryview(bytearray(piece))
    began_s = time.process_time()
    while got := into.recv_into(buffer):
        out.sendall(buffer[:got])
    with cpu_s.get_lock():
        cpu_s.value += time.process_time() - began_s
    out.shutdown(socket.SHUT_WR)


def sink(into: socket.socket, total: int, piece: int, ready: Any, took_s: Any, began_s: Any, cpu_s: Any) -> None:
    state = memory(total)
    ready.release()
    at = 0
    cpu_began_s = time.process_time()
    while got := into.recv_into(state[at : at + piece]):
        at += got
    took_s.value = time.perf_counter() - began_s.value
    with cpu_s.get_lock():
        cpu_s.value += time.process_time() - cpu_began_s
    assert at == total


def bare_relay(mib: int, read_mib: int) -> tuple[float, float]:
    """MiB/s, and the CPU time of all four processes in microseconds a MiB."""
    context = multiprocessing.get_context("fork")
    total, piece = mib * MIB, read_mib * MIB
    device_out, vmm_in = data_fd(ROOM)
    vmm_out, device_in = data_fd(ROOM)
    listener = listen(("127.0.0.1", 0))
    ready, go = context.Semaphore(0), context.Event()
    took_s, began_s, cpu_s = (context.Value("d", 0.0) for _ in range(3))
    parts: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (source, (device_out, total, piece, ready, go, cpu_s)),
        (relay_to_tcp, (vmm_in, listener.getsockname(), piece, ready, cpu_s)),
        (relay_from_tcp, (listener, vmm_out, piece, ready, cpu_s)),
        (sink, (device_in, total, piece, ready, took_s, began_s, cpu_s)),
    ]
    processes = [context.Process(target=main, args=given) for main, given in parts]
    for process in processes:
        process.start()
    for end in (device_out, vmm_in, vmm_out, device_in, listener):
        end.close()
    for _ in processes:
        ready.acquire()
    began_s.value = time.perf_counter()
    go.set()
    for process in processes:
        process.join()
    return mib / took_s.value, cpu_s.value / mib * 1e6


# --- the live run -----------------------------------------------------------------------------------------------------


def live(mib: int, read_mib: int, protocol: str, io: str) -> tuple[float, float, LiveResult]:
    """MiB/s from STOP_COPY to the last byte loaded, CPU time in microseconds a MiB, and the run."""
    what = scenario(mib, read_mib)
    result = asyncio.run(run_here(what, Protocol.parse(protocol, what), 1, Settings(io=io)))
    if result.timeline is None or result.outcome.kind is not OutcomeKind.COMPLETED:
        raise SystemExit(f"{protocol}: {result.outcome.kind}, {result.outcome.reason}")
    marks = result.timeline.marks
    rate = mib * 1e9 / (marks[Mark.LOADED] - marks[Mark.STOPPED])
    return rate, sum(result.cpu_ns.values()) / 1e3 / mib, result


def where_it_goes(result: LiveResult) -> str:
    """Of the time from the stop to the last byte loaded, by what the critical path says; the rest has no name there."""
    assert result.timeline is not None
    begin, end = result.timeline.marks[Mark.STOPPED], result.timeline.marks[Mark.LOADED]
    parts: dict[str, int] = {}
    for step in result.timeline.critical_path():
        inside = min(step.end_ns, end) - max(step.start_ns, begin)
        if inside > 0:
            name = step.what if step.resource is Resource.COPY else step.resource.name.lower()
            parts[name] = parts.get(name, 0) + inside
    parts["loop and scheduler"] = end - begin - sum(parts.values())
    most = sorted(parts.items(), key=lambda item: -item[1])[:5]
    return ", ".join(f"{name} {100 * part / (end - begin):.0f} %" for name, part in most)


def in_turn(mib: int, read_mib: int, io: str, rounds: int) -> None:
    """Run the relay and the protocols in turn, and print what came out."""
    rates: dict[str, list[float]] = {}
    cpu_us: dict[str, list[float]] = {}
    last: dict[str, LiveResult] = {}
    for _ in range(rounds):
        for name in ("relay", *PROTOCOLS):
            if name == "relay":
                rate, took_us = bare_relay(mib, read_mib)
            else:
                rate, took_us, last[name] = live(mib, read_mib, name, io)
            rates.setdefault(name, []).append(rate)
            cpu_us.setdefault(name, []).append(took_us)
    print(f"{mib} MiB in reads of {read_mib} MiB, io {io}, medians of {rounds} rounds; aim: {AIM} with 4 MiB")
    print("        MiB/s  of the relay  least to most MiB/s  CPU us a MiB")
    for name, of_name in rates.items():
        ratio = statistics.median(a / b for a, b in zip(of_name, rates["relay"], strict=True))
        spread = f"{min(of_name):.0f} to {max(of_name):.0f}"
        cpu = statistics.median(cpu_us[name])
        print(f"{name:6} {statistics.median(of_name):6.0f}  {ratio:12.2f}  {spread:>19}  {cpu:12.0f}")
    for name, result in last.items():
        each = ", ".join(
            f"{process} {(cpu_ns - user_ns) / 1e3 / mib:.0f} + {user_ns / 1e3 / mib:.0f}"
            for (process, cpu_ns), user_ns in zip(result.cpu_ns.items(), result.user_ns.values(), strict=True)
        )
        print(f"{name}: CPU us a MiB, kernel + interpreter: {each}; critical path: {where_it_goes(result)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--io", choices=["loop", "threads"], default="loop")
    parser.add_argument("--read-mib", default="1,4")
    chosen = parser.parse_args()
    for read_mib in chosen.read_mib.split(","):
        in_turn(chosen.mib, int(read_mib), chosen.io, chosen.rounds)


if __name__ == "__main__":
    main()
