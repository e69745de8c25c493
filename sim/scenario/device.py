# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of a scenario file below `[[device]]`, each with its rules. Units stand in the key names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from proto_v3.vfio.fsm import FEATURE_SETS, arcs
from proto_v3.vfio.uapi import MAX_DIRTY_STREAMS, MigrationFlags
from sim.scenario.units import KIB, MIB, Fraction, NonNegative, Rate, Table, Whole

MAX_BLOCKS = 1 << 24
MAX_WRITES = 1 << 26
"""Blocks and writes are NumPy arrays; more than these would not fit the memory that a run is meant to take."""
MAX_VECTORS = 2048
"""What MSI-X has at the most (PCI)."""
MAX_FAULTS = 256
MAX_TIMES = 100_000
"""Entries of `faults`, and of each list of times, of one device."""
Times = Annotated[list[NonNegative], Field(max_length=MAX_TIMES)]
ARCS = sorted({f"{a.name} -> {b.name}" for features in FEATURE_SETS for a, b in arcs(features)})
"""Every step that some device takes at once; one without P2P goes from RUNNING to STOP."""


class Writes(Table):
    """What the guest dirties in a device's state, as bytes a second in whole blocks.

    `hotspot`: `hot_share` of the writes go to the first `hot_fraction` of the blocks, the others to all blocks alike.
    """

    pattern: Literal["uniform", "hotspot", "sequential"] = "uniform"
    """Where they go: anywhere, mostly to a hot part, or from the first block to the last, again and again."""
    mib_per_s: NonNegative
    """0: nobody writes to the device, whatever the file that this one extends says."""
    hot_share: Fraction = 0.9
    """Share of the writes that go to the hot part."""
    hot_fraction: Fraction = 0.1
    """The hot part, as a share of the blocks."""

    bytes_per_s = Rate("mib_per_s")

    @model_validator(mode="after")
    def _keys_of_pattern(self) -> Self:
        if self.pattern != "hotspot" and {"hot_share", "hot_fraction"} & self.model_fields_set:
            raise self.wrong("pattern", 'hot_share and hot_fraction go with "hotspot" only')
        return self


class Reconfigurations(Table):
    """When the guest reconfigures the device, which makes critical objects new."""

    at_s: Times = []
    """Times after the start."""
    poisson_per_s: NonNegative = 0.0
    """Instead of times: a rate of random ones."""
    during_stop_ms: Times = []
    """Times after the order to stop the vCPUs, while they still run: the VMM has decided, and asks no more."""
    objects_each: Annotated[int, Field(ge=1)] = 1
    """Critical objects that one reconfiguration makes new."""
    during_stops: Annotated[int, Field(ge=1)] = 1
    """Number of orders to stop, from the first one, to which `during_stop_ms` applies. v3's `retry` makes several."""
    invalidates_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the device's blocks, in one range, whose earlier dirty data a reconfiguration makes invalid. Only with
    driver.epochs = "invalidate"."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.at_s and self.poisson_per_s:
            raise self.wrong("poisson_per_s", "must be left out where at_s gives the times")
        return self


class Critical(Table):
    """The objects that the target must set up before the device can run: queues, contexts, memory."""

    objects: Annotated[int, Field(ge=0, le=1_000_000)]
    """Their number."""
    object_kib: Annotated[float, Field(ge=1 / KIB, le=1 << 30)]
    """The size of each."""
    setup_us: NonNegative
    """What the target takes to set one up."""
    setup_again_us: NonNegative = 0.0
    """What it takes for one that is set up, and comes again unchanged: from a driver that rereads, or because firmware
    refused a SAVE in pre-copy."""

    object_bytes = Whole("object_kib")
    setup_ns = Whole("setup_us")
    setup_again_ns = Whole("setup_again_us")


class Fault(Table):
    """A fault. An arc of the state machine fails: SET_STATE returns `errno`, and the device stays as `leaves` says."""

    side: Literal["source", "target"]
    """Where it happens."""
    arc: Annotated[str, Field(pattern=r"^[A-Z0-9_]+ -> [A-Z0-9_]+$")] | None = None
    """Of the state machine, as in `RUNNING_P2P -> STOP`."""
    command: Literal["SAVE", "LOAD"] | None = None
    """Instead of an arc: a firmware command fails, and with it its session. A SAVE in pre-copy that fails with EINVAL
    is refused: the session goes on, and the whole image comes when the device is stopped (mlx5). With `precopy = check`
    the check is the target's first LOAD."""
    after: Annotated[int, Field(ge=0)] | None = None
    """Number of these commands that succeed before."""
    errno: Literal["EIO", "EINVAL", "ENOMEM", "ENODEV", "ETIMEDOUT", "EBUSY"] = "EIO"
    """What the call returns."""
    leaves: Literal["before", "ERROR"] = "before"
    """In the state before the arc; or in ERROR, which only a reset leaves (vfio.h)."""
    times: Annotated[int, Field(ge=1)] = 1
    """Number of failures; then it works."""

    @model_validator(mode="after")
    def _an_arc(self) -> Self:
        if (self.arc is None) is (self.command is None):
            raise ValueError("arc, command: must be one of the two, not both and not neither")
        if self.arc is not None and self.arc not in ARCS:
            raise ValueError(f"arc = {self.arc!r}: must be one of {', '.join(ARCS)}")
        if self.arc is not None and self.after is not None:
            raise self.wrong("after", "goes with command only")
        if self.command is not None and self.leaves != "before":
            raise self.wrong("leaves", "goes with arc only")
        if (self.command, self.side) in (("SAVE", "target"), ("LOAD", "source")):
            raise self.wrong("command", "must be SAVE at the source, LOAD at the target")
        return self


class Device(Table):
    """One VFIO device, or `count` like it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]
    """What tables and traces call it."""
    count: Annotated[int, Field(ge=1, le=64)] = 1
    """So many devices alike; names get a number."""
    pf: Annotated[int, Field(ge=0, le=63)] = 0
    """The number of its physical function: devices with the same one share its firmware."""
    features: Annotated[list[Literal["STOP_COPY", "P2P", "PRE_COPY"]], Field(max_length=3)]
    """VFIO_DEVICE_FEATURE_MIGRATION's flags."""
    max_dirty_streams: Annotated[int, Field(ge=0, le=MAX_DIRTY_STREAMS)]
    """v3: the most dirty streams that it offers; 0: the device knows no v3."""
    state_mib: Annotated[float, Field(gt=0, le=1 << 20)]
    """All of its state, beside critical objects."""
    stop_only_mib: Annotated[NonNegative, Field(default_factory=float)]  # from _all_of_it
    """Of it, what can be saved only when the device is stopped. If left out, all of it, as of a device that is idle."""
    block_kib: Annotated[int, Field(ge=1, le=1 << 20)]
    """The grain in which state is dirtied and sent."""
    vectors: Annotated[int, Field(ge=0, le=MAX_VECTORS)] = 0
    """Its size, as the number of its interrupt vectors, of which it has one a queue pair and a few more: with it grow
    the costs whose keys end with per_vector. 0: not known, and nothing grows."""
    suspend_ms: NonNegative
    """Until it starts no DMA any more."""
    quiesce_ms: NonNegative
    """Until it answers no DMA of other devices any more."""
    resume_ms: NonNegative = 0.0
    """Until it runs again."""
    config_load_ms: NonNegative
    """To load its configuration at the target, one device after the other."""
    critical: Critical
    writes: Writes | None = None
    reconfigurations: Reconfigurations | None = None
    guest_resets_at_s: Times = []
    """When the guest resets it, after the start. That ends a session (vfio.h), and with it the migration."""
    faults: Annotated[list[Fault], Field(max_length=MAX_FAULTS)] = []
    """What fails in it."""

    suspend_ns = Whole("suspend_ms")
    quiesce_ns = Whole("quiesce_ms")
    resume_ns = Whole("resume_ms")
    config_load_ns = Whole("config_load_ms")
    block_bytes = Whole("block_kib")

    @model_validator(mode="before")
    @classmethod
    def _all_of_it(cls, tables: Any) -> Any:
        """The default of stop_only_mib. It counts as set: it has a source, and may have a range."""
        if isinstance(tables, dict) and "state_mib" in tables and "stop_only_mib" not in tables:
            return tables | {"stop_only_mib": tables["state_mib"]}
        return tables

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if "STOP_COPY" not in self.features:
            raise self.wrong("features", 'must have "STOP_COPY", as every device that can migrate does')
        if len(set(self.features)) != len(self.features):
            raise self.wrong("features", "must name each once")
        if self.stop_only_mib > self.state_mib:
            raise self.wrong("stop_only_mib", f"must be at most state_mib = {self.state_mib:g}")
        if self.blocks < 1:
            raise self.wrong("state_mib", "must be at least one byte")
        if self.blocks > MAX_BLOCKS:
            raise self.wrong("block_kib", f"makes {self.blocks} blocks; must make at most {MAX_BLOCKS}")
        own = [f"{a.name} -> {b.name}" for a, b in arcs(self.flags)]
        for at, fault in enumerate(self.faults):
            if fault.arc is not None and fault.arc not in own:
                raise ValueError(
                    f"faults.{at}.arc = {fault.arc!r}: must be one that a device with these features takes: "
                    f"{', '.join(own)}"
                )
        if self.reconfigurations and self.reconfigurations.objects_each > self.critical.objects:
            raise ValueError(
                f"reconfigurations.objects_each = {self.reconfigurations.objects_each}: must be at most "
                f"critical.objects = {self.critical.objects}"
            )
        if self.writes and self.writes.mib_per_s and self.stop_only_blocks == self.blocks:
            raise self.wrong("stop_only_mib", "must leave something for writes to dirty")
        return self

    @property
    def blocks(self) -> int:
        """Blocks of the state; the last may be partly used, and is counted whole."""
        return -(-round(self.state_mib * MIB) // self.block_bytes)

    @property
    def stop_only_blocks(self) -> int:
        """Blocks that can be saved only once the device is stopped; the last ones."""
        return -(-round(self.stop_only_mib * MIB) // self.block_bytes)

    @property
    def whole_bytes(self) -> int:
        """One copy of its state: blocks and critical objects."""
        return self.blocks * self.block_bytes + self.critical.objects * self.critical.object_bytes

    @property
    def flags(self) -> MigrationFlags:
        """VFIO_DEVICE_FEATURE_MIGRATION's answer."""
        flags = MigrationFlags(0)
        for feature in self.features:
            flags |= MigrationFlags[feature]
        return flags
