# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as a user meets it; in a process of its own where that is what is tested."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from proto_v3.timeline import PHASES
from sim.scenario.file import load
from tests.build.cli import CLI, proto_v3
from tests.build.scenario import small_text

COMPARED = ("v2", "v2-multifd", "v3-n1", "v3-n4")
"""What `compare` runs if nothing else is said."""


def write_scenario(folder: Path, changes: dict[str, Any] | None = None) -> str:
    (folder / "mine.toml").write_text(small_text(changes), encoding="utf-8")
    return "mine.toml"


# --- help and lists --------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from experiments.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print('heavy:', {'numpy', 'matplotlib', 'polars', 'pydantic', 'rich', 'asyncio'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("compare", "validate", "scenarios"):
        assert command in done.stdout
    assert done.stdout.endswith("heavy: set()\n")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_compare_names_every_option_and_the_exit_statuses(tmp_path: Path, option: str) -> None:
    done = proto_v3(tmp_path, "compare", option)
    assert done.returncode == 0
    for word in ("--protocols", "--seeds", "--out", "--format", "--jobs", "130"):
        assert word in done.stdout


def test_version(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("proto-v3, version ")


def test_scenarios_are_listed(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "scenarios")
    assert done.returncode == 0
    for name in ("mlx5-2vf", "nic-reconfig", "vgpu-32g"):
        assert name in done.stdout


def test_a_scenarios_parameters_are_shown_with_their_sources(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "scenarios", "mlx5-2vf", COLUMNS="200")
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("device.0.state_mib"))
    assert line.split(maxsplit=2)[1] == "102.25"
    assert "published: vfio device" in line


def test_the_values_that_a_file_can_extend_are_shown_too(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "scenarios", "mlx5", "--json")
    shown = json.loads(done.stdout)
    assert (shown["name"], shown["extends"]) == ("mlx5", [])
    assert "firmware.engines" in [row["parameter"] for row in shown["parameters"]]


@pytest.fixture
def ranged(tmp_path: Path) -> str:
    """A file with a range; of all its other keys the source is only that it is the user's."""
    ranges = {"firmware.engines": {"low": 1.0, "high": 4.0, "why": "one to four were seen"}}
    sources = {"ram.size_gib": "assumed: any", "driver.chunks": "kernel: so", "link.gbit_per_s": "derived: so"}
    (tmp_path / "small.toml").write_text(small_text({"ranges": ranges, "sources": sources}))
    return "small.toml"


def test_a_range_and_its_reason_are_shown_and_what_has_none(tmp_path: Path, ranged: str) -> None:
    shown = proto_v3(tmp_path, "scenarios", ranged, COLUMNS="200").stdout
    told = r"^firmware.engines +2 +yours: small.toml *\n +1 to 4: one to four were seen *$"
    assert re.search(told, shown, re.MULTILINE)
    told = "Assumed, fitted or derived, and without a range (2): ram.size_gib, link.gbit_per_s."
    assert " ".join(shown.split()).endswith(told)
    (tmp_path / "bare.toml").write_text(small_text())
    assert "plausible" not in proto_v3(tmp_path, "scenarios", "bare.toml").stdout


def test_a_scenario_as_json_has_sources_and_ranges(tmp_path: Path, ranged: str) -> None:
    shown = json.loads(proto_v3(tmp_path, "scenarios", ranged, "--json").stdout)
    assert shown["without_range"] == ["ram.size_gib", "link.gbit_per_s"]
    rows = {row["parameter"]: row for row in shown["parameters"]}
    assert rows["firmware.engines"]["value"] == 2.0
    assert rows["firmware.engines"]["range"] == {"low": 1.0, "high": 4.0, "why": "one to four were seen"}
    assert rows["ram.size_gib"] == {
        "parameter": "ram.size_gib",
        "value": 0.0625,
        "source": "assumed: any",
        "range": None,
    }
    listed = json.loads(proto_v3(tmp_path, "scenarios", "--json").stdout)
    assert "mlx5-2vf" in [each["name"] for each in listed["scenarios"]]


@pytest.mark.parametrize(
    "command",
    [["scenarios"], ["compare", "--protocols", "v2", "--seeds", "1", "--quiet"], ["trace", "--protocol", "v2"]],
)
def test_what_is_set_outside_of_its_range_is_told(tmp_path: Path, ranged: str, command: list[str]) -> None:
    done = proto_v3(tmp_path, *command, ranged, "--set", "firmware.engines=8")
    assert done.returncode == 0
    told = (
        "proto-v3: note: firmware.engines = 8.0: --set, outside of what was plausible: 1 to 4 (one to four were seen)\n"
    )
    assert done.stderr == told
    assert proto_v3(tmp_path, *command, ranged, "--set", "firmware.engines=3").stderr == ""


# --- compare ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One comparison of the published machine, looked at from several sides."""
    folder = tmp_path_factory.mktemp("compared")
    command = [*CLI, "compare", "mlx5-2vf", "--seeds", "2"]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_compare_prints_what_it_found(compared: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = compared
    assert done.returncode == 0, done.stderr
    assert all(re.fullmatch(r"runs: \d of 8, .* left", line) for line in done.stderr.splitlines()), "progress only"
    for title in (
        "Mean downtime",
        "Downtime, ms",
        "Phases of the downtime, ms",
        "Critical path",
        "Time and bytes",
        "Published against simulated",
    ):
        assert title in done.stdout
    assert "out/mlx5-2vf/compare.png" in done.stdout
    assert "out/mlx5-2vf/manifest.json" in done.stdout
    assert "nan" not in done.stdout.lower()


def test_compare_writes_a_row_a_run_whose_phases_are_the_downtime(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    table = pl.read_parquet(compared[0] / "out/mlx5-2vf/runs.parquet")
    assert table.select("protocol", "seed").rows() == [(protocol, seed) for seed in (1, 2) for protocol in COMPARED]
    assert set(table["outcome"]) == {"COMPLETED"}
    assert table.select(f"phase_{name}_ns" for name in PHASES).sum_horizontal().equals(table["downtime_ns"])
    paths = [name for name in table.columns if name.startswith("path_")]
    assert table.select(paths).sum_horizontal().equals(table["downtime_ns"])
    assert table["path_unexplained_ns"].sum() == 0
    assert table["digest"].n_unique() == 8


def test_compare_writes_how_it_was_made(compared: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    manifest = json.loads((compared[0] / "out/mlx5-2vf/manifest.json").read_text())
    assert manifest["command"] == "proto-v3 compare mlx5-2vf --seeds 2"
    assert manifest["complete"] is True
    assert manifest["runs"] == manifest["runs_planned"] == 8
    assert manifest["seeds"] == [1, 2]
    assert manifest["protocols"] == list(COMPARED)
    assert manifest["outcomes"] == {name: {"COMPLETED": 2} for name in COMPARED}
    assert manifest["scenario"] == load("mlx5-2vf").model_dump(mode="json")
    assert manifest["versions"].keys() >= {"python", "proto-v3", "numpy", "polars", "matplotlib", "msgpack"}
    assert manifest["git_revision"]


def test_compare_draws_the_figure(compared: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder = compared[0] / "out/mlx5-2vf"
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "</svg>" in (folder / "compare.svg").read_text()
    written = {"compare.png", "compare.svg", "distribution.png", "distribution.svg", "manifest.json", "runs.parquet"}
    assert {path.name for path in folder.iterdir()} == written, "nothing half written is left"


@pytest.mark.slow
def test_csv_a_path_and_an_odd_folder(tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path)
    done = proto_v3(tmp_path, "compare", scenario, "--protocols", "v3-n2, v2", "--seeds", "2", "--first-seed", "5",
                    "--format", "csv", "--out", "deep er/größer ✓", "--jobs", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "deep er/größer ✓"
    assert not (folder / "runs.parquet").exists()
    table = pl.read_csv(folder / "runs.csv")
    assert table.select("protocol", "seed").rows() == [("v3-n2", 5), ("v2", 5), ("v3-n2", 6), ("v2", 6)]
    assert table.select(f"phase_{name}_ns" for name in PHASES).sum_horizontal().equals(table["downtime_ns"])
    assert json.loads((folder / "manifest.json").read_text())["scenario_file"] == scenario


@pytest.mark.slow
def test_a_folder_with_brackets_in_its_name_is_told_as_it_is(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "compare", write_scenario(tmp_path), "--seeds", "1", "--out", "a[bold]b[/red]")
    assert done.returncode == 0, done.stderr
    assert "a[bold]b[/red]/compare.png" in done.stdout


@pytest.mark.slow
def test_tables_are_whole_where_there_is_no_terminal(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "compare", write_scenario(tmp_path), "--seeds", "1", COLUMNS="40")
    assert done.returncode == 0, done.stderr
    assert "set-up in downtime ms" in done.stdout
    assert "…" not in done.stdout


@pytest.mark.slow
def test_set_changes_what_is_run_and_stands_in_the_manifest(tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path)
    changed = ["device.0.count=2", "driver.lock=device", 'device.0.features=["STOP_COPY", "PRE_COPY", "P2P"]']
    settings = [word for setting in changed for word in ("--set", setting)]
    done = proto_v3(tmp_path, "compare", scenario, "--protocols", "v2", "--seeds", "1", *settings)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/small/manifest.json").read_text())
    (device,) = manifest["scenario"]["device"]
    assert (device["count"], device["features"]) == (2, ["STOP_COPY", "PRE_COPY", "P2P"])
    assert manifest["scenario"]["driver"]["lock"] == "device"
    assert manifest["scenario"]["sources"]["driver.lock"] == "yours: --set"
    assert shlex.split(manifest["command"])[-len(settings) :] == settings
    assert "stage_device_save_1_ns" in pl.read_parquet(tmp_path / "out/small/runs.parquet").columns


def test_set_is_shown_with_the_parameters(tmp_path: Path) -> None:
    (tmp_path / "more.toml").write_text('extends = "mine.toml"\nname = "more"\ndescription = "x"\n')
    write_scenario(tmp_path)
    done = proto_v3(tmp_path, "scenarios", "more.toml", "--set", "vmm.read_mib=0.25")
    assert done.returncode == 0, done.stderr
    assert "Extends mine." in done.stdout
    assert ["vmm.read_mib", "0.25", "yours:", "--set"] in [line.split() for line in done.stdout.splitlines()]


# --- outcomes other than COMPLETED -----------------------------------------------------------------------------------

# 8 MiB that can only be saved when the device is stopped; 0.1 Gbit/s sends a quarter of one within the limit.
TOO_MUCH = {"device.0.stop_only_mib": 8.0, "vmm.bandwidth_gbit_per_s": 0.1}


@pytest.mark.slow
def test_migrations_that_do_not_converge_are_told_and_drawn_nowhere(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "compare", write_scenario(tmp_path, TOO_MUCH), "--seeds", "2", "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 run(s) DID_NOT_CONVERGE") == 4
    assert "No run was completed: nothing to draw." in done.stdout
    folder = tmp_path / "out/small"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "runs.csv"}
    everything = done.stdout + done.stderr + (folder / "runs.csv").read_text() + (folder / "manifest.json").read_text()
    assert "nan" not in everything.lower()
    assert "none" not in (done.stdout + (folder / "runs.csv").read_text()).lower()
    counts = json.loads((folder / "manifest.json").read_text())["outcomes"]
    assert counts == {name: {"DID_NOT_CONVERGE": 2} for name in COMPARED}


@pytest.mark.slow
def test_a_table_of_runs_without_a_downtime_keeps_its_columns(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "compare", write_scenario(tmp_path, TOO_MUCH), "--seeds", "1")
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(tmp_path / "out/small/runs.parquet")
    assert table["downtime_ns"].null_count() == table.height == 4
    assert {f"phase_{name}_ns" for name in PHASES} <= set(table.columns)


@pytest.mark.slow
def test_an_unsupported_protocol_does_not_keep_the_others_from_their_figure(tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path, {"device.0.max_dirty_streams": 2})
    done = proto_v3(tmp_path, "compare", scenario, "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert "dev has 2 dirty streams; 4 were asked for" in done.stdout
    assert "UNSUPPORTED" in done.stdout
    assert (tmp_path / "out/small/compare.png").exists()
    assert "nan" not in done.stdout.lower()


# --- bad input -------------------------------------------------------------------------------------------------------


def check_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one message on stderr that has the words, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("protocols", "message"),
    [
        ("v4", "unknown protocol 'v4'; there are v2, "),
        ("", "unknown protocol ''"),
        ("v2,", "unknown protocol ''"),
        ("v2,v3-n65", "unknown protocol 'v3-n65'"),
        ("v2,v3-n1,v2", "named twice"),
        ("v3,v3-n4", "named twice"),  # v3 is v3-n4 here
    ],
)
def test_bad_protocols_are_refused_before_anything_is_written(tmp_path: Path, protocols: str, message: str) -> None:
    done = proto_v3(tmp_path, "compare", "mlx5-2vf", "--protocols", protocols)
    check_refused(done, "proto-v3: error: ", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seeds", "0"), ("--seeds", "-3"), ("--seeds", "many"), ("--jobs", "0"), ("--first-seed", "-1"),
     ("--format", "xlsx"), ("--speed", "9")],
)  # fmt: skip
def test_bad_options_are_refused(tmp_path: Path, option: str, value: str) -> None:
    check_refused(proto_v3(tmp_path, "compare", "mlx5-2vf", option, value), option)


def test_a_missing_scenario_and_one_too_many_are_refused(tmp_path: Path) -> None:
    check_refused(proto_v3(tmp_path, "compare"), "SCENARIO")
    check_refused(proto_v3(tmp_path, "compare", "mlx5-2vf", "vgpu-32g"), "vgpu-32g")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["mine.toml: empty", "ram", "device", "link"]),
        ("# nothing\n", ["mine.toml: empty"]),
        ("name = \n", ["mine.toml: not valid TOML", "line 1"]),
        ("{}", ["mine.toml: not valid TOML"]),
        ("name = 'x'\n", ["mine.toml: ", "ram: missing", "firmware: missing"]),
        ("a = " + 10_000 * "[", ["mine.toml: not valid TOML"]),
        (small_text({"link.gbit_per_s": -1.0}), ["link.gbit_per_s = -1.0: must be greater than or equal to 0.000001"]),
        (small_text({"link.gbit_per_s": "fast"}), ["link.gbit_per_s = 'fast': must be a valid number"]),
        (small_text({"link.gbit_per_sec": 1.0}), ["link.gbit_per_sec = 1.0: unknown key; did you mean gbit_per_s?"]),
        (small_text({"link.round_trip_us": None}), ["link.round_trip_us: missing", "microseconds"]),
        (small_text({"device": []}), ["device = []: "]),
        (small_text({"driver.lock": "big"}), ["driver.lock = 'big': must be 'none', 'per_fd', 'device' or 'global'"]),
        (small_text({"ram.size_gib": float("nan")}), ["ram.size_gib = nan: "]),
        (small_text({"vmm.give_up_s": float("inf")}), ["vmm.give_up_s = inf: "]),
        (small_text({"device.0.stop_only_mib": 9.0}), ["device.0.stop_only_mib = 9: must be at most state_mib = 8"]),
        (small_text({"link.gbit_per_s": 0.0, "device.0.count": 65}), ["link.gbit_per_s = 0.0", "device.0.count = 65"]),
    ],
    ids=["empty", "comment", "cut", "json", "bare", "deep", "negative", "text", "unknown", "missing", "no-device",
         "lock", "nan", "inf", "stop-only", "two-problems"],
)  # fmt: skip
def test_bad_scenarios_are_refused_with_file_key_value_and_what_would_be_right(
    tmp_path: Path, text: str, messages: list[str]
) -> None:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    check_refused(proto_v3(tmp_path, "compare", "mine.toml", "--seeds", "1"), "proto-v3: error: mine.toml: ", *messages)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize("command", ["compare", "scenarios"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("driver.lock=mutex", ["mine.toml, with --set 'driver.lock=mutex': ", "must be 'none', 'per_fd', 'device' or"]),
        ("driver.locks=none", ["--set 'driver.locks=none'", "driver.locks = 'none': unknown key; did you mean lock?"]),
        ("driver.lock", ["--set driver.lock: must be KEY=VALUE"]),
    ],
)
def test_bad_settings_are_refused_and_told_to_come_from_set(
    tmp_path: Path, command: str, setting: str, words: list[str]
) -> None:
    write_scenario(tmp_path)
    check_refused(proto_v3(tmp_path, command, "mine.toml", "--set", setting), "proto-v3: error: ", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_an_error_does_not_steer_the_terminal(tmp_path: Path) -> None:
    done = proto_v3(tmp_path, "compare", "nic-reconfig", "--set", "vmm\x1b[2J\n=1")
    check_refused(done, "proto-v3: error: ", r"vmm\x1b[2J")
    assert "\x1b" not in done.stderr


def test_set_needs_a_scenario(tmp_path: Path) -> None:
    check_refused(proto_v3(tmp_path, "scenarios", "--set", "driver.chunks=3"), "--set changes a scenario: name one")


def test_a_scenario_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b'name = "\xff"')
    check_refused(proto_v3(tmp_path, "compare", "mine.toml"), "mine.toml: not UTF-8 text")
    (tmp_path / "mine.toml").write_text(small_text({}), encoding="utf-16")
    check_refused(proto_v3(tmp_path, "compare", "mine.toml"), "mine.toml: not UTF-8 text but UTF-16: save it as UTF-8")


def test_a_bom_at_the_start_of_a_file_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(small_text({}), encoding="utf-8-sig")
    assert proto_v3(tmp_path, "scenarios", "mine.toml").returncode == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlx5-2fv", "; did you mean mlx5-2vf?"),
        ("none.toml", "no scenario 'none.toml'"),
        (".", ". is a folder; a scenario is a TOML file"),
        ("", "no scenario ''"),
        (300 * "x", "no scenario 'xxx"),
        ("/dev/null", "/dev/null"),
    ],
    ids=["typo", "no-file", "folder", "nothing", "long", "device"],
)
@pytest.mark.parametrize("command", ["compare", "scenarios"])
def test_scenarios_that_are_not_there_are_refused(tmp_path: Path, command: str, name: str, message: str) -> None:
    check_refused(proto_v3(tmp_path, command, name), "proto-v3: error: ", message)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nothing/here", 300 * "x"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_runs(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("kept")
    done = proto_v3(tmp_path, "compare", "vgpu-32g", "--seeds", "1000", "--out", out)
    check_refused(done, f"proto-v3: error: --out {out}: cannot be written: ")
    assert (tmp_path / "file").read_text() == "kept"
