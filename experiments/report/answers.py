"""The results that `proto-v3 run` kept, read back: for the report, for the README.md of their folder, for the API."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from experiments.runs.manifest import clone
from experiments.study.claims import CLAIMS, Finding, Verdict
from experiments.study.experiment import NAMES, find
from proto_v3.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

FOLDER_VARIABLE = "PROTO_V3_RESULTS"
"""The environment variable that names the folder of results, if it is not results/."""
BEGIN = "<!-- answers: written by `proto-v3 report`, from the tables -->"
END = "<!-- end of the answers -->"


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """What one experiment wrote: its answer, its effects, its figures, and how it was made."""

    name: str
    question: str
    answer: str
    limit: str
    details: Sequence[str]
    findings: Sequence[Finding]
    effects: pl.DataFrame
    manifest: Mapping[str, Any]
    figures: Sequence[Path]
    """The PNGs, the most important one first; each has an SVG beside it."""

    @property
    def outcomes(self) -> dict[str, int]:
        """How many runs ended in which way, the most frequent first."""
        counts: Counter[str] = Counter()
        for of_protocol in self.manifest["outcomes"].values():
            counts.update(of_protocol)
        return dict(counts.most_common())


def read(results: Path) -> list[KeptAnswer]:
    """All answers in a results folder, in the order of the experiments.

    UserError if there is no such folder, or if an experiment's folder in it is damaged.
    """
    if not results.is_dir():
        raise UserError(f"{results}: no such folder; make results with: proto-v3 run all")
    return [_read(results / name) for name in NAMES if (results / name / "answer.json").exists()]


def _read(folder: Path) -> KeptAnswer:
    try:
        answer, manifest = _json(folder, "answer"), _json(folder, "manifest")
        figures = [folder / f"{name}.png" for name in answer["figures"]]
        for figure in figures:
            figure.with_suffix(".svg").stat()
        findings = [Finding(**finding) for finding in answer["findings"]]
        if unknown := {finding.claim for finding in findings} - CLAIMS.keys():
            raise ValueError(f"there is no claim {', '.join(sorted(unknown))}")
        for key in ("outcomes", "runs", "seeds", "command", "git_revision", "made"):
            manifest[key]
        return KeptAnswer(
            name=answer["experiment"],
            question=answer["question"],
            answer=answer["answer"],
            limit=answer["limit"],
            details=answer["details"],
            findings=findings,
            effects=pl.read_parquet(folder / "effects.parquet"),
            manifest=manifest,
            figures=figures,
        )
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); make it anew with: proto-v3 run {folder.name}") from error


def _json(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about v3, and the verdict of all experiments together."""

    name: str
    text: str
    verdict: str
    """`not tested` if no experiment has a finding on it."""
    findings: Sequence[tuple[str, Finding]]
    """Each with the name of its experiment."""


def claims_of(kept: Sequence[KeptAnswer]) -> list[Claim]:
    """Each claim with its verdict: the one that all experiments agree on, else `under conditions`."""
    found: dict[str, list[tuple[str, Finding]]] = {name: [] for name in CLAIMS}
    for each in kept:
        for finding in each.findings:
            found[finding.claim].append((each.name, finding))
    return [
        Claim(name, text, _together([finding.verdict for _, finding in found[name]]), found[name])
        for name, text in CLAIMS.items()
    ]


def _together(verdicts: Sequence[Verdict]) -> str:
    return "not tested" if not verdicts else verdicts[0] if len(set(verdicts)) == 1 else "under conditions"


# --- README.md of the results -----------------------------------------------------------------------------------------


def page(kept: Sequence[KeptAnswer]) -> str:
    """Claims, questions and answers in Markdown; the figures' paths are relative to the results folder."""
    lines = []
    for claim in claims_of(kept):
        lines.append(f"- **{claim.name}, {claim.verdict}:** {claim.text}")
        lines += [f"  - [{name}](#{name}), {finding.verdict}: {finding.why}" for name, finding in claim.findings]
    for each in kept:
        lines += ["", f"### {each.name}", "", f"**{each.question}** {each.answer}", "", f"*Limit:* {each.limit}", ""]
        lines += [f"![{each.question}]({each.name}/{figure.name})" for figure in each.figures[:1]]
        others = ", ".join(f"[{figure.stem}]({each.name}/{figure.name})" for figure in each.figures[1:])
        lines += ["", f"More: {others}"] if others else []
    return "\n".join(lines) + "\n"


def with_answers(readme: str, kept: Sequence[KeptAnswer]) -> str:
    """The text of README.md with its answers replaced. UserError if it has no place for them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"README.md of the results: has no place for the answers: the lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{page(kept)}\n{end}{after}"


# --- for the API ------------------------------------------------------------------------------------------------------


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
    return _read_kept(question, lambda folder: pl.read_parquet(folder / "runs.parquet"))


def kept_answer(question: str) -> list[str]:
    """The answer to a question, in sentences: the answer, its limit, details, findings on the claims.

    UserError as for `kept_runs`.
    """

    def sentences(folder: Path) -> list[str]:
        answer = _json(folder, "answer")
        findings = [f"{each['claim']} {each['verdict']}: {each['why']}" for each in answer["findings"]]
        return [answer["answer"], f"Limit: {answer['limit']}", *answer["details"], *findings]

    return _read_kept(question, sentences)


def kept_figures(question: str) -> Mapping[str, Figure]:
    """The figures of a question by name, drawn again from its table of runs. UserError as for `kept_runs`."""
    command = _read_kept(question, lambda folder: _json(folder, "manifest")["command"])
    from experiments.draw.canvas import own_settings

    with own_settings():
        return find(question).figures(kept_runs(question), command)


def claims() -> pl.DataFrame:
    """Each claim about v3, and what all kept results together say of it.

    Columns: claim (C1, ...), text, verdict (`supported`, `refuted`, `under conditions`, `not tested`), says (the
    questions that say so). UserError if there is no folder of results, or if one in it is damaged.
    """
    found = claims_of(read(results_folder()))
    return pl.DataFrame(
        {
            "claim": [each.name for each in found],
            "text": [each.text for each in found],
            "verdict": [each.verdict for each in found],
            "says": [", ".join(dict.fromkeys(name for name, _ in each.findings)) for each in found],
        }
    )


def _read_kept(question: str, read: Callable[[Path], T]) -> T:
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
