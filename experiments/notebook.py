# SPDX-License-Identifier: GPL-2.0-or-later
"""Notebooks, executed in place."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runs.files import replacing

KERNEL = "python3"


def execute(path: Path, changes: Mapping[str, str] | None = None) -> Any:
    """Run a notebook in its folder, and return it with its outputs. `changes` replace text in its code first.

    Needs the extra `notebooks`. Raises nbclient's CellExecutionError if a cell fails.
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
    """`python -m experiments.notebook NOTEBOOK...`: run notebooks, and write their outputs into them."""
    import nbformat

    parser = argparse.ArgumentParser(prog="python -m experiments.notebook", description=main.__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    for path in parser.parse_args().notebooks:
        notebook = execute(path)
        with replacing(path) as new:
            nbformat.write(notebook, new)  # type: ignore[no-untyped-call]
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
