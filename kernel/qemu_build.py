# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU from the release's source package: as it is, and with each of the project's own patches.

    python3 -m kernel.qemu_build   # builds what the cache lacks, and says where it is

One tree is configured and built once. Then each patch of qemu_patches/ is applied, what it changes is built again, and
it is taken out. So two builds differ in their patch alone. Firmware is that of the QEMUs of qemu_packages.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel import build, cache, qemu_packages
from kernel.apt import RELEASE, Apt, version_of
from kernel.cache import BuildError, UnavailableError, say
from kernel.qemu_packages import FIRMWARE

PACKAGE = "qemu"
PATCHES = Path(__file__).with_name("qemu_patches")
UNPATCHED = "unpatched"
BUILDS: dict[str, tuple[str, ...]] = {
    UNPATCHED: (),
    "early": ("early",),
    "parallel-stop": ("parallel-stop",),
    "reinit": ("reinit",),
    "retry": ("reinit", "retry"),
}
"""The binaries, and the patches that each has, in the order in which they are applied."""

TARGET = "x86_64-softmmu"
DEVICES = ("CONFIG_I440FX=y", "CONFIG_IOMMUFD=y", "CONFIG_VFIO_PCI=y")
"""All that the guests of tests/real/qemu have, besides what QEMU needs anyway."""
OPTIONS = (
    *(f"--target-list={TARGET}", "--with-devices-x86_64=proto-v3", "--without-default-features"),
    *("--without-default-devices", "--enable-system", "--enable-tcg", "--enable-trace-backends=log"),
    *("--disable-install-blobs", "--disable-debug-info", "--disable-download"),
    "--extra-cflags=-Werror=implicit-function-declaration",  # else it fails at the link, or not at all
)
BINARY = "qemu-system-x86_64"

TOOLS = {
    "dpkg-source": "dpkg-dev",
    "gcc": "gcc",
    "ninja": "ninja-build",
    "patch": "patch",
    "pkg-config": "pkgconf",
    "xz": "xz-utils",
    "/usr/include/glib-2.0/glib.h": "libglib2.0-dev",
    "/usr/include/linux/types.h": "linux-libc-dev",
    "/usr/include/zlib.h": "zlib1g-dev",
}
"""What building takes, as a program or a file, and Debian's package that has it."""
MESON = "meson"
"""Fetched from RELEASE, and not installed: this machine's may be too old."""


@dataclass(frozen=True)
class BuiltQemu:
    """A QEMU of BUILDS in the cache."""

    root: Path
    name: str

    @property
    def debian_version(self) -> str:
        """Of the source package, without its epoch: for example 10.0.13+ds-0+deb13u1."""
        return self.root.name.rpartition("-")[0]

    @property
    def version(self) -> str:
        """For example 10.0.13."""
        return ".".join(map(str, version_of(self.debian_version)))

    @property
    def command(self) -> list[str]:
        """What the command line begins with. Raises UnavailableError if the cache has no firmware for it."""
        packaged = qemu_packages.cached()
        if not packaged:
            raise UnavailableError("no QEMU's firmware in the cache: make qemu")
        root = packaged[0].root
        return [str(self.root / self.name), *(word for each in FIRMWARE for word in ("-L", str(root / each)))]


def changed_lines(name: str) -> tuple[int, int]:
    """How many lines one of our patches adds and takes out."""
    text = (PATCHES / f"{name}.patch").read_text(encoding="utf-8")
    return len(re.findall(r"^\+(?!\+\+ )", text, re.MULTILINE)), len(re.findall(r"^-(?!-- )", text, re.MULTILINE))


def digest() -> str:
    """Of the patches, and of how QEMU is built."""
    names = sorted({each for patches in BUILDS.values() for each in patches})
    texts = [*(f"{name}: {' '.join(patches)}" for name, patches in BUILDS.items()), *DEVICES, *OPTIONS]
    return build.digest([*((PATCHES / f"{name}.patch").read_bytes() for name in names), *map(str.encode, texts)])


def cached() -> dict[str, BuiltQemu]:
    """The builds of the newest source that the cache has, by name; {} if it has none."""
    found = [path for path in (cache.folder() / "qemu-built").glob(f"[0-9]*-{digest()}") if cache.is_whole(path)]
    root = max(found, key=lambda path: version_of(path.name), default=None)
    return {} if root is None else {name: BuiltQemu(root, name) for name in BUILDS}


def get(jobs: int = 0) -> dict[str, BuiltQemu]:
    """All of BUILDS: from the cache, or built with so many jobs of ninja (0: one for each CPU).

    Raises UnavailableError, BuildError.
    """
    if have := cached():
        return have
    build.check_machine(TOOLS, "QEMU")
    if importlib.util.find_spec("ensurepip") is None:
        raise UnavailableError("packages are missing; on Debian, as root: apt-get install python3-venv")
    with tempfile.TemporaryDirectory(prefix="proto-v3-apt-") as folder:
        apt = Apt(Path(folder), (RELEASE,), ("deb", "deb-src"))
        versions = apt.versions(PACKAGE, "Sources")
        if not versions:
            raise UnavailableError(f"the machine's mirror gives no source of {RELEASE}'s QEMU")
        version = versions[0][0]

        def make(root: Path) -> None:
            build_all(apt, version, root, jobs or len(os.sched_getaffinity(0)))

        root = cache.entry(f"qemu-built/{version.rpartition(':')[2]}-{digest()}", make, list(BUILDS))
    return {name: BuiltQemu(root, name) for name in BUILDS}


def build_all(apt: Apt, version: str, root: Path, jobs: int) -> None:
    """Each of BUILDS, into `root`."""
    begun = time.monotonic()
    with cache.temporary_folder(root.parent, ".source.") as folder:
        source = apt.source(f"{PACKAGE}={version}", folder)
        say(f"QEMU {version}: source fetched and unpacked, {time.monotonic() - begun:.0f} s")
        subprocess.run(["dpkg-deb", "-x", apt.download(MESON, folder), folder / MESON], check=True)
        tree = Tree(source, {"PYTHONPATH": str(folder / MESON / "usr/lib/python3/dist-packages")}, jobs)
        tree.configure()
        for name, patches in BUILDS.items():
            with tree.patched(patches):
                tree.compile(name)
            shutil.copy(tree.binary, root / name)
            subprocess.run(["strip", "--strip-debug", root / name], check=True)
        check_that_it_starts(BuiltQemu(root, UNPATCHED), version)
    say(f"QEMU {version}: {len(BUILDS)} builds, {cache.size_mib(root)} MiB, {time.monotonic() - begun:.0f} s")


@dataclass(frozen=True)
class Tree:
    """A source that QEMU is built in."""

    source: Path
    environment: dict[str, str]
    jobs: int

    @property
    def binary(self) -> Path:
        """What is built."""
        return self.source / "build" / BINARY

    def configure(self) -> None:
        """Raises BuildError."""
        named = self.source / f"configs/devices/{TARGET}/proto-v3.mak"
        named.write_text("\n".join([*DEVICES, ""]), encoding="utf-8")
        self.binary.parent.mkdir()
        command = ["../configure", f"--python={sys.executable}", *OPTIONS]
        done = build.run_program(command, folder=self.binary.parent, environment=self.environment)
        if done.returncode:
            raise BuildError(f"QEMU cannot be configured: {build.last_lines(done.stdout, 8)}")

    @contextlib.contextmanager
    def patched(self, names: Sequence[str]) -> Iterator[None]:
        """The source with these patches, without fuzz; without them afterwards."""
        for name in names:
            self._patch(name)
        yield
        for name in reversed(names):
            self._patch(name, "-R")

    def _patch(self, name: str, *options: str) -> None:
        command = [
            "patch",
            "-p1",
            "-F0",
            "-s",
            "--no-backup-if-mismatch",
            *options,
            "-i",
            str(PATCHES / f"{name}.patch"),
        ]
        done = subprocess.run(command, cwd=self.source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{name}.patch does not apply to {self.source.name}: {done.stdout.strip()}")

    def compile(self, name: str) -> None:
        """Tells each minute how far it is. Raises BuildError with the compiler's errors."""
        begun, log = time.monotonic(), self.source.with_name("log")
        with log.open("w") as output, build.progress(log, f"QEMU, {name}", steps_done):
            done = build.run_program(
                ["ninja", f"-j{self.jobs}", BINARY], output.fileno(), self.binary.parent, self.environment
            )
        lines = log.read_text(encoding="utf-8", errors="replace")
        if done.returncode:
            raise BuildError(f"QEMU, {name}, cannot be compiled:\n{build.errors(lines)}")
        say(f"QEMU, {name}: built in {time.monotonic() - begun:.0f} s")


def steps_done(log: str) -> str:
    """How far ninja is, by its lines in the log."""
    found = re.findall(r"^\[(\d+)/(\d+)\]", log, re.MULTILINE)
    return "{} of {} steps".format(*found[-1]) if found else "nothing yet"


def check_that_it_starts(qemu: BuiltQemu, version: str) -> None:
    """Raises BuildError if it does not run, or tells another version."""
    done = subprocess.run([qemu.root / qemu.name, "-version"], capture_output=True, text=True, check=False)
    if done.returncode or ".".join(map(str, version_of(version))) not in done.stdout:
        raise BuildError(f"QEMU {version} does not start: {(done.stderr or done.stdout).strip()}")


def main() -> int:
    """Build what the cache lacks, and say where it is. 0: it is there, or cannot be had here; 1: something failed."""
    cache.stop_on_signals()
    try:
        for name, qemu in get().items():
            say(f"QEMU {qemu.debian_version}, {name}: {qemu.root / name}")
    except UnavailableError as error:
        say(f"qemu: no patched QEMU, skipped: {error}")
    except BuildError as error:
        say(f"qemu: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
