"""What the notebooks call: tables found, runs made, numbers of runs told. They have no logic of their own.

A *table of runs* has one row a run, columns as in experiments.runs.table; a sweep's has its factors too. Tables
that are made here are rounded for the eye, with the unit in the column's name; intervals are of 95 %
(experiments.study.statistics).
"""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from matplotlib.figure import Figure
from scipy.optimize import OptimizeWarning

from experiments.report import answers
from experiments.report.tables import value_text
from experiments.runs import table as results
from experiments.runs.frame import COMPLETED, completed_runs, number, path_shares, protocols
from experiments.runs.pool import Cell, run_cell
from experiments.study.experiment import CLAIMS, find, places
from experiments.study.statistics import interval, usl
from proto_v3.errors import UserError
from proto_v3.timeline import Timeline
from sim.run import simulate
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario, parameters
from sim.scenario.units import GIB, MIB, NS_PER_S
from sim.theory.downtime_bound import lower_bound

T = TypeVar("T")
Setting = str | int | float | bool | Sequence[str]

FOLDER_VARIABLE = "PROTO_V3_RESULTS"
"""Names the folder of results, if it is not that of the clone."""


# --- what is there already --------------------------------------------------------------------------------------------


def results_folder() -> Path:
    """That which the environment names, or results/; as seen from the clone, or else from here."""
    named = os.environ.get(FOLDER_VARIABLE) or "results"
    known = [folder / named for folder in (Path(__file__).resolve().parents[1], Path(), Path(".."))]
    return next((folder for folder in known if folder.is_dir()), known[0])


def runs(name: str) -> pl.DataFrame:
    """An experiment's table of runs. UserError if it was not made yet."""
    return _of_experiment(name, lambda folder: pl.read_parquet(folder / "runs.parquet"))


def answer(name: str) -> list[str]:
    """What an experiment found, in sentences: answer, limit, details, and what it says of the claims."""
    told = _of_experiment(name, lambda folder: json.loads((folder / "answer.json").read_text(encoding="utf-8")))
    findings = [f"{each['claim']} {each['verdict']}: {each['why']}" for each in told["findings"]]
    return [told["answer"], f"Limit: {told['limit']}", *told["details"], *findings]


def figures(name: str) -> Mapping[str, Figure]:
    """An experiment's figures by name, drawn anew from its table of runs."""
    manifest = _of_experiment(name, lambda folder: json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    return find(name).figures(runs(name), manifest["command"])


def _of_experiment(name: str, read: Callable[[Path], T]) -> T:
    find(name)
    folder = results_folder()
    make = (
        f"make them with: proto-v3 run {name}; or a few, in a minute, with: proto-v3 run {name} --quick, and set "
        f"{FOLDER_VARIABLE}=results/quick"
    )
    try:
        return read(folder / name)
    except FileNotFoundError as error:
        raise UserError(f"no results of {name} in {folder}; {make}") from error
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder / name}: cannot be read ({error}); {make}") from error


def claims() -> pl.DataFrame:
    """Each claim, and what all experiments in the folder of results together say of it."""
    told = answers.claims(answers.read(results_folder()))
    return pl.DataFrame(
        {
            "claim": [each.name for each in told],
            "text": [CLAIMS[each.name] for each in told],
            "verdict": [each.verdict for each in told],
            "says": [", ".join(dict.fromkeys(name for name, _ in each.findings)) for each in told],
        }
    )


# --- runs of one's own ------------------------------------------------------------------------------------------------


def settings(device: Mapping[str, Setting]) -> list[str]:
    """KEY=VALUE of each, as `--set` takes them."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in device.items()]


def command(base: str, protocol_names: Sequence[str], seeds: int, device: Mapping[str, Setting] | None = None) -> str:
    """The command that makes the same runs; its table, figure and manifest are in a folder then."""
    told = ["proto-v3", "compare", base, "--protocols", ",".join(protocol_names), "--seeds", str(seeds)]
    return shlex.join([*told, *(part for setting in settings(device or {}) for part in ("--set", setting))])


def compared(scenario: Scenario, protocol_names: Sequence[str], seeds: int) -> pl.DataFrame:
    """The table of runs under each protocol, with the seeds 1 to `seeds`. UserError for a protocol that is none."""
    named = [Protocol.parse(name, scenario) for name in protocol_names]
    cells = [Cell(scenario, protocol, seed) for seed in range(1, seeds + 1) for protocol in named]
    return results.table([_alone(run_cell, cell) for cell in cells])


def traced(scenario: Scenario, protocol: str, seed: int) -> Timeline:
    """The timeline of one run. UserError if it was not completed."""
    kept: list[Timeline] = []
    outcome = _alone(simulate, scenario, Protocol.parse(protocol, scenario), seed, keep=kept.append)
    if outcome.downtime_ns is None:
        raise UserError(f"{protocol}, seed {seed}: {outcome.kind.value} {outcome.reason}: there is no downtime")
    return kept[0]


def _alone(work: Callable[..., T], *arguments: Any, **more: Any) -> T:
    """In a thread of its own: a kernel has an event loop in its, which the virtual clock would not go beside."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments, **more).result()


def parameter_table(scenario: Scenario, keys: Iterable[str]) -> pl.DataFrame:
    """Of each parameter: its value as it is run with, and where that comes from."""
    known = parameters(scenario)
    rows = [(key, value_text(known[key]), scenario.sources.get(key, "not stated")) for key in keys if key in known]
    return pl.DataFrame(rows, schema=["parameter", "value", "source"], orient="row")


# --- tables of several runs -------------------------------------------------------------------------------------------


def downtimes(frame: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """One row a protocol (and a place, by these columns): runs, completed, and their downtime with its interval.

    Columns: `by`, protocol, runs, completed, downtime_ms, low_ms, high_ms, total_s (of the whole migration, the mean).
    """
    rows = []
    for at, some in places(frame, [*by, "protocol"]):
        done = some.filter(COMPLETED)
        row: dict[str, Any] = at | {"runs": some.height, "completed": done.height}
        if done.height:
            told = interval(done["downtime_ns"].to_numpy() / 1e6)
            row |= {"downtime_ms": round(told.mean, 1), "low_ms": round(told.low, 1), "high_ms": round(told.high, 1)}
            row |= {"total_s": round(number(done["total_ns"].mean()) / 1e9, 2)}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def where_it_goes(frame: pl.DataFrame) -> pl.DataFrame:
    """Each resource's share of the critical path through the downtime, %, one row a protocol; they sum to 100."""
    done = completed_runs(frame)
    return pl.DataFrame(
        [
            {"protocol": name}
            | {f"{each.name.lower()}_percent": round(100 * share, 1) for each, share in path_shares(done, name).items()}
            for name in protocols(done)
        ]
    )


def bounds(scenario: Scenario, protocol_names: Sequence[str]) -> pl.DataFrame:
    """The least downtime that each resource allows by itself, ms: a column a resource; the largest is the bound."""
    rows = []
    for name in protocol_names:
        protocol = Protocol.parse(name, scenario)
        told = lower_bound(protocol.applied(scenario), protocol)
        by_resource = {f"{resource}_ms": round(ns / 1e6, 1) for resource, ns in told.by_resource_ns.items()}
        rows.append(
            {"protocol": protocol.name, "bound_ms": round(told.total_ns / 1e6, 1), "set_by": told.resource}
            | by_resource
        )
    return pl.DataFrame(rows)


def above_bound(frame: pl.DataFrame) -> pl.DataFrame:
    """How far the completed runs are above their bound, one row a protocol: the ratio with its interval, and ms.

    Columns: protocol, bound_ms, set_by, ratio, ratio_low, ratio_high, over_ms.
    """
    rows = []
    for name in protocols(completed_runs(frame)):
        done = frame.filter(COMPLETED & (pl.col("protocol") == name)).drop_nulls("bound_ratio")
        if done.is_empty():
            continue
        ratio = interval(done["bound_ratio"].to_numpy())
        over = interval(((done["downtime_ns"] - done["bound_ns"]) / 1e6).to_numpy())
        rows.append(
            {
                "protocol": name,
                "bound_ms": round(number(done["bound_ns"].mean()) / 1e6, 1),
                "set_by": done["bound_by"][0],
            }
            | {"ratio": round(ratio.mean, 3), "ratio_low": round(ratio.low, 3), "ratio_high": round(ratio.high, 3)}
            | {"over_ms": round(over.mean, 1)}
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def read_parts(frame: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """What a read() waits for, one row a place: calls a run, us a call, and of these the shares of each part, %.

    Columns: `by`, reads, us_a_read, firmware_percent, lock_percent, copy_percent.
    """
    rows = []
    for at, some in places(frame.filter(COMPLETED), by):
        parts = {part: number(some[f"read_{part}_ns"].sum()) for part in ("firmware", "lock", "copy")}
        whole, calls = max(1.0, sum(parts.values())), max(1.0, number(some["reads"].sum()))
        shares = {f"{part}_percent": round(100 * value / whole, 1) for part, value in parts.items()}
        rows.append(at | {"reads": round(calls / some.height), "us_a_read": round(whole / calls / 1e3, 1)} | shares)
    return pl.DataFrame(rows, infer_schema_length=None)


def laws(frame: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """The Universal Scalability Law, fitted to what each place of read_scaling moves a second against N.

    Columns: `by`, n (how many N), one_gib_per_s, contention_percent, coherency_percent, best_n (null: it never falls),
    r_squared (null: the law has as many parameters as there are N). Places with less than three N are left out.
    """
    rows = []
    for at, some in places(frame.filter(COMPLETED), by):
        if (ns := some["streams"].n_unique()) < 3:
            continue
        gib = sum(device.state_mib for device in load(some["base"][0]).devices) * MIB / GIB
        moved_ns = (some["phase_drain_ns"] + some["phase_transfer_ns"]).to_numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
            law = usl(some["streams"].to_numpy(), gib * NS_PER_S / moved_ns)
        best = round(law.best_n) if law.best_n < 10 * number(some["streams"].max()) else None
        percent = {f"{name}_percent": round(100 * getattr(law, name), 2) for name in ("contention", "coherency")}
        row = at | {"n": ns, "one_gib_per_s": round(law.rate, 3)} | percent
        rows.append(row | {"best_n": best, "r_squared": round(law.r_squared, 4) if ns > 3 else None})
    return pl.DataFrame(rows, infer_schema_length=None)
