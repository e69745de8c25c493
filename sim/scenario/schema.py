# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON Schema of a scenario file, for editors: keys, types, ranges, units, what each key means.

The rules that keys have with one another are the loader's alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import pydantic

from sim.scenario.file import model_in
from sim.scenario.ranges import Range
from sim.scenario.scenario import SOURCE_KINDS, Scenario
from sim.scenario.shipped import shipped_bases
from sim.scenario.units import unit_of

EXTENDS = "The scenario that this file changes: the name of a shipped one, or a file, looked for beside this one."
RANGES = "Other plausible values: a key of this file in quotes; then low and high, or any = [...], and why."
SOURCES = "Where the values come from: a key of this file in quotes; then the kind of source, a colon, the words."


def json_schema() -> dict[str, Any]:
    """The schema. A file that extends another may leave out everything; one that does not has to be whole."""
    schema = Scenario.model_json_schema()
    tables: dict[str, Any] = schema["$defs"]
    for model in tables_in(Scenario):
        table = schema if model is Scenario else tables[model.__name__]
        if model is not Range:  # it is replaced as a whole
            table.pop("required", None)
        for key, value in table["properties"].items():
            _describe(value, model, key)
    keys = schema["properties"]
    keys["extends"] = {"description": EXTENDS, "anyOf": [{"enum": list(shipped_bases())}, {"type": "string"}]}
    keys["sources"]["description"] = SOURCES
    keys["ranges"]["description"] = RANGES
    keys["sources"]["additionalProperties"]["pattern"] = f"^({'|'.join(SOURCE_KINDS)}):"
    whole = _required(Scenario)
    whole["required"] = [key for key in whole["required"] if key not in ("name", "description")]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "A scenario of proto-v3",
        "if": {"not": {"required": ["extends"]}},
        "then": whole,
    }


@cache
def meanings(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """What the keys of a table mean: the docstrings below its fields."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for line, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(following, ast.Expr):
            text = ast.literal_eval(following.value)
            found[line.target.id] = " ".join(text.split())
    return found


def meaning(model: type[pydantic.BaseModel], key: str) -> str:
    """A key in words: what it means, if its name does not say it, and its unit. May be empty."""
    unit = unit_of(key)
    of_unit = f"In {unit[0]}".replace("In a second", "Per second") if unit else ""
    words = [meanings(model).get(key, "").removesuffix("."), of_unit]
    return ". ".join(filter(None, words)) + ("." if any(words) else "")


def _describe(value: dict[str, Any], model: type[pydantic.BaseModel], key: str) -> None:
    """In place: the meaning; no made-up titles, and no null, which TOML cannot say."""
    value.pop("title", None)
    if "anyOf" in value:
        (given,) = (each for each in value.pop("anyOf") if each != {"type": "null"})
        value |= given
    if not isinstance(value.get("default"), (str, int, float, list)):
        value.pop("default", None)
    if words := meaning(model, key):
        value["description"] = words


def tables_in(model: type[pydantic.BaseModel]) -> list[type[pydantic.BaseModel]]:
    """A table and all tables in it."""
    inner = filter(None, (model_in(field.annotation) for field in model.model_fields.values()))
    return [model, *(each for table in inner for each in tables_in(table))]


def _required(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """What a whole file must have, here and in the tables below."""
    below = {}
    for key, field in model.model_fields.items():
        if (inner := model_in(field.annotation)) is not None and inner is not Range:
            table = _required(inner)
            below[key] = {"items": table} if "list[" in str(field.annotation) else table
    required = [key for key, field in model.model_fields.items() if field.is_required()]
    return {"required": required, "properties": below}
