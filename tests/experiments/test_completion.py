# SPDX-License-Identifier: GPL-2.0-or-later
"""What a shell offers when the user presses Tab: asked as click asks, and in a real bash."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from experiments.cli import main
from experiments.commands.complete import SHELLS
from experiments.study.experiment import NAMES
from sim.real import sysfs
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import parameters
from sim.scenario.shipped import shipped, shipped_bases
from sim.scenario.suffixes import NUMBERED, SUFFIXES


def offered(*words: str) -> list[str]:
    """For the last word, which is begun; files and folders as the shell's own are left out."""
    complete = ShellComplete(main, {}, "proto-v3", "_PROTO_V3_COMPLETE")
    return [item.value for item in complete.get_completions(list(words[:-1]), words[-1]) if item.type == "plain"]


@pytest.mark.parametrize(
    ("words", "all_of"),
    [
        ([""], ["compare", "validate", "run", "new-scenario", "completion"]),
        (["compare", ""], list(shipped())),
        (["scenarios", "mlx"], ["mlx5-2vf"]),
        (["protocols", "vgpu"], ["vgpu-32g"]),
        (["trace", "nic"], ["nic-reconfig"]),
        (["validate", ""], ["mlx5-2vf", "ufimtseva-2vf"]),
        (["run", ""], [*NAMES, "all"]),
        (["run", "ablation", "read"], ["read_scaling"]),
        (["new-scenario", "mine", "--extends", ""], list(shipped_bases())),
        (["compare", "mlx5-2vf", "--prot"], ["--protocols"]),
        (["compare", "mlx5-2vf", "--protocols", "v"], ["v2", "v3"]),
        (["live", "live-paced", "--protocols", "v2,v3-p"], ["v2,v3-pool", "v2,v3-proceed"]),
        (["trace", "mlx5-2vf", "--protocol", "v2-reinit-f"], ["v2-reinit-flush"]),
        (["compare", "mlx5-2vf", "--set", "link.gb"], ["link.gbit_per_s="]),
        (["compare", "mlx5-2vf", "--set", "driver.lock="], ["driver.lock=none", "driver.lock=global"]),
        (["compare", "mlx5-2vf", "--set", "vmm.reinit=t"], ["vmm.reinit=true"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_what_is_offered(words: list[str], all_of: list[str]) -> None:
    every = offered(*words)
    assert set(all_of) <= set(every)
    assert all(each.startswith(words[-1]) for each in every)
    assert len(set(every)) == len(every)


def test_scenario_files_are_offered_beside_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    for name in ("mlx.toml", "below/mine.toml", "mlx.txt"):
        (tmp_path / name).touch()
    assert offered("compare", "mlx") == ["mlx5-2vf", "mlx.toml"]
    assert offered("compare", "below/") == ["below/mine.toml"]


def test_devices_are_offered_that_the_list_has_not_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysfs, "names", lambda: ["vfio0", "vfio1", "0000:3b:00.2"])
    assert offered("real", "v") == ["vfio0", "vfio1"]
    assert offered("real", "vfio0,") == ["vfio0,vfio1", "vfio0,0000:3b:00.2"]
    assert offered("real", "vfio0", "--to", "0000") == ["0000:3b:00.2"]
    assert offered("probe", "vfio1") == ["vfio1"]


def test_where_a_file_or_a_folder_is_due_the_shell_offers_its_own() -> None:
    complete = ShellComplete(main, {}, "proto-v3", "_PROTO_V3_COMPLETE")
    for name, command in main.commands.items():
        for option in command.params:
            kind = {"FOLDER": "dir", "FILE": "file", "PEM": "file"}.get(option.metavar or "")
            if kind is not None and isinstance(option, click.Option):
                assert [each.type for each in complete.get_completions([name, option.opts[0]], "x")] == [kind]
    assert [each.type for each in complete.get_completions(["diff", "a"], "b")] == ["dir"]


def test_every_suffix_is_offered_where_it_is_not_used_yet_and_is_one() -> None:
    plain = load("nic-reconfig", ["vmm.reinit=true"])
    with_more = load("nic-reconfig", ["vmm.reinit=true", "vmm.multifd=true", "vmm.switchover_ack=reusable"])
    for version, suffixes in SUFFIXES.items():
        names = {suffix for suffix in suffixes if not NUMBERED.fullmatch(suffix)}
        every = offered("compare", "nic-reconfig", "--protocols", f"{version}-")
        assert {f"{version}-{name}" for name in names} <= set(every)
        for name in every:  # -early and -retry need another one
            Protocol.parse(name, with_more if name in ("v2-early", "v2-retry") else plain)
    assert "v3-n4-n8" not in offered("compare", "x", "--protocols", "v3-n4-")
    assert "v3-n12" in offered("compare", "x", "--protocols", "v3-n1")
    assert "v3-n1,v3-n1" not in offered("compare", "x", "--protocols", "v3-n1,v3-n")


def test_every_key_that_a_scenario_sets_is_offered_to_set() -> None:
    keys = {key.replace("device.1.", "device.0.") for name in shipped() for key in parameters(load(name))}
    assert {f"{key}=" for key in keys} <= set(offered("compare", "mlx5-2vf", "--set", ""))


def test_names_are_offered_without_anything_heavy() -> None:
    code = (
        "import sys, os\n"
        "from experiments.cli import main\n"
        "main(prog_name='proto-v3', standalone_mode=False)\n"
        "print('heavy:', {'numpy', 'matplotlib', 'polars', 'pydantic', 'rich'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    words = ["compare mlx5-2vf --protocols v", "run read", "compare vg"]
    for line in words:
        asked = {"COMP_WORDS": f"proto-v3 {line}", "COMP_CWORD": str(len(line.split()))}
        environment = os.environ | asked | {"_PROTO_V3_COMPLETE": "bash_complete"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert "plain," in done.stdout
        assert "heavy: set()" in done.stderr or not done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_its_script_and_readme_says_how(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert "_PROTO_V3_COMPLETE" in done.output
    assert f"proto-v3 completion {shell}" in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    if path := shutil.which(shell):
        subprocess.run([path, "-n"], input=done.output, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    """Readline's own function, called as readline does."""
    command = tmp_path / "bin" / "proto-v3"
    command.parent.mkdir()
    start = "from experiments.cli import main; main(prog_name='proto-v3')"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{start}" "$@"\n')
    command.chmod(0o755)
    lines = {
        "proto-v3 compare mlx5-2": ["mlx5-2vf"],
        "proto-v3 compare mlx5-2vf --protocols v2,v3-po": ["v2,v3-pool"],
        "proto-v3 run buffer": ["buffer_and_chunk"],
        "proto-v3 compare mlx5-2vf --set link.gbit": ["link.gbit_per_s="],
    }
    asked = "\n".join(
        f"COMP_WORDS=({line}) COMP_CWORD={len(line.split()) - 1} COMPREPLY=()\n"
        "$(complete -p proto-v3 | sed 's/.*-F \\([^ ]*\\) .*/\\1/') proto-v3 2>/dev/null\n"
        'echo "${COMPREPLY[*]}"'
        for line in lines
    )
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = f'eval "$(proto-v3 completion bash)"\n{asked}\n'
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == list(lines.values())
