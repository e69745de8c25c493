# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command is about to make, and what an earlier one has made: whether that may be replaced."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

from proto_v3.text import clean

HALF_WIDTH = 0.01
"""Of the 95 % interval of a mean, as a part of it: a sweep makes more runs where it is wider, unless told otherwise."""
ROUNDING = 1e-9
"""A half width in per cent and as a part differ by less."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of one command."""

    command: Sequence[str]
    """Its words."""
    of: Collection[str]
    """The scenarios, by name or file, or the question."""
    runs: int
    """The most that it can make."""
    quick: bool = False
    half_width: float = 0.0
    """Of the intervals at which a sweep makes no more runs. 0: it makes all."""
    writes: Collection[str] = ()
    """The names of the files that it can write, without their suffixes."""

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> Self:
        """What made a result. What the manifest does not say is left empty."""
        files = manifest.get("scenario_files")
        of = list(files.values()) if isinstance(files, dict) else []
        runs = manifest.get("runs_most", manifest.get("runs"))
        rule = manifest.get("seeds_rule")
        percent = rule.get("half_width_percent") if isinstance(rule, dict) else None
        return cls(
            command=_words(manifest.get("command")),
            of=_texts([*of, *(manifest.get(key) for key in ("experiment", "scenario_file"))]),
            runs=runs if isinstance(runs, int) else 0,
            quick=manifest.get("quick") is True,
            half_width=percent / 100 if isinstance(percent, (int, float)) else 0.0,
        )

    @property
    def line(self) -> str:
        """The command as the user gave it."""
        return shlex.join(self.command)

    def replaces(self, old: Plan) -> bool:
        """Whether it is the same command for the same scenarios or question, and makes as many runs at least."""
        return (
            self.command[1:2] == old.command[1:2]
            and set(map(os.path.abspath, old.of)) <= set(map(os.path.abspath, self.of))
            and old.runs <= self.runs
            and old.quick >= self.quick
            and self.half_width <= old.half_width * (1 + ROUNDING)
        )


def described(manifest: dict[str, Any]) -> str:
    """What a folder holds, by its manifest: `40 runs of `proto-v3 compare ...`, made ...`."""
    planned = manifest.get("runs_planned")
    of = f" of {planned}" if manifest.get("complete") is False else ""
    runs = "run" if (manifest.get("runs"), of) == (1, "") else "runs"
    return clean(f"{manifest.get('runs')}{of} {runs} of `{manifest.get('command')}`, made {manifest.get('made')}")


def _words(command: object) -> list[str]:
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []


def _texts(value: object) -> list[str]:
    return [each for each in _list(value) if isinstance(each, str)]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
