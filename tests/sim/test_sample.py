# SPDX-License-Identifier: GPL-2.0-or-later
"""Samples of a scenario's ranges: uniform, within the ranges, possible, and the same for the same seed."""

from __future__ import annotations

from collections import Counter
from math import log
from typing import Any

import numpy as np
import pytest

from proto_v3.errors import UserError
from sim.scenario.file import load
from sim.scenario.sample import at, dimensions, draw
from sim.scenario.scenario import Scenario, parameters
from tests.build.scenario import small_scenario

RANGES: dict[str, Any] = {
    "firmware.engines": {"low": 1.0, "high": 4.0, "why": "x"},
    "firmware.load_finish_ms": {"low": 0.5, "high": 50.0, "log": True, "why": "x"},
    "driver.chunks": {"low": 2, "high": 5, "why": "x"},
    "driver.lock": {"any": ["none", "per_fd", "device", "global"], "why": "x"},
    "device.0.state_mib": {"low": 4.0, "high": 12.0, "why": "x"},
    "device.0.stop_only_mib": {"of": "device.0.state_mib", "low": 0.0, "high": 0.5, "why": "x"},
}
MANY = 1024


def ranged(**more: Any) -> Scenario:
    return small_scenario({"ranges": RANGES, **more})


def test_each_range_is_met_uniformly_on_its_scale() -> None:
    """The k-th of a thousand sorted quasi-random values is the k-th thousandth of the range."""
    drawn = draw(ranged(), MANY)
    where = (np.arange(MANY) + 0.5) / MANY

    def values(key: str) -> Any:
        return [sample.values[key] for sample in drawn]

    assert np.sort(values("firmware.engines")) == pytest.approx(1 + 3 * where, abs=3 / MANY)
    logs = np.sort([log(value / 0.5, 100) for value in values("firmware.load_finish_ms")])
    assert logs == pytest.approx(where, abs=1 / MANY)
    assert Counter(values("driver.chunks")) == dict.fromkeys((2, 3, 4, 5), MANY / 4)
    assert Counter(values("driver.lock")) == dict.fromkeys(("none", "per_fd", "device", "global"), MANY / 4)
    ratios = np.sort([each.values["device.0.stop_only_mib"] / each.values["device.0.state_mib"] for each in drawn])
    assert ratios == pytest.approx(0.5 * where, abs=0.5 / MANY)
    assert abs(np.corrcoef(values("firmware.engines"), values("device.0.state_mib"))[0, 1]) < 0.01


def test_a_sample_is_the_scenario_with_these_values_and_no_others() -> None:
    scenario = ranged(sources={"ram.size_gib": "assumed: x"}, published=[{"citation": "x", "downtime_ms": 3.0}])
    for sample in draw(scenario, 8):
        assert parameters(sample.scenario) == parameters(scenario) | sample.values
        assert sample.values.keys() == RANGES.keys()
        assert type(sample.values["driver.chunks"]) is int
        assert sample.scenario.ranges == {}
        assert sample.scenario.published == scenario.published
        assert sample.scenario.sources == scenario.sources


def test_samples_depend_on_ranges_and_seed_only_and_few_are_the_first_of_many() -> None:
    several = [sample.values for sample in draw(ranged(), 13, seed=7)]
    assert several == [sample.values for sample in draw(ranged(**{"link.gbit_per_s": 25.0}), 13, seed=7)]
    assert several[:5] == [sample.values for sample in draw(ranged(), 5, seed=7)]
    assert several != [sample.values for sample in draw(ranged(), 13, seed=8)]
    assert len({str(each) for each in several}) == 13
    turned = small_scenario({"ranges": dict(reversed(RANGES.items()))})
    assert several == [sample.values for sample in draw(turned, 13, seed=7)], "the order in the file is nothing"


def test_the_ends_of_the_cube_are_the_ends_of_the_ranges() -> None:
    scenario = ranged()
    assert dimensions(scenario) == sorted(RANGES)
    low, high = at(scenario, 6 * [0.0]).values, at(scenario, 6 * [1.0]).values
    assert low == {
        "firmware.engines": 1.0,
        "firmware.load_finish_ms": 0.5,
        "driver.chunks": 2,
        "driver.lock": "none",
        "device.0.state_mib": 4.0,
        "device.0.stop_only_mib": 0.0,
    }
    assert high == {
        "firmware.engines": 4.0,
        "firmware.load_finish_ms": pytest.approx(50.0),
        "driver.chunks": 5,
        "driver.lock": "global",
        "device.0.state_mib": 12.0,
        "device.0.stop_only_mib": 6.0,
    }


def test_whole_numbers_on_a_log_scale_are_all_met() -> None:
    ranges = {"driver.chunks": {"low": 1, "high": 4, "log": True, "why": "x"}}
    counts = Counter(each.values["driver.chunks"] for each in draw(small_scenario({"ranges": ranges}), MANY))
    for value in (1, 2, 3, 4):
        assert counts[value] == pytest.approx(MANY * log((value + 1) / value, 5), abs=2)


def test_without_ranges_a_sample_is_the_scenario() -> None:
    (sample,) = draw(small_scenario(), 16)
    assert sample.scenario == small_scenario()
    assert sample.values == {}


# --- keys that go together --------------------------------------------------------------------------------------------


def test_a_key_below_another_is_cut_there() -> None:
    ranges = {
        "host.copy_gib_per_s": {"low": 2.0, "high": 20.0, "why": "x"},
        "host.memory_gib_per_s": {"low": 10.0, "high": 30.0, "why": "x"},
        "link.gbit_per_s": {"low": 5.0, "high": 100.0, "why": "x"},
        "ram.size_gib": {"low": 0.01, "high": 0.1, "why": "x"},
    }
    changes = {"ram.nonzero_gib": 0.05, "ram.working_set_mib": 20.0, "ram.size_gib": 0.1, "ranges": ranges}
    drawn = draw(small_scenario(changes), 64)
    host = [(each.scenario.host.copy_gib_per_s, each.scenario.host.memory_gib_per_s) for each in drawn]
    assert all(copy <= memory for copy, memory in host)
    assert any(copy == memory for copy, memory in host)
    assert any(copy < memory for copy, memory in host)
    for each in drawn:
        assert parameters(each.scenario).items() >= each.values.items(), "what was cut is told as it is"
        link, ram = each.scenario.link, each.scenario.ram
        assert link.per_connection_gbit_per_s == min(10.0, link.gbit_per_s)
        assert ram.nonzero_gib == min(0.05, ram.size_gib)
        assert ram.working_set_mib == min(20.0, 1024 * ram.size_gib)


def test_a_key_whose_range_is_a_ratio_keeps_it_where_only_the_other_moves() -> None:
    """As for the ends of the other key's range, which the schema tries one by one."""
    ranges = {key: RANGES[key] for key in ("device.0.state_mib", "device.0.stop_only_mib")}
    ranges["device.0.stop_only_mib"] = {"of": "device.0.state_mib", "low": 1.0, "high": 1.0, "why": "all of it"}
    scenario = small_scenario({"device.0.stop_only_mib": 8.0, "ranges": ranges})
    for sample in draw(scenario, 8):
        assert sample.scenario.device[0].stop_only_mib == sample.scenario.device[0].state_mib


def test_values_that_do_not_go_together_are_told() -> None:
    ranges = {
        "driver.chunk_mib": {"low": 1, "high": 2, "why": "x"},
        "device.0.block_kib": {"any": [64, 1024, 2048], "why": "x"},
    }
    scenario = small_scenario({"driver.chunk_mib": 2, "ranges": ranges})
    with pytest.raises(UserError) as caught:
        draw(scenario, 64)
    assert str(caught.value).startswith("small: values in their ranges do not go together: device.0.block_kib = 2048:")
    assert "driver.chunk_mib = 1" in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, 1 << 20])
def test_a_number_of_samples_that_is_none_is_refused(count: int) -> None:
    with pytest.raises(UserError, match="samples = "):
        draw(load("mlx5-2vf"), count)
