# SPDX-License-Identifier: GPL-2.0-or-later
"""What apt prints is understood: mirrors, names, versions."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from kernel import apt
from kernel.cache import UnavailableError

PRINT_URIS = """\
'http://first.example/debian/dists/bookworm/InRelease' first.example_debian_dists_bookworm_InRelease 0 
'http://first.example/debian/dists/bookworm-updates/InRelease' first.example_debian_dists_bookworm-updates_InRelease 0 
'http://first.example/security/dists/bookworm-security/InRelease' first.example_security_InRelease 0 
'https://tool.example/apt/dists/bookworm/InRelease' tool.example_apt_dists_bookworm_InRelease 0 
'mirror+file:/etc/apt/mirrors/debian.list/dists/stable/Release' debian.list_dists_stable_Release 0 
'http://first.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' first.example_Packages 0 
"""  # noqa: W291 apt prints it so

MADISON = """\
 linux-source-7.3 | 7.3.4-1~bpo13+1 | http://first.example/debian trixie-backports/main amd64 Packages
 linux-source-7.3 | 7.3.2-1~bpo13+1 | http://first.example/debian trixie/main amd64 Packages
"""


def test_the_mirror_is_the_one_that_has_this_machines_suite() -> None:
    assert apt.mirrors(PRINT_URIS, "bookworm") == [
        "http://first.example/debian",
        "https://tool.example/apt",
        "mirror+file:/etc/apt/mirrors/debian.list",
    ]


@pytest.mark.parametrize("output", ["", "'http://a.example/ubuntu/dists/noble/InRelease' x 0\n", "E: no\n"])
def test_without_a_mirror_of_debian_there_is_none(output: str) -> None:
    assert apt.mirrors(output, "noble-not-listed") == []


def test_the_newest_source_is_chosen_by_number_and_not_by_letter() -> None:
    names = ["linux-source-7.9", "linux-source-7.10", "linux-source-6.12", "linux-source-7.11-rt", "linux-source"]
    assert apt.newest(names, "linux-source-") == ((7, 10), "linux-source-7.10")


def test_of_no_source_none_is_the_newest() -> None:
    assert apt.newest(["linux-source"], "linux-source-") is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("1:11.1.3+ds-1~bpo13+1", (11, 1, 3)),
        ("7.3.4-1~bpo13+1", (7, 3, 4)),
        ("10", (10,)),
        ("", ()),
        ("unknown", ()),
    ],
)
def test_the_upstream_version_of_a_package(text: str, version: Sequence[int]) -> None:
    assert apt.version_of(text) == version


def test_each_version_comes_with_its_suite() -> None:
    expected = [("7.3.4-1~bpo13+1", "trixie-backports"), ("7.3.2-1~bpo13+1", "trixie")]
    assert apt.candidates(MADISON) == expected
    assert apt.candidates("") == []


def test_source_packages_are_told_from_others() -> None:
    listed = MADISON + " qemu | 1:10.0.13+ds-0+deb13u1 | http://mirror/debian trixie/main Sources\n"
    assert apt.candidates(listed, "Sources") == [("1:10.0.13+ds-0+deb13u1", "trixie")]


def test_a_machine_without_apt_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"^this is no Debian: there is no apt-get$"):
        apt.Apt(tmp_path)


def fake_apt_get(folder: Path, script: str) -> None:
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "apt's configuration names no mirror of Debian's main archive"),
        (
            """[ "$2" = --print-uris ] || exit 100; echo "'http://a.example/dists/stable/InRelease' x 0" """,
            "the machine's mirror gives no lists of trixie and trixie-backports",
        ),
    ],
)
def test_why_there_is_no_other_suite_is_told(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt_get(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UnavailableError) as caught:
        apt.Apt(tmp_path / "private")
    assert str(caught.value) == reason


def test_the_machines_own_apt_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path of apt that is written to lies in the private folder, and each list that is read, too."""
    seen = tmp_path / "seen"
    fake_apt_get(
        tmp_path,
        f"""case "$*" in
        *--print-uris*) echo "'http://a.example/debian/dists/stable/InRelease' x 0";;
        *) cat "$APT_CONFIG" > {seen};; esac""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    private = tmp_path / "private"
    apt.Apt(private)
    settings = dict(
        line.rstrip(";").replace('"', "").split(" ", 1) for line in seen.read_text().splitlines() if "::" in line
    )
    for name in ("Dir::State", "Dir::State::lists", "Dir::State::status", "Dir::Cache", "Dir::Etc::sourcelist"):
        assert settings[name].startswith(str(private)), name
    sources = Path(settings["Dir::Etc::sourcelist"]).read_text()
    assert "URIs: http://a.example/debian\nSuites: trixie trixie-backports\n" in sources


def test_this_machines_apt_prints_what_is_expected() -> None:
    """Where apt is, and has a source, `apt-get update --print-uris` names an index of each; it fetches nothing."""
    try:
        done = subprocess.run(["apt-get", "update", "--print-uris"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no apt that works")
    if "/dists/" not in done.stdout:
        pytest.skip("apt has no source of Debian's kind")
    assert any(apt.INDEX.match(line) for line in done.stdout.splitlines())
