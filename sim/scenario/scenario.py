# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios: TOML files, validated, with units in the key names.

Every assumption of the model is a key here, none is a constant in the code. `[sources]` gives, by key, the source of
its value: `published`, `measured`, `bounded` (by a measurement), `kernel`, `qemu`, `fitted`, `derived`, `assumed` or
`yours`, a colon, and the words. `[ranges]`
gives, by key, which other values are plausible, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from proto_v3.vmm.multifd import Multifd
from proto_v3.vmm.switchover import SwitchoverSettings
from proto_v3.vmm.v2 import Ack, V2Options
from proto_v3.vmm.v3 import V3Options
from proto_v3.wire.streams import Credits, Wire
from sim.scenario import ranges, screening, toml
from sim.scenario.device import MAX_BLOCKS, MAX_WRITES, Device
from sim.scenario.ranges import Range
from sim.scenario.tables import NO_FIGURES, V3, Driver, Firmware, Host, Link, Published, Ram, Vmm
from sim.scenario.units import BYTES_PER_S_PER_GBIT, KIB, MIB, NS_PER_MS, NS_PER_S, Table, Text, did_you_mean, ns, short

MAX_DEVICES = 64
MAX_NAME = 64
MAX_PUBLISHED = 1000
NO_PARAMETERS = ("name", "description", "published", "sources", "ranges")
"""Fields of a scenario that change nothing in a run."""
SOURCE_KINDS = ("published", "measured", "bounded", "kernel", "qemu", "fitted", "derived", "assumed", "yours")


class Scenario(Table):
    """All inputs of a run, except the protocol and the seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=MAX_NAME)]
    description: Text
    ram: Ram
    device: Annotated[list[Device], Field(min_length=1, max_length=MAX_DEVICES)]
    firmware: Firmware
    driver: Driver
    host: Host
    link: Link
    vmm: Vmm
    v3: V3 = V3()
    published: Annotated[list[Published], Field(max_length=MAX_PUBLISHED)] = []
    sources: dict[str, Text] = {}
    ranges: dict[str, Range] = {}

    @model_validator(mode="after")
    def _rules(self) -> Self:
        """Those that tables have with one another; a rule of one table stands there."""
        for rule in RULES:
            for problem in rule(self):
                raise ValueError(problem)
        return self

    def to_json(self) -> str:
        """What is set, as JSON that Scenario.model_validate_json() reads."""
        return self.model_dump_json(exclude_unset=True)

    @property
    def devices(self) -> list[Device]:
        """One entry a device, `count` unfolded; names get a number where there are several alike."""
        unfolded = []
        for device in self.device:
            if device.count == 1:
                unfolded.append(device)
            else:
                unfolded += [device.model_copy(update={"name": f"{device.name}{i}"}) for i in range(device.count)]
        return unfolded

    @property
    def horizon_ns(self) -> int:
        """How far ahead the guest's activity is generated: a migration that lasts longer is given up."""
        return round((self.vmm.give_up_s + 1) * NS_PER_S) + ns(self.vmm.vcpu_stop_ms + self.vmm.setup_ms)

    def switchover_settings(self) -> SwitchoverSettings:
        """The VMM's settings, in nanoseconds and bytes."""
        vmm = self.vmm
        given, most = vmm.bandwidth_gbit_per_s, vmm.max_bandwidth_mib_per_s
        return SwitchoverSettings(
            downtime_limit_ns=vmm.downtime_limit_ns,
            bandwidth_window_ns=vmm.bandwidth_window_ns,
            idle_round_ns=vmm.decision_interval_ns,
            precopy_idle_ns=vmm.precopy_idle_ns,
            decision_interval_ns=self.v3.decision_interval_ns,
            give_up_ns=vmm.give_up_ns,
            force_ns=None if vmm.force_after_s is None else round(vmm.force_after_s * NS_PER_S),
            downtime_steps=tuple((round(each.after_s * NS_PER_S), ns(each.limit_ms)) for each in vmm.downtime_steps),
            read_bytes=vmm.read_bytes,
            reads_at_once=screening.reads_at_once(self),
            write_bytes=vmm.write_bytes,
            ram_budget_ns=vmm.ram_budget_ns,
            cancel_ns=None if vmm.cancel_after_s is None else round(vmm.cancel_after_s * NS_PER_S),
            given_bandwidth_bytes_per_s=None if given is None else given * BYTES_PER_S_PER_GBIT,
            parallel_stop=vmm.parallel_stop,
            parallel_config=vmm.parallel_config,
            by_parts=None if vmm.stop_rule is None else vmm.stop_rule == "parts",
            max_bandwidth_bytes_per_s=None if most is None else most * MIB,
        )

    def v2_options(self) -> V2Options:
        """How the VMM uses v2."""
        vmm = self.vmm
        multifd = Multifd(
            channels=vmm.multifd_channels,
            device_state=vmm.multifd_device_state,
            dedicated=vmm.multifd_dedicated if vmm.multifd_device_state else 0,
            coupled=vmm.multifd_load == "channel_threads",
            load_threads=vmm.multifd_load_threads,
            max_queued_bytes=None if vmm.multifd_max_queued_mib is None else round(vmm.multifd_max_queued_mib * MIB),
            precopy=vmm.precopy_threads and vmm.multifd_device_state,
            copies=vmm.multifd_copy_gib_per_s is not None,
        )
        return V2Options(
            reinit=vmm.reinit,
            ack=Ack(vmm.switchover_ack),
            polls=vmm.precopy_user == "polls",
            multifd=multifd if vmm.multifd else None,
            max_retries=vmm.max_retries if vmm.late_reinit == "retry" else 0,
            early_save=vmm.early_save,
            precopy_threads=vmm.precopy_threads,
        )

    def v3_options(self) -> V3Options:
        """How the VMM uses v3."""
        v3, multifd = self.v3, self.v2_options().multifd
        return V3Options(
            wire_streams=v3.dirty_streams,
            blocks=v3.blocks,
            wire=Wire(v3.wire),
            pool_connections=v3.pool_connections,
            credits=Credits(v3.critical_credit_bytes, v3.dirty_credit_bytes),
            max_retries=v3.max_retries if v3.late_epoch == "retry" else 0,
            force_after_ns=v3.force_after_ns,
            multifd=replace(multifd, device_state=False, dedicated=0) if multifd else None,
        )


# --- rules between tables: each yields its problems, by the dotted key ------------------------------------------------


def _devices(scenario: Scenario) -> Iterator[str]:
    names = [device.name for device in scenario.device]
    if len(set(names)) != len(names):
        yield f"device.name = {names}: must differ from table to table; count makes several alike"
    unfolded = [device.name for device in scenario.devices]
    if len(set(unfolded)) != len(unfolded):
        yield f"device.name = {names}: must differ also where count adds a number: {unfolded}"
    if len(unfolded) > MAX_DEVICES:
        yield f"device.count: makes {len(unfolded)} devices; must make at most {MAX_DEVICES}"


def _blocks_in_chunks(scenario: Scenario) -> Iterator[str]:
    chunk_bytes = scenario.driver.chunk_bytes
    for at, device in enumerate(scenario.device):
        if chunk_bytes % device.block_bytes:
            key = f"device.{at}.block_kib"
            yield f"{key} = {device.block_kib}: must divide driver.chunk_mib, {chunk_bytes // KIB} KiB"


def _size_of_a_run(scenario: Scenario) -> Iterator[str]:
    for at, device in enumerate(scenario.device):
        if device.reconfigurations and device.reconfigurations.poisson_per_s * scenario.vmm.give_up_s > 1e6:
            key = f"device.{at}.reconfigurations.poisson_per_s"
            rate = device.reconfigurations.poisson_per_s
            yield f"{key} = {rate:g}: must make at most 1e6 events within vmm.give_up_s"
    blocks = sum(device.blocks for device in scenario.devices)
    if blocks > MAX_BLOCKS:
        yield f"device.block_kib: makes {blocks} blocks in all; must make at most {MAX_BLOCKS}"
    writes = 0.0
    for at, device in enumerate(scenario.device):
        if device.writes is not None:
            writes += device.count * device.writes.bytes_per_s / device.block_bytes * scenario.vmm.give_up_s
            if writes > MAX_WRITES:
                yield (
                    f"device.{at}.writes.mib_per_s = {device.writes.mib_per_s:g}: makes {writes:.3g} writes within "
                    f"vmm.give_up_s; must make at most {MAX_WRITES:.3g}: take larger blocks or give up earlier"
                )


def _published_values(scenario: Scenario) -> Iterator[str]:
    count = len(scenario.devices)
    for at, published in enumerate(scenario.published):
        for key, value in published:
            if isinstance(value, list) and key not in NO_FIGURES and len(value) not in (0, count):
                yield f"published.{at}.{key} = {value}: must have one value a device, {count}"


def room_for_a_read(scenario: Scenario) -> Iterator[str]:
    """What is smaller than one read and may not be. Credits are used where streams share connections only."""
    read_mib, v3 = scenario.vmm.read_mib, scenario.v3
    rooms_mib = {"link.socket_buffer_mib": scenario.link.socket_buffer_mib}
    if v3.wire != "streams":
        rooms_mib |= {"v3.critical_credit_mib": v3.critical_credit_mib, "v3.dirty_credit_mib": v3.dirty_credit_mib}
    for key, room_mib in rooms_mib.items():
        if room_mib < read_mib:
            yield f"{key} = {room_mib:g}: must be at least one read, vmm.read_mib = {read_mib:g}"


def _end_of_a_load(scenario: Scenario) -> Iterator[str]:
    driver, firmware = scenario.driver, scenario.firmware
    if driver.precopy == "reread":
        for at, device in enumerate(scenario.device):
            most_ns = firmware.load_finish_ns + device.vectors * firmware.load_finish_ns_per_vector
            if driver.finish_again_ns > most_ns:
                yield (
                    f"driver.finish_again_ms = {driver.finish_again_ms:g}: must be at most what the end of a load "
                    f"takes the first time, {most_ns / NS_PER_MS:g} ms for device.{at} (firmware.load_finish_ms and "
                    "what grows with vectors)"
                )


def _not_set(scenario: Scenario, key: str) -> str:
    """What to do about a key that has a source or a range, and that the file does not set."""
    try:
        value = value_at(scenario, key)
    except KeyError:
        return did_you_mean(key, parameters(scenario))
    if key in NO_PARAMETERS or isinstance(value, (list, Table)):
        return did_you_mean(key, parameters(scenario))
    left_out = "" if value is None else f", which is {str(value).lower()} if it is left out"
    return f"; set {key} too{left_out}"


def _source_of_each_key(scenario: Scenario) -> Iterator[str]:
    known = set(parameters(scenario)) if scenario.sources else set()
    for key, source in scenario.sources.items():
        if key not in known:
            yield f"sources.{key} = {short(source)}: must be a key that the file sets{_not_set(scenario, key)}"
        kind, colon, _ = source.partition(":")
        if not colon or kind not in SOURCE_KINDS:
            yield f"sources.{key} = {short(source)}: must begin with {', '.join(SOURCE_KINDS)}, and a colon"


def _range_of_each_key(scenario: Scenario) -> Iterator[str]:
    if scenario.ranges:
        yield from ranges.problems(scenario.ranges, parameters(scenario), lambda key: _not_set(scenario, key))


RULES: tuple[Callable[[Scenario], Iterator[str]], ...] = (
    _devices,
    _blocks_in_chunks,
    _size_of_a_run,
    _published_values,
    room_for_a_read,
    _end_of_a_load,
    _source_of_each_key,
    _range_of_each_key,
)


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters(scenario: Scenario) -> dict[str, Any]:
    """The model's parameters that the file sets, as dotted keys (`device.0.state_mib`)."""
    tables = scenario.model_dump(exclude_unset=True, exclude=set(NO_PARAMETERS))
    return {key: value for key, _, value in toml.differences({}, tables) if value != {}}


def value_at(scenario: Scenario, key: str) -> Any:
    """The value of a parameter by its dotted key, defaults included. KeyError if there is no such parameter."""
    place: Any = scenario
    for part in key.split("."):
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, Table) and part in type(place).model_fields:
            place = getattr(place, part)
        else:
            raise KeyError(key)
    return place
