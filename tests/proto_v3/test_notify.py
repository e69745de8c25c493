# SPDX-License-Identifier: GPL-2.0-or-later
"""The notify: who is woken when, and what they take for the cause."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from proto_v3.notify import Notify
from proto_v3.timeline import NO_CAUSE, cause, caused_by
from sim.clock.port import now_ns, sleep_ns
from sim.clock.virtual import run


def rung(ring: Callable[[Notify], None], *, waiters: int = 1) -> list[tuple[int, int]]:
    """When each waiter went on and what its cause was, if the notify is rung after 5 ns by a task whose cursor is 7."""

    async def main() -> list[tuple[int, int]]:
        notify = Notify()

        async def wait() -> tuple[int, int]:
            await notify.wait()
            return now_ns(), cause()

        caused_by(NO_CAUSE)
        waiting = [asyncio.create_task(wait()) for _ in range(waiters)]
        await sleep_ns(5)
        caused_by(7)
        ring(notify)
        return await asyncio.gather(*waiting)

    return run(main())


def test_what_the_ringer_did_last_is_the_cause() -> None:
    assert rung(lambda notify: notify.notify()) == [(5, 7)]


def test_the_cause_may_be_another_span() -> None:
    assert rung(lambda notify: notify.notify(by=3)) == [(5, 3)]


def test_a_ring_wakes_all() -> None:
    assert rung(lambda notify: notify.notify(), waiters=3) == [(5, 7)] * 3


def test_the_first_of_two_rings_is_the_cause() -> None:
    def twice(notify: Notify) -> None:
        notify.notify(by=1)
        notify.notify(by=2)

    assert rung(twice) == [(5, 1)]


def test_a_ring_is_not_kept_for_who_waits_later() -> None:
    async def main() -> bool:
        notify = Notify()
        notify.notify()
        waiting = asyncio.create_task(notify.wait())
        await sleep_ns(100)
        return waiting.done()

    assert not run(main())


def test_the_bell_knows_whether_anybody_waits() -> None:
    async def main() -> list[bool]:
        notify = Notify()
        told = [notify.waited_for]
        waiting = asyncio.create_task(notify.wait())
        await sleep_ns(1)
        told.append(notify.waited_for)
        notify.notify()
        told.append(notify.waited_for)
        await waiting
        return told

    assert run(main()) == [False, True, False]


def test_who_gave_up_waiting_does_not_wait_any_more() -> None:
    async def main() -> bool:
        notify = Notify()
        waiting = asyncio.create_task(notify.wait())
        await sleep_ns(1)
        waiting.cancel()
        await asyncio.wait([waiting])
        return notify.waited_for

    assert run(main()) is False


def test_who_is_cancelled_or_waits_in_vain_is_not_kept() -> None:
    async def in_vain() -> int:
        notify = Notify()
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1e-3):
                    await notify.wait()
        return len(notify._waiters)

    assert run(in_vain()) == 0
