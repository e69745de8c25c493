# SPDX-License-Identifier: GPL-2.0-or-later
"""What the simulation costs: runs and events a second, memory, how both grow, and whether it is as fast as aimed at.

Each place is measured in a process of its own, for its peak memory, places in turn over the rounds, and medians are
told, with ratios to the first place of each series: they hang on the machine far less than the times do. An event is
a callback that the virtual clock runs. The aims are for two idle cores.

A paired comparison is two runs with the same seed, v2 and v3-n4, of one device of 1 GiB (`GIB` in revisions.py), by
the pool of two workers that sweeps use: what it does beside the simulation counts. Screened runs are as in
sim/scenario/screening.py.

    python benchmarks/simulation.py [--rounds 3]
    python benchmarks/simulation.py --large      # 64 GiB to 1 TiB, once: some minutes
    python benchmarks/simulation.py --commands   # decide, run all --quick and run all: half an hour
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.revisions import GIB, PROTOCOLS
from experiments.runs.pool import Cell, in_processes
from proto_v3.vmm.migration import OutcomeKind
from sim.clock.virtual import VirtualLoop
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.screening import screened

MB = 1_000_000
AIMED_S, AIMED_MB = 5.0, 120
"""For a device of 64 GiB."""
AIMED_PAIRS_PER_S = {"whole": 15.0, "screened": 40.0}
PAIRS = 60
WORKERS = 2
COMMANDS: dict[str, tuple[list[str], float]] = {
    "decide, 256 samples": (["decide", "szmigiero-4vf", "--samples", "256"], 60.0),
    "run all --quick": (["run", "all", "--quick"], 40.0),
    "run all": (["run", "all"], 720.0),
}
"""With the seconds that they may take."""
SMALL_RAM = ["ram.size_gib=2", "ram.nonzero_gib=0.25", "ram.working_set_mib=64"]


@dataclass(frozen=True, slots=True)
class Place:
    """A scenario with settings under a protocol, run so many times in one process."""

    series: str
    label: str
    base: str
    settings: list[str]
    protocol: str
    runs: int = 1


def places(*, large: bool = False) -> list[Place]:
    """All that is measured; with `large`, the largest states alone."""
    nic = [*SMALL_RAM, "device.0.critical.setup_us=200"]
    big = [
        *SMALL_RAM,
        "device.0.count=1",
        "device.0.block_kib=1024",
        "vmm.give_up_s=600",
        "vmm.downtime_limit_ms=60000",
        "vmm.bandwidth_gbit_per_s=25",  # else an idle guest leaves no bandwidth to measure, and v3 never stops it
    ]
    if large:
        return [
            Place(f"state, {name}", f"{gib} GiB", "mlx5-2vf", [*big, f"device.0.state_mib={gib * 1024}"], name)
            for name in PROTOCOLS
            for gib in (64, 256, 1024)
        ]
    vfs = [*SMALL_RAM, "device.0.state_mib=64", "vmm.downtime_limit_ms=60000"]
    return [
        *[Place("protocol", name, "nic-reconfig", nic, name, 5) for name in ("v2", "v2-multifd", "v3-n4", "v3-blocks")],
        *[Place("N", f"v3-n{n}", "nic-reconfig", nic, f"v3-n{n}", 5) for n in (1, 2, 4, 8, 16)],
        *[
            Place(f"state, {name}", f"{gib} GiB", "mlx5-2vf", [*big, f"device.0.state_mib={gib * 1024}"], name)
            for name in ("v2", "v3-n4")
            for gib in (1, 4, 16, 64)
        ],
        *[
            Place(f"VFs, {name}", str(vfs_of_pf), "mlx5-2vf", [*vfs, f"device.0.count={vfs_of_pf}"], name)
            for name in PROTOCOLS
            for vfs_of_pf in (1, 4, 16, 64)
        ],
        *[Place("sweep", f"{runs} runs", "nic-reconfig", nic, "v3-n4", runs) for runs in (5, 20, 80)],
    ]


def measured(place: Place) -> dict[str, float]:
    """In this process: seconds, events, peak memory in bytes."""
    scenario = load(place.base, place.settings)
    protocol = Protocol.parse(place.protocol, scenario)
    before = time.perf_counter()
    for seed in range(place.runs):
        if (outcome := simulate(scenario, protocol, seed)).kind is not OutcomeKind.COMPLETED:
            raise SystemExit(f"{place.series}, {place.label}: {outcome.kind.value}: {outcome.reason}")
    took_s = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"s": took_s, "events": _events(place), "peak_bytes": peak}


def _events(place: Place) -> int:
    """Of one run, counted in a run of its own, for counting takes time."""
    count = 0
    soon, at = VirtualLoop.call_soon, VirtualLoop._call_at

    def counted_soon(*given: object, **named: object) -> object:
        nonlocal count
        count += 1
        return soon(*given, **named)  # type: ignore[arg-type]

    def counted_at(*given: object, **named: object) -> object:
        nonlocal count
        count += 1
        return at(*given, **named)  # type: ignore[arg-type]

    VirtualLoop.call_soon, VirtualLoop._call_at = counted_soon, counted_at  # type: ignore[assignment,method-assign]
    try:
        scenario = load(place.base, place.settings)
        simulate(scenario, Protocol.parse(place.protocol, scenario), 0)
    finally:
        VirtualLoop.call_soon, VirtualLoop._call_at = soon, at  # type: ignore[method-assign]
    return count


def in_a_process(at: int, *, large: bool) -> dict[str, float]:
    """Measured by this script, run for that place alone."""
    command = [sys.executable, __file__, "--place", str(at), *(["--large"] if large else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def pairs_per_s(*, coarse: bool) -> float:
    """Paired comparisons a second, all of the pool's work included."""
    whole = load("mlx5-2vf", GIB)
    scenario = screened(whole) if coarse else whole
    protocols = [Protocol.parse(name, scenario) for name in PROTOCOLS]
    cells = [Cell(scenario, protocol, seed) for seed in range(PAIRS) for protocol in protocols]
    before = time.perf_counter()
    for _ in in_processes(cells, WORKERS):
        pass
    return PAIRS / (time.perf_counter() - before)


def command_s(command: Sequence[str]) -> float:
    """What a command takes."""
    with tempfile.TemporaryDirectory() as out:
        before = time.perf_counter()
        call = [sys.executable, "-m", "experiments", *command, "--jobs", str(WORKERS), "--out", out, "--quiet"]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - before


def tell(what: str, is_so: str, aim: str, *, met: bool) -> None:
    """One line of what was aimed at."""
    print(f"{what:46} {is_so:>14}   aim: {aim:12} {'met' if met else 'NOT met'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="the largest states alone, once")
    parser.add_argument("--commands", action="store_true", help="the commands alone, once")
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.place is not None:
        print(json.dumps(measured(places(large=chosen.large)[chosen.place])))
    elif chosen.commands:
        for what, (command, aimed_s) in COMMANDS.items():
            took_s = command_s(command)
            tell(what, f"{took_s:.0f} s", f"{aimed_s:.0f} s", met=took_s <= aimed_s)
    else:
        growth(1 if chosen.large else chosen.rounds, large=chosen.large)
        if not chosen.large:
            for name, aimed in AIMED_PAIRS_PER_S.items():
                per_s = statistics.median(pairs_per_s(coarse=name == "screened") for _ in range(chosen.rounds))
                what = f"paired comparisons of 1 GiB a second, {name}"
                tell(what, f"{per_s:.1f}", f"{aimed:.0f}", met=per_s >= aimed)


def growth(count: int, *, large: bool) -> None:
    """Measure all places `count` times, and print the table."""
    measured_places = places(large=large)
    told: list[list[dict[str, float]]] = [[] for _ in measured_places]
    for _ in range(count):
        for at in range(len(told)):
            told[at].append(in_a_process(at, large=large))
    print(f"medians of {count} rounds; ratios are to the first place of a series")
    print(
        f"{'series':14} {'place':12} {'runs/s':>8} {'events a run':>13} {'events/s':>10} {'s ratio':>8} {'peak MB':>8}"
    )
    first: dict[str, float] = {}
    aimed: dict[str, tuple[float, float]] = {}
    for place, rounds in zip(measured_places, told, strict=True):
        each_s = statistics.median(one["s"] for one in rounds) / place.runs
        peak_mb = statistics.median(one["peak_bytes"] for one in rounds) / MB
        events = rounds[0]["events"]
        ratio = each_s / first.setdefault(place.series, each_s)
        print(
            f"{place.series:14} {place.label:12} {1 / each_s:8.2f} {events:13.0f} {events / each_s:10.0f} {ratio:8.2f}"
            f" {peak_mb:8.0f}"
        )
        if place.label == "64 GiB":
            aimed[place.protocol] = (each_s, peak_mb)
    for protocol, (each_s, peak_mb) in aimed.items():
        met = each_s <= AIMED_S and peak_mb <= AIMED_MB
        tell(f"64 GiB, {protocol}", f"{each_s:.1f} s, {peak_mb:.0f} MB", f"{AIMED_S:.0f} s, {AIMED_MB} MB", met=met)


if __name__ == "__main__":
    main()
