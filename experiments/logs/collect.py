# SPDX-License-Identifier: GPL-2.0-or-later
"""A log's events into the facts of each migration in it."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.logs.collect_base import STATES
from experiments.logs.collect_source import SourceCollector
from experiments.logs.collect_target import TargetCollector
from experiments.logs.events import TraceEvent
from experiments.logs.facts import SideFacts, Transition

PASSES = {
    ("PRE_COPY_P2P", "STOP_COPY"),
    ("RUNNING_P2P", "STOP"),
    ("RUNNING_P2P", "STOP_COPY"),
    ("RUNNING_P2P", "RUNNING"),
}
"""What all devices do in turn, and what they do right after it."""


class Collector(SourceCollector, TargetCollector):
    """Takes the events of one log in their order."""

    def _on_QMP_VFIO_MIGRATION(self, event: TraceEvent) -> None:  # noqa: N802
        word = event.args.rpartition(" ")[2]
        device = self._device(event)
        if word.endswith("-prepare"):
            self._asked[device.name] = event.time_us, STATES.get(word.removesuffix("-prepare"), "")
        elif word in STATES:
            state = STATES[word]
            begin_us, _ = self._asked.pop(device.name, (self._begin_of(state), ""))
            self._moved(device, Transition("", state, begin_us, event.time_us), state)
            self._last_qmp = event.time_us, state

    def _begin_of(self, state: str) -> int | None:
        """When a step began whose end alone is told: when the one before it ended, in the same pass or the pass before.
        None: that is not known."""
        at_us, before = self._last_qmp
        return at_us if before == state or (before, state) in PASSES else None

    def _on_QMP_MIGRATION(self, event: TraceEvent) -> None:  # noqa: N802
        if not self._now.traced:
            self._status(event.time_us, event.args)

    def _on_QMP_STOP(self, event: TraceEvent) -> None:  # noqa: N802
        self._now.moments["QMP STOP"] = event.time_us

    def _on_QMP_RESUME(self, event: TraceEvent) -> None:  # noqa: N802
        self._now.moments["QMP RESUME"] = event.time_us


def migrations(events: Iterable[TraceEvent]) -> list[SideFacts]:
    """What the events of one log say, one entry a migration. At least one entry, which may be empty."""
    return Collector().take(events)
