# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of a TOML file as plain dicts and lists: merged, compared, and a value put in at a dotted key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any


def merged(base: Any, own: Any) -> Any:
    """`own` over `base`: tables key by key, lists of tables by position; any other value replaces the base's."""
    if isinstance(base, dict) and isinstance(own, dict):
        return base | {key: merged(base.get(key), value) for key, value in own.items()}
    if _is_tables(base) and _is_tables(own):
        both = [merged(*pair) for pair in zip(base, own, strict=False)]
        return both + (base[len(both) :] or own[len(both) :])
    return own


def differences(base: Any, own: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys (`device.0.count`) at which two trees differ, with both values; None where there is none."""
    if base is own:  # `put` shares what it does not change
        return
    there, here = _inner(base), _inner(own)
    for name in there | here:
        yield from differences(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    if not there and not here and base != own:
        yield key, base, own


def put(place: Any, way: Sequence[str], value: Any) -> Any:
    """`place` with `value` at the end of the way, on which tables are made. ValueError where it leads nowhere."""
    if not way:
        return value
    name, *rest = way
    if place is None or isinstance(place, dict):
        tables = place or {}
        return tables | {name: put(tables.get(name), rest, value)}
    if not isinstance(place, list):
        raise ValueError(f"{name!r}: there is a value in front of it, not a table")
    if not re.fullmatch("0|[1-9][0-9]{0,2}", name) or int(name) > len(place):
        raise ValueError(f"{name!r}: must be a place in the list, 0 to {len(place)}, as in device.0.count")
    at = int(name)
    return [*place[:at], put(place[at] if at < len(place) else None, rest, value), *place[at + 1 :]]


def value(text: str) -> Any:
    """What a TOML value's text means; a word that is no TOML is a string. ValueError for anything else."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    if parsed.keys() == {"value"}:
        return parsed["value"]
    if re.fullmatch(r"[A-Za-z][\w.-]*", text):
        return text
    raise ValueError("the value must be one as in TOML, or a word")


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _inner(value: Any) -> dict[str, Any]:
    """The tables or values in a table or in a list of tables, by name or place."""
    if _is_tables(value):
        return {str(at): table for at, table in enumerate(value)}
    return value if isinstance(value, dict) else {}
