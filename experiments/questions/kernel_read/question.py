# SPDX-License-Identifier: GPL-2.0-or-later
"""What the measured and the simulated reads say: whether they scale alike, and of the claims C2 and C3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from experiments.questions.kernel_read import grid
from experiments.questions.kernel_read.grid import CASE, Measurement, ReadCase, case_of, medians
from experiments.runs.frame import COMPLETED, number
from experiments.study.claims import Finding, judge
from experiments.study.experiment import Answer
from sim.scenario.file import load
from sim.scenario.units import MIB, NS_PER_S

AIM = 0.1
"""The largest relative difference of a measured ratio from the simulated one, where firmware binds."""
NOTHING = 0.05
"""C3: more streams buy nothing if the best N is faster by less than this part. A measurement differs by a few per cent
from round to round."""
MLX5 = "mlx5-2vf"
"""The scenario whose firmware's rate a real read() is held against."""
NO_TABLE = (
    "No measurement is kept here (results/real/read of the project's clone): benchmarks/real_read.py makes one, and "
    "needs a kernel. What follows is simulated alone."
)


def answer(frame: pl.DataFrame) -> Answer:
    """Does read() scale in a real kernel as it does in the simulation?"""
    simulated = simulated_rates(frame)
    measurement = grid.measured()
    if measurement is None:
        return Answer(
            f"{NO_TABLE} {_simulated_alone(simulated)}",
            "Nothing here was measured.",
            table=simulated,
        )
    both = compared(measurement.runs, simulated)
    return Answer(
        f"{_how_alike(both)} {_is_it_the_bottleneck(both)}",
        _limit(measurement),
        [_made(measurement), *_copies(both), *_locks(both), *_calls(both), *_furthest(both)],
        [_c2(both), _c3(both)],
        both,
    )


# --- the tables -------------------------------------------------------------------------------------------------------


def simulated_rates(frame: pl.DataFrame) -> pl.DataFrame:
    """One row a case of the simulated reads: throughput, MiB/s and relative to one stream; reads; waiting for locks."""
    runs = frame.filter(COMPLETED)
    state_bytes = pl.when(pl.col("save_mib_s") > 0).then(grid.FIRMWARE_MIB).otherwise(grid.COPIES_MIB) * MIB
    rates = runs.select(
        *CASE,
        sim_mib_per_s=state_bytes * pl.col("devices") / MIB / (pl.col("phase_drain_ns") / NS_PER_S),
        sim_reads=pl.col("reads"),
        sim_lock_ns=pl.col("read_lock_ns"),
    )
    return grid.relative(rates, "sim_mib_per_s", "sim_ratio")


def compared(runs: pl.DataFrame, simulated: pl.DataFrame) -> pl.DataFrame:
    """One row a case that was measured and simulated: medians, their ratio to one stream, and the same simulated. `off`
    is how far the measured ratio is from the simulated one, as a part of that."""
    joined = medians(runs).join(simulated, on=CASE, how="inner", maintain_order="left")
    return joined.with_columns(off=pl.col("ratio") / pl.col("sim_ratio") - 1)


def firmware_binds() -> pl.Expr:
    """The rows where a command takes time."""
    return pl.col("save_mib_s") > 0


def of_case(table: pl.DataFrame, case: ReadCase) -> dict[str, Any] | None:
    """A case's row; None if the case is not in the table."""
    rows = table.filter(*(pl.col(name) == getattr(case, name) for name in CASE))
    return None if rows.is_empty() else rows.row(0, named=True)


def _one(table: pl.DataFrame, case: ReadCase, column: str) -> float | None:
    """A case's value in a column; None if it has none."""
    row = of_case(table, case)
    return None if row is None or row[column] is None else number(row[column])


# --- the answer -------------------------------------------------------------------------------------------------------


def _how_alike(both: pl.DataFrame) -> str:
    rows = both.filter(
        firmware_binds() & pl.col("off").is_not_null() & ((pl.col("kind") == "v2") | (pl.col("streams") > 1))
    )
    if rows.is_empty():
        return "No case where firmware binds was both measured and simulated."
    near = rows.filter(pl.col("off").abs() <= AIM).height
    spread = f"{100 * number(rows['off'].min()):+.0f} to {100 * number(rows['off'].max()):+.0f} %"
    return (
        f"Where firmware binds, read() in a real kernel scales with N as simulated: {near} of {rows.height} ratios to "
        f"one stream are within {100 * AIM:.0f} % ({spread})."
    )


def _is_it_the_bottleneck(both: pl.DataFrame) -> str:
    copies = _one(both, ReadCase(kind="v2", save_mib_s=0), "mib_per_s")
    locked = [
        rate
        for n in grid.STREAMS
        if (rate := _one(both, ReadCase(streams=n, lock="device", save_mib_s=0), "mib_per_s"))
    ]
    if copies is None or not locked:
        return "What read() copies without firmware was not measured."
    saves = load(MLX5).firmware.save_mib_per_s
    return (
        f"read() of one thread copies {copies:.0f} MiB/s, {copies / saves:.1f} times what one command of mlx5's "
        f"firmware saves ({saves:.0f} MiB/s, fitted): it is not the bottleneck for one stream. Under one lock held "
        f"over the copy ({min(locked):.0f} to {max(locked):.0f} MiB/s) it would be from {min(locked) / saves:.1f} to "
        f"{max(locked) / saves:.1f} commands at once on."
    )


def _simulated_alone(simulated: pl.DataFrame) -> str:
    best = simulated.filter(firmware_binds() & (pl.col("lock") == "fd"))["sim_ratio"].max()
    return f"With a lock an fd, the most that N streams read is {number(best):.1f} times one stream's."


def _made(measurement: Measurement) -> str:
    made = measurement.manifest
    guest, driver, load = made.get("guest", {}), made.get("driver", {}), made.get("host", {}).get("load_before", ["?"])
    rounds = measurement.runs["round"].n_unique()
    return (
        f"Measured with Linux {guest.get('release', '?')} ({guest.get('machine', '?')}, {guest.get('cpus', '?')} "
        f"CPUs), driver {driver.get('name', '?')}, {rounds} rounds, {made.get('made', '?')}, the machine's load before "
        f"{load[0]}; kept in {grid.MEASURED}."
    )


def _limit(measurement: Measurement) -> str:
    cpus = measurement.manifest.get("guest", {}).get("cpus", "?")
    return (
        f"A User-Mode Linux with {cpus} CPUs: locks, copies, wake-ups and the scheduler are real, firmware is a delay, "
        f"and a system call costs some ten times what it costs on a host; more than {cpus} threads that copy at once "
        "share these CPUs, so what N streams copy on more of them is not shown."
    )


def _copies(both: pl.DataFrame) -> Sequence[str]:
    """What N streams copy where firmware takes no time."""
    told = []
    for lock in ("fd", "device"):
        rates = [(n, _one(both, ReadCase(streams=n, lock=lock, save_mib_s=0), "mib_per_s")) for n in grid.STREAMS]
        sims = [(n, _one(both, ReadCase(streams=n, lock=lock, save_mib_s=0), "sim_ratio")) for n in grid.STREAMS]
        if all(rate for _, rate in rates):
            listed = ", ".join(f"{rate:.0f}" for _, rate in rates)
            foretold = ", ".join(f"{sim:.2f}" for _, sim in sims if sim)
            told.append(
                f"Without firmware, reads of 1 MiB, {ReadCase(lock=lock).where.split(',')[0]}: {listed} MiB/s with N = "
                f"{', '.join(str(n) for n in grid.STREAMS)} (simulated, relative to one: {foretold})."
            )
    return told


def _locks(both: pl.DataFrame) -> Sequence[str]:
    """Waiting for a lock that only read() takes, with the most streams."""
    most = max(grid.STREAMS)
    told = []
    for save in (grid.SAVE_MIB_PER_S, 0):
        case = ReadCase(streams=most, lock="device", save_mib_s=save)
        waited, reads = (_one(both, case, name) for name in ("lock_wait_ns", "reads"))
        simulated, sim_reads = (_one(both, case, name) for name in ("sim_lock_ns", "sim_reads"))
        if waited is not None and reads and simulated is not None and sim_reads:
            told.append(
                f"{case.where}, N = {most}: a read() waits {waited / reads / 1e3:.0f} us for the lock "
                f"(simulated {simulated / sim_reads / 1e3:.0f} us)."
            )
    return told


def _calls(both: pl.DataFrame) -> Sequence[str]:
    """System calls and context switches, against one stream's."""
    told = []
    for save, what in ((grid.SAVE_MIB_PER_S, "where firmware binds"), (0, "where copies bind")):
        counts = {}
        for n in (1, max(grid.STREAMS)):
            case = ReadCase(streams=n, save_mib_s=save)
            reads, voluntary, forced = (
                _one(both, case, name) for name in ("reads", "voluntary_switches", "involuntary_switches")
            )
            if reads is not None and voluntary is not None and forced is not None:
                counts[n] = f"N = {n}: {reads:.0f} read() calls, {voluntary:.0f} + {forced:.0f} context switches"
        if counts:
            told.append(f"System calls and context switches (voluntary + forced) {what}: {'; '.join(counts.values())}.")
    return told


def _furthest(both: pl.DataFrame) -> Sequence[str]:
    """Where firmware binds: the ratio that is furthest from the simulated one, and all that are beyond the aim."""
    rows = both.filter(firmware_binds() & pl.col("off").is_not_null()).sort(pl.col("off").abs(), descending=True)
    if rows.is_empty():
        return []
    row = rows.row(0, named=True)
    case = case_of(row)
    return [
        f"Furthest off where firmware binds: {case.where}, {_name(case)}: {row['ratio']:.2f} times one stream, "
        f"simulated {row['sim_ratio']:.2f}."
    ]


def _name(case: ReadCase) -> str:
    return "v2" if case.kind == "v2" else f"N = {case.streams}"


# --- claims -----------------------------------------------------------------------------------------------------------


def _c2(both: pl.DataFrame) -> Finding:
    """The measured speed-up against min(N, F), where firmware binds and each fd has a lock of its own."""
    off = {}
    for row in both.filter(firmware_binds() & (pl.col("streams") > 1)).iter_rows(named=True):
        case = case_of(row)
        if case.lock == "fd" and case.engines > 1:
            off[case] = row["ratio"] / min(case.streams, case.engines)
    if not off:
        return Finding("C2", "under conditions", "No case with a lock an fd and several engines was measured.")
    near = sum(abs(part - 1) <= AIM for part in off.values())
    case = max(off, key=lambda each: abs(off[each] - 1))
    return Finding(
        "C2",
        judge(supported=near == len(off), refuted=near <= len(off) / 2),
        f"Measured in a real kernel, with a delay for firmware: the speed-up of N streams over one is within "
        f"{100 * AIM:.0f} % of min(N, F) in {near} of {len(off)} cases; furthest off: "
        f"{off[case] * min(case.streams, case.engines):.2f} of {min(case.streams, case.engines)} ({case.where}, "
        f"{_name(case)}). That commands of one device run at once is assumed; what is shown is that read(), its locks "
        "and wake-ups do not stand in their way.",
    )


def _c3(both: pl.DataFrame) -> Finding:
    """What the best N gains with one engine, and under one lock over the command or over the copy."""
    groups = {
        "with one engine": [ReadCase(lock=lock, engines=1) for lock in ("fd", "device")],
        "under one lock over the command": [ReadCase(lock="device", lock_over="command")],
        "under one lock over the copy alone, 8 engines": [ReadCase(lock="device")],
    }
    gains = {what: [gain for each in some if (gain := _gain(both, each)) is not None] for what, some in groups.items()}
    gains = {what: some for what, some in gains.items() if some}
    if not gains:
        return Finding("C3", "under conditions", "No case with one engine or one lock was measured.")
    nothing = [max(some) < NOTHING for some in gains.values()]
    listed = "; ".join(f"{what}, {100 * max(some):.0f} %" for what, some in gains.items())
    return Finding(
        "C3",
        judge(supported=all(nothing), refuted=not any(nothing)),
        f"Measured in a real kernel: the best N is faster than one stream by: {listed}; less than "
        f"{100 * NOTHING:.0f} % counts as nothing.",
    )


def _gain(both: pl.DataFrame, case: ReadCase) -> float | None:
    """By which part the best N is faster than one stream; None if it was not measured."""
    ratios = [
        ratio
        for n in grid.STREAMS
        if n > 1 and (ratio := _one(both, ReadCase("v3", n, case.lock, case.lock_over, case.engines), "ratio"))
    ]
    return max(ratios) - 1 if ratios else None
