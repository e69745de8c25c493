# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands as a whole: all of them use the same names for the same things."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from experiments.cli import main
from experiments.study.names import QUESTIONS
from sim.scenario.suffixes import NUMBERED, SUFFIXES

ROOT = Path(__file__).resolve().parents[2]

OPTIONS = [
    (name, option)
    for name, command in main.commands.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def having(option: str) -> set[str]:
    return {name for name, each in OPTIONS if option in each.opts}


def test_an_option_is_the_same_kind_of_thing_in_every_command() -> None:
    kinds = defaultdict(set)
    for name, option in OPTIONS:
        kind = (option.metavar or option.type.name, option.multiple, option.is_flag)
        if (name, option.opts[0]) != ("fit", "--out"):  # one file is all that it makes, beside its figure
            kinds[option.opts[0]].add(kind)
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}


def test_a_file_is_never_called_like_a_folder() -> None:
    folders, files = ({each.opts[0] for _, each in OPTIONS if each.metavar == kind} for kind in ("FOLDER", "FILE"))
    assert folders == {"--out", "--results"}
    assert files == {"--trace", "--spans", "--page", "--scenario-out"}


def test_nothing_is_written_into_results_unless_it_is_named() -> None:
    for name in having("--out"):
        (out,) = (option for command, option in OPTIONS if command == name and "--out" in option.opts)
        default = "[default: nothing is written]" if name == "fit" else "[default: out/"
        assert default in (out.help or ""), name
        assert "--force" in {word for command, option in OPTIONS if command == name for word in option.opts}, name
    assert "out/" in (ROOT / ".gitignore").read_text().splitlines()


def test_runs_and_protocols_have_one_name() -> None:
    assert having("--protocols") == {"compare", "live", "agree", "real"}
    assert having("--protocol") == having("--seed") == {"trace"}, "one run"
    assert having("--seeds") == {"compare", "validate", "live", "agree", "real"}
    assert having("--runs") == set()


# --- help ------------------------------------------------------------------------------------------------------------


def help_of(*command: str) -> str:
    return CliRunner().invoke(main, [*command, "--help"], prog_name="proto-v3").output


@pytest.mark.parametrize(
    ("command", "meant"),
    [(["live", "live-paced", "--protocol", "v4"], "v4"), (["agree", "live-paced", "--runs", "0"], "0")],
)
def test_options_of_version_0_1_still_mean_what_they_meant(command: list[str], meant: str) -> None:
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert meant in done.output
    assert "No such option" not in done.output


def test_short_help_lines_are_whole() -> None:
    told = " ".join(help_of().split())
    for name, command in main.commands.items():
        sentence = " ".join((command.help or "").split("\n\n")[0].split()).removesuffix(".")
        assert f"{name} {sentence}" in told


def test_help_of_run_lists_the_questions() -> None:
    lines = help_of("run").splitlines()
    for name, question in QUESTIONS.items():
        assert f"  {name:<20}  {question}" in lines


@pytest.mark.parametrize("text", ["README", "protocols", "compare", "live", "agree", "trace"])
def test_every_suffix_of_a_protocols_name_is_told(text: str) -> None:
    told = (ROOT / "README.md").read_text(encoding="utf-8")
    if text != "README":
        told = CliRunner().invoke(main, [text] if text == "protocols" else [text, "--help"]).output
    named = set(re.findall(r"(?<![\w-])-[a-z][a-z0-9-]*", told))
    every = {f"-{suffix}" for suffixes in SUFFIXES.values() for suffix in suffixes if not NUMBERED.fullmatch(suffix)}
    assert every | {"-n1", "-n64"} <= named


def test_protocols_says_what_a_suffix_does_in_a_scenario() -> None:
    told = CliRunner().invoke(main, ["protocols", "nic-reconfig", "--set", "vmm.reinit=true"], env={"COLUMNS": "300"})
    rows = {line.split()[0]: line for line in told.output.splitlines() if line.startswith("-")}
    assert "changes it" in rows["-ack-reusable"], "allowed now"
    assert "as it is" in rows["-deduces"]
    assert "more than 16 dirty stream(s) is UNSUPPORTED" in told.output
    told = CliRunner().invoke(main, ["protocols", "nic-reconfig"], env={"COLUMNS": "300"})
    assert re.search(r"-ack-reusable .* not allowed: a reusable ack", told.output)


# --- what is nearly right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["comapre", "mlx5-2vf"], "compare"),
        (["compare", "mlx5-2vf", "--protocol", "v2"], "--protocols"),
        (["compare", "mlx5-2fv"], "mlx5-2vf"),
        (["compare", "mlx5-2vf", "--protocols", "v2-mutlifd"], "-multifd"),
        (["compare", "mlx5-2vf", "--set", "link.gbit_per_sec=1"], "gbit_per_s"),
        (["compare", "mlx5-2vf", "--set", "lnk.gbit_per_s=1"], "link"),
        (["compare", "mlx5-2vf", "--set", "downtime_limit_ms=1"], "vmm.downtime_limit_ms"),
        (["compare", "mlx5-2vf", "--set", "device.0.mib_per_s=1"], "device.0.writes.mib_per_s"),
        (["validate", "szmigiero-4fv"], "szmigiero-4vf"),
        (["validate", "ufimtseva-2fv"], "ufimtseva-2vf"),
        (["run", "read_scalling"], "read_scaling"),
        (["trace", "mlx5-2vf", "--protocol", "v33"], "v3"),
        (["scenarios", "nic-reconf"], "nic-reconfig"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(command: list[str], meant: str) -> None:
    done = CliRunner().invoke(main, command, prog_name="proto-v3")
    assert done.exit_code == 2
    assert re.search(rf"[Dd]id you mean '?{meant}'?\?", done.stderr), done.stderr
