"""What a run gave, reckoned from what it left behind at both sides: plain data, whichever clock it ran on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from proto_v3.errors import PeerFailedError
from proto_v3.timeline import Mark, Resource, Stage, Timeline
from proto_v3.vmm.migration import OutcomeKind, UnsupportedError
from sim.device.stream import CriticalLoad, LoadCounts, ReadCounts
from sim.theory.downtime_bound import DowntimeBound


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave. Times in nanoseconds; None where the migration was not completed."""

    scenario: str
    protocol: str
    seed: int
    kind: OutcomeKind
    reason: str = ""
    downtime_ns: int | None = None
    total_ns: int | None = None
    phases_ns: dict[str, int] = field(default_factory=dict)
    """They sum to the downtime exactly."""
    critical_path_ns: dict[str, int] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    setup_in_downtime_ns: int | None = None
    """Set-up of critical objects that fell into the downtime, on the critical path or beside it."""
    send_blocked_ns: int = 0
    """How long sends were held up by full connections in the downtime, summed over connections."""
    wire_bytes: int = 0
    device_bytes: int = 0
    device_bytes_resent: int = 0
    """Read from the devices beyond one copy of their state: what was dirtied again, and the records' headers."""
    device_bytes_dropped: int = 0
    """Saved by the devices, and dropped before anybody read them (REINIT or an epoch, policy `invalidate`)."""
    device_bytes_wasted: int = 0
    """v3: sent in vain: of blocks that the target's driver dropped, or had loaded already, when an epoch made them
    invalid; with addressable blocks, of those, too, that came after a newer version."""
    late_critical_objects: int | None = None
    """Critical objects that were loaded after the order to stop the vCPUs."""
    late_reconfigured_objects: int | None = None
    """Of these, those that the guest made new during the migration; the others are of the initial data."""
    late_critical_bytes: int | None = None
    critical_lag_max_ns: int | None = None
    """The longest from a reconfiguration to its critical data loaded at the target; 0 without reconfigurations."""
    critical_lag_mean_ns: int | None = None
    peak_reorder_bytes: int = 0
    """The most that waited in the target VMM's memory: what was early, or not written yet."""
    peak_held_bytes: int = 0
    """The most that one target driver held: records that were coming in, held back for their epoch, or being loaded."""
    note: str = ""
    """What else there is to say, as that it fell back to v2."""
    retries: int = 0
    """Orders to stop the guest that were taken back, for a new epoch slipped in."""
    retries_stopped_ns: int = 0
    """How long the guest stood still for them; the downtime counts from the last order."""
    late_final_checks: int = 0
    """v3: devices that the last look found to have an epoch that is not loaded, at all orders to stop."""
    connections: int = 0
    messages: int = 0
    """Frames without payload, both ways."""
    wakeups: int = 0
    """Waits in read(), poll(), send() and recv() that ended, of both VMMs."""
    guest_runs_at: str = ""
    """`source` or `target`."""
    reads: int = 0
    read_firmware_ns: int = 0
    read_lock_ns: int = 0
    read_copy_ns: int = 0
    digest: str = ""
    bound_ns: int | None = None
    """What the downtime is at the least, reckoned from scenario and protocol alone (sim/theory/downtime_bound.py).
    A live run may be below it: its link and its copies are those of the machine, not the scenario's."""
    bound_by: str = ""
    """The resource that sets it."""


@dataclass(frozen=True, slots=True)
class DeviceMeasured:
    """What a run left behind of one device, at both sides."""

    name: str
    needed_bytes: int
    """One copy of its state: blocks and critical objects."""
    reads: list[ReadCounts] = field(default_factory=list)
    """Source: one entry a stream, of every session."""
    loads: list[LoadCounts] = field(default_factory=list)
    """Target: one entry a session."""
    critical_loads: list[CriticalLoad] = field(default_factory=list)
    """Target: in order of time, of every session."""
    reconfigurations_ns: list[int] = field(default_factory=list)
    """When the guest reconfigured it, up to the end, ascending; the first one began epoch 2."""
    difference: str = ""
    """What the target's state differs in from the source's, in words; empty if it is the same. Asked for only where
    the migration was completed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run left behind. Times in nanoseconds, on one clock at both sides: that of the timeline."""

    scenario: str
    protocol: str
    seed: int
    timeline: Timeline
    ended_ns: int
    """When the last side ended."""
    devices: list[DeviceMeasured] = field(default_factory=list)
    wire_bytes: int = 0
    """That the source sent."""
    connections: int = 0
    messages: int = 0
    """Frames without payload, both ways."""
    network_wakeups: int = 0
    """Waits in send() and recv() that ended, of both VMMs; those in read() and poll() are counted with the reads."""
    peak_reorder_bytes: int = 0
    note: str = ""
    retries: int = 0
    retries_stopped_ns: int = 0
    late_final_checks: int = 0
    guest_runs_at: str = ""


def ended(measured: Measured, kind: OutcomeKind, reason: str = "") -> Outcome:
    """The outcome of a run that ended like this, without what only a completed migration has."""
    reads = [counts for device in measured.devices for counts in device.reads]
    loads = [counts for device in measured.devices for counts in device.loads]
    device_bytes = sum(counts.bytes for counts in reads)
    needed = sum(device.needed_bytes for device in measured.devices)
    return Outcome(
        scenario=measured.scenario,
        protocol=measured.protocol,
        seed=measured.seed,
        kind=kind,
        reason=reason,
        total_ns=measured.ended_ns,
        wire_bytes=measured.wire_bytes,
        device_bytes=device_bytes,
        device_bytes_resent=max(0, device_bytes - needed) if kind is OutcomeKind.COMPLETED else 0,
        reads=sum(counts.calls for counts in reads),
        read_firmware_ns=sum(counts.firmware_ns for counts in reads),
        read_lock_ns=sum(counts.lock_ns for counts in reads),
        read_copy_ns=sum(counts.copy_ns for counts in reads),
        device_bytes_dropped=sum(counts.dropped_bytes for counts in reads),
        device_bytes_wasted=sum(counts.overtaken_bytes + counts.undone_bytes + counts.stale_bytes for counts in loads),
        peak_reorder_bytes=measured.peak_reorder_bytes,
        peak_held_bytes=max((counts.peak_held_bytes for counts in loads), default=0),
        note=measured.note,
        retries=measured.retries,
        late_final_checks=measured.late_final_checks,
        retries_stopped_ns=measured.retries_stopped_ns,
        connections=measured.connections,
        messages=measured.messages,
        wakeups=measured.network_wakeups + sum(counts.wakeups for counts in reads),
        guest_runs_at=measured.guest_runs_at,
        digest=measured.timeline.digest(),
    )


def failed(measured: Measured, failures: Sequence[Exception], *, echoes: tuple[type[Exception], ...] = ()) -> Outcome:
    """The outcome of a run in which these errors came up: UNSUPPORTED if one of them says so, or else FAILED.

    `echoes` are the errors by which one side hears that the other has ended, beside PeerFailedError: they are told
    only where there is nothing else to tell.
    """
    unsupported = next((cause for cause in failures if isinstance(cause, UnsupportedError)), None)
    if unsupported is not None:
        return ended(measured, OutcomeKind.UNSUPPORTED, str(unsupported))
    told = [cause for cause in failures if not isinstance(cause, (PeerFailedError, *echoes))] or failures
    return ended(measured, OutcomeKind.FAILED, "; ".join(dict.fromkeys(str(cause) for cause in told)))


def completed(measured: Measured) -> Outcome:
    """The outcome of a migration that came to its end.

    FAILED if a device at the target differs from the source's, whatever the speed. KeyError if the timeline has not
    all marks.
    """
    wrong = [f"{device.name}: {device.difference}" for device in measured.devices if device.difference]
    if wrong:
        return ended(measured, OutcomeKind.FAILED, f"the target's state differs from the source's: {'; '.join(wrong)}")
    timeline = measured.timeline
    marks = timeline.marks
    stages = [
        *timeline.stages,
        Stage("saved_to_loaded", 0, marks[Mark.DRAINED], marks[Mark.CONFIGURED]),
        Stage("announce_and_start", 0, marks[Mark.CONFIGURED], marks[Mark.RESUMED]),
    ]
    lags = [lag for device in measured.devices for lag in _lags(device)]
    late = [
        load for device in measured.devices for load in device.critical_loads if load.end_ns > marks[Mark.STOP_ORDERED]
    ]
    return replace(
        ended(measured, OutcomeKind.COMPLETED),
        downtime_ns=timeline.downtime_ns,
        total_ns=timeline.marks[Mark.RESUMED],
        phases_ns=timeline.phases_ns(),
        critical_path_ns=timeline.critical_path_ns(),
        stages=tuple(stages),
        late_critical_objects=sum(load.objects for load in late),
        late_reconfigured_objects=sum(load.reconfigured for load in late),
        late_critical_bytes=sum(load.bytes for load in late),
        critical_lag_max_ns=max(lags, default=0),
        critical_lag_mean_ns=sum(lags) // max(1, len(lags)),
        setup_in_downtime_ns=timeline.in_downtime_ns(Resource.SETUP),
        send_blocked_ns=timeline.blocked_in_downtime_ns(),
    )


def with_bound(outcome: Outcome, bound: DowntimeBound) -> Outcome:
    """The same, with the bound of its scenario and protocol; only a completed migration has one."""
    if outcome.kind is not OutcomeKind.COMPLETED:
        return outcome
    return replace(outcome, bound_ns=bound.total_ns, bound_by=bound.resource)


def _lags(device: DeviceMeasured) -> list[int]:
    """For each reconfiguration during the migration, how long until all critical data of its epoch was loaded."""
    loads = [load for load in device.critical_loads if load.complete]
    lags = []
    for epoch, event_ns in enumerate(device.reconfigurations_ns, 2):  # the device starts in epoch 1
        loaded_ns = next((load.end_ns for load in loads if load.epoch >= epoch), None)
        if loaded_ns is not None:
            lags.append(loaded_ns - event_ns)
    return lags
