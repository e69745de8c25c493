# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the target has loaded the first pass over a device's state. Until then, what remains says nothing.

A driver that loads whole images (mlx5) begins its longest LOAD when the last byte of the first image was sent. A guest
that is stopped then stands still for all of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from proto_v3.wire.frames import Frame, Kind
from proto_v3.wire.streams import OutStream


class FirstPass:
    """Of one dirty stream, of all wire streams that carry a device's blocks, or, in v2, of a device: each ends its pass
    when it first runs dry."""

    def __init__(self, device: int, streams: Iterable[int]) -> None:
        self.device = device
        self._reading = set(streams)
        self._sent: set[int] = set()

    @property
    def loaded(self) -> bool:
        """Whether the target has loaded all of it."""
        return not self._reading and not self._sent

    async def ran_dry(self, wire: OutStream, stream: int) -> bool:
        """A wire stream has nothing to send: the first time, say so behind its data. Returns whether this was the first
        time; the stream may have something to send by then."""
        if stream not in self._reading:
            return False
        self._reading.remove(stream)
        self._sent.add(stream)
        await wire.send(Frame(Kind.FIRST_PASS_SENT, self.device, stream))
        return True

    def answered(self, stream: int) -> bool:
        """The target said that it has loaded a wire stream's. False if that is not due."""
        if stream not in self._sent:
            return False
        self._sent.remove(stream)
        return True
