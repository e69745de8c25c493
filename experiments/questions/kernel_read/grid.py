# SPDX-License-Identifier: GPL-2.0-or-later
"""The cases of kernel_read, as the driver's parameters and as a scenario; and the table that was measured of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from experiments.runs import frame as tables
from experiments.runs.folder import MANIFEST, read_manifest
from experiments.runs.manifest import clone
from experiments.study.experiment import Point, under
from sim.scenario.units import GIB, KIB, MIB, NS_PER_S

BASE = "stop-only"
MEASURED = Path("results/real/read")
"""Where benchmarks/real_read.py keeps its table, in the project's clone."""
STREAMS = (1, 2, 4, 8)
ENGINES = (1, 2, 4, 8)
READ_KIB = (64, 256, 1024, 4096)
SAVE_MIB_PER_S = 50
"""Of one engine, where firmware binds: so slow that a copy, and being woken late, are little beside a command."""
FIRMWARE_MIB, COPIES_MIB = 64, 256
"""The state, where firmware binds and where copies do: at least two commands a stream, at least some 50 ms."""
NO_FIRMWARE_MIB_PER_S = 1_000_000
"""A rate at which a command takes no time to speak of."""


@dataclass(frozen=True, slots=True)
class ReadCase:
    """What was measured: a setting of the driver, and how it is read."""

    kind: str = "v3"
    """`v2` or `v3`."""
    streams: int = 1
    """Dirty streams of a device, each with a thread that reads it; 1 under v2, whose one stream has all."""
    lock: str = "fd"
    """A lock for each `fd`, for each `device`, or one for all (`global`)."""
    lock_over: str = "copy"
    """What read() holds it over: the `copy` alone, or the firmware's `command` too."""
    engines: int = 8
    """Commands that run at once."""
    read_kib: int = 1024
    """The buffer of a read()."""
    save_mib_s: int = SAVE_MIB_PER_S
    """The rate of one command; 0: it takes no time."""
    devices: int = 1
    """Read at the same time."""

    @property
    def state_mib(self) -> int:
        """Of each device."""
        return FIRMWARE_MIB if self.save_mib_s else COPIES_MIB

    @property
    def where(self) -> str:
        """The setting without kind and N, in words."""
        lock = {"fd": "a lock an fd", "device": "one lock a device", "global": "one lock for all"}[self.lock]
        over = f", held over the {self.lock_over}" if self.lock != "fd" else ""
        firmware = f"{self.engines} engine{'' if self.engines == 1 else 's'}" if self.save_mib_s else "no firmware"
        several = f", {self.devices} devices" if self.devices > 1 else ""
        return f"{lock}{over}, {firmware}, reads of {self.read_kib} KiB{several}"


CASE = tuple(field.name for field in fields(ReadCase))


def case_of(row: dict[str, Any]) -> ReadCase:
    """The case that a row of either table is of."""
    return ReadCase(**{name: row[name] for name in CASE})


def with_streams(settings: Iterable[ReadCase]) -> list[ReadCase]:
    """Each setting under v3 with each N; and under v2, but for several devices: its VMM reads one after the other."""
    found = []
    for each in settings:
        found += [replace(each, kind="v2")] if each.devices == 1 else []
        found += [replace(each, streams=n) for n in STREAMS]
    return found


def cases(quick: bool) -> list[ReadCase]:
    """Lock x engines x N where firmware binds; lock x read size x N where copies do; two devices and one lock. Quick:
    those with N = 1 and 4, with the fewest and the most engines, and with two sizes of read()."""
    locks = (("fd", "copy"), ("device", "copy"))
    settings = [ReadCase(lock=lock, lock_over=over, engines=engines) for lock, over in locks for engines in ENGINES]
    settings += [ReadCase(lock="device", lock_over="command"), ReadCase(lock="global", lock_over="command")]
    settings += [ReadCase(lock=lock, lock_over=over, read_kib=64) for lock, over in locks]
    settings += [ReadCase(lock=lock, lock_over="command", devices=2) for lock in ("device", "global")]
    settings += [ReadCase(lock=lock, read_kib=size, save_mib_s=0) for lock in ("fd", "device") for size in READ_KIB]
    settings += [ReadCase(lock=lock, save_mib_s=0, devices=2) for lock in ("fd", "device", "global")]
    found = with_streams(settings)
    if quick:
        found = [each for each in found if each.streams in (1, 4) and each.engines in (1, 8)]
        found = [each for each in found if each.read_kib in (64, 1024)]
    return found


# --- what was measured ------------------------------------------------------------------------------------------------


class Measurement(NamedTuple):
    """What benchmarks/real_read.py left."""

    runs: pl.DataFrame
    """One row a case and round: the fields of ReadCase, `round`, and what was counted."""
    manifest: dict[str, Any]


def measured() -> Measurement | None:
    """The measurement that is kept, or None if there is none here. UserError if it is damaged."""
    for root in (clone(), Path()):
        if root is not None and (root / MEASURED / "runs.parquet").exists():
            folder = root / MEASURED
            return Measurement(tables.read(folder / "runs.parquet"), read_manifest(folder / MANIFEST))
    return None


def medians(runs: pl.DataFrame) -> pl.DataFrame:
    """One row a case: medians over the rounds, and of throughput and ratio the least and the greatest, too.

    `ratio`: the throughput over that of one dirty stream with the same setting, in the same round.
    """
    others = [name for name in runs.columns if name not in (*CASE, "round")]
    with_rate = runs.with_columns(mib_per_s=pl.col("bytes") / MIB / (pl.col("elapsed_ns") / NS_PER_S))
    each = relative(with_rate, "mib_per_s", "ratio", within=("round",))
    return each.group_by(CASE, maintain_order=True).agg(
        *(pl.col(name).median() for name in (*others, "mib_per_s", "ratio")),
        *(pl.col(name).min().alias(f"least_{name}") for name in ("mib_per_s", "ratio")),
        *(pl.col(name).max().alias(f"most_{name}") for name in ("mib_per_s", "ratio")),
        rounds=pl.len(),
    )


def relative(rates: pl.DataFrame, rate: str, ratio: str, within: Sequence[str] = ()) -> pl.DataFrame:
    """With the ratio of each rate to that of one dirty stream with the same setting, and the same values in the columns
    `within`; null where there is none."""
    setting = [*(name for name in CASE if name not in ("kind", "streams")), *within]
    one = rates.filter(kind="v3", streams=1).select(*setting, one_stream=rate)
    joined = rates.join(one, on=setting, how="left", maintain_order="left")
    return joined.with_columns((pl.col(rate) / pl.col("one_stream")).alias(ratio)).drop("one_stream")


# --- the same, simulated ----------------------------------------------------------------------------------------------


class CopyCost(NamedTuple):
    """What the simulator has to be told of the machine: the rest of a case is the driver's parameters."""

    copy_gib_per_s: float = 3.0
    """What one thread copies."""
    call_us: float = 10.0
    """A read() beside its bytes."""
    cpus: int = 2

    @classmethod
    def of(cls, measurement: Measurement | None) -> CopyCost:
        """From v2's reads without firmware: two sizes of read() tell the cost of the call from that of the bytes. The
        default if there are none."""
        if measurement is None:
            return cls()
        alone = medians(measurement.runs.filter(kind="v2", lock="fd", save_mib_s=0, devices=1))
        per_read = {
            size: elapsed_ns / calls
            for size, elapsed_ns, calls in alone.select("read_kib", "elapsed_ns", "reads").iter_rows()
        }
        small, large = READ_KIB[0], READ_KIB[2]
        if small not in per_read or large not in per_read or per_read[large] <= per_read[small]:
            return cls()
        ns_per_byte = (per_read[large] - per_read[small]) / ((large - small) * KIB)
        call_ns = max(0.0, per_read[small] - small * KIB * ns_per_byte)
        cpus = measurement.manifest.get("guest", {}).get("cpus", cls().cpus)
        return cls(float(f"{NS_PER_S / ns_per_byte / GIB:.3g}"), float(f"{call_ns / 1000:.3g}"), cpus)


def settings(case: ReadCase, cost: CopyCost) -> tuple[str, ...]:
    """The case as settings of BASE, KEY=VALUE each: a device that is stopped and read, with nothing to wait for after
    read(). sim.real.sample_parameters makes the driver's parameters of the same scenario.

    Where copies bind, a command takes no time, and there are chunks for all of the state: it is saved before read().
    """
    chunk_mib, chunks = (1, 2) if case.save_mib_s else (4, 64)
    return (
        *under("ram", size_gib=0.0625, nonzero_gib=0.0001, final_sync_ms=0),
        'device.0.features=["STOP_COPY", "P2P"]',
        f"device.0.count={case.devices}",
        *(f"device.0.{key}={case.state_mib}" for key in ("state_mib", "stop_only_mib")),
        *(f"device.0.{key}=0" for key in ("suspend_ms", "quiesce_ms", "config_load_ms")),
        "device.0.block_kib=16",
        f"firmware.engines={case.engines * case.devices}",  # of a PF, whose devices share them
        f"firmware.save_mib_per_s={case.save_mib_s or NO_FIRMWARE_MIB_PER_S}",
        *under("firmware", save_command_us=0, load_command_us=0, load_mib_per_s=NO_FIRMWARE_MIB_PER_S),
        *under("firmware", load_finish_ms=0, service_cv=0),
        *under("driver", lock="per_fd" if case.lock == "fd" else case.lock, lock_over=case.lock_over),
        *under("driver", chunk_mib=chunk_mib, chunks=chunks, call_us=cost.call_us),
        f"host.copy_gib_per_s={cost.copy_gib_per_s:g}",
        f"host.memory_gib_per_s={cost.copy_gib_per_s * cost.cpus:g}",
        *under("link", gbit_per_s=1e6, per_connection_gbit_per_s=1e6, round_trip_us=0, socket_buffer_mib=4096),
        *under("vmm", read_mib=case.read_kib / 1024, write_kib=1 << 20, device_buffer_gib_per_s=1e6),
    )


def points(quick: bool) -> list[Point]:
    """All cases, each simulated once."""
    cost = CopyCost.of(measured())
    return [
        Point(BASE, "v2" if case.kind == "v2" else f"v3-n{case.streams}", settings(case, cost), asdict(case))
        for case in cases(quick)
    ]
