"""The commands as a whole: all of them use the same names for the same things."""

from __future__ import annotations

from collections import defaultdict

import click

from experiments.cli import main

OPTIONS = [
    (name, option)
    for name, command in main.commands.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def having(option: str) -> set[str]:
    return {name for name, each in OPTIONS if option in each.opts}


def test_an_option_is_the_same_kind_of_thing_in_every_command() -> None:
    kinds = defaultdict(set)
    for _, option in OPTIONS:
        kind = (option.metavar or option.type.name, option.multiple, option.is_flag)
        kinds[option.opts[0]].add(kind)
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}


def test_a_file_is_never_called_like_a_folder() -> None:
    folders, files = ({each.opts[0] for _, each in OPTIONS if each.metavar == kind} for kind in ("FOLDER", "FILE"))
    assert folders == {"--out", "--results"}
    assert files == {"--trace", "--spans", "--page"}


def test_runs_and_protocols_have_one_name() -> None:
    assert having("--protocols") == {"compare", "live", "agree"}
    assert having("--protocol") == having("--seed") == {"trace"}, "one run"
    assert having("--seeds") == {"compare", "validate", "live", "agree"}
    assert having("--runs") == set()
