# SPDX-License-Identifier: GPL-2.0-or-later
"""The wheel, installed into a fresh environment and used from another folder: it needs nothing of the clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import experiments

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("proto_v3", "sim", "experiments", "scenarios")
SMALL = "ufimtseva-small"


@dataclass(frozen=True)
class Installed:
    """An environment that has the wheel, and a folder to work in."""

    scripts: Path
    folder: Path

    @property
    def environment(self) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        return kept | {"HOME": str(self.folder), "COLUMNS": "120"}

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.scripts / command[0], *command[1:]],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *command: str) -> str:
        """What the command prints. It must end with 0, and print nothing on stderr but how far it is."""
        process = self.start(*command)
        out, err = process.communicate(timeout=300)
        rest = [line for line in err.splitlines() if not re.fullmatch(r"runs: \d+ of \d+, .* left", line)]
        assert (process.returncode, rest) == (0, []), err
        return out

    @property
    def packages(self) -> Path:
        (packages,) = self.scripts.parent.glob("lib/python*/site-packages")
        return packages


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"  # a copy: a build leaves folders behind
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder / "dist"), str(source))
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    made = Installed(folder / "venv" / "bin", folder / "elsewhere")
    (made.packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    (wheel,) = (folder / "dist").glob("*.whl")
    pip("--python", str(made.scripts / "python"), "install", "--no-deps", "--no-index", str(wheel))
    made.folder.mkdir()
    return made


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_its_modules_are_those_of_the_environment(installed: Installed) -> None:
    code = f"import {', '.join(PACKAGES)}; print(*(each.__file__ for each in ({', '.join(PACKAGES)})))"
    files = installed.run("python", "-c", code).split()
    assert [Path(file).is_relative_to(installed.packages) for file in files] == [True] * len(PACKAGES)


def test_all_files_are_in_it(installed: Installed) -> None:
    files = [path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    missing = [str(file) for file in files if not (installed.packages / file).exists()]
    assert [file for file in missing if not file.endswith(".pyc")] == []


@pytest.mark.parametrize("command", [("proto-v3",), ("python", "-m", "experiments")])
def test_the_revision_of_another_repository_is_not_its_own(installed: Installed, command: Sequence[str]) -> None:
    subprocess.run(["git", "init", "-q", installed.packages], check=True)
    (installed.packages / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert installed.run(*command, "--version") == f"proto-v3, version {experiments.__version__}\n"


def test_a_file_of_ones_own_that_extends_a_shipped_scenario(installed: Installed) -> None:
    assert "mlx5-2vf" in installed.run("proto-v3", "scenarios")
    (installed.folder / "mine.toml").write_text(
        'extends = "mlx5-2vf"\nname = "mine"\ndescription = "slower"\n[link]\ngbit_per_s = 50\n'
    )
    out = installed.run("proto-v3", "compare", "mine.toml", "--seeds", "1", "--protocols", "v2,v3-n4")
    assert "Phases of the downtime" in out
    made = installed.folder / "out" / "mine"
    assert json.loads((made / "manifest.json").read_text())["git_revision"] == "unknown"
    assert (made / "compare.svg").stat().st_size > 10_000


def test_a_replay_a_trace_and_a_report(installed: Installed) -> None:
    installed.run("proto-v3", "compare", SMALL, "--seeds", "1", "--protocols", "v2", "--out", "results/one")
    assert "The same run, to the last span." in installed.run("proto-v3", "replay", "one:v2:1")
    assert "ui.perfetto.dev" in installed.run("proto-v3", "trace", SMALL, "--protocol", "v3")
    (installed.folder / "mine" / "channels").mkdir(parents=True)
    report = installed.start("proto-v3", "report", "mine")
    report.communicate(timeout=60)
    assert report.returncode == 1, "no question is answered"
    page = (installed.folder / "mine" / "report.html").read_text()
    assert "no losses, no slow start" in page  # what the model leaves out
    assert SMALL in page


def test_the_api(installed: Installed) -> None:
    code = f"from experiments import api; print(api.compare('{SMALL}', 'v2,v3-n2', 2, jobs=2)['outcome'].to_list())"
    assert installed.run("python", "-c", code) == f"{['COMPLETED'] * 4}\n"


def test_a_live_target_takes_a_migration(installed: Installed) -> None:
    target = installed.start("proto-v3", "live-target", "--listen", "127.0.0.1:0", "--once")
    with ended(target):
        assert target.stderr is not None
        address = target.stderr.readline().partition("listening on ")[2].partition(",")[0]
        live = installed.start("proto-v3", "live", "live-paced", "--connect", address)
        out, err = live.communicate(timeout=120)
        assert live.returncode == 0, err
        assert "COMPLETED" in out
        assert target.wait(timeout=60) == 0


ON_WORKERS = f"""
import json
from distributed import Client
from experiments.runs.cluster import on_cluster
from experiments.runs.pool import Cell
from sim.scenario.file import load
from sim.scenario.protocol import Protocol

with Client(scheduler_file="scheduler.json") as client:
    client.wait_for_workers(1, 60)
scenario = load("{SMALL}")
cells = [Cell(scenario, Protocol.parse("v2", scenario), seed) for seed in (1, 2)]
made = on_cluster(cells, json.load(open("scheduler.json"))["address"])
print(sorted((at, outcome.kind.value) for at, outcome in made))
"""


def test_a_dask_worker_makes_runs(installed: Installed) -> None:
    file = installed.folder / "scheduler.json"
    options = ("--no-dashboard", "--scheduler-file", file.name)
    scheduler = installed.start("python", "-m", "distributed.cli.dask_scheduler", "--port", "0", *options)
    worker = installed.start("python", "-m", "distributed.cli.dask_worker", "--nthreads", "1", *options)
    with ended(scheduler, worker):
        for _ in range(300):
            if file.exists():
                break
            time.sleep(0.1)
        assert installed.run("python", "-c", ON_WORKERS) == "[(0, 'COMPLETED'), (1, 'COMPLETED')]\n"
