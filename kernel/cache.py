# SPDX-License-Identifier: GPL-2.0-or-later
"""What is built or fetched once is kept outside the clone. An entry is whole, or it is not there."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

CONTENTS = ".contents.json"


class UnavailableError(Exception):
    """What was asked for cannot be had on this machine. The text says why, in one line."""


class BuildError(Exception):
    """Something that this machine should be able to make could not be made."""


def say(line: str) -> None:
    """Tell the user how far it is."""
    print(line, flush=True)


def folder() -> Path:
    """$PROTO_V3_CACHE; or proto-v3 in $XDG_CACHE_HOME, or in ~/.cache."""
    named = os.environ.get("PROTO_V3_CACHE")
    if named:
        return Path(named).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).absolute() / "proto-v3"


def stop_on_signals() -> None:
    """SIGTERM and SIGHUP end this process as an exception does: what it has begun is undone."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, stop)


def is_whole(entry: Path) -> bool:
    """Whether the entry has all the files that it had when it was made, in the same sizes."""
    try:
        contents: dict[str, int] = json.loads((entry / CONTENTS).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def entry(name: str, make: Callable[[Path], None], needed: Sequence[str]) -> Path:
    """The folder `name` of the cache. If it is not whole, `make` fills an empty folder, which then takes its place.

    `needed` are the files, by their paths in the folder, that is_whole() looks at later. One process at a time makes
    an entry; others wait for it. If `make` fails, nothing is left behind. Raises UnavailableError if the cache cannot
    be written.
    """
    path = folder() / name
    if is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} is read-only")
    except OSError as error:
        raise UnavailableError(f"the cache cannot be written: {error}") from None
    with locked(path.with_name(f".{path.name}.lock")):
        if not is_whole(path):
            for left in path.parent.glob(f".{glob.escape(path.name)}.new-*"):  # by a process that was killed
                remove(left)
            with temporary_folder(path.parent, f".{path.name}.new-") as made:
                new = made / "new"
                new.mkdir()
                make(new)
                sizes = {each: (new / each).stat().st_size for each in needed}
                (new / CONTENTS).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
                if path.exists():
                    path.rename(made / "broken")
                new.rename(path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process has this lock. It says so when it has to wait."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process makes {path.name.strip('.').removesuffix('.lock')}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def size_mib(path: Path) -> int:
    """MiB on the disk of a folder and all that is in it; of files with several names, once."""
    sizes = {}
    for parent, _, names in os.walk(path):
        for name in names:
            status = os.lstat(Path(parent, name))
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values()) >> 20


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that is removed at the end: by rm, which takes a kernel's source in a fraction of Python's time."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a folder and all that is in it."""
    subprocess.run(["rm", "-rf", "--", path], check=False)
