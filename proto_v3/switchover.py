"""When to stop the guest: what is left must fit the downtime limit at the measured bandwidth.

As QEMU does it (migration/migration.c, migration_update_counters and migration_iteration_run): bandwidth is measured
over windows of 100 ms, threshold = bandwidth x downtime limit, and a cheap estimate is refined to an exact figure
only once it is below the threshold. Only bytes count: neither the device's save and load times nor its transitions
are in it.
"""

from __future__ import annotations

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


class Backlog:
    """One part of what is left, RAM or a device, that moves beside the others: it must fit by itself, too.

    The sum says nothing about how soon one part is through. A part is measured over the last window in which it never
    ran dry. One that ran dry since keeps up with its source, and is not judged; nor can one be that did neither yet.
    """

    def __init__(self, settings: SwitchoverSettings, now_ns: int) -> None:
        self._settings = settings
        self._window_start_ns = now_ns
        self._window_bytes = 0
        self._bytes_per_s: float | None = None
        self._ran_dry = False

    def sample(self, now_ns: int, bytes_sent: int, left_bytes: int) -> None:
        """Take note of all bytes of this part sent since the start, and of what is left of it as far as is known."""
        elapsed_ns = now_ns - self._window_start_ns
        if left_bytes == 0:
            self._bytes_per_s, self._ran_dry = None, True
        elif elapsed_ns < self._settings.bandwidth_window_ns:
            return
        else:
            self._bytes_per_s = (bytes_sent - self._window_bytes) * NS_PER_S / elapsed_ns
        self._window_start_ns, self._window_bytes = now_ns, bytes_sent

    def fits(self, left_bytes: int) -> bool:
        """Whether so much of it can be sent within the downtime limit."""
        if left_bytes == 0 or self._settings.given_bandwidth_bytes_per_s is not None:
            return True
        if self._bytes_per_s is None:
            return self._ran_dry
        return left_bytes < self._bytes_per_s * self._settings.downtime_limit_ns / NS_PER_S
