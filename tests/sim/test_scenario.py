# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios: what is shipped, what is derived, and mistakes told with file, key, value and what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto_v3.errors import UserError
from proto_v3.timeline import Timeline
from proto_v3.vfio.uapi import MigrationFlags
from proto_v3.vmm.v3 import V3Options
from proto_v3.wire.streams import Credits, Wire
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run
from sim.host.machine import RamModel
from sim.scenario.device import Fault, Reconfigurations
from sim.scenario.file import load, parse, shipped
from sim.scenario.scenario import SOURCE_KINDS, Scenario, parameters
from sim.scenario.tables import NO_FIGURES, V3
from sim.scenario.units import KIB, MIB
from tests.build.scenario import small_scenario, small_tables, small_text, to_toml

HUGE = 10**400
SECOND_DEVICE = small_tables()["device"][0] | {"name": "other"}
WRITES = {"pattern": "uniform", "mib_per_s": 10.0}


def refusal(text: str) -> str:
    """What is told of a scenario's text that is not accepted."""
    with pytest.raises(UserError) as caught:
        parse(text, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    return message


def problems(changes: dict[str, Any]) -> list[str]:
    """The problems told of the small scenario with changes."""
    first, *lines = refusal(small_text(changes)).splitlines()
    assert first == f"my.toml: {len(lines)} problem(s)"
    return [line.strip() for line in lines]


# --- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_scenario_loads_under_its_name(name: str) -> None:
    scenario = load(name)
    assert scenario.name == name
    assert scenario.description


@pytest.mark.parametrize("name", shipped())
def test_every_parameter_that_a_shipped_scenario_sets_has_a_source(name: str) -> None:
    scenario = load(name)
    assert sorted(set(parameters(scenario)) - set(scenario.sources)) == []


@pytest.mark.parametrize("name", shipped())
def test_every_source_of_a_shipped_scenario_says_something(name: str) -> None:
    for source in load(name).sources.values():
        kind, colon, words = source.partition(": ")
        assert kind in SOURCE_KINDS
        assert colon
        assert len(words) > 3


@pytest.mark.parametrize("name", shipped())
def test_what_was_fitted_to_is_among_what_was_published(name: str) -> None:
    for published in load(name).published:
        figures = published.model_dump(exclude=NO_FIGURES, exclude_unset=True)
        for key in published.fitted:
            figure, _, index = key.partition(".")
            assert figure in figures
            assert not index or int(index) < len(figures[figure])


# --- single values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("name", "two words", "pattern"),
        ("name", "", "pattern"),
        ("description", 3, "a valid string"),
        ("ram.size_gib", "1.0", "a valid number"),
        ("ram.size_gib", True, "a valid number"),
        ("ram.size_gib", [1.0], "a valid number"),
        ("ram.size_gib", HUGE, "a valid number"),
        ("ram.size_gib", 0, "greater than 0"),
        ("ram.size_gib", 1e6, "less than or equal to 65536"),
        ("ram.nonzero_gib", -1.0, "greater than or equal to 0"),
        ("ram.scan_gib_per_s", 0.0, "greater than or equal to 0.000001"),
        ("device", [], "at least 1"),
        ("device.0.name", "a/b", "pattern"),
        ("device.0.name", 5, "a valid string"),
        ("device.0.count", 0, "greater than or equal to 1"),
        ("device.0.count", True, "a valid integer"),
        ("device.0.count", 65, "less than or equal to 64"),
        ("device.0.features", "STOP_COPY", "a valid list"),
        ("device.0.max_dirty_streams", -1, "greater than or equal to 0"),
        ("device.0.block_kib", 64.0, "a valid integer"),
        ("device.0.block_kib", "64", "a valid integer"),
        ("device.0.critical.objects", -1, "greater than or equal to 0"),
        ("device.0.critical.setup_us", "long", "a valid number"),
        ("driver.lock", "mutex", "'none', 'per_fd', 'device' or 'global'"),
        ("driver.chunks", 0, "greater than or equal to 1"),
        ("driver.chunks", 1.5, "a valid integer"),
        ("driver.epochs", "drop", "'keep' or 'invalidate'"),
        ("device.0.reconfigurations.during_stops", 0, "greater than or equal to 1"),
        ("device.0.reconfigurations.during_stops", 1.0, "a valid integer"),
        ("device.0.reconfigurations.invalidates_share", -0.1, "greater than or equal to 0"),
        ("device.0.reconfigurations.invalidates_share", 1.1, "less than or equal to 1"),
        ("firmware.service_cv", 2.5, "less than or equal to 2"),
        ("firmware.engines", 10**30, "less than or equal to 256"),
        ("vmm.write_kib", 0, "greater than or equal to 1"),
        ("v3.dirty_streams", 0, "greater than or equal to 1"),
        ("v3.dirty_streams", 65, "less than or equal to 64"),
        ("v3.blocks", 1, "a valid boolean"),
        ("v3.blocks", "yes", "a valid boolean"),
        ("v3.wire", "tcp", "'streams', 'pool' or 'one'"),
        ("v3.pool_connections", 0, "greater than or equal to 1"),
        ("v3.pool_connections", 257, "less than or equal to 256"),
        ("v3.critical_credit_mib", 0, "greater than 0"),
        ("v3.critical_credit_mib", 4097.0, "less than or equal to 4096"),
        ("v3.dirty_credit_mib", 0.0, "greater than 0"),
        ("v3.dirty_credit_mib", 4097, "less than or equal to 4096"),
        ("v3.late_epoch", "never", "'retry' or 'proceed'"),
        ("v3.max_retries", -1, "greater than or equal to 0"),
        ("v3.max_retries", 1001, "less than or equal to 1000"),
        ("v3.target_knows", 3, "'v3' or 'v2'"),
        ("v3.target_max_dirty_streams", -1, "greater than or equal to 0"),
        ("v3.target_max_dirty_streams", 65, "less than or equal to 64"),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_what_is_right(key: str, value: Any, right: str) -> None:
    (problem,) = problems({key: value})
    shown = repr(value)
    assert problem.startswith(f"{key} = {shown if len(shown) <= 60 else shown[:57] + '...'}: ")
    assert right in problem


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("device", [{}] * 65, 64),
        ("device.0.faults", [{}] * 257, 256),
        ("device.0.features", ["?"] * 1000, 3),
        ("device.0.reconfigurations.at_s", [1.0] * 100_001, 100_000),
    ],
)
def test_a_list_that_is_too_long_is_one_problem_whatever_is_in_it(key: str, value: Any, most: int) -> None:
    (problem,) = problems({key: value})
    assert problem.startswith(f"{key} = [")
    assert f"at most {most} items" in problem


def test_texts_of_a_file_are_cleaned() -> None:
    scenario = small_scenario({"description": "quick\x1b[2J\nand dirty"})
    assert scenario.description == r"quick\x1b[2J and dirty"
    (problem,) = problems({"vmm.\x1b[2J": 1})
    assert problem == r"vmm.\x1b[2J = 1: unknown key"


@pytest.mark.parametrize("key", sorted(key for key, value in parameters(small_scenario()).items() if value != "dev"))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, True, False])
def test_no_parameter_takes_what_is_no_number_or_below_zero(key: str, value: float) -> None:
    assert any(problem.startswith(f"{key} = {value!r}: must be ") for problem in problems({key: value}))


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("side", "both", "'source' or 'target'"),
        ("arc", "to PRE_COPY", "pattern"),
        ("command", "ERASE", "'SAVE' or 'LOAD'"),
        ("after", -1, "greater than or equal to 0"),
        ("after", 1.5, "a valid integer"),
        ("errno", "EPERM", "'EIO', 'EINVAL', 'ENOMEM', 'ENODEV', 'ETIMEDOUT' or 'EBUSY'"),
        ("leaves", "after", "'before' or 'ERROR'"),
        ("times", 0, "greater than or equal to 1"),
    ],
)
def test_a_wrong_value_of_a_fault_is_told_with_what_is_right(key: str, value: Any, right: str) -> None:
    fault = {"side": "source"} | ({} if key == "arc" else {"command": "SAVE"}) | {key: value}
    (problem,) = problems({"device.0.faults": [fault]})
    assert problem.startswith(f"device.0.faults.0.{key} = {value!r}: ")
    assert right in problem


def test_the_last_allowed_value_is_taken() -> None:
    scenario = small_scenario(
        {
            "device.0.reconfigurations": {"during_stops": 1, "invalidates_share": 0.0},
            "v3": {
                "dirty_streams": 64,
                "pool_connections": 256,
                "critical_credit_mib": 4096.0,
                "dirty_credit_mib": 1.0,
                "max_retries": 1000,
                "target_max_dirty_streams": 0,
            },
        }
    )
    assert scenario.device[0].reconfigurations == Reconfigurations(during_stops=1, invalidates_share=0.0)
    assert (scenario.v3.dirty_streams, scenario.v3.pool_connections, scenario.v3.max_retries) == (64, 256, 1000)
    assert (scenario.v3.critical_credit_mib, scenario.v3.dirty_credit_mib) == (4096, 1)
    assert scenario.v3.target_max_dirty_streams == 0


def test_an_integer_is_a_number_and_nothing_is_converted_else() -> None:
    assert small_scenario({"device.0.state_mib": 8}).device[0].state_mib == 8


@pytest.mark.parametrize("key", ["ram", "device", "firmware", "driver", "host", "link", "vmm"])
def test_what_is_missing_at_the_top_is_told(key: str) -> None:
    assert problems({key: None}) == [f"{key}: missing; it is required"]


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("ram.size_gib", "GiB"),
        ("device.0.state_mib", "MiB"),
        ("device.0.critical.object_kib", "KiB"),
        ("vmm.setup_ms", "milliseconds"),
        ("driver.call_us", "microseconds"),
        ("vmm.give_up_s", "seconds"),
    ],
)
def test_a_missing_key_is_told_with_its_unit(key: str, unit: str) -> None:
    assert problems({key: None}) == [f"{key}: missing; it is required ({unit})"]


@pytest.mark.parametrize("key", ["link.gbit_per_s", "ram.scan_gib_per_s", "firmware.save_mib_per_s"])
def test_a_rate_is_not_told_to_be_in_seconds(key: str) -> None:
    (problem,) = problems({key: None})
    assert problem.startswith(f"{key}: missing; it is required")
    assert "(seconds)" not in problem


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("firmwre", "firmware"),
        ("ram.size_gb", "size_gib"),
        ("driver.chunk_mb", "chunk_mib"),
        ("device.0.stop_only", "stop_only_mib"),
        ("device.0.critical.object", "objects"),
        ("vmm.downtime_limit", "downtime_limit_ms"),
        ("driver.epoch", "epochs"),
        ("v3.wires", "wire"),
        ("v3.retries", "max_retries"),
        ("v3.target_max_streams", "target_max_dirty_streams"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_that_was_meant(key: str, meant: str) -> None:
    assert problems({key: 3}) == [f"{key} = 3: unknown key; did you mean {meant}?"]


def test_an_unknown_key_in_a_table_that_may_be_left_out_is_told_with_the_one_that_was_meant() -> None:
    told = problems({"device.0.writes": WRITES | {"patern": "uniform"}})
    assert told == ["device.0.writes.patern = 'uniform': unknown key; did you mean pattern?"]


def test_an_unknown_key_like_no_other_is_told() -> None:
    (problem,) = problems({"ram.zzzzzz": 1})
    assert problem.startswith("ram.zzzzzz = 1: unknown key")


@pytest.mark.parametrize(("key", "value"), [("ram", 3), ("v3", "4"), ("device.0", 1), ("device.0.critical", [])])
def test_where_a_table_is_due_it_is_said_in_the_files_words(key: str, value: Any) -> None:
    (problem,) = problems({key: value})
    assert problem.startswith(f"{key} = {value!r}: must be ")
    assert "table" in problem
    assert "instance of" not in problem


def test_all_problems_are_told_at_once() -> None:
    told = problems({"ram.size_gib": -1, "driver.lock": "x", "vmm.setup_ms": None, "zzz": 0})
    assert len(told) == 4


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.integers(-5, 100),
    st.floats(),
    st.sampled_from([HUGE, -HUGE, 10**18, 5e-324, 1.7e308]),
    st.booleans(),
    st.text("ab.\"'\\ \n=", max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.floats(), max_size=2),
    st.dictionaries(st.sampled_from(["objects", "at_s", "pattern", "x"]), st.integers(), max_size=2),
)
EVERYTHING_SET = {
    "device.0.count": 1,
    "device.0.pf": 0,
    "device.0.writes": {"pattern": "hotspot", "mib_per_s": 10.0, "hot_share": 0.5, "hot_fraction": 0.5},
    "device.0.reconfigurations": {
        "poisson_per_s": 5.0,
        "during_stop_ms": [0.5],
        "during_stops": 2,
        "objects_each": 1,
        "invalidates_share": 0.5,
    },
    "device.0.faults": [
        {"side": "source", "arc": "RUNNING -> PRE_COPY", "leaves": "ERROR"},
        {"side": "target", "command": "LOAD", "after": 2, "errno": "ENOMEM", "times": 2},
    ],
    "driver.epochs": "invalidate",
    "ram.frame_mib": 1.0,
    "vmm.read_mib": 1.0,
    "vmm.write_kib": 32,
    "vmm.bandwidth_gbit_per_s": 10.0,
    "vmm.max_bandwidth_mib_per_s": 128.0,
    "v3": {
        "dirty_streams": 4,
        "blocks": True,
        "wire": "pool",
        "pool_connections": 4,
        "critical_credit_mib": 4.0,
        "dirty_credit_mib": 64.0,
        "late_epoch": "retry",
        "force_after_ms": 500.0,
        "decision_interval_ms": 10.0,
        "max_retries": 3,
        "target_knows": "v2",
        "target_max_dirty_streams": 4,
    },
}
KEYS = ["name", "ram", "device", "device.0", "v3", "sources", *sorted(parameters(small_scenario(EVERYTHING_SET)))]


def test_every_key_of_v3_and_of_a_fault_is_tried_below() -> None:
    assert {key for key in KEYS if key.startswith("v3.")} == {f"v3.{name}" for name in V3.model_fields}
    of_faults = {key.rpartition(".")[2] for key in KEYS if key.startswith("device.0.faults.")}
    assert of_faults >= set(Fault.model_fields)


@given(st.sampled_from(KEYS), VALUES)
def test_whatever_a_value_is_it_is_taken_or_told_in_lines_of_key_and_problem(key: str, value: Any) -> None:
    text = small_text(EVERYTHING_SET | {key: value})
    try:
        parse(text, "my.toml")
    except UserError as error:
        first, *lines = str(error).split("\n  ")
        assert re.fullmatch(r"my\.toml: \d+ problem\(s\)", first)
        assert lines
        for line in lines:
            assert re.match(r"[a-z_]\w*(\.[\w]+)*( = .+)?: .+", line), line


# --- combinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"ram.nonzero_gib": 1.0},
            "ram.nonzero_gib = 1: must be at most size_gib = 0.0625",
        ),
        (
            {"ram.working_set_mib": 65.0},
            "ram.working_set_mib = 65: must be at most size_gib, 64 MiB",
        ),
        (
            {"device.0.writes": WRITES | {"hot_share": 0.5}},
            'device.0.writes.pattern = "uniform": hot_share and hot_fraction go with "hotspot" only',
        ),
        (
            {"device.0.reconfigurations": {"at_s": [1.0], "poisson_per_s": 5.0}},
            "device.0.reconfigurations.poisson_per_s = 5: must be left out where at_s gives the times",
        ),
        (
            {"device.0.features": ["P2P"]},
            "device.0.features = ['P2P']: must have \"STOP_COPY\", as every device that can migrate does",
        ),
        (
            {"device.0.features": ["STOP_COPY", "P2P", "P2P"]},
            "device.0.features = ['STOP_COPY', 'P2P', 'P2P']: must name each once",
        ),
        (
            {"device.0.stop_only_mib": 8.5},
            "device.0.stop_only_mib = 8.5: must be at most state_mib = 8",
        ),
        (
            {"device.0.state_mib": 1048576.0, "device.0.block_kib": 1},
            "device.0.block_kib = 1: makes 1073741824 blocks; must make at most 16777216",
        ),
        (
            {"device.0.reconfigurations": {"objects_each": 5}},
            "device.0.reconfigurations.objects_each = 5: must be at most critical.objects = 4",
        ),
        (
            {"host.copy_gib_per_s": 17.0},
            "host.copy_gib_per_s = 17 (one thread): must be at most memory_gib_per_s = 16 (all of them)",
        ),
        (
            {"device.1": SECOND_DEVICE | {"name": "dev"}},
            "device.name = ['dev', 'dev']: must differ from table to table; count makes several alike",
        ),
        (
            {"device.0.count": 64, "device.1": SECOND_DEVICE},
            "device.count: makes 65 devices; must make at most 64",
        ),
        (
            {"device.1": SECOND_DEVICE | {"block_kib": 96}},
            "device.1.block_kib = 96: must divide driver.chunk_mib, 1024 KiB",
        ),
        (
            {"device.0.writes": WRITES, "device.0.stop_only_mib": 8.0},
            "device.0.stop_only_mib = 8: must leave something for writes to dirty",
        ),
        (
            {"device.0.writes": WRITES | {"mib_per_s": 1e7}},
            "device.0.writes.mib_per_s = 1e+07: makes 3.2e+08 writes within vmm.give_up_s; must make at most 6.71e+07: "
            "take larger blocks or give up earlier",
        ),
        (
            {"device.0.reconfigurations": {"poisson_per_s": 1e6}},
            "device.0.reconfigurations.poisson_per_s = 1e+06: must make at most 1e6 events within vmm.give_up_s",
        ),
        (
            {"link.per_connection_gbit_per_s": 41.0},
            "link.per_connection_gbit_per_s = 41: must be at most link.gbit_per_s = 40",
        ),
        (
            {"link.socket_buffer_mib": 0.5},
            "link.socket_buffer_mib = 0.5: must be at least one read, vmm.read_mib = 1",
        ),
        (
            {"v3.critical_credit_mib": 0.5, "v3.wire": "pool"},
            "v3.critical_credit_mib = 0.5: must be at least one read, vmm.read_mib = 1",
        ),
        (
            {"v3.dirty_credit_mib": 1.5, "vmm.read_mib": 2.0, "v3.wire": "one"},
            "v3.dirty_credit_mib = 1.5: must be at least one read, vmm.read_mib = 2",
        ),
        (
            {"device.0.faults": [{"side": "source"}]},
            "device.0.faults.0.arc, command: must be one of the two, not both and not neither",
        ),
        (
            {"device.0.faults": [{"side": "source", "arc": "RUNNING -> PRE_COPY", "command": "SAVE"}]},
            "device.0.faults.0.arc, command: must be one of the two, not both and not neither",
        ),
        (
            {"device.0.faults": [{"side": "source", "arc": "RUNNING -> RESUMING"}]},
            "device.0.faults.0.arc = 'RUNNING -> RESUMING': must be one of PRE_COPY -> PRE_COPY_P2P, ",
        ),
        (
            {
                "device.0.features": ["STOP_COPY"],
                "device.0.faults": [{"side": "source", "arc": "RUNNING -> PRE_COPY"}],
            },
            "device.0.faults.0.arc = 'RUNNING -> PRE_COPY': must be one that a device with these features takes: ",
        ),
        (
            {"device.0.faults": [{"side": "source", "arc": "RUNNING -> PRE_COPY", "after": 0}]},
            "device.0.faults.0.after = 0: goes with command only",
        ),
        (
            {"device.0.faults": [{"side": "source", "command": "SAVE", "leaves": "ERROR"}]},
            'device.0.faults.0.leaves = "ERROR": goes with arc only',
        ),
        (
            {"device.0.faults": [{"side": "target", "command": "SAVE"}]},
            'device.0.faults.0.command = "SAVE": must be SAVE at the source, LOAD at the target',
        ),
        (
            {"device.0.faults": [{"side": "source", "command": "LOAD"}]},
            'device.0.faults.0.command = "LOAD": must be SAVE at the source, LOAD at the target',
        ),
        (
            {"sources": {"ram.siz_gib": "assumed: a guess"}},
            "sources.ram.siz_gib = 'assumed: a guess': must be a key that the file sets; did you mean ram.size_gib?",
        ),
        (
            {"sources": {"vmm.read_mib": "qemu: the default"}},
            "sources.vmm.read_mib = 'qemu: the default': must be a key that the file sets",
        ),
        (
            {"sources": {"ram.size_gib": "guessed: so"}},
            "sources.ram.size_gib = 'guessed: so': must begin with published, measured, bounded, kernel, qemu, fitted, "
            "derived, assumed, yours, and a colon",
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_told_with_both_sides(changes: dict[str, Any], told: str) -> None:
    (problem,) = problems(changes)
    assert problem.startswith(told)


def test_a_source_without_a_colon_is_refused() -> None:
    (problem,) = problems({"sources": {"ram.size_gib": "assumed"}})
    assert problem.startswith("sources.ram.size_gib = 'assumed': must begin with")


def test_a_state_that_is_too_small_for_one_block_is_told_as_that() -> None:
    (problem,) = problems({"device.0.state_mib": 1e-7})
    assert "state_mib = 1e-07" in problem


def test_devices_that_get_the_same_name_by_their_number_are_refused() -> None:
    (problem,) = problems({"device.0.count": 2, "device.1": SECOND_DEVICE | {"name": "dev1"}})
    assert "dev1" in problem


@pytest.mark.parametrize("fitted", ["downtme_ms", "device_save_ms.2", "total_ms"])
def test_a_figure_that_was_fitted_to_must_be_a_published_one(fitted: str) -> None:
    """Or a typing error would make a prediction of what was fitted."""
    for key in ("fitted", "sums"):
        (problem,) = problems({"published": [{"citation": "x", "device_save_ms": [1.0, 2.0], key: [fitted]}]})
        assert problem.startswith(f"published.0.{key} = {fitted!r}: must be one of device_save_ms.0, device_save_ms.1")


def test_a_figure_that_was_fitted_to_is_not_a_sum_too() -> None:
    entry = {"citation": "x", "stop_ms": 1.0, "total_ms": 2.0, "fitted": ["stop_ms"], "sums": ["stop_ms", "total_ms"]}
    (problem,) = problems({"published": [entry]})
    assert problem == "published.0.sums = 'stop_ms': must not be in fitted too"


def test_no_more_of_ram_is_dirty_than_there_is() -> None:
    """However long nothing of it is sent: a page that is written again is dirty once."""
    scenario = small_scenario({"ram.dirty_mib_per_s": 10_000.0, "ram.working_set_mib": 20.0})

    async def pending() -> int:
        ram = RamModel(scenario.ram, Timeline(now_ns))
        while ram.pending_bytes() > scenario.ram.nonzero_gib * 2**30:
            await ram.take(1_000_000_000)
        for _ in range(100):
            await sleep_ns(100_000_000)
            await ram.sync()
        return ram.pending_bytes()

    assert run(pending()) <= scenario.ram.size_gib * 2**30


def first_pages(scenario: Scenario) -> int:
    pages = run(RamModel(scenario.ram, Timeline(now_ns)).take(1_000_000_000))
    assert pages is not None
    return len(pages)


@pytest.mark.parametrize(
    ("key", "derived"),
    [
        ("vmm.read_mib", lambda scenario: scenario.switchover_settings().read_bytes),
        ("vmm.decision_interval_ms", lambda scenario: scenario.switchover_settings().idle_round_ns),
        ("v3.decision_interval_ms", lambda scenario: scenario.switchover_settings().decision_interval_ns),
        ("vmm.bandwidth_window_ms", lambda scenario: scenario.switchover_settings().bandwidth_window_ns),
        ("vmm.ram_budget_ms", lambda scenario: scenario.switchover_settings().ram_budget_ns),
        ("device.0.critical.object_kib", lambda scenario: round(scenario.device[0].critical.object_kib * KIB)),
        ("v3.critical_credit_mib", lambda scenario: scenario.v3_options().credits.critical_bytes),
        ("v3.dirty_credit_mib", lambda scenario: scenario.v3_options().credits.dirty_bytes),
        ("ram.frame_mib", first_pages),
    ],
)
def test_a_value_that_rounds_to_nothing_is_refused_or_rounded_up(key: str, derived: Callable[[Scenario], int]) -> None:
    """A read of 0 bytes or a pause of 0 ns would go on for ever, and an object of 0 bytes cannot be divided by."""
    try:
        scenario = small_scenario({key: 1e-9, "ram.nonzero_gib": 0.0625, "v3.wire": "pool"})
    except UserError as error:
        told = str(error)
    else:
        told = ""
        assert derived(scenario) >= 1
    assert not told or f"{key} = 1e-09" in told


# --- what is derived -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state_mib", "stop_only_mib", "blocks", "stop_only_blocks"),
    [(8.0, 0.0, 128, 0), (8.01, 0.0, 129, 0), (0.001, 0.0, 1, 0), (8.0, 1.0, 128, 16), (8.0, 1.001, 128, 17)],
)
def test_a_block_that_is_partly_used_counts_whole(
    state_mib: float, stop_only_mib: float, blocks: int, stop_only_blocks: int
) -> None:
    device = small_scenario({"device.0.state_mib": state_mib, "device.0.stop_only_mib": stop_only_mib}).device[0]
    assert (device.blocks, device.stop_only_blocks) == (blocks, stop_only_blocks)
    assert device.block_bytes == 64 * KIB


@given(st.floats(0.001, 64.0), st.floats(0, 1), st.sampled_from([1, 4, 64, 1024]))
def test_blocks_cover_the_state_and_no_more(state_mib: float, stop_share: float, block_kib: int) -> None:
    changes = {
        "device.0.state_mib": state_mib,
        "device.0.stop_only_mib": state_mib * stop_share,
        "device.0.block_kib": block_kib,
    }
    device = small_scenario(changes).device[0]
    assert (device.blocks - 1) * device.block_bytes < state_mib * MIB <= device.blocks * device.block_bytes + 0.5
    assert 0 <= device.stop_only_blocks <= device.blocks


def test_devices_are_unfolded_and_numbered_where_there_are_several_alike() -> None:
    scenario = small_scenario({"device.0.count": 3, "device.1": SECOND_DEVICE})
    assert [device.name for device in scenario.devices] == ["dev0", "dev1", "dev2", "other"]
    assert {device.state_mib for device in scenario.devices} == {8.0}


@pytest.mark.parametrize(
    ("features", "streams", "flags"),
    [
        (["STOP_COPY"], 0, MigrationFlags.STOP_COPY),
        (["PRE_COPY", "STOP_COPY"], 0, MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY),
        (["STOP_COPY", "P2P"], 1, MigrationFlags.STOP_COPY | MigrationFlags.P2P),
    ],
)
def test_flags_are_the_features_however_many_streams_there_are(
    features: list[str], streams: int, flags: MigrationFlags
) -> None:
    device = small_scenario({"device.0.features": features, "device.0.max_dirty_streams": streams}).device[0]
    assert device.flags == flags


def test_the_vmms_settings_are_in_nanoseconds_and_bytes() -> None:
    changes = {"vmm.read_mib": 0.5, "vmm.bandwidth_gbit_per_s": 8.0, "vmm.max_bandwidth_mib_per_s": 128.0}
    settings = small_scenario(changes).switchover_settings()
    assert settings.downtime_limit_ns == 20_000_000
    assert settings.bandwidth_window_ns == 10_000_000
    assert settings.idle_round_ns == 1_000_000
    assert settings.decision_interval_ns == 1_000_000
    assert settings.give_up_ns == 2_000_000_000
    assert settings.ram_budget_ns == 5_000_000
    assert settings.read_bytes == 512 * KIB
    assert settings.write_bytes == 32 * KIB
    assert settings.given_bandwidth_bytes_per_s == 1e9
    assert settings.max_bandwidth_bytes_per_s == 128 * MIB


def test_without_a_bandwidth_none_is_given_and_nothing_is_limited() -> None:
    settings = small_scenario().switchover_settings()
    assert settings.given_bandwidth_bytes_per_s is None
    assert settings.max_bandwidth_bytes_per_s is None


def test_what_is_not_said_of_v3_has_its_default() -> None:
    told = {"dirty_streams": 4, "blocks": False, "wire": "streams", "pool_connections": 4, "critical_credit_mib": 4.0}
    told |= {"dirty_credit_mib": 64.0, "late_epoch": "proceed", "max_retries": 3, "target_knows": "v3"}
    scenario = small_scenario({"device.0.reconfigurations": {"at_s": [1.0]}, "v3": None})
    told |= {"force_after_ms": None, "decision_interval_ms": 10.0}
    assert scenario.v3.model_dump() == told | {"target_max_dirty_streams": None}
    assert scenario.driver.epochs == "keep"
    plan = scenario.device[0].reconfigurations
    assert plan is not None
    assert (plan.during_stops, plan.invalidates_share) == (1, 1.0)


def test_how_the_vmms_use_v3_is_in_bytes_and_names() -> None:
    keys = {"dirty_streams": 3, "wire": "pool", "pool_connections": 7, "critical_credit_mib": 1.5}
    scenario = small_scenario({"v3": keys | {"dirty_credit_mib": 2.25}})
    expected = V3Options(3, False, Wire.POOL, 7, Credits(3 * MIB // 2, 9 * MIB // 4), 0)
    assert scenario.v3_options() == expected
    assert small_scenario({"v3": {"blocks": True}}).v3_options().dirty_streams == 1
    assert small_scenario({"v3": {"blocks": True}}).v3_options().wire_streams == 4


@pytest.mark.parametrize(("late_epoch", "retries"), [("proceed", 0), ("retry", 9)])
def test_only_one_that_retries_has_retries(late_epoch: str, retries: int) -> None:
    options = small_scenario({"v3": {"late_epoch": late_epoch, "max_retries": 9}}).v3_options()
    assert options.max_retries == retries


def test_a_chunk_is_in_bytes() -> None:
    assert small_scenario({"driver.chunk_mib": 3}).driver.chunk_bytes == 3 * MIB


def test_the_guest_is_active_for_longer_than_a_migration_may_take() -> None:
    scenario = small_scenario({"vmm.vcpu_stop_ms": 500.0, "vmm.setup_ms": 250.0})
    assert scenario.horizon_ns == 3_750_000_000 > scenario.switchover_settings().give_up_ns


def test_parameters_are_the_keys_that_the_file_sets() -> None:
    tables = small_tables({"published": [{"citation": "x"}], "sources": {"ram.size_gib": "assumed: x"}})
    keys = parameters(parse(to_toml(tables), "my.toml"))
    assert keys["ram.size_gib"] == 0.0625
    assert keys["device.0.critical.objects"] == 4
    assert keys["device.0.features"] == ["STOP_COPY", "P2P", "PRE_COPY"]
    assert "vmm.read_mib" not in keys  # left to its default
    assert not {"name", "description"} & set(keys)
    assert not [key for key in keys if key.startswith(("published", "sources"))]


def test_a_scenario_is_never_changed_after_loading() -> None:
    scenario = small_scenario()
    with pytest.raises(ValueError, match="frozen"):
        scenario.ram.size_gib = 2.0
