"""All results on one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import jinja2

from experiments.report import answers, left_out
from experiments.report.tables import parameter_rows
from experiments.runs.manifest import git_revision, versions
from experiments.study.experiment import NAMES
from proto_v3.errors import UserError
from sim.scenario.file import load
from sim.scenario.shipped import shipped

MAX_ROWS = 60
"""Of a table of effects on the page. effects.parquet has all of them."""
OTHERS = {
    "validate": "Does the simulation give what was published?",
    "agree-live-paced": "Does a live run take what the simulation says? Firmware-bound",
    "agree-live-biglock": "The same under one lock for all reads",
    "agree-live-reconfig": "The same with reconfigurations",
}
"""Folders whose figures show how far to trust the model, and the questions that they answer."""


def page(folder: Path, found: list[answers.KeptAnswer]) -> str:
    """The page as HTML, with the figures in it: a browser fetches nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = _picture
    environment.filters["cell"] = _cell
    missing = [name for name in NAMES if name not in {each.name for each in found}]
    return environment.get_template("report.html.j2").render(
        claims=answers.claims_of(found),
        found=found,
        missing=missing,
        others=list(_others(folder)),
        scenarios=[(scenario, list(parameter_rows(scenario))) for scenario in map(load, shipped())],
        limits=left_out.points(),
        versions=versions(),
        revision=git_revision(),
        max_rows=MAX_ROWS,
    )


def _picture(path: Path) -> str:
    """A figure as a data URL: its SVG, which is sharp at any size."""
    data = path.with_suffix(".svg").read_bytes()
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"


def _cell(value: object) -> str:
    """A value in a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _others(folder: Path) -> Iterator[tuple[str, list[Path], str]]:
    """The figures of each folder of OTHERS: their question, the PNGs, and the command that made them."""
    for name, question in OTHERS.items():
        figures = sorted((folder / name).glob("*.png"))
        if not figures:
            continue
        try:
            manifest = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))
            for figure in figures:
                figure.with_suffix(".svg").stat()
            yield question, figures, manifest["command"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / name}: cannot be read ({error}); make it again, or remove it") from error
