"""Notebooks: what they show things with, and how they are executed in place."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.figure import Figure

DPI = 80
"""Of a figure in a notebook: it is read on a screen, and kept in the repository."""
KERNEL = "python3"


def whole_tables() -> None:
    """Tables are shown with all rows and columns, without types, from now on."""
    pl.Config.set_tbl_rows(-1)
    pl.Config.set_tbl_cols(-1)
    pl.Config.set_fmt_str_lengths(1000)
    pl.Config.set_tbl_hide_column_data_types(True)
    pl.Config.set_tbl_hide_dataframe_shape(True)


class Shown:
    """A figure as a cell's result: a PNG, and its title for who sees none."""

    def __init__(self, figure: Figure, dpi: int) -> None:
        self._title = figure.get_suptitle().strip()
        page = io.BytesIO()
        figure.savefig(page, format="png", dpi=dpi)
        self._png = page.getvalue()

    def __repr__(self) -> str:
        return f"Figure: {self._title}"

    def _repr_png_(self) -> bytes:
        return self._png


def shown(figure: Figure, dpi: int = DPI) -> Shown:
    """A figure, as a cell's last line."""
    return Shown(figure, dpi)


def execute(path: Path, changes: Mapping[str, str] | None = None) -> Any:
    """Run a notebook in its folder and return it with its outputs; `changes` replace text in its code first.

    Needs the extra `notebooks`. nbclient's CellExecutionError if a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for old, new in (changes or {}).items():
                cell.source = cell.source.replace(old, new)
    where_it_is = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=1800, kernel_name=KERNEL, resources=where_it_is, record_timing=False)
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    """`python -m experiments.notebook NOTEBOOK...`: run them, and keep their outputs in the files."""
    import nbformat

    parser = argparse.ArgumentParser(prog="python -m experiments.notebook", description=main.__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks:
        notebook = execute(path)
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
