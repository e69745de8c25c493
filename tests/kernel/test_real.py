# SPDX-License-Identifier: GPL-2.0-or-later
"""`make real` counts what ran, and what could not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernel import build, guest, real
from kernel.cache import BuildError, UnavailableError
from kernel.real import Counts

TESTS = """
import pytest
def test_a(): pass
def test_b(): pass
def test_c(): pass
def test_d(): assert False
def test_e(): pytest.skip("no")
@pytest.fixture
def broken(): raise OSError
def test_f(broken): pass
"""


def test_pytests_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "--rootdir=."]
    subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, check=False)
    assert real.counted((tmp_path / "report.xml").read_text()) == Counts(passed=3, failed=2, skipped=1)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (UnavailableError("no apt-get"), "real: 0 passed, 0 failed, 1 skipped", 0),
        (BuildError("gcc died"), "real: 0 passed, 1 failed, 0 skipped", 1),
    ],
)
def test_without_a_kernel_it_says_why_and_counts_it(
    error: Exception, line: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get(kinds: list[str]) -> list[build.Kernel]:
        raise error

    monkeypatch.setattr(build, "get", get)
    assert real.main([]) == status
    why, last = capsys.readouterr().out.splitlines()
    assert str(error) in why
    assert last == line


def test_a_machine_on_which_it_does_not_boot_is_a_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that ends as User-Mode Linux does where it may not trace its children."""
    for name, text in (("linux", "#!/bin/sh\necho 'ptrace failed'\nexit 1\n"), ("busybox", "")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(build, "get", lambda kinds: [build.Kernel(tmp_path)])
    assert real.main([]) == 0
    why, last = capsys.readouterr().out.splitlines()
    assert why == "real: skipped: User-Mode Linux does not boot here: ptrace failed"
    assert last == "real: 0 passed, 0 failed, 1 skipped"


@pytest.mark.parametrize(
    ("have", "option", "kinds"),
    [
        ((), "auto", ["um", "um-debug"]),
        (("um",), "auto", ["um"]),
        (("um", "um-debug"), "auto", ["um", "um-debug"]),
        (("um",), "always", ["um", "um-debug"]),
        (("um", "um-debug"), "never", ["um"]),
    ],
)
def test_lockdep_is_used_where_it_costs_little_or_is_asked_for(
    have: tuple[str, ...], option: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cached", lambda kind: build.Kernel(Path(kind)) if kind in have else None)
    assert real.wanted(option) == kinds


def test_each_test_that_needs_a_kernel_runs_in_one_guest() -> None:
    """Whoever adds a file to tests/real/ need not name it."""
    here = {f"tests/real/{path.name}" for path in (build.PROJECT / "tests/real").glob("test_*.py")}
    named = [file for files in real.APART.values() for file in files]
    assert len(named) == len(set(named))
    assert set(named) < here
    assert real.SHARES["driver"] == ["tests/real", *(f"--ignore={file}" for file in named)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"migrations": "not slow", "qemu": "not slow", "driver": "not slow", "lockdep": "lockdep and not slow"}),
        (("--all",), {"migrations": "", "qemu": "", "driver": "", "lockdep": "lockdep"}),
        (("--", "-k", "mtty"), {"tests": "", "lockdep": "lockdep"}),
    ],
)
def test_the_guests_are_these(arguments: tuple[str, ...], expected: dict[str, str]) -> None:
    options = real.parser().parse_args(arguments)
    shares = real.guests([build.Kernel(Path("um")), build.Kernel(Path("um-debug"))], options)
    marks = {each.name: each.pytest[1] if each.pytest[0] == "-m" else "" for each in shares}
    assert marks == expected
    assert [each.kernel.root.name for each in shares] == ["um"] * (len(shares) - 1) + ["um-debug"]


def test_a_guests_output_comes_in_whole_lines_with_its_name(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output = real.whole_lines("qemu")
    for data in (b"..", b".. [ 50%]\n..", b"..\nend\n"):
        output(data)
    assert capfdbinary.readouterr().out == b"qemu: .... [ 50%]\nqemu: ....\nqemu: end\n"


def test_a_signal_ends_all_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run() ends, and so its folders are gone; main() waits for that."""
    (tmp_path / "linux").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "linux").chmod(0o755)
    (tmp_path / "busybox").write_text("")
    monkeypatch.setattr(build, "get", lambda kinds: [build.Kernel(tmp_path)])
    monkeypatch.setattr(build, "module", lambda kernel: None)
    monkeypatch.setattr(real, "does_not_boot", lambda kernel: "")
    monkeypatch.setattr(real.qemu_packages, "fetch", list)
    monkeypatch.setattr(real, "OUT", tmp_path / "out")
    monkeypatch.setattr(real, "STOPPED", threading.Event())

    def interrupted() -> Counts:
        while len(guest.RUNNING) < len(real.SHARES):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "run_here", interrupted)
    assert real.main([]) == 130
    assert not guest.RUNNING
    assert list((tmp_path / "out").iterdir()) == []
