# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures are the same whatever the user's matplotlib, environment and folders are like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from experiments.draw.downtime import draw_downtime
from experiments.runs import frame as results
from sim.run import simulate
from sim.scenario.protocol import Protocol
from tests.build.results import write_figure
from tests.build.scenario import small_scenario

SCENARIO = small_scenario({"firmware.service_cv": 0.2})
RUNS = results.table(
    [simulate(SCENARIO, Protocol.parse(name, SCENARIO), seed) for seed in (1, 2) for name in ("v2", "v3-n2")]
)
HOSTILE = {
    "text.usetex": True,
    "font.size": 23,
    "font.family": "no such font",
    "axes.grid": True,
    "axes.spines.left": False,
    "axes.prop_cycle": "cycler('color', ['red'])",
    "xtick.major.size": 20,
    "hatch.linewidth": 5,
    "figure.figsize": "3, 3",
    "figure.facecolor": "black",
    "figure.constrained_layout.h_pad": 1,
    "savefig.dpi": 30,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "mine",
    "path.sketch": "5, 50, 10",
}
SCRIPT = """
import logging, sys, warnings
from pathlib import Path
import polars as pl
from experiments.draw.downtime import draw_downtime
from sim.scenario.scenario import Scenario
from tests.build.results import write_figure

folder = Path(sys.argv[1])
scenario = Scenario.model_validate_json((folder / "scenario.json").read_text())
figure = draw_downtime(scenario, pl.read_parquet(folder / "runs.parquet"), "made")
write_figure(folder / "drawn", figure, "compare")
import matplotlib
print(matplotlib.rcParams["font.size"], matplotlib.rcParams["savefig.dpi"])
"""


def drawn(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in write_figure(folder, draw_downtime(SCENARIO, RUNS, "made"), "f")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return drawn(tmp_path_factory.mktemp("undisturbed"))


def drawn_elsewhere(folder: Path, **environment: str) -> tuple[list[bytes], str]:
    """The files, drawn by another process in this folder, and what it prints."""
    RUNS.write_parquet(folder / "runs.parquet")
    (folder / "scenario.json").write_text(SCENARIO.model_dump_json())
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return [(folder / "drawn" / f"compare.{suffix}").read_bytes() for suffix in ("png", "svg")], done.stdout


def test_a_users_settings_do_not_get_in_and_are_left_to_the_user(undisturbed: list[bytes], tmp_path: Path) -> None:
    rc = tmp_path / "mine"
    rc.write_text("\n".join(f"{key}: {value}" for key, value in HOSTILE.items()) + "\nno colon\nno.such.key: 1\n")
    files, printed = drawn_elsewhere(
        tmp_path, MPLBACKEND="module://no_such_module", MATPLOTLIBRC=str(rc), MPLCONFIGDIR="/dev/null/none"
    )
    assert files == undisturbed
    assert printed == "23.0 30.0\n", "no warning, and a session's own figures have the user's settings"


def test_a_matplotlibrc_that_cannot_be_read_does_no_harm(undisturbed: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"font.size: 9 # \xff\xfe\n")
    files, printed = drawn_elsewhere(tmp_path, MPLBACKEND="nonsense", HOME="/dev/null")
    assert files == undisturbed
    assert printed == "10.0 figure\n"


def test_what_a_notebook_sets_does_not_get_in(undisturbed: list[bytes], tmp_path: Path) -> None:
    with matplotlib.rc_context(HOSTILE):
        assert drawn(tmp_path) == undisturbed
        assert matplotlib.rcParams["font.size"] == 23


def test_a_command_is_shown_as_it_is_whatever_is_in_it(tmp_path: Path) -> None:
    command = "proto-v3 compare mine.toml --set $\\foo$ \x1b[2J \udcff"
    png, svg = (path.read_bytes() for path in write_figure(tmp_path, draw_downtime(SCENARIO, RUNS, command), "f"))
    assert png.startswith(b"\x89PNG")
    ElementTree.fromstring(svg)
    assert b"set $\\foo$ \\x1b[2J \\udcff" in svg, "a comment beside the glyphs"
