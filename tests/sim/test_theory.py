# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator's queues against theory: waiting times of single servers, a closed loop's bottleneck, whole runs.

Where arrivals are random they are drawn before, with a fixed seed; the tolerance is what so many of them leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from proto_v3.timeline import Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.clock.port import now_ns, sleep_ns, sleep_until_ns
from sim.clock.virtual import run
from sim.device.firmware import FirmwareModel, VfFirmware, service_factors
from sim.device.record import HEADER_BYTES, V3_HEADER_BYTES
from sim.resource import CommandSlots, FifoServer, Lock, Memory
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.units import GIB, KIB, MIB
from tests.build.scenario import small_scenario

SERVICE_NS = 1_000_000
SECOND = 1_000_000_000
LOADS = [(0.3, 0.03), (0.6, 0.05), (0.8, 0.06)]
"""Utilisation, and how far a mean of some ten thousand waits may be off."""
ARRIVALS = 25_000


def poisson_ns(utilisation: float, count: int, service_ns: float = SERVICE_NS) -> list[int]:
    """When so many jobs come, at random, to a server that they keep busy for this part of the time."""
    gaps = np.random.default_rng(7).exponential(service_ns / utilisation, count)
    times: list[int] = np.rint(np.cumsum(gaps)).astype(np.int64).tolist()
    return times


def pollaczek_khinchine_ns(utilisation: float, services_ns: NDArray[np.float64]) -> float:
    """The mean wait in an M/G/1 queue, in order of arrival: rho E[S^2] / (2 E[S] (1 - rho))."""
    mean = services_ns.mean()
    return float(utilisation * (services_ns**2).mean() / (2 * mean * (1 - utilisation)))


def mean_sojourn_ns(arrivals_ns: list[int], job: Callable[[], Awaitable[None]]) -> float:
    """From arrival to the end, over all jobs, each in a task of its own."""
    total = 0

    async def one(came_ns: int) -> None:
        nonlocal total
        await job()
        total += now_ns() - came_ns

    async def main() -> None:
        async with asyncio.TaskGroup() as jobs:
            for at in arrivals_ns:
                await sleep_until_ns(at)
                jobs.create_task(one(at))

    run(main())
    return total / len(arrivals_ns)


def firmware(cv: float, **changes: Any) -> VfFirmware:
    """One engine; a SAVE of no bytes takes SERVICE_NS in the mean."""
    keys = {"firmware.service_cv": cv, "firmware.engines": 1, "firmware.save_command_us": SERVICE_NS / 1000} | changes
    settings = small_scenario(keys).firmware
    return VfFirmware(FirmwareModel(settings, np.random.default_rng(3), Timeline(now_ns)), 0, settings.load_finish_ns)


# --- one server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("utilisation", "off"), LOADS)
@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0])
def test_a_pipe_is_an_m_g_1_queue(utilisation: float, off: float, cv: float) -> None:
    count = 300_000
    rng = np.random.default_rng(11)
    sizes = rng.gamma(1 / cv**2, cv**2 * SERVICE_NS, count) if cv else np.full(count, float(SERVICE_NS))
    sizes = np.rint(sizes)
    pipe = FifoServer(bytes_per_s=SECOND)  # a byte a nanosecond
    arrivals = poisson_ns(utilisation, count)
    waits = [pipe.book(size, at)[0] - at for at, size in zip(arrivals, sizes.astype(np.int64).tolist(), strict=True)]
    assert np.mean(waits) == pytest.approx(pollaczek_khinchine_ns(utilisation, sizes), rel=off / 2)


@pytest.mark.parametrize(("utilisation", "off"), LOADS)
def test_a_lock_that_is_held_as_long_each_time_is_an_m_d_1_queue(utilisation: float, off: float) -> None:
    lock = Lock(Timeline(now_ns))

    async def hold() -> None:
        async with lock:
            await sleep_ns(SERVICE_NS)

    waits = mean_sojourn_ns(poisson_ns(utilisation, ARRIVALS), hold) - SERVICE_NS
    assert waits == pytest.approx(utilisation * SERVICE_NS / (2 * (1 - utilisation)), rel=off)


@pytest.mark.parametrize(("utilisation", "off"), LOADS)
def test_firmware_behind_a_lock_is_an_m_g_1_queue(utilisation: float, off: float) -> None:
    cv = 0.5
    services = SERVICE_NS * service_factors(cv, np.random.default_rng(3))
    lock, model = Lock(Timeline(now_ns)), firmware(cv)

    async def save() -> None:
        async with lock:
            await model.save(0)

    arrivals = poisson_ns(utilisation, ARRIVALS, float(services.mean()))
    expected = services.mean() + pollaczek_khinchine_ns(utilisation, services)
    assert mean_sojourn_ns(arrivals, save) == pytest.approx(expected, rel=off)


@pytest.mark.parametrize(("utilisation", "off"), LOADS)
@pytest.mark.parametrize("cv", [0.0, 1.0])
def test_firmware_alone_shares_and_then_only_the_mean_matters(utilisation: float, off: float, cv: float) -> None:
    """M/G/1 with processor sharing: E[S] / (1 - rho), whatever the distribution."""
    services = SERVICE_NS * service_factors(cv, np.random.default_rng(3))
    model = firmware(cv)
    arrivals = poisson_ns(utilisation, ARRIVALS, float(services.mean()))
    sojourn = mean_sojourn_ns(arrivals, lambda: model.save(0))
    assert sojourn == pytest.approx(services.mean() / (1 - utilisation), rel=off)


# --- a closed loop ---------------------------------------------------------------------------------------------------

ROUNDS = 200
LOOPS = {
    "lock": (1_000_000, 200_000, 1.0, 100_000),
    "firmware": (10_000, 1_000_000, 2.5, 20_000),
    "copy": (5_000, 30_000, 4.0, 1_000_000),
    "nothing": (300_000, 700_000, 2.0, 350_000),
}
"""What dominates; lock, firmware and copy in nanoseconds of one round, and the engines."""


def rounds_per_ns(readers: int, locked_ns: int, save_ns: int, engines: float, copy_ns: int) -> float:
    """The throughput of so many readers that go through lock, firmware and a copy in the memory, and begin anew."""
    timeline = Timeline(now_ns)
    lock, shared = Lock(timeline), CommandSlots(engines)
    memory = Memory(SECOND, SECOND, timeline)  # a byte a nanosecond, for all of them

    async def read() -> None:
        for _ in range(ROUNDS):
            async with lock:
                await sleep_ns(locked_ns)
            await shared.run(save_ns)
            await memory.copy(copy_ns, 0, "copy")

    async def main() -> int:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(readers):
                tasks.create_task(read())
        return now_ns()

    return readers * ROUNDS / run(main())


@pytest.mark.parametrize("what", LOOPS)
def test_a_closed_loop_is_bounded_by_its_bottleneck_and_by_its_readers(what: str) -> None:
    locked_ns, save_ns, engines, copy_ns = LOOPS[what]
    capacity = min(1 / locked_ns, engines / save_ns, 1 / copy_ns)
    through = []
    for readers in (1, 2, 3, 4, 8, 16):
        law = min(capacity, readers / (locked_ns + save_ns + copy_ns))
        through.append(rounds_per_ns(readers, *LOOPS[what]))
        assert through[-1] <= law * (1 + 1e-9)
    assert through[0] == pytest.approx(1 / (locked_ns + save_ns + copy_ns), rel=1e-6)
    assert through == sorted(through)
    assert through[-1] >= (0.98 if what != "nothing" else 0.9) * capacity


# --- whole runs ------------------------------------------------------------------------------------------------------

STATE_MIB = 128
FAST = {
    "ram.nonzero_gib": 0.0005, "ram.final_sync_ms": 0.0, "ram.final_scan_ms": 0.0,
    "device.0.state_mib": float(STATE_MIB), "device.0.stop_only_mib": float(STATE_MIB),
    "firmware.engines": 8.0, "firmware.save_mib_per_s": 50_000.0, "firmware.load_mib_per_s": 50_000.0,
    "host.copy_gib_per_s": 40.0, "host.memory_gib_per_s": 160.0,
    "link.gbit_per_s": 800.0, "link.per_connection_gbit_per_s": 400.0,
    "vmm.bandwidth_gbit_per_s": 100.0, "vmm.downtime_limit_ms": 1000.0,
}  # fmt: skip


def stop_copy_ns(changes: dict[str, Any], protocol: str) -> int:
    """From the device's stop to its last byte at the target VMM."""
    scenario = small_scenario(FAST | changes)
    outcome = simulate(scenario, Protocol.parse(protocol, scenario), 1)
    assert outcome.kind is OutcomeKind.COMPLETED
    return outcome.phases_ns["drain"] + outcome.phases_ns["transfer"]


def stream_bytes(protocol: str) -> int:
    """The device's state in chunks of 1 MiB, a header each."""
    return STATE_MIB * (MIB + (HEADER_BYTES if protocol.startswith("v2") else V3_HEADER_BYTES))


@pytest.mark.parametrize(
    ("protocol", "engines", "at_once"),
    [("v2", 8.0, 1), ("v2-multifd", 1.0, 1), ("v3-n1", 8.0, 1), ("v3-n4", 8.0, 4), ("v3-n4", 2.5, 2.5),
     ("v3-n8-pool", 4.0, 4)],
)  # fmt: skip
def test_a_firmware_bound_run(protocol: str, engines: float, at_once: float) -> None:
    took = stop_copy_ns({"firmware.save_mib_per_s": 50.0, "firmware.engines": engines}, protocol)
    saves_ns = STATE_MIB * 10_000 + stream_bytes(protocol) / (50 * MIB) * SECOND
    assert took == pytest.approx(saves_ns / at_once, rel=0.02)


@pytest.mark.parametrize(
    ("protocol", "connections"),
    [("v2", 1), ("v2-multifd", 2), ("v3-n1", 1), ("v3-n4", 4), ("v3-n4-one", 1), ("v3-n8-pool", 4)],
)
@pytest.mark.parametrize("gbit_per_s", [800.0, 2.0])
def test_a_link_bound_run(protocol: str, connections: int, gbit_per_s: float) -> None:
    link = {"link.per_connection_gbit_per_s": 1.0, "link.gbit_per_s": gbit_per_s}
    rate = min(gbit_per_s, connections) * 125_000_000
    took = stop_copy_ns(link, protocol)
    assert took == pytest.approx(stream_bytes(protocol) / rate * SECOND, rel=0.02)


@pytest.mark.parametrize(
    ("protocol", "lock", "readers"),
    [("v2", "none", 1), ("v2-multifd", "per_fd", 1), ("v3-n4", "none", 4), ("v3-n4", "per_fd", 4),
     ("v3-n4", "device", 1), ("v3-n4", "global", 1), ("v3-n1", "global", 1)],
)  # fmt: skip
def test_a_copy_bound_run(protocol: str, lock: str, readers: int) -> None:
    copy = {"host.copy_gib_per_s": 0.1, "driver.lock": lock, "vmm.read_mib": 0.25}
    took = stop_copy_ns(copy, protocol)
    size = stream_bytes(protocol)
    copies_ns = size / (0.1 * GIB) * SECOND + -(-size // (256 * KIB)) * 1_000
    assert took == pytest.approx(copies_ns / readers, rel=0.02)
