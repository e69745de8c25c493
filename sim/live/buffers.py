# SPDX-License-Identifier: GPL-2.0-or-later
"""Buffers that are used again: a new one of 1 MiB costs 256 page faults, which is more than the copy into it.

A buffer is free again when nothing refers to its memory any more: no view that was taken, and no slice of one. CPython
counts the references. So the bytes of a view never change while anybody has it.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
from numpy.typing import NDArray

from proto_v3.errors import LocalProtocolError
from proto_v3.wire.frames import Payload

Block = NDArray[np.uint8]


def references(blocks: list[Block], at: int) -> int:
    """To one of the blocks. How many of this function's own are among them depends on the version of Python."""
    return sys.getrefcount(blocks[at])


UNUSED = references([np.empty(1, np.uint8)], 0)
"""References to a buffer that nobody has."""


class Buffers:
    """A pool of buffers of one size. It keeps `keep` of them; if all those are in use, others are made for once."""

    def __init__(self, size_bytes: int, keep: int) -> None:
        self.size_bytes = size_bytes
        self._keep = keep
        self._kept: list[Block] = []
        self._lock = threading.Lock()

    def take(self) -> memoryview:
        """A view of a whole buffer. It still has what the last user left in it."""
        with self._lock:
            for at in range(len(self._kept)):
                if references(self._kept, at) == UNUSED:
                    return self._kept[at].data
            block = np.empty(self.size_bytes, np.uint8)
            if len(self._kept) < self._keep:
                self._kept.append(block)
            return block.data


def as_view(payload: Payload | bytes | bytearray) -> memoryview:
    """The bytes of a payload, without a copy. LocalProtocolError if it has none (as in virtual time)."""
    if not isinstance(payload, (memoryview, bytes, bytearray)):
        raise LocalProtocolError(f"a payload of type {type(payload).__name__} has no bytes to send")
    view = memoryview(payload)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    if not view.contiguous:
        raise LocalProtocolError("a payload that is not contiguous cannot be sent")
    return view.cast("B")
