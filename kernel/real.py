# SPDX-License-Identifier: GPL-2.0-or-later
"""All tests that need the kernel, counted: `make real`.

    python -m kernel.real                    # what tests/real/ has, in three guests at a time
    python -m kernel.real --all              # and those that are marked slow
    python -m kernel.real -- -k mtty -x      # the same, with arguments of pytest
    python -m kernel.real --lockdep always   # and once more, under a kernel with lockdep, what is marked `lockdep`

Without --lockdep, that kernel is used if the cache has it, and built if the other one has to be built too. What cannot
be had on this machine is skipped, and the last line counts it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from kernel import build, cache, guest, qemu_build, qemu_packages
from kernel.build import PROJECT, Kernel
from kernel.cache import BuildError, UnavailableError, say
from kernel.guest import GuestError, UserModeLinux

OUT = PROJECT / "out/real"
"""What the guest writes to."""

APART = {
    "migrations": ["tests/real/test_migrations.py"],
    "qemu": [
        f"tests/real/test_{name}.py" for name in ("qemu", "qemu_patched", "fit_pairs", "conformance", "agree_real")
    ],
}
SHARES = {**APART, "driver": ["tests/real", *(f"--ignore={file}" for files in APART.values() for file in files)]}
"""What each of the guests runs, if pytest is given no arguments. Each of them waits half of its time."""

NO_TESTS = 5
"""The status of a pytest that was asked for tests that do not exist."""
AT_ONCE = 3
"""Guests at the same time."""
PRINTING = threading.Lock()
STOPPED = threading.Event()
"""A signal came."""
LOCKDEP_CPUS = 1
"""Of a guest with lockdep: where User-Mode Linux 7.3.4 starts a second CPU, lockdep complains of that itself ("Callback
enqueued on offline CPU", kernel/rcu/tree.c)."""


@dataclass(frozen=True)
class Counts:
    """How many tests ended how."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def counted(junit: str) -> Counts:
    """The counts of a report that pytest's --junitxml wrote. An error counts as a failure."""
    total = Counts()
    for suite in ElementTree.fromstring(junit).iter("testsuite"):
        number = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        failed = number["failures"] + number["errors"]
        total += Counts(max(0, number["tests"] - failed - number["skipped"]), failed, number["skipped"])
    return total


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m kernel.real", description="The tests that need the kernel.")
    parser.add_argument("--all", action="store_true", help="also the tests that are marked slow")
    parser.add_argument("--lockdep", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--cpus", type=int, default=2, help="of the guest, 1 to 4")
    parser.add_argument("--memory", type=int, default=2048, help="of the guest, MiB")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds until a guest is killed")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the tests, and print their counts as the last line. 1 if one failed."""
    options = parser().parse_args(arguments)
    cache.stop_on_signals()
    try:
        counts = run_all(options)
    except KeyboardInterrupt:
        return 130
    say(f"real: {counts}")
    return int(counts.failed > 0)


def run_all(options: argparse.Namespace) -> Counts:
    """The counts of all guests."""
    try:
        kernels = build.get(wanted(options.lockdep))
    except UnavailableError as error:
        say(f"real: skipped: {error}")
        return Counts(skipped=1)
    except BuildError as error:
        say(f"real: {error}")
        return Counts(failed=1)
    reason = does_not_boot(kernels[0])
    if reason:
        say(f"real: skipped: {reason}")
        return Counts(skipped=1)
    total = Counts()
    try:
        for qemu in qemu_packages.fetch():
            say(f"real: QEMU {qemu.debian_version}")
    except (UnavailableError, BuildError) as error:
        say(f"real: no QEMU: {error}")
    if built := qemu_build.cached():
        say(f"real: QEMU {built[qemu_build.UNPATCHED].debian_version} with our patches")
    else:
        say("real: no QEMU with our patches in the cache: its tests are skipped; `make qemu` builds it")
    if len(kernels) == 1:
        why = "as asked" if options.lockdep == "never" else "`make kernel-debug` builds that kernel"
        say(f"real: what is marked lockdep did not run under lockdep: {why}")
        total += Counts(skipped=1)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(run_in_guest, each, options) for each in guests(kernels, options)]
        try:
            if not options.pytest:
                total += run_here()
            return sum((each.result() for each in running), start=total)
        except BaseException:  # a signal
            for each in running:
                each.cancel()
            STOPPED.set()
            guest.kill_all()
            raise


@dataclass(frozen=True)
class Share:
    """What one guest runs."""

    name: str
    kernel: Kernel
    pytest: Sequence[str]
    cpus: int


def guests(kernels: Sequence[Kernel], options: argparse.Namespace) -> list[Share]:
    """The guests, in the order in which they begin. Those that run longest come first."""
    shares = {"tests": options.pytest} if options.pytest else SHARES
    short = [] if options.all or options.pytest else ["-m", "not slow"]
    found = [Share(name, kernels[0], [*short, *what], options.cpus) for name, what in shares.items()]
    lockdep = ["-m", "lockdep" if options.all or options.pytest else "lockdep and not slow"]
    chosen = options.pytest or ["--confcutdir=tests/real", *files_of_lockdep()]
    return found + [Share("lockdep", each, [*lockdep, *chosen], LOCKDEP_CPUS) for each in kernels[1:]]


def files_of_lockdep() -> list[str]:
    """The files with a test that is marked so: the others, and tests/conftest.py, need not be imported there."""
    files = sorted((PROJECT / "tests/real").glob("test_*.py"))
    return [str(file.relative_to(PROJECT)) for file in files if "mark.lockdep" in file.read_text(encoding="utf-8")]


def does_not_boot(kernel: Kernel) -> str:
    """Why no guest can be booted on this machine, in one line; '' if it can: some containers forbid what it needs."""
    try:
        guest.run(UserModeLinux(kernel, memory_mib=256, timeout_s=60.0), ["true"], lambda output: None)
    except (GuestError, TimeoutError) as error:
        return f"User-Mode Linux does not boot here: {build.last_lines(str(error), 1)}"
    return ""


def wanted(lockdep: str) -> list[str]:
    """The kinds of kernels to run under."""
    both = build.cached("um-debug") is not None or build.cached("um") is None
    return ["um", "um-debug"] if lockdep == "always" or (lockdep == "auto" and both) else ["um"]


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""In a guest an import takes several times what it takes on the host."""


def run_here() -> Counts:
    """The counts of the tests that boot guests, and so run outside of one."""
    say("real: pytest tests/kernel/test_boot.py on this machine")
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-", dir=OUT) as folder:
        report = Path(folder) / "junit.xml"
        command = [*PYTEST, f"--junitxml={report}", "tests/kernel/test_boot.py"]
        subprocess.run(command, cwd=PROJECT, check=False)
        return counted(report.read_text(encoding="utf-8")) if report.exists() else Counts(failed=1)


def run_in_guest(share: Share, options: argparse.Namespace) -> Counts:
    """The counts of one pytest in a guest; a kernel that complains is one more failure."""
    say(f"real: {share.name}: pytest {' '.join(share.pytest)} under {share.kernel.name}")
    begun = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"report-{share.name}-", dir=OUT) as folder:
        report = Path(folder) / "junit.xml"
        try:
            outcome = guest.run(
                UserModeLinux(
                    kernel=share.kernel,
                    modules=guest.standard_modules(share.kernel),
                    cpus=share.cpus,
                    memory_mib=options.memory,
                    writable=Path(folder),
                    environment=NO_PLUGINS,
                    timeout_s=options.timeout,
                ),
                [*PYTEST, f"--junitxml={report}", *share.pytest],
                whole_lines(share.name),
            )
            counts = counted(report.read_text(encoding="utf-8"))
        except (BuildError, GuestError, TimeoutError, OSError) as error:
            if not STOPPED.is_set():
                say(f"real: {share.name}: {error}")
            return Counts(failed=1)
    for line in outcome.complaints:
        say(f"real: {share.name}: the kernel's log: {line}")
    if outcome.complaints or (outcome.status not in (0, NO_TESTS) and not counts.failed):
        counts += Counts(failed=1)
    say(f"real: {share.name}: {counts} in {time.monotonic() - begun:.0f} s")
    return counts


def whole_lines(name: str) -> Callable[[bytes], None]:
    """A function that prints what a guest printed line by line, after its name: two print at the same time."""
    begun = bytearray()

    def output(data: bytes) -> None:
        *lines, rest = (begun + data).split(b"\n")
        begun[:] = rest
        with PRINTING:
            guest.to_stdout(b"".join(b"%s: %s\n" % (name.encode(), line) for line in lines))

    return output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
