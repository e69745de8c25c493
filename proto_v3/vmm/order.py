# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer may send next: a table of states, held against each frame that comes.

A frame that is doubled or early is not in the table, and where one is missing, the next one is not. That is a
PeerProtocolError, before anything is done with the frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proto_v3.errors import PeerProtocolError
from proto_v3.wire.frames import Kind

Table = Mapping[tuple[str, Kind], str]
"""By state and kind of frame, the next state. Without an entry the frame is not due in that state."""


def stays(state: str, kinds: Iterable[Kind]) -> dict[tuple[str, Kind], str]:
    """The entries for frames that change nothing."""
    return dict.fromkeys(((state, kind) for kind in kinds), state)


RAM: Table = {
    ("set-up", Kind.SETUP): "pre-copy",
    **stays("pre-copy", [Kind.RAM]),
    ("pre-copy", Kind.RAM_BEGIN): "last pass",
    **stays("last pass", [Kind.RAM]),
    ("last pass", Kind.RAM_END): "RAM is here",
}
"""The first connection's frames that v2 and v3 have in common."""
PASS_ENDS: Table = {(state, Kind.RAM_PASS_END): state for state in ("pre-copy", "last pass")}


def by_multifd(table: Table) -> Table:
    """The table of the first connection, if multifd's channels carry the pages."""
    return {**{entry: after for entry, after in table.items() if entry[1] is not Kind.RAM}, **PASS_ENDS}


class Order:
    """Where a peer is in a table."""

    def __init__(self, table: Table, state: str, where: str) -> None:
        """`where` the frames come, in words, for errors."""
        self.state = state
        self._table = table
        self._where = where

    def take(self, kind: Kind) -> None:
        """A frame came. PeerProtocolError if it is not due."""
        after = self._table.get((self.state, kind))
        if after is None:
            raise PeerProtocolError(f"{kind.name} came {self._where}, where it is not due ({self.state})")
        self.state = after
