# SPDX-License-Identifier: GPL-2.0-or-later
"""When to stop the guest: the remaining bytes must fit the downtime limit at the measured bandwidth. And why they never
did, in words.

As QEMU (migration/migration.c, migration_update_counters and migration_iteration_run): bandwidth is measured over
windows of 100 ms, threshold = bandwidth x downtime limit, and a cheap estimate is refined to an exact figure only once
it is below the threshold. Only bytes count: the device's save and load times and its transitions are not included.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class SwitchoverSettings:
    """A VMM's settings for a migration. Times in nanoseconds."""

    downtime_limit_ns: int
    bandwidth_window_ns: int
    idle_round_ns: int
    """v2: what a round takes in which nothing was sent. QEMU does not pause."""
    precopy_idle_ns: int
    """v2, a device's pre-copy thread: how long it waits when there is nothing to read, before it asks for more."""
    decision_interval_ns: int
    """v3: the pause between two decisions."""
    give_up_ns: int
    read_bytes: int
    write_bytes: int
    ram_budget_ns: int
    reads_at_once: int = 1
    """So many reads of a data fd may be made as one, where nothing is decided between them."""
    cancel_ns: int | None = None
    """The user cancels this long after the start, if the guest is not stopped yet. None: never."""
    force_ns: int | None = None
    """The guest is stopped this long after the start, whatever is left. None: never."""
    downtime_steps: tuple[tuple[int, int], ...] = ()
    """Times after the start, ascending, and the downtime limit from each on."""
    given_bandwidth_bytes_per_s: float | None = None
    """If set, used instead of the measured bandwidth, once the first window is over (QEMU's
    avail-switchover-bandwidth)."""
    by_parts: bool | None = None
    """Whether each part of what is left must fit by itself, too (stop_rule.py). None: as the protocol does it."""
    parallel_stop: bool = False
    """The devices stop all at once, in each of the two passes, and not one after the other. Not in QEMU:
    vm_state_notify (system/runstate.c) would have each device's callback run in a thread, and join them after each
    pass."""
    parallel_config: bool = False
    """The target loads the configs of all devices at once, not one after the other. Not in QEMU: vfio_load_state, and
    vfio_load_bufs_thread_load_config of multifd, hold the big lock over vfio_load_config_state."""
    max_bandwidth_bytes_per_s: float | None = None
    """v2: the most that is sent before the guest is stopped (QEMU's max-bandwidth). None: no limit."""

    def limit_ns(self, now_ns: int) -> int:
        """The downtime limit at a time after the start."""
        passed = [limit_ns for after_ns, limit_ns in self.downtime_steps if after_ns <= now_ns]
        return passed[-1] if passed else self.downtime_limit_ns


class Switchover:
    """The threshold, kept up to date from the bytes sent so far."""

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        self._settings = settings
        self.limit_ns = settings.limit_ns(now_ns)
        """The downtime limit, as of the last sample."""
        self._window_start_ns = now_ns
        self._window_bytes = 0
        self.bandwidth_bytes_per_s = 0.0
        """That of the last window, or the given one once the first window is over. Before that, nothing is decided."""
        self.best_bytes_per_s = 0.0
        """The largest so far."""

    def sample(self, now_ns: int, bytes_sent: int) -> None:
        """Record all bytes sent since the start; end the window if its time has passed."""
        self.limit_ns = self._settings.limit_ns(now_ns)
        elapsed_ns = now_ns - self._window_start_ns
        if elapsed_ns < self._settings.bandwidth_window_ns:
            return
        given = self._settings.given_bandwidth_bytes_per_s
        if given is None:
            self.bandwidth_bytes_per_s = (bytes_sent - self._window_bytes) * NS_PER_S / elapsed_ns
        else:
            self.bandwidth_bytes_per_s = given
        self.best_bytes_per_s = max(self.best_bytes_per_s, self.bandwidth_bytes_per_s)
        self._window_start_ns, self._window_bytes = now_ns, bytes_sent

    def window_is_full(self, bytes_sent: int) -> bool:
        """Whether this window sent as much as max_bandwidth_bytes_per_s allows it (QEMU, migration_rate_exceeded)."""
        most = self._settings.max_bandwidth_bytes_per_s
        if most is None:
            return False
        return bytes_sent - self._window_bytes >= most * self._settings.bandwidth_window_ns / NS_PER_S

    def window_left_ns(self, now_ns: int) -> int:
        """How long this window lasts yet; 0 if its time has passed."""
        return max(0, self._window_start_ns + self._settings.bandwidth_window_ns - now_ns)

    @property
    def threshold_bytes(self) -> float:
        """The most bytes that may remain when the guest is stopped."""
        return self.bandwidth_bytes_per_s * self.limit_ns / NS_PER_S

    @property
    def best_threshold_bytes(self) -> float:
        """The same at the largest bandwidth that was measured."""
        return self.best_bytes_per_s * self.limit_ns / NS_PER_S

    def fits(self, pending_bytes: int) -> bool:
        """Whether these bytes can be sent within the downtime limit. 0 bytes always fit, more not before the first
        window is over."""
        return pending_bytes == 0 or pending_bytes < self.threshold_bytes

    def fits_after(self, unread_ns: float, unsaved_bytes: int) -> bool:
        """v3: whether bytes that a device has not saved yet fit what is left of the limit, once its streams are empty.

        `unread_ns`: how long the slowest stream takes for that. A limit below the decision interval counts as one
        interval, as for a `Backlog`.
        """
        left_ns = max(self.limit_ns, self._settings.decision_interval_ns) - unread_ns
        return unsaved_bytes == 0 or unsaved_bytes * NS_PER_S < self.bandwidth_bytes_per_s * left_ns

    def falls_short(self, unread_ns: float, unsaved_bytes: int) -> list[str]:
        """In words, that fits_after() does not hold; none if it does."""
        if self.fits_after(unread_ns, unsaved_bytes):
            return []
        unsaved, unread_ms = _mib(unsaved_bytes), unread_ns / 1e6
        return [f"{unsaved} MiB are not saved yet, and come when the slowest stream is empty, after {unread_ms:.0f} ms"]


class Backlog(abc.ABC):
    """One part of the remaining bytes, RAM or a dirty stream, that must also fit the downtime limit by itself.

    The parts move beside each other, so the sum does not show how soon one part is done. A part fits if

        remaining < rate x max(downtime limit, decision interval)

    The decision interval is in it because a part that runs dry within one interval is not measured as faster. If a part
    was empty before its rate could be measured, it is taken to keep up and passes the check. For a limit of 300 ms:

        rate        remaining   fits
        10 MB/s     2 MB        yes, below 3 MB
        10 MB/s     4 MB        no
        none        4 MB        yes if the part was empty before, else no

    The subclasses differ in the time over which they measure the rate.
    """

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        self._settings = settings
        self._limit_ns = settings.limit_ns(now_ns)
        self._at_ns = now_ns
        self._sent_bytes = 0
        self._ran_dry = False  # whether the part was empty at any sample
        self._bytes_per_s: float | None = None  # None: no rate could be measured

    @abc.abstractmethod
    def sample(self, now_ns: int, bytes_sent: int, remaining_bytes: int) -> None:
        """Record all bytes of this part sent since the start, and its remaining bytes as far as they are known."""

    def fits(self, remaining_bytes: int) -> bool:
        """Whether this part alone can be sent within the downtime limit. True for 0 bytes or a given bandwidth."""
        settings = self._settings
        return self.time_ns(remaining_bytes) < max(self._limit_ns, settings.decision_interval_ns)

    def time_ns(self, remaining_bytes: int) -> float:
        """How long these bytes take at the rate of the part: 0 if it keeps up or the bandwidth is given, infinite if no
        rate is known."""
        rate = self._bytes_per_s
        if remaining_bytes == 0 or self._settings.given_bandwidth_bytes_per_s is not None:
            return 0.0
        if rate is None:
            return 0.0 if self._ran_dry else math.inf
        return remaining_bytes * NS_PER_S / rate if rate else math.inf

    def falls_short(self, remaining_bytes: int) -> str:
        """In words, that this does not fit."""
        left = f"{_mib(remaining_bytes)} MiB left"
        if not self._bytes_per_s:
            return f"{left}, and moved nothing since it was asked"
        time_ms = self.time_ns(remaining_bytes) / 1e6
        return f"{left}, which take {time_ms:.0f} ms at its own {_mib(self._bytes_per_s)} MiB/s"


class RamBacklog(Backlog):
    """RAM: the rate is that of the last window, as in v2, if RAM was never empty in it; else there is none."""

    @override
    def sample(self, now_ns: int, bytes_sent: int, remaining_bytes: int) -> None:
        self._limit_ns = self._settings.limit_ns(now_ns)
        elapsed_ns = now_ns - self._at_ns
        if remaining_bytes == 0:
            self._bytes_per_s, self._ran_dry = None, True
        elif elapsed_ns < self._settings.bandwidth_window_ns:
            return
        else:
            self._bytes_per_s = (bytes_sent - self._sent_bytes) * NS_PER_S / elapsed_ns
        self._at_ns, self._sent_bytes = now_ns, bytes_sent


class StreamBacklog(Backlog):
    """A dirty stream: the rate is bytes / time of the current round, or of the last one if the current is shorter than
    a window.

    A round lasts from the first sample with something remaining to the next sample with nothing remaining. A SAVE,
    before its data can be read, is part of the round. Example, samples at 100 ms with a window of 100 ms:

        sent     remaining   round                    rate after the sample
        0 MB     5 MB        begins                   none
        3 MB     2 MB        3 MB in 100 ms           30 MB/s
        5 MB     0 MB        ends: 5 MB in 200 ms     25 MB/s, until the next round is 100 ms old
    """

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        super().__init__(settings, now_ns)
        self._in_round = True
        self._round_ns = 0
        self._round_bytes = 0
        self._last_round_bytes_per_s: float | None = None

    @override
    def sample(self, now_ns: int, bytes_sent: int, remaining_bytes: int) -> None:
        self._limit_ns = self._settings.limit_ns(now_ns)
        if self._in_round:
            self._round_ns += now_ns - self._at_ns
            self._round_bytes += bytes_sent - self._sent_bytes
        self._at_ns, self._sent_bytes, self._in_round = now_ns, bytes_sent, remaining_bytes > 0
        if not self._in_round:
            if self._round_bytes and self._round_ns:
                self._last_round_bytes_per_s = self._round_bytes * NS_PER_S / self._round_ns
            self._round_ns = self._round_bytes = 0
            self._ran_dry = True
        if self._round_ns >= self._settings.bandwidth_window_ns:
            self._bytes_per_s = self._round_bytes * NS_PER_S / self._round_ns
        else:
            self._bytes_per_s = self._last_round_bytes_per_s


# --- a migration that did not converge --------------------------------------------------------------------------------


class StoppedOnly:
    """How much of MIG_DATA_SIZE pre-copy does not give, as far as a device's answers show: what only the stopped device
    has, or what a driver that always reports a whole image counts again.

    MIG_DATA_SIZE counts all bytes, the calls of pre-copy count what can be read now. Their difference is what is asked
    for; but bytes that the guest wrote in between are in it, too. So it is taken where there are none: when the session
    begins, and when pre-copy has nothing to give.
    """

    def __init__(self) -> None:
        self._size_bytes = 0
        self._at_first_bytes = 0
        self._drained_bytes = math.inf

    def begins(self, size_bytes: int, rest_bytes: int) -> None:
        """MIG_DATA_SIZE before the session, and how much of it pre-copy does not have when the session begins."""
        self._size_bytes = max(self._size_bytes, size_bytes)
        self._at_first_bytes = rest_bytes

    def drained(self, size_bytes: int) -> None:
        """Pre-copy has nothing to give: MIG_DATA_SIZE at that moment."""
        self._size_bytes = max(self._size_bytes, size_bytes)
        self._drained_bytes = min(size_bytes, self._drained_bytes)

    @property
    def bytes(self) -> int:
        """The bytes; 0 if they are no more than headers and rounding may be (1 %)."""
        drained_bytes = 0 if math.isinf(self._drained_bytes) else int(self._drained_bytes)
        most = max(self._at_first_bytes, drained_bytes)
        return most if most > self._size_bytes / 100 else 0


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of RAM or of a device."""

    name: str
    left_bytes: int
    stopped_only_bytes: int = 0


def why_not(
    settings: SwitchoverSettings,
    precopy_ns: int,
    switchover: Switchover | None,
    parts: Sequence[Left],
    held_up: Sequence[str],
) -> str:
    """Why a migration did not converge, in one line: what was left, what would have fitted, what held it up.

    `switchover` and `parts`: None and empty if they are not known. `held_up`: other reasons, in words.
    """
    after = f"given up after {_digits(precopy_ns / NS_PER_S, 3)} s of pre-copy"
    if switchover is None or not parts:
        return f"{after}: {'; '.join(held_up) or 'what is left is not known'}"
    each = ", ".join(f"{part.name} {_mib(part.left_bytes)}" for part in parts)
    lines = [
        f"{after}: {_mib(sum(part.left_bytes for part in parts))} MiB left ({each})",
        _what_fits(settings, switchover),
        *held_up,
    ]
    never = [part for part in parts if part.stopped_only_bytes]
    if never and sum(part.stopped_only_bytes for part in never) >= switchover.best_threshold_bytes:
        each = " and ".join(f"{part.name} has {_mib(part.stopped_only_bytes)} MiB" for part in never)
        bandwidths = "" if settings.given_bandwidth_bytes_per_s else ", at no bandwidth that was measured"
        lines.append(f"{each} that pre-copy does not give: they can never fit{bandwidths}")
    return "; ".join(lines)


def _what_fits(settings: SwitchoverSettings, switchover: Switchover) -> str:
    limit = f"a downtime limit of {switchover.limit_ns / 1e6:g} ms"
    window = f"{settings.bandwidth_window_ns / 1e6:g} ms"
    rate, best = switchover.bandwidth_bytes_per_s, switchover.best_bytes_per_s
    if not best:
        return f"nothing fits {limit}, as no bandwidth was measured over {window}"
    most = f"{_mib(switchover.best_threshold_bytes)} MiB would at {_mib(best)} MiB/s, the most that was measured"
    if not rate:
        return f"nothing fits {limit}, as nothing was sent in the last {window} ({most})"
    given = "" if settings.given_bandwidth_bytes_per_s is None else "the given "
    text = f"{_mib(switchover.threshold_bytes)} MiB fit {limit} at {given}{_mib(rate)} MiB/s"
    return f"{text} ({most})" if best > 1.1 * rate else text


def _mib(size: float) -> str:
    return _digits(size / (1 << 20), 4)


def _digits(value: float, digits: int) -> str:
    """A number with this many digits, or with all of them before the point."""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"
