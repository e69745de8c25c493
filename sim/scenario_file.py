"""Reading scenarios: files and shipped names, and what is said when one is wrong."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pydantic

from proto_v3.errors import UserError
from sim.scenario import Scenario, did_you_mean, short


def shipped() -> dict[str, Path]:
    """The scenarios that come with the project, by name."""
    folder = Path(__file__).resolve().parents[1] / "scenarios"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find(name_or_path: str) -> Path:
    """The file of a shipped scenario's name or of a path. UserError if there is none."""
    if name_or_path in shipped():
        return shipped()[name_or_path]
    path = Path(name_or_path)
    if name_or_path and os.path.isdir(path):
        raise UserError(f"{name_or_path} is a folder; a scenario is a TOML file")
    if name_or_path and os.path.exists(path):  # of os.path, as it says no to a name that is too long, where Path raises
        return path
    raise UserError(
        f"no scenario {short(name_or_path)}: neither a file nor one of {', '.join(shipped())}"
        f"{did_you_mean(name_or_path, shipped())}"
    )


def load(name_or_path: str) -> Scenario:
    """Read and validate a scenario. UserError names the file, and key, value and what would be right per problem."""
    path = find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return parse(text, str(path))


def parse(text: str, file: str) -> Scenario:
    """Validate a scenario's text; `file` is what its errors call it."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, a number of 5000 digits, endless brackets
        raise UserError(f"{file}: not valid TOML: {error}") from error
    if not tables:
        raise UserError(f"{file}: empty; a scenario needs the tables {', '.join(_required())}")
    try:
        return Scenario.model_validate(tables)
    except pydantic.ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise UserError("\n  ".join([f"{file}: {len(problems)} problem(s)", *problems])) from None


def _required() -> list[str]:
    return [name for name, field in Scenario.model_fields.items() if field.is_required()]


def _explain(problem: Any) -> str:
    """One line: key, value, what would be right."""
    key = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        return f"{key}: missing; it is required{_unit_hint(key)}"
    if kind == "extra_forbidden":
        return (
            f"{key} = {short(value)}: unknown key{did_you_mean(key.rpartition('.')[2], _keys_beside(problem['loc']))}"
        )
    if kind == "value_error":
        return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    if kind in ("model_type", "dict_type"):
        return f"{key} = {short(value)}: must be a table"
    message = problem["msg"].replace("Input should be", "must be")
    return f"{key} = {short(value)}: {message[0].lower()}{message[1:]}"


UNITS = {
    "_gbit_per_s": "Gbit/s",
    "_gib_per_s": "GiB/s",
    "_mib_per_s": "MiB/s",
    "_per_s": "a second",
    "_ms": "milliseconds",
    "_us": "microseconds",
    "_s": "seconds",
    "_kib": "KiB",
    "_mib": "MiB",
    "_gib": "GiB",
}
"""What the end of a key says; the first that fits."""


def _unit_hint(key: str) -> str:
    unit = next((unit for end, unit in UNITS.items() if f"_{key.rpartition('.')[2]}".endswith(end)), None)
    return f" ({unit})" if unit else ""


def _keys_beside(loc: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed in the table in which `loc` stands."""
    model: type[pydantic.BaseModel] = Scenario
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        inner = _model_in(annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_in(argument)) is not None:
            return found
    return None
