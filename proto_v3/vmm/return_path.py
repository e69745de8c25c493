# SPDX-License-Identifier: GPL-2.0-or-later
"""What the target sends to the source, and the hand-over: at any time, at most one side may run the guest."""

from __future__ import annotations

import enum
from collections.abc import Callable

from proto_v3.errors import PeerFailedError, PeerProtocolError
from proto_v3.notify import Notify
from proto_v3.wire.channel import Channel
from proto_v3.wire.frames import Frame, Kind


class HandOver(enum.IntEnum):
    """How far the hand-over is, as the source sees it. It only grows."""

    NOT_LOADED = 0  # the source may run the guest
    LOADED = 1  # v3: the target loaded everything; the source may still run the guest
    COMMITTED = 2  # the source gave up its right to run the guest: v2 at END, v3 at COMMIT
    RESUMED = 3  # the guest runs at the target


BY_FRAME = {
    (HandOver.NOT_LOADED, Kind.LOADED): HandOver.LOADED,
    (HandOver.COMMITTED, Kind.RESUMED): HandOver.RESUMED,
}
"""The target's frames that the hand-over waits for, by the state in which each is due. In any other state the frame is
a PeerProtocolError. The other step, to COMMITTED, is the source's own."""


class ReturnPath:
    """Reads what the target sends on the main channel, beside everything else that the source does."""

    def __init__(self, channel: Channel, handle: Callable[[Frame], bool]) -> None:
        """`handle` is given the frames this class does not know. It returns False for an unexpected frame, which raises
        PeerProtocolError."""
        self._channel = channel
        self._handle = handle
        self._notify = Notify()
        self.hand_over = HandOver.NOT_LOADED

    async def listen(self) -> None:
        """Read until the guest runs at the target. PeerFailedError if the target fails."""
        while self.hand_over is not HandOver.RESUMED:
            frame = await self._channel.recv()
            if frame.kind is Kind.FAILED:
                raise PeerFailedError("the target failed")
            if (self.hand_over, frame.kind) in BY_FRAME:
                self.hand_over = BY_FRAME[self.hand_over, frame.kind]
            elif not self._handle(frame):
                raise PeerProtocolError(f"{frame.kind.name} came on the return path, where it is not due")
            self._notify.notify()

    def commit(self) -> None:
        """The source gives up its right to run the guest. To be called before the frame that says so is sent."""
        self.hand_over = HandOver.COMMITTED

    async def reached(self, state: HandOver) -> None:
        """Wait until the hand-over is at least in this state."""
        while self.hand_over < state:
            await self._notify.wait()
