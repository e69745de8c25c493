# SPDX-License-Identifier: GPL-2.0-or-later
"""The outcome of a run, computed from what both sides reported: plain data, whichever clock the run had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from proto_v3.timeline import PHASES, Mark, Resource, Stage, Timeline
from proto_v3.vmm.migration import OutcomeKind
from sim.report import Counters, CriticalLoad, DeviceReport, Failure, SideReport
from sim.scenario.protocol import AppliedScenario
from sim.theory.downtime_bound import lower_bound


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run. The fields are the columns of the table of runs, in this order; their ends are the units.

    None: only a completed migration has it.
    """

    scenario: str
    protocol: str
    seed: int
    kind: OutcomeKind
    reason: str = ""
    note: str = ""
    """Anything else worth saying, as that the run fell back to v2."""
    downtime_ns: int | None = None
    """From the order to stop the vCPUs until the guest runs at the target."""
    total_ns: int | None = None
    """Of the whole migration."""
    bound_ns: int | None = None
    """The least downtime, computed from scenario and protocol alone (sim/theory/downtime_bound.py). A live run may be
    below it: its link and its copies are the machine's, not the scenario's."""
    bound_by: str = ""
    """The resource that sets the bound."""
    bound_ratio: float | None = None
    """The downtime by its bound; None if the bound is 0."""
    downtime_limit_ns: int | None = None
    """The scenario's, at the stop. The decision to stop holds only bytes over bandwidth against it."""
    over_limit_ratio: float | None = None
    """The downtime by its limit: 1 to 2 is normal, because stop, load, config and resume are not in the decision."""
    phases_ns: dict[str, int] = field(default_factory=dict)
    """They sum to the downtime exactly."""
    critical_path_ns: dict[str, int] = field(default_factory=dict)
    """By the resource that the downtime waited for. They sum to the downtime, too."""
    guest_runs_at: str = ""
    """`source` or `target`."""
    setup_in_downtime_ns: int | None = None
    """Set-up of critical objects that fell into the downtime, on the critical path or beside it."""
    late_critical_objects: int | None = None
    """Critical objects that were loaded after the order to stop the vCPUs."""
    late_reconfigured_objects: int | None = None
    """How many of them the guest made new during the migration; the others are of the initial data."""
    late_critical_bytes: int | None = None
    critical_lag_mean_ns: int | None = None
    """From a reconfiguration to its critical data loaded at the target; 0 without reconfigurations."""
    critical_lag_max_ns: int | None = None
    counters: Counters = field(default_factory=Counters)
    digest: str = ""
    """Of the timeline: equal for equal runs."""
    stages: tuple[Stage, ...] = ()
    """Steps of the VMMs, such as the save of device 0."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """What both sides reported of a run, on one clock: that of the timeline."""

    scenario: str
    protocol: str
    seed: int
    timeline: Timeline
    source: SideReport | None = None
    target: SideReport | None = None
    """None: this side could not report."""
    note: str = ""
    guest_runs_at: str = ""
    differences: Sequence[str] = ()
    """Where a device's state at the target differs from the source's, in words. Only of a completed migration."""

    @property
    def sides(self) -> list[SideReport]:
        """Those that reported."""
        return [side for side in (self.source, self.target) if side is not None]

    @property
    def needed_bytes(self) -> int:
        """One copy of the state of all devices."""
        return sum(device.needed_bytes for device in _devices(self.source))

    def counters(self) -> Counters:
        """Of both sides, VMMs and devices together."""
        devices = [device for side in self.sides for device in side.devices]
        return Counters.total([*(side.counters for side in self.sides), *(device.counters for device in devices)])

    def late_loads(self) -> list[CriticalLoad]:
        """Critical objects that were loaded after the order to stop the vCPUs."""
        stop_ns = self.timeline.marks[Mark.STOP_ORDERED]
        return [load for device in _devices(self.target) for load in device.critical_loads if load.end_ns > stop_ns]

    def critical_lags_ns(self) -> Iterator[int]:
        """For each reconfiguration during the migration: how long until all critical data of its epoch was loaded."""
        for device, loaded in zip(_devices(self.source), _devices(self.target), strict=False):
            loads = [load for load in loaded.critical_loads if load.complete]
            for epoch, event_ns in enumerate(device.reconfigurations_ns, 2):  # the device starts in epoch 1
                loaded_ns = next((load.end_ns for load in loads if load.epoch >= epoch), None)
                if loaded_ns is not None:
                    yield loaded_ns - event_ns


def _devices(side: SideReport | None) -> Sequence[DeviceReport]:
    return () if side is None else side.devices


def ended(run: RunReport, kind: OutcomeKind, reason: str = "", guest: str = "") -> Outcome:
    """The outcome of a run that ended like this, without the figures that only a completed migration has. `guest`: what
    became of it, in words."""
    counters = run.counters()
    if "target" in run.guest_runs_at:  # though the source may not know: the last stop was not in vain
        counters.stopped_in_vain_ns = counters.retries_stopped_ns
    if kind is OutcomeKind.COMPLETED:
        counters.device_bytes_resent = max(0, counters.device_bytes - run.needed_bytes)
    resets = [] if run.source is None else run.source.resets
    return Outcome(
        scenario=run.scenario,
        protocol=run.protocol,
        seed=run.seed,
        kind=kind,
        reason="; ".join(filter(None, [reason, *resets, guest])),
        note="; ".join(filter(None, [run.note, _survived(run) if kind in SURVIVES else ""])),
        total_ns=max((side.ended_ns for side in run.sides), default=0),
        guest_runs_at=run.guest_runs_at,
        counters=counters,
        digest=run.timeline.digest(),
    )


SURVIVES = (OutcomeKind.COMPLETED, OutcomeKind.DID_NOT_CONVERGE)
"""How a run ends whose reason is none of its failures."""


def _survived(run: RunReport) -> str:
    """What failed in a device and did not end the migration, in words; of several the first."""
    sides = (("source", run.source), ("target", run.target))
    logged = [
        (message.at_ns, f"{side}, {device.name}: {message.text}")
        for side, report in sides
        for device in _devices(report)
        for message in device.log
    ]
    if not logged:
        return ""
    more = f", and {len(logged) - 1} more" if len(logged) > 1 else ""
    return f"{min(logged)[1]}{more}; the migration went on"


def failed(run: RunReport, failures: Sequence[Failure]) -> Outcome:
    """The outcome of a run with these errors: UNSUPPORTED if one of them says so, otherwise FAILED."""
    unsupported = next((failure for failure in failures if failure.unsupported), None)
    if unsupported is not None:
        return ended(run, OutcomeKind.UNSUPPORTED, unsupported.text)
    return ended(run, OutcomeKind.FAILED, reason_of(run, failures))


def reason_of(run: RunReport, failures: Sequence[Failure]) -> str:
    """Errors in words, in order of time; empty if there are none. Echoes are left out if there is any other error; of
    one device, and of lost connections, all but the first."""
    causes = [failure for failure in failures if not failure.echo] or failures
    told: dict[object, str] = {}
    for failure in sorted(causes, key=lambda failure: failure.at_ns):
        of: object = (
            (failure.side, failure.device) if failure.device else "connections" if failure.lost else failure.text
        )
        told.setdefault(of, _with_cause(run, failure))
    return "; ".join(told.values())


def _with_cause(run: RunReport, failure: Failure) -> str:
    """A failure in words, with what failed first in its device if that is known and says more."""
    report = run.source if failure.side == "source" else run.target
    logs = [message for device in _devices(report) if device.name == failure.device for message in device.log]
    cause = next((message.text for message in reversed(logs) if message.at_ns <= failure.at_ns), failure.cause)
    same = failure.text.startswith(f"{failure.side}, {failure.device}: {cause} ")
    return failure.text if not cause or same else f"{failure.text}; first cause: {cause}"


def completed(run: RunReport) -> Outcome:
    """The outcome of a migration that was completed.

    FAILED if a device at the target differs from the source's, however fast it was. KeyError if the timeline does not
    have all marks.
    """
    if run.differences:
        text = f"the target's state differs from the source's: {'; '.join(run.differences)}"
        return ended(run, OutcomeKind.FAILED, text)
    timeline, marks = run.timeline, run.timeline.marks
    stages = [
        *timeline.stages,
        Stage("saved_to_loaded", 0, marks[Mark.DRAINED], marks[Mark.CONFIGURED]),
        Stage("announce_and_start", 0, marks[Mark.CONFIGURED], marks[Mark.RESUMED]),
    ]
    late, lags_ns = run.late_loads(), list(run.critical_lags_ns())
    outcome = ended(run, OutcomeKind.COMPLETED)
    outcome.counters.send_blocked_ns = timeline.blocked_in_downtime_ns()
    return replace(
        outcome,
        downtime_ns=timeline.downtime_ns,
        total_ns=marks[Mark.RESUMED],
        phases_ns=timeline.phases_ns(),
        critical_path_ns=timeline.critical_path_ns(),
        setup_in_downtime_ns=timeline.in_downtime_ns(Resource.SETUP),
        late_critical_objects=sum(load.objects for load in late),
        late_reconfigured_objects=sum(load.reconfigured for load in late),
        late_critical_bytes=sum(load.bytes for load in late),
        critical_lag_mean_ns=sum(lags_ns) // max(1, len(lags_ns)),
        critical_lag_max_ns=max(lags_ns, default=0),
        stages=tuple(stages),
    )


def compared(outcome: Outcome, applied: AppliedScenario) -> Outcome:
    """The same outcome beside the bound and the downtime limit of what was run, if the migration was completed."""
    return held_against_bound(held_against_limit(outcome, applied), applied)


def held_against_bound(outcome: Outcome, applied: AppliedScenario) -> Outcome:
    """The same outcome beside the bound of what was run, if the migration was completed."""
    if outcome.kind is not OutcomeKind.COMPLETED or outcome.downtime_ns is None:
        return outcome
    bound = lower_bound(applied)
    return replace(
        outcome,
        bound_ns=bound.total_ns,
        bound_by=bound.resource,
        bound_ratio=outcome.downtime_ns / bound.total_ns if bound.total_ns else None,
    )


def held_against_limit(outcome: Outcome, applied: AppliedScenario) -> Outcome:
    """The same outcome beside the downtime limit of what was run, if the migration was completed."""
    if outcome.kind is not OutcomeKind.COMPLETED or outcome.downtime_ns is None:
        return outcome
    stopped_ns = (outcome.total_ns or 0) - outcome.downtime_ns
    limit_ns = applied.scenario.switchover_settings().limit_ns(stopped_ns)
    over = over_limit(outcome.downtime_ns, limit_ns, outcome.phases_ns, outcome.critical_path_ns)
    return replace(
        outcome,
        downtime_limit_ns=limit_ns,
        over_limit_ratio=outcome.downtime_ns / limit_ns,
        note="; ".join(filter(None, [outcome.note, over])),
    )


FAR_OVER = 2.0
"""A downtime of more than this times its limit is said to be far over it. Ours. The limit is held against bytes over
bandwidth alone, so a little over is normal: one VF of mlx5 stays below this with every protocol, four VFs do not."""
RESOURCES = {
    "firmware": "firmware SAVE",
    "lock": "a lock",
    "copy": "copies",
    "link": "the link",
    "load": "LOAD",
    "setup": "critical set-up",
    "ram": "guest RAM",
    "fixed": "fixed costs",
    "unexplained": "unexplained",
}


def over_limit(
    downtime_ns: float, limit_ns: float, phases_ns: Mapping[str, float], path_ns: Mapping[str, float]
) -> str:
    """What took a downtime far over its limit, in words; empty if it is not far over.

    `phases_ns` and `path_ns`: the downtime by phase and by resource, which may be means over runs.
    """
    if downtime_ns <= FAR_OVER * limit_ns:
        return ""
    estimated_ns = phases_ns["drain"] + phases_ns["transfer"]
    rest = ", ".join(f"{name} {phases_ns[name] / 1e6:.0f}" for name in PHASES if name not in ("drain", "transfer"))
    most, most_ns = max(path_ns.items(), key=lambda item: item[1])
    return (
        f"{downtime_ns / limit_ns:.1f} times the downtime limit of {limit_ns / 1e6:g} ms: drain and transfer, which "
        f"the decision to stop estimates, took {estimated_ns / 1e6:.0f} ms; it does not count {rest} ms; the largest "
        f"part of the critical path is {RESOURCES[most]}, {most_ns / 1e6:.0f} ms"
    )
