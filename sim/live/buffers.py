"""Buffers that are used again: a fresh one of 1 MiB costs 256 page faults, which is more than the copy into it.

A buffer is free again when nothing refers to its memory any more, neither what was lent nor any view of it or of a part
of it: each loan is an array of its own over the buffer, which every view keeps alive. So a view never changes under
the one who has it, whoever passed it on.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from proto_v3.errors import LocalProtocolError
from proto_v3.wire.frames import Payload

Block = NDArray[np.uint8]


class Lent:
    """A buffer of a pool. What a piece of it is stays valid without it."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, piece: slice, /) -> memoryview:
        return self.view[piece]


class Buffers:
    """A pool of buffers of one size, of which it keeps at most `keep` that nobody uses."""

    def __init__(self, size_bytes: int, keep: int) -> None:
        self.size_bytes = size_bytes
        self._free: deque[Block] = deque(maxlen=keep)  # appended to by whichever thread drops the last view

    @property
    def free(self) -> int:
        """Buffers that nobody uses."""
        return len(self._free)

    def take(self) -> Lent:
        """A buffer; what is in it is what the last user left there."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(self.size_bytes, np.uint8)
        loan = block[:]
        weakref.finalize(loan, self._free.append, block).atexit = False
        return Lent(loan.data)


def as_view(payload: Payload | bytes | bytearray) -> memoryview:
    """The bytes of a payload, without copying. LocalProtocolError if it has none (it is of virtual time)."""
    payload = payload.view if isinstance(payload, Lent) else payload
    if not isinstance(payload, (memoryview, bytes, bytearray)):
        raise LocalProtocolError(f"a payload of type {type(payload).__name__} has no bytes to send")
    view = memoryview(payload)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.contiguous:
        raise LocalProtocolError("a payload that is not contiguous cannot be sent")
    return view.cast("B")
