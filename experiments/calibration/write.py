# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts numbers into a scenario's TOML text, line by line: comments and sources stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.calibration.figures import Values
from experiments.calibration.plan import Calibration, file_of, value_at
from experiments.runs.files import replacing
from proto_v3.errors import UserError
from sim.scenario.file import load


def by_file(plan: Calibration, values: Values) -> dict[str, dict[str, float]]:
    """The numbers by scenario and key."""
    found: dict[str, dict[str, float]] = {}
    for free, value in zip(plan.free, values, strict=True):
        found.setdefault(free.scenario, {}).update(dict.fromkeys(free.keys, value))
    return found


def as_toml(numbers: Mapping[str, float]) -> str:
    """The numbers of one file as text that can be pasted into it."""
    tables: dict[str, list[str]] = {}
    for key, value in numbers.items():
        header, name = _place(key)
        tables.setdefault(header, []).append(f"{name} = {value!r}")
    return "\n\n".join("\n".join([header, *lines]) for header, lines in tables.items()) + "\n"


def put(text: str, numbers: Mapping[str, float], file: str) -> str:
    """The text of a scenario's file with other numbers at these keys. UserError if it does not set one of them."""
    lines = text.splitlines(keepends=True)
    for key, value in numbers.items():
        header, name = _place(key)
        at = next((at for at in _of_table(lines, header) if re.match(rf"{re.escape(name)}\s*=", lines[at])), None)
        if at is None:
            raise UserError(f"{file}: {key}: must be set in this file, on a line of its own under {header}")
        ending = lines[at][len(lines[at].rstrip("\r\n")) :]
        comment = re.search(r"\s+#.*", lines[at])
        lines[at] = f"{name} = {value!r}{comment[0].rstrip() if comment else ''}{ending}"
    return "".join(lines)


def write(plan: Calibration, values: Values) -> list[str]:
    """Put the numbers into the scenarios' files; returns what was changed, one line a key. UserError, and no file is
    changed, if one of them does not set a key."""
    texts: dict[Path, str] = {}
    changed = []
    for name, numbers in by_file(plan, values).items():
        path, before = file_of(name), load(str(file_of(name)))
        text = texts[path] if path in texts else path.read_text(encoding="utf-8")
        texts[path] = put(text, numbers, str(path))
        changed += [f"{path}: {key} = {value!r}, was {value_at(before, key)!r}" for key, value in numbers.items()]
    for path, text in texts.items():
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    return changed


def _place(key: str) -> tuple[str, str]:
    """The table's header and the key in it."""
    table, _, name = key.rpartition(".")
    if table == "device.0":
        return "[[device]]", name
    return f"[{table}]", name


def _of_table(lines: list[str], header: str) -> Iterator[int]:
    """The lines of the first table with this header."""
    starts = [at for at, line in enumerate(lines) if line.split("#")[0].strip() == header]
    for at in range(starts[0] + 1, len(lines)) if starts else ():
        if lines[at].startswith("["):
            return
        yield at
