# SPDX-License-Identifier: GPL-2.0-or-later
"""The signals that end a command early: Ctrl-C, SIGTERM and SIGHUP. All do the same; `exit_status` says which came."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TWICE_S = 1.0
"""A signal that comes again within this time is the same one: `timeout` sends it to the process and to its group."""

_came: list[tuple[int, float]] = []
"""The signals that came while a command ran: number, and when (time.monotonic())."""


def exit_status() -> int:
    """Of a command that was interrupted: 128 + the signal, 130 for Ctrl-C."""
    return 128 + (_came[0][0] if _came else signal.SIGINT)


@contextmanager
def raised() -> Iterator[None]:
    """While a command runs, each of the signals raises KeyboardInterrupt.

    One that was ignored before, as `nohup` does it, stays ignored. SIGINT does not: a shell ignores it for all that it
    starts with `&`.
    """
    _came.clear()
    taken = [each for each in SIGNALS if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN]
    with _handled(_raise, taken):
        yield


@contextmanager
def postponed(act: Callable[[], object]) -> Iterator[None]:
    """Each of the signals that would raise something here calls `act` instead, which has to see to the end."""
    with _handled(act, [each for each in SIGNALS if callable(signal.getsignal(each))]):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """One of the signals raises KeyboardInterrupt at the end, not in between: for a few moments."""
    came: list[bool] = []
    with postponed(lambda: came.append(True)):
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started meanwhile never get the signals, where there are signal masks."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore() -> None:
    """From now on, for processes whose parent sees to the signals."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def _handled(act: Callable[[], object], signals: list[int]) -> Iterator[None]:
    """Python delivers signals to the main thread only; elsewhere nothing changes."""

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = bool(_came) and now - _came[-1][1] < TWICE_S
        _came.append((number, now))
        if not again:
            act()

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in signals} if in_main_thread else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise() -> None:
    raise KeyboardInterrupt
