# SPDX-License-Identifier: GPL-2.0-or-later
"""How tables and figures look in a notebook."""

from __future__ import annotations

import io

import polars as pl

from experiments.draw.canvas import Figure

DPI = 80
"""Of a figure in a notebook: it is read on a screen, and kept in the repository."""


def whole_tables() -> None:
    """From now on, Polars prints all rows and columns of a table, without their types."""
    pl.Config.set_tbl_rows(-1)
    pl.Config.set_tbl_cols(-1)
    pl.Config.set_fmt_str_lengths(1000)
    pl.Config.set_tbl_hide_column_data_types(True)
    pl.Config.set_tbl_hide_dataframe_shape(True)


class Shown:
    """A figure as a cell's result: a PNG, and its title as text for readers who do not see it."""

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
    """A figure as the result of a notebook's cell, as a PNG of `dpi` dots an inch."""
    return Shown(figure, dpi)
