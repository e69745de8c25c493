# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest sees what it needs of the host, and writes only where it is told. (It was booted by kernel/guest.py.)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kernel import qemu_packages
from kernel.cache import UnavailableError, folder

ROOT = Path(__file__).resolve().parents[2]
OUT = os.environ.get("PROTO_V3_OUT")


def mounts() -> dict[str, tuple[str, str]]:
    """Of each mount point: the kind of file system, and ro or rw."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return {place: (kind, options.split(",")[0]) for _, place, kind, options, *_ in lines}


def test_one_folder_of_the_host_is_writable() -> None:
    of_host = {place: access for place, (kind, access) in mounts().items() if kind == "hostfs"}
    assert [place for place, access in of_host.items() if access == "rw"] == ([OUT] if OUT else [])
    assert of_host["/"] == "ro"


@pytest.mark.parametrize("where", ["/", "/usr", "/etc", "/root", str(ROOT), str(ROOT / "kernel"), str(folder())])
def test_a_write_anywhere_else_fails(where: str) -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        (Path(where) / "written-by-the-guest").touch()


@pytest.mark.parametrize("where", ["/tmp", "/run", "/dev/shm", *([OUT] if OUT else [])])
def test_a_write_there_does_not(where: str) -> None:
    path = Path(where) / "written-by-the-guest"
    path.write_text("x")
    assert path.read_text() == "x"
    path.unlink()


NEEDED = [ROOT, folder(), Path(sys.prefix), Path(sys.base_prefix), *([Path(OUT)] if OUT else [])]
NOT_NEEDED = [
    *map(Path, ("/etc/shadow", "/etc/apt", "/etc/hostname", "/home", "/var", "/boot", "/opt")),
    Path("/root", ".ssh"),
]


@pytest.mark.parametrize("path", [path for path in NOT_NEEDED if not any(path in each.parents for each in NEEDED)])
def test_what_it_does_not_need_is_not_there(path: Path) -> None:
    assert not path.exists()


def test_no_other_folder_of_the_host_can_be_mounted(tmp_path: Path) -> None:
    """Not by root in the guest either: the host's kernel refuses what User-Mode Linux asks for."""
    if os.environ["PROTO_V3_CONFINED"] == "0":
        pytest.skip("the host's kernel has no Landlock")
    subprocess.run(["/busybox", "mount", "-t", "hostfs", "-o", "/etc", "none", tmp_path], check=True)
    try:
        with pytest.raises(PermissionError):
            list(tmp_path.iterdir())
    finally:
        subprocess.run(["/busybox", "umount", tmp_path], check=True)


def test_loopback_is_up_and_is_all_there_is() -> None:
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        assert server.accept()[0].recv(1) == b"x"


def test_terminals_can_be_opened() -> None:
    ends = os.openpty()
    for each in ends:
        os.close(each)


@pytest.mark.parametrize("version", ["10", "11"])
def test_a_qemu_of_debian_starts(version: str) -> None:
    try:
        command = qemu_packages.qemu_command(version)
    except UnavailableError as error:
        pytest.skip(str(error))
    done = subprocess.run([*command, "-version"], capture_output=True, text=True, check=True)
    assert f"version {version}." in done.stdout
