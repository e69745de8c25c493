"""A run: scenario + protocol + seed -> outcome, in virtual time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from proto_v3.channel import Channel
from proto_v3.errors import ProtoV3Error, UserError
from proto_v3.migration import OutcomeKind, Side, Source, Target, UnsupportedError
from proto_v3.timeline import Join, Mark, Resource, Stage, Timeline
from proto_v3.v2 import V2Source, V2Target
from proto_v3.v3 import V3Source, V3Target, channels_needed
from sim import clock
from sim.device import DeviceState, Image
from sim.driver import SimDriver
from sim.firmware import FirmwareModel
from sim.guest import make_activity
from sim.link import NetworkLink
from sim.machine import MachineModel
from sim.resource import Lock, Memory
from sim.scenario import GIB, Scenario
from sim.stream import Surroundings


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol by its name: `v2`, or `v3-nN` with N dirty streams a device."""

    name: str
    dirty_streams: int
    """0 for v2."""

    @classmethod
    def parse(cls, name: str, scenario: Scenario) -> Protocol:
        """UserError for a name that is none."""
        if name == "v2":
            return cls("v2", 0)
        if name == "v3":
            return cls(f"v3-n{scenario.v3.dirty_streams}", scenario.v3.dirty_streams)
        match = re.fullmatch(r"v3-n([1-9][0-9]?)", name)
        if match is None or int(match[1]) > 64:
            raise UserError(
                f"unknown protocol {name!r}; there are v2, v3, and v3-n1 to v3-n64 (dirty streams a device)"
            )
        return cls(name, int(match[1]))


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
    setup_in_downtime_ns: int = 0
    """Set-up of critical objects that fell into the downtime, on the critical path or beside it."""
    send_blocked_ns: int = 0
    """How long sends were held up by full connections in the downtime, summed over connections."""
    wire_bytes: int = 0
    device_bytes: int = 0
    device_bytes_resent: int = 0
    """Read from the devices beyond one copy of their state: what was dirtied again, and the records' headers."""
    reads: int = 0
    read_firmware_ns: int = 0
    read_lock_ns: int = 0
    read_copy_ns: int = 0
    digest: str = ""


def simulate(
    scenario: Scenario, protocol: Protocol, seed: int, *, keep: Callable[[Timeline], None] | None = None
) -> Outcome:
    """Run one migration to its end. `keep` is handed the timeline, for what an outcome does not tell."""
    return clock.run(_Run(scenario, protocol, seed, keep).outcome())


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
        at_target = [
            SimDriver(device, scenario.driver, there.around(device.pf), there.global_lock, image=image)
            for device, image in zip(scenario.devices, self.images, strict=True)
        ]
        settings = scenario.switchover_settings()
        source_side = Side(MachineModel(scenario, self.states, timeline), self.drivers, settings, timeline)
        target_side = Side(MachineModel(scenario, [], timeline), at_target, settings, timeline)
        self.channels, channels_there = self._connect(timeline)
        source, target = self._protocol_pair(source_side, target_side, channels_there)
        try:
            async with Join() as both:
                sending = both.start(source.run(), "source")
                both.start(target.run(), "target")
        except ExceptionGroup as failures:
            _, bugs = failures.split((OSError, ProtoV3Error))
            if bugs is not None:
                raise
            return self._failed(failures)
        finally:
            if self._keep is not None:
                self._keep(timeline)
        return self._completed() if sending.result() is OutcomeKind.COMPLETED else self._ended(sending.result())

    def _connect(self, timeline: Timeline) -> tuple[list[Channel], list[Channel]]:
        protocol = self._protocol
        loop = asyncio.get_running_loop()
        assert isinstance(loop, clock.VirtualLoop)
        link = NetworkLink(self._scenario.link, loop, timeline)
        count = channels_needed(len(self._scenario.devices), protocol.dirty_streams) if protocol.dirty_streams else 1
        ends = [link.connect(f"connection {i}") for i in range(count)]
        return [Channel(here) for here, _ in ends], [Channel(there) for _, there in ends]

    def _protocol_pair(self, here: Side, there: Side, channels_there: Sequence[Channel]) -> tuple[Source, Target]:
        streams = self._protocol.dirty_streams
        if streams:
            return V3Source(here, self.channels, streams), V3Target(there, channels_there, streams)
        return V2Source(here, self.channels), V2Target(there, channels_there)

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
            digest=self.timeline.digest(),
        )

    def _failed(self, failures: ExceptionGroup[Exception]) -> Outcome:
        causes = list(_leaves(failures))
        unsupported = next((cause for cause in causes if isinstance(cause, UnsupportedError)), None)
        if unsupported is not None:
            return self._ended(OutcomeKind.UNSUPPORTED, str(unsupported))
        return self._ended(OutcomeKind.FAILED, "; ".join(str(cause) for cause in causes))

    def _completed(self) -> Outcome:
        """Check the target's devices against the source's; a run that differs is a failure, whatever its speed."""
        pairs = zip(self._scenario.devices, self.images, self.states, strict=True)
        wrong = [f"{spec.name}: {image.differences(state)}" for spec, image, state in pairs if image.differences(state)]
        if wrong:
            return self._ended(OutcomeKind.FAILED, f"the target's state differs from the source's: {'; '.join(wrong)}")
        timeline = self.timeline
        return replace(
            self._ended(OutcomeKind.COMPLETED),
            downtime_ns=timeline.downtime_ns,
            total_ns=timeline.marks[Mark.RESUMED],
            phases_ns=timeline.phases_ns(),
            critical_path_ns=timeline.critical_path_ns(),
            stages=tuple(timeline.stages),
            setup_in_downtime_ns=timeline.in_downtime_ns(Resource.SETUP),
            send_blocked_ns=timeline.blocked_in_downtime_ns(),
        )


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
