"""The results that `proto-v3 run` kept, read back: the runs of a question, its answer, its figures drawn again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from matplotlib.figure import Figure

from experiments.report import answers
from experiments.runs.manifest import clone
from experiments.study.claims import CLAIMS
from experiments.study.experiment import find
from proto_v3.errors import UserError

T = TypeVar("T")

FOLDER_VARIABLE = "PROTO_V3_RESULTS"
"""The environment variable that names the folder of results, if it is not results/."""


def results_folder() -> Path:
    """The folder of kept results: the one that the environment variable PROTO_V3_RESULTS names, or `results`.

    A relative name is looked up in the project's clone, then in the current folder, then in the one above it.
    """
    named = os.environ.get(FOLDER_VARIABLE) or "results"
    candidates = [folder / named for folder in (clone(), Path(), Path("..")) if folder is not None]
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def kept_runs(question: str) -> pl.DataFrame:
    """The table of runs of a question: one row a run, with the swept factors as columns.

    UserError for an unknown question, and if its results are missing or damaged.
    """
    return _read(question, lambda folder: pl.read_parquet(folder / "runs.parquet"))


def kept_answer(question: str) -> list[str]:
    """The answer to a question, in sentences: the answer, its limit, details, findings on the claims.

    UserError as for `kept_runs`.
    """
    return _read(question, lambda folder: _sentences(_json(folder, "answer")))


def _sentences(answer: dict[str, Any]) -> list[str]:
    findings = [f"{each['claim']} {each['verdict']}: {each['why']}" for each in answer["findings"]]
    return [answer["answer"], f"Limit: {answer['limit']}", *answer["details"], *findings]


def kept_figures(question: str) -> Mapping[str, Figure]:
    """The figures of a question by name, drawn again from its table of runs. UserError as for `kept_runs`."""
    command = _read(question, lambda folder: _json(folder, "manifest")["command"])
    return find(question).figures(kept_runs(question), command)


def claims() -> pl.DataFrame:
    """Each claim about v3, and what all kept results together say of it.

    Columns: claim (C1, ...), text, verdict (`supported`, `refuted`, `under conditions`, `not tested`), says (the
    questions that say so). UserError if there is no folder of results, or if one in it is damaged.
    """
    found = answers.claims(answers.read(results_folder()))
    return pl.DataFrame(
        {
            "claim": [each.name for each in found],
            "text": [CLAIMS[each.name] for each in found],
            "verdict": [each.verdict for each in found],
            "says": [", ".join(dict.fromkeys(name for name, _ in each.findings)) for each in found],
        }
    )


def _json(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _read(question: str, read: Callable[[Path], T]) -> T:
    find(question)
    folder = results_folder()
    how = (
        f"make them with: proto-v3 run {question}; or a few, in a minute, with: proto-v3 run {question} --quick, and "
        f"set {FOLDER_VARIABLE}=results/quick"
    )
    try:
        return read(folder / question)
    except FileNotFoundError as error:
        raise UserError(f"no results of {question} in {folder}; {how}") from error
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder / question}: cannot be read ({error}); {how}") from error
