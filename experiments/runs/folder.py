"""A folder that results are written into: tables, figures, a manifest, each whole or not at all.

It imports nothing heavy, because a live run checks its folder first, and its memory is measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proto_v3.errors import UserError

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

SCHEMA_VERSION = 5
"""Of the table of runs. It grows when a column changes its meaning."""


class ResultFolder:
    """A folder that results are written into. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Make the folder. UserError, before the work, if it cannot be made or written to."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}; name a folder that can") from error

    def remove(self, *names: str) -> None:
        """Remove files of an earlier run that would not fit the new ones."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def write_table(self, frame: pl.DataFrame, name: str, table_format: str) -> Path:
        """Write a table as NAME.parquet or NAME.csv."""
        path = self.folder / f"{name}.{table_format}"
        with replacing(path) as new:
            if table_format == "csv":
                frame.write_csv(new)
            else:
                frame.write_parquet(new, metadata={"schema_version": str(SCHEMA_VERSION)})
        return path

    def write_json(self, value: Any, name: str) -> Path:
        """Write NAME.json."""
        path = self.folder / f"{name}.json"
        with replacing(path) as new:
            new.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
        return path

    def write_figure(self, figure: Figure, name: str) -> list[Path]:
        """Write a figure as NAME.png and NAME.svg."""
        paths = [self.folder / f"{name}.png", self.folder / f"{name}.svg"]
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None  # the same runs give the same file
            with replacing(path) as new:
                figure.savefig(new, format=path.suffix[1:], dpi=160, metadata=metadata)
        return paths


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that it yields; at the end this replaces the file. UserError if that fails."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)
