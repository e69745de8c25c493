"""Protocols by name: what each suffix changes, which go together, what is refused, and names that survive a table."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import polars as pl
import pytest
from helpers import small_scenario
from hypothesis import given
from hypothesis import strategies as st

from experiments import results
from proto_v3.errors import UserError
from proto_v3.v2 import Ack
from sim.protocol import HELP, SUFFIXES, Protocol
from sim.run import simulate
from sim.scenario import Scenario

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
    }
)
# By hand, from what the suffixes are for: what is left of the scenario is not named.
MEANING: dict[str, dict[str, Any]] = {
    "multifd": {"vmm.multifd": True, "vmm.multifd_device_state": True},
    "single": {"vmm.multifd_device_state": False},
    "reinit-flush": {"vmm.reinit": True, "driver.reinit": "flush"},
    "reinit-invalidate": {"vmm.reinit": True, "driver.reinit": "invalidate"},
    "no-reinit": {"vmm.reinit": False},
    "ack": {"vmm.switchover_ack": "one_shot"},
    "no-ack": {"vmm.switchover_ack": "off"},
    "ack-reusable": {"vmm.switchover_ack": "reusable"},
    "polls": {"vmm.precopy_user": "polls"},
    "deduces": {"vmm.precopy_user": "deduces"},
}
CHOICES = [
    ["", "-multifd", "-single"],
    ["", "-reinit-flush", "-reinit-invalidate", "-no-reinit"],
    ["", "-ack", "-no-ack", "-ack-reusable"],
    ["", "-polls", "-deduces"],
]
"""Suffixes that exclude each other."""


def flat(scenario: Scenario) -> dict[str, Any]:
    """The settings of VMM and driver, with dotted keys."""
    return {
        f"{table}.{key}": value
        for table in ("vmm", "driver")
        for key, value in getattr(scenario, table).model_dump().items()
    }


def meaning(*names: str) -> dict[str, Any]:
    return {key: value for name in names for key, value in MEANING[name.removeprefix("-")].items()}


# --- what a name means -----------------------------------------------------------------------------------------------


def test_v2_alone_is_v2_as_the_scenario_sets_it_up() -> None:
    for scenario in (SCENARIO, EVERYTHING):
        protocol = Protocol.parse("v2", scenario)
        assert protocol == Protocol("v2", 0)
        assert protocol.applied(scenario) == scenario


def test_every_suffix_is_told_of_here_and_in_the_help() -> None:
    assert SUFFIXES.keys() == MEANING.keys()
    assert all(f"-{name}" in HELP for name in SUFFIXES)


@pytest.mark.parametrize("suffix", [name for name in MEANING if name != "ack-reusable"])
def test_a_suffix_changes_what_it_says_and_nothing_else(suffix: str) -> None:
    for scenario in (SCENARIO, EVERYTHING):
        name = f"v2-{suffix}" if suffix != "no-reinit" else "v2-no-reinit-no-ack"
        also = meaning("no-ack") if suffix == "no-reinit" else {}
        protocol = Protocol.parse(name, scenario)
        assert (protocol.name, protocol.dirty_streams) == (name, 0)
        applied = protocol.applied(scenario)
        assert flat(applied) == flat(scenario) | meaning(suffix) | also
        rest = {"vmm", "driver"}
        assert applied.model_dump(exclude=rest) == scenario.model_dump(exclude=rest)


def test_a_name_is_what_the_vmm_does() -> None:
    applied = Protocol.parse("v2-multifd-reinit-flush-ack-reusable-polls", SCENARIO).applied(SCENARIO)
    options = applied.v2_options()
    assert (options.reinit, options.ack, options.polls) == (True, Ack.REUSABLE, True)
    assert options.devices_by_multifd is not None
    assert options.channels == 1 + SCENARIO.vmm.multifd_channels
    plain = SCENARIO.v2_options()
    assert (plain.reinit, plain.ack, plain.polls, plain.multifd, plain.channels) == (False, Ack.OFF, False, None, 1)


def test_single_keeps_multifd_for_ram_only() -> None:
    """As QEMU before 10.0: RAM has channels of its own, the devices' data stays on the main one."""
    scenario = small_scenario({"vmm.multifd": True})
    options = Protocol.parse("v2-single", scenario).applied(scenario).v2_options()
    assert options.multifd is not None
    assert options.devices_by_multifd is None


@given(st.tuples(*(st.sampled_from(choice) for choice in CHOICES)), st.randoms())
def test_any_choice_of_suffixes_in_any_order_means_all_of_them(parts: tuple[str, ...], order: Any) -> None:
    shuffled = list(parts)
    order.shuffle(shuffled)
    name = "v2" + "".join(shuffled)
    wanted = flat(SCENARIO) | meaning(*filter(None, parts))
    if wanted["vmm.switchover_ack"] == "reusable" and not wanted["vmm.reinit"]:
        with pytest.raises(UserError, match="a reusable ack goes with REINIT only"):
            Protocol.parse(name, SCENARIO)
    else:
        assert flat(Protocol.parse(name, SCENARIO).applied(SCENARIO)) == wanted


@pytest.mark.parametrize("streams", [1, 9, 10, 64])
def test_v3_is_named_with_its_streams(streams: int) -> None:
    assert Protocol.parse(f"v3-n{streams}", SCENARIO) == Protocol(f"v3-n{streams}", streams)


def test_v3_alone_takes_the_scenarios_number_of_streams() -> None:
    assert Protocol.parse("v3", small_scenario({"v3.dirty_streams": 7})) == Protocol("v3-n7", 7)


def test_v3_changes_nothing_of_the_scenario() -> None:
    assert Protocol.parse("v3-n2", EVERYTHING).applied(EVERYTHING) == EVERYTHING


# --- what is refused -------------------------------------------------------------------------------------------------

CONTRADICTIONS = [(one, other) for choice in CHOICES for one, other in itertools.permutations(filter(None, choice), 2)]


@pytest.mark.parametrize(("one", "other"), CONTRADICTIONS)
def test_suffixes_that_contradict_each_other_are_refused(one: str, other: str) -> None:
    name = f"v2{one}{other}"
    with pytest.raises(UserError) as refused:
        Protocol.parse(name, SCENARIO)
    assert str(refused.value) == f"protocol {name!r}: {other} contradicts what comes before it"


def test_a_suffix_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UserError, match="-multifd is there twice"):
        Protocol.parse("v2-multifd-polls-multifd", small_scenario())


def test_a_contradiction_is_found_behind_other_suffixes() -> None:
    with pytest.raises(UserError, match="-deduces contradicts"):
        Protocol.parse("v2-polls-multifd-ack-deduces", SCENARIO)


@pytest.mark.parametrize("name", ["", "V2", "v1", "v22", "v3-n", "v3-n0", "v3-n01", "v3-n65", "v3-n-1", "v3-n1 ", "4"])
def test_a_name_that_is_none_is_answered_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown protocol .*; there are v2, v2 with any of -multifd, .*v3-n1 to v3-n"):
        Protocol.parse(name, SCENARIO)


@pytest.mark.parametrize("name", ["v3-multifd", "v3-n2-ack", "v3-n2-n4", "v3\n"])
def test_v3_has_no_suffixes(name: str) -> None:
    with pytest.raises(UserError, match="unknown protocol"):
        Protocol.parse(name, SCENARIO)


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("v2-n1", "-n1"),
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
    ],
)
def test_an_unknown_suffix_is_shown_and_answered_with_those_that_there_are(name: str, rest: str) -> None:
    with pytest.raises(UserError) as refused:
        Protocol.parse(name, SCENARIO)
    told = str(refused.value)
    assert told.startswith(f"unknown protocol {name!r}: {rest!r} is none of -")
    assert all(f"-{suffix}" in told for suffix in MEANING)


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(UserError, match=r"did you mean v3\?"):
        Protocol.parse("v33", SCENARIO)


def test_a_reusable_ack_needs_reinit_from_the_name_or_from_the_scenario() -> None:
    with pytest.raises(UserError, match="REINIT only: add -reinit-flush or -reinit-invalidate"):
        Protocol.parse("v2-ack-reusable", SCENARIO)
    with_reinit = small_scenario({"vmm.reinit": True})
    assert Protocol.parse("v2-ack-reusable", with_reinit).applied(with_reinit).vmm.switchover_ack == "reusable"
    with pytest.raises(UserError, match="a reusable ack goes with REINIT only"):
        Protocol.parse("v2-no-reinit", EVERYTHING)


# --- names in tables -------------------------------------------------------------------------------------------------

NAMES = ["v2", "v2-multifd", "v2-reinit-invalidate-ack-reusable-polls", "v2-no-ack-single", "v3-n1", "v3-n12"]


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_is_made_again_from_its_name(name: str) -> None:
    protocol = Protocol.parse(name, SCENARIO)
    assert protocol.name == name
    assert Protocol.parse(protocol.name, SCENARIO) == protocol
    assert pickle.loads(pickle.dumps(protocol)) == protocol, "it goes to other processes"


def test_names_survive_a_run_and_a_table(tmp_path: Any) -> None:
    outcomes = [simulate(SCENARIO, Protocol.parse(name, SCENARIO), 1) for name in NAMES]
    frame = results.table(outcomes)
    results.ResultFolder(tmp_path).write_table(frame, "runs", "csv")
    names = pl.read_csv(tmp_path / "runs.csv")["protocol"].to_list()
    assert names == NAMES
    assert [Protocol.parse(name, SCENARIO).name for name in names] == NAMES
