# SPDX-License-Identifier: GPL-2.0-or-later
"""Protocols by name: what each suffix changes, which go together, what is refused, and names that survive a table."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.runs import frame as results
from experiments.runs.folder import without_formulas
from proto_v3.errors import UserError
from proto_v3.vfio.uapi import StreamFlags
from proto_v3.vmm.v2 import Ack
from proto_v3.vmm.v3 import V3Options
from proto_v3.wire.streams import Credits, Wire
from sim.run import simulate
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.suffixes import HELP, NUMBERED, SUFFIXES
from sim.scenario.units import MIB
from tests.build.scenario import small_scenario

SCENARIO = small_scenario()
# Everything that a suffix can set is set, so that each one has something to change.
EVERYTHING = small_scenario(
    {
        "vmm.multifd": True,
        "vmm.multifd_device_state": False,
        "vmm.reinit": True,
        "vmm.switchover_ack": "reusable",
        "vmm.precopy_user": "polls",
        "driver.reinit": "invalidate",
        "driver.epochs": "invalidate",
        "driver.precopy_image": "whole",
        "driver.initial": "image",
        "driver.chunks": 17,
        "v3.dirty_streams": 9,
        "v3.blocks": True,
        "v3.wire": "pool",
        "v3.late_epoch": "retry",
    }
)
OF_BOTH: dict[str, dict[str, Any]] = {
    "critical-first": {"driver.precopy_image": "chunks", "driver.initial": "critical"},
    **{f"chunks{n}": {"driver.chunks": n} for n in range(2, 17)},
    "parallel-stop": {"vmm.parallel_stop": True, "vmm.parallel_config": True},
    "whole": {"vmm.stop_rule": "whole"},
    "parts": {"vmm.stop_rule": "parts"},
}
# By hand, from what the suffixes are for: what is left of the scenario is not named.
MEANING: dict[str, dict[str, dict[str, Any]]] = {
    "v2": {
        "multifd": {"vmm.multifd": True, "vmm.multifd_device_state": True},
        "single": {"vmm.multifd_device_state": False},
        "early": {"vmm.early_save": True},
        "threads": {"vmm.precopy_threads": True},
        "reinit-flush": {"vmm.reinit": True, "driver.reinit": "flush"},
        "reinit-invalidate": {"vmm.reinit": True, "driver.reinit": "invalidate"},
        "priority": {"vmm.reinit": True, "driver.reinit": "priority"},
        "no-reinit": {"vmm.reinit": False},
        "ack": {"vmm.switchover_ack": "one_shot"},
        "no-ack": {"vmm.switchover_ack": "off"},
        "retry": {"vmm.late_reinit": "retry"},
        "ack-reusable": {"vmm.switchover_ack": "reusable"},
        "polls": {"vmm.precopy_user": "polls"},
        "deduces": {"vmm.precopy_user": "deduces"},
        **OF_BOTH,
    },
    "v3": {
        **{f"n{n}": {"v3.dirty_streams": n} for n in range(1, 65)},
        "multifd": {"vmm.multifd": True},
        "blocks": {"v3.blocks": True},
        "streams": {"v3.wire": "streams"},
        "pool": {"v3.wire": "pool"},
        "one": {"v3.wire": "one"},
        "keep": {"driver.epochs": "keep"},
        "invalidate": {"driver.epochs": "invalidate"},
        "retry": {"v3.late_epoch": "retry"},
        "proceed": {"v3.late_epoch": "proceed"},
        **OF_BOTH,
    },
}
ALL = [(version, suffix) for version in MEANING for suffix in MEANING[version]]
CHOICES = {
    "v2": [
        ["", "-multifd", "-single"],
        ["", "-early"],
        ["", "-threads"],
        ["", "-retry"],
        ["", "-reinit-flush", "-reinit-invalidate", "-priority", "-no-reinit"],
        ["", "-ack", "-no-ack", "-ack-reusable"],
        ["", "-polls", "-deduces"],
        ["", "-critical-first"],
        ["", "-chunks2", "-chunks16"],
        ["", "-whole", "-parts"],
        ["", "-parallel-stop"],
    ],
    "v3": [
        ["", "-n1", "-n9", "-n10", "-n64"],
        ["", "-blocks"],
        ["", "-multifd"],
        ["", "-critical-first"],
        ["", "-chunks4"],
        ["", "-streams", "-pool", "-one"],
        ["", "-keep", "-invalidate"],
        ["", "-retry", "-proceed"],
        ["", "-whole", "-parts"],
        ["", "-parallel-stop"],
    ],
}
"""Suffixes that exclude each other."""


NEEDS = {
    ("v2", "no-reinit"): ["no-ack"],
    ("v2", "early"): ["multifd"],
    ("v2", "retry"): ["reinit-flush", "ack-reusable"],
}
"""Suffixes without which one is refused, whatever the scenario sets."""


REFUSED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "a reusable ack goes with REINIT only": lambda keys: (
        keys["vmm.switchover_ack"] == "reusable" and not keys["vmm.reinit"]
    ),
    "a retry .vmm.late_reinit. needs a reusable ack": lambda keys: (
        keys["vmm.late_reinit"] == "retry" and keys["vmm.switchover_ack"] != "reusable"
    ),
    "early save threads": lambda keys: (
        keys["vmm.early_save"] and not (keys["vmm.multifd"] and keys["vmm.multifd_device_state"])
    ),
}
"""Of v2, with these settings."""


def flat(scenario: Scenario) -> dict[str, Any]:
    """The settings of VMM, driver and v3, with dotted keys."""
    return {
        f"{table}.{key}": value
        for table in ("vmm", "driver", "v3")
        for key, value in getattr(scenario, table).model_dump().items()
    }


def meaning(version: str, *names: str) -> dict[str, Any]:
    return {key: value for name in names for key, value in MEANING[version][name.removeprefix("-")].items()}


# --- what a name means -----------------------------------------------------------------------------------------------


def test_v2_alone_is_v2_as_the_scenario_sets_it_up() -> None:
    for scenario in (SCENARIO, EVERYTHING):
        protocol = Protocol.parse("v2", scenario)
        assert protocol == Protocol("v2", 2, {})
        assert protocol.applied(scenario).scenario == scenario


def test_v3_alone_is_v3_as_the_scenario_sets_it_up_and_is_named_with_its_streams() -> None:
    assert Protocol.parse("v3", SCENARIO) == Protocol("v3-n4", 3, {"v3": {"dirty_streams": 4}})
    assert Protocol.parse("v3", small_scenario({"v3.dirty_streams": 7})).name == "v3-n7"
    for scenario in (SCENARIO, EVERYTHING):
        assert Protocol.parse("v3", scenario).applied(scenario).scenario == scenario


def test_every_suffix_is_told_of_here_and_in_the_help() -> None:
    assert {version: set(names) for version, names in SUFFIXES.items()} == {
        version: set(names) for version, names in MEANING.items()
    }
    of_v2, of_v3 = HELP.split("; ")
    assert all(f"-{name}" in of_v2 for name in MEANING["v2"] if not NUMBERED.fullmatch(name))
    assert of_v2.endswith("-chunks2 to -chunks16")
    assert of_v3.startswith("v3, with any of -n1 to -n64, -")
    assert all(f"-{name}" in of_v3 for name in MEANING["v3"] if not NUMBERED.fullmatch(name))


@pytest.mark.parametrize(("version", "suffix"), [each for each in ALL if each[1] != "ack-reusable"])
def test_a_suffix_changes_what_it_says_and_nothing_else(version: str, suffix: str) -> None:
    for scenario in (SCENARIO, EVERYTHING):
        needed = NEEDS.get((version, suffix), [])
        name, also = "-".join([version, *needed, suffix]), meaning(version, *needed)
        protocol = Protocol.parse(name, scenario)
        assert (protocol.name, protocol.version) == (name, int(version[1]))
        applied = protocol.applied(scenario).scenario
        assert flat(applied) == flat(scenario) | meaning(version, suffix) | also
        rest = {"vmm", "driver", "v3"}
        assert applied.model_dump(exclude=rest) == scenario.model_dump(exclude=rest)


@pytest.mark.parametrize(("version", "suffix"), [each for each in ALL if each[1] != "ack-reusable"])
def test_no_suffix_is_without_effect(version: str, suffix: str) -> None:
    changed = meaning(version, suffix).items()
    assert any(not changed <= flat(scenario).items() for scenario in (SCENARIO, EVERYTHING))


def test_a_name_is_what_the_vmm_does() -> None:
    applied = Protocol.parse("v2-multifd-reinit-flush-ack-reusable-polls", SCENARIO).applied(SCENARIO).scenario
    options = applied.v2_options()
    assert (options.reinit, options.ack, options.polls) == (True, Ack.REUSABLE, True)
    assert options.devices_by_multifd is not None
    assert options.channels == 1 + SCENARIO.vmm.multifd_channels
    plain = SCENARIO.v2_options()
    assert (plain.reinit, plain.ack, plain.polls, plain.multifd, plain.channels) == (False, Ack.OFF, False, None, 1)


def test_single_keeps_multifd_for_ram_only() -> None:
    """As QEMU before 10.0: RAM has channels of its own, the devices' data stays on the main one."""
    scenario = small_scenario({"vmm.multifd": True})
    options = Protocol.parse("v2-single", scenario).applied(scenario).scenario.v2_options()
    assert options.multifd is not None
    assert options.devices_by_multifd is None


def test_a_name_of_v3_is_what_its_vmms_do() -> None:
    credits = Credits(4 * MIB, 64 * MIB)
    plain = SCENARIO.v3_options()
    assert plain == V3Options(4, False, Wire.STREAMS, 4, credits, 0)
    assert (plain.dirty_streams, plain.flags, plain.connections(2)) == (4, StreamFlags(0), 1 + 2 * 5)
    applied = Protocol.parse("v3-n8-pool-retry", SCENARIO).applied(SCENARIO).scenario.v3_options()
    assert applied == V3Options(8, False, Wire.POOL, 4, credits, 3)
    assert applied.connections(2) == 1 + 4
    applied = Protocol.parse("v3-blocks-n8-one", SCENARIO).applied(SCENARIO).scenario.v3_options()
    assert applied == V3Options(8, True, Wire.ONE, 4, credits, 0)
    assert (applied.dirty_streams, applied.flags, applied.connections(2)) == (1, StreamFlags.BLOCKS, 1)


@pytest.mark.parametrize("version", CHOICES)
@given(st.data(), st.randoms())
def test_any_choice_of_suffixes_in_any_order_means_all_of_them(version: str, data: st.DataObject, order: Any) -> None:
    parts = [data.draw(st.sampled_from(choice)) for choice in CHOICES[version]]
    shuffled = list(parts)
    order.shuffle(shuffled)
    name = version + "".join(shuffled)
    if name == "v3":
        assert Protocol.parse(name, SCENARIO).name == "v3-n4"
    wanted = flat(SCENARIO) | meaning(version, *filter(None, parts))
    refused = [why for why, is_refused in REFUSED.items() if version == "v2" and is_refused(wanted)]
    if refused:
        with pytest.raises(UserError, match=refused[0]):
            Protocol.parse(name, SCENARIO)
    else:
        assert flat(Protocol.parse(name, SCENARIO).applied(SCENARIO).scenario) == wanted


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["pool", "one"])
def test_a_read_larger_than_a_credit_is_refused_only_where_connections_are_shared(wire: str) -> None:
    scenario = small_scenario({"vmm.read_mib": 8.0, "v3.critical_credit_mib": 4.0, "link.socket_buffer_mib": 10.0})
    assert simulate(scenario, Protocol.parse("v3-n4", scenario), 1).kind.value == "COMPLETED"
    with pytest.raises(UserError, match=rf"'v3-n4-{wire}': v3.critical_credit_mib = 4: must be at least one read"):
        Protocol.parse(f"v3-n4-{wire}", scenario)


def test_a_limit_of_what_v2_sends_is_no_scenario_for_v3() -> None:
    """Else v3 would be compared with a v2 that may use less of the link."""
    limited = small_scenario({"vmm.max_bandwidth_mib_per_s": 128.0})
    assert Protocol.parse("v2-multifd", limited).version == 2
    with pytest.raises(UserError, match=r"^protocol 'v3-n4': vmm.max_bandwidth_mib_per_s limits v2 only"):
        Protocol.parse("v3", limited)


CONTRADICTIONS = [
    f"{version}{one} {other}"
    for version, choices in CHOICES.items()
    for choice in choices
    for one, other in itertools.permutations(filter(None, choice), 2)
]


@pytest.mark.parametrize("names", CONTRADICTIONS)
def test_suffixes_that_contradict_each_other_are_refused(names: str) -> None:
    first, other = names.split()
    name = first + other
    with pytest.raises(UserError) as refused:
        Protocol.parse(name, SCENARIO)
    assert str(refused.value) == f"protocol {name!r}: {other} contradicts what comes before it"


def test_a_suffix_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UserError, match="-multifd is there twice"):
        Protocol.parse("v2-multifd-polls-multifd", SCENARIO)
    with pytest.raises(UserError, match="-n4 is there twice"):
        Protocol.parse("v3-n4-pool-n4", SCENARIO)


def test_a_contradiction_is_found_behind_other_suffixes() -> None:
    with pytest.raises(UserError, match="-deduces contradicts"):
        Protocol.parse("v2-polls-multifd-ack-deduces", SCENARIO)
    with pytest.raises(UserError, match="-one contradicts"):
        Protocol.parse("v3-pool-n2-retry-one", SCENARIO)


@pytest.mark.parametrize("name", ["", "V2", "v1", "v22", "v", "4", "v2\n", "v3\n", "v3n4", "v32", "v 3", " v3"])
def test_a_name_that_is_none_is_answered_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UserError) as refused:
        Protocol.parse(name, SCENARIO)
    assert str(refused.value).startswith(f"unknown protocol {name!r}; there are {HELP}")


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("v2-n1", "-n1"),
        ("v2-pool", "-pool"),
        ("v2-proceed", "-proceed"),
        ("v2-", "-"),
        ("v2-multi", "-multi"),
        ("v2-multifd4", "-multifd4"),
        ("v2-multifd-", "-"),
        ("v2-multifd--ack", "--ack"),
        ("v2-multifd\n", "\n"),
        ("v2-reinit", "-reinit"),
        ("v2-ack-once", "-once"),
        ("v2-polls-ack-reusables", "-reusables"),
        ("v2-no", "-no"),
        ("v2-ACK", "-ACK"),
        ("v3-n2-single", "-single"),
        ("v3-n2-ack", "-ack"),
        ("v3-n", "-n"),
        ("v3-n0", "-n0"),
        ("v3-n01", "-n01"),
        ("v3-n65", "-n65"),
        ("v3-n-1", "-n-1"),
        ("v3-n1 ", "-n1 "),
        ("v3-n1\n", "\n"),
        ("v3-", "-"),
        ("v3--n4", "--n4"),
        ("v3-N4", "-N4"),
        ("v3-block", "-block"),
        ("v3-n4-pools", "-pools"),
        ("v3-n4-invalidate-", "-"),
    ],
)
def test_an_unknown_suffix_is_shown_and_answered_with_those_that_there_are(name: str, rest: str) -> None:
    with pytest.raises(UserError) as refused:
        Protocol.parse(name, SCENARIO)
    told = str(refused.value)
    assert told.startswith(f"unknown protocol {name!r}: {rest!r} is none of -")
    _, of_version = told.partition("; did you mean")[0].split(" is none of ")
    assert of_version in HELP
    assert all(f"-{suffix}" in of_version for suffix in MEANING[name[:2]] if not NUMBERED.fullmatch(suffix))
    assert ("-n1 to -n64" in of_version) == (name[:2] == "v3")


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(UserError, match=r"did you mean v3\?"):
        Protocol.parse("v33", SCENARIO)
    for name, meant in {
        "v2-mutlifd-polls": "multifd",
        "v2-polls-reinit-flsh": "reinit-flush",
        "v3-n4-pol": "pool",
    }.items():
        with pytest.raises(UserError, match=rf"did you mean -{meant}\?"):
            Protocol.parse(name, SCENARIO)


def test_a_reusable_ack_needs_reinit_from_the_name_or_from_the_scenario() -> None:
    with pytest.raises(UserError, match="REINIT only: add -reinit-flush, -reinit-invalidate or -priority"):
        Protocol.parse("v2-ack-reusable", SCENARIO)
    with_reinit = small_scenario({"vmm.reinit": True})
    assert Protocol.parse("v2-ack-reusable", with_reinit).applied(with_reinit).scenario.vmm.switchover_ack == "reusable"
    with pytest.raises(UserError, match="a reusable ack goes with REINIT only"):
        Protocol.parse("v2-no-reinit", EVERYTHING)


def test_a_variant_that_needs_another_setting_says_which_and_what_to_add() -> None:
    with pytest.raises(UserError, match=r"'v2-early': early save threads .vmm.early_save. .*: add -multifd$"):
        Protocol.parse("v2-early", SCENARIO)
    by_key = small_scenario({"vmm.early_save": True})
    with pytest.raises(UserError, match=r"'v2': early save threads"):
        Protocol.parse("v2", by_key)
    assert Protocol.parse("v2-multifd", by_key).applied(by_key).scenario.v2_options().early_save
    assert Protocol.parse("v3", by_key), "it is a setting of v2"
    with pytest.raises(UserError, match=r"'v2-retry': a retry .vmm.late_reinit. .*: add -ack-reusable$"):
        Protocol.parse("v2-retry", SCENARIO)


# --- names in tables -------------------------------------------------------------------------------------------------

NAMES = [
    *("v2", "v2-multifd", "v2-reinit-invalidate-ack-reusable-polls", "v2-no-ack-single"),
    *("v3-n1", "v3-n12", "v3-n4-pool-invalidate-retry", "v3-blocks-n2-streams-keep-proceed", "v3-blocks", "v3-one"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_made_again_from_its_name(name: str) -> None:
    protocol = Protocol.parse(name, SCENARIO)
    assert protocol.name == name
    assert Protocol.parse(protocol.name, SCENARIO) == protocol
    assert pickle.loads(pickle.dumps(protocol)) == protocol, "it goes to other processes"


def test_names_survive_a_run_and_a_table(tmp_path: Any) -> None:
    outcomes = [simulate(SCENARIO, Protocol.parse(name, SCENARIO), 1) for name in NAMES]
    frame = results.table(outcomes)
    without_formulas(frame).write_csv(tmp_path / "runs.csv")
    names = pl.read_csv(tmp_path / "runs.csv")["protocol"].to_list()
    assert names == NAMES
    assert [Protocol.parse(name, SCENARIO).name for name in names] == NAMES


def test_a_v3_that_falls_back_is_refused_what_its_v2_cannot_do() -> None:
    scenario = small_scenario({"v3.target_knows": "v2", "vmm.early_save": True})
    with pytest.raises(UserError, match=r"'v3-n2': .*early_save"):
        Protocol.parse("v3-n2", scenario)
    assert Protocol.parse("v3-n2", small_scenario({"vmm.early_save": True})).name == "v3-n2"
