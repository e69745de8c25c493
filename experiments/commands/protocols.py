# SPDX-License-Identifier: GPL-2.0-or-later
"""`proto-v3 protocols`: the suffixes of a protocol's name, and what each changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.table import Table

from experiments.report import tables
from experiments.report.tables import say
from proto_v3.errors import UserError
from sim.scenario.file import load
from sim.scenario.protocol import Protocol
from sim.scenario.scenario import Scenario
from sim.scenario.suffixes import NUMBERED, SUFFIXES, Suffix, listed

ALONE = {
    "v2": "VFIO migration protocol v2, as the scenario sets it up",
    "v3": "the proposal, as the scenario sets it up; v3.dirty_streams gives N",
}


def list_protocols(name: str | None, settings: Sequence[str]) -> None:
    """Print all suffixes; with the name or file of a scenario also what each does there. UserError as for load()."""
    scenario = load(name, settings) if name is not None else None
    console = tables.console()
    for version in SUFFIXES:
        shown = Table(box=None, header_style="", pad_edge=False, padding=(0, 1))
        for heading in ("name", "sets", *(["here"] if scenario else []), "what it means"):
            shown.add_column(heading, no_wrap=heading == "name")
        for suffix, sets, what in suffixes(version):
            here = [_here(f"{version}-{suffix}", scenario)] if scenario else []
            tables.add_row(shown, listed(version)[suffix], sets, *here, what)
        tables.print_table(console, f"{version}: {ALONE[version]}", shown)
    if scenario:
        most = min(device.max_dirty_streams for device in scenario.devices)
        say(
            console,
            f"\nv3 with more than {most} dirty stream(s) is UNSUPPORTED: a device of {scenario.name} has no more.",
        )
    say(console, "\nA name has any of them, once each, as in v2-multifd-ack or v3-n8-pool.")


def suffixes(version: str) -> Iterator[tuple[str, str, str]]:
    """Each suffix, those that give a number as one: its name, the keys that it sets, what that means."""
    for name in listed(version):
        sets, what = _sets(SUFFIXES[version][name]), SUFFIXES[version][name].what
        if number := NUMBERED.fullmatch(name):
            sets, what = (re.sub(rf"\b{number[2]}\b", "N", text) for text in (sets, what))
        yield name, sets, what


def _sets(suffix: Suffix) -> str:
    return ", ".join(
        f"{table}.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for table, keys in suffix.changes.items()
        for key, value in keys.items()
    )


def _here(name: str, scenario: Scenario) -> str:
    """What a name does to this scenario."""
    try:
        changed = Protocol.parse(name, scenario).applied(scenario).scenario
    except UserError as error:
        return f"not allowed: {str(error).partition(': ')[2]}"
    return "as it is" if changed == scenario else "changes it"
