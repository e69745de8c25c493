# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 new-scenario`: a scenario file to change, with every key of the one that it extends as a comment."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pydantic

from experiments.report import tables
from experiments.report.tables import say
from proto_v3.errors import UserError
from proto_v3.text import clean
from sim.scenario.file import NOT_SET, find_base, load, model_in, parse
from sim.scenario.scenario import SOURCE_KINDS, Scenario
from sim.scenario.schema import meaning

HEAD = """\
# What differs from {base}. Each key below is a comment with the value that holds now: take the # away, and change it.
#   proto-v3 scenarios {file}   all values, and which of them are yours
#   proto-v3 compare {file}     run it
# For your editor: `proto-v3 schema > scenario.schema.json`, and as the first line: #:schema ./scenario.schema.json
name = "{name}"
#description = "what it is"
extends = {extends}
"""
SOURCES = """
# Where your values come from, if that is known: {kinds}, a colon, and the words.
# Without it, the source of a value is "yours: {file}".
[sources]
#"link.gbit_per_s" = "published: where"
"""
RANGES = """
# What else your values may be: low and high, or any of a list; and why. A value that you set has no other range.
[ranges]
#"link.gbit_per_s" = { low = 25.0, high = 100.0, why = "the rate of either port" }
"""


def write_scenario(name: str, extends: str) -> None:
    """Write NAME.toml into the current folder. UserError if it exists, or if what it extends cannot be loaded."""
    name = name.removesuffix(".toml")
    path = Path(f"{name}.toml")
    base = load(str(find_base(extends)))
    text = scenario_text(name, extends, base)
    parse(text, str(path))  # a name that is none
    try:
        with path.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise UserError(f"{path}: is there already; nothing was written") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    say(tables.console(), f"Scenario: {path}; change it, then: proto-v3 compare {path}")


def scenario_text(
    name: str, extends: str, base: Scenario, values: Mapping[str, tuple[Any, str]] | None = None, description: str = ""
) -> str:
    """The file's text. `values`: keys (`device.0.state_mib`) that are set in it, each with its value and its source."""
    file = f"{name}.toml"
    head = HEAD.format(name=name, file=file, base=base.name, extends=_toml(extends))
    if description:
        head = head.replace('#description = "what it is"', f"description = {_toml(description)}")
    keys = _keys(Scenario, base.model_dump(exclude_unset=True), base, "", values or {})
    sources = [f"{_toml(key)} = {_toml(source)}" for key, (_, source) in (values or {}).items()]
    kinds = SOURCES.format(file=file, kinds=", ".join(SOURCE_KINDS))
    return "\n".join([head, *keys, kinds, *sources, RANGES])


def _keys(
    model: type[pydantic.BaseModel],
    given: dict[str, Any],
    base: Scenario,
    at: str,
    values: Mapping[str, tuple[Any, str]],
) -> Iterator[str]:
    """The keys of a table as comments, then its tables: under a heading if the base has them, else as comments too.
    What is in `values` is no comment.

    `at` is the dotted key of the table, with a dot at its end, as sources have it.
    """
    below = {key: inner for key, field in model.model_fields.items() if (inner := model_in(field.annotation))}
    for key, field in model.model_fields.items():
        if key in below or (not at and key in NOT_SET):
            continue
        value = given.get(key, field.default)
        if key in given:
            whence = f"{base.name}: {_toml(value)} ({clean(base.sources.get(at + key, 'not stated'))})."
            if (plausible := base.ranges.get(at + key)) is not None:
                whence += f" Range: {plausible.words} ({plausible.why})."
        elif field.is_required() or value is None:
            value, whence = _example(field.annotation), "Not set; this is an example."
        else:
            whence = f"Default: {_toml(value)}."
        yield _comment(f"{meaning(model, key)} {whence}")
        yield f"{key} = {_toml(values[at + key][0])}" if at + key in values else f"#{key} = {_toml(value)}"
    for key, inner in below.items():
        if not at and key in NOT_SET:
            continue
        several = "list[" in str(model.model_fields[key].annotation)
        heading = ".".join([*(part for part in at.split(".") if part and not part.isdigit()), key])
        heading = f"[[{heading}]]" if several else f"[{heading}]"
        there = given.get(key)
        yield f"\n{_comment(inner.__doc__ or '')}"
        for place, table in enumerate(there or [] if several else [there or {}]):
            here = f"{at}{key}.{place}." if several else f"{at}{key}."
            is_set = any(each.startswith(here) for each in values)
            yield heading if there or not at or is_set else f"#{heading}"
            yield from _keys(inner, table, base, here, values)
        if several and not there:
            yield f"#{heading}"
            yield from _keys(inner, {}, base, f"{at}{key}.", {})


def _comment(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        120,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _example(annotation: Any) -> Any:
    """A value of a key that has none: the first of its words, or a number."""
    for kind in get_args(annotation) or [annotation]:
        if isinstance(kind, str):
            return kind
        if kind in (int, float):
            return kind(1)
        if get_args(kind):
            return _example(kind)
    return "RUNNING_P2P -> RUNNING" if annotation else ""


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
