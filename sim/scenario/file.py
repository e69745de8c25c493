# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading scenarios: files and shipped names, files that extend others, and messages about wrong ones.

`extends = "NAME_OR_FILE"` at the top of a file: the base's values hold, except for those that this file sets. Tables
are merged key by key. Lists of tables are merged by position, the first `[[device]]` with the first, and surplus ones
are appended. Any other value replaces the base's. Published figures are never inherited. A file without a name has that
of the file; one without a description is called a change of its base.

A source of the base is about the base's value: a changed key has the source that this file gives it, or none. What a
user's file or `--set` sets has the source `yours`, also where it is the base's value, unless the file gives one.

A key that has to be below another one (sim.scenario.ranges.ORDERED), and that a user's file or `--set` inherits, is cut
if that other one is set lower: on a link of 10 Gbit/s a connection has 10 at the most. What a user set is never cut.

So is a range: a key that a file or `--set` sets, also to the base's value, has the range that this file gives it, or
none. A range of the base stays for a key that is not set anew; a file may give it another. If a user sets a value
outside of the range that it had, its source says so.
"""

from __future__ import annotations

import codecs
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydantic

from proto_v3.errors import UserError
from proto_v3.text import clean
from sim.scenario import toml as tables
from sim.scenario.protocol import Protocol
from sim.scenario.ranges import Range, cut, moved, outside
from sim.scenario.scenario import MAX_NAME, NO_PARAMETERS, Scenario, parameters
from sim.scenario.shipped import FOLDER, shipped, shipped_bases
from sim.scenario.units import MAX_TEXT_CHARS, did_you_mean, short, unit_of

OWN = ("name", "description", "published")
NOT_SET = (*NO_PARAMETERS, "extends")
"""Keys of a file that are no parameters."""
MAX_FILE_BYTES = 4 << 20
"""No scenario file is larger; /dev/zero has no end."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A file's tables, as they are in it."""

    file: str
    tables: dict[str, Any]


def find(name_or_path: str, also: Collection[str] = ()) -> Path:
    """The file of a shipped scenario's name or of a path. UserError if there is none.

    `also` are names of other things that the user may have meant.
    """
    return _find(name_or_path, shipped(), Path(), also)


def find_base(name_or_path: str) -> Path:
    """The file of what a scenario can extend. UserError if there is none."""
    return _find(name_or_path, shipped_bases(), Path())


def _find(named: str, known: Mapping[str, Path], beside: Path, also: Collection[str] = ()) -> Path:
    """By name, else as a path from the folder `beside`."""
    if named in known:
        return known[named]
    path = beside / named
    if named and os.path.isdir(path):
        raise UserError(f"{named} is a folder; a scenario is a TOML file")
    if named and os.path.exists(path):  # of os.path: False for a name that is too long, where Path raises
        return path
    if named in shipped_bases():
        raise UserError(f'{named} is no scenario, but a set of values for a file that begins with extends = "{named}"')
    files = [each.name for each in sorted(beside.glob("*.toml"))]
    hint = did_you_mean(named, [*known, *also, *files])
    if f"{named}.toml" in files:
        hint = f"; did you mean {named}.toml?"
    raise UserError(f"no scenario {short(named)}: neither a file nor one of {', '.join(known)}{hint}")


def load(name_or_path: str, settings: Sequence[str] = (), *, keep_published: bool = False) -> Scenario:
    """Read and validate a scenario, with `--set`'s KEY=VALUE put in.

    What was published is of the machine that was measured, not of one that was changed: with `settings` it is left out,
    unless `keep_published` says otherwise.

    UserError names the file, and key, value and what would be right per problem.
    """
    path = find(name_or_path)
    return parse(_read(path), str(path), settings, keep_published=keep_published)


def parse(text: str, file: str, settings: Sequence[str] = (), *, keep_published: bool = False) -> Scenario:
    """Validate a scenario's text; `file` is what its errors call it, and what it extends is looked for beside that."""
    try:
        layers = _layers(Layer(file, _parsed(text, file)))
        whole = _with_settings(_merged(layers), settings, keep_published)
        scenario = _validated(whole, _title([layer.file for layer in layers], settings))
        if not settings and (wrong := _impossible_ends(scenario.to_json())):
            raise _wrong(_title([layer.file for layer in layers], ()), wrong)
        return scenario
    except RecursionError as error:  # a table's name may have any number of dots
        raise UserError(f"{file}: nested too deeply") from error


def from_dump(dump: Mapping[str, Any], whence: str, settings: Sequence[str] = ()) -> Scenario:
    """Validate a scenario as Scenario.model_dump gives it and a manifest holds it, with `--set`'s KEY=VALUE put in.

    `whence` is what errors call it, which are those of `load`.
    """
    try:
        whole = _as_in_a_file(dump, Scenario, dump.get("sources") or ())
        return _validated(_with_settings(whole, settings), _title([whence], settings))
    except RecursionError as error:
        raise UserError(f"{whence}: nested too deeply") from error


def bases(name_or_path: str) -> list[Path]:
    """The files that a scenario builds on, from the one that it extends itself to the bottom."""
    return [Path(layer.file) for layer in _layers_of(name_or_path)[1:]]


def changes(name_or_path: str, settings: Sequence[str] = ()) -> dict[str, tuple[object, object]]:
    """In which parameters a scenario differs from the file at the bottom: dotted key -> (value there, value here).

    None stands for a value that is not given. Empty if the scenario extends nothing. UserError as for `load`.
    """
    layers = _layers_of(name_or_path)
    differences = tables.differences(layers[-1].tables, _with_settings(_merged(layers), settings))
    return {key: (base, own) for key, base, own in differences if key.partition(".")[0] not in NOT_SET}


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"{path}: is no scenario: it has more than {MAX_FILE_BYTES >> 20} MiB")
        return content.decode("utf-8-sig")  # some editors begin a file with a BOM
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        utf_16 = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        what = "but UTF-16: save it as UTF-8" if utf_16 else f"(byte {error.start})"
        raise UserError(f"{path}: not UTF-8 text {what}") from error


def _parsed(text: str, file: str) -> dict[str, Any]:
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, a number of 5000 digits, endless brackets
        raise UserError(f"{file}: not valid TOML: {clean(str(error))}") from error
    if not parsed:
        raise UserError(f"{file}: empty; a scenario needs the tables {', '.join(_required())}")
    return parsed


def _layers_of(name_or_path: str) -> list[Layer]:
    path = find(name_or_path)
    return _layers(Layer(str(path), _parsed(_read(path), str(path))))


def _layers(top: Layer) -> list[Layer]:
    """A file, the one that it extends, and so on to the bottom."""
    layers = [top]
    while "extends" in layers[-1].tables:
        above = layers[-1]
        base = _base(above)
        files = [layer.file for layer in layers]
        if base.resolve() in [Path(file).resolve() for file in files]:
            raise UserError(f"{top.file}: extends leads in a circle: {' -> '.join([*files, str(base)])}")
        try:
            layers.append(Layer(str(base), _parsed(_read(base), str(base))))
        except UserError as error:
            raise UserError(f"{error}; {above.file} extends it") from error
    return layers


def _base(layer: Layer) -> Path:
    named = layer.tables["extends"]
    if not isinstance(named, str):
        raise UserError(f"{layer.file}: extends = {short(named)}: must be the name of a scenario or of a file")
    try:
        return _find(named, shipped_bases(), Path(layer.file).parent)
    except UserError as error:
        raise UserError(f"{layer.file}: extends: {error}") from error


# --- tables over tables ----------------------------------------------------------------------------------------------


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The tables of all files, each over the one that it extends."""
    whole: dict[str, Any] = {}
    for layer in reversed(layers):
        inherited = {key: value for key, value in whole.items() if key not in OWN}
        own = _titled(layer, whole)
        after = tables.merged(inherited, own)
        anew = own.get("sources", {})
        if FOLDER not in Path(layer.file).resolve().parents and isinstance(anew, dict):
            yours = dict.fromkeys(_parameters(own), f"yours: {Path(layer.file).name}")
            own, after, told = _cut(own, inherited, after)
            anew = told | _told_outside(yours | anew, inherited, after)
            after = _with_sources(after, anew)
        whole = _with_ranges(inherited, own, _without_stale_sources(inherited, after, anew))
    return whole


def _titled(layer: Layer, base: dict[str, Any]) -> dict[str, Any]:
    """What a file says, with a name and a description if it has none."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(layer.file).stem).strip("-_.")[:MAX_NAME] or "scenario"
    description = f"changed from {base['name']}: {base['description']}" if base else "no description"
    own = {key: value for key, value in layer.tables.items() if key != "extends"}
    return {"name": name, "description": description} | own


def _parameters(whole: dict[str, Any]) -> list[str]:
    """The dotted keys of all values that are set."""
    return list(_values(whole))


def _values(whole: dict[str, Any]) -> dict[str, Any]:
    """All values that are set, by dotted key."""
    own = {table: keys for table, keys in whole.items() if table not in NOT_SET}
    return {key: value for key, _, value in tables.differences({}, own) if value != {}}


def _with_sources(whole: dict[str, Any], anew: dict[str, Any]) -> dict[str, Any]:
    sources = whole.get("sources", {})
    return whole | {"sources": sources | anew} if isinstance(sources, dict) else whole  # the validation reports it


def _told_outside(sources: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The sources of what a user sets; they say so if it is outside of the range that the key had."""
    had, values = before.get("ranges"), _values(after)
    told = {key: outside(had, key, values) for key in sources if key in values}
    return {key: f"{words}{told[key]}" if told.get(key) else words for key, words in sources.items()}


def _with_ranges(before: dict[str, Any], own: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """`after` with the ranges of `own`, and those of `before` for all keys that `own` does not set.

    One that is told `of` a key which `own` sets is left out if it does not hold any more; so is one of a key that is
    gone.
    """
    had, given = before.get("ranges", {}), own.get("ranges", {})
    if not isinstance(had, dict) or not isinstance(given, dict):  # the validation reports it
        return after
    anew, values = set(_parameters(own)), _values(after)
    gone = _values(before).keys() - values.keys()  # a table took the place of another one
    kept = [key for key in had if key not in anew | gone]
    kept = [key for key in kept if not (_of(had[key]) in anew and outside(had, key, values))]
    held = {key: had[key] for key in kept} | given
    return after | {"ranges": held} if held or "ranges" in after else after


def _of(plausible: Any) -> str | None:
    """The key that a range, as it is in a file, is told `of`."""
    named = plausible.get("of") if isinstance(plausible, dict) else None
    return named if isinstance(named, str) else None


def _cut(own: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> tuple[Any, Any, dict[str, str]]:
    """`own` and `after` with the inherited values cut that `own` leaves no room for, and the sources of these."""
    sources, values, told = before.get("sources", {}), _values(before), {}
    wrong, said = cut(values), _parameters(own)
    for key, value in cut(_values(after)).items():
        theirs = isinstance(sources, dict) and not str(sources.get(key, "yours")).startswith("yours")
        if theirs and key not in said and key not in wrong:
            own, after = (tables.put(each, key.split("."), value) for each in (own, after))
            told[key] = f"derived: no more than there is; {values[key]:g} is inherited"
    return own, after, told


def _with_settings(whole: dict[str, Any], settings: Sequence[str], keep_published: bool = False) -> dict[str, Any]:
    """The tables with every KEY=VALUE of --set put in."""
    if settings and not keep_published:
        whole = {key: value for key, value in whole.items() if key != "published"}
    for setting in settings:
        whole = _set(whole, setting)
    return whole


def _as_in_a_file(dump: Any, model: type[pydantic.BaseModel], sourced: Collection[str], key: str = "") -> Any:
    """A dump has every key; a file leaves out those that have their default, for some go with others only.

    `sourced` are the dotted keys that have a source: these the file sets.
    """
    if isinstance(dump, list):
        return [_as_in_a_file(item, model, sourced, f"{key}{at}.") for at, item in enumerate(dump)]
    if not isinstance(dump, Mapping):
        return dump
    given = {}
    for name, value in dump.items():
        field, own = model.model_fields.get(name), f"{key}{name}"
        if field is None:  # the validation reports it
            given[name] = value
        elif (
            field.is_required()
            or value != _dumped(field.default)
            or any(each == own or each.startswith(f"{own}.") for each in sourced)
        ):
            inner = model_in(field.annotation)
            given[name] = value if inner is None else _as_in_a_file(value, inner, sourced, f"{own}.")
    return given


def _dumped(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, pydantic.BaseModel) else value


def _set(before: dict[str, Any], setting: str) -> dict[str, Any]:
    """The tables with one KEY=VALUE of --set put in, which is the source of what it changes."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set {setting}: must be KEY=VALUE, as in --set device.0.count=4")
    way = key.strip().split(".")
    if way[0] in NOT_SET:
        raise UserError(f"--set {setting}: {way[0]} is no parameter; a file of its own can say it, and extend this one")
    try:
        after: dict[str, Any] = tables.put(before, way, tables.value(text.strip()))
    except ValueError as error:
        raise UserError(f"--set {setting}: {error}") from None
    own = tables.put({}, way, tables.value(text.strip()))
    yours = dict.fromkeys(_parameters(own), "yours: --set")
    own, after, told = _cut(own, before, after)
    anew = told | _told_outside(yours, before, after)
    return _with_ranges(before, own, _without_stale_sources(before, _with_sources(after, anew), anew))


def _without_stale_sources(before: dict[str, Any], after: dict[str, Any], anew: Collection[str]) -> dict[str, Any]:
    """`after` without the sources that its changes make untrue; those of `anew` are given anew."""
    sources = after.get("sources")
    if not isinstance(sources, dict):  # the validation reports it
        return after
    changed = {key for key, _, _ in tables.differences(before, after)}
    return after | {"sources": {key: source for key, source in sources.items() if key in anew or key not in changed}}


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _title(files: Sequence[str], settings: Sequence[str]) -> str:
    """What errors call a scenario: the file, what it extends, what was set."""
    title = ", which extends ".join(files)
    return f"{title}, with --set {', '.join(map(short, settings))}" if settings else title


def _validated(whole: dict[str, Any], title: str) -> Scenario:
    try:
        scenario = Scenario.model_validate(whole)
        problems = list(_unknown_protocols(scenario))
    except pydantic.ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
    if problems:
        raise _wrong(title, problems)
    return scenario


def _wrong(title: str, problems: Sequence[str]) -> UserError:
    lines = [f"{title}: {len(problems)} problem(s)", *problems]
    return UserError("\n  ".join(clean(line, MAX_TEXT_CHARS) for line in lines))


def _unknown_protocols(scenario: Scenario) -> Iterator[str]:
    """Published figures must have the names by which runs are known: those of `Protocol`, of `v3` with the number."""
    for at, published in enumerate(scenario.published):
        name = published.protocol
        try:
            known = Protocol.parse(name, scenario).name
        except UserError as error:
            yield f"published.{at}.protocol = {short(name)}: {error}"
        else:
            if known != name:
                yield f"published.{at}.protocol = {short(name)}: must be the whole name, {known}"


@lru_cache(maxsize=64)
def _impossible_ends(as_json: str) -> tuple[str, ...]:
    """Each end of a range, and each choice, must be possible beside the other values of the file; what is not.

    Not with `--set`, whose value may make the end of another key's range impossible that nobody asked for; a sample
    tells then.
    """
    scenario, problems = Scenario.model_validate_json(as_json), []
    values = parameters(scenario)
    for key, each in scenario.ranges.items():
        for end in each.ends(key, values):
            try:
                moved_to(scenario, {key: end})
            except pydantic.ValidationError as error:
                problems.append(f"ranges.{key} = {each.words}: {short(end)} is not possible here: {explained(error)}")
    return tuple(problems)


def explained(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong: key, value, what would be right."""
    return _explain(error.errors()[0])


def moved_to(scenario: Scenario, chosen: Mapping[str, Any], values: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario with the chosen values, by dotted key, and what follows them; without ranges.

    `values` are the scenario's parameters, for who has them. pydantic.ValidationError if that is not possible.
    """
    whole = scenario.model_dump(exclude_unset=True, exclude={"published", "sources", "ranges"})
    values = parameters(scenario) if values is None else values
    there = Scenario.model_validate(moved(whole, scenario.ranges, values, chosen))
    return there.model_copy(update={"published": scenario.published, "sources": scenario.sources})


def _required() -> list[str]:
    return [name for name, field in Scenario.model_fields.items() if field.is_required() and name not in OWN]


def _explain(problem: Any) -> str:
    """One line: key, value, what would be right."""
    key = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        unit = unit_of(key.rpartition(".")[2])
        return f"{key}: missing; it is required" + (f" ({unit[0]})" if unit else "")
    if kind == "extra_forbidden" and problem["loc"][0] == "ranges" and isinstance(value, dict):
        return f'{key} = {short(value)}: the whole key must be in quotes, as in "link.gbit_per_s" = {{ ... }}'
    if kind == "extra_forbidden":
        name = key.rpartition(".")[2]
        elsewhere = [each for each, _ in every_key() if each.rpartition(".")[2] == name]
        hint = did_you_mean(name, _keys_beside(problem["loc"])) or (
            f"; did you mean {elsewhere[0]}?" if elsewhere else ""
        )
        if not hint and problem["loc"][0] == "ranges":
            hint = f"; a range has {', '.join(Range.model_fields)}"
        return f"{key} = {short(value)}: unknown key{hint}"
    if kind == "value_error":
        return f"{key}.{problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    if kind in ("model_type", "dict_type"):
        hint = "; mib_per_s = 0 in it says that nobody writes" if key.endswith(".writes") else ""
        return f"{key} = {short(value)}: must be a table{hint}"
    if kind == "list_type" and isinstance(value, dict):
        return f"{key} = {short(value)}: must be a list of tables, each under [[{key}]]"
    message = problem["msg"].replace("Input should be", "must be").replace("List should have", "must have")
    message = message.replace(" after validation", "")
    return f"{key} = {short(value)}: {message[0].lower()}{message[1:]}"


def _keys_beside(loc: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed in the table in which `loc` stands."""
    model: type[pydantic.BaseModel] = Scenario
    for part in loc[:-1]:
        if part not in model.model_fields:  # a place in a list; the key of a range
            continue
        inner = model_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def every_key(model: type[pydantic.BaseModel] = Scenario, at: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys that --set can change, each with its type; of lists of tables, those of the first one."""
    for key, field in model.model_fields.items():
        inner = model_in(field.annotation)
        if not at and key in NOT_SET:
            continue
        if inner is None:
            yield f"{at}{key}", field.annotation
        else:
            yield from every_key(inner, f"{at}{key}.0." if "list[" in str(field.annotation) else f"{at}{key}.")


def model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The table in a field's type, as in `list[Device]` or `Writes | None`; None if it is a value."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := model_in(argument)) is not None:
            return found
    return None
