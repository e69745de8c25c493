# SPDX-License-Identifier: GPL-2.0-or-later
"""The sample driver's log of the calls that user space makes: one line a call, and several devices' in order of time.

    a0 12 1790000000123456789 311 set_state RUNNING->PRE_COPY fd=1 -> 0

The device's name (only where the logs of several are in one file), the call's number at its device, the time when it
returned, in ns, the thread, the call, its arguments, its result: a number of bytes, 0, or a negative errno. close() has
none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

LINE = re.compile(
    r"(?:(?P<device>[a-z]\d+) )?(?P<number>\d+) (?P<time>\d+) (?P<thread>\d+) (?P<name>\w+)"
    r"(?: (?!-> )(?P<args>.*?))?(?: -> (?P<result>-?\d+))?"
)


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One call. `time_ns` and `thread` are 0 where nobody noted them."""

    device: str
    name: str
    args: str = ""
    result: int = 0
    time_ns: int = 0
    thread: int = 0
    number: int = 0

    @property
    def of_source(self) -> bool:
        """Whether the device is one of the source's."""
        return self.device.startswith("a")

    @property
    def arc(self) -> tuple[str, str]:
        """Of set_state: the state that it was in, and the one that was asked for."""
        found = re.match(r"(\w+)->(\w+)", self.args)
        return (found[1], found[2]) if found else ("", "")

    def value(self, key: str) -> int:
        """A number among the arguments, such as `initial` of precopy_info; 0 if it is not there."""
        found = re.search(rf"\b{key}=(\d+)", self.args)
        return int(found[1]) if found else 0

    def __str__(self) -> str:
        text = f"{self.device} {self.number} {self.time_ns} {self.thread} {self.name}"
        return f"{text} {self.args} -> {self.result}" if self.args else f"{text} -> {self.result}"


def parse(lines: Iterable[str], device: str = "") -> list[LoggedCall]:
    """The calls in these lines. `device`: whose log it is, where the lines do not say. Raises ValueError for others."""
    calls = []
    for line in lines:
        if not line.strip():
            continue
        found = LINE.fullmatch(line.strip())
        if found is None or not (found["device"] or device):
            raise ValueError(f"not a call in a driver's log: {line.strip()!r}")
        calls.append(
            LoggedCall(
                found["device"] or device,
                found["name"],
                found["args"] or "",
                int(found["result"] or 0),
                int(found["time"]),
                int(found["thread"]),
                int(found["number"]),
            )
        )
    return calls


def without_idle_rounds(calls: Sequence[LoggedCall]) -> list[LoggedCall]:
    """The calls without most of those of a loop that waits and finds nothing: of a long one, both ends stay."""
    return ends_of_runs(calls, _finds_nothing)


def _finds_nothing(call: LoggedCall) -> bool:
    if call.name == "read":
        return call.result <= 0
    return call.name in ("mig_data_size", "dma_logging_report") or (
        call.name == "precopy_info" and not call.value("flags")
    )


def ends_of_runs(items: Sequence[T], of_run: Callable[[T], bool], ends: int = 60) -> list[T]:
    """The items; but of those that follow each other and are `of_run`, only so many at both ends."""
    kept: list[T] = []
    for inside, run in itertools.groupby(items, of_run):
        part = list(run)
        kept += part if not inside or len(part) <= 2 * ends else part[:ends] + part[-ends:]
    return kept


def merged(logs: Iterable[list[LoggedCall]]) -> list[LoggedCall]:
    """Several devices' calls, by time; those of one device stay in their order."""
    return sorted((call for log in logs for call in log), key=lambda call: (call.time_ns, call.number))
