# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages of another release, from the machine's own mirror, without a change of the machine.

apt works in a folder of its own: own lists, own cache, and a list of installed packages that is empty. Which mirror,
which proxy and which credentials it uses, is what apt's configuration on this machine says; only the suite differs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from kernel.cache import UnavailableError

RELEASE = "trixie"
"""The release of Debian whose packages and backports are used."""

BACKPORTS = f"{RELEASE}-backports"

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Where Debian's package debian-archive-keyring, which each Debian has, keeps the archive's keys."""

UNTRANSLATED = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


INDEX = re.compile(r"'(.+)/dists/([^/']+)/(?:InRelease|Release)'")


def mirrors(print_uris: str, codename: str) -> list[str]:
    """The URIs that may be Debian's main archive, from what `apt-get update --print-uris` printed.

    A repository of somebody else may have a suite of the same name. It does not have Debian's other suites.
    """
    names = {codename, "stable", "oldstable", "testing", "unstable", "sid"} - {""}
    found = [match.groups() for line in print_uris.splitlines() if (match := INDEX.match(line))]
    return list(dict.fromkeys(uri for uri, suite in found if suite in names))


def newest(names: Iterable[str], prefix: str) -> tuple[tuple[int, ...], str] | None:
    """Of package names such as linux-source-7.3: the highest version, and the name. None if there is none."""
    pattern = re.compile(re.escape(prefix) + r"(\d+(?:\.\d+)+)")
    found = [(version_of(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
    return max(found, default=None)


def version_of(text: str) -> tuple[int, ...]:
    """The upstream version of a package as numbers: (11, 1, 3) of 1:11.1.3+ds-1~bpo13+1."""
    match = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


def candidates(madison: str, kind: str = "Packages") -> list[tuple[str, str]]:
    """What `apt-cache madison PACKAGE` printed, as (version, suite), in apt's order: the newest first.

    `kind`: "Packages", or "Sources" for source packages.
    """
    found = []
    for line in madison.splitlines():
        columns = [each.strip() for each in line.split("|")]
        if len(columns) == 3 and columns[2].endswith(f" {kind}"):
            found.append((columns[1], columns[2].split()[1].partition("/")[0]))
    return found


def codename() -> str:
    """VERSION_CODENAME of this machine's Debian, or ''."""
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition("=")[2].strip('"') for line in lines if line.startswith("VERSION_CODENAME=")), "")


class Apt:
    """apt in a private folder, on the machine's own mirror, for the release RELEASE and its backports."""

    def __init__(
        self, folder: Path, suites: Sequence[str] = (RELEASE, BACKPORTS), types: Sequence[str] = ("deb",)
    ) -> None:
        """Fetch the lists of the suites (some MB). Raises UnavailableError if the mirror does not have them.

        `types`: with "deb-src" also those of source packages.
        """
        if shutil.which("apt-get") is None:
            raise UnavailableError("this is no Debian: there is no apt-get")
        self.folder = folder
        self.configuration = folder / "apt.conf"
        listed = subprocess.run(
            ["apt-get", "update", "--print-uris"],
            env=os.environ | UNTRANSLATED,
            capture_output=True,
            text=True,
            check=False,
        )
        found = mirrors(listed.stdout, codename())
        if not found:
            raise UnavailableError("apt's configuration names no mirror of Debian's main archive")
        for number, uri in enumerate(found):
            if self._fetch_lists(folder / str(number), uri, suites, types):
                return
        raise UnavailableError(f"the machine's mirror gives no lists of {' and '.join(suites)}")

    def _fetch_lists(self, state: Path, uri: str, suites: Sequence[str], types: Sequence[str]) -> bool:
        for each in ("lists/partial", "cache/archives/partial", "preferences"):
            (state / each).mkdir(parents=True)
        (state / "status").touch()
        signed_by = [f"Signed-By: {KEYRING}"] if KEYRING.exists() else []
        source = [
            f"Types: {' '.join(types)}",
            f"URIs: {uri}",
            f"Suites: {' '.join(suites)}",
            "Components: main",
            *signed_by,
        ]
        (state / "list.sources").write_text("\n".join([*source, ""]), encoding="utf-8")
        settings = {
            "Dir::Etc::sourcelist": state / "list.sources",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": state / "preferences",
            "Dir::State": state,
            "Dir::State::lists": state / "lists",
            "Dir::State::status": state / "status",
            "Dir::Cache": state / "cache",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",  # the folder may be one that the user _apt does not reach
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": 3,
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        self.configuration.write_text("\n".join(["#clear APT::Update::Post-Invoke;", *lines, ""]), encoding="utf-8")
        # APT::Update::Error-Mode=any: else a suite that is missing, or a mirror that is down, is only a warning.
        done = self._run("apt-get", "update", "-qq", "-o", "APT::Update::Error-Mode=any", check=False)
        return done.returncode == 0

    def _run(self, *command: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | UNTRANSLATED | {"APT_CONFIG": str(self.configuration)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E: ")] or [f"{done.returncode}"]
            raise UnavailableError(f"{' '.join(command[:2])}: {errors[0].removeprefix('E: ')}")
        return done

    def names(self, prefix: str) -> list[str]:
        """All package names that begin so."""
        return self._run("apt-cache", "pkgnames", prefix).stdout.split()

    def versions(self, package: str, kind: str = "Packages") -> list[tuple[str, str]]:
        """(version, suite) of each version of a package, the newest first. `kind` as in candidates()."""
        return candidates(self._run("apt-cache", "madison", package).stdout, kind)

    def download(self, package: str, into: Path) -> Path:
        """The package's file, for example linux-source-7.3_7.3.4-1_all.deb, or of package=version."""
        self._run("apt-get", "download", "-qq", package, cwd=into)
        (file,) = into.glob(f"{package.partition('=')[0]}_*.deb")
        return file

    def source(self, package: str, into: Path) -> Path:
        """The folder of a source package, unpacked with Debian's patches."""
        self._run("apt-get", "source", "-qq", package, cwd=into)
        (folder,) = (path for path in into.iterdir() if path.is_dir())
        return folder

    def download_with_dependencies(self, package: str, suite: str) -> list[Path]:
        """The package's file and those of all packages that it depends on, libc included."""
        self._run("apt-get", "clean")
        self._run("apt-get", "install", "--download-only", "-qq", "-y", "-t", suite, package)
        archives = self._run("apt-config", "shell", "folder", "Dir::Cache::Archives/f").stdout
        return sorted(Path(archives.partition("'")[2].rpartition("'")[0]).glob("*.deb"))
