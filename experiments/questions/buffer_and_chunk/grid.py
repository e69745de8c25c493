"""The grid of buffer_and_chunk: sizes of reads and of chunks, what binds, and how large the state is."""

from __future__ import annotations

import polars as pl

from experiments.study.experiment import Point

BASE = "stop-only"
PROTOCOLS = ("v2", "v2-multifd", "v3-n1", "v3-n4")
LARGEST_KIB = 128 * 1024
SMALL_KIB = tuple(4 << i for i in range(6))
"""4 to 128 KiB, of a state of 16 MiB: a read is at most a 32nd of what one of four streams carries, or else the last
one, which overlaps with nothing, would cost more than a doubling saves."""
LARGE_KIB = tuple(128 << i for i in range(11))
"""128 KiB to 128 MiB, of a state of 512 MiB."""
QUICK_SMALL_KIB = (16, 64)
QUICK_LARGE_KIB = (256, 1024, 2048, 16384)
QEMU_KIB = 1024
CHUNK_MIB = (1, 2, 4, 8, 16, 32, 64)
CHUNKS = (1, 2, 4)
QUICK_CHUNK_MIB = (1, 8)
QUICK_CHUNKS = (1, 2)
MLX5_CHUNK_MIB, MLX5_CHUNKS = 8, 2
ENGINES = "firmware.engines=4"
"""As many as the most streams that are looked at."""
REGIMES = {
    "SAVE": (),
    "read": (
        "firmware.save_mib_per_s=20000",
        "firmware.save_command_us=0",
        "firmware.load_mib_per_s=40000",
        "firmware.load_command_us=0",
    ),
    "calls": (
        "firmware.save_mib_per_s=20000",
        "firmware.save_command_us=0",
        "firmware.load_mib_per_s=40000",
        "firmware.load_command_us=0",
        "driver.call_us=10",
    ),
}
"""What binds: the firmware, as mlx5's; read(), with a firmware that is several times as fast as a copy; and read()
again where a call costs ten times as much. The last is there because call_us is assumed, and the answer hangs on it."""
TOLD = {"SAVE": "SAVE binds", "read": "read() binds", "calls": "read() binds, 10 us a call"}
STATES = {
    "small": ("device.0.state_mib=16", "device.0.stop_only_mib=16", "driver.chunk_mib=1", "vmm.downtime_limit_ms=13.6"),
    "large": (),
}
"""The limit is what the given bandwidth needs for the state, as in the base: so RAM is moved before the stop."""
ROOM_MIB = LARGEST_KIB // 1024
ROOM = (
    "firmware.load_finish_ms=0",
    "ram.final_sync_ms=0",
    f"link.socket_buffer_mib={ROOM_MIB}",
    f"v3.critical_credit_mib={ROOM_MIB}",
    f"v3.dirty_credit_mib={ROOM_MIB}",
)
"""Sockets hold one read of any size, and are the same for all; nothing that no size changes is left in the time."""
MOVED = (pl.col("phase_drain_ns") + pl.col("phase_transfer_ns") + pl.col("phase_load_ns")).alias("moved_ns")
COUNTS = ("reads", "wakeups", "messages")


def points(quick: bool) -> list[Point]:
    """Read sizes in every regime; chunk sizes and counts where reads are of 1 MiB."""
    regimes = ("SAVE", "read") if quick else tuple(REGIMES)
    small, large = (QUICK_SMALL_KIB, QUICK_LARGE_KIB) if quick else (SMALL_KIB, LARGE_KIB)
    told = [
        _point("read", protocol, regime, state, size, MLX5_CHUNK_MIB if state == "large" else 1, MLX5_CHUNKS)
        for regime in regimes
        for state, sizes in (("small", small), ("large", large))
        for size in sizes
        for protocol in PROTOCOLS
    ]
    shapes = [(size, MLX5_CHUNKS) for size in (QUICK_CHUNK_MIB if quick else CHUNK_MIB)]
    shapes += [(MLX5_CHUNK_MIB, count) for count in (QUICK_CHUNKS if quick else CHUNKS) if count != MLX5_CHUNKS]
    return told + [
        _point("chunk", protocol, regime, "large", QEMU_KIB, size, count)
        for regime in ("SAVE", "read")
        for size, count in shapes
        for protocol in PROTOCOLS
    ]


def _point(sweep: str, protocol: str, regime: str, state: str, read_kib: int, chunk_mib: int, chunks: int) -> Point:
    settings = [ENGINES, *ROOM, *REGIMES[regime], *STATES[state], f"vmm.read_mib={read_kib / 1024:g}"]
    settings = [each for each in settings if not each.startswith("driver.chunk_mib")]
    settings += [f"driver.chunk_mib={chunk_mib}", f"driver.chunks={chunks}"]
    factors: dict[str, str | int | float | bool] = {
        "sweep": sweep,
        "regime": regime,
        "state": state,
        "read_kib": read_kib,
        "chunk_mib": chunk_mib,
        "chunks": chunks,
    }
    return Point(BASE, protocol, tuple(settings), factors)


def size_told(kib: int) -> str:
    """In words."""
    return f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"
