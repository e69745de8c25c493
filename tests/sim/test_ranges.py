# SPDX-License-Identifier: GPL-2.0-or-later
"""`[ranges]` of a scenario: what is refused, what is inherited, and what `--set` does to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proto_v3.errors import UserError
from sim.scenario.file import from_dump, load, parse
from sim.scenario.ranges import SURE, Range, without_range
from sim.scenario.scenario import SOURCE_KINDS, Scenario, parameters
from sim.scenario.shipped import shipped, shipped_bases
from tests.build.scenario import small_scenario, small_tables, small_text, to_toml

ENGINES = {"low": 1.0, "high": 4.0, "why": "one to four were seen"}


def refused(ranges: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> list[str]:
    """The problems of the small scenario with these ranges."""
    with pytest.raises(UserError) as caught:
        parse(small_text({**(changes or {}), "ranges": dict(ranges)}), "small.toml")
    title, *problems = str(caught.value).split("\n  ")
    assert title == f"small.toml: {len(problems)} problem(s)"
    return problems


def test_a_range_stands_beside_value_and_source() -> None:
    ranges = {
        "firmware.engines": ENGINES,
        "driver.chunks": {"low": 2, "high": 16, "log": True, "why": "two constants of the driver"},
        "driver.lock": {"any": ["none", "per_fd"], "why": "the driver may be changed"},
        "device.0.stop_only_mib": {"of": "device.0.state_mib", "low": 0.0, "high": 1.0, "why": "not known"},
        "device.0.features": {"any": [["STOP_COPY"], ["STOP_COPY", "P2P", "PRE_COPY"]], "why": "of two versions"},
        "device.0.critical.setup_us": {"low": 10, "high": 1000, "log": True, "why": "more than a decade"},
    }
    scenario = small_scenario({"ranges": ranges})
    assert [each.words for each in scenario.ranges.values()] == [
        "1 to 4",
        "2 to 16 (log)",
        "none, per_fd",
        "0 to 1 x device.0.state_mib",
        "STOP_COPY, STOP_COPY P2P PRE_COPY",
        "10 to 1000 (log)",
    ]
    assert set(parameters(scenario)).isdisjoint({"ranges", *(f"ranges.{key}" for key in ranges)})


@pytest.mark.parametrize(
    ("key", "own", "told"),
    [
        ("firmware.engine", ENGINES, ": must be of a key that the file sets; did you mean firmware.engines?"),
        ("device.1.state_mib", ENGINES, ": must be of a key that the file sets; did you mean device.0.state_mib?"),
        ("vmm.read_mib", ENGINES, ": must be of a key that the file sets; set vmm.read_mib too, which is 1.0 if it"),
        ("vmm.multifd", ENGINES, ": must be of a key that the file sets; set vmm.multifd too, which is false if it"),
        ("vmm.force_after_s", ENGINES, ": must be of a key that the file sets; set vmm.force_after_s too"),
        ("name", ENGINES, ": must be of a key that the file sets"),
        ("firmware", ENGINES, ": must be of a key that the file sets"),
        ("firmware.engines", {**ENGINES, "why": " "}, '.why = "": must say why'),
        ("firmware.engines", {"low": 1.0, "high": 4.0}, ".why: missing; it is required"),
        ("firmware.engines", {"why": "x"}, ".low, high: must be given both, or any"),
        ("firmware.engines", {"low": 1.0, "why": "x"}, ".low, high: must be given both, or any"),
        ("firmware.engines", {**ENGINES, "min": 1.0}, ".min = 1.0: unknown key; a range has low, high, log, of, any, "),
        ("firmware.engines", {**ENGINES, "lwo": 1.0}, ".lwo = 1.0: unknown key; did you mean low?"),
        ("firmware.engines", {**ENGINES, "low": 4.0}, ".low = 4: must be less than high = 4"),
        ("firmware.engines", {**ENGINES, "low": 5.0}, ".low = 5: must be less than high = 4"),
        ("firmware.engines", {**ENGINES, "low": "1"}, ".low = '1': must be a valid number"),
        ("firmware.engines", {**ENGINES, "high": float("inf")}, ".high = inf: must be a finite number"),
        ("firmware.engines", {**ENGINES, "high": 1.5}, " = 1 to 1.5: must contain the value, 2"),
        ("firmware.engines", {**ENGINES, "any": [1.0, 2.0]}, ".low = 1: must be left out where any"),
        ("firmware.engines", {"any": [1.0, 4.0], "why": "x"}, " = 1, 4: must contain the value, 2"),
        ("firmware.engines", {"any": [2.0], "why": "x"}, ".any = [2.0]: must have at least 2 items, not 1"),
        ("firmware.engines", {"any": [2.0, 2], "why": "x"}, ".any = [2.0, 2]: must name each value once"),
        ("firmware.engines", {**ENGINES, "low": 0.5}, " = 0.5 to 4: 0.5 is not possible here: firmware.engines = 0.5"),
        ("firmware.service_cv", {"low": 0.0, "high": 0.1, "log": True, "why": "x"}, ".low = 0: must be greater than 0"),
        ("driver.chunks", {"low": 1.5, "high": 4, "why": "x"}, " = 1.5 to 4: low and high must be whole numbers"),
        ("driver.lock", ENGINES, " = 1 to 4: must be any = [...], for the value is 'per_fd'"),
        ("driver.lock", {"any": ["per_fd", "big"], "why": "x"}, " = per_fd, big: 'big' is not possible here: driver."),
        ("driver.lock", {"any": ["none", "device"], "why": "x"}, " = none, device: must contain the value, per_fd"),
        ("driver.chunk_mib", {"any": [1, 2, 3000], "why": "x"}, " = 1, 2, 3000: 3000 is not possible here: driver."),
        ("device.0.block_kib", {"any": [64, 100], "why": "x"}, " = 64, 100: 100 is not possible here: device.0."),
        ("device.0.features", {"any": [["P2P"], ["STOP_COPY"]], "why": "x"}, " = P2P, STOP_COPY: must contain the v"),
        ("device.0.state_mib", {**ENGINES, "of": "ram.size"}, ".of = 'ram.size': must be another key that the file"),
        ("device.0.state_mib", {**ENGINES, "of": "device.0.state_mib"}, ".of = 'device.0.state_mib': must be another"),
        ("driver.chunks", {**ENGINES, "of": "ram.size_gib"}, ".of = 'ram.size_gib': must be left out"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_range_is_told(key: str, own: dict[str, Any], told: str) -> None:
    (problem,) = refused({key: own})
    assert problem.startswith(f"ranges.{key}{told}")


def test_a_switch_is_not_a_number() -> None:
    ranges = {"vmm.multifd": {"any": [0, 1], "why": "x"}}
    (problem,) = refused(ranges, {"vmm.multifd": True})
    assert problem.startswith("ranges.vmm.multifd = 0, 1: must contain the value, true")
    scenario = small_scenario({"vmm.multifd": True, "ranges": {"vmm.multifd": {"any": [True, False], "why": "x"}}})
    assert scenario.ranges["vmm.multifd"].words == "true, false"


def test_a_range_of_a_ratio_refers_to_a_key_without_one() -> None:
    ranges = {
        "device.0.suspend_ms": {"of": "device.0.quiesce_ms", "low": 0.1, "high": 2.0, "why": "x"},
        "device.0.quiesce_ms": {"of": "vmm.setup_ms", "low": 1.0, "high": 3.0, "why": "x"},
    }
    (problem,) = refused(ranges)
    assert problem.startswith("ranges.device.0.suspend_ms.of = 'device.0.quiesce_ms': must be a key whose own range")


def test_a_ratio_is_of_the_value_that_the_other_key_has() -> None:
    ranges = {"device.0.suspend_ms": {"of": "device.0.quiesce_ms", "low": 1.0, "high": 2.0, "why": "x"}}
    (problem,) = refused(ranges)  # 1 ms, of 2
    assert problem.startswith("ranges.device.0.suspend_ms = 1 to 2 x device.0.quiesce_ms: must contain the value, 1")
    (problem,) = refused({"ram": 3})
    assert problem == "ranges.ram = 3: must be a table"


def test_a_key_that_is_not_in_quotes_is_told_as_that() -> None:
    told = refused({"firmware": {"engines": ENGINES}})
    assert any(each.endswith('the whole key must be in quotes, as in "link.gbit_per_s" = { ... }') for each in told)


# --- what is inherited ------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, tables: Mapping[str, Any]) -> str:
    path = folder / name
    path.write_text(to_toml(tables), encoding="utf-8")
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    ranges = {
        "firmware.engines": ENGINES,
        "driver.chunks": {"low": 2, "high": 8, "why": "of the base"},
        "device.0.state_mib": {"low": 4.0, "high": 16.0, "why": "of the base"},
    }
    write(tmp_path, "base.toml", small_tables({"ranges": ranges}))
    return tmp_path


def words(scenario: Scenario) -> dict[str, str]:
    return {key: each.words for key, each in scenario.ranges.items()}


ALL = {"firmware.engines": "1 to 4", "driver.chunks": "2 to 8", "device.0.state_mib": "4 to 16"}


def test_a_range_is_inherited_while_nobody_sets_the_key_anew(base: Path) -> None:
    assert words(load(write(base, "mine.toml", {"extends": "base.toml"}))) == ALL
    own = {
        "extends": "base.toml",
        "driver": {"chunks": 2},
        "device": [{"block_kib": 32}],
    }  # there are 2 in the base too
    assert words(load(write(base, "mine.toml", own))) == {k: ALL[k] for k in ("firmware.engines", "device.0.state_mib")}


def test_a_range_is_replaced_as_a_whole(base: Path) -> None:
    own = {"extends": "base.toml", "ranges": {"firmware.engines": {"any": [1.0, 2.0], "why": "mine"}}}
    scenario = load(write(base, "mine.toml", own))
    assert words(scenario) == ALL | {"firmware.engines": "1, 2"}
    assert scenario.ranges["firmware.engines"].why == "mine"


def test_a_value_with_a_range_of_its_own_has_that(base: Path) -> None:
    range_ = {"low": 5.0, "high": 9.0, "why": "mine"}
    own = {"extends": "base.toml", "firmware": {"engines": 8.0}, "ranges": {"firmware.engines": range_}}
    own["sources"] = {"firmware.engines": "measured: here", "driver.chunks": "measured: it is as in the base"}
    scenario = load(write(base, "mine.toml", own))
    assert scenario.sources["driver.chunks"] == "measured: it is as in the base"
    assert words(scenario) == ALL | {"firmware.engines": "5 to 9"}
    assert (
        scenario.sources["firmware.engines"]
        == "measured: here, outside of what was plausible: 1 to 4 (one to four were seen)"
    )


def test_a_file_can_not_give_a_range_that_its_bases_value_is_outside_of(base: Path) -> None:
    own = {"extends": "base.toml", "ranges": {"firmware.engines": {"low": 3.0, "high": 4.0, "why": "mine"}}}
    with pytest.raises(UserError, match=r"ranges\.firmware\.engines = 3 to 4: must contain the value, 2"):
        load(write(base, "mine.toml", own))


def test_a_ratio_that_does_not_hold_of_a_new_value_is_dropped(base: Path) -> None:
    ratio = {"of": "device.0.state_mib", "low": 0.4, "high": 0.6, "why": "x"}
    device = [{"stop_only_mib": 4.0}]
    path = write(
        base, "half.toml", {"extends": "base.toml", "device": device, "ranges": {"device.0.stop_only_mib": ratio}}
    )
    assert "device.0.stop_only_mib" in words(load(path, ["device.0.state_mib=7"]))
    assert "device.0.stop_only_mib" not in words(load(path, ["device.0.state_mib=16"]))
    more = write(base, "more.toml", {"extends": "half.toml", "device": [{"state_mib": 16.0}]})
    assert "device.0.stop_only_mib" not in words(load(more))


@pytest.mark.parametrize(
    ("setting", "source"),
    [
        ("firmware.engines=4", "yours: --set"),
        ("firmware.engines=2", "yours: --set"),
        ("firmware.engines=8", "yours: --set, outside of what was plausible: 1 to 4 (one to four were seen)"),
    ],
)
def test_what_is_set_has_no_range_any_more_and_says_if_it_is_outside(base: Path, setting: str, source: str) -> None:
    scenario = load(str(base / "base.toml"), [setting])
    assert words(scenario) == {key: ALL[key] for key in ALL if key != "firmware.engines"}
    assert scenario.sources["firmware.engines"] == source


def test_a_setting_is_not_refused_for_the_end_of_another_keys_range(base: Path) -> None:
    range_ = {"any": [64, 2048], "why": "x"}
    own = {"extends": "base.toml", "driver": {"chunk_mib": 2}, "ranges": {"device.0.block_kib": range_}}
    path = write(base, "blocks.toml", own)
    assert "device.0.block_kib" in load(path).ranges
    assert load(path, ["driver.chunk_mib=1"]).driver.chunk_mib == 1
    write(base, "blocks.toml", own | {"driver": {"chunk_mib": 1}})
    with pytest.raises(UserError, match=r"block_kib = 64, 2048: 2048 is not possible here: device.0.block_kib = 2048"):
        load(path)


def test_a_scenario_out_of_its_dump_has_its_ranges(base: Path) -> None:
    was = load(str(base / "base.toml"))
    assert from_dump(was.model_dump(mode="json"), "manifest") == was
    assert Scenario.model_validate_json(was.to_json()) == was


def test_ranges_are_no_parameters(base: Path) -> None:
    with pytest.raises(UserError, match="ranges is no parameter"):
        load(str(base / "base.toml"), ["ranges.firmware=3"])


# --- of those that come with the project ------------------------------------------------------------------------------


def test_which_keys_have_no_range() -> None:
    sources = {"ram.size_gib": "assumed: x", "driver.chunks": "kernel: x", "firmware.engines": "fitted: x"}
    scenario = small_scenario({"sources": sources, "ranges": {"firmware.engines": ENGINES}})
    points = without_range(scenario.ranges, sources, parameters(scenario))
    assert "ram.size_gib" in points
    assert "link.gbit_per_s" in points, "its source is not stated"
    assert {"driver.chunks", "firmware.engines"}.isdisjoint(points)
    assert set(SURE) | {"assumed", "fitted", "derived", "bounded"} == set(SOURCE_KINDS)


@pytest.mark.parametrize("name", [*shipped(), *shipped_bases()])
def test_each_range_of_a_shipped_scenario_says_why(name: str) -> None:
    for key, each in load(str(shipped_bases()[name])).ranges.items():
        assert len(each.why) > 10, key
        assert isinstance(each, Range)


def test_a_table_that_is_set_anew_takes_the_ranges_of_its_keys_along(base: Path) -> None:
    key = "device.0.reconfigurations.poisson_per_s"
    own = {
        "extends": "base.toml",
        "device": [{"reconfigurations": {"poisson_per_s": 5.0}}],
        "ranges": {key: {"low": 1.0, "high": 9.0, "why": "mine"}},
    }
    file = write(base, "mine.toml", own)
    assert key in load(file).ranges
    anew = load(file, ["device.0.reconfigurations={at_s = [0.1]}"])
    assert words(anew) == ALL
