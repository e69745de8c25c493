"""Results as tables: one row a run, units in the column names; and a manifest that tells how they were made."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl

from experiments.runs.folder import SCHEMA_VERSION
from proto_v3.timeline import PHASES, Resource
from sim.outcome import Outcome
from sim.scenario.scenario import Scenario

PHASE_COLUMNS = [f"phase_{name}_ns" for name in PHASES]
PATH_COLUMNS = [f"path_{resource.name.lower()}_ns" for resource in Resource]


def row(outcome: Outcome) -> dict[str, Any]:
    """One run as a flat row; times are whole nanoseconds, null where the migration was not completed."""
    flat: dict[str, Any] = {
        "scenario": outcome.scenario,
        "protocol": outcome.protocol,
        "seed": outcome.seed,
        "outcome": outcome.kind.value,
        "reason": outcome.reason,
        "note": outcome.note,
        "downtime_ns": outcome.downtime_ns,
        "total_ns": outcome.total_ns,
        "bound_ns": outcome.bound_ns,
        "bound_by": outcome.bound_by,
        "bound_ratio": _bound_ratio(outcome),
    }
    flat |= {f"phase_{name}_ns": outcome.phases_ns.get(name) for name in PHASES}
    flat |= {f"path_{name.name.lower()}_ns": outcome.critical_path_ns.get(name.name.lower()) for name in Resource}
    flat["path_unexplained_ns"] = outcome.critical_path_ns.get("unexplained")
    for name in (
        "guest_runs_at",
        "setup_in_downtime_ns",
        "late_critical_objects",
        "late_reconfigured_objects",
        "late_critical_bytes",
        "critical_lag_mean_ns",
        "critical_lag_max_ns",
        "retries",
        "retries_stopped_ns",
        "late_final_checks",
        "peak_reorder_bytes",
        "peak_held_bytes",
        "send_blocked_ns",
        "wire_bytes",
        "device_bytes",
        "device_bytes_resent",
        "device_bytes_dropped",
        "device_bytes_wasted",
        "connections",
        "messages",
        "wakeups",
        "reads",
        "read_firmware_ns",
        "read_lock_ns",
        "read_copy_ns",
        "digest",
    ):
        flat[name] = getattr(outcome, name)
    return flat | {f"stage_{stage.name}_{stage.index}_ns": stage.end_ns - stage.start_ns for stage in outcome.stages}


def _bound_ratio(outcome: Outcome) -> float | None:
    """How far the downtime is above what it is at the least; None where either is not there, or that is 0."""
    if outcome.downtime_ns is None or not outcome.bound_ns:
        return None
    return outcome.downtime_ns / outcome.bound_ns


def table(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """The runs as a table."""
    return pl.DataFrame([row(outcome) for outcome in outcomes], infer_schema_length=None)


def manifest(
    scenario: Scenario, scenario_file: str, command: Sequence[str], outcomes: Sequence[Outcome], planned: int
) -> dict[str, Any]:
    """How the results were made: enough to make them again."""
    what = {"scenario_file": scenario_file, "scenario": scenario.model_dump(mode="json")}
    return _manifest(what, command, outcomes, planned, _counts(outcomes))


def manifest_of_cases(
    cases: Mapping[str, Scenario], command: Sequence[str], outcomes: Sequence[Outcome], planned: int
) -> dict[str, Any]:
    """As `manifest`, for runs of several scenarios, which are given by the names of their files."""
    counts = {
        scenario.name: _counts([outcome for outcome in outcomes if outcome.scenario == scenario.name])
        for scenario in cases.values()
    }
    files = {scenario.name: file for file, scenario in cases.items()}
    scenarios = {scenario.name: scenario.model_dump(mode="json") for scenario in cases.values()}
    what = {"scenario_files": files, "scenarios": scenarios}
    return _manifest(what, command, outcomes, planned, counts)


def manifest_of_sweep(what: dict[str, Any], frame: pl.DataFrame, command: Sequence[str]) -> dict[str, Any]:
    """As `manifest`, for the table of a sweep, all of whose runs are made."""
    counts: dict[str, dict[str, int]] = {}
    for protocol, outcome, runs in frame.group_by("protocol", "outcome", maintain_order=True).len().iter_rows():
        counts.setdefault(protocol, {})[outcome] = runs
    return _how_made(command, frame["seed"].unique(maintain_order=True), counts, frame.height, frame.height, what)


def _manifest(
    what: dict[str, Any], command: Sequence[str], outcomes: Sequence[Outcome], planned: int, counts: dict[str, Any]
) -> dict[str, Any]:
    protocols = {"protocols": list(dict.fromkeys(outcome.protocol for outcome in outcomes))}
    seeds = {outcome.seed for outcome in outcomes}
    return _how_made(command, seeds, counts, len(outcomes), planned, protocols | what)


def _how_made(
    command: Sequence[str], seeds: Iterable[int], counts: dict[str, Any], runs: int, planned: int, what: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(command),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": runs == planned,
        "runs": runs,
        "runs_planned": planned,
        "outcomes": counts,
        "seeds": sorted(seeds),
        **what,
        "versions": versions(),
        "git_revision": git_revision(),
    }


def _counts(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        of_protocol = counts.setdefault(outcome.protocol, {})
        of_protocol[outcome.kind.value] = of_protocol.get(outcome.kind.value, 0) + 1
    return counts


def versions() -> dict[str, str]:
    """Of Python and what the results depend on."""
    packages = ["proto-v3", "numpy", "scipy", "polars", "matplotlib", "msgpack", "pydantic"]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def git_revision() -> str:
    """The project's commit, with `+changes` and a fingerprint of them if anything but results differs; `unknown`
    outside of a clone."""
    here = Path(__file__).resolve().parents[2]
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changes = _git(here, "diff", "HEAD", "--", ".", ":!results")
        return f"{commit}+changes-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
