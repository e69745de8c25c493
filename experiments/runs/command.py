"""The command line that makes runs again, and the KEY=VALUE of its `--set`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

Setting = str | int | float | bool | Sequence[str]
"""The value of a scenario's parameter."""


def settings(changes: Mapping[str, Setting]) -> list[str]:
    """Each change as KEY=VALUE, as `--set` takes it."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]


def compare_command(
    scenario_name: str, protocol_names: Sequence[str], seeds: int, changes: Mapping[str, Setting] | None = None
) -> str:
    """The command line that makes the same runs, with a table, a figure and a manifest in a folder.

    `seeds` is their number; they begin with 1. `changes` is parameter -> value, as for `load`.
    """
    command = ["proto-v3", "compare", scenario_name, "--protocols", ",".join(protocol_names), "--seeds", str(seeds)]
    return shlex.join([*command, *(part for each in settings(changes or {}) for part in ("--set", each))])
