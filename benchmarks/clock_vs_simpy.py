# SPDX-License-Identifier: GPL-2.0-or-later
"""Events per second of the virtual clock beside SimPy 4.1, measured in one run on the same two workloads.

timeouts: 100 processes, each waiting 10,000 times. One event is one wait that came due.
queue:    50 pairs; the producer waits, then puts into a queue that holds 8; the consumer gets, then waits. One event
          is one wait that came due, one put or one get: four a round.

Every variant counts its own events as they happen, and the counts must agree with each other and with the workload's
size. The variants take turns within a round, so that a slow spell of the machine falls on all of them, and the medians
over the rounds are compared.

    python benchmarks/clock_vs_simpy.py --rounds 5 --scale 1.0
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import simpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sim.clock.port import sleep_ns
from sim.clock.virtual import run

PROCESSES, PAIRS, CAPACITY = 100, 50, 8
NS = 1_000_000_000


def delay(process: int, step: int) -> int:
    """Nanoseconds that `process` waits at `step`: spread out, with some of the deadlines equal."""
    return 100 + (process * 7 + step * 13) % 101


def simpy_timeouts(steps: int) -> int:
    env = simpy.Environment()
    events = 0

    def process(number: int) -> Generator[Any, Any, None]:
        nonlocal events
        for step in range(steps):
            yield env.timeout(delay(number, step))
            events += 1

    for number in range(PROCESSES):
        env.process(process(number))
    env.run()
    return events


def simpy_queue(steps: int) -> int:
    env = simpy.Environment()
    events = 0

    def producer(number: int, store: simpy.Store) -> Generator[Any, Any, None]:
        nonlocal events
        for step in range(steps):
            yield env.timeout(delay(number, step))
            yield store.put(step)
            events += 2

    def consumer(number: int, store: simpy.Store) -> Generator[Any, Any, None]:
        nonlocal events
        for step in range(steps):
            yield store.get()
            yield env.timeout(delay(number + PAIRS, step))
            events += 2

    for number in range(PAIRS):
        store = simpy.Store(env, capacity=CAPACITY)
        env.process(producer(number, store))
        env.process(consumer(number, store))
    env.run()
    return events


def clock_timeouts(steps: int, *, exact: bool) -> int:
    events = 0

    async def process_exact(number: int) -> None:
        nonlocal events
        for step in range(steps):
            await sleep_ns(delay(number, step))
            events += 1

    async def process_asyncio(number: int) -> None:
        nonlocal events
        for step in range(steps):
            await asyncio.sleep(delay(number, step) / NS)
            events += 1

    async def main() -> None:
        process = process_exact if exact else process_asyncio
        async with asyncio.TaskGroup() as group:
            for number in range(PROCESSES):
                group.create_task(process(number))

    run(main())
    return events


def clock_queue(steps: int, *, exact: bool) -> int:
    events = 0

    async def producer_exact(number: int, queue: asyncio.Queue[int]) -> None:
        nonlocal events
        for step in range(steps):
            await sleep_ns(delay(number, step))
            await queue.put(step)
            events += 2

    async def consumer_exact(number: int, queue: asyncio.Queue[int]) -> None:
        nonlocal events
        for step in range(steps):
            await queue.get()
            await sleep_ns(delay(number + PAIRS, step))
            events += 2

    async def producer_asyncio(number: int, queue: asyncio.Queue[int]) -> None:
        nonlocal events
        for step in range(steps):
            await asyncio.sleep(delay(number, step) / NS)
            await queue.put(step)
            events += 2

    async def consumer_asyncio(number: int, queue: asyncio.Queue[int]) -> None:
        nonlocal events
        for step in range(steps):
            await queue.get()
            await asyncio.sleep(delay(number + PAIRS, step) / NS)
            events += 2

    async def main() -> None:
        producer, consumer = (producer_exact, consumer_exact) if exact else (producer_asyncio, consumer_asyncio)
        async with asyncio.TaskGroup() as group:
            for number in range(PAIRS):
                queue: asyncio.Queue[int] = asyncio.Queue(CAPACITY)
                group.create_task(producer(number, queue))
                group.create_task(consumer(number, queue))

    run(main())
    return events


Variant = Callable[[int], int]
WORKLOADS: dict[str, tuple[int, int, dict[str, Variant]]] = {
    # name: (steps of each process at scale 1, events of each step over all processes, variants with SimPy first)
    "timeouts": (
        10_000,
        PROCESSES,
        {
            "SimPy": simpy_timeouts,
            "sleep_ns": lambda steps: clock_timeouts(steps, exact=True),
            "asyncio.sleep": lambda steps: clock_timeouts(steps, exact=False),
        },
    ),
    "queue": (
        2_000,
        PAIRS * 4,
        {
            "SimPy": simpy_queue,
            "sleep_ns": lambda steps: clock_queue(steps, exact=True),
            "asyncio.sleep": lambda steps: clock_queue(steps, exact=False),
        },
    ),
}


def rate(variant: Variant, steps: int, expected: int) -> float:
    """Events per second of one go at a workload; a count that is off ends the benchmark."""
    gc.collect()
    start = time.perf_counter()
    events = variant(steps)
    seconds = time.perf_counter() - start
    if events != expected:
        raise SystemExit(f"counted {events} events instead of {expected}: the rates cannot be compared")
    return events / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Events per second of the virtual clock beside SimPy.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant runs (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the workloads (default 1.0)")
    options = parser.parse_args()
    if options.rounds < 1 or options.scale <= 0:
        parser.error("--rounds must be at least 1 and --scale above 0")

    print(f"Python {platform.python_version()}, SimPy {simpy.__version__}, medians of {options.rounds} rounds")
    print(f"{'workload':<10}{'variant':<15}{'events':>10}{'events/s':>12}{'x SimPy':>9}")
    for workload, (full_steps, events_a_step, variants) in WORKLOADS.items():
        steps = max(1, round(full_steps * options.scale))
        expected = steps * events_a_step
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.rounds):
            for name, variant in variants.items():
                rates[name].append(rate(variant, steps, expected))
        medians = {name: statistics.median(samples) for name, samples in rates.items()}
        for name, median in medians.items():
            ratio = median / medians["SimPy"]
            print(f"{workload:<10}{name:<15}{expected:>10,}{median:>12,.0f}{ratio:>9.2f}")


if __name__ == "__main__":
    main()
