# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest is started with, and how its end is understood. (tests/real/test_guest.py looks at it from inside.)"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kernel import cache, guest
from kernel.build import PROJECT, Kernel
from kernel.guest import GuestError, Module, UserModeLinux


@pytest.mark.parametrize(("text", "status"), [("0\n", 0), ("7\n", 7), ("125\n", 125)])
def test_the_status_is_the_commands(text: str, status: int) -> None:
    assert guest.exit_status(text) == status


@pytest.mark.parametrize("text", ["", "\n", "1", "x\n", "0\n0\n", "-1\n"])
def test_a_status_that_is_not_whole_is_none(text: str) -> None:
    with pytest.raises(GuestError):
        guest.exit_status(text)


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] WARNING: CPU: 0 PID: 61 at drivers/vfio/vfio_main.c:1 x+0x1/0x2",
        "[    1.0] BUG: sleeping function called from invalid context at kernel/locking/mutex.c:1",
        "[    1.0] WARNING: possible circular locking dependency detected",
        "[    1.0] kernel BUG at mm/slub.c:1!",
        "[    1.0] WARNING: suspicious RCU usage",
        "[    1.0] Call Trace:",
        "[    1.0] Kernel panic - not syncing: Segfault with no mm",
    ],
)
def test_a_complaint_of_the_kernel_is_found(line: str) -> None:
    assert guest.complaints(f"[    0.0] Linux version\n{line}\n[    2.0] mtty: ok\n") == (line,)


@pytest.mark.parametrize(
    "line",
    [
        "[    0.0] Linux version 7.3.4 (proto-v3@proto-v3) #1 SMP",
        "[    0.0] CONFIG_DEBUG_BUGVERBOSE",
        "[    0.2] mtty 0000: Adding to iommu group 0",
        "[    0.0] Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
        "[    0.0]  memory used by lock dependency info: 3889 kB",
    ],
)
def test_an_ordinary_line_is_no_complaint(line: str) -> None:
    assert guest.complaints(line) == ()


def test_of_folders_in_one_another_the_outermost_is_mounted() -> None:
    paths = [Path("/usr"), Path("/usr/lib"), Path("/home/me/project"), Path("/home/me/project/.venv"), Path("/usrs")]
    assert guest.outermost(paths) == [Path("/home/me/project"), Path("/usr"), Path("/usrs")]


def test_a_guest_sees_what_it_needs_and_writes_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "out").mkdir()
    found = guest.mounted(UserModeLinux(Kernel(tmp_path), writable=tmp_path / "out"))
    assert [path for path, access in found.items() if access == "rw"] == [tmp_path / "out"]
    assert {Path("/usr"), tmp_path / "cache"} <= set(found)
    assert any(path in (PROJECT, *PROJECT.parents) for path in found)
    assert Path("/") not in found
    assert Path("/etc") not in found


def test_a_folder_inside_another_is_mounted_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path))
    (tmp_path / "out").mkdir()
    places = list(guest.mounted(UserModeLinux(Kernel(tmp_path), writable=tmp_path / "out")))
    assert places.index(tmp_path) < places.index(tmp_path / "out")


def test_the_command_keeps_its_words() -> None:
    script = guest.command_script({"NAME": "a 'b' $c"}, Path("/"), ["printf", "%s|", "x y", "$NAME", '"', "a\nb"])
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == 'x y|$NAME|"|a\nb|'


def test_the_command_has_its_variables_and_none_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the host")
    variables = guest.environment(UserModeLinux(Kernel(Path("/x/7.3.4-1-abc")), environment={"MORE": "1"}))
    assert "SECRET" not in variables
    assert variables["MORE"] == "1"
    assert variables["PROTO_V3_GUEST"] == "7.3.4-1-abc"
    assert variables["PROTO_V3_CACHE"] == str(cache.folder())


def test_a_modules_parameters_are_insmods_words() -> None:
    line = guest.module_line(Module(Path("/a folder/x.ko"), {"lock": "device", "size_kib": 64, "fault": "save 3"}))
    done = subprocess.run(["xargs", "printf", "%s|"], input=line, capture_output=True, text=True, check=True)
    assert done.stdout == "/a folder/x.ko|lock=device|size_kib=64|fault=save 3|"


def test_the_guests_memory_has_to_fit() -> None:
    assert guest.memory_folder(1).is_dir()
    with pytest.raises(GuestError, match="MiB for the guest's memory"):
        guest.memory_folder(1 << 40)
