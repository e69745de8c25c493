"""The state machine's table, drawn: `python -m proto_v3.vfio.fsm_diagram > docs/states.md`.

The arcs and hops come from proto_v3.vfio.fsm and nowhere else, so that the document cannot say what the code does
not do. A test fails when the file in docs/ is not what this prints.
"""

from __future__ import annotations

from proto_v3.vfio.fsm import BEGINS_SESSION, ERROR, NEXT_HOP, REQUIRED, RESUMING, arcs
from proto_v3.vfio.uapi import MigrationFlags, State

EVERYTHING = MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY

PAGE = """\
# The states of a migrating device

Made by `python -m proto_v3.vfio.fsm_diagram` from the table in `proto_v3/vfio/fsm.py`, which follows Linux
`drivers/vfio/vfio_main.c`, vfio_mig_get_next_state(). Do not edit: change the table and run that again.

## Arcs

What a device that has every feature does in one step. **fd**: the arc begins a session and gives a new data fd, to read
or to write. A feature in brackets is one that the arc's ends need; STOP_COPY, which all need, is not repeated.

```mermaid
{diagram}
```

Not drawn: an arc that fails may leave the device in ERROR; VFIO_DEVICE_RESET takes it from any state to RUNNING.

A device that lacks a feature passes over the states that need it, and so has arcs that the others do not have:

{shortcuts}

## Next hop

From the state of a row toward the state of a column. A path takes one hop after the other until the target is reached;
a state that the device lacks is not entered, and the table is taken again from there.

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
    """What is special about an arc. Mermaid ends a label at a colon or semicolon."""
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
