"""`proto-v3 report`: all results on one page, and their answers in the README.md of the results folder."""

from __future__ import annotations

from pathlib import Path

from experiments.report import answers, tables
from experiments.report.page import page
from experiments.report.tables import say
from experiments.runs.files import replacing
from experiments.study.experiment import NAMES

README = "README.md"


def run_report(results: str, page_file: str | None) -> int:
    """Write the page, and the answers into the results' README.md; returns the exit status.

    UserError if there is no such folder, or if something in it is damaged.
    """
    folder = Path(results)
    kept = answers.read(folder)
    path = Path(page_file) if page_file else folder / "report.html"
    html = page(folder, kept)
    with replacing(path) as new:
        new.write_text(html, encoding="utf-8")
    console = tables.console()
    say(console, f"Report: {path} ({len(html) / 1e6:.1f} MB), {len(kept)} of {len(NAMES)} experiments")
    readme = folder / README
    if readme.exists():
        with replacing(readme) as new:
            new.write_text(answers.with_answers(readme.read_text(encoding="utf-8"), kept), encoding="utf-8")
        say(console, f"Answers: {readme}")
    return 0
