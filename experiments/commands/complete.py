# SPDX-License-Identifier: GPL-2.0-or-later
"""What a shell offers when the user presses Tab. Only the keys of a scenario need a heavy import.

The functions are click's: they get the command's context, its parameter, and the word so far, and return whole words.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from experiments.study.names import QUESTIONS
from sim.scenario.shipped import shipped, shipped_bases
from sim.scenario.suffixes import NUMBERED, SUFFIXES, Suffix

Items = list[CompletionItem]
SOME_NUMBERS = ("n1", "n2", "n4", "n8", "n16", "chunks4", "chunks8")
"""Offered before a number is begun."""


class _Bash(BashComplete):
    """No space is added after a key of --set, which a value follows."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace"
    )


class _Fish(FishComplete):
    """A word may have commas in it, as the names of several protocols do."""

    source_template = FishComplete.source_template.replace('string split ","', 'string split --max 1 ","')


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": ZshComplete, "fish": _Fish}


def script(command: click.Command, shell: str) -> str:
    """What a shell has to run to complete the command."""
    return SHELLS[shell](command, {}, "proto-v3", "_PROTO_V3_COMPLETE").source()


# --- files ------------------------------------------------------------------------------------------------------------


def files(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """Whatever the shell offers for a file."""
    return [CompletionItem(word, type="file")]


def folders(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """Whatever the shell offers for a folder."""
    return [CompletionItem(word, type="dir")]


def devices(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """The VFIO devices of this machine, in a list with commas: those that it has not yet."""
    from sim.real.sysfs import names

    before, comma, _ = word.rpartition(",")
    taken = before.split(",")
    return _items(word, [f"{before}{comma}{name}" for name in names() if name not in taken])


# --- names ------------------------------------------------------------------------------------------------------------


def scenarios(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """The shipped scenarios, and TOML files."""
    return _items(word, [*shipped(), *_toml_files(word)]) or files(ctx, option, word)


def bases(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """What a scenario can extend."""
    return _items(word, [*shipped_bases(), *_toml_files(word)]) or files(ctx, option, word)


def cases(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """The scenarios with published figures, and the names of these cases."""
    names = []
    for name, path in shipped().items():
        published = tomllib.loads(path.read_text(encoding="utf-8")).get("published", [])
        names += [name for _ in published[:1]] + [each["case"] for each in published if "case" in each]
    return _items(word, [*dict.fromkeys(names), *_toml_files(word)]) or files(ctx, option, word)


def questions(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """The experiments, with what each asks."""
    every = {**QUESTIONS, "all": "all of them"}
    return [CompletionItem(name, help=question) for name, question in every.items() if name.startswith(word)]


def changes(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """The changes that `decide` knows, in a list with commas: those that it has not yet."""
    from experiments.decision.ladder import LADDER

    before, comma, _ = word.rpartition(",")
    taken = before.split(",")
    return _items(word, [f"{before}{comma}{change.name}" for change in LADDER if change.name not in taken])


def protocol(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """The name of a protocol, suffix by suffix."""
    return _items(word, _protocols(word))


def protocols(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """Names of protocols, separated by commas."""
    before, comma, last = word.rpartition(",")
    used = set(before.split(",")) - SUFFIXES.keys()
    return _items(word, [f"{before}{comma}{name}" for name in _protocols(last) if name not in used])


def settings(ctx: click.Context, option: click.Parameter, word: str) -> Items:
    """A key of a scenario with `=`; after that, its values, if they are words."""
    from sim.scenario.file import every_key

    key, equals, _ = word.partition("=")
    keys = dict(every_key())
    if not equals:
        return _items(word, [f"{each}=" for each in keys])
    inner = keys.get(re.sub(r"^device\.\d+\.", "device.0.", key))
    words = ["true", "false"] if inner is bool else [each for each in get_args(inner) if isinstance(each, str)]
    return _items(word, [f"{key}={each}" for each in words])


def _items(word: str, every: Iterable[str]) -> Items:
    return [CompletionItem(each) for each in every if each.startswith(word)]


def _toml_files(word: str) -> list[str]:
    """TOML files in the folder of the word so far, named as it begins."""
    folder = word[: word.rfind("/") + 1]
    try:
        return sorted(f"{folder}{path.name}" for path in Path(folder or ".").glob("*.toml"))
    except OSError:
        return []


def _protocols(word: str) -> Iterator[str]:
    """The names of versions; and names that begin as the word and have one more suffix that fits. Of all N, a few."""
    for version, suffixes in SUFFIXES.items():
        yield version
        name, keys = version, set[tuple[str, str]]()  # as far as the suffixes are whole, and the keys that they set
        while word.startswith(name):
            begun = word.removeprefix(f"{name}-")
            for suffix, what in suffixes.items():
                number_begun = begun != name and re.search(r"\d", begun)
                one_of_many = NUMBERED.fullmatch(suffix) and not number_begun and suffix not in SOME_NUMBERS
                if not one_of_many and not _sets(what) & keys:
                    yield f"{name}-{suffix}"
            taken = next((each for each in suffixes if re.match(rf"{re.escape(name)}-{each}(-|$)", word)), None)
            if taken is None:
                break
            name, keys = f"{name}-{taken}", keys | _sets(suffixes[taken])


def _sets(suffix: Suffix) -> set[tuple[str, str]]:
    return {(table, key) for table, keys in suffix.changes.items() for key in keys}
