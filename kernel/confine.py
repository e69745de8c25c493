# SPDX-License-Identifier: GPL-2.0-or-later
"""Start a program that sees only some of the host's files, and dies with its parent.

    python3 kernel/confine.py --read /usr --write /tmp/out -- PROGRAM ARGUMENT...

Root in a User-Mode Linux can mount any folder of the host that its process may open. Landlock, where this host's kernel
has it (Linux 5.13, Documentation/userspace-api/landlock.rst), keeps the process to these folders. It needs no root.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULESET_VERSION = 1
PATH_BENEATH = 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
NEWEST_RIGHTS = 16
"""How many of Landlock's rights of files each version of it has; from version 5 on, this many are known here."""


def call(number: int, *arguments: object) -> int:
    """A system call. Returns its result, or raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def landlock_version() -> int:
    """The version of Landlock that this kernel has; 0: none, or it is turned off."""
    try:
        return call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(RULESET_VERSION))
    except OSError:
        return 0


def rights(version: int) -> int:
    """All rights of files and folders that this version of Landlock knows, as bits."""
    return (1 << RIGHTS_OF_VERSION.get(version, NEWEST_RIGHTS)) - 1


def restrict(version: int, readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """From here on, this process and its children open only what lies in these folders, or is one of these files."""
    handled = rights(version)
    attribute = struct.pack("=Q", handled)
    ruleset = call(CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), ctypes.c_uint(0))
    for paths, allowed in ((readable, READ), (writable, handled)):
        for path in paths:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = allowed & handled & (~0 if path.is_dir() else OF_FILES)
            rule = struct.pack("=Qi", granted, fd)
            call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint(0))
            os.close(fd)
    call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


def main(arguments: Sequence[str]) -> None:
    """Become the program."""
    parser = argparse.ArgumentParser(prog="kernel/confine.py")
    parser.add_argument("--read", type=Path, action="append", default=[])
    parser.add_argument("--write", type=Path, action="append", default=[])
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(arguments)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    version = landlock_version()
    if version:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        restrict(version, options.read, options.write)
    os.execv(options.program[0], options.program)


if __name__ == "__main__":
    main(sys.argv[1:])
