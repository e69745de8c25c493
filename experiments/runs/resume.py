# SPDX-License-Identifier: GPL-2.0-or-later
"""The finished runs of a sweep, kept while it goes on, so that an interruption of any kind loses none of them.

They are in an SQLite file: it stays whole even if a write is cut short. A row has a digest, for SQLite does not see a
bit that is flipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from experiments.runs.folder import SCHEMA_VERSION
from proto_v3.errors import UserError

JOURNAL = "-journal"
"""What SQLite calls the file beside it with a change that was cut short."""


@dataclass(slots=True)
class KeptRuns:
    """What a file of finished runs has in it."""

    rows: dict[str, str] = field(default_factory=dict)
    """Of the code that runs now, by cell, as JSON."""
    others: dict[str, str] = field(default_factory=dict)
    """The version that made them, by cell, of the rows that another version made."""
    damaged: int = 0
    """Rows that do not match their digests."""
    cut: bool = False
    """SQLite cannot read the file to its end."""

    @property
    def problem(self) -> str:
        """What is wrong with the file; empty if nothing is."""
        rows = f"{self.damaged} runs in it do not match their digests" if self.damaged else ""
        return " and ".join(filter(None, [rows, "SQLite cannot read all of it" if self.cut else ""]))


def read(path: Path, revision: str) -> KeptRuns:
    """The rows in a file that are as they were written; none if there is no file. UserError if it is something else."""
    kept = KeptRuns()
    if not os.path.lexists(path):
        return kept
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: is no regular file, and runs cannot be kept in it; remove it")
    try:
        with closing(sqlite3.connect(path)) as db:
            db.text_factory = bytes
            for columns in db.execute("select cell, version, row, digest from finished"):
                *parts, told = (bytes(each) if isinstance(each, bytes) else b"" for each in columns)
                if told != _digest(*parts).encode():
                    kept.damaged += 1
                    continue
                cell, version, row = (part.decode() for part in parts)
                if version == _version(revision):
                    kept.rows[cell] = row
                else:
                    kept.others[cell] = version
    except sqlite3.Error:
        kept.cut = True
    return kept


def put_aside(path: Path) -> Path:
    """Rename a damaged file, and its journal, out of the way; returns the new name."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")).exists():
        number += 1
    for suffix in (JOURNAL, ""):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


def remove(path: Path) -> None:
    """Remove a file of finished runs, and its journal, which would be played into the next one."""
    for suffix in (JOURNAL, ""):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


class RunStore:
    """The file that rows are added to, each under the key of its cell. UserError if that cannot be done."""

    def __init__(self, path: Path, revision: str) -> None:
        """`revision` is of the code that makes the runs."""
        self._path = path
        self._version = _version(revision)
        with self._errors():
            self._db = sqlite3.connect(path)
            self._db.execute("create table if not exists finished (cell text, version text, row text, digest text)")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"{self._path}: runs cannot be kept in it: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def add(self, cell: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.add_json({cell: json.dumps(row)})

    def add_json(self, rows: dict[str, str]) -> None:
        """Keep rows, in one step."""
        told = [(cell, self._version, row, _digest(*_bytes(cell, self._version, row))) for cell, row in rows.items()]
        with self._errors(), self._db:
            self._db.executemany("insert into finished values (?, ?, ?, ?)", told)


def _version(revision: str) -> str:
    return f"{revision} schema {SCHEMA_VERSION}"


def _bytes(*texts: str) -> Iterator[bytes]:
    return (text.encode() for text in texts)


def _digest(*parts: bytes) -> str:
    """Of all columns of a row, each with its length before it."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()
