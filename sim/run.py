"""A run: scenario + protocol + seed -> outcome, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from proto_v3.channel import Channel
from proto_v3.errors import PeerFailedError, ProtoV3Error, leaves
from proto_v3.migration import OutcomeKind, Side, Source, Target, UnsupportedError
from proto_v3.negotiate import negotiated_source, negotiated_target
from proto_v3.timeline import Mark, Resource, Stage, Timeline, on_track
from proto_v3.v2 import V2Source, V2Target
from sim import clock
from sim.device import DeviceState, Image
from sim.driver import SimDriver
from sim.firmware import FirmwareModel
from sim.guest import make_activity
from sim.link import ClosedError, NetworkLink
from sim.machine import MachineModel
from sim.protocol import Protocol
from sim.resource import Lock, Memory
from sim.scenario import Scenario
from sim.schema import GIB
from sim.sections import Device
from sim.stream import Surroundings

T = TypeVar("T")

PEER_ENDS_WITHIN_S = 10.0
"""Virtual seconds that a side has to end after the other failed and told it."""


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
    device_bytes_vain: int = 0
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
    late_looks: int = 0
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


def simulate(
    scenario: Scenario, protocol: Protocol, seed: int, *, keep: Callable[[Timeline], None] | None = None
) -> Outcome:
    """Run one migration to its end. `keep` is handed the timeline, for what an outcome does not tell."""
    return clock.run(_Run(protocol.applied(scenario), protocol, seed, keep).outcome())


class _Host:
    """One of the two hosts: firmware, memory, the driver's global lock."""

    def __init__(self, scenario: Scenario, seed: np.random.SeedSequence, timeline: Timeline) -> None:
        self.timeline = timeline
        pfs = sorted({device.pf for device in scenario.devices})
        self._firmware = {
            pf: FirmwareModel(scenario.firmware, np.random.default_rng(child), timeline)
            for pf, child in zip(pfs, seed.spawn(len(pfs)), strict=True)
        }
        self._memory = Memory(scenario.host.copy_gib_per_s * GIB, scenario.host.memory_gib_per_s * GIB, timeline)
        self._call_ns = round(scenario.driver.call_us * 1_000)
        self.global_lock = Lock(timeline)

    def around(self, pf: int) -> Surroundings:
        return Surroundings(self._firmware[pf], self._memory, self.timeline, self._call_ns)


class _Run:
    def __init__(
        self, scenario: Scenario, protocol: Protocol, seed: int, keep: Callable[[Timeline], None] | None
    ) -> None:
        self._scenario = scenario
        self._protocol = protocol
        self._seed = seed
        self._keep = keep

    async def outcome(self) -> Outcome:
        scenario = self._scenario
        self.timeline = timeline = Timeline(clock.now_ns)
        guest_seed, source_seed, target_seed = np.random.SeedSequence(self._seed).spawn(3)
        here, there = _Host(scenario, source_seed, timeline), _Host(scenario, target_seed, timeline)
        seeds = guest_seed.spawn(len(scenario.devices))
        self.states = [
            DeviceState(device, make_activity(device, scenario.horizon_ns, np.random.default_rng(child)))
            for device, child in zip(scenario.devices, seeds, strict=True)
        ]
        self.images = [Image(device) for device in scenario.devices]
        self.drivers = [
            SimDriver(device, scenario.driver, here.around(device.pf), here.global_lock, state=state)
            for device, state in zip(scenario.devices, self.states, strict=True)
        ]
        self.drivers_at_target = [
            SimDriver(self._at_target(device), scenario.driver, there.around(device.pf), there.global_lock, image=image)
            for device, image in zip(scenario.devices, self.images, strict=True)
        ]
        settings = scenario.switchover_settings()
        self.machines = {
            "source": MachineModel(scenario, self.states, timeline, running=True),
            "target": MachineModel(scenario, [], timeline, running=False),
        }
        source_side = Side(self.machines["source"], self.drivers, settings, timeline)
        target_side = Side(self.machines["target"], self.drivers_at_target, settings, timeline)
        self.channels, channels_there = self._connect(timeline)
        self.source: Source | None = None
        self.target: Target | None = None
        self.note = ""
        outcome, failures = await self._both(
            self._run_source(source_side, self.channels), self._run_target(target_side, channels_there)
        )
        if self._keep is not None:
            self._keep(timeline)
        if outcome is OutcomeKind.COMPLETED and not failures:
            return self._completed()
        if failures:
            return self._failed(failures)
        assert outcome is not None
        return self._ended(outcome)

    def _at_target(self, device: Device) -> Device:
        """The target's device: the same, but for how many streams it may have."""
        most = self._scenario.v3.target_max_dirty_streams
        return device if most is None else device.model_copy(update={"max_dirty_streams": most})

    async def _run_source(self, side: Side, channels: Sequence[Channel]) -> OutcomeKind:
        v2 = self._scenario.v2_options()
        if self._protocol.version == 3:
            self.source, self.note = await negotiated_source(side, channels, self._scenario.v3_options(), v2)
        else:
            self.source = V2Source(side, channels, v2)
        return await self.source.run()

    async def _run_target(self, side: Side, channels: Sequence[Channel]) -> bool:
        v2 = self._scenario.v2_options()
        if self._protocol.version == 3:
            v3 = self._scenario.v3_options() if self._scenario.v3.target_knows == "v3" else None
            self.target = await negotiated_target(side, channels, v3, v2)
        else:
            self.target = V2Target(side, channels, v2)
        return self.target is not None and await self.target.run()

    async def _both(
        self, source: Coroutine[Any, Any, OutcomeKind], target: Coroutine[Any, Any, bool]
    ) -> tuple[OutcomeKind | None, list[Exception]]:
        """Run both sides to their ends: how it ended, and what failed on the way. Bugs are raised."""
        tasks = [
            asyncio.create_task(on_own_track(source, "source"), name="source"),
            asyncio.create_task(on_own_track(target, "target"), name="target"),
        ]
        _, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if left:  # one failed, told the other, and is gone; the other then ends by itself, or is lost
            self.link.close()
            _, left = await asyncio.wait(left, timeout=PEER_ENDS_WITHIN_S)
        for task in left:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [leaf for result in results if isinstance(result, BaseException) for leaf in leaves(result)]
        for failure in failures:
            if not isinstance(failure, (OSError, ProtoV3Error, asyncio.CancelledError)):
                raise failure
        sent = results[0]
        return sent if isinstance(sent, OutcomeKind) else None, [f for f in failures if isinstance(f, Exception)]

    def _connect(self, timeline: Timeline) -> tuple[list[Channel], list[Channel]]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, clock.VirtualLoop)
        self.link = link = NetworkLink(self._scenario.link, loop, timeline)
        count = self._scenario.v2_options().channels
        if self._protocol.version == 3:
            needed = self._scenario.v3_options().connections(len(self._scenario.devices))
            count = max(count, needed) if self._scenario.v3.target_knows == "v2" else needed
        ends = [link.connect(f"connection {i}") for i in range(count)]
        self.channels_there = [Channel(there) for _, there in ends]
        return [Channel(here) for here, _ in ends], self.channels_there

    def _ended(self, kind: OutcomeKind, reason: str = "") -> Outcome:
        reads = [counts for driver in self.drivers for counts in driver.read_counts]
        device_bytes = sum(counts.bytes for counts in reads)
        needed = sum(
            len(state.version) * state.block_bytes + len(state.object_version) * state.object_bytes
            for state in self.states
        )
        return Outcome(
            scenario=self._scenario.name,
            protocol=self._protocol.name,
            seed=self._seed,
            kind=kind,
            reason=reason,
            total_ns=clock.now_ns(),
            wire_bytes=sum(channel.bytes_sent for channel in self.channels),
            device_bytes=device_bytes,
            device_bytes_resent=max(0, device_bytes - needed) if kind is OutcomeKind.COMPLETED else 0,
            reads=sum(counts.calls for counts in reads),
            read_firmware_ns=sum(counts.firmware_ns for counts in reads),
            read_lock_ns=sum(counts.lock_ns for counts in reads),
            read_copy_ns=sum(counts.copy_ns for counts in reads),
            device_bytes_dropped=sum(counts.dropped_bytes for counts in reads),
            device_bytes_vain=sum(
                counts.overtaken_bytes + counts.undone_bytes + counts.stale_bytes
                for driver in self.drivers_at_target
                for counts in driver.load_counts
            ),
            peak_reorder_bytes=self.target.peak_reorder_bytes if self.target else 0,
            peak_held_bytes=max(
                (counts.peak_held_bytes for driver in self.drivers_at_target for counts in driver.load_counts),
                default=0,
            ),
            note=self.note,
            retries=self.source.retries if self.source else 0,
            late_looks=self.source.late_looks if self.source else 0,
            retries_stopped_ns=self.source.retries_stopped_ns if self.source else 0,
            connections=self.link.connections,
            messages=sum(channel.messages_sent for channel in (*self.channels, *self.channels_there)),
            wakeups=self.link.wakeups + sum(counts.wakeups for counts in reads),
            guest_runs_at=", ".join(side for side, machine in self.machines.items() if machine.running),
            digest=self.timeline.digest(),
        )

    def _failed(self, failures: Sequence[Exception]) -> Outcome:
        unsupported = next((cause for cause in failures if isinstance(cause, UnsupportedError)), None)
        if unsupported is not None:
            return self._ended(OutcomeKind.UNSUPPORTED, str(unsupported))
        told = [cause for cause in failures if not isinstance(cause, (PeerFailedError, ClosedError))] or failures
        return self._ended(OutcomeKind.FAILED, "; ".join(dict.fromkeys(str(cause) for cause in told)))

    def _completed(self) -> Outcome:
        """Check the target's devices against the source's; a run that differs is a failure, whatever its speed."""
        pairs = zip(self._scenario.devices, self.images, self.states, strict=True)
        wrong = [f"{spec.name}: {image.differences(state)}" for spec, image, state in pairs if image.differences(state)]
        if wrong:
            return self._ended(OutcomeKind.FAILED, f"the target's state differs from the source's: {'; '.join(wrong)}")
        timeline = self.timeline
        marks = timeline.marks
        stages = [
            *timeline.stages,
            Stage("saved_to_loaded", 0, marks[Mark.DRAINED], marks[Mark.CONFIGURED]),
            Stage("announce_and_start", 0, marks[Mark.CONFIGURED], marks[Mark.RESUMED]),
        ]
        lags = [
            lag
            for state, driver in zip(self.states, self.drivers_at_target, strict=True)
            for lag in _lags(state, driver)
        ]
        late = [
            load
            for driver in self.drivers_at_target
            for load in driver.critical_loads
            if load.end_ns > marks[Mark.STOP_ORDERED]
        ]
        return replace(
            self._ended(OutcomeKind.COMPLETED),
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


def _lags(state: DeviceState, driver: SimDriver) -> list[int]:
    """For each reconfiguration during the migration, how long until all critical data of its epoch was loaded."""
    loads = [load for load in driver.critical_loads if load.complete]
    lags = []
    for at, event_ns in enumerate(state.activity.reconfiguration_ns[: state.epoch - 1]):
        epoch = at + 2  # the device starts in epoch 1
        loaded_ns = next((load.end_ns for load in loads if load.epoch >= epoch), None)
        if loaded_ns is not None:
            lags.append(loaded_ns - int(event_ns))
    return lags


async def on_own_track(work: Coroutine[Any, Any, T], track: str) -> T:
    """A task's spans on a track of its name."""
    on_track(track)
    return await work
