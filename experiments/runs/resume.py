"""The finished runs of a sweep, kept while it goes on, so that an interruption of any kind loses none of them.

They are in an SQLite file: it stays whole even if a write is cut short.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from experiments.runs.folder import SCHEMA_VERSION
from proto_v3.errors import UserError

MADE_BY = "made by"
"""The key of the version that made the runs."""


class RunStore:
    """The rows of a sweep, each under the key of its cell. Every method raises UserError if the file is unusable."""

    def __init__(self, path: Path, revision: str) -> None:
        """`revision` is of the code that makes the runs now."""
        self._path = path
        self._ours = f"{revision} schema {SCHEMA_VERSION}"
        with self._errors("cannot be used to keep runs in"):
            self._db = sqlite3.connect(path)
            self._db.execute("create table if not exists versions (what text primary key, version text)")
            self._db.execute("create table if not exists finished (cell text primary key, row text)")
            self._db.execute("insert or ignore into versions values (?, ?)", (MADE_BY, self._ours))
            self._db.commit()
            (made_by,) = self._db.execute("select version from versions where what = ?", (MADE_BY,)).fetchone()
        self.made_by = str(made_by)

    @contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise UserError(f"{self._path}: {problem}: {error}; remove it") from error

    @property
    def fits(self) -> bool:
        """Whether the code that runs now made the runs in it."""
        return self.made_by == self._ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def add(self, cell: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        with self._errors("cannot be written"), self._db:
            self._db.execute("insert or replace into finished values (?, ?)", (cell, json.dumps(row)))

    def begin_anew(self) -> None:
        """Remove all rows: from now on the file belongs to the code that runs now."""
        with self._errors("cannot be written"), self._db:
            self._db.execute("delete from finished")
            self._db.execute("update versions set version = ? where what = ?", (self._ours, MADE_BY))
        self.made_by = self._ours

    def rows(self, cells: Set[str]) -> dict[str, dict[str, Any]]:
        """The rows of these cells that are there."""
        with self._errors("is damaged"):
            kept = self._db.execute("select cell, row from finished")
            return {cell: json.loads(row) for cell, row in kept if cell in cells}
