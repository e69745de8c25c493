# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration's calls, cut into phases: of the source and of the target, each by its own devices' calls.

    source   start, set-up, pre-copy, exact query, stop, drain, end; failure
    target   start, set-up, load, resume; failure

The stop includes the last PRECOPY_INFO after the vCPUs stopped (the final check). An exact query is MIG_DATA_SIZE of a
device and a PRECOPY_INFO right behind it. What comes behind a failure is part of it.
"""

from __future__ import annotations

import enum
import errno
from collections import Counter
from collections.abc import Iterable, Sequence

from tests.real.qemu.calls import LoggedCall


class Phase(enum.StrEnum):
    """A part of a migration at one side."""

    START = "start"
    SETUP = "set-up"
    PRECOPY = "pre-copy"
    EXACT = "exact query"
    STOP = "stop"
    DRAIN = "drain"
    END = "end"
    FAILURE = "failure"
    TARGET_START = "target: start"
    TARGET_SETUP = "target: set-up"
    LOAD = "target: load"
    RESUME = "target: resume"
    TARGET_FAILURE = "target: failure"


Phased = dict[Phase, list[LoggedCall]]
CALLS = frozenset(["set_state", "mig_data_size", "precopy_info", "read", "write", "reset", "release"])
"""What is compared, besides the opt-in. Not: open and close of the device, poll(), DMA logging, v3's calls."""


def phased(calls: Iterable[LoggedCall]) -> Phased:
    """The calls of each phase, in their order. Calls that are not in CALLS are in none.

    The opt-in to PRECOPY_INFOv2 is the kernel's, not the driver's, which notes it when it is called next: it counts as
    part of the start.
    """
    result: Phased = {phase: [] for phase in Phase}
    source, target = _Source(), _Target()
    for call in calls:
        if call.name == "info_v2":
            result[Phase.START if call.of_source else Phase.TARGET_START].append(call)
        elif call.name in CALLS:
            result[source.phase(call) if call.of_source else target.phase(call)].append(call)
    return result


class _Source:
    """Which phase the source is in."""

    def __init__(self) -> None:
        self._phase = Phase.START
        self._sized: set[str] = set()
        self._last: LoggedCall | None = None

    def phase(self, call: LoggedCall) -> Phase:
        before, self._last = self._last, call
        if self._phase is Phase.FAILURE:
            return self._phase
        match call.name:
            case "set_state":
                self._phase = self._set_state(call)
            case "mig_data_size" if self._phase in (Phase.START, Phase.SETUP) and call.device not in self._sized:
                self._sized.add(call.device)
                self._phase = Phase.SETUP
            case "mig_data_size" if self._phase in (Phase.SETUP, Phase.PRECOPY):
                self._phase = Phase.PRECOPY
                return Phase.EXACT
            case "precopy_info" if self._phase is Phase.PRECOPY:
                exact = before is not None and (before.device, before.name) == (call.device, "mig_data_size")
                return Phase.EXACT if exact else Phase.STOP
            case "read" if self._phase is Phase.SETUP:
                self._phase = Phase.PRECOPY
            case "read" if self._phase is Phase.STOP:
                self._phase = Phase.DRAIN
            case "reset" | "release" if self._phase not in (Phase.START, Phase.END):
                self._phase = Phase.FAILURE
        return self._phase

    def _set_state(self, call: LoggedCall) -> Phase:
        old, new = call.arc
        if self._phase is Phase.START or new == "PRE_COPY":
            return self._phase
        if call.result < 0:
            return Phase.FAILURE
        if new == "RUNNING" or (new == "RUNNING_P2P" and old != "RUNNING"):
            return Phase.FAILURE
        if (old, new) == ("STOP", "STOP_COPY"):
            return Phase.DRAIN
        if new == "STOP" and old == "STOP_COPY":
            return Phase.END
        return Phase.STOP


class _Target:
    """Which phase the target is in."""

    def __init__(self) -> None:
        self._phase = Phase.TARGET_START

    def phase(self, call: LoggedCall) -> Phase:
        if self._phase is Phase.TARGET_FAILURE:
            return self._phase
        match call.name:
            case "set_state" if call.arc[1] == "RESUMING":
                self._phase = Phase.TARGET_SETUP
            case "set_state" if call.result < 0:
                self._phase = Phase.TARGET_FAILURE
            case "set_state" if self._phase in (Phase.TARGET_SETUP, Phase.LOAD):
                self._phase = Phase.RESUME
            case "write":
                self._phase = Phase.LOAD if call.result >= 0 else Phase.TARGET_FAILURE
            case "reset" | "release" if self._phase in (Phase.TARGET_SETUP, Phase.LOAD):
                self._phase = Phase.TARGET_FAILURE
        return self._phase


def token(call: LoggedCall) -> str:
    """The call in words that do not depend on sizes: who did it, what, and whether it was full, a part, or the end."""
    match call.name:
        case "set_state":
            text = f"-> {call.arc[1]}"
        case "read" if call.result > 0:
            text = "read full" if call.result == call.value("size") else "read part"
        case "read":
            text = "read 0" if call.result == 0 else f"read {errno.errorcode.get(-call.result, call.result)}"
        case "precopy_info":
            text = "precopy_info REINIT" if call.value("flags") else "precopy_info"
        case _:
            text = call.name
    failed = call.result < 0 and call.name != "read"
    return f"{call.device} {text}" + (f" {errno.errorcode.get(-call.result, call.result)}" if failed else "")


def tokens(calls: Sequence[LoggedCall]) -> tuple[str, ...]:
    """Their tokens, in order."""
    return tuple(token(call) for call in calls)


def collapsed(words: Iterable[str]) -> str:
    """The words in one line; one that comes several times in a row is counted."""
    runs: list[tuple[str, int]] = []
    for word in words:
        if runs and runs[-1][0] == word:
            runs[-1] = word, runs[-1][1] + 1
        else:
            runs.append((word, 1))
    return ", ".join(word if count == 1 else f"{word} x{count}" for word, count in runs)


def bytes_of(calls: Iterable[LoggedCall], name: str) -> dict[str, int]:
    """Bytes that read or write moved, by device."""
    moved: Counter[str] = Counter()
    for call in calls:
        if call.name == name and call.result > 0:
            moved[call.device] += call.result
    return dict(sorted(moved.items()))
