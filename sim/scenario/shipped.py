# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario files that come with the project, by name. It reads none of them, and imports nothing heavy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files("scenarios")))
"""The shipped files: a package of their own, so that they are installed with the code."""


def shipped() -> dict[str, Path]:
    """The scenarios that come with the project, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def shipped_bases() -> dict[str, Path]:
    """What a file can extend by name: scenarios, and sets of parameters that are no scenario by themselves."""
    return {path.stem: path for path in sorted((FOLDER / "base").glob("*.toml"))} | shipped()
