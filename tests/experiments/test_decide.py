# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 decide`: what it writes and prints, for any number of workers; errors; an interruption, and going on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from experiments import api
from experiments.cli import main
from experiments.commands import decide as command
from experiments.runs import pool
from proto_v3.errors import UserError
from tests.build.scenario import SMALL

RANGES = """
[sources]
"firmware.engines" = "assumed: x"

[ranges]
"firmware.engines" = { low = 1.0, high = 8.0, why = "one; many" }
"device.0.suspend_ms" = { low = 0.5, high = 4.0, why = "little; much" }
"""
CHANGES = ["--changes", "multifd,v3-n1,v3-n4"]
TABLES = ("runs", "samples", "decide", "indices")


@pytest.fixture
def machine(tmp_path: Path) -> str:
    file = tmp_path / "machine.toml"
    file.write_text(SMALL + RANGES)
    return str(file)


def decide(*arguments: str, width: int = 100) -> Result:
    return CliRunner().invoke(main, ["decide", *arguments], env={"COLUMNS": str(width)}, prog_name="proto-v3")


def test_it_is_the_same_for_any_number_of_workers(machine: str, tmp_path: Path) -> None:
    for jobs in ("1", "3"):
        done = decide(machine, "--samples", "4", "--jobs", jobs, "--out", str(tmp_path / jobs), *CHANGES)
        assert done.exit_code == 0, done.output
    for name in TABLES:
        one, three = (pl.read_parquet(tmp_path / jobs / f"{name}.parquet") for jobs in ("1", "3"))
        assert one.equals(three), name
    told = json.loads((tmp_path / "3" / "manifest.json").read_text())
    assert (told["samples"], told["sample_seed"], told["runs"]) == (4, 0, 16)
    assert set(told["files"]) == {"decide.png", "decide.svg", *(f"{name}.parquet" for name in TABLES)}
    runs, samples = (pl.read_parquet(tmp_path / "1" / f"{name}.parquet") for name in ("runs", "samples"))
    assert runs["seed"].to_list() == [seed for seed in (1, 2, 3, 4) for _ in range(4)]
    assert samples["seed"].to_list() == [1, 2, 3, 4]
    assert samples["firmware.engines"].is_between(1, 8).all()


def test_a_table_on_a_terminal_has_no_line_that_is_too_long(machine: str, tmp_path: Path) -> None:
    done = decide(machine, "--samples", "2", "--jobs", "1", "--out", str(tmp_path / "a"))
    assert done.exit_code == 0
    told = [line for line in done.output.splitlines() if not line.startswith(("Figure", "Tables"))]
    assert max(map(len, told)) <= 120, "no terminal here"
    head = next(line for line in told if line.startswith("change "))
    assert len(head.rstrip()) <= 100
    for name in ("as it is", "multifd", "v3-blocks"):
        assert any(line.startswith(name) for line in told)


def test_json_has_all_numbers(machine: str, tmp_path: Path) -> None:
    done = decide(machine, "--samples", "2", "--jobs", "1", "--json", "--out", str(tmp_path / "a"), *CHANGES)
    told = json.loads(done.stdout)
    assert [row["change"] for row in told["tables"]["numbers"]["rows"]] == ["as it is", "multifd", "v3-n1", "v3-n4"]
    assert {"downtime_ms_median", "pinned_mib_brings_high", "probability"} <= set(told["tables"]["numbers"]["rows"][0])
    assert len(told["conclusion"]) == 4, "what to make, two verdicts, too few samples"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mlx5-2fv"], "did you mean mlx5-2vf?"),
        (["mlx5-2vf", "--changes", "earli"], "change 'earli': must be one of"),
        (["mlx5-2vf", "--samples", "0"], "--samples"),
        (["mlx5-2vf", "--set", "firmware.engine=2"], "did you mean engines?"),
        (["mlx5-2vf", "--out", ""], "--out ''"),
    ],
)
def test_bad_input_is_told_before_anything_is_run(arguments: list[str], told: str) -> None:
    done = decide(*arguments)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())


@pytest.mark.parametrize("value", ["nan", "inf", "-0", "-inf"])
def test_a_downtime_that_is_none_is_refused(machine: str, tmp_path: Path, value: str) -> None:
    done = decide(machine, "--near-ms", value, "--out", str(tmp_path / "a"))
    assert done.exit_code == 2
    told = " ".join(done.output.split())
    assert "'--near-ms'" in told
    assert value.removeprefix("-") in told
    assert "the range x>0." in told
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="near_ms = nan: must be a finite number"):
        api.decide(machine, 4, near_ms=float("nan"))


def test_too_many_samples_of_a_downtime_are_refused_before_the_folder_is_made(machine: str, tmp_path: Path) -> None:
    done = decide(machine, "--samples", "20000", "--near-ms", "500", "--out", str(tmp_path / "a"))
    assert done.exit_code == 2
    assert "samples = 20000: must be from 1 to 16384 for machines of a given downtime" in " ".join(done.output.split())
    assert not (tmp_path / "a").exists()


def test_another_result_is_not_replaced(machine: str, tmp_path: Path) -> None:
    arguments = [machine, "--jobs", "1", "--quiet", "--out", str(tmp_path / "a"), "--changes", "multifd"]
    assert decide(*arguments, "--samples", "2").exit_code == 0
    done = decide(*arguments, "--samples", "1")
    assert done.exit_code == 2
    assert "has more runs; --force replaces it" in done.output
    assert decide(*arguments, "--samples", "1", "--force").exit_code == 0


def test_of_a_machine_that_was_seen_those_of_its_downtime_are_taken(machine: str, tmp_path: Path) -> None:
    """The suspend takes 0.5 to 4 ms: those within 15 % of a downtime, of four times as many machines."""
    every = decide(machine, "--samples", "32", "--jobs", "1", "--changes", "multifd", "--out", str(tmp_path / "every"))
    assert every.exit_code == 0
    all_ms = pl.read_parquet(tmp_path / "every" / "runs.parquet").filter(protocol="v2")["downtime_ns"] / 1e6
    wanted = float(all_ms.sort()[4])
    near = ["--samples", "8", "--near-ms", str(wanted), "--jobs", "1", "--changes", "multifd"]
    assert decide(machine, *near, "--out", str(tmp_path / "near")).exit_code == 0
    close = [at for at, each in enumerate(all_ms, 1) if abs(each - wanted) <= 0.15 * wanted]
    runs = pl.read_parquet(tmp_path / "near" / "runs.parquet")
    assert runs["seed"].unique(maintain_order=True).to_list() == close[:8]
    assert json.loads((tmp_path / "near" / "manifest.json").read_text())["near_ms"] == wanted
    samples = [pl.read_parquet(tmp_path / each / "samples.parquet") for each in ("every", "near")]
    assert samples[0].filter(pl.col("seed").is_in(close[:8])).equals(samples[1])


@pytest.mark.parametrize("how", [[], ["--no-screening"]])
def test_a_run_can_be_made_again(machine: str, tmp_path: Path, how: list[str]) -> None:
    """Also of a machine among those that were searched, whose seed is beyond the number of samples."""
    arguments = [
        "--samples",
        "8",
        "--near-ms",
        "1",
        "--jobs",
        "1",
        "--changes",
        "multifd",
        "--out",
        str(tmp_path / "a"),
    ]
    assert decide(machine, *arguments).exit_code == 0
    last = pl.read_parquet(tmp_path / "a" / "runs.parquet")["seed"].max()
    assert last > 8
    run = ["replay", f"{tmp_path / 'a'}:v2-multifd:{last}", "--trace", str(tmp_path / "trace")]
    done = CliRunner().invoke(main, run, prog_name="proto-v3")
    assert done.exit_code == 0, done.output
    assert "The same run, to the last span" in done.output


def interrupted_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Any]:
    """The command is interrupted after so many runs; returns all cells that are begun."""
    made: list[Any] = []

    def run(cell: Any) -> Any:
        if len(made) == count:
            signal.raise_signal(signal.SIGINT)
        made.append(cell)
        return pool_run(cell)

    pool_run = pool.run_cell
    monkeypatch.setattr(pool, "run_cell", run)
    return made


def test_after_an_interruption_only_the_missing_runs_are_made(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [machine, "--samples", "4", "--jobs", "1", *CHANGES]
    assert decide(*arguments, "--out", str(tmp_path / "whole")).exit_code == 0
    out = [*arguments, "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as context:
        made = interrupted_after(context, 6)
        done = decide(*out)
    assert done.exit_code == 130
    assert "go on with --resume" in done.output
    assert not (tmp_path / "cut" / "runs.parquet").exists()
    done = decide(*out)
    assert done.exit_code == 2
    assert "keeps 6 runs of an interrupted command; --resume goes on with them" in " ".join(done.output.split())
    with monkeypatch.context() as context:
        made = interrupted_after(context, -1)
        assert decide(*out, "--resume").exit_code == 0
    assert len(made) == 16 - 6
    for name in TABLES:
        whole, cut = (pl.read_parquet(tmp_path / each / f"{name}.parquet") for each in ("whole", "cut"))
        assert whole.equals(cut), name
    assert not (tmp_path / "cut" / command.KEPT).exists()


def test_runs_of_other_values_are_not_taken_for_these(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--samples", "2", "--jobs", "1", "--out", str(tmp_path / "a"), "--changes", "multifd"]
    with monkeypatch.context() as context:
        interrupted_after(context, 3)
        assert decide(machine, *out).exit_code == 130
    with monkeypatch.context() as context:
        made = interrupted_after(context, -1)
        assert decide(machine, *out, "--resume", "--set", "vmm.setup_ms=2").exit_code == 0
    assert len(made) == 4
