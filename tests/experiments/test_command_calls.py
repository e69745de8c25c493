# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command line passes to each command, for mypy does not see through click: every name, and every type."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
import pytest

from experiments.cli import main
from tests.build.cli import proto_v3

CALLS = {
    "agree": ("agree.run_agree", ["x"]),
    "compare": ("compare.run_compare", ["x", "--set", "a=1", "--jobs", "2"]),
    "decide": ("decide.run_decide", ["x", "--changes", "multifd,v3-n1"]),
    "diff": ("diff.run_diff", ["a", "b"]),
    "fit": ("fit.run_fit", ["x", "y", "--cmdline", "-m 1", "--driver", "z", "--migration", "2", "--rename", "a,b"]),
    "live": ("live.run_live", ["x", "--connect", "here"]),
    "live-target": ("live_target.run_target", []),
    "new-scenario": ("new_scenario.write_scenario", ["x"]),
    "probe": ("probe.run_probe", ["x", "--load-into", "y"]),
    "protocols": ("protocols.list_protocols", ["x"]),
    "real": ("real.run_real", ["x", "--to", "y", "--by", "cdev"]),
    "replay": ("replay.run_replay", ["x"]),
    "report": ("report.run_report", ["--page", "x"]),
    "run": ("run.run_experiments", ["ablation", "--set", "a=1"]),
    "scenarios": ("scenarios.show_scenario", ["x", "--set", "a=1"]),
    "trace": ("trace.run_trace", ["x", "--protocol", "v2"]),
    "validate": ("validate.run_validate", ["x"]),
}
"""The function that each command ends in, and arguments."""


@pytest.mark.parametrize("command", CALLS)
def test_a_command_passes_what_its_function_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, arguments = CALLS[command]
    module, _, name = where.partition(".")
    place = importlib.import_module(f"experiments.commands.{module}")
    function = getattr(place, name)
    hints = get_type_hints(function)
    passed: dict[str, Any] = {}

    def checked(*values: Any, **named: Any) -> int:
        passed.update(inspect.signature(function).bind(*values, **named).arguments)
        return 0

    monkeypatch.setattr(place, name, checked)
    done = proto_v3(tmp_path, command, *arguments)
    assert done.returncode == 0, done.stderr
    assert passed
    for parameter, value in passed.items():
        plain = list(value) if isinstance(value, range) else value
        pydantic.TypeAdapter(hints[parameter]).validate_python(plain, strict=True)


def test_every_command_is_called_here() -> None:
    assert set(CALLS) == set(main.commands) - {"completion", "schema"}
