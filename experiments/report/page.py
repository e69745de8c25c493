# SPDX-License-Identifier: GPL-2.0-or-later
"""All results on one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from experiments.report import answers, left_out
from experiments.report.tables import parameter_rows
from experiments.runs.folder import MANIFEST, damaged
from experiments.runs.manifest import git_revision, versions
from proto_v3.text import clean
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


@dataclass(frozen=True, slots=True)
class Other:
    """A folder of OTHERS."""

    question: str
    figures: Sequence[Path]
    command: str


def page(found: Sequence[answers.KeptAnswer], shown: Sequence[Other], problems: Sequence[str]) -> str:
    """The page as HTML, with the figures in it: a browser fetches nothing. `problems` stand at its top."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = _picture
    environment.filters["cell"] = _cell
    return environment.get_template("report.html.j2").render(
        claims=answers.claims_of(found),
        found=found,
        others=shown,
        problems=problems,
        quick=[each.name for each in found if each.quick],
        about_quick=answers.QUICK,
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
    return f"{value:.4g}" if isinstance(value, float) else clean(str(value))


def others(folder: Path) -> tuple[list[Other], list[str]]:
    """The folders of OTHERS that are beside the answers, and which of them are damaged.

    Of what `proto-v3 run` writes into out/run, they are in out/.
    """
    found, problems = [], []
    for name, question in OTHERS.items():
        where = folder.parent / name if folder in answers.OWN else folder / name
        figures = sorted(where.glob("*.png"))
        if not figures:
            continue
        try:
            manifest = json.loads((where / MANIFEST).read_text(encoding="utf-8-sig"))
            for figure in figures:
                figure.with_suffix(".svg").stat()
            if wrong := damaged(where, manifest):
                raise ValueError("; ".join(wrong))
            found.append(Other(question, figures, clean(manifest["command"], answers.MOST_CHARS)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{where}: cannot be read ({clean(str(error))}); make it again, or remove it")
    return found, problems
