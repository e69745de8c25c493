# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU with our patches: what is in the cache, what cannot be had, and patches that apply exactly or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kernel import cache, qemu_build, qemu_packages
from kernel.apt import Apt
from kernel.build import PROJECT
from kernel.cache import BuildError, UnavailableError
from kernel.qemu_build import BUILDS, PATCHES, BuiltQemu, Tree

ALL = sorted(PATCHES.glob("*.patch"))
DOCUMENT = PROJECT / "docs/real.md"
SOURCE = "one\ntwo\nthree\nfour\nfive\n"
PATCH = "What it does\n\n--- a/f.c\n+++ b/f.c\n@@ -2,3 +2,3 @@\n two\n-three\n+3\n four\n"


def put(version: str, digest: str) -> Path:
    """A whole entry of the cache."""

    def make(root: Path) -> None:
        for name in BUILDS:
            (root / name).touch()

    return cache.entry(f"qemu-built/{version}-{digest}", make, list(BUILDS))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path / "cache"))


def test_the_newest_source_of_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    put("10.0.9+ds-1", qemu_build.digest())
    newer = put("10.0.13+ds-0+deb13u1", qemu_build.digest())
    put("10.1.0+ds-1", "0123456789ab")
    (put("10.2.0+ds-1", qemu_build.digest()) / "early").unlink()
    monkeypatch.setenv("PATH", "")
    builds = qemu_build.get()
    assert builds == {name: BuiltQemu(newer, name) for name in BUILDS}
    assert {each.version for each in builds.values()} == {"10.0.13"}


def test_a_build_takes_the_firmware_of_a_packaged_qemu() -> None:
    qemu = BuiltQemu(put("10.0.13+ds-1", qemu_build.digest()), "early")
    with pytest.raises(UnavailableError, match=r"firmware .*: make qemu$"):
        _ = qemu.command

    def make(root: Path) -> None:
        (root / qemu_packages.VERSION_FILE).write_text("1:10.0.13+ds-1\n")

    packaged = cache.entry("qemu/10.0.13+ds-1", make, [qemu_packages.VERSION_FILE])
    assert qemu.command[0] == str(qemu.root / "early")
    assert qemu.command[1:3] == ["-L", f"{packaged}/usr/share/qemu"]


def test_other_patches_are_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ALL:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(qemu_build, "PATCHES", tmp_path)
    before = qemu_build.digest()
    with (tmp_path / "early.patch").open("a") as file:
        file.write("\n")
    assert qemu_build.digest() != before


def test_each_patch_is_used_says_what_it_does_and_has_one_line_of_context() -> None:
    assert sorted({name for patches in BUILDS.values() for name in patches}) == [path.stem for path in ALL]
    for path in ALL:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "SPDX-License-Identifier: GPL-2.0-or-later"
        assert re.match(r"vfio/migration: \w", lines[2])
        added, taken = qemu_build.changed_lines(path.stem)
        hunks = "\n".join(lines).count("\n@@ ")
        context = sum(line.startswith(" ") for line in lines)
        assert 0 < added <= 60
        assert taken <= 15
        assert context <= 2 * hunks + 2 * (added + taken)
        assert all(re.match(r"@@ -\d+,\d+ \+\d+,\d+ @@$", line) for line in lines if line.startswith("@@"))


@pytest.mark.parametrize("name", [path.stem for path in ALL])
def test_the_document_tells_how_many_lines_a_patch_adds(name: str) -> None:
    (row,) = [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith(f"| [{name}](")]
    assert row.split("|")[2].strip() == str(qemu_build.changed_lines(name)[0])


def test_lines_are_counted_without_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_build, "PATCHES", tmp_path)
    (tmp_path / "own.patch").write_text(PATCH.replace("+3\n", "+3\n++more\n"))
    assert qemu_build.changed_lines("own") == (2, 1)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(qemu_build, "PATCHES", tmp_path)
    (tmp_path / "own.patch").write_text(PATCH)
    source = tmp_path / "qemu-10.0.13"
    source.mkdir()
    (source / "f.c").write_text(SOURCE)
    return Tree(source, {}, 1)


def test_a_patch_is_there_while_it_is_built_and_gone_afterwards(tree: Tree) -> None:
    with tree.patched(["own"]):
        assert (tree.source / "f.c").read_text() == SOURCE.replace("three", "3")
    assert (tree.source / "f.c").read_text() == SOURCE
    assert [path.name for path in tree.source.iterdir()] == ["f.c"]


def test_a_patch_that_does_not_fit_exactly_is_told_and_not_applied(tree: Tree) -> None:
    (tree.source / "f.c").write_text(SOURCE.replace("two", "2"))
    with pytest.raises(BuildError, match=r"^own\.patch does not apply to qemu-10\.0\.13: "), tree.patched(["own"]):
        pass
    assert (tree.source / "f.c").read_text() == SOURCE.replace("two", "2")


def test_a_compilers_error_is_told(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ninja = tmp_path / "bin/ninja"
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\necho '[1/2] Compiling'\necho 'f.c:3: error: no'\nexit 1\n")
    ninja.chmod(0o755)
    monkeypatch.setenv("PATH", str(ninja.parent), prepend=":")
    tree.binary.parent.mkdir()
    with pytest.raises(BuildError, match=r"early, cannot be compiled:\nf\.c:3: error: no"):
        tree.compile("early")


@pytest.mark.parametrize(
    ("log", "words"), [("", "nothing yet"), ("[1/9] A\n[7/9] B\nf.c: [8/9] is no step\n", "7 of 9 steps")]
)
def test_how_far_it_is(log: str, words: str) -> None:
    assert qemu_build.steps_done(log) == words


def test_what_is_missing_is_named_for_one_who_is_not_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert qemu_build.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("qemu: no patched QEMU, skipped: packages are missing; on Debian, as root: apt-get install ")
    assert "ninja-build" in line


def test_a_mirror_without_the_source_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSource(Apt):
        def __init__(self, *_: object) -> None: ...

        def versions(self, package: str, kind: str = "Packages") -> list[tuple[str, str]]:
            return [] if (package, kind) == ("qemu", "Sources") else [("1", "trixie")]

    monkeypatch.setattr(qemu_build, "Apt", NoSource)
    monkeypatch.setattr(qemu_build, "TOOLS", {})
    with pytest.raises(UnavailableError, match=r"no source of trixie's QEMU"):
        qemu_build.get()
