# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 new-scenario` and `proto-v3 schema`: a file to begin with, and what an editor knows of one."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from experiments.commands.new_scenario import scenario_text
from sim.scenario.file import load, model_in, parse
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.schema import json_schema, meanings, tables_in
from sim.scenario.shipped import shipped_bases
from sim.scenario.tables import Published
from sim.scenario.units import unit_of
from tests.build.cli import proto_v3
from tests.build.scenario import small_scenario, small_tables, small_text

ALL = sorted(shipped_bases())


KEY = re.compile(r"((?:^# .*\n)+)^#((\w+) = )", re.MULTILINE)
"""A commented key, with the comment above it."""


def told(comment: str) -> str:
    return " ".join(comment.replace("#", " ").split())


@pytest.mark.parametrize("base", ALL)
def test_a_new_file_is_its_base_and_every_key_in_it_can_be_taken(base: str) -> None:
    was = load(str(shipped_bases()[base]))
    text = scenario_text("mine", base, was)
    mine = parse(text, "mine.toml")
    same = {"name", "description", "published"}
    assert mine.model_dump(exclude=same) == was.model_dump(exclude=same)
    taken = KEY.sub(lambda key: f"{key[1]}{key[2]}" if f"{base}: " in told(key[1]) else key[0], text)
    whole = parse(taken, "x.toml")
    assert whole.model_dump(exclude=same | {"sources", "ranges"}) == was.model_dump(
        exclude=same | {"sources", "ranges"}
    )
    assert whole.sources == dict.fromkeys(parameters(was), "yours: x.toml")
    assert whole.ranges == {}, "what the user sets, the user knows"


def test_each_key_says_its_range_and_a_range_can_be_given() -> None:
    ranges = {"firmware.engines": {"low": 1.0, "high": 4.0, "why": "one to four were seen"}}
    base = small_scenario({"ranges": ranges})
    text = scenario_text("mine", "small.toml", base)
    (comment,) = (told(comment) for comment, _, key in KEY.findall(text) if key == "engines")
    assert comment.endswith("small: 2.0 (yours: small.toml). Range: 1 to 4 (one to four were seen).")
    given = scenario_text("mine", "mlx5", load(str(shipped_bases()["mlx5"])))
    taken = given.replace('#"link.gbit_per_s" = {', '"link.gbit_per_s" = {')
    assert parse(taken, "mine.toml").ranges["link.gbit_per_s"].words == "25 to 100"


def test_each_key_says_its_unit_its_value_in_the_base_and_the_source() -> None:
    text = scenario_text("mine", "mlx5-2vf", load("mlx5-2vf"))
    before = "Before the first byte; the guest runs."
    keys = [(key, told(comment)) for comment, _, key in KEY.findall(text)]
    assert ("setup_ms", f"{before} In milliseconds. mlx5-2vf: 380.0 (published: setup 380 ms).") in keys
    assert ("frame_mib", "Pages are sent in frames of this size. In MiB. Default: 1.0.") in keys
    for key, comment in keys:
        unit = unit_of(key)
        assert unit is None or unit[0].removeprefix("a ") in comment, key


def test_it_is_written_once_and_compared_as_it_is(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "new-scenario", "mine", "--extends", "nic-reconfig")
    assert done.returncode == 0, done.stderr
    assert proto_v3(tmp_path, "scenarios", "mine.toml").returncode == 0
    changed = (tmp_path / "mine.toml").read_text().replace("#size_gib = 16.0", "size_gib = 16.0")
    (tmp_path / "mine.toml").write_text(changed)
    shown = proto_v3(tmp_path, "scenarios", "mine.toml", COLUMNS="200").stdout
    assert re.search(r"^ram.size_gib +16 +yours: mine.toml *$", shown, re.MULTILINE)
    again = proto_v3(tmp_path, "new-scenario", "mine.toml")
    assert again.returncode == 2
    assert "mine.toml: is there already" in again.stderr
    assert (tmp_path / "mine.toml").read_text() == changed
    more = proto_v3(tmp_path, "new-scenario", "more", "--extends", "mine.toml")
    assert more.returncode == 0, more.stderr
    assert "extends mine, which extends nic-reconfig" in " ".join(
        proto_v3(tmp_path, "scenarios", "more.toml").stdout.replace("Extends", "extends").split()
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a b"], "name = 'a b'"),
        (["../a"], "name = '../a'"),
        ([""], "name = ''"),
        (["mine", "--extends", "mlx6"], "did you mean mlx5?"),
        (["mine", "--extends", "."], "is a folder"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = proto_v3(tmp_path, "new-scenario", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_control_characters_stays_a_comment(tmp_path: Path) -> None:
    text = small_text({"sources": {"ram.size_gib": "assumed: a\nname = 'x'\x1b[2J"}})
    base = parse(text, "base.toml")
    (tmp_path / "base.toml").write_text(text)
    assert parse(scenario_text("mine", str(tmp_path / "base.toml"), base), str(tmp_path / "mine.toml")).name == "mine"


# --- the schema -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> jsonschema.Draft202012Validator:
    """As an editor checks a file."""
    printed = proto_v3(tmp_path_factory.mktemp("schema"), "schema").stdout
    schema = json.loads(printed)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(editor: jsonschema.Draft202012Validator, tables: dict[str, Any]) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in editor.iter_errors(tables)]


def test_every_shipped_file_fits_the_schema(editor: jsonschema.Draft202012Validator) -> None:
    for name, path in shipped_bases().items():
        assert problems(editor, tomllib.loads(path.read_text(encoding="utf-8"))) == [], name
    assert problems(editor, small_tables()) == []


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"extends": "mlx5", "link": {"gbit_per_sec": 1}}, "link: .*'gbit_per_sec' was unexpected"),
        ({"extends": "mlx5", "link": {"gbit_per_s": "fast"}}, "link.gbit_per_s: 'fast' is not of type 'number'"),
        ({"extends": "mlx5", "device": [{"count": 65}]}, "device.0.count: 65 is greater"),
        ({"extends": "mlx5", "driver": {"lock": "big"}}, "driver.lock: 'big' is not one of"),
        ({"extends": "mlx5", "sources": {"ram.size_gib": "guess"}}, "sources.ram.size_gib: 'guess' does not match"),
        (
            {"extends": "mlx5", "ranges": {"ram.size_gib": {"low": 1, "high": 2}}},
            "ranges.ram.size_gib: 'why' is a requ",
        ),
        ({"extends": "mlx5", "ranges": {"ram.size_gib": {"lwo": 1, "why": "x"}}}, "'lwo' was unexpected"),
        (small_tables({"ranges": {"ram.size_gib": {"any": [1], "why": "x"}}}), "ranges.ram.size_gib.any: .* too short"),
        (small_tables({"link.round_trip_us": None}), "link: 'round_trip_us' is a required property"),
        (small_tables({"vmm": None}), "'vmm' is a required property"),
        (small_tables({"device.0.writes": {"hot_share": 0.5}}), "device.0.writes: 'mib_per_s' is a required property"),
    ],
)
def test_an_editor_sees_what_is_wrong(
    editor: jsonschema.Draft202012Validator, tables: dict[str, Any], told: str
) -> None:
    (problem,) = problems(editor, tables)
    assert re.search(told, problem)


def test_the_schema_says_what_a_key_means_and_its_unit() -> None:
    schema = json_schema()
    vmm = schema["$defs"]["Vmm"]["properties"]
    assert vmm["downtime_limit_ms"]["description"].endswith("In milliseconds.")
    assert vmm["reinit"]["description"] == "Opts in to PRECOPY_INFOv2."
    assert "null" not in json.dumps(schema)
    for model in set(tables_in(Scenario)) - {Scenario, Published}:
        values = {key for key, field in model.model_fields.items() if model_in(field.annotation) is None}
        assert values - meanings(model).keys() == set(), f"{model.__name__}: keys of which nothing is said"
