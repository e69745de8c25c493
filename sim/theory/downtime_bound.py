# SPDX-License-Identifier: GPL-2.0-or-later
"""A lower bound on a migration's downtime, from scenario and protocol alone.

Each resource needs a time for the work that is certain to come after the stop (sim.theory.work): work over capacity.
Before it comes the part of the stop that it cannot overlap with, after it what can only follow. The longest of these
sums is the bound. Everything else counts as free: what the guest dirtied, waiting for one another, the way of the first
and the last chunk. Each method of LowerBound is a lemma, with its reason in docs/theory.md.

It is a lower bound of every completed run if firmware.service_cv and host.spread_cv are 0. If not, it is one of the
mean over many seeds, as all factors have mean 1: a single run may be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proto_v3.wire.streams import Wire
from sim.scenario.protocol import AppliedScenario, Protocol
from sim.scenario.scenario import Scenario
from sim.theory.work import Costs, DeviceJob, Route, WorkAfterStop


@dataclass(frozen=True, slots=True)
class DowntimeBound:
    """The least downtime, and the resource that sets it."""

    total_ns: int
    resource: str
    by_resource_ns: dict[str, int]
    """The bound that each resource sets: firmware, copy, lock, link, load, ram, config."""


def lower_bound(applied: AppliedScenario) -> DowntimeBound:
    """The least downtime of a run that completes."""
    by_resource_ns = LowerBound(applied.scenario, applied.protocol).by_resource_ns()
    resource = max(by_resource_ns, key=by_resource_ns.__getitem__)
    return DowntimeBound(by_resource_ns[resource], resource, by_resource_ns)


def queue_ns(work: Iterable[tuple[float, float, float]]) -> float:
    """Lower bound (ns) on when a single server has finished all jobs and their followers.

    `work`: (release, tail, service) in ns. A job starts at its release or later, takes its service, and is followed by
    its tail, which needs no server. For any time t, the jobs released at t or later need t + their services + the least
    of their tails. Example: (0, 3, 7) and (10, 5, 1) need

        from 0 on    0 + (7 + 1) + min(3, 5) = 11
        from 10 on   10 + 1 + 5              = 16    the bound

    A job without service does not count.
    """
    bound_ns, services_ns, tail_ns = 0.0, 0.0, math.inf
    for release_ns, its_tail_ns, service_ns in sorted(work, reverse=True):
        if service_ns > 0:
            services_ns += service_ns
            tail_ns = min(tail_ns, its_tail_ns)
            alone_ns = release_ns + service_ns + its_tail_ns
            bound_ns = max(bound_ns, release_ns + services_ns + tail_ns, alone_ns)
    return bound_ns


class LowerBound:
    """The lemmas. Each method returns a lower bound on the downtime in ns, if its docstring says nothing else."""

    def __init__(self, scenario: Scenario, protocol: Protocol) -> None:
        self._scenario = scenario
        self._route = Route.of(scenario, protocol)
        self._costs = Costs(scenario, self._route)
        work = WorkAfterStop(scenario, self._route)
        self._ram_saved_ns = work.ram_saved_ns
        self._jobs = work.jobs

    def by_resource_ns(self) -> dict[str, int]:
        """The bound of each resource. If several are largest, the first one counts as the one that binds."""
        writers_ns = self.writers_ns()
        copy_more = self._writers_copy_more_than_they_load()
        bounds = {
            "firmware": max(self.save_slots_ns(), self.save_chain_ns(), self.save_and_read_ns()),
            "copy": max(self.read_threads_ns(), self.memory_ns(), writers_ns if copy_more else 0.0),
            "lock": self.lock_ns(),
            "link": max(self.link_ns(), self.connection_ns()),
            "load": max(self.load_slots_ns(), self.load_finish_ns(), 0.0 if copy_more else writers_ns),
            "ram": self.ram_ns(),
            "config": self.config_ns(),
        }
        return {resource: math.floor(bound) for resource, bound in bounds.items()}

    # --- firmware -----------------------------------------------------------------------------------------------------

    def save_slots_ns(self) -> float:
        """Lemma 1: the SAVEs of a PF's devices share the command slots of its firmware, and those of one device its."""
        firmware, save_ns = self._scenario.firmware, self._costs.save_ns
        return self._slots_ns(
            lambda job: (job.saved_from_ns, self._tail_ns(job), save_ns(job.whole)), firmware.engines_for_saves
        )

    def save_chain_ns(self) -> float:
        """Lemma 2: the SAVEs of one stream come one after the other."""
        save_ns = self._costs.save_ns
        return max(job.saved_from_ns + save_ns(job.chain) / job.readers + self._tail_ns(job) for job in self._jobs)

    def save_and_read_ns(self) -> float:
        """Lemma 3: what the driver's chunks cannot hold is saved only while a source thread reads."""
        return self._source_threads_ns(self._late_save_ns)

    # --- copies -------------------------------------------------------------------------------------------------------

    def read_threads_ns(self) -> float:
        """Lemma 4: a source thread does its read() calls and copies one after the other."""
        return self._source_threads_ns(lambda job: self._costs.read_ns(job.chain) / job.readers)

    def memory_ns(self) -> float:
        """Lemma 5: all copies at the source share the memory's bandwidth."""
        bytes_per_s = self._scenario.host.memory_bytes_per_s
        return self._shared_ns(lambda job: self._costs.moved_ns(job.whole, bytes_per_s))

    def lock_ns(self) -> float:
        """Lemma 6: one read() at a time, where several readers take one lock. 0 if each has its own."""
        costs = self._costs
        match self._scenario.driver.lock:
            case "global":
                return self._shared_ns(lambda job: costs.read_ns(job.whole))
            case "device":
                return max(job.read_from_ns + costs.read_ns(job.whole) + self._tail_ns(job) for job in self._jobs)
            case "per_fd" if self._route.blocks:
                return max(job.read_from_ns + costs.read_ns(job.chain) + self._tail_ns(job) for job in self._jobs)
            case _:
                return 0.0

    # --- link ---------------------------------------------------------------------------------------------------------

    def link_ns(self) -> float:
        """Lemma 7: all bytes share the link, or the shared connections if those are slower."""
        bytes_per_s = self._scenario.link.bytes_per_s
        if shared := self._shared_connections():
            bytes_per_s = min(bytes_per_s, shared * self._scenario.link.per_connection_bytes_per_s)
        return self._shared_ns(lambda job: self._costs.moved_ns(job.whole, bytes_per_s))

    def connection_ns(self) -> float:
        """Lemma 8: a stream with its own connection sends at that connection's rate. 0 if connections are shared."""
        return 0.0 if self._shared_connections() else self._source_threads_ns(self._sent_alone_ns)

    # --- load ---------------------------------------------------------------------------------------------------------

    def writers_ns(self) -> float:
        """Lemma 9: a target thread does its write() calls one after the other: copy, LOAD, set-up, end of the load."""
        threads = self._load_threads()
        of_thread = [
            queue_ns((*self._load_release_tail_ns(job), self._written_ns(job)) for job in jobs)
            for jobs in self._threads()
        ]
        shared = ((*self._load_release_tail_ns(job), self._written_ns(job) / threads) for job in self._jobs)
        return max(*of_thread, queue_ns(shared) if threads < math.inf else 0.0)

    def load_slots_ns(self) -> float:
        """Lemma 10: LOADs of a PF's devices, and the ends of their loads, share the command slots of its firmware."""
        load_ns = self._costs.load_ns
        return self._slots_ns(
            lambda job: (*self._load_release_tail_ns(job), load_ns(job.whole) + job.times.load_finish_ns),
            min(self._scenario.firmware.engines_for_loads, self._load_threads()),
        )

    def load_finish_ns(self) -> float:
        """Lemma 11: the ends of the loads share the slots, too, and each starts after its device's last record."""
        slots = min(self._scenario.firmware.engines_for_loads, self._load_threads())
        after_ns = self._costs.after_load_ns
        return self._per_pf_ns(
            lambda job: (self._loaded_alone_ns(job), after_ns(job), job.times.load_finish_ns / slots)
        )

    # --- the rest -----------------------------------------------------------------------------------------------------

    def ram_ns(self) -> float:
        """Lemma 12: the other devices are loaded after the last pass over RAM."""
        other_ns = self._scenario.vmm.other_load_ns
        return self._ram_saved_ns + self._costs.latency_ns + other_ns + self._costs.resume_ns()

    def config_ns(self) -> float:
        """Lemma 13: configs are loaded one at a time (or all at once), each after its device; that of other devices
        after RAM."""
        costs, jobs = self._costs, self._jobs
        loaded_ns = [self._loaded_alone_ns(job) + job.times.load_finish_ns for job in jobs]
        if self._route.single:
            return max(at + costs.after_load_ns(job) for at, job in zip(loaded_ns, jobs, strict=True))
        resume_ns = costs.resume_ns()
        configs = [(at, resume_ns, j.times.config_load_ns) for at, j in zip(loaded_ns, jobs, strict=True)]
        others = (self._ram_saved_ns + costs.latency_ns, resume_ns, self._scenario.vmm.other_load_ns)
        in_turn = [[*configs, others]] if not self._scenario.vmm.parallel_config else [[each] for each in configs]
        return max(max(at for at, _, _ in configs) + resume_ns, *map(queue_ns, in_turn))

    # --- what the lemmas are made of ----------------------------------------------------------------------------------

    def _threads(self) -> list[list[DeviceJob]]:
        """The jobs of each thread: with the single channel one thread does all, one after the other."""
        return [self._jobs] if self._route.single else [[job] for job in self._jobs]

    def _per_pf_ns(self, work: Callable[[DeviceJob], tuple[float, float, float]]) -> float:
        """Bound by a server of each physical function, which its devices share. `work` as in queue_ns()."""
        pfs = {job.device.pf for job in self._jobs}
        return max(queue_ns(work(job) for job in self._jobs if job.device.pf == pf) for pf in pfs)

    def _slots_ns(self, work: Callable[[DeviceJob], tuple[float, float, float]], slots: float) -> float:
        """Bound by commands that run at full speed, `slots` of a PF at once, and of one device no more than it may."""
        of_a_vf = self._scenario.firmware.engines_of_a_vf

        def alone_ns(job: DeviceJob) -> float:
            release_ns, tail_ns, service_ns = work(job)
            return queue_ns([(release_ns, tail_ns, service_ns / of_a_vf)])

        def shared_ns(job: DeviceJob) -> tuple[float, float, float]:
            release_ns, tail_ns, service_ns = work(job)
            return release_ns, tail_ns, service_ns / slots

        return max(self._per_pf_ns(shared_ns), *map(alone_ns, self._jobs))

    def _source_threads_ns(self, service_ns: Callable[[DeviceJob], float]) -> float:
        """Bound by the source's threads, each of which does its jobs one after the other once it may read."""
        return max(
            jobs[0].read_from_ns + sum(service_ns(job) for job in jobs) + min(self._tail_ns(job) for job in jobs)
            for jobs in self._threads()
        )

    def _shared_ns(self, service_ns: Callable[[DeviceJob], float]) -> float:
        """Bound by a server at the source that all devices share once they may be read."""
        return queue_ns((job.read_from_ns, self._tail_ns(job), service_ns(job)) for job in self._jobs)

    def _tail_ns(self, job: DeviceJob) -> float:
        """ns that follow a job's work at the source. If it has no work, at least the end of its load follows."""
        without_load_ns = 0 if job.whole.commands else self._costs.last_load_ns(job.device)
        return self._costs.after_read_ns(job) - without_load_ns

    def _late_save_ns(self, job: DeviceJob) -> float:
        """ns of SAVE that a reader waits for. A reader of blocks starts the SAVE, then copies."""
        costs = self._costs
        return (costs.save_ns(job.late) + (costs.read_ns(job.late) if self._route.blocks else 0.0)) / job.readers

    def _shared_connections(self) -> int:
        """Connections that the data of all devices shares; 0: each wire stream has its own."""
        v3, multifd = self._route.v3, self._route.multifd
        if multifd:
            return multifd.dedicated or multifd.channels
        if v3 is None or v3.wire is Wire.ONE:
            return 1
        return v3.pool_connections if v3.wire is Wire.POOL else 0

    def _sent_alone_ns(self, job: DeviceJob) -> float:
        """ns to send a job's chain, each reader on its own connection."""
        return self._costs.moved_ns(job.chain, self._scenario.link.per_connection_bytes_per_s) / job.readers

    def _writers_copy_more_than_they_load(self) -> bool:
        """Whether lemma 9 counts as copy: the writers spend more time in copies than in LOADs and set-up."""
        copying_ns = sum(self._costs.write_ns(job.chain) / job.readers for job in self._jobs)
        loading_ns = sum(self._costs.load_ns(job.chain) / job.readers + job.setup_ns for job in self._jobs)
        return copying_ns > loading_ns + sum(job.times.load_finish_ns for job in self._jobs)

    def _load_threads(self) -> float:
        """Devices that multifd loads at once; infinite if there is no such limit."""
        return (self._route.multifd and self._route.multifd.load_threads) or math.inf

    def _load_release_tail_ns(self, job: DeviceJob) -> tuple[int, int]:
        """When a job's first byte can be at the target, and what follows its load. Both in ns."""
        return job.read_from_ns + self._costs.latency_ns, self._costs.after_load_ns(job)

    def _written_ns(self, job: DeviceJob) -> float:
        """ns of a device's load in its threads: the chain's write() calls, and the end of the load."""
        return self._write_and_load_ns(job) + job.times.load_finish_ns

    def _write_and_load_ns(self, job: DeviceJob) -> float:
        """ns of a chain's write() calls on its threads. In v3, data that waits for an epoch may be copied before."""
        write_ns = self._costs.write_ns(job.chain) / job.readers
        load_ns = self._costs.load_ns(job.chain) / job.readers
        return load_ns + (max(job.setup_ns, write_ns) if self._route.v3 else job.setup_ns + write_ns)

    def _loaded_alone_ns(self, job: DeviceJob) -> float:
        """The earliest time (ns) at which a device's last record is loaded, if it were the only device."""
        costs = self._costs
        read_ns = job.read_from_ns + max(
            self._late_save_ns(job),
            costs.read_ns(job.chain) / job.readers,
            0.0 if self._shared_connections() else self._sent_alone_ns(job),
        )
        saved_ns = job.saved_from_ns + costs.save_ns(job.chain) / job.readers
        last_ns = costs.last_load_ns(job.device) if job.whole.commands else 0.0
        arrived_ns = max(read_ns, saved_ns) + costs.latency_ns + last_ns
        return max(arrived_ns, job.read_from_ns + costs.latency_ns + self._write_and_load_ns(job))
