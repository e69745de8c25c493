# SPDX-License-Identifier: GPL-2.0-or-later
"""The rule of how many seeds a place gets, on the kept results: with the runs that it would have made, the verdicts are
the same."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest

from experiments.runs.pool import Cell
from experiments.study.experiment import NAMES, Planned, Point, find
from experiments.study.seeds import SeedRule

ROOT = Path(__file__).parents[2]


def kept(name: str) -> pl.DataFrame:
    return pl.read_parquet(ROOT / "results" / name / "runs.parquet")


@lru_cache
def chosen(name: str) -> list[str]:
    """The cells of the runs that the rule would have asked for, from the kept ones."""
    experiment, runs = find(name), kept(name)
    told = [
        each for each in runs.columns[runs.columns.index("settings") + 1 :] if not each.startswith(("stage_", "seeds"))
    ]
    counted = {(each.protocol, *each.factors.items()) for each in experiment.points(False) if each.every_seed}
    planned, rows = [], {}
    for row in runs.iter_rows(named=True):
        factors = {each: row[each] for each in told if row[each] is not None}
        every_seed = (row["protocol"], *factors.items()) in counted
        point = Point(row["base"], row["protocol"], tuple(row["settings"]), factors, every_seed=every_seed)
        planned.append(Planned(point, cast(Cell, None), row["cell"]))
        rows[row["cell"]] = row
    return list(SeedRule(experiment.values).of_grid(planned, cast(dict[str, Any], rows)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_with_the_seeds_that_are_needed_the_verdicts_are_those_of_all_seeds(name: str) -> None:
    answer = json.loads((ROOT / "results" / name / "answer.json").read_text(encoding="utf-8"))
    found = find(name).answer(kept(name).filter(pl.col("cell").is_in(chosen(name))))
    assert [(each["claim"], each["verdict"]) for each in answer["findings"]] == [
        (each.claim, each.verdict) for each in found.findings
    ]


def test_the_first_page_of_the_results_says_how_many_runs_are_needed() -> None:
    all_runs, needed = (sum(map(of, NAMES)) for of in (lambda name: kept(name).height, lambda name: len(chosen(name))))
    assert needed < all_runs
    text = " ".join((ROOT / "results" / "README.md").read_text(encoding="utf-8").split())
    assert f"from the kept runs, {needed:,} of {all_runs:,}, every verdict below is the same" in text
