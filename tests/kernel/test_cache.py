# SPDX-License-Identifier: GPL-2.0-or-later
"""An entry of the cache is whole, or it is not there."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from kernel import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(folder: Path) -> None:
    (folder / "file").write_text("whole")


def never(folder: Path) -> None:
    raise AssertionError("made a second time")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("PROTO_V3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/proto-v3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache/proto-v3"


def test_an_entry_is_made_once() -> None:
    first = cache.entry("kind/name", make, ["file"])
    assert (first / "file").read_text() == "whole"
    assert cache.entry("kind/name", never, ["file"]) == first


@pytest.mark.parametrize("harm", ["removed", "cut", "no contents", "contents cut", "a file in its place"])
def test_a_broken_entry_is_made_again(harm: str) -> None:
    entry = cache.entry("kind/name", make, ["file"])
    if harm == "removed":
        (entry / "file").unlink()
    elif harm == "cut":
        (entry / "file").write_text("who")
    elif harm == "no contents":
        (entry / cache.CONTENTS).unlink()
    elif harm == "contents cut":
        (entry / cache.CONTENTS).write_text('{"file')
    else:
        cache.remove(entry)
        entry.write_text("")
    assert not cache.is_whole(entry)
    assert (cache.entry("kind/name", make, ["file"]) / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), SystemExit(143)])
def test_one_that_fails_leaves_nothing(error: BaseException, own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        make(folder)
        raise error

    with pytest.raises(type(error)):
        cache.entry("kind/name", fail, ["file"])
    assert [path.name for path in (own_cache / "kind").iterdir()] == [".name.lock"]


def test_what_is_needed_has_to_be_made(own_cache: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cache.entry("kind/name", make, ["file", "another"])
    assert not (own_cache / "kind/name").exists()


def make_once(log: str, start: multiprocessing.synchronize.Barrier) -> None:
    def make_and_tell(folder: Path) -> None:
        make(folder)
        with open(log, "a") as file:
            file.write("made\n")

    start.wait(30)
    cache.entry("kind/name", make_and_tell, ["file"])


def test_of_two_processes_one_makes_it(tmp_path: Path) -> None:
    start = multiprocessing.Barrier(2)
    log = tmp_path / "log"
    both = [multiprocessing.Process(target=make_once, args=(str(log), start)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert log.read_text() == "made\n"
    assert [each.exitcode for each in both] == [0, 0]


def test_a_file_with_two_names_takes_its_room_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(3 << 20))
    before = cache.size_mib(tmp_path)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    assert cache.size_mib(tmp_path) == before >= 3


def test_a_cache_that_cannot_be_written_is_told_in_one_line(own_cache: Path) -> None:
    own_cache.write_text("a file")
    with pytest.raises(cache.UnavailableError, match=r"^the cache cannot be written: .*kind"):
        cache.entry("kind/name", make, ["file"])
