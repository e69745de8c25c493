# SPDX-License-Identifier: GPL-2.0-or-later
"""The hand-over, as the source sees it: which frame is due in which state, and that any other changes nothing."""

from __future__ import annotations

import asyncio

import pytest

from proto_v3.errors import PeerFailedError, PeerProtocolError
from proto_v3.vmm.return_path import BY_FRAME, HandOver, ReturnPath
from proto_v3.wire.frames import Frame, Kind
from tests.build.scenario import virtual


class Frames:
    """A channel on which these kinds of frames arrive, and then nothing."""

    def __init__(self, *kinds: Kind) -> None:
        self._frames = [Frame(kind) for kind in kinds]

    async def recv(self) -> Frame:
        if not self._frames:
            await asyncio.Event().wait()
        return self._frames.pop(0)


def path(state: HandOver, *kinds: Kind) -> ReturnPath:
    back = ReturnPath(Frames(*kinds), lambda frame: False)  # type: ignore[arg-type]
    back.hand_over = state
    return back


@pytest.mark.rule("v3.8.1")
@pytest.mark.parametrize("kind", [Kind.LOADED, Kind.RESUMED])
@pytest.mark.parametrize("state", [state for state in HandOver if state is not HandOver.RESUMED])
@virtual
async def test_a_frame_of_the_hand_over_is_due_in_one_state_and_changes_nothing_in_the_others(
    state: HandOver, kind: Kind
) -> None:
    back = path(state, kind)
    listening = asyncio.create_task(back.listen())
    await asyncio.sleep(1)
    if (state, kind) in BY_FRAME:
        assert back.hand_over is BY_FRAME[state, kind]
        assert listening.done() == (back.hand_over is HandOver.RESUMED)
        listening.cancel()
    else:
        with pytest.raises(PeerProtocolError, match=f"{kind.name} came on the return path, where it is not due"):
            await listening
        assert back.hand_over is state


@pytest.mark.rule("v3.8.1")
@virtual
async def test_the_target_may_resume_only_after_the_source_committed() -> None:
    back = path(HandOver.NOT_LOADED, Kind.LOADED)
    listening = asyncio.create_task(back.listen())
    await back.reached(HandOver.LOADED)
    assert back.hand_over is HandOver.LOADED
    back.commit()
    assert back.hand_over is HandOver.COMMITTED
    listening.cancel()


@virtual
async def test_a_target_that_failed_ends_the_wait_in_any_state() -> None:
    for state in (HandOver.NOT_LOADED, HandOver.LOADED, HandOver.COMMITTED):
        with pytest.raises(PeerFailedError):
            await path(state, Kind.FAILED).listen()
