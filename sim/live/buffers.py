# SPDX-License-Identifier: GPL-2.0-or-later
"""Buffers that are used again: a new one of 1 MiB costs 256 page faults, which is more than the copy into it.

A buffer is free again when nothing refers to its memory any more: no view that was taken, and no slice of one. For each
view that is taken, a new array object over the buffer is made; all slices keep it alive, and its end frees the buffer.
So the bytes of a view never change while anybody has it.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

from proto_v3.errors import LocalProtocolError
from proto_v3.wire.frames import Payload

Block = NDArray[np.uint8]


class Buffers:
    """A pool of buffers of one size. It keeps at most `keep` free ones."""

    def __init__(self, size_bytes: int, keep: int) -> None:
        self.size_bytes = size_bytes
        self._free: deque[Block] = deque(maxlen=keep)  # appended to by whichever thread drops the last view

    def take(self) -> memoryview:
        """A view of a whole buffer. It still has what the last user left in it."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(self.size_bytes, np.uint8)
        lent = block[:]
        weakref.finalize(lent, self._free.append, block).atexit = False
        return lent.data


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
