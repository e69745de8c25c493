"""Results as tables and files: one row a run, units in the column names, a manifest that tells how they were made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from proto_v3.errors import UserError
from proto_v3.timeline import PHASES, Resource
from sim.outcome import Outcome
from sim.scenario import Scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 3
"""Of the table of runs; grows when a column changes its meaning."""

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
        "late_looks",
        "peak_reorder_bytes",
        "peak_held_bytes",
        "send_blocked_ns",
        "wire_bytes",
        "device_bytes",
        "device_bytes_resent",
        "device_bytes_dropped",
        "device_bytes_vain",
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


def table(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """The runs as a table."""
    return pl.DataFrame([row(outcome) for outcome in outcomes], infer_schema_length=None)


class ResultFolder:
    """A folder that results are written into. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """UserError if the folder cannot be made or written to: found out before the work, not after it."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}; name a folder that can") from error

    def remove(self, *names: str) -> None:
        """Take away files of an earlier run which would not fit the new ones."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def write_table(self, frame: pl.DataFrame, name: str, table_format: str) -> Path:
        """Write a table as NAME.parquet or NAME.csv."""
        path = self.folder / f"{name}.{table_format}"
        with _replacing(path) as new:
            if table_format == "csv":
                frame.write_csv(new)
            else:
                frame.write_parquet(new, metadata={"schema_version": str(SCHEMA_VERSION)})
        return path

    def write_json(self, value: Any, name: str) -> Path:
        """Write NAME.json."""
        path = self.folder / f"{name}.json"
        with _replacing(path) as new:
            new.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
        return path

    def write_figure(self, figure: Figure, name: str) -> list[Path]:
        """Write a figure as NAME.png and NAME.svg."""
        import matplotlib

        paths = [self.folder / f"{name}.png", self.folder / f"{name}.svg"]
        for path in paths:
            # Without the date and the random ids of an SVG, the same runs give the same file.
            metadata = {"Date": None} if path.suffix == ".svg" else None
            with _replacing(path) as new, matplotlib.rc_context({"svg.hashsalt": "proto-v3"}):
                figure.savefig(new, format=path.suffix[1:], dpi=160, metadata=metadata)
        return paths


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write beside the file, and put it in its place when all of it is written. UserError if that fails."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)


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


def _manifest(
    what: dict[str, Any], command: Sequence[str], outcomes: Sequence[Outcome], planned: int, counts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(command),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": len(outcomes) == planned,
        "runs": len(outcomes),
        "runs_planned": planned,
        "outcomes": counts,
        "protocols": list(dict.fromkeys(outcome.protocol for outcome in outcomes)),
        "seeds": sorted({outcome.seed for outcome in outcomes}),
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
    packages = ["proto-v3", "numpy", "polars", "matplotlib", "msgpack", "pydantic"]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def git_revision() -> str:
    """The project's commit, with `+changes` if anything but results differs; `unknown` outside of a clone."""
    here = Path(__file__).resolve().parents[1]
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changes = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return f"{commit}+changes" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
