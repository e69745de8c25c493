# SPDX-License-Identifier: GPL-2.0-or-later
"""What the model leaves out, for the report's page.

docs/model.md states it; a copy of that section is beside this file, for the document is not installed with the code.
`python -m experiments.report.left_out` writes the copy, in a clone.
"""

from __future__ import annotations

import re
from pathlib import Path

from experiments.runs.files import replacing

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "model.md"
COPY = Path(__file__).with_name("left_out.md")
TITLE = "## What is left out\n"


def points() -> list[str]:
    """Each point as one line of text."""
    return [" ".join(point.split()) for point in re.split(r"^- ", COPY.read_text(encoding="utf-8"), flags=re.M)[1:]]


def section() -> str:
    """The section of docs/model.md. FileNotFoundError outside of a clone."""
    _, _, text = DOCUMENT.read_text(encoding="utf-8").partition(TITLE)
    return text.partition("\n## ")[0].strip() + "\n"


if __name__ == "__main__":
    with replacing(COPY) as new:
        new.write_text(section(), encoding="utf-8")
