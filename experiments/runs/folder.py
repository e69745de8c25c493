# SPDX-License-Identifier: GPL-2.0-or-later
"""A folder that results are written into. The new result is staged, and replaces an older one when it is whole.

It imports nothing heavy, because a live run checks its folder first, and its memory is measured.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from experiments.runs.interrupt import deferred
from experiments.runs.lock import locked
from experiments.runs.plan import Plan, described
from proto_v3.errors import UserError
from proto_v3.text import clean

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

SCHEMA_VERSION = 6
"""Of the table of runs. It grows when a column changes its meaning."""
OUT = Path("out")
"""Where everything is written, in the current folder, unless the user names another place."""
MANIFEST = "manifest.json"
STAGE = ".proto-v3-new"
AT_WORK = "command.json"
"""In the stage: which command is at work."""
SUFFIXES = (".parquet", ".csv", ".json", ".png", ".svg")
FORMULA = r"^[=+\-@\t\r]"
"""What a spreadsheet would take a text for that begins like this."""


class ResultFolder:
    """A folder for the results of one command, used with `with`.

    At the start, before the work, it is made, locked and checked. Files are staged; `commit` lets them replace those of
    an earlier result. If the block ends before, the folder stays as it was.
    """

    def __init__(self, folder: Path, plan: Plan, *, force: bool = False) -> None:
        """`plan` is what the command is about to make. With `force`, other results may be replaced."""
        self.folder = folder
        """Where the result will be: after `write_manifest`, it may be a folder inside of the one that was named."""
        self.why_there = ""
        """Words about an earlier result that stays; empty if there is none."""
        self.plan = plan
        self._named = folder
        self._force = force
        self.stage = folder / STAGE
        """Where files are written first."""
        self._old: dict[str, Any] = {}
        self._manifest: dict[str, Any] = {}
        self._failed: UserError | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        """UserError if it cannot be written, if another command is at work in it, or if it holds other results."""
        with ExitStack() as stack:
            try:
                missing = [each for each in (self._named, *self._named.parents) if not each.exists()]
                self._named.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_empty, missing)
                if not stack.enter_context(locked(self._named)):
                    raise UserError(f"--out {self._named}: {self._at_work()}; wait for it, or name another folder")
                shutil.rmtree(self.stage, ignore_errors=True)  # of a command that was killed
                self.stage.mkdir()
                stack.callback(shutil.rmtree, self.stage, ignore_errors=True)
                self._say_at_work()
                self._check()
            except FileExistsError as error:
                raise UserError(f"--out {self._named}: cannot be written: it is no folder; name one") from error
            except OSError as error:
                why = f"cannot be written: {error.strerror}; name a folder that can"
                raise UserError(f"--out {self._named}: {why}") from error
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._cleanup:
            if error is not None and self._manifest:
                with contextlib.suppress(UserError, OSError):  # such as a full disk
                    self._place(whole=False)
                    self.commit()
                    print(f"The table of runs is in {self.folder}.", file=sys.stderr)

    # --- files ---------------------------------------------------------------------------------------------------

    def write_table(self, frame: pl.DataFrame, name: str, table_format: str) -> None:
        """Stage a table as NAME.parquet or NAME.csv. An error, such as a full disk, is told by `commit`."""
        with self._told_later(), self._staged(f"{name}.{table_format}") as new:
            content = io.BytesIO()  # Polars takes not every name of a file, and calls a full disk a thrift error
            if table_format == "csv":
                without_formulas(frame).write_csv(content)
            else:
                frame.write_parquet(content, metadata={"schema_version": str(SCHEMA_VERSION)})
            new.write_bytes(content.getbuffer())

    def write_json(self, value: Any, name: str) -> None:
        """Stage NAME.json. An error, such as a full disk, is told by `commit`."""
        with self._told_later(), self._staged(f"{name}.json") as new:
            new.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Stage the manifest; from then on, `folder` is where the result will be."""
        self._manifest = manifest
        self._place()

    def write_figure(self, figure: Figure, name: str) -> list[Path]:
        """Stage a figure as NAME.png and NAME.svg; returns the files that they will be. To be called after
        `write_manifest`. UserError if that fails."""
        return [self.folder / each for each in save_figure(figure, self.stage, name)]

    @contextlib.contextmanager
    def _staged(self, name: str) -> Iterator[Path]:
        new = self.stage / name
        try:
            yield new
        except OSError as error:
            new.unlink(missing_ok=True)
            raise UserError(f"{self._named / name}: cannot be written: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _told_later(self) -> Iterator[None]:
        """The result is printed first."""
        try:
            yield
        except UserError as error:
            self._failed = self._failed or error

    def commit(self) -> None:
        """Let the staged files replace the earlier result: tables and figures first, the manifest last.

        Files of the earlier result that the new one has not are removed. UserError if something cannot be written; the
        earlier result stays then.
        """
        with self._staged(AT_WORK):
            (self.stage / AT_WORK).unlink(missing_ok=True)
            names = sorted(path.name for path in self.stage.iterdir())
        others = [] if self._force else self._not_described(names)
        others += [
            name for name in names if os.path.lexists(self._named / name) and not _is_regular(self._named / name)
        ]
        if self.folder == self._named and others:
            self._put_aside("new", f"{self._named} has {', '.join(others)} already, and no manifest says what made it")
        listed = {"files": {name: digest(self.stage / name) for name in names}}
        self.write_json(self._manifest | listed, "manifest")
        if self._failed:
            raise self._failed
        self._manifest = {}
        with self._staged(MANIFEST), deferred():  # half a new result and half an old one would be neither
            if self.folder != self._named:
                self.stage.rename(self.folder)
                return
            for name in (*names, MANIFEST):
                os.replace(self.stage / name, self._named / name)
            for name, kept in files_of(self._old).items():
                path = self._named / name
                if name not in names and _is_regular(path) and digest(path) == kept:
                    path.unlink()

    # --- what is there already -----------------------------------------------------------------------------------

    def _check(self) -> None:
        """UserError if runs would be lost that this command does not make again, or files that nobody described."""
        file = self._named / MANIFEST
        ours = [path for path in sorted(self._named.iterdir()) if self._may_write(path.name)]
        if strange := [path for path in ours if not _is_regular(path)]:
            raise UserError(f"{strange[0]}: is no regular file; remove it, or name another folder with --out")
        self._old = read_manifest(file)
        if self._force:
            return
        right = "; --force replaces it, --out names another folder"
        if file.exists() and not self._old:
            raise UserError(f"{file}: is no manifest of proto-v3{right}")
        if others := self._not_described(path.name for path in ours):
            raise UserError(f"--out {self._named}: has {', '.join(others)}, and no manifest says what made it{right}")
        if self._old and not self.plan.replaces(Plan.of_manifest(self._old)):
            held = f"holds {described(self._old)}, which is of another command or scenario, or has more runs"
            raise UserError(f"--out {self._named}: {held}{right}")

    def _may_write(self, name: str) -> bool:
        stem, suffix = os.path.splitext(name)
        return name == MANIFEST or (stem in self.plan.writes and suffix in SUFFIXES)

    def _not_described(self, names: Iterable[str]) -> list[str]:
        """Those that are here and that the manifest does not list. Older manifests list nothing: all is theirs."""
        if self._old and "files" not in self._old:
            return []
        here = {path.name for path in self._named.iterdir()} - {MANIFEST}
        return sorted(here.intersection(names) - files_of(self._old).keys())

    def _place(self, whole: bool = True) -> None:
        """Find out whether the new result may replace the earlier one, or goes into a folder in this one."""
        new, old = self._manifest, self._old
        for worse, name, why in (
            (not whole, "unfinished", "the new result is not whole"),
            (not new["complete"] and _has_more(old, new), "interrupted", "that one has more runs"),
            (_failed_more(new, old), "failed", "more of the new runs FAILED"),
        ):
            if old and worse:
                self._put_aside(name, f"{self._named} keeps {described(old)}: {why}")
                return

    def _put_aside(self, name: str, why: str) -> None:
        number = 1
        while (folder := self._named / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        self.folder, self.why_there = folder, f" ({why})"

    def _say_at_work(self) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"command": self.plan.line, "process": os.getpid(), "since": since}
        with contextlib.suppress(OSError):  # on a full disk, the result is printed at least
            (self.stage / AT_WORK).write_text(json.dumps(told), encoding="utf-8")

    def _at_work(self) -> str:
        try:
            told = json.loads((self.stage / AT_WORK).read_text(encoding="utf-8"))
            return clean(f"`{told['command']}` (process {told['process']}, since {told['since']}) is at work in it")
        except (OSError, ValueError, KeyError, TypeError):
            return "another command is at work in it"


def save_figure(figure: Figure, stage: Path, name: str) -> list[str]:
    """Write a figure as NAME.png and NAME.svg into a result folder's stage; returns their names. UserError if that
    fails."""
    names = [f"{name}.png", f"{name}.svg"]
    for each in names:
        metadata = {"Date": None} if each.endswith(".svg") else None  # the same runs give the same file
        try:
            figure.savefig(stage / each, format=each[-3:], dpi=160, metadata=metadata)
        except OSError as error:
            for begun in names:
                (stage / begun).unlink(missing_ok=True)
            raise UserError(f"{stage.parent / each}: cannot be written: {error.strerror or error}") from error
        figure.set_layout_engine("none")  # laid out once, which is half of the work: the second file is alike
    return names


def read_manifest(file: Path) -> dict[str, Any]:
    """The manifest; empty if there is none that can be read as one."""
    try:
        manifest = json.loads(text_of(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) and "schema_version" in manifest else {}


def text_of(file: Path) -> str:
    """The text of a regular file. OSError for another one: a FIFO would be waited for, and a device never ends."""
    _check_regular(file)
    return file.read_text(encoding="utf-8-sig")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hex. OSError as for `text_of`."""
    _check_regular(file)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def damaged(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Which of the files that the manifest lists are missing or not as they were written."""
    wrong = []
    for name, kept in files_of(manifest).items():
        try:
            if digest(folder / name) != kept:
                wrong.append(f"{name} is not as it was written")
        except OSError:
            wrong.append(f"{name} is missing")
    return wrong


def without_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    """The table with "'" before each text that a spreadsheet would take for a formula."""
    import polars as pl

    text = pl.col(pl.String)
    return frame.with_columns(pl.when(text.str.contains(FORMULA)).then("'" + text).otherwise(text).name.keep())


def files_of(manifest: dict[str, Any]) -> dict[str, str]:
    """The files that a manifest lists, with their digests: of its own folder, whatever it says."""
    files = manifest.get("files")
    return {
        name: kept
        for name, kept in (files.items() if isinstance(files, dict) else ())
        if isinstance(kept, str) and name == os.path.basename(name) and name.endswith(SUFFIXES)
    }


def _has_more(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return old.get("complete") is not False or Plan.of_manifest(old).runs > Plan.of_manifest(new).runs


def _failed_more(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a new result has failed where the old one has not: a measurement in any run, a simulation in all runs."""
    now, before = _outcomes(new), _outcomes(old)
    if "live" in new:
        return now["FAILED"] > before["FAILED"]
    return now.keys() == {"FAILED"} != before.keys()


def _outcomes(manifest: dict[str, Any]) -> Counter[str]:
    """How many runs ended in which way."""
    counts: Counter[str] = Counter()
    waiting = [manifest.get("outcomes")]  # by protocol, or by scenario and protocol
    for value in waiting:
        for key, inner in value.items() if isinstance(value, dict) else ():
            if isinstance(inner, int):
                counts[key] += inner
            else:
                waiting.append(inner)
    return counts


def _is_regular(path: Path) -> bool:
    """A symlink is not: the folder may be somebody else's, and lead anywhere."""
    return path.is_file() and not path.is_symlink()


def _check_regular(file: Path) -> None:
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(file))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
