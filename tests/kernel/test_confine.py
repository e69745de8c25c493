# SPDX-License-Identifier: GPL-2.0-or-later
"""A confined program sees its folders and nothing else, and is gone with its parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernel import confine
from kernel.build import PROJECT

CONFINE = [sys.executable, "-I", str(PROJECT / "kernel/confine.py")]


def test_each_version_of_landlock_knows_more_rights() -> None:
    known = [confine.rights(version) for version in range(1, 8)]
    assert known == sorted(known)
    assert known[0] == confine.READ | confine.WRITE_FILE | 0x1FF0
    assert known[-1] & confine.IOCTL_DEV


@pytest.mark.skipif(confine.landlock_version() == 0, reason="this kernel has no Landlock")
def test_a_confined_program_reads_and_writes_where_it_may(tmp_path: Path) -> None:
    for name in ("read", "write", "neither"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    script = "for each in read write neither; do cat $each/file; touch $each/new; done; cat /etc/passwd"
    system = [
        f"--read={path}" for path in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache") if Path(path).exists()
    ]
    folders = [f"--read={tmp_path}/read", f"--write={tmp_path}/write", "--write=/dev/null"]
    done = subprocess.run(
        [*CONFINE, *system, *folders, "--", "/bin/sh", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "readwrite"
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/new")) == ["write/new"]
    assert done.stderr.count("Permission denied") == 4


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    everything = [f"--write={path}" for path in Path("/").iterdir() if not path.is_symlink()]
    script = f"""
import os, subprocess
subprocess.Popen({[*CONFINE, *everything, "--", "/bin/sh", "-c", "echo started; exec sleep 1000"]!r})
"""
    parent = f"{script}\nimport time; time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.kill()
        assert process.stdout.read() == "", "until the pipe's last writer is gone"
