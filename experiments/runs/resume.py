"""Runs that are done, kept while a sweep goes on: what was done is not lost, whatever ends it.

An SQLite file, for one that is cut short in the middle of a write is whole all the same.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.runs.folder import SCHEMA_VERSION
from proto_v3.errors import UserError

MADE_BY = "made by"


class RunStore:
    """The rows of a sweep, by the cell's key."""

    def __init__(self, path: Path, revision: str) -> None:
        """`revision` of the code that makes the runs. UserError if there is something else at that place."""
        self._path = path
        self._ours = f"{revision} schema {SCHEMA_VERSION}"
        try:
            self._db = sqlite3.connect(path)
            self._db.execute("create table if not exists told (what text primary key, told text)")
            self._db.execute("create table if not exists runs (cell text primary key, row text)")
            self._db.execute("insert or ignore into told values (?, ?)", (MADE_BY, self._ours))
            self._db.commit()
            (made_by,) = self._db.execute("select told from told where what = ?", (MADE_BY,)).fetchone()
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used to keep runs in: {error}; remove it") from error
        self.made_by = str(made_by)

    @property
    def fits(self) -> bool:
        """Whether what is in it was made by the same code."""
        return self.made_by == self._ours

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def add(self, cell: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        try:
            with self._db:
                self._db.execute("insert or replace into runs values (?, ?)", (cell, json.dumps(row)))
        except sqlite3.Error as error:
            raise UserError(f"{self._path}: cannot be written: {error}") from error

    def begin_anew(self) -> None:
        """Forget what there is: from now on it is this code's."""
        try:
            with self._db:
                self._db.execute("delete from runs")
                self._db.execute("update told set told = ? where what = ?", (self._ours, MADE_BY))
        except sqlite3.Error as error:
            raise UserError(f"{self._path}: cannot be written: {error}; remove it") from error
        self.made_by = self._ours

    def rows(self, cells: Collection[str]) -> dict[str, dict[str, Any]]:
        """What there is of these."""
        wanted = set(cells)
        try:
            kept = self._db.execute("select cell, row from runs")
            return {cell: json.loads(row) for cell, row in kept if cell in wanted}
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise UserError(f"{self._path}: is damaged: {error}; remove it") from error
