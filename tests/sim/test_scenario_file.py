# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenario files: finding, reading, building on others, and changing single values from the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proto_v3.errors import UserError
from sim.device.guest import make_activity
from sim.scenario import shipped as of_project
from sim.scenario.file import bases, changes, find, from_dump, load, parse
from sim.scenario.scenario import Scenario, parameters, value_at
from sim.scenario.shipped import shipped, shipped_bases
from sim.scenario.units import NS_PER_S
from tests.build.scenario import small_scenario, small_tables, small_text, to_toml

# --- finding and reading a file --------------------------------------------------------------------------------------


def test_a_scenario_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    name, path = next(iter(shipped().items()))
    assert find(name) == path
    mine = tmp_path / "mine.toml"
    mine.write_text(small_text())
    assert find(str(mine)) == mine
    assert same(load(str(mine)), small_scenario())


def test_a_missing_file_is_told_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no scenario 'no/such\.toml': neither a file nor one of .*") as caught:
        load("no/such.toml")
    assert all(name in str(caught.value) for name in shipped())


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(UserError, match=r"no scenario 'mlx5-2fv'.*did you mean mlx5-2vf\?"):
        load("mlx5-2fv")


def test_a_file_without_its_ending_or_nearly_right_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text('extends = "machnie.toml"\n')
    (tmp_path / "machine.toml").write_text(small_text())
    with pytest.raises(UserError, match=r"did you mean x\.toml\?"):
        load("x")
    with pytest.raises(UserError, match=r"x\.toml: extends: .*did you mean machine\.toml\?"):
        load("x.toml")


def test_a_folder_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; a scenario is a TOML file") as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"", "empty; a scenario needs", id="empty"),
        pytest.param(b"# nothing but a comment\n", "empty; a scenario needs", id="comment"),
        pytest.param(b"name = \xff\n", r"not UTF-8 text \(byte 7\)", id="not UTF-8"),
        pytest.param(small_text().encode("utf-16"), r"not UTF-8 text but UTF-16", id="UTF-16"),
        pytest.param(b"#" * (1 + (4 << 20)), "more than 4 MiB", id="too large"),
        pytest.param(b"[ram\nsize_gib = 1.0\n", r"not valid TOML: .*line 1", id="broken"),
        pytest.param(b"a = 1\na = 2\n", r"not valid TOML: .*line 2", id="a key twice"),
        pytest.param(b"size_gib = 1.0.0\n", "not valid TOML", id="no number"),
        pytest.param(b"a = " + 5000 * b"9", "not valid TOML", id="a number of 5000 digits"),
        pytest.param(b"a = " + 100_000 * b"[", "not valid TOML", id="nested without end"),
    ],
)
def test_a_file_that_is_no_scenario_is_told_with_its_name(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        load(str(file))
    assert str(caught.value).startswith(f"{file}: ")


def test_a_name_with_thousands_of_dots_is_told_as_that() -> None:
    with pytest.raises(UserError, match=r"^my\.toml: nested too deeply"):
        parse(f"[{'.'.join(5000 * ['a'])}]\nb = 1\n", "my.toml")


# --- files that build on others --------------------------------------------------------------------------------------

OWN = {"name": "mine", "description": "Built on the small one"}
"""What every file has to say itself."""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of the given tables; without them, the small scenario with sources."""

    def write(name: str, own: Mapping[str, Any] | None = None) -> str:
        sources = {"ram.size_gib": "published: so", "driver.chunks": "kernel: so", "device.0.state_mib": "derived: so"}
        text = to_toml(OWN | own) if own is not None else small_text({"sources": sources})
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def stated(scenario: Scenario) -> dict[str, str]:
    """The sources, but for those that say only which of the user's files set the value."""
    return {key: source for key, source in scenario.sources.items() if source != "yours: base.toml"}


def same(one: Scenario, other: Scenario) -> bool:
    """All but their sources, which name the files."""
    return one.model_copy(update={"sources": other.sources}) == other


def refused(path: str, settings: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(path, settings or [])
    return str(caught.value)


def test_what_a_file_says_replaces_what_its_base_says_and_nothing_else(write: Write) -> None:
    write("base.toml")
    mine = load(write("mine.toml", {"extends": "base.toml", "driver": {"chunks": 3}, "vmm": {"read_mib": 0.5}}))
    assert same(mine, small_scenario({"driver.chunks": 3, "vmm.read_mib": 0.5} | OWN))


def test_devices_are_merged_by_position_and_what_is_over_is_appended(write: Write) -> None:
    write("base.toml")
    more = small_tables()["device"][0] | {"name": "more"}
    mine = load(write("mine.toml", {"extends": "base.toml", "device": [{"critical": {"objects": 9}}, more]}))
    first, second = mine.device
    assert first == small_scenario({"device.0.critical.objects": 9}).device[0]
    assert second.name == "more"


def test_published_figures_are_never_inherited(write: Write) -> None:
    write("base.toml", small_tables({"published": [{"citation": "somebody", "downtime_ms": 5.0}]}))
    assert load(write("mine.toml", {"extends": "base.toml"})).published == []


@pytest.mark.parametrize(
    ("file", "name"), [("my nic ✓ 2.toml", "my-nic-2"), (f"{200 * 'x'}.toml", 64 * "x"), ("_.toml", "scenario")]
)
def test_a_name_and_a_description_can_be_left_out(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / file
    path.write_text('extends = "mlx5-2vf"\n')
    mine = load(str(path))
    assert mine.name == name
    assert mine.description == f"changed from mlx5-2vf: {load('mlx5-2vf').description}"
    path.write_text(small_text({"description": None}))
    assert load(str(path)).description == "no description"


def test_a_device_that_nobody_writes_to_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "idle.toml"
    path.write_text(
        'extends = "nic-reconfig"\n[[device]]\nwrites.mib_per_s = 0.0\nreconfigurations.poisson_per_s = 0.0\n'
    )
    (idle,) = load(str(path)).devices
    activity = make_activity(idle, 10 * NS_PER_S, np.random.default_rng(1))
    assert (activity.write_blocks.size, activity.reconfiguration_ns.size) == (0, 0)
    (device,) = load("nic-reconfig", ["device.0.writes.mib_per_s=0", "device.0.stop_only_mib=512"]).devices
    assert make_activity(device, NS_PER_S, np.random.default_rng(1)).write_blocks.size == 0, (
        "also where no block is writable"
    )
    path.write_text('extends = "mlx5-2vf"\n[[device]]\nwrites.mib_per_s = 0\n')
    assert load(str(path)).devices[0].writes is not None, "mlx5-2vf says nothing of writes: one key is enough"


def test_published_figures_replace_the_bases_as_a_whole(write: Write) -> None:
    write("base.toml", small_tables({"published": [{"citation": "somebody", "stop_ms": 5.0}, {"citation": "x"}]}))
    mine = load(write("mine.toml", {"extends": "base.toml", "published": [{"citation": "me", "downtime_ms": 5.0}]}))
    (published,) = mine.published
    assert published.citation == "me"
    assert published.figures() == {"downtime_ms": 5.0}


def test_a_source_stays_while_nobody_sets_its_value_anew(write: Write) -> None:
    write("base.toml")
    own = {"extends": "base.toml", "driver": {"chunks": 2}, "vmm": {"setup_ms": 9.0}}  # there are 2 in the base too
    assert stated(load(write("mine.toml", own))) == {
        "ram.size_gib": "published: so",
        "driver.chunks": "yours: mine.toml",
        "device.0.state_mib": "derived: so",
        "vmm.setup_ms": "yours: mine.toml",
    }


def test_every_value_of_a_users_file_has_a_source(write: Write) -> None:
    scenario = load(write("mine.toml", small_tables() | OWN))
    assert dict.fromkeys(parameters(scenario), "yours: mine.toml") == scenario.sources


def test_a_value_that_the_user_sets_as_it_was_is_the_users() -> None:
    """Of a shipped scenario, whose sources are all stated."""
    was = load("mlx5-2vf")
    scenario = parse('extends = "mlx5-2vf"\nname = "mine"\ndescription = "x"\nlink.gbit_per_s = 100.0\n', "my.toml")
    assert scenario.link == was.link
    assert scenario.sources == was.sources | {"link.gbit_per_s": "yours: my.toml"}
    assert load("mlx5-2vf", ["link.gbit_per_s=100.0"]).sources == was.sources | {"link.gbit_per_s": "yours: --set"}


def test_a_source_of_a_changed_value_is_dropped_unless_it_is_given_anew(write: Write) -> None:
    write("base.toml")
    own = {
        "extends": "base.toml",
        "driver": {"chunks": 3},
        "device": [{"state_mib": 4.0}],
        "sources": {"driver.chunks": "assumed: mine", "vmm.setup_ms": "assumed: of a value of the base"},
    }
    assert stated(load(write("mine.toml", own))) == {
        "ram.size_gib": "published: so",
        "device.0.state_mib": "yours: mine.toml",
        "driver.chunks": "assumed: mine",
        "vmm.setup_ms": "assumed: of a value of the base",
    }


def test_a_source_is_dropped_wherever_in_a_chain_the_value_changes(write: Write) -> None:
    write("base.toml")
    write("middle.toml", {"extends": "base.toml", "driver": {"chunks": 3}})
    mine = write("mine.toml", {"extends": "middle.toml", "driver": {"chunks": 2}})  # as in the base, but by our choice
    assert load(mine).sources["driver.chunks"] == "yours: mine.toml"
    assert load(str(Path(mine).with_name("middle.toml"))).sources["driver.chunks"] == "yours: middle.toml"
    assert load(mine).sources["ram.size_gib"] == "published: so"


def test_a_wrong_source_of_the_base_is_still_told(write: Write) -> None:
    write("base.toml", small_tables({"sources": {"ram.siz_gib": "assumed: x"}}))
    assert "sources.ram.siz_gib = 'assumed: x'" in refused(write("mine.toml", {"extends": "base.toml"}))


def test_a_chain_is_followed_from_folder_to_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write("below/base.toml")
    write("below/middle.toml", {"extends": "base.toml", "driver": {"chunks": 3}, "vmm": {"setup_ms": 2.0}})
    mine = write("mine.toml", {"extends": "below/middle.toml", "vmm": {"setup_ms": 3.0}})
    scenario = load(mine)
    assert (scenario.driver.chunks, scenario.vmm.setup_ms, scenario.ram.size_gib) == (3, 3.0, 0.0625)
    assert [path.name for path in bases(mine)] == ["middle.toml", "base.toml"]


def test_a_shipped_name_goes_before_a_file(write: Write) -> None:
    mine = load(write("mine.toml", {"extends": "mlx5-2vf", "vmm": {"give_up_s": 3.0}}))
    assert mine.device == load("mlx5-2vf").device
    assert mine.vmm.give_up_s == 3.0


def test_a_base_is_found_by_name_but_is_no_scenario_to_run(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    tables = small_tables({"name": None, "description": None, "device": None})
    (tmp_path / "base/machine.toml").write_text(to_toml(tables))
    write("run-me.toml", small_tables() | {"name": "run-me"})
    monkeypatch.setattr(of_project, "FOLDER", tmp_path)
    assert list(shipped()) == ["run-me"]
    assert sorted(shipped_bases()) == ["machine", "run-me"]
    with pytest.raises(
        UserError, match=r'^machine is no scenario, but .* a file that begins with extends = "machine"$'
    ):
        find("machine")
    own = {"extends": "machine", "device": small_tables()["device"]}
    (tmp_path / "elsewhere").mkdir()
    assert load(write("elsewhere/mine.toml", own)).driver == small_scenario().driver
    told = refused(write("mine.toml", {"extends": "machin"}))
    assert "no scenario 'machin': neither a file nor one of machine, mine, run-me; did you mean machine?" in told


@pytest.mark.parametrize("state_mib", [4.0, 300.0])
def test_of_a_device_whose_size_alone_is_known_all_moves_when_it_is_stopped(write: Write, state_mib: float) -> None:
    path = write("mine.toml", {"extends": "mlx5", "device": [{"count": 3, "state_mib": state_mib}]})
    scenario = load(path)
    assert [device.stop_only_blocks for device in scenario.devices] == [scenario.device[0].blocks] * 3
    assert parameters(scenario)["device.0.stop_only_mib"] == state_mib
    assert scenario.sources["device.0.stop_only_mib"].startswith("derived: ")
    assert load(path, ["device.0.state_mib=7"]).device[0].stop_only_mib == 7
    assert load(path, ["device.0.stop_only_mib=0"]).device[0].stop_only_mib == 0
    assert from_dump(scenario.model_dump(mode="json"), "a manifest") == scenario


CUT = {
    "link.gbit_per_s": (10, "link.per_connection_gbit_per_s", 10.0),
    "device.0.state_mib": (2.0, "device.0.stop_only_mib", 2.0),
    "ram.size_gib": (0.03125, "ram.working_set_mib", 32.0),
    "host.memory_gib_per_s": (3.0, "host.copy_gib_per_s", 3.0),
    "link.socket_buffer_mib": (0.5, "vmm.read_mib", 0.5),
}


@pytest.mark.parametrize("key", CUT)
def test_what_is_inherited_is_cut_where_a_user_leaves_no_room_for_it(write: Write, key: str) -> None:
    limit, below, most = CUT[key]
    table, *_, name = key.split(".")
    own = {name: limit}
    mine = write("mine.toml", {"extends": "mlx5-2vf", table: [own] if table == "device" else own})
    for scenario in (load("mlx5-2vf", [f"{key}={limit}"]), load(mine)):
        assert value_at(scenario, below) == most
        assert re.fullmatch(r"derived: no more than there is; [0-9.]+ is inherited", scenario.sources[below])
        assert below not in scenario.ranges


def test_what_a_user_said_is_never_cut(write: Write) -> None:
    both = {"link": {"gbit_per_s": 10.0, "per_connection_gbit_per_s": 25.0}}
    assert "per_connection_gbit_per_s = 25: must be at most" in refused(write("both.toml", {"extends": "mlx5"} | both))
    write("mine.toml", {"extends": "mlx5", "link": {"per_connection_gbit_per_s": 25.0}})
    less = write("less.toml", {"extends": "mine.toml", "link": {"gbit_per_s": 10.0}})
    assert "per_connection_gbit_per_s = 25: must be at most" in refused(less)
    sources = {"link.per_connection_gbit_per_s": "published: so"}
    write("wrong.toml", {"extends": "mlx5", "link": both["link"], "sources": sources})
    assert "per_connection_gbit_per_s = 25: must be at most" in refused(write("mine.toml", {"extends": "wrong.toml"}))
    settings = ["ram.nonzero_gib=5", "ram.size_gib=4"]
    assert "ram.nonzero_gib = 5: must be at most size_gib = 4" in refused("mlx5-2vf", settings)


def test_no_shipped_base_has_the_name_of_a_shipped_scenario() -> None:
    in_folder = {path.stem for path in (of_project.FOLDER / "base").glob("*.toml")}
    assert in_folder & shipped().keys() == set()


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"mine": "mine"}, ["mine", "mine"]),
        ({"mine": "other", "other": "mine"}, ["mine", "other", "mine"]),
        ({"mine": "a", "a": "b", "b": "a"}, ["mine", "a", "b", "a"]),
        ({"mine": "sub/../mine"}, ["mine", "sub/../mine"]),
    ],
    ids=["itself", "two", "below", "another way to say it"],
)
def test_a_circle_is_told_with_all_of_its_files(
    write: Write, tmp_path: Path, files: dict[str, str], circle: list[str]
) -> None:
    (tmp_path / "sub").mkdir()
    for name, base in files.items():
        write(f"{name}.toml", {"extends": f"{base}.toml"})
    told = refused(str(tmp_path / "mine.toml"))
    assert told == f"{tmp_path / 'mine.toml'}: extends leads in a circle: " + " -> ".join(
        str(tmp_path / f"{name}.toml") for name in circle
    )


@pytest.mark.parametrize(
    ("extends", "told"),
    [
        ("no-such.toml", "extends: no scenario 'no-such.toml': neither a file nor one of"),
        ("mlx5-2fv", "did you mean mlx5-2vf?"),
        ("", "extends: no scenario ''"),
        (".", "extends: . is a folder; a scenario is a TOML file"),
        (3, "extends = 3: must be the name of a scenario or of a file"),
        (["mlx5-2vf"], "extends = ['mlx5-2vf']: must be the name of a scenario or of a file"),
        ("a\0b", "extends: no scenario 'a\\x00b'"),
        (300 * "x", "extends: no scenario 'xxx"),
    ],
)
def test_a_base_that_is_not_there_is_told_with_the_file_that_extends_it(
    write: Write, extends: object, told: str
) -> None:
    mine = write("mine.toml", {"extends": extends})
    message = refused(mine)
    assert message.startswith(f"{mine}: extends")
    assert told in message


def test_a_base_that_is_no_toml_is_told_with_both_files(write: Write, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[ram\n")
    mine = write("mine.toml", {"extends": "base.toml"})
    told = refused(mine)
    assert told.startswith(f"{tmp_path / 'base.toml'}: not valid TOML")
    assert told.endswith(f"; {mine} extends it")


def test_problems_are_told_with_the_file_and_what_it_extends(write: Write) -> None:
    base = write("base.toml")
    middle = write("middle.toml", {"extends": "base.toml"})
    mine = write("mine.toml", {"extends": "middle.toml", "driver": {"chunk": 3}, "vmm": {"setup_ms": -1.0}})
    first, *lines = refused(mine).splitlines()
    assert first == f"{mine}, which extends {middle}, which extends {base}: 2 problem(s)"
    assert any("driver.chunk = 3: unknown key; did you mean chunks?" in line for line in lines)
    assert any("vmm.setup_ms = -1.0: must be" in line for line in lines)


def test_a_list_of_tables_that_is_written_as_one_is_told_how_to_write_it(write: Write) -> None:
    told = refused(write("mine.toml", small_tables({"published": {"citation": "x"}})))
    assert "published = {'citation': 'x'}: must be a list of tables, each under [[published]]" in told


# --- what a file changes ---------------------------------------------------------------------------------------------


def test_changes_are_against_the_file_at_the_bottom(write: Write) -> None:
    write("base.toml")
    write("middle.toml", {"extends": "base.toml", "driver": {"chunks": 3}, "vmm": {"setup_ms": 2.0, "read_mib": 0.5}})
    own = {
        "extends": "middle.toml",
        "vmm": {"setup_ms": 1.0},  # as at the bottom again
        "device": [{"features": ["STOP_COPY"]}],
        "sources": {"driver.chunks": "assumed: so"},
        "published": [{"citation": "me", "downtime_ms": 1.0}],
    }
    assert changes(write("mine.toml", own)) == {
        "driver.chunks": (2, 3),
        "device.0.features": (["STOP_COPY", "P2P", "PRE_COPY"], ["STOP_COPY"]),
        "vmm.read_mib": (None, 0.5),
    }


def test_a_file_that_extends_nothing_changes_nothing(write: Write) -> None:
    assert changes(write("base.toml")) == {}
    assert bases(write("base.toml")) == []


# --- --set -----------------------------------------------------------------------------------------------------------


def test_what_is_set_is_as_if_the_file_said_it(write: Write) -> None:
    base = write("base.toml")
    settings = ["device.0.count=3", "driver.lock=device", 'device.0.features=["STOP_COPY"]', "vmm.read_mib = 0.5"]
    keys = {"device.0.count": 3, "driver.lock": "device", "device.0.features": ["STOP_COPY"], "vmm.read_mib": 0.5}
    assert same(load(base, settings), small_scenario(keys))


def test_the_last_value_of_a_key_counts(write: Write) -> None:
    assert load(write("base.toml"), ["driver.chunks=3", "driver.chunks=4"]).driver.chunks == 4


def test_what_is_set_over_an_extending_file_counts_before_it(write: Write) -> None:
    write("base.toml")
    mine = write("mine.toml", {"extends": "base.toml", "driver": {"chunks": 3}})
    assert load(mine, ["driver.chunks=4"]).driver.chunks == 4


def test_what_is_set_has_that_as_its_source(write: Write) -> None:
    settings = ["driver.chunks=3", "vmm.read_mib=0.5", "ram.size_gib=0.0625"]
    assert stated(load(write("base.toml"), settings)) == {
        "ram.size_gib": "yours: --set",  # the same as in the file
        "device.0.state_mib": "derived: so",
        "driver.chunks": "yours: --set",
        "vmm.read_mib": "yours: --set",
    }


def test_what_is_taken_away_takes_its_sources_with_it() -> None:
    sources = {"device.0.faults.0.arc": "assumed: x", "ram.size_gib": "assumed: x"}
    faults = [{"side": "target", "arc": "STOP -> RESUMING"}]
    text = small_text({"device.0.faults": faults, "sources": sources})
    scenario = parse(text, "my.toml", ["device.0.faults=[]"])
    assert scenario.device[0].faults == []
    assert scenario.sources["ram.size_gib"] == "assumed: x"
    assert scenario.sources["device.0.faults"] == "yours: --set"
    assert not [key for key in scenario.sources if key.startswith("device.0.faults.")]


def test_a_whole_table_can_be_set(write: Write) -> None:
    scenario = load(write("base.toml"), ['device.0.writes={pattern="uniform", mib_per_s=3}'])
    assert scenario.device[0].writes is not None
    assert scenario.device[0].writes.mib_per_s == 3
    assert scenario.sources["device.0.writes.pattern"] == "yours: --set"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("driver.lock=mutex", "driver.lock = 'mutex': must be 'none', 'per_fd', 'device' or 'global'"),
        ("driver.chunks=three", "driver.chunks = 'three': must be a valid integer"),
        ("driver.chunks=-1", "driver.chunks = -1: must be greater than or equal to 1"),
        ("driver.chunk=3", "driver.chunk = 3: unknown key; did you mean chunks?"),
        ("drivr.chunks=3", "drivr = {'chunks': 3}: unknown key; did you mean driver?"),
        ("device.0.stop_only_mib=9", "device.0.stop_only_mib = 9: must be at most state_mib = 8"),
        ("device.1.count=2", "device.1.name: missing; it is required"),
    ],
)
def test_a_bad_setting_is_told_as_in_the_file_and_with_where_it_comes_from(
    write: Write, setting: str, told: str
) -> None:
    base = write("base.toml")
    first, *lines = refused(base, [setting]).splitlines()
    assert first.startswith(f"{base}, with --set '{setting}': ")
    assert any(line.strip().startswith(told) for line in lines)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("driver.chunks", "must be KEY=VALUE, as in --set device.0.count=4"),
        ("", "must be KEY=VALUE"),
        ("driver.chunks=", "the value must be one as in TOML, or a word"),
        ("driver.chunks=1 2", "the value must be one as in TOML, or a word"),
        ("device.count=4", "'count': must be a place in the list, 0 to 1, as in device.0.count"),
        ("device.7.count=4", "'7': must be a place in the list, 0 to 1"),
        ("driver.chunks.x=4", "'x': there is a value in front of it, not a table"),
        ("name=other", "name is no parameter"),
        ("published.0.downtime_ms=1", "published is no parameter"),
        ('extends="mlx5-2vf"', "extends is no parameter"),
        ("sources=3", "sources is no parameter"),
    ],
)
def test_a_setting_that_means_nothing_is_told_as_it_was_given(write: Write, setting: str, told: str) -> None:
    assert refused(write("base.toml"), [setting]).startswith(f"--set {setting}: {told}")


# --- the protocol of published figures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        ("v4", "unknown protocol 'v4'"),
        ("", "unknown protocol ''"),
        ("v3", "must be the whole name, v3-n4"),
    ],
)
def test_published_figures_are_of_a_protocol_that_there_is(protocol: str, told: str) -> None:
    published = [{"citation": "x"}, {"citation": "x", "protocol": protocol}]
    with pytest.raises(UserError) as caught:
        parse(small_text({"published": published}), "my.toml")
    first, line = str(caught.value).splitlines()
    assert first == "my.toml: 1 problem(s)"
    assert line.startswith(f"  published.1.protocol = {protocol!r}: {told}")


def test_published_figures_are_of_v2_if_nothing_else_is_said() -> None:
    scenario: Scenario = small_scenario({"published": [{"citation": "x"}, {"citation": "x", "protocol": "v3-n2"}]})
    assert [published.protocol for published in scenario.published] == ["v2", "v3-n2"]


@pytest.mark.parametrize("key", ["device_save_ms", "load_total_ms", "load_waiting_ms", "load_writing_ms"])
def test_a_list_has_one_figure_a_device(key: str) -> None:
    published = [{"citation": "x", "downtime_ms": 1.0}, {"citation": "x", key: [1.0, 2.0]}]
    with pytest.raises(UserError, match=rf"published\.1\.{key} = \[1\.0, 2\.0\]: must have one value a device, 1"):
        parse(small_text({"published": published}), "my.toml")
    assert parse(small_text({"published": published, "device.0.count": 2}), "my.toml").published[1].figures() == {
        f"{key}.0": 1.0,
        f"{key}.1": 2.0,
    }
