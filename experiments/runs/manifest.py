# SPDX-License-Identifier: GPL-2.0-or-later
"""How results were made: the manifest beside each table of runs, with command, seeds, versions and git revision."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import __version__
from experiments.runs.folder import SCHEMA_VERSION

if TYPE_CHECKING:
    import polars as pl

    from sim.scenario.scenario import Scenario

ABOVE = Path(__file__).resolve().parents[2]
"""The project's clone, or the folder that the packages are installed in."""
DEPENDENCIES = ("numpy", "scipy", "polars", "matplotlib", "msgpack", "pydantic")
"""The libraries that results depend on."""


def of_scenario(
    scenario: Scenario, scenario_file: str, command: Sequence[str], runs: pl.DataFrame, planned: int
) -> dict[str, Any]:
    """Of runs of one scenario: enough to make them again."""
    what = {
        "protocols": list(runs["protocol"].unique(maintain_order=True)),
        "scenario_file": scenario_file,
        "scenario": scenario.model_dump(mode="json"),
    }
    return _how_made(what, runs, command, _counts(runs), planned)


def of_cases(cases: Mapping[str, Scenario], command: Sequence[str], runs: pl.DataFrame, planned: int) -> dict[str, Any]:
    """Of runs of several scenarios; `cases` has each by the name of its file."""
    what = {
        "protocols": list(runs["protocol"].unique(maintain_order=True)),
        "scenario_files": {scenario.name: file for file, scenario in cases.items()},
        "scenarios": {scenario.name: scenario.model_dump(mode="json") for scenario in cases.values()},
    }
    counts = {scenario.name: _counts(runs.filter(scenario=scenario.name)) for scenario in cases.values()}
    return _how_made(what, runs, command, counts, planned)


def of_sweep(what: dict[str, Any], runs: pl.DataFrame, command: Sequence[str]) -> dict[str, Any]:
    """Of a finished sweep, from its table of runs."""
    return _how_made(what, runs, command, _counts(runs), runs.height)


def _how_made(
    what: dict[str, Any], runs: pl.DataFrame, command: Sequence[str], counts: dict[str, Any], planned: int
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(command),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": runs.height == planned,
        "runs": runs.height,
        "runs_planned": planned,
        "outcomes": counts,
        "seeds": sorted(runs["seed"].unique()),
        **what,
        "versions": versions(),
        "git_revision": git_revision(),
    }


def _counts(runs: pl.DataFrame) -> dict[str, dict[str, int]]:
    """How many runs of each protocol ended in which way."""
    counts: dict[str, dict[str, int]] = {}
    for protocol, outcome, count in runs.group_by("protocol", "outcome", maintain_order=True).len().iter_rows():
        counts.setdefault(protocol, {})[outcome] = count
    return counts


def versions() -> dict[str, str]:
    """The versions of Python, of this project, and of the libraries that results depend on."""
    installed = {name: metadata.version(name) for name in DEPENDENCIES}
    return {"python": platform.python_version(), "proto-v3": __version__, **installed}


def clone() -> Path | None:
    """The folder of the project's clone; None if the packages are installed elsewhere.

    Another repository around them, such as one in whose folder a virtual environment lies, does not count.
    """
    project = ABOVE / "pyproject.toml"
    ours = (
        (ABOVE / ".git").exists() and project.is_file() and 'name = "proto-v3"' in project.read_text(encoding="utf-8")
    )
    return ABOVE if ours else None


def git_revision() -> str:
    """The project's commit; with `+changes-` and a fingerprint if any file outside results/ differs from it.

    `unknown` if this package does not run from a clone.
    """
    if (folder := clone()) is None:
        return "unknown"
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "diff", "HEAD", "--", ".", ":!results")
        return f"{commit}+changes-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
