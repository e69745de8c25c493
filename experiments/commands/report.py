# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 report`: all results on one page, and their answers in the README.md of the results folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.report import answers, tables
from experiments.report.page import others, page
from experiments.report.tables import say
from experiments.runs.files import output_file, replacing
from experiments.runs.folder import OUT
from experiments.study.experiment import NAMES
from proto_v3.errors import UserError

README = "README.md"
PAGE = "report.html"


def run_report(results: str | None, page_file: str | None) -> int:
    """Write the page, and the answers into the results' README.md; returns the exit status.

    UserError if there are no results.
    """
    if "" in (results, page_file):
        raise UserError("report '': must be the name of a folder, and --page of a file")
    folder, which = _folder(results)
    found, problems = answers.examined(folder)
    shown, damaged = others(folder)
    problems += damaged
    readme = folder / README
    for each in (readme, *([] if page_file else [folder / PAGE])):
        if each.is_symlink():
            raise UserError(f"{each}: is a symlink, and the folder may be somebody else's; remove it, or name --page")
    text = _with_answers(readme, found) if readme.exists() and not problems else None
    path = output_file("--page", page_file or folder / PAGE)
    console = tables.console()
    say(console, f"Results: {folder}{which}")
    if quick := [each.name for each in found if each.quick]:
        say(console, f"{answers.QUICK} Of {', '.join(quick)}.")
    for claim in answers.claims_of(found):
        say(console, f"- {claim.name} {claim.told}: {claim.text}")
    html = page(found, shown, problems)
    with replacing(path) as new:
        new.write_text(html, encoding="utf-8")
    say(console, f"Report: {path} ({len(html) / 1e6:.1f} MB), {len(found)} of {len(NAMES)} experiments")
    if text is not None:
        with replacing(readme) as new:
            new.write_text(text, encoding="utf-8")
        say(console, f"Answers: {readme}")
    elif readme.exists():
        say(console, f"{readme} stays as it is, for not all is here:")
    for problem in problems:
        say(console, f"- {problem}")
    return 1 if problems else 0


def _with_answers(readme: Path, found: Sequence[answers.KeptAnswer]) -> str:
    """The text of README.md with these answers. UserError if it has no place for them."""
    try:
        return answers.with_answers(readme.read_text(encoding="utf-8"), found)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot be read: {error}") from error


def _folder(named: str | None) -> tuple[Path, str]:
    """The folder: a path, or a name in out/; else where `proto-v3 run` wrote last. And words about the choice."""
    if named is not None:
        own = OUT / named
        return (own if own.is_dir() and not Path(named).is_dir() else Path(named)), ""
    places = " and ".join(map(str, answers.OWN))
    found = answers.newest(answers.OWN)
    if found is None:
        raise UserError(
            f"no results in {places}: make some with `proto-v3 run all --quick`, or name a folder, as in "
            "`proto-v3 report results`"
        )
    return found, f" (the newest of {places})"
