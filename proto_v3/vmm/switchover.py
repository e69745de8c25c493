"""When to stop the guest: the remaining bytes must fit the downtime limit at the measured bandwidth.

As QEMU (migration/migration.c, migration_update_counters and migration_iteration_run): bandwidth is measured over
windows of 100 ms, threshold = bandwidth x downtime limit, and a cheap estimate is refined to an exact figure only once
it is below the threshold. Only bytes count: the device's save and load times and its transitions are not included.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from typing_extensions import override

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class SwitchoverSettings:
    """A VMM's settings for a migration. Times in nanoseconds."""

    downtime_limit_ns: int
    bandwidth_window_ns: int
    decision_interval_ns: int
    give_up_ns: int
    read_bytes: int
    write_bytes: int
    ram_budget_ns: int
    cancel_ns: int | None = None
    """The user cancels this long after the start, if the guest is not stopped yet. None: never."""
    given_bandwidth_bytes_per_s: float | None = None
    """If set, used instead of the measured bandwidth (QEMU's avail-switchover-bandwidth)."""


class Switchover:
    """The threshold, kept up to date from the bytes sent so far."""

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        self._settings = settings
        self._window_start_ns = now_ns
        self._window_bytes = 0
        given = settings.given_bandwidth_bytes_per_s
        self.bandwidth_bytes_per_s = 0.0 if given is None else given

    def sample(self, now_ns: int, bytes_sent: int) -> None:
        """Record all bytes sent since the start; end the window if its time has passed."""
        elapsed_ns = now_ns - self._window_start_ns
        if elapsed_ns < self._settings.bandwidth_window_ns:
            return
        if self._settings.given_bandwidth_bytes_per_s is None:
            self.bandwidth_bytes_per_s = (bytes_sent - self._window_bytes) * NS_PER_S / elapsed_ns
        self._window_start_ns, self._window_bytes = now_ns, bytes_sent

    @property
    def threshold_bytes(self) -> float:
        """The most bytes that may remain when the guest is stopped."""
        return self.bandwidth_bytes_per_s * self._settings.downtime_limit_ns / NS_PER_S

    def fits(self, pending_bytes: int) -> bool:
        """Whether these bytes can be sent within the downtime limit. 0 bytes always fit."""
        return pending_bytes == 0 or pending_bytes < self.threshold_bytes

    def fits_after(self, unread_ns: float, unsaved_bytes: int) -> bool:
        """v3: whether bytes that a device has not saved yet fit what is left of the limit, once its streams are empty.

        `unread_ns`: how long the slowest stream takes for that. A limit below the decision interval counts as one
        interval, as for a `Backlog`.
        """
        left_ns = max(self._settings.downtime_limit_ns, self._settings.decision_interval_ns) - unread_ns
        return unsaved_bytes == 0 or unsaved_bytes * NS_PER_S < self.bandwidth_bytes_per_s * left_ns


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
        return self.time_ns(remaining_bytes) < max(settings.downtime_limit_ns, settings.decision_interval_ns)

    def time_ns(self, remaining_bytes: int) -> float:
        """How long these bytes take at the rate of the part: 0 if it keeps up or the bandwidth is given, infinite if no
        rate is known."""
        rate = self._bytes_per_s
        if remaining_bytes == 0 or self._settings.given_bandwidth_bytes_per_s is not None:
            return 0.0
        if rate is None:
            return 0.0 if self._ran_dry else math.inf
        return remaining_bytes * NS_PER_S / rate if rate else math.inf


class RamBacklog(Backlog):
    """RAM: the rate is that of the last window, as in v2, if RAM was never empty in it; else there is none."""

    @override
    def sample(self, now_ns: int, bytes_sent: int, remaining_bytes: int) -> None:
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
