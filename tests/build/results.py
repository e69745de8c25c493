# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders of results in tests."""

from __future__ import annotations

from pathlib import Path

from experiments.draw.canvas import Figure
from experiments.runs.folder import ResultFolder
from experiments.runs.plan import Plan


def write_figure(where: Path, figure: Figure, name: str) -> list[Path]:
    """A result of one figure; returns its files."""
    with ResultFolder(where, Plan([], [], 0), force=True) as folder:
        folder.write_manifest({"schema_version": 1, "complete": True})
        paths = folder.write_figure(figure, name)
        folder.commit()
    return paths
