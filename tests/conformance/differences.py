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

LAZY = (
    "a device that enters PRE_COPY_P2P at once has saved nothing yet, and saves nothing there; the simulated one has "
    "begun its first SAVE before it is suspended"
)
SMALL = "a state this small is saved when it is read, so one read() has all of it; the simulated device has records"
HANGS_UP = (
    "EPOLLHUP (and EPOLLERR after a failure) of a session that is over: the port of proto_v3 says READABLE for both"
)
WRITABLE = "poll() of a loading fd tells EPOLLOUT, which was not asked for; the port of proto_v3 has no such event"
REFUSED = (
    "a write() after one that was refused: the driver checks its bytes anew, mlx5 and the simulated device give ENODEV "
    "(MLX5_MIGF_STATE_ERROR)"
)
WITHOUT_END = (
    "an estimate, as vfio.h calls it: the driver's counts the END, the simulated device's leaves out its header"
)
AFTER_END = "bytes after the END that were written before: EPROTO and EALREADY both hold of them (docs/vfio_v3.h)"
OTHER_BYTES = (
    "other bytes are altered: of the driver's stream the first byte, of the simulated one the stream's number; and "
    "junk is no record to the simulated device"
)
ERROR_FIRST = "the driver looks whether it is in ERROR before the number of the state: EIO; proto_v3's ioctl does later"
DIRECTION_FIRST = "GET_DIRTY_BLOCKS on a loading fd of blocks: the driver looks at the direction before argsz and flags"

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
    Difference(MTTY, "reads", "*", "some; 0", "some; some", 2, ONE_BUFFER),
    Difference(MTTY, "polls", "*", "EPERM", "*", 10, NO_POLL),
    Difference(MTTY, "sizes", "*size_and_read", "* announced", "more than announced", 6, EXACT),
    Difference(SAMPLE, "features", ": feature [678] *", "*", "ENOTTY", 105, NOT_MODELLED),
    Difference(SAMPLE, "reads", "PRE_COPY*_P2P: *", "ENOMSG*", "[as0]*", 12, LAZY),
    Difference(SAMPLE, "lives", "PRE_COPY_P2P, *read 0 @1*", "*ENOMSG; *", "*; 0; *", 1, LAZY),
    Difference(SAMPLE, "reads", "*", "some; *", "some; some", 3, SMALL),
    Difference(
        SAMPLE, "writes", "*: write altered *; write whole *", "EINVAL; EIO; *", "EINVAL; ENODEV; *", 1, REFUSED
    ),
    Difference(SAMPLE, "sizes", "*size_and_read", "as announced", "more than announced", 6, WITHOUT_END),
    Difference(SAMPLE, "polls", "*", "IN HUP", "IN", 3, HANGS_UP),
    Difference(SAMPLE, "polls", "RESUMING*", "*", "IN", 2, WRITABLE),
    Difference(SAMPLE, "v3_ioctls", "*RESUMING*: dirty_blocks *", "EBADF", "EINVAL", 3, DIRECTION_FIRST),
    Difference(SAMPLE, "v3_bytes", "*poll *", "ENODEV; ENODEV; IN HUP", "ENODEV; ENODEV; IN*", 18, HANGS_UP),
    Difference(SAMPLE, "v3_bytes", "*", "EPROTO; ERROR; *", "EALREADY; ERROR; *", 7, AFTER_END),
    Difference(SAMPLE, "v3_bytes", "*write altered*", "EPROTO; ERROR; *", "EXDEV; ERROR; *", 3, OTHER_BYTES),
    Difference(SAMPLE, "v3_bytes", "*write junk*", "EXDEV; ERROR; *", "EPROTO; ERROR; *", 3, OTHER_BYTES),
    Difference(SAMPLE, "v3_error", "*: [80]*; state", "EIO; ERROR", "EINVAL; ERROR", 2, ERROR_FIRST),
    Difference(SAMPLE, "v3_error", "*poll 10000*", "EBADF; ERR HUP; *", "EBADF; nothing; *", 1, WRITABLE),
]
