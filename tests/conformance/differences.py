# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a driver of the kernel and the simulated device answer otherwise, and why that is right: data, no excuses.

A difference that is not listed here fails a test, and so does one that is listed and no longer there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

MTTY, SAMPLE = "mtty", "vfio_v3_sample"


@dataclass(frozen=True)
class Difference:
    """Cases that a driver answers otherwise than the simulated device, for one reason."""

    driver: str
    group: str
    cases: str
    """A pattern (fnmatch)."""
    kernel: str
    """What the driver answers: a pattern."""
    simulated: str
    """What the simulated device answers: a pattern."""
    count: int
    """How many cases it is."""
    why: str
    since: str = "7.1"
    """The first version of Linux that answers so, as far as is known; those before have no PRECOPY_INFOv2."""
    until: str = ""
    """The first version that does not; empty: none is known."""

    def holds_for(self, driver: str, release: str) -> bool:
        """Whether it is about this driver of this Linux."""
        version = numbers(release)
        within = numbers(self.since) <= version and not (self.until and version >= numbers(self.until))
        return driver == self.driver and within

    def covers(self, group: str, case: str, kernel: str, simulated: str) -> bool:
        """Whether these answers are among it."""
        return (
            group == self.group
            and fnmatchcase(case, self.cases)
            and fnmatchcase(kernel, self.kernel)
            and fnmatchcase(simulated, self.simulated)
        )


def numbers(release: str) -> tuple[int, ...]:
    """The version of a kernel's release (`7.3.4-rc1+x`) as numbers."""
    parts = release.partition("-")[0].partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


Answers = Mapping[str, Mapping[str, str]]
"""By group and case."""


@dataclass(frozen=True)
class Judged:
    """Two devices' answers, compared."""

    same: dict[str, int]
    """By group: cases that both answer alike."""
    cases: dict[str, int]
    listed: dict[Difference, int]
    """How many cases each difference is about."""
    unlisted: list[tuple[str, str, str, str]]
    """Group, case, and both answers."""

    @property
    def stale(self) -> dict[Difference, int]:
        """Differences that are about another number of cases than they say, and that number."""
        return {each: count for each, count in self.listed.items() if count != each.count}


def judge(driver: str, release: str, kernel: Answers, simulated: Answers) -> Judged:
    """Compare a driver's answers, of this release of Linux, with the simulated device's."""
    listed = {each: 0 for each in DIFFERENCES if each.holds_for(driver, release)}
    same: dict[str, int] = {}
    unlisted = []
    for group, cases in kernel.items():
        same[group] = 0
        for case, answer in cases.items():
            other = simulated[group][case]
            if answer == other:
                same[group] += 1
                continue
            found = next((each for each in listed if each.covers(group, case, answer, other)), None)
            if found is None:
                unlisted.append((group, case, answer, other))
            else:
                listed[found] += 1
    return Judged(same, {group: len(cases) for group, cases in kernel.items()}, listed, unlisted)


NOT_MODELLED = "DMA logging is not modelled, as the simulated VMM tracks the guest's memory (proto_v3/vfio/ioctl.py)"
READ_NOTHING = (
    "read() of 0 bytes is 0 in the kernel; the port of proto_v3 asks for at least one byte, and refuses it, so that an "
    "empty payload always means the end"
)
STAYS = (
    "mtty_load_state: too little was written: EINVAL, and the device stays in RESUMING; vfio.h leaves it to drivers; "
    "the simulated device is in ERROR then, with EIO"
)
TOO_MUCH = "mtty_resume_write: more than the device's state has no room: ENOMEM, before the session is looked at"
MAGIC = (
    "mtty_resume_write: a wrong header is EFAULT, but its bytes count as written, and leaving RESUMING loads them: "
    "a bug of mtty (Linux 6.12 and 7.3)"
)
NO_POLL = "mtty's data fds have no poll(): epoll_ctl() is EPERM"
EXACT = (
    "an estimate, as vfio.h calls it: mtty's is of a whole state with its header, which pre-copy has given before; the "
    "simulated device's leaves out the header of the END"
)
ONE_BUFFER = "the whole state is in one buffer, so one read() has it all; the simulated device reads record by record"

DIFFERENCES: list[Difference] = [
    Difference(MTTY, "features", ": feature [678] *", "*", "ENOTTY", 105, NOT_MODELLED),
    Difference(MTTY, "cells", "RESUMING: *", "EINVAL; RESUMING", "EIO; ERROR", 6, STAYS),
    Difference(MTTY, "walks", "*RESUMING*", "*RESUMING", "*EIO*ERROR", 84, STAYS),
    Difference(MTTY, "lives", "RESUMING: close*", "*EINVAL; RESUMING", "*EIO; ERROR", 6, STAYS),
    Difference(MTTY, "writes", "*: write altered *", "EFAULT; *", "EINVAL; *", 9, MAGIC),
    Difference(MTTY, "writes", "*: write more *", "ENOMEM; *", "EINVAL; *", 8, TOO_MUCH),
    Difference(MTTY, "writes", "*: write twice *", "ENOMEM; *", "EINVAL; *", 8, TOO_MUCH),
    Difference(MTTY, "writes", "*: write [ce]*", "ok; EINVAL; *", "ok; EIO; *", 12, STAYS),
    Difference(MTTY, "writes", "save, RESUMING: RUNNING; *", "EINVAL; RESUMING; *", "EIO; ERROR; *", 1, STAYS),
    Difference(MTTY, "reads", "*read 0*", "0*", "EINVAL*", 24, READ_NOTHING),
    Difference(MTTY, "lives", "*read 0 *", "0; *", "EINVAL; *", 3, READ_NOTHING),
    Difference(MTTY, "reads", "*", "some; 0", "some; some", 2, ONE_BUFFER),
    Difference(MTTY, "polls", "*", "EPERM", "*", 10, NO_POLL),
    Difference(MTTY, "sizes", "*size_and_read", "* announced", "more than announced", 6, EXACT),
]
