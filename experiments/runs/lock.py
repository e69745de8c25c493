# SPDX-License-Identifier: GPL-2.0-or-later
"""A lock on a folder of results: one command at a time writes into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the lock, until the block ends; False if somebody else has it.

    The kernel frees it however the process ends. True too where folders cannot be locked: some file systems, Windows.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield True
        return
    _held.add(descriptor)
    free = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        free = False
    except OSError:
        pass
    try:
        yield free
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _forget() -> None:
    """A forked worker must not hold the lock of a command that was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
