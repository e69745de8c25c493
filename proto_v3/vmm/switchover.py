"""When to stop the guest: what is left must fit the downtime limit at the measured bandwidth.

As QEMU does it (migration/migration.c, migration_update_counters and migration_iteration_run): bandwidth is measured
over windows of 100 ms, threshold = bandwidth x downtime limit, and a cheap estimate is refined to an exact figure
only once it is below the threshold. Only bytes count: neither the device's save and load times nor its transitions
are in it.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

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
    """The user cancels so long after the start, if the guest is not stopped yet."""
    given_bandwidth_bytes_per_s: float | None = None
    """If set, used in place of the measured one (QEMU's avail-switchover-bandwidth)."""


class Switchover:
    """The threshold, kept up to date from the bytes sent so far."""

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        self._settings = settings
        self._window_start_ns = now_ns
        self._window_bytes = 0
        given = settings.given_bandwidth_bytes_per_s
        self.bandwidth_bytes_per_s = 0.0 if given is None else given

    def sample(self, now_ns: int, bytes_sent: int) -> None:
        """Take note of all bytes sent since the start; closes the window if it is over."""
        elapsed_ns = now_ns - self._window_start_ns
        if elapsed_ns < self._settings.bandwidth_window_ns:
            return
        if self._settings.given_bandwidth_bytes_per_s is None:
            self.bandwidth_bytes_per_s = (bytes_sent - self._window_bytes) * NS_PER_S / elapsed_ns
        self._window_start_ns, self._window_bytes = now_ns, bytes_sent

    @property
    def threshold_bytes(self) -> float:
        """What may be left when the guest is stopped."""
        return self.bandwidth_bytes_per_s * self._settings.downtime_limit_ns / NS_PER_S

    def fits(self, pending_bytes: int) -> bool:
        """Whether so much can be sent within the downtime limit. Nothing left always fits, as nothing is to be sent."""
        return pending_bytes == 0 or pending_bytes < self.threshold_bytes


class Backlog(abc.ABC):
    """One part of what is left, RAM or a dirty stream, that moves beside the others: it must fit by itself, too.

    The sum says nothing about how soon one part is through. One that ran dry before its rate could be measured keeps up
    with its source, as far as is known, and is not judged.
    """

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        self._settings = settings
        self._at_ns = now_ns
        self._sent_bytes = 0
        self._ran_dry = False

    @abc.abstractmethod
    def sample(self, now_ns: int, bytes_sent: int, left_bytes: int) -> None:
        """Take note of all bytes of this part sent since the start, and of what is left of it as far as is known."""

    @property
    @abc.abstractmethod
    def _bytes_per_s(self) -> float | None:
        """As measured; None if nothing is known."""

    def fits(self, left_bytes: int) -> bool:
        """Whether so much of it can be sent within the downtime limit, or until the next decision: what runs dry sooner
        is not measured as faster."""
        settings, rate = self._settings, self._bytes_per_s
        if left_bytes == 0 or settings.given_bandwidth_bytes_per_s is not None:
            return True
        if rate is None:
            return self._ran_dry
        return left_bytes < rate * max(settings.downtime_limit_ns, settings.decision_interval_ns) / NS_PER_S


class RamBacklog(Backlog):
    """RAM, measured as in v2 over windows, but only such in which it never ran dry."""

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        super().__init__(settings, now_ns)
        self._of_window: float | None = None

    @property
    def _bytes_per_s(self) -> float | None:
        return self._of_window

    def sample(self, now_ns: int, bytes_sent: int, left_bytes: int) -> None:
        """See Backlog."""
        elapsed_ns = now_ns - self._at_ns
        if left_bytes == 0:
            self._of_window, self._ran_dry = None, True
        elif elapsed_ns < self._settings.bandwidth_window_ns:
            return
        else:
            self._of_window = (bytes_sent - self._sent_bytes) * NS_PER_S / elapsed_ns
        self._at_ns, self._sent_bytes = now_ns, bytes_sent


class StreamBacklog(Backlog):
    """A dirty stream, measured over the round under way, from when there was something left of it; or, if that is not
    old enough to tell, over the last one, which ended when nothing was left. A SAVE, before its data can be read, is
    part of a round."""

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        super().__init__(settings, now_ns)
        self._under_way = True
        self._round_ns = 0
        self._round_bytes = 0
        self._of_last_round: float | None = None

    @property
    def _bytes_per_s(self) -> float | None:
        if self._round_ns >= self._settings.bandwidth_window_ns:
            return self._round_bytes * NS_PER_S / self._round_ns
        return self._of_last_round

    def sample(self, now_ns: int, bytes_sent: int, left_bytes: int) -> None:
        """See Backlog."""
        if self._under_way:
            self._round_ns += now_ns - self._at_ns
            self._round_bytes += bytes_sent - self._sent_bytes
        self._at_ns, self._sent_bytes, self._under_way = now_ns, bytes_sent, left_bytes > 0
        if not self._under_way:
            if self._round_bytes and self._round_ns:
                self._of_last_round = self._round_bytes * NS_PER_S / self._round_ns
            self._round_ns = self._round_bytes = 0
            self._ran_dry = True
