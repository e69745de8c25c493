# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 fit`: what it prints and writes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from experiments import api
from experiments.logs.how import how
from proto_v3.errors import UserError
from proto_v3.timeline import PHASES
from sim.scenario.file import load
from tests.build.cli import proto_v3
from tests.build.fit_cases import known_logs
from tests.real.qemu.pairs import FOLDER as PAIRS


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    source, target, _ = known_logs(tmp_path_factory.mktemp("logs"))
    return source, target


def test_a_scenario_a_figure_and_tables(logs: tuple[str, str], tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "fit", *logs, "--out", "new/mine.toml", "--samples", "2", "--jobs", "1", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"] == "new/mine.toml"
    assert set(told["tables"]) == {"phases", "steps", "quantities", "changes"}
    phases = {row["phase"]: row for row in told["tables"]["phases"]["rows"]}
    assert list(phases) == [*PHASES, "downtime"]
    assert sum(phases[name]["real_ms"] for name in PHASES) == pytest.approx(phases["downtime"]["real_ms"])
    scenario = load(str(tmp_path / "new/mine.toml"))
    assert scenario.name == "mine"
    assert [device.name for device in scenario.devices] == ["vf0", "vf1"]
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".toml", ".png", ".svg"}
    for command in (["scenarios", "new/mine.toml"], ["compare", "new/mine.toml", "--seeds", "1", "--jobs", "1"]):
        again = proto_v3(tmp_path, *command)
        assert again.returncode == 0, again.stderr
    held = proto_v3(tmp_path, "validate", "new/mine.toml", "--seeds", "1", "--samples", "2", "--jobs", "1", "--json")
    rows = {row["what"]: row for row in json.loads(held.stdout)["tables"]["mine"]["rows"]}
    assert {"config load 0", "config load 1", "downtime"} <= rows.keys()
    assert rows["downtime"]["published_ms"] == pytest.approx(phases["downtime"]["real_ms"], abs=0.001)
    assert rows["downtime"]["simulated_ms"] == pytest.approx(phases["downtime"]["simulated_ms"], rel=0.01)
    assert {what: row["kind"] for what, row in rows.items()} == {
        "stop": "fitted",
        "config load 0": "fitted",
        "config load 1": "fitted",
        "downtime": "predicted",
    }


def test_the_command_that_it_names_quotes_the_file(logs: tuple[str, str], tmp_path: Path) -> None:
    """The scenario's own name has other characters; its head says FILE."""
    done = proto_v3(tmp_path, "fit", *logs, "--samples", "0", "--quiet", "--out", "a b[1].toml")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1].partition("proto-v3 decide ")[2])
    assert words[0] == "a b[1].toml"
    assert words[1] == "--near-ms"
    text = (tmp_path / "a b[1].toml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#   proto-v3")]
    assert [line.split()[3] for line in head] == ["FILE"] * 3


def test_without_out_nothing_is_written(logs: tuple[str, str], tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "fit", *logs, "--samples", "0", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "The guest stood still for" in done.stdout
    assert "parameter" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays(logs: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine")
    done = proto_v3(tmp_path, "fit", *logs, "--out", "mine.toml")
    assert done.returncode == 2
    assert "mine.toml is there already" in done.stderr
    assert (tmp_path / "mine.toml").read_text() == "mine"
    done = proto_v3(tmp_path, "fit", *logs, "--out", "mine.toml", "--samples", "0", "--force")
    assert done.returncode == 0, done.stderr
    assert load(str(tmp_path / "mine.toml")).name == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.log"], "name two logs"),
        (["x.log", "y.log", "--out", "x.txt"], "must be the name of a .toml file"),
        (["x.log", "y.log"], "x.log: cannot be read: No such file"),
        (["x.log", "y.log", "--extends", "nothing"], "no scenario 'nothing'"),
        (["x.log", "y.log", "--samples", "100000"], "must be at most"),
        (["x.log", "y.log", "--migration", "0"], "--migration"),
    ],
)
def test_mistakes(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "fit", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_how_is_printed_without_logs(tmp_path: Path) -> None:
    assert proto_v3(tmp_path, "fit", "--how").stdout == how()


def test_a_fit_that_is_far_off_says_so(tmp_path: Path) -> None:
    pair = [str(PAIRS / "one-11.1" / f"{side}.log.gz") for side in ("source", "target")]
    asked = ["fit", *pair, "--samples", "0", "--quiet"]
    assert "too far off" not in proto_v3(tmp_path, *asked).stdout
    assert "too far off" in proto_v3(tmp_path, *asked, "--extends", "stop-only").stdout


def test_from_python(logs: tuple[str, str]) -> None:
    machine = api.fit(*logs)
    assert api.real_phases(machine)["phase"].to_list() == [*PHASES, "downtime"]
    assert set(api.fitted_quantities(machine)["known"]) == {"measured", "bounded", "assumed", "cannot be told"}
    assert "config" in api.real_steps(machine)["step"].to_list()
    helped = api.what_would_help(machine, 2)
    assert helped["change"].to_list()[0] == "as it is"
    assert api.draw_fit(machine).axes
    with pytest.raises(UserError, match="no event of QEMU"):
        api.fit(__file__, logs[1])


def test_a_real_pair_from_its_packed_logs() -> None:
    folder = PAIRS / "pair-11.1"
    machine = api.fit(folder / "source.log.gz", folder / "target.log.gz")
    assert machine.waterfall.downtime_ms is not None
    assert machine.waterfall.downtime_ms > 1000
