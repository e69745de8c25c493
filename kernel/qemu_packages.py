# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's own QEMUs, unpacked into the cache and not installed: one of the release, one of its backports.

Each has the libraries of its release beside it, libc too, and is started by that libc's ld.so: an older Debian, as this
machine's may be, has older ones.

    python3 -m kernel.qemu_packages           # fetches those that the cache lacks, and says where they are
    python3 -m kernel.qemu_packages --update  # fetches newer versions than the cache has
    qemu_command("10")                        # in Python: how the QEMU of this major version is started
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel import cache
from kernel.apt import BACKPORTS, RELEASE, Apt, version_of
from kernel.cache import BuildError, UnavailableError, say

PACKAGE = "qemu-system-x86"
BINARY = "usr/bin/qemu-system-x86_64"
LOADER = "usr/lib64/ld-linux-x86-64.so.2"
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio")
FIRMWARE = ("usr/share/qemu", "usr/share/seabios")
VERSION_FILE = "debian-version"
SUITE_FILE = "debian-suite"

SUITES = {RELEASE: (10,), BACKPORTS: (11, 1)}
"""The suites that a QEMU is taken from, and the version that it must have at least."""

NOT_NEEDED = ("etc", "var", "usr/sbin", "usr/lib/x86_64-linux-gnu/gconv", "usr/share/perl5")
NOT_NEEDED_DOCUMENTS = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man")


@dataclass(frozen=True)
class Qemu:
    """A QEMU in the cache."""

    root: Path
    """Its packages are unpacked here."""

    @property
    def debian_version(self) -> str:
        """For example 1:10.0.13+ds-0+deb13u1."""
        return (self.root / VERSION_FILE).read_text(encoding="utf-8").strip()

    @property
    def version(self) -> str:
        """For example 10.0.13."""
        return ".".join(map(str, version_of(self.debian_version)))

    @property
    def command(self) -> list[str]:
        """What the command line begins with: QEMU, started by its own ld.so, and where its firmware is."""
        libraries = ":".join(str(self.root / each) for each in LIBRARIES)
        start = [str(self.root / LOADER), "--library-path", libraries, str(self.root / BINARY)]
        return start + [word for each in FIRMWARE for word in ("-L", str(self.root / each))]


def cached() -> list[Qemu]:
    """All QEMUs that the cache has, the oldest version first."""
    found = [Qemu(path) for path in (cache.folder() / "qemu").glob("[0-9]*") if cache.is_whole(path)]
    return sorted(found, key=lambda each: version_of(each.debian_version))


def qemu_command(version: str) -> list[str]:
    """The command of the newest QEMU in the cache whose version is `version` or begins so: "10", "11.1", "11.1.3".

    Raises UnavailableError if there is none.
    """
    for qemu in reversed(cached()):
        if f"{qemu.version}.".startswith(f"{version}."):
            return qemu.command
    have = ", ".join(each.version for each in cached()) or "no QEMU"
    raise UnavailableError(f"no QEMU {version} in the cache ({have}): make qemu")


def fetch(update: bool = False) -> list[Qemu]:
    """A QEMU of each of SUITES: the newest that the cache has, or the mirror's. Raises UnavailableError."""
    have = {(each.root / SUITE_FILE).read_text(encoding="utf-8").strip(): each for each in cached()}
    if not update and all(suite in have for suite in SUITES):
        return [have[suite] for suite in SUITES]
    with tempfile.TemporaryDirectory(prefix="proto-v3-apt-") as folder:
        apt = Apt(Path(folder))
        return [fetch_from(apt, suite, least) for suite, least in SUITES.items()]


def fetch_from(apt: Apt, suite: str, least: tuple[int, ...]) -> Qemu:
    """The QEMU of one suite. Raises UnavailableError if it is older than `least`."""
    version = next((version for version, place in apt.versions(PACKAGE) if place == suite), "")
    if version_of(version) < least:
        wanted = ".".join(map(str, least))
        raise UnavailableError(f"{suite} has QEMU {version or 'in no version'}, and {wanted} or newer is needed")

    def make(root: Path) -> None:
        begun = time.monotonic()
        for package in apt.download_with_dependencies(PACKAGE, suite):
            unpack(package, root)
        for program in (root / "usr/bin").iterdir():
            if program != root / BINARY:
                program.unlink()
        (root / VERSION_FILE).write_text(f"{version}\n", encoding="utf-8")
        (root / SUITE_FILE).write_text(f"{suite}\n", encoding="utf-8")
        check_that_it_starts(Qemu(root))
        say(f"QEMU {version}: fetched, {cache.size_mib(root)} MiB, {time.monotonic() - begun:.0f} s")

    name = version.rpartition(":")[2]
    return Qemu(cache.entry(f"qemu/{name}", make, [BINARY, LOADER, VERSION_FILE, SUITE_FILE]))


def unpack(package: Path, root: Path) -> None:
    """Unpack a package's files, as far as QEMU may need them."""
    left_out = [f"--exclude=./{each}" for each in (*NOT_NEEDED, *NOT_NEEDED_DOCUMENTS)]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as packed:
        subprocess.run(["tar", "-x", "--no-same-owner", *left_out, "-C", root], stdin=packed.stdout, check=True)
    if packed.returncode:
        raise BuildError(f"{package.name} cannot be unpacked")


def check_that_it_starts(qemu: Qemu) -> None:
    """Raises BuildError if it does not run, or tells another version."""
    done = subprocess.run([*qemu.command, "-version"], capture_output=True, text=True, check=False)
    if done.returncode or qemu.version not in done.stdout:
        raise BuildError(f"QEMU {qemu.version} does not start: {(done.stderr or done.stdout).strip()}")


def main(arguments: Sequence[str]) -> int:
    """Fetch the QEMUs, and say where they are. 0: they are there, or cannot be had here; 1: something failed."""
    if arguments not in ([], ["--update"]):
        sys.exit("usage: python3 -m kernel.qemu_packages [--update]")
    cache.stop_on_signals()
    try:
        for qemu in fetch(update=bool(arguments)):
            say(f"QEMU {qemu.debian_version} is in {qemu.root}")
    except UnavailableError as error:
        say(f"qemu: skipped: {error}")
    except BuildError as error:
        say(f"qemu: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
