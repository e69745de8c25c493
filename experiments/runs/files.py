# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that a user names: a regular file is replaced whole or not at all, anything else is written to or refused."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proto_v3.errors import UserError

KINDS = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}
"""What is refused."""
OWN_DESCRIPTOR = re.compile(r"/dev/(?P<name>stdout|stderr)|/(?:dev|proc/self)/fd/(?P<number>\d+)")
MOST_LINKS = 40


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that it yields. At the end, the new file replaces the one at `path`.

    The target of a symlink is replaced, the link stays. A FIFO, a character device or /dev/stdout gets the content.
    UserError if that fails, or if `path` is a folder, a block device or a socket.
    """
    check_file(path)
    try:
        special = _is_special(path)
        target = Path(os.path.realpath(path))
        # The folder is made with the user's umask for what is in it, and has room for a name of any length.
        with tempfile.TemporaryDirectory(prefix=".proto-v3-", dir=None if special else target.parent) as beside:
            new = Path(beside) / path.name
            yield new
            if special:
                _write_into(path, new)
                return
            if target.exists():
                shutil.copymode(target, new)
            os.replace(new, target)
    except BrokenPipeError:  # the reader of a FIFO or of stdout has seen enough
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def output_file(option: str, path: str | os.PathLike[str]) -> Path:
    """`path`, whose folder is made. UserError, which names `option`, if it cannot be written to.

    To be called before the work: a mistake is then found before it.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {file}: its folder cannot be made: {error.strerror}") from error
    check_file(file, option)
    return file


def check_file(path: Path, option: str = "") -> None:
    """UserError, which names `option`, if no file can be written to `path`: to be called before the work."""
    named = f"{option} {path}" if option else str(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise UserError(f"{named}: cannot be written: {error.strerror}") from error
    if kind := KINDS.get(stat.S_IFMT(mode)):
        raise UserError(f"{named}: must be the name of a file, and is {kind}")
    protected = mode and not os.access(path, os.W_OK)
    if protected or not (_is_special(path) or os.access(Path(os.path.realpath(path)).parent, os.W_OK)):
        why = "the file is write-protected" if protected else "no file can be made in its folder"
        raise UserError(f"{named}: cannot be written: {why}")


def _is_special(path: Path) -> bool:
    """Whether it is written to as it is: everything that is there and no regular file, and our own stdout."""
    return _own_descriptor(path) is not None or (path.exists() and not path.is_file())


def _own_descriptor(path: Path) -> int | None:
    """The number, if the path or the symlink that it is leads to an open file of this process, such as /dev/stdout."""
    at = os.path.abspath(path)
    for _ in range(MOST_LINKS):
        if found := OWN_DESCRIPTOR.fullmatch(at):
            return {"stdout": 1, "stderr": 2}.get(found["name"]) or int(found["number"])
        if not os.path.islink(at):
            return None
        at = os.path.normpath(os.path.join(os.path.dirname(at), os.readlink(at)))
    return None


def _write_into(path: Path, content: Path) -> None:
    """A file that is open already, such as stdout, goes on where it stands: opened anew it would begin at 0."""
    descriptor = _own_descriptor(path)
    if descriptor is not None:
        sys.stdout.flush()
        sys.stderr.flush()
    opened = os.open(path, os.O_WRONLY | os.O_NOCTTY) if descriptor is None else os.dup(descriptor)
    with open(opened, "wb") as sink, content.open("rb") as source:
        shutil.copyfileobj(source, sink)
