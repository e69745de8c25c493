# SPDX-License-Identifier: GPL-2.0-or-later
"""A scenario as parameters of the sample driver: each key where it belongs, and what the driver cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from proto_v3.errors import UserError
from sim.real.sample_parameters import module_parameters
from tests.build.scenario import small_scenario

PARAM_LIST = Path(__file__).resolve().parents[2] / "kernel/driver/param_list.h"


def test_each_parameter_exists_in_the_driver_and_is_in_its_range() -> None:
    """param_list.h: SAMPLE_PARAM(name, default, least, most, names of the values or NULL, ...)."""
    text = PARAM_LIST.read_text(encoding="utf-8")
    known = dict(re.findall(r"SAMPLE_PARAM\((\w+), \w+, \w+, ([^,]+),", text))
    assert "size_kib" in known
    for name, value in module_parameters(small_scenario()).items():
        assert name in known
        if isinstance(value, int) and known[name].isdecimal():
            assert value <= int(known[name])


def test_a_scenario_is_what_the_driver_is_told() -> None:
    made = module_parameters(
        small_scenario(
            {
                "device.0.state_mib": 6.0,
                "device.0.resume_ms": 4.0,
                "device.0.writes": {"pattern": "uniform", "mib_per_s": 1.5},
                "driver.lock": "global",
                "driver.lock_over": "command",
                "driver.reinit": "none",
                "driver.precopy_end": "0",
                "firmware.engines": 3.0,
            }
        )
    )
    assert made == {
        "size_kib": 6 * 1024,
        "block_kib": 64,
        "critical_kib": 16,
        "critical_setup_us": 400,
        "dirty_kib_s": 1536,
        "streams": 16,
        "precopy": 1,
        "p2p": 1,
        "lock": "global",
        "lock_over": "command",
        "engines": 3,
        "save_mib_s": 1024,
        "load_mib_s": 2048,
        "command_us": 10,
        "load_finish_us": 5000,
        "chunk_kib": 1024,
        "chunks": 2,
        "epochs": "keep",
        "initial": "critical",
        "data_size": 1,
        "info_v2": 0,
        "reinit": "flush",
        "zero_end": 1,
        "quiesce_us": 1000,
        "suspend_us": 2000,
        "stop_us": 2000,
        "resume_us": 4000,
        "run_us": 0,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"device.0.count": 2},
        {"driver.precopy": "reread"},
        {
            "device.0.reconfigurations": {"at_s": [0.1], "invalidates_share": 0.5},
            "driver.epochs": "invalidate",
        },
        {"driver.reinit": "invalidate"},
        {"driver.precopy_image": "whole"},
        {"firmware.service_cv": 0.1},
        {"firmware.engines": 2.5},
        {"firmware.load_engines": 1.0},
        {"firmware.load_command_us": 20.0},
        {"device.0.stop_only_mib": 1.0},
        {"device.0.writes": {"pattern": "sequential", "mib_per_s": 1.0}},
        {"device.0.critical.objects": 0},
        {"device.0.faults": [{"side": "source", "arc": "RUNNING_P2P -> STOP"}]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_driver_cannot_be_is_named(changes: dict[str, Any]) -> None:
    key = next(iter(changes))
    with pytest.raises(UserError, match=re.escape(key.removesuffix(".objects"))):
        module_parameters(small_scenario(changes))


def test_all_that_it_cannot_be_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"driver\.precopy = check.*firmware\.service_cv = 0\.5"):
        module_parameters(small_scenario({"driver.precopy": "check", "firmware.service_cv": 0.5}))


def test_what_is_saved_only_when_stopped_is_all_of_it_without_pre_copy() -> None:
    made = module_parameters(small_scenario({"device.0.features": ["STOP_COPY"], "device.0.stop_only_mib": 8.0}))
    assert (made["precopy"], made["p2p"]) == (0, 0)
