"""`proto-v3 report`: all results on one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from experiments.report import answers, left_out, tables
from experiments.report.parameters import parameter_rows
from experiments.report.tables import say
from experiments.runs.folder import replacing
from experiments.runs.manifest import git_revision, versions
from experiments.study.experiment import NAMES
from proto_v3.errors import UserError
from sim.scenario.file import load, shipped

README = "README.md"
MAX_ROWS = 60
"""Of a table of effects on the page; all of them are in effects.parquet."""
OTHERS = {
    "validate": "Does the simulation give what was published?",
    "agree-live-paced": "Does a live run take what the simulation says? Firmware-bound",
    "agree-live-biglock": "The same under one lock for all reads",
    "agree-live-reconfig": "The same with reconfigurations",
}
"""Folders whose figures say how far the model can be believed."""


def run_report(results: str, out: str | None) -> int:
    """Write the page, and the answers into the results' README; returns the exit status."""
    folder = Path(results)
    found = answers.read(folder)
    path = Path(out) if out else folder / "report.html"
    html = page(folder, found)
    with replacing(path) as new:
        new.write_text(html, encoding="utf-8")
    console = tables.console()
    say(console, f"Report: {path} ({len(html) / 1e6:.1f} MB), {len(found)} of {len(NAMES)} experiments")
    readme = folder / README
    if readme.exists():
        with replacing(readme) as new:
            new.write_text(answers.put_in(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
        say(console, f"Answers: {readme}")
    return 0


def page(folder: Path, found: list[answers.Told]) -> str:
    """The page as HTML: figures are in it, nothing is fetched."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = _picture
    environment.filters["cell"] = _cell
    missing = [name for name in NAMES if name not in {each.name for each in found}]
    return environment.get_template("report.html.j2").render(
        claims=answers.claims(found),
        found=found,
        missing=missing,
        others=list(_others(folder)),
        scenarios=[_scenario(name) for name in shipped()],
        limits=left_out.points(),
        versions=versions(),
        revision=git_revision(),
        max_rows=MAX_ROWS,
    )


def _picture(path: Path) -> str:
    """A figure as a data URL: the SVG, drawn sharp at any size."""
    data = path.with_suffix(".svg").read_bytes()
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"


def _cell(value: object) -> str:
    """A value in a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Other:
    """Figures of a folder that is no experiment, and how they were made."""

    name: str
    question: str
    figures: list[Path]
    command: str


def _others(folder: Path) -> Iterator[Other]:
    for name, question in OTHERS.items():
        figures = sorted((folder / name).glob("*.png"))
        if not figures:
            continue
        try:
            manifest = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))
            for figure in figures:
                figure.with_suffix(".svg").stat()
            yield Other(name, question, figures, manifest["command"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / name}: cannot be read ({error}); make it anew, or take it away") from error


def _scenario(name: str) -> dict[str, Any]:
    """A scenario's parameters with their sources."""
    scenario = load(name)
    rows = list(parameter_rows(scenario))
    return {"name": scenario.name, "description": scenario.description, "rows": rows}
