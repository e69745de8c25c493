# SPDX-License-Identifier: GPL-2.0-or-later
"""A run of a results folder made again: which one is meant, what it is made from, and whether it is the same."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from experiments.cli import main
from experiments.runs import frame as results
from experiments.runs import manifest
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan
from proto_v3.errors import UserError
from sim.run import simulate
from sim.scenario.file import from_dump, load, parse, shipped
from sim.scenario.protocol import Protocol
from tests.build.scenario import small_scenario, small_text

CELLS = {"0a1b2c3d4e5f": ("v2", ()), "0a1fffffffff": ("v3-n2", ("driver.lock=device", "device.0.count=2"))}
"""Of a sweep: protocol and settings."""


def replay(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["replay", *arguments])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def compared(here: Path) -> Path:
    """A folder as `compare` writes it, two runs under each of two protocols."""
    (here / "mine.toml").write_text(small_text(), encoding="utf-8")
    arguments = ["compare", "mine.toml", "--protocols", "v2,v3-n2", "--seeds", "2", "--jobs", "1"]
    assert CliRunner().invoke(main, [*arguments, "--set", "firmware.service_cv=0.2"]).exit_code == 0
    return here / "out/small"


@pytest.fixture
def swept(here: Path) -> Path:
    """A folder as `run` writes it."""
    base = small_scenario()
    rows = []
    for cell, (protocol, settings) in CELLS.items():
        scenario = parse(small_text(), "small.toml", settings)
        outcome = simulate(scenario, Protocol.parse(protocol, scenario), 7)
        rows.append(results.row(outcome) | {"cell": cell, "base": "small", "settings": list(settings)})
    frame = pl.DataFrame(rows, infer_schema_length=None)
    bases, command = {"small": base.model_dump(mode="json")}, ["proto-v3", "run", "sweep"]
    with ResultFolder(here / "results/sweep", Plan(command, ["sweep"], 2)) as folder:
        folder.write_table(frame, "runs", "parquet")
        folder.write_manifest(manifest.of_sweep({"bases": bases}, frame, command))
        folder.commit()
    return here / "results/sweep"


def rewrite(folder: Path, **columns: Any) -> None:
    """Other values in a table's columns."""
    frame = pl.read_parquet(folder / "runs.parquet")
    frame.with_columns(**{name: pl.lit(value) for name, value in columns.items()}).write_parquet(
        folder / "runs.parquet"
    )


# --- runs that are the same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["small", "out/small", "./out/small/"])
def test_a_run_of_compare_is_made_again(compared: Path, here: Path, folder: str) -> None:
    done = replay(f"{folder}:v3-n2:2")
    assert done.exit_code == 0, done.output
    table = pl.read_parquet(compared / "runs.parquet").filter(protocol="v3-n2", seed=2)
    assert done.stdout.count(table["digest"].item()) == 2
    assert done.stdout.count(f"{table['downtime_ns'].item() / 1e6:.3f}") == 2
    assert done.stdout.count("COMPLETED") == 2
    assert "The same run, to the last span." in done.stdout
    assert (here / "out/small-v3-n2-2.perfetto-trace").exists()


@pytest.mark.slow
def test_the_files_are_written_where_it_is_said(compared: Path, here: Path) -> None:
    done = replay("small:v2:1", "--trace", "a/b.trace", "--spans", "a/spans.parquet")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (here / "a").iterdir()} == {"b.trace", "spans.parquet"}
    assert set(pl.read_parquet(here / "a/spans.parquet")["run"]) == {"small/v2/1"}
    assert not list((here / "out").glob("*.perfetto-trace"))


@pytest.mark.slow
def test_a_folder_with_a_colon_in_its_name(compared: Path) -> None:
    compared.rename(compared.parent / "a:b")
    assert replay("a:b:v2:1", "--trace", "x").exit_code == 0


@pytest.mark.parametrize(
    ("named", "cell"),
    [("0a1b2c3d4e5f", "0a1b2c3d4e5f"), ("0a1f", "0a1fffffffff"), ("v3-n2:7", "0a1fffffffff")],
)
def test_a_run_of_a_sweep_is_made_again_with_its_settings(swept: Path, named: str, cell: str) -> None:
    done = replay(f"sweep:{named}", "--trace", "out/x")
    assert done.exit_code == 0, done.output
    protocol, settings = CELLS[cell]
    assert f"{' '.join(['small', *(f'--set {each}' for each in settings)])}, {protocol}, seed 7" in done.stdout


def test_a_sweeps_trace_has_the_whole_cell_in_its_name(swept: Path, here: Path) -> None:
    assert replay("sweep:0a1b").exit_code == 0
    assert [path.name for path in (here / "out").glob("*.*")] == ["sweep-0a1b2c3d4e5f.perfetto-trace"]


@pytest.mark.parametrize("cell", ["0a/../../../victim", "/victim", "0a\x1b[2J", "0a" + 300 * "b"])
def test_a_cell_of_somebody_elses_table_is_no_path(swept: Path, here: Path, cell: str) -> None:
    (here / "victim.perfetto-trace").write_text("precious")
    shutil.copytree(swept, here / "evil")
    table = pl.read_parquet(swept / "runs.parquet").head(1)
    table.with_columns(cell=pl.lit(cell)).write_parquet(here / "evil/runs.parquet")
    done = replay(f"evil:{cell[:2]}")
    assert done.exit_code == 0, done.output
    assert (here / "victim.perfetto-trace").read_text() == "precious"
    assert "\x1b" not in done.output
    (trace,) = (here / "out").iterdir()
    assert trace.name.startswith("evil-")


def test_a_name_is_looked_up_in_out_before_results(compared: Path, swept: Path, here: Path) -> None:
    shutil.copytree(compared, here / "results/small")
    rewrite(here / "results/small", digest="0" * 64)
    (here / "out/run").mkdir()
    assert replay("small:v2:1").exit_code == 0
    assert replay("results/small:v2:1").exit_code == 1
    swept.rename(here / "out/run/sweep")
    assert replay("sweep:0a1b").exit_code == 0


# --- runs that are not -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_digest_is_exit_status_1_and_names_the_revision(compared: Path) -> None:
    rewrite(compared, digest="0" * 64)
    told = json.loads((compared / "manifest.json").read_text())
    (compared / "manifest.json").write_text(json.dumps(told | {"git_revision": "abc123"}))
    done = replay("small:v2:1")
    assert done.exit_code == 1
    assert "Not the same run: the table was made by revision abc123, and this is " in done.stdout
    assert "Trace: " in done.stdout


@pytest.mark.slow
def test_a_run_that_broke_is_never_the_same(compared: Path) -> None:
    rewrite(compared, digest="", outcome="FAILED")
    done = replay("small:v2:1")
    assert done.exit_code == 1
    assert "Digest in the table: none: the run broke" in done.stdout


# --- which run is meant ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mistake_in_the_name_is_told_in_a_line(compared: Path, swept: Path) -> None:
    del compared, swept
    told = {
        "small": "must be FOLDER:PROTOCOL:SEED or FOLDER:CELL",
        ":v2:1": "must be FOLDER:PROTOCOL:SEED or FOLDER:CELL",
        "smal:v2:1": "smal is no folder, nor one in out/, out/run/, out/quick/ or results/; did you mean small?",
        "zzz:v2:1": "nor one in out/, out/run/, out/quick/ or results/; there are small, sweep",
        "small:v2:x": "the seed 'x' must be a whole number",
        "small:v2:9": "no run in out/small has this name; there are v2:1, v3-n2:1, v2:2, v3-n2:2",
        "small:0a1b": "have no cells: name one by FOLDER:PROTOCOL:SEED",
        "sweep:ffff": "no run in results/sweep has this name; there are 0a1b2c3d4e5f (v2:7), 0a1fffffffff (v3-n2:7)",
        "sweep:0a1": "2 runs in results/sweep fit this name: 0a1b2c3d4e5f (v2:7), 0a1fffffffff (v3-n2:7); name one",
    }
    for run, expected in told.items():
        done = replay(run)
        assert (done.exit_code, done.stdout) == (2, ""), run
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_cannot_be_written_is_found_out_before_the_run(compared: Path) -> None:
    done = replay("small:v2:1", "--trace", ".")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--trace .: must be the name of a file" in done.stderr


# --- folders that hold no such runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["agree-live-paced", "agree-live-biglock"])
def test_live_runs_cannot_be_made_again(name: str) -> None:
    done = replay(f"{Path(__file__).parents[2] / 'results' / name}:v2:1")
    assert done.exit_code == 2
    assert "holds live runs, and no live run can be repeated exactly" in done.stderr


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_told(compared: Path) -> None:
    def told() -> str:
        done = replay("small:v2:1")
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        return done.stderr

    table, manifest = compared / "runs.parquet", compared / "manifest.json"
    good, how = table.read_bytes(), json.loads(manifest.read_text())
    pl.read_parquet(table).drop("digest", "seed").write_parquet(table)
    assert "runs.parquet: has no column digest, seed" in told()
    pl.read_parquet(io.BytesIO(good)).with_columns(seed=pl.lit("x")).write_parquet(table)
    assert "runs.parquet: column seed is of type String; must be Int64" in told()
    pl.read_parquet(io.BytesIO(good)).with_columns(seed=-pl.col("seed")).write_parquet(table)
    assert "column seed has negative numbers" in told()
    table.write_bytes(good[:100])
    assert "runs.parquet: cannot be read as Parquet" in told()
    table.rename(compared / "runs.csv")
    assert "runs.parquet: there is no such file; there is runs.csv: make it again with --format parquet" in told()
    (compared / "runs.csv").unlink()
    assert "runs.parquet: there is no such file" in told()
    table.write_bytes(good)
    how["scenario"]["link"]["mtu"] = 9
    manifest.write_text(json.dumps(how))
    assert "manifest.json: 1 problem(s)\n  link.mtu = 9: unknown key" in told()
    manifest.write_text(json.dumps(how | {"scenario": None}))
    assert "manifest.json: has no scenario that its runs could be made from" in told()
    manifest.write_text("[")
    assert "manifest.json: is not JSON" in told()
    manifest.unlink()
    assert "manifest.json: cannot be read: No such file" in told()


def test_a_base_that_the_manifest_has_not_is_told(swept: Path) -> None:
    rewrite(swept, base="gone")
    done = replay("sweep:0a1b")
    assert done.exit_code == 2
    assert "has no base 'gone', which cell 0a1b2c3d4e5f builds on" in done.stderr


# --- scenarios out of manifests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_scenario_comes_back_from_its_dump(name: str) -> None:
    scenario = load(name)
    assert from_dump(json.loads(json.dumps(scenario.model_dump(mode="json"))), "x") == scenario


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("device.0.count=3", "driver.lock=global"),
        ('device.0.writes={pattern = "uniform", mib_per_s = 5.0}', "device.0.stop_only_mib=0.0"),
        ("v3.target_max_dirty_streams=2", "vmm.cancel_after_s=3.0"),
        ("device.0.reconfigurations={at_s = [0.1], objects_each = 2}",),
    ],
)
@pytest.mark.parametrize("name", ["mlx5-2vf", "nic-reconfig"])
def test_settings_on_a_dump_are_those_on_the_file(name: str, settings: Sequence[str]) -> None:
    words = {"sources"}  # of a value that the file leaves out and the dump has, both say the same in other words
    from_file = load(name, settings).model_dump(exclude=words)
    assert from_dump(load(name).model_dump(mode="json"), "x", settings).model_dump(exclude=words) == from_file


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("link.mtu=9", "x, with --set 'link.mtu=9': 1 problem(s)\n  link.mtu = 9: unknown key"),
        ("link", "--set link: must be KEY=VALUE"),
        ("name=y", "--set name=y: name is no parameter"),
        ("device.5.count=2", "--set device.5.count=2: '5': must be a place in the list, 0 to 1"),
        (".".join("a" * 3000) + "=1", "nested too deeply"),
    ],
)
def test_mistakes_in_settings_are_told_as_for_a_file(setting: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        from_dump(small_scenario().model_dump(mode="json"), "x", [setting])
    assert told in str(error.value)
