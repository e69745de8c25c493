# SPDX-License-Identifier: GPL-2.0-or-later
"""The results that `proto-v3 run` kept, read back: for the report, for the README.md of their folder, for the API."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import polars as pl

from experiments.runs import frame
from experiments.runs.folder import MANIFEST, OUT, damaged, text_of
from experiments.runs.manifest import clone
from experiments.study.claims import CLAIMS, Finding, Verdict
from experiments.study.experiment import NAMES, find
from proto_v3.errors import UserError
from proto_v3.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

FOLDER_VARIABLE = "PROTO_V3_RESULTS"
"""The environment variable that names the folder of results, if it is not results/."""
OWN = (OUT / "run", OUT / "quick")
"""Where `proto-v3 run` writes, unless the user names another place."""
QUICK = "A quick run: a coarse grid, few repeats, wide intervals."
MOST_CHARS = 20_000
"""Of a text in a file of results."""
ANSWER_KEYS = {"question": str, "answer": str, "limit": str, "details": list, "findings": list, "figures": list}
MANIFEST_KEYS = {"outcomes": dict, "runs": int, "seeds": list, "command": str, "git_revision": str, "made": str}
"""What is read of the files, with its type."""
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
    def quick(self) -> bool:
        """Whether its runs were those of `proto-v3 run --quick`: few repeats, wide intervals."""
        return self.manifest.get("quick") is True

    def verdict(self, finding: Finding) -> str:
        """What it says of a claim."""
        return told_as_quick(finding.verdict, self.quick)

    @property
    def outcomes(self) -> dict[str, int]:
        """How many runs ended in which way, the most frequent first."""
        counts: Counter[str] = Counter()
        for of_protocol in self.manifest["outcomes"].values():
            counts.update(of_protocol)
        return dict(counts.most_common())


def told_as_quick(verdict: str, quick: bool) -> str:
    """A verdict, with the words that a quick run's must have."""
    return f"{verdict} (quick run)" if quick else verdict


def read(results: Path) -> list[KeptAnswer]:
    """All answers in a results folder, in the order of the experiments.

    UserError if there is no such folder, or if an experiment's folder in it is damaged.
    """
    return [_read(folder) for folder in _folders(results) if (folder / "answer.json").exists()]


def examined(results: Path) -> tuple[list[KeptAnswer], list[str]]:
    """All answers that can be read, and what is missing, damaged or not complete, a sentence each.

    UserError if there is no such folder, or no answer in it.
    """
    folders = [folder for folder in _folders(results) if folder.is_dir()]
    if not folders:
        raise UserError(f"{results}: has no answers in it; make some with: {_command(results, 'all')}")
    found, problems = [], []
    if missing := [name for name in NAMES if results / name not in folders]:
        problems.append(f"not run yet: {', '.join(missing)}; make them with: {_command(results, *missing)}")
    for folder in folders:
        try:
            kept = _read(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        found.append(kept)
        runs, planned = kept.manifest["runs"], kept.manifest.get("runs_planned")
        if kept.manifest.get("complete") is False:
            problems.append(f"{folder.name}: is not complete: {runs} of {planned} runs")
    return found, problems


def _folders(results: Path) -> list[Path]:
    if not results.is_dir():
        raise UserError(f"{results}: no such folder; make results with: {_command(results, 'all')}")
    return [results / name for name in NAMES]


def _read(folder: Path) -> KeptAnswer:
    try:
        manifest = _json(folder, "manifest")
        _check_types("manifest", manifest, MANIFEST_KEYS)
        if wrong := damaged(folder, manifest):
            raise ValueError("; ".join(wrong))
        answer = _json(folder, "answer")
        _check_types("answer", answer, ANSWER_KEYS)
        if answer.get("quick", manifest.get("quick")) != manifest.get("quick"):
            raise ValueError("answer.json and manifest.json differ in whether the run was quick")
        runs = frame.read(folder / "runs.parquet").height
        if runs != manifest["runs"]:
            raise ValueError(f"runs.parquet has {runs} runs, and the manifest says {manifest['runs']}")
        figures = [folder / f"{_file_name(name)}.png" for name in answer["figures"]]
        for figure in figures:
            figure.stat()
            figure.with_suffix(".svg").stat()
        findings = [Finding(**finding) for finding in answer["findings"]]
        if unknown := {finding.claim for finding in findings} - CLAIMS.keys():
            raise ValueError(f"there is no claim {', '.join(sorted(unknown))}")
        if strange := [finding.verdict for finding in findings if finding.verdict not in get_args(Verdict)]:
            raise ValueError(f"there is no verdict {strange[0]}")
        return KeptAnswer(
            name=folder.name,
            question=answer["question"],
            answer=answer["answer"],
            limit=answer["limit"],
            details=answer["details"],
            findings=findings,
            effects=frame.read(folder / "effects.parquet"),
            manifest=manifest,
            figures=figures,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        again = _command(folder.parent, folder.name)
        raise UserError(f"{folder}: cannot be read ({_why(error)}); make it anew with: {again}") from error


def _check_types(name: str, content: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    """KeyError for a key that is missing, ValueError for another type."""
    for key, kind in keys.items():
        if not isinstance(content[key], kind):
            raise ValueError(f"{name}.json: {key} must be of type {kind.__name__}")
    for counts in content.get("outcomes", {}).values():
        if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
            raise ValueError(f"{name}.json: outcomes must be counts by protocol")


def _command(results: Path, *names: str) -> str:
    """The command that makes answers in this folder."""
    where = {OWN[0]: [], OWN[1]: ["--quick"]}.get(results, ["--out", str(results)])
    return shlex.join(["proto-v3", "run", *names, *where])


def _why(error: Exception) -> str:
    """What is wrong with a file, in a line."""
    if isinstance(error, OSError):
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return clean(f"{error} is missing" if isinstance(error, KeyError) else str(error))


def _file_name(name: str) -> str:
    """A name that a file of results says. ValueError if it is one in another folder."""
    if name != os.path.basename(name):
        raise ValueError(f"a figure is called {name}")
    return name


def _json(folder: Path, name: str) -> dict[str, Any]:
    """A file of results, its texts cleaned: it may be somebody else's."""
    content = _cleaned(json.loads(text_of(folder / f"{name}.json")))
    if not isinstance(content, dict):
        raise ValueError(f"{name}.json is no JSON object")
    return content


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value, MOST_CHARS)
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return {_cleaned(key): _cleaned(each) for key, each in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about v3, and the verdict of all experiments together."""

    name: str
    text: str
    verdict: str
    """`not tested` if no experiment has a finding on it."""
    findings: Sequence[tuple[KeptAnswer, Finding]]
    """Each with what its experiment wrote."""

    @property
    def quick(self) -> bool:
        """Whether a quick run's verdict is among them."""
        return any(kept.quick for kept, _ in self.findings)

    @property
    def told(self) -> str:
        """The verdict, with the words that a quick run's must have."""
        return told_as_quick(self.verdict, self.quick)


def claims_of(kept: Sequence[KeptAnswer]) -> list[Claim]:
    """Each claim with its verdict: the one that all experiments agree on, else `under conditions`."""
    found: dict[str, list[tuple[KeptAnswer, Finding]]] = {name: [] for name in CLAIMS}
    for each in kept:
        for finding in each.findings:
            found[finding.claim].append((each, finding))
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
        lines.append(f"- **{claim.name}, {claim.told}:** {claim.text}")
        lines += [
            f"  - [{each.name}](#{each.name}), {each.verdict(finding)}: {finding.why}"
            for each, finding in claim.findings
        ]
    for each in kept:
        quick = f"*{QUICK}* " if each.quick else ""
        lines += ["", f"### {each.name}", "", f"{quick}**{each.question}** {each.answer}", ""]
        lines += [f"*Limit:* {each.limit}", ""]
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

    A relative name is looked up in the project's clone, then in the current folder, then in the one above it. If no
    folder is named and there is no `results`, it is the newest that `proto-v3 run` has written here.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    candidates = [folder / (named or "results") for folder in (clone(), Path(), Path("..")) if folder is not None]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    return found or (None if named else newest(OWN)) or candidates[0]


def newest(folders: Sequence[Path]) -> Path | None:
    """The folder in which an answer was written last; None if none of them has one."""
    made = {
        folder: max((file.stat().st_mtime for name in NAMES for file in folder.glob(f"{name}/{MANIFEST}")), default=0.0)
        for folder in folders
    }
    return max((folder for folder in folders if made[folder]), key=made.__getitem__, default=None)


def kept_runs(question: str) -> pl.DataFrame:
    """The table of runs of a question: one row a run, with the swept factors as columns.

    UserError for an unknown question, and if its results are missing or damaged.
    """
    return _read_kept(question, lambda folder: frame.read(folder / "runs.parquet"))


def kept_answer(question: str) -> list[str]:
    """The answer to a question, in sentences: the answer, its limit, details, findings on the claims.

    If it is of a quick run, that is said first, and with each finding. UserError as for `kept_runs`.
    """

    def sentences(folder: Path) -> list[str]:
        answer, quick = _json(folder, "answer"), _json(folder, "manifest").get("quick") is True
        findings = [
            f"{each['claim']} {told_as_quick(each['verdict'], quick)}: {each['why']}" for each in answer["findings"]
        ]
        told = [answer["answer"], f"Limit: {answer['limit']}", *answer["details"], *findings]
        return [QUICK, *told] if quick else told

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
    questions that say so), quick (whether a quick run is among them). UserError if there is no folder of results, or if
    one in it is damaged.
    """
    found = claims_of(read(results_folder()))
    return pl.DataFrame(
        {
            "claim": [each.name for each in found],
            "text": [each.text for each in found],
            "verdict": [each.verdict for each in found],
            "says": [", ".join(dict.fromkeys(kept.name for kept, _ in each.findings)) for each in found],
            "quick": [each.quick for each in found],
        }
    )


def _read_kept(question: str, read: Callable[[Path], T]) -> T:
    find(question)
    folder = results_folder()
    how = (
        f"make them with: proto-v3 run {question}, and set {FOLDER_VARIABLE}={OWN[0]}; or a few, in a minute, with "
        f"--quick, and set {FOLDER_VARIABLE}={OWN[1]}"
    )
    try:
        return read(folder / question)
    except FileNotFoundError as error:
        raise UserError(f"no results of {question} in {folder}; {how}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"{folder / question}: cannot be read ({_why(error)}); {how}") from error
