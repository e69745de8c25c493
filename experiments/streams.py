# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard output and standard error of the command. Whatever happens to them, the command does its work.

Their reader may have seen enough (`| head`), the disk may be full, they may be closed, their terminal may be gone, the
locale may not have the characters.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from typing_extensions import override


class Stream(io.FileIO):
    """A standard stream that takes everything. After an error it writes nothing any more."""

    error: OSError | None = None
    """Why it could not be written."""

    @override
    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                while (written := super().write(data)) is None:  # somebody else has made it non-blocking
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.error = error
        return len(data)

    @property
    def lost(self) -> str:
        """Why something is lost that somebody waits for; a reader that closed its pipe does not wait."""
        return "" if self.error is None or self.error.errno == errno.EPIPE else os.strerror(self.error.errno or 0)


def take_over() -> tuple[io.TextIOWrapper, Stream]:
    """Let both streams of this process take everything, from now on; returns standard output, and what is under it."""
    _open_closed()
    for before in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            before.flush()
    raw, stdout = _wrapped(1, sys.stdout, "replace")
    sys.stdout = stdout
    _, sys.stderr = _wrapped(2, sys.stderr, "backslashreplace")
    return stdout, raw


def _open_closed() -> None:
    """A file or socket that is opened must not get the number of a standard stream that is closed (`>&-`)."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _wrapped(descriptor: int, before: Any, errors: str) -> tuple[Stream, io.TextIOWrapper]:
    raw = Stream(descriptor, "w", closefd=False)
    encoding = "utf-8" if before is None else before.encoding
    lines = descriptor == 2 or raw.isatty()
    return raw, io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=lines)
