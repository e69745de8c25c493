# SPDX-License-Identifier: GPL-2.0-or-later
"""Which QEMU of the cache is meant, and how it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel import cache, qemu_packages
from kernel.cache import UnavailableError
from kernel.qemu_packages import SUITE_FILE, VERSION_FILE


@pytest.fixture(autouse=True)
def some_qemus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path))
    for suite, version in (
        ("trixie", "10.0.2+ds-2"),
        ("trixie", "10.0.13+ds-0+deb13u1"),
        ("trixie-backports", "11.1.3+ds-1~bpo13+1"),
    ):

        def make(root: Path, suite: str = suite, version: str = version) -> None:
            (root / VERSION_FILE).write_text(f"1:{version}\n")
            (root / SUITE_FILE).write_text(f"{suite}\n")

        cache.entry(f"qemu/{version}", make, [VERSION_FILE, SUITE_FILE])
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "folder"),
    [
        ("10", "10.0.13+ds-0+deb13u1"),
        ("10.0.2", "10.0.2+ds-2"),
        ("11", "11.1.3+ds-1~bpo13+1"),
        ("11.1", "11.1.3+ds-1~bpo13+1"),
        ("11.1.3", "11.1.3+ds-1~bpo13+1"),
    ],
)
def test_a_version_means_the_newest_that_begins_so(asked: str, folder: str, some_qemus: Path) -> None:
    command = qemu_packages.qemu_command(asked)
    root = f"{some_qemus}/qemu/{folder}"
    assert command[0] == f"{root}/usr/lib64/ld-linux-x86-64.so.2"
    assert command[3] == f"{root}/usr/bin/qemu-system-x86_64"
    assert all(word.startswith(root) for word in command if word.startswith("/"))


@pytest.mark.parametrize("asked", ["1", "11.2", "11.1.30", "9"])
def test_a_version_that_is_not_there_is_told_with_those_that_are(asked: str) -> None:
    with pytest.raises(UnavailableError, match=r"in the cache \(10\.0\.2, 10\.0\.13, 11\.1\.3\): make qemu"):
        qemu_packages.qemu_command(asked)


def test_with_both_in_the_cache_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert [each.version for each in qemu_packages.fetch()] == ["10.0.13", "11.1.3"]
