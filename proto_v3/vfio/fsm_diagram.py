# SPDX-License-Identifier: GPL-2.0-or-later
"""A document of the state machine's table: `python -m proto_v3.vfio.fsm_diagram > docs/states.md`.

The arcs and hops are read from proto_v3.vfio.fsm, so the document cannot differ from the code. A test fails if the file
in docs/ is not what this prints.
"""

from __future__ import annotations

from proto_v3.vfio.fsm import BEGINS_SESSION, ERROR, NEXT_HOP, REQUIRED, RESUMING, arcs
from proto_v3.vfio.uapi import MigrationFlags, State

EVERYTHING = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY

PAGE = """\
# The states of a migrating device

Made by `python -m proto_v3.vfio.fsm_diagram` from the table in `proto_v3/vfio/fsm.py`, which follows Linux
`drivers/vfio/vfio_main.c`, vfio_mig_get_next_state(). Do not edit: change the table and run the command again.

## Arcs

The single steps of a device that has every feature. **fd**: the arc begins a session and returns a new data fd, to read
or to write. The states of an arc need the features in brackets. STOP_COPY, which all need, is not repeated.

```mermaid
{diagram}
```

Not drawn: an arc that fails may leave the device in ERROR. VFIO_DEVICE_RESET goes from any state to RUNNING.

A device that lacks a feature skips the states that need it, and so has additional arcs:

{shortcuts}

## Next hop

From the state of a row toward the state of a column. A path takes one hop after the other until the target is reached.
A state that the device lacks is not entered; the next hop is then looked up from that state.

{table}
"""


def page() -> str:
    """The Markdown document: a Mermaid diagram of the arcs, and the table of next hops."""
    return PAGE.format(diagram=_diagram(), shortcuts=_shortcuts(), table=_table())


def _diagram() -> str:
    lines = ["stateDiagram-v2", "    [*] --> RUNNING"]
    for current, target in arcs(EVERYTHING):
        label = _label(current, target)
        lines.append(f"    {current.name} --> {target.name}" + (f" : {label}" if label else ""))
    return "\n".join(lines)


def _label(current: State, target: State) -> str:
    """The fd and the features of an arc. Mermaid ends a label at a colon or semicolon."""
    parts = []
    if (current, target) in BEGINS_SESSION:
        parts.append("fd to write" if target is RESUMING else "fd to read")
    none = MigrationFlags(0)
    needed = REQUIRED.get(current, none) | REQUIRED.get(target, none)
    if needed:
        parts.append("[" + ", ".join(str(flag.name) for flag in needed) + "]")
    return " ".join(parts)


def _shortcuts() -> str:
    full = arcs(EVERYTHING)
    lines = []
    for lacking in (MigrationFlags.P2P, MigrationFlags.PRE_COPY):
        own = [f"{a.name} -> {b.name}" for a, b in arcs(EVERYTHING & ~lacking) if (a, b) not in full]
        lines.append(f"- without {lacking.name}: {', '.join(own) or 'none'}")
    return "\n".join(lines)


def _table() -> str:
    states = list(NEXT_HOP)
    rows = [["", *(state.name for state in states)], ["---"] * (1 + len(states))]
    for current in states:
        rows.append([f"**{current.name}**", *(_cell(current, target) for target in states)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(current: State, target: State) -> str:
    if current is target:
        return ""
    hop = NEXT_HOP[current][target]
    return "EINVAL" if hop is ERROR else hop.name


if __name__ == "__main__":
    print(page(), end="")
