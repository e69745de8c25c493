# SPDX-License-Identifier: GPL-2.0-or-later
"""Firmware: service factors with the mean and spread that are asked for, the cost of commands, sharing of engines."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from proto_v3.timeline import Mark, PathStep, Resource, Timeline
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run
from sim.device.firmware import FACTORS, FirmwareModel, VfFirmware, service_factors
from sim.scenario.units import MIB
from tests.build.scenario import small_scenario

SAVE_MIB_NS, LOAD_MIB_NS = 1_000_000_000 // 1000, 1_000_000_000 // 2000
COMMAND_NS = 50_000
SETTINGS = {
    "firmware.engines": 2,
    "firmware.save_mib_per_s": 1000.0,
    "firmware.load_mib_per_s": 2000.0,
    "firmware.save_command_us": 50.0,
    "firmware.load_command_us": 50.0,
    "firmware.load_finish_ms": 7.0,
    "firmware.service_cv": 0.0,
}


def pf(timeline: Timeline, vfs: int, **changes: Any) -> list[VfFirmware]:
    """The firmware of a PF, as each of its VFs uses it."""
    keys = {f"firmware.{key}": value for key, value in changes.items()}
    settings = small_scenario(SETTINGS | keys).firmware
    shared = FirmwareModel(settings, np.random.default_rng(5), timeline)
    return [VfFirmware(shared, vf, settings.load_finish_ns) for vf in range(vfs)]


def model(timeline: Timeline, **changes: Any) -> VfFirmware:
    (only,) = pf(timeline, 1, **changes)
    return only


def test_without_spread_every_factor_is_one() -> None:
    assert (service_factors(0, np.random.default_rng(1)) == 1).all()


@pytest.mark.parametrize("cv", [0.027, 0.3, 1.0, 2.0])
def test_factors_are_positive_with_mean_one_and_the_cv_asked_for(cv: float) -> None:
    draws = np.concatenate([service_factors(cv, np.random.default_rng(seed)) for seed in range(50)])
    assert draws.shape == (50 * FACTORS,)
    assert (draws > 0).all()
    error = cv / np.sqrt(len(draws))
    assert draws.mean() == pytest.approx(1, abs=4 * error)
    # Of a gamma's sample, var(s^2) / s^4 is about (kurtosis - 1) / n with kurtosis 3 + 6 cv^2; s = sqrt(s^2) halves it.
    assert draws.std() == pytest.approx(cv, rel=4 * np.sqrt((2 + 6 * cv**2) / len(draws)) / 2)


def test_the_same_seed_gives_the_same_factors_and_another_one_others() -> None:
    drawn = [service_factors(0.5, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_save_costs_its_command_and_its_bytes() -> None:
    async def main() -> int:
        await model(Timeline(now_ns)).save(4 * MIB)
        return now_ns()

    assert run(main()) == COMMAND_NS + 4 * SAVE_MIB_NS


def test_a_load_costs_its_command_and_its_bytes() -> None:
    async def main() -> int:
        await model(Timeline(now_ns)).load(4 * MIB)
        return now_ns()

    assert run(main()) == COMMAND_NS + 4 * LOAD_MIB_NS


def test_finishing_an_image_costs_what_the_scenario_says() -> None:
    async def main() -> int:
        await model(Timeline(now_ns)).finish_load()
        return now_ns()

    assert run(main()) == 7_000_000


def test_a_command_varies_by_its_factor_and_each_takes_the_next() -> None:
    async def main() -> list[int]:
        firmware, ends = model(Timeline(now_ns), service_cv=0.5), [0]
        for _ in range(3):
            await firmware.save(MIB)
            ends.append(now_ns())
        return ends

    factors = service_factors(0.5, np.random.default_rng(5))[:3]
    assert np.diff(run(main())).tolist() == [round((COMMAND_NS + SAVE_MIB_NS) * factor) for factor in factors]


@pytest.mark.rule("v2.driver.16")
@pytest.mark.parametrize(("engines", "slowed"), [(1, 4), (2, 2), (3, 4 / 3), (4, 1), (9, 1)])
@pytest.mark.parametrize("what", ["save", "load"])
@pytest.mark.parametrize("vfs", [1, 4])
def test_saves_share_the_engines_and_so_do_loads(engines: int, slowed: float, what: str, vfs: int) -> None:
    """Whichever VFs they are of: each alike, if a VF may have all engines."""
    commands = [(vf % vfs, what) for vf in range(4)]
    assert ends(commands, engines=engines) == [round(slowed * (COMMAND_NS + SAVE_MIB_NS))] * 4


def ends(commands: list[tuple[int, str]], **changes: Any) -> list[int]:
    """When commands of a MiB that begin at the same time end, each by its VF and what it does."""

    async def main() -> list[int]:
        vfs = pf(Timeline(now_ns), 1 + max(vf for vf, _ in commands), load_mib_per_s=1000.0, **changes)

        async def run_one(vf: int, what: str) -> int:
            await getattr(vfs[vf], what)(MIB)
            return now_ns()

        return await asyncio.gather(*(asyncio.create_task(run_one(*command)) for command in commands))

    return run(main())


def test_saves_and_loads_have_engines_of_their_own_where_the_scenario_says_so() -> None:
    one_ns = COMMAND_NS + SAVE_MIB_NS
    assert ends([(0, "save"), (1, "save")], engines=2, save_engines=1) == [2 * one_ns] * 2
    assert ends([(0, "load"), (1, "load")], engines=2, save_engines=1) == [one_ns] * 2
    assert ends([(0, "load"), (1, "load")], engines=2, load_engines=1) == [2 * one_ns] * 2
    assert ends([(0, "save"), (1, "save")], engines=2, load_engines=1) == [one_ns] * 2


def test_the_commands_of_one_vf_have_no_more_engines_than_it_may_have() -> None:
    """Four engines, one a VF: two commands of one VF share it, the other VF's runs at full speed beside them."""
    one_ns = COMMAND_NS + SAVE_MIB_NS
    commands = [(0, "save"), (0, "save"), (1, "save")]
    assert ends(commands, engines=4, vf_engines=1) == [2 * one_ns, 2 * one_ns, one_ns]
    assert ends(commands, engines=4) == [one_ns] * 3


def test_finishing_an_image_shares_the_engines_too() -> None:
    async def main() -> int:
        firmware = model(Timeline(now_ns), engines=1)
        await asyncio.gather(asyncio.create_task(firmware.finish_load()), asyncio.create_task(firmware.finish_load()))
        return now_ns()

    assert run(main()) == 2 * 7_000_000


def test_a_command_is_one_span_with_all_the_time_that_it_shared() -> None:
    async def main() -> list[PathStep]:
        timeline = Timeline(now_ns)
        firmware = model(timeline, engines=1)
        timeline.mark(Mark.STOP_ORDERED)
        other = asyncio.create_task(firmware.load(MIB))
        await sleep_ns(0)
        await firmware.load(MIB)
        timeline.mark(Mark.RESUMED)
        await other
        return timeline.critical_path()

    assert run(main()) == [PathStep(Resource.LOAD, "LOAD", "main", 0, 2 * (COMMAND_NS + LOAD_MIB_NS))]


def test_a_command_that_was_begun_runs_to_its_end_without_its_caller() -> None:
    async def main() -> int:
        firmware = model(Timeline(now_ns), engines=1)
        caller = asyncio.create_task(firmware.save(MIB))
        await sleep_ns(10)
        caller.cancel()
        await firmware.save(MIB)
        return now_ns()

    assert run(main()) == 2 * (COMMAND_NS + SAVE_MIB_NS)
