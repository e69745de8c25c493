# SPDX-License-Identifier: GPL-2.0-or-later
"""What decides whether a kernel is built: its config, the machine's tools, the newest source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kernel import build, cache
from kernel.apt import Apt
from kernel.cache import BuildError, UnavailableError

CONFIG = """\
# Automatically generated
CONFIG_VFIO=y
CONFIG_NR_CPUS=4
# CONFIG_BLOCK is not set
"""


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        (["CONFIG_VFIO=y", "CONFIG_NR_CPUS=4", "# CONFIG_BLOCK is not set"], []),
        (["CONFIG_VFIO=m"], ["CONFIG_VFIO=m"]),
        (["CONFIG_VFIO_DEVICE_CDEV=y"], ["CONFIG_VFIO_DEVICE_CDEV=y"]),
        (["CONFIG_NR_CPUS=40"], ["CONFIG_NR_CPUS=40"]),
        (["# CONFIG_VFIO is not set"], ["# CONFIG_VFIO is not set"]),
        (["# CONFIG_GONE is not set"], []),
    ],
)
def test_a_line_that_kconfig_refused_is_found(wanted: list[str], missing: list[str]) -> None:
    assert build.not_set(wanted, CONFIG) == missing


def test_a_fragment_has_nothing_but_settings() -> None:
    for names in build.FRAGMENTS.values():
        for name in names:
            for line in (build.PROJECT / "kernel" / name).read_text("utf-8").splitlines():
                assert not line or line.startswith("# ") or build.SETTING.fullmatch(line), f"{name}: {line}"


def test_the_kernel_with_lockdep_only_adds() -> None:
    plain, debug = build.fragment("um"), build.fragment("um-debug")
    assert debug[: len(plain)] == plain
    assert "CONFIG_PROVE_LOCKING=y" in debug[len(plain) :]
    assert len(set(debug)) == len(debug)


def test_the_key_is_of_the_settings_not_of_their_order() -> None:
    one = build.config_digest(["CONFIG_A=y", "CONFIG_B=y"])
    assert one == build.config_digest(["CONFIG_B=y", "CONFIG_A=y"])
    assert one != build.config_digest(["CONFIG_A=y", "CONFIG_B=m"])
    assert build.digest([b"ab", b"c"]) != build.digest([b"a", b"bc"])


def put(version: str, kind: str) -> Path:
    name = f"kernel/{version}-{build.config_digest(build.fragment(kind))}"
    return cache.entry(name, lambda root: (root / "linux").touch(), ["linux"])


def test_the_newest_kernel_of_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path))
    put("7.9.1-1", "um")
    newer = put("7.10.1-1", "um")
    (put("7.11.1-1", "um") / "linux").unlink()
    monkeypatch.setenv("PATH", "")
    assert build.cached("um-debug") is None
    (kernel,) = build.get(["um"])
    assert kernel.root == newer
    assert kernel.debian_version == "7.10.1-1"


def test_what_is_missing_is_named_for_one_who_is_not_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(UnavailableError, match=r"^packages are missing; .* as root: apt-get install gcc make flex "):
        build.get(["um"])
    assert build.main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("kernel: skipped: packages are missing;")


class AptWith(Apt):
    def __init__(self, *names: str) -> None:
        self.known = names

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.known if name.startswith(prefix)]

    def versions(self, package: str, kind: str = "Packages") -> list[tuple[str, str]]:
        return [(f"{package.rpartition('-')[2]}.4-1~bpo13+1", "trixie-backports")]


def test_the_newest_source_is_taken() -> None:
    apt = AptWith("linux-source-6.12", "linux-source-7.3", "linux-source-7.2")
    assert build.choose_source(apt) == ("linux-source-7.3", "7.3.4-1~bpo13+1")


@pytest.mark.parametrize("names", [(), ("linux-source-6.12", "linux-source-7.0")])
def test_a_source_that_is_too_old_is_none(names: tuple[str, ...]) -> None:
    with pytest.raises(UnavailableError, match=r"7\.1 or newer is needed"):
        build.choose_source(AptWith(*names))


def test_the_modules_key_is_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source is another module; the same source, though its file is newer, is the same."""
    project = tmp_path / "project"
    (project / "kernel/driver").mkdir(parents=True)
    (project / "kernel/driver/Kbuild").write_text("obj-m := vfio_v3_sample.o\n")
    source = project / "kernel/driver/vfio_v3_sample.c"
    source.write_text("int x;\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "Makefile").write_text("modules:\n\t@cat $(M)/*.c > $(M)/vfio_v3_sample.ko\n")
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PROJECT", project)
    kernel = build.Kernel(tmp_path)
    first = build.module(kernel)
    assert first is not None
    assert first.read_text() == "int x;\n"
    source.touch()
    assert build.module(kernel) == first
    source.write_text("int y;\n")
    second = build.module(kernel)
    assert second is not None
    assert second.read_text() == "int y;\n"
    assert second != first


def test_a_module_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, tree = tmp_path / "project", tmp_path / "tree"
    (project / "kernel/driver").mkdir(parents=True)
    (project / "kernel/driver/Kbuild").write_text("obj-m := vfio_v3_sample.o\n")
    tree.mkdir()
    (tree / "Makefile").write_text("modules:\n\t@echo 'main.c:3: error: no such thing'; exit 1\n")
    monkeypatch.setenv("PROTO_V3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PROJECT", project)
    with pytest.raises(BuildError, match=r"main\.c:3: error: no such thing"):
        build.module(build.Kernel(tmp_path))


def test_of_a_failed_build_the_errors_are_shown_though_others_went_on() -> None:
    log = "  CC a.o\nb.c:3:1: error: unknown type\nmake[2]: *** [Makefile:1: b.o] Error 1\n" + "  CC c.o\n" * 100
    assert build.errors(log) == "b.c:3:1: error: unknown type\nmake[2]: *** [Makefile:1: b.o] Error 1"
    assert build.errors("one\ntwo\n") == "one\ntwo"


def test_a_project_without_a_driver_has_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PROJECT", tmp_path)
    assert build.module(build.Kernel(tmp_path)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="make of Linux")
def test_make_is_called_without_the_outer_makes_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").write_text("show:\n\t@echo flags=$(MAKEFLAGS) arch=$(ARCH)\n")
    monkeypatch.setenv("MAKEFLAGS", "n")
    assert "arch=um" in build.run_make(tmp_path, "show").stdout


def test_nothing_of_the_project_names_a_mirror() -> None:
    """Which host packages come from, is what this machine's apt says."""
    for path in (build.PROJECT / "kernel").glob("*"):
        if path.is_file():
            assert not [word for word in path.read_text("utf-8").split() if "debian.org" in word], path
