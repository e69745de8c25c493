# SPDX-License-Identifier: GPL-2.0-or-later
"""From a bare Debian to a User-Mode Linux with VFIO, and the project's modules for it: `make kernel`.

    python3 -m kernel.build              # um.config
    python3 -m kernel.build --debug      # um.config and um-debug.config: a kernel with lockdep
    python3 -m kernel.build --update     # a newer kernel than the cache has, if the mirror has one

The source is the newest linux-source package in the backports of kernel.apt.RELEASE. The kernel is kept in the cache by
its version and its config, a module by the digest of its source.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel import cache
from kernel.apt import BACKPORTS, UNTRANSLATED, Apt, newest, version_of
from kernel.cache import BuildError, UnavailableError, say

PROJECT = Path(__file__).resolve().parents[1]
FRAGMENTS = {"um": ("um.config",), "um-debug": ("um.config", "um-debug.config")}
OLDEST = (7, 1)
"""The oldest kernel that will do."""

MODULE = "vfio_v3_sample"
MODULE_SOURCES = ("kernel/driver/*.[ch]", "kernel/driver/Kbuild", "docs/*.h")

TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "xz": "xz-utils",
    "/usr/include/linux/types.h": "linux-libc-dev",
    "/usr/lib/x86_64-linux-gnu/libc.a": "libc6-dev",
}
"""What building takes, as a program or a file, and Debian's package that has it."""

NOT_UNPACKED = (
    *("Documentation/*/*", "tools/testing/*", "tools/perf/*", "sound/*.[chS]"),
    *(f"drivers/{name}/*.[chS]" for name in ("gpu", "net/*", "media", "scsi", "staging", "usb", "infiniband", "iio")),
    *(f"drivers/{name}/*.[chS]" for name in ("accel", "clk", "pinctrl", "crypto", "video", "input", "phy", "power")),
    *(f"arch/{name}/*.[chS]" for name in ("arm", "arm64", "powerpc", "mips", "sh", "riscv", "sparc", "m68k", "s390")),
    "arch/*/boot/dts/*.dts*",
)
"""What no such kernel is built of, but takes long to unpack. Kconfig and make's files stay: they name each other."""

KEPT = ("include", "scripts", "arch/um", "arch/x86/include", "arch/x86/um", "tools/include", "tools/scripts")
KEPT_FILES = (".config", "Makefile", "Kbuild", "Module.symvers", "System.map", "arch/x86/Makefile.um")
"""What building a module takes, of the source and of the kernel's build."""

FILES = 650
"""About how many files a kernel is compiled of: to tell how far it is."""

MAKE = ("make", "ARCH=um", "KBUILD_BUILD_USER=proto-v3", "KBUILD_BUILD_HOST=proto-v3")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache."""

    root: Path

    @property
    def name(self) -> str:
        """The kernel's Debian version and a digest of its config: the name of its folder."""
        return self.root.name

    @property
    def linux(self) -> Path:
        """The kernel: a static program."""
        return self.root / "linux"

    @property
    def busybox(self) -> Path:
        """A static busybox, for the guest's init."""
        return self.root / "busybox"

    @property
    def tree(self) -> Path:
        """What modules are built against."""
        return self.root / "tree"

    @property
    def debian_version(self) -> str:
        """For example 7.3.4-1~bpo13+1."""
        return self.name.rpartition("-")[0]


def fragment(kind: str) -> list[str]:
    """The lines that a kind of kernel sets in its config, without comments and empty lines."""
    lines = [line for name in FRAGMENTS[kind] for line in (PROJECT / "kernel" / name).read_text("utf-8").splitlines()]
    return [line for line in lines if SETTING.fullmatch(line)]


SETTING = re.compile(r"CONFIG_\w+=.*|# CONFIG_\w+ is not set")


def digest(parts: Iterable[bytes]) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of all parts, and of where each ends."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:12]


def config_digest(lines: Sequence[str]) -> str:
    """The digest of a config fragment, and of what is kept of a build. The order of lines does not count."""
    return digest(line.encode() for line in [*sorted(lines), *KEPT, *KEPT_FILES])


def not_set(wanted: Iterable[str], config: str) -> list[str]:
    """The lines of a fragment that a whole .config does not have. What is off may also be absent."""
    has = set(config.splitlines())
    on = {line.partition("=")[0] for line in has if line.startswith("CONFIG_")}
    return [line for line in wanted if line not in has and (not line.startswith("#") or line.split()[1] in on)]


def cached(kind: str) -> Kernel | None:
    """The newest kernel of this kind that the cache has, with the config that the project has today."""
    found = [
        Kernel(path)
        for path in (cache.folder() / "kernel").glob(f"[0-9]*-{config_digest(fragment(kind))}")
        if cache.is_whole(path)
    ]
    return max(found, key=lambda each: version_of(each.debian_version), default=None)


def get(kinds: Sequence[str], update: bool = False, jobs: int = 0) -> list[Kernel]:
    """A kernel of each kind: from the cache, or built with so many jobs of make (0: one for each CPU).

    Raises UnavailableError, BuildError.
    """
    have = [cached(kind) for kind in kinds]
    if not update and None not in have:
        return [each for each in have if each is not None]
    check_machine(TOOLS, "kernel")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="proto-v3-apt-") as folder, contextlib.ExitStack() as stack:
        apt = Apt(Path(folder))
        package, version = choose_source(apt)
        unpacked: list[Path] = []

        def source() -> Path:
            if not unpacked:
                unpacked.append(unpack(apt, package, Path(folder), stack))
            return unpacked[0]

        jobs = jobs or len(os.sched_getaffinity(0))
        kernels = [get_one(kind, version, apt, source, jobs) for kind in kinds]
    say(f"kernel: all done after {time.monotonic() - begun:.0f} s")
    return kernels


def choose_source(apt: Apt) -> tuple[str, str]:
    """The newest linux-source package of the mirror, and its Debian version."""
    found = newest(apt.names("linux-source-"), "linux-source-")
    if found is None or found[0] < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UnavailableError(
            f"{BACKPORTS} has {found[1] if found else 'no linux-source'}; {wanted} or newer is needed"
        )
    return found[1], apt.versions(found[1])[0][0]


def check_machine(tools: Mapping[str, str], what: str) -> None:
    """Install the packages that are missing, if root; else raise UnavailableError, which names them.

    `tools`: programs or files, and Debian's packages that have them. `what` is built of them.
    """
    if os.uname().machine != "x86_64" or sys.platform != "linux":
        raise UnavailableError(f"{what} is built on x86_64 only")
    needed = missing(tools)
    if needed and os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"{what}: installing {' '.join(needed)}")
        for command in (["update"], ["install", "-y", "--no-install-recommends", *needed]):
            subprocess.run(
                ["apt-get", "-qq", *command],
                env=os.environ | UNTRANSLATED,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        needed = missing(tools)
    if needed:
        raise UnavailableError(f"packages are missing; on Debian, as root: apt-get install {' '.join(needed)}")


def missing(tools: Mapping[str, str]) -> list[str]:
    """Debian's names of the packages that building takes and the machine lacks."""
    return [name for tool, name in tools.items() if not (Path(tool).exists() if "/" in tool else shutil.which(tool))]


def unpack(apt: Apt, package: str, downloads: Path, stack: contextlib.ExitStack) -> Path:
    """The package's source, in a folder of the cache that the stack removes."""
    begun = time.monotonic()
    deb = apt.download(package, downloads)
    say(f"kernel: {deb.name}, {deb.stat().st_size >> 20} MiB, fetched in {time.monotonic() - begun:.0f} s")
    begun = time.monotonic()
    place = cache.folder() / "kernel"
    place.mkdir(parents=True, exist_ok=True)
    stack.enter_context(cache.locked(place / ".source.lock"))
    for left in place.glob(".source.new-*"):  # by a process that was killed
        cache.remove(left)
    folder = stack.enter_context(cache.temporary_folder(place, ".source.new-"))
    left_out = [f"--exclude={package}/{each}" for each in NOT_UNPACKED]
    # pipefail: that one of the three failed is told.
    script = (
        'set -o pipefail; dpkg-deb --fsys-tarfile "$0" | tar -xO "./usr/src/$1.tar.xz" | xz -dc -T0 | tar -x "${@:2}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, str(deb), package, "--wildcards", "--no-same-owner", *left_out, "-C", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    deb.unlink()
    if done.returncode:
        raise BuildError(f"{deb.name} cannot be unpacked: {done.stderr.strip()}")
    say(f"kernel: unpacked, {cache.size_mib(folder)} MiB for the time of the build, {time.monotonic() - begun:.0f} s")
    return folder / package


def get_one(kind: str, version: str, apt: Apt, source: Callable[[], Path], jobs: int) -> Kernel:
    """The kernel of this kind and version, from the cache or built of the source."""
    wanted = fragment(kind)

    def make(root: Path) -> None:
        tree = root / "tree"
        subprocess.run(["cp", "-al", source(), tree], check=True)
        configure(tree, wanted)
        begun = time.monotonic()
        compile_kernel(tree, kind, jobs)
        prune(tree, root / "linux")
        fetch_busybox(apt, root)
        took = time.monotonic() - begun
        say(f"kernel: {version} with {kind}.config is built, {cache.size_mib(root)} MiB, {took:.0f} s")

    needed = ["linux", "busybox", "tree/.config", "tree/Makefile", "tree/Module.symvers"]
    return Kernel(cache.entry(f"kernel/{version}-{config_digest(wanted)}", make, needed))


def run_make(tree: Path, *arguments: str, output: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """make in a kernel's source."""
    return run_program([*MAKE, "-C", str(tree), *arguments], output)


def run_program(
    command: Sequence[str],
    output: int = subprocess.PIPE,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A program, without what the make that calls this script has put into the environment, and with `environment`.

    It dies with what it started.
    """
    own = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEFILES", "CFLAGS", "LDFLAGS", "KBUILD_OUTPUT")
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in own} | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, printed)


def configure(tree: Path, wanted: Sequence[str]) -> None:
    """Set what the fragment wants, and nothing else that can be off. Raises BuildError if Kconfig refuses a line."""
    named = tree.parent / "fragment"
    named.write_text("\n".join([*wanted, ""]), encoding="utf-8")
    done = run_make(tree, "-s", f"KCONFIG_ALLCONFIG={named}", "allnoconfig")
    named.unlink()
    if done.returncode:
        raise BuildError(f"the config cannot be made: {last_lines(done.stdout, 8)}")
    refused = not_set(wanted, (tree / ".config").read_text(encoding="utf-8"))
    if refused:
        raise BuildError(f"this kernel does not take these lines of the config: {', '.join(refused)}")


def compile_kernel(tree: Path, kind: str, jobs: int) -> None:
    """Compile, and tell each minute how far it is. Raises BuildError with the compiler's errors."""
    log = tree.parent / "log"
    say(f"kernel: compiling with {kind}.config, {jobs} jobs")
    with log.open("w") as output, progress(log, "kernel", files_compiled):
        done = run_make(tree, f"-j{jobs}", "linux", "modules", output=output.fileno())
    lines = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    if done.returncode:
        raise BuildError(f"the kernel cannot be compiled:\n{errors(lines)}")


def files_compiled(log: str) -> str:
    """How far make is, by its lines in the log."""
    return f"{sum(line.startswith('  CC ') for line in log.splitlines())} of some {FILES} files compiled"


@contextlib.contextmanager
def progress(log: Path, what: str, told: Callable[[str], str], every_s: float = 60.0) -> Iterator[None]:
    """Tell each minute how far it is, as `told` makes it of the log so far."""
    ended = threading.Event()
    begun = time.monotonic()

    def tell() -> None:
        while not ended.wait(every_s):
            say(f"{what}: {told(log.read_text('utf-8', 'replace'))}, {time.monotonic() - begun:.0f} s")

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def errors(text: str) -> str:
    """The first errors in what make printed, or its last lines."""
    found = [line for line in text.splitlines() if re.search(r"\berror\b|\*\*\*|undefined reference", line, re.I)]
    return "\n".join(found[:10]) or last_lines(text, 10)


def last_lines(text: str, count: int = 3) -> str:
    """The end of what a program printed."""
    return "\n".join(text.strip().splitlines()[-count:])


def prune(tree: Path, linux: Path) -> None:
    """Move the kernel out of the tree, and remove what no module needs."""
    shutil.move(tree / "linux", linux)
    subprocess.run(["strip", "--strip-debug", linux], check=True)
    kept = tree.with_name("kept")
    for name in KEPT:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).rename(kept / name)
    for name in KEPT_FILES:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).rename(kept / name)
    cache.remove(tree)
    for path in (kept / "arch").rglob("*.[oa]"):
        path.unlink()
    kept.rename(tree)


def fetch_busybox(apt: Apt, root: Path) -> None:
    """Debian's static busybox, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        deb = apt.download("busybox-static", Path(folder))
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        (found,) = (path for path in Path(folder).rglob("busybox") if path.is_file() and os.access(path, os.X_OK))
        shutil.copy(found, root / "busybox")


def module_sources() -> list[Path]:
    """The files that the project's modules are built of. Empty: the project has none."""
    return sorted(path for pattern in MODULE_SOURCES for path in PROJECT.glob(pattern))


def module_digest() -> str:
    """A digest of the driver's source."""
    names = [path.relative_to(PROJECT) for path in module_sources()]
    return digest(part for name in names for part in (str(name).encode(), (PROJECT / name).read_bytes()))


def module(kernel: Kernel) -> Path | None:
    """The project's module for this kernel, from the cache or built; None if the project has no driver."""
    names = [path.relative_to(PROJECT) for path in module_sources()]
    if not any(path.name == "Kbuild" for path in names):
        return None

    def make(root: Path) -> None:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="proto-v3-module-") as folder:
            for name in names:
                copy = Path(folder) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(PROJECT / name, copy)
            done = run_make(kernel.tree, "-s", f"M={folder}/kernel/driver", "modules")
            if done.returncode:
                raise BuildError(f"the module cannot be compiled:\n{errors(done.stdout)}")
            shutil.copy(Path(folder, "kernel/driver", f"{MODULE}.ko"), root)
        say(f"kernel: {MODULE}.ko is built for {kernel.name}, {time.monotonic() - begun:.0f} s")

    return cache.entry(f"modules/{kernel.name}-{module_digest()}", make, [f"{MODULE}.ko"]) / f"{MODULE}.ko"


def main(arguments: Sequence[str]) -> int:
    """Build what the cache lacks, and say where it is. 0: it is there, or cannot be had here; 1: something failed."""
    parser = argparse.ArgumentParser(prog="python3 -m kernel.build", description="A User-Mode Linux with VFIO.")
    parser.add_argument("--debug", action="store_true", help="with lockdep")
    parser.add_argument("--update", action="store_true", help="a newer kernel than the cache has, if there is one")
    parser.add_argument("--jobs", type=int, default=0, help="of make; one for each CPU by default")
    options = parser.parse_args(arguments)
    cache.stop_on_signals()
    try:
        (kernel,) = get(["um-debug" if options.debug else "um"], options.update, options.jobs)
        say(f"kernel: {kernel.linux}")
        built = module(kernel)
        say(f"kernel: {built}" if built else "kernel: the project has no module")
    except UnavailableError as error:
        say(f"kernel: skipped: {error}")
    except BuildError as error:
        say(f"kernel: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
