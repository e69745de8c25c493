# SPDX-License-Identifier: GPL-2.0-or-later
"""What the simulation costs: runs and events a second, memory, and how both grow with N, state and sweep.

Each place is measured in a process of its own, for its peak memory, places in turn over the rounds, and medians are
told, with ratios to the first place of each series: they hang on the machine far less than the times do. An event is
a callback that the virtual clock runs.

    python benchmarks/simulation.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from sim.clock.virtual import VirtualLoop
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol

MB = 1_000_000
ALLOWED_MB = 300
"""For a device of 64 GiB."""
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


def places() -> list[Place]:
    """All that is measured."""
    nic = [*SMALL_RAM, "device.0.critical.setup_us=200"]
    big = [
        *SMALL_RAM,
        "device.0.count=1",
        "device.0.block_kib=1024",
        "vmm.give_up_s=600",
        "vmm.downtime_limit_ms=60000",
    ]
    return [
        *[Place("protocol", name, "nic-reconfig", nic, name, 5) for name in ("v2", "v2-multifd", "v3-n4", "v3-blocks")],
        *[Place("N", f"v3-n{n}", "nic-reconfig", nic, f"v3-n{n}", 5) for n in (1, 2, 4, 8, 16)],
        *[
            Place(f"state, {name}", f"{gib} GiB", "mlx5-2vf", [*big, f"device.0.state_mib={gib * 1024}"], name)
            for name in ("v2", "v3-n4")
            for gib in (1, 4, 16, 64)
        ],
        *[Place("sweep", f"{runs} runs", "nic-reconfig", nic, "v3-n4", runs) for runs in (5, 20, 80)],
    ]


def measured(place: Place) -> dict[str, float]:
    """In this process: seconds, events, peak memory in bytes."""
    scenario = load(place.base, place.settings)
    protocol = Protocol.parse(place.protocol, scenario)
    before = time.perf_counter()
    for seed in range(place.runs):
        simulate(scenario, protocol, seed)
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


def in_a_process(at: int) -> dict[str, float]:
    """Measured by this script, run for that place alone."""
    done = subprocess.run([sys.executable, __file__, "--place", str(at)], check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.place is not None:
        print(json.dumps(measured(places()[chosen.place])))
        return
    told: list[list[dict[str, float]]] = [[] for _ in places()]
    for _ in range(chosen.rounds):
        for at in range(len(told)):
            told[at].append(in_a_process(at))
    print(f"medians of {chosen.rounds} rounds; ratios are to the first place of a series")
    print(
        f"{'series':14} {'place':12} {'runs/s':>8} {'events a run':>13} {'events/s':>10} {'s ratio':>8} {'peak MB':>8}"
    )
    first: dict[str, float] = {}
    for place, rounds in zip(places(), told, strict=True):
        each_s = statistics.median(one["s"] for one in rounds) / place.runs
        peak_mb = statistics.median(one["peak_bytes"] for one in rounds) / MB
        events = rounds[0]["events"]
        ratio = each_s / first.setdefault(place.series, each_s)
        print(
            f"{place.series:14} {place.label:12} {1 / each_s:8.2f} {events:13.0f} {events / each_s:10.0f} {ratio:8.2f}"
            f" {peak_mb:8.0f}"
        )
        if place.label == "64 GiB":
            met = "within" if peak_mb <= ALLOWED_MB else "NOT within"
            print(f"{'':27} 64 GiB of state: {met} the {ALLOWED_MB} MB that are allowed")


if __name__ == "__main__":
    main()
