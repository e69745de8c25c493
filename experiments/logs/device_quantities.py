# SPDX-License-Identifier: GPL-2.0-or-later
"""What the logs tell of each device: its features, sizes, times, and what its guest writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from experiments.logs.facts import DeviceFacts, Piece, Transition, starts, stops
from experiments.logs.pair import Pair
from experiments.logs.quantity import MIB, US_PER_MS, US_PER_S, LogQuantity, assumed, bounded, measured, unknown
from proto_v3.vfio.uapi import MigrationFlags
from sim.scenario.device import Device
from sim.scenario.units import KIB

FRAMING_BYTES = 4096
"""What a driver gives of a stopped device that has nothing more to give. Ours."""
LONG_ENOUGH_S, UNSURE = 5.0, 1.5
"""What a guest writes within less time may be so many times more, or less, in the mean. Ours."""
LEAST_S = 0.1
"""Reports within less time say nothing of what a guest writes: a driver may notice it later. Ours."""
CLOSE_SHARE = 0.02
"""Bounds of a size that are this near to each other are one value. Ours."""
AGAIN_SHARE = 0.9
"""As in sim.real.measured: a driver that gives this share of the state once more has no increments."""
FEATURES = (MigrationFlags.STOP_COPY, MigrationFlags.P2P, MigrationFlags.PRE_COPY)
SMALL_MIB, SMALL_BLOCK_KIB, BLOCK_KIB = 256, 4, 64
"""A device with a state below this has small blocks, so that its size is met."""


def device_quantities(pair: Pair, at: int, base: Device) -> Iterator[LogQuantity]:
    """Of the device with this number. `base`: the device of the scenario that is extended."""
    here, there = pair.devices[at]
    key = f"device.{at}."
    features = features_of(here)
    yield measured(f"{key}features", [flag.name for flag in FEATURES if flag in features], _features_told(here))
    yield from _stop_times(key, here)
    yield from _resume(key, there)
    if there.config is not None:
        how = "vfio_load_device_config_state_start to _end"
        yield measured(f"{key}config_load_ms", there.config.us / US_PER_MS, how)
    elif pair.target.traced:
        yield unknown(f"{key}config_load_ms", "vfio_load_device_config_state_* is not in the target's log")
    if pair.source.traced:
        yield from _sizes(key, pair, here, there, base)
        yield from _writes(key, pair, here, there)


def features_of(device: DeviceFacts) -> MigrationFlags:
    """What the device has: by vfio_migration_init, or by the states that it was in."""
    if device.flags is not None:
        return MigrationFlags(device.flags & 7)
    states = {each.target for each in device.transitions}
    flags = MigrationFlags.STOP_COPY
    if states & {"PRE_COPY_P2P", "RUNNING_P2P"}:
        flags |= MigrationFlags.P2P
    if states & {"PRE_COPY", "PRE_COPY_P2P"}:
        flags |= MigrationFlags.PRE_COPY
    return flags


def _features_told(device: DeviceFacts) -> str:
    return "mig_flags of vfio_migration_init" if device.flags is not None else "the states that it was in"


def _stop_times(key: str, here: DeviceFacts) -> Iterator[LogQuantity]:
    steps = stops(here)
    names = ("suspend_ms", "quiesce_ms")
    if not steps:
        yield unknown(f"{key}suspend_ms", "vfio_migration_set_state is not in the source's log")
        return
    for name, step in zip(names, steps, strict=False):
        yield _transition(f"{key}{name}", step)
    if len(steps) == 1:
        yield measured(f"{key}quiesce_ms", 0.0, "without P2P it is part of suspend_ms")


def _transition(key: str, step: Transition) -> LogQuantity:
    if step.begin_us is None:
        return unknown(key, f"only the end of the first step to {step.target} is in the events")
    arc = f"{step.current} -> {step.target}" if step.current else f"to {step.target}"
    how = f"vfio_migration_set_state to vfio_migration_set_device_state, {arc}"
    return measured(key, (step.end_us - step.begin_us) / US_PER_MS, how)


def _resume(key: str, there: DeviceFacts) -> Iterator[LogQuantity]:
    steps = starts(there)
    times_us = [each.end_us - each.begin_us for each in steps if each.begin_us is not None]
    if not times_us:
        yield unknown(f"{key}resume_ms", "the target's steps to RUNNING are not in its log")
        return
    seen = [each for each in steps if each.begin_us is not None]
    parts = ", ".join(f"to {each.target} {us / US_PER_MS:.3f} ms" for each, us in zip(seen, times_us, strict=True))
    if len(times_us) < len(steps):
        least_ms = sum(times_us) / US_PER_MS
        yield bounded(
            f"{key}resume_ms", least_ms, f"{parts}; when the first step began, is not in the events", least_ms
        )
        return
    how = f"{parts}; what the driver does as it leaves RESUMING is in it"
    yield measured(f"{key}resume_ms", sum(times_us) / US_PER_MS, how)


def stop_pieces(pair: Pair, there: DeviceFacts) -> list[Piece]:
    """What was written into the device after the stop."""
    if there.arrived:
        return there.pieces
    switched_us = pair.target.moments.get("switchover start")
    if switched_us is None:
        return []
    return [piece for piece in there.pieces if piece.begin_us >= switched_us]


def setup_size(here: DeviceFacts) -> int | None:
    """MIG_DATA_SIZE as asked before anything was read: the whole state. None: it was not traced, as in QEMU 10."""
    first = here.sizes[0] if here.sizes else None
    return first.bytes if first is not None and here.setup_us is not None and first.at_us <= here.setup_us else None


class StateSize(NamedTuple):
    """How large a device's state is."""

    bytes: int
    """The value; 0: it cannot be told."""
    low: int | None
    high: int | None
    """Bounds; None: there is none."""
    how: str

    @property
    def known(self) -> bool:
        """The bounds are next to each other."""
        return self.low is not None and self.high is not None and self.high - self.low <= CLOSE_SHARE * self.bytes


def state_size(here: DeviceFacts, there: DeviceFacts) -> StateSize:
    """The size of the state: as the device says before anything is read, or by what was read."""
    if (size := setup_size(here)) is not None:
        return StateSize(size, size, size, "vfio_query_stop_copy_size at set-up")
    if here.sizes and not here.precopy_blocks:
        size = here.sizes[0].bytes
        return StateSize(size, size, size, "stopcopy size of the first vfio_state_pending_exact")
    if here.told_bytes is not None and not here.precopy_blocks:
        size = here.told_bytes
        return StateSize(size, size, size, "vfio transferred of query-migrate, by packets of each device")
    if here.sizes and here.first_pass_bytes is not None and here.sizes[0].bytes >= here.first_pass_bytes:
        size = here.sizes[0].bytes  # of the whole, or of what is left
        return StateSize(
            size, size, size + here.first_pass_bytes, "stopcopy size of the first vfio_state_pending_exact"
        )
    if there.arrived:
        most = len(there.pieces) * (here.buffer_bytes or MIB) + (here.first_pass_bytes or 0)
        return StateSize(
            most, here.first_pass_bytes, most, f"{len(there.pieces)} packets of multifd, as if all were full"
        )
    first = here.reports[0] if here.reports and here.setup_us is not None else None
    announced = first.initial_bytes + first.dirty_bytes if first is not None else 0
    stopped = here.stop_bytes if here.stop_bytes > FRAMING_BYTES else 0
    if here.first_pass_bytes is None:  # what pre-copy had to give was not read to its end
        most = here.precopy_bytes + stopped
        least = min(most, max(announced, stopped))
        return StateSize(most, least, most, "vfio_save_block, in pre-copy and after the stop")
    read = max(here.first_pass_bytes, min(announced, here.precopy_bytes))
    if stopped >= AGAIN_SHARE * read:
        most = read + stopped
        if read <= CLOSE_SHARE * stopped:
            return StateSize(most, stopped, most, "vfio_save_block, nearly all of it after the stop")
        return StateSize(
            stopped, stopped, most, "vfio_save_block after the stop; of it, pre-copy may have given some before"
        )
    most = read + stopped
    return StateSize(
        read if here.dirtied_bytes else most, read, most, "vfio_save_block of the first pass and after the stop"
    )


def whole_bytes(here: DeviceFacts, there: DeviceFacts) -> tuple[int, str]:
    """The size of the state, and by what; 0: it cannot be told."""
    size = state_size(here, there)
    return size.bytes, size.how


def _sizes(key: str, pair: Pair, here: DeviceFacts, there: DeviceFacts, base: Device) -> Iterator[LogQuantity]:
    size = state_size(here, there)
    whole = size.bytes
    if not whole:
        yield unknown(f"{key}state_mib", "no vfio_query_stop_copy_size, vfio_state_pending_exact or vfio_save_block")
        return
    critical = _critical_bytes(here, base)
    if whole <= critical:
        critical = 0
        yield assumed(f"{key}critical.objects", 0, "the whole state is smaller than the base's objects would be")
    state = (whole - critical) / MIB
    told = f"{size.how}, {whole} bytes" + (f" less {critical} of critical objects" if critical else "")
    low, high = (None if each is None else max(0, each - critical) / MIB for each in (size.low, size.high))
    if size.known:
        yield measured(f"{key}state_mib", state, told)
    else:
        yield bounded(f"{key}state_mib", state, told, low, high)
    block_kib = SMALL_BLOCK_KIB if state < SMALL_MIB else BLOCK_KIB
    yield assumed(f"{key}block_kib", block_kib, "so small that the size is met; nothing else depends on it")
    yield from _stop_only(key, pair, here, there, state)


def _critical_bytes(here: DeviceFacts, base: Device) -> int:
    """What of the state is critical: as the device announces it apart, or as the base has it."""
    first = here.reports[0] if here.reports else None
    if first is not None and first.initial_bytes and first.dirty_bytes and base.critical.objects:
        return first.initial_bytes
    return base.critical.objects * base.critical.object_bytes


def _stop_only(key: str, pair: Pair, here: DeviceFacts, there: DeviceFacts, state_mib: float) -> Iterator[LogQuantity]:
    name = f"{key}stop_only_mib"
    if MigrationFlags.PRE_COPY not in features_of(here):
        yield measured(name, state_mib, "it has no PRE_COPY")
    elif pair.source.multifd:
        count, size_mib = len(there.pieces), (here.buffer_bytes or MIB) / MIB
        how = f"{count} packets of multifd, of up to {size_mib:g} MiB"
        high = min(state_mib, count * size_mib)
        least = _beyond(here, high)
        if least is None:
            yield bounded(name, high, how, None, high)
        else:
            yield bounded(name, least[0], f"{how}; {least[1]}", least[0], high)
    elif rereads(here, there):
        yield measured(name, 0.0, "pre-copy gives all of it, and STOP_COPY all of it again")
    elif here.stop_bytes <= FRAMING_BYTES:
        yield measured(name, 0.0, f"{here.stop_bytes} bytes of vfio_save_block after the stop: no more than the end")
    else:
        stopped = min(state_mib, here.stop_bytes / MIB)
        unread = _unread_bytes(here) / MIB
        how = f"{here.stop_bytes} bytes of vfio_save_block after the stop"
        least = _beyond(here, stopped)
        if least is not None:
            yield bounded(name, stopped, f"{how}; {least[1]}", least[0], stopped)
        elif not here.dirtied_us:
            yield bounded(name, stopped, f"{how}; what of it was dirty, is not known", 0.0, stopped)
        elif unread:
            low = max(0.0, stopped - unread)
            yield bounded(name, low, f"{how}, of which some were dirty at the stop", low, stopped)
        else:
            yield measured(name, stopped, f"{how}, nothing of it dirty by the last PRECOPY_INFO")


def _beyond(here: DeviceFacts, most_mib: float) -> tuple[float, str] | None:
    """What a stopped device adds by its own word, MiB, and in words. None if MIG_DATA_SIZE is not of what is left: it
    did not become less, as with a driver that reports a whole image in any state."""
    whole = setup_size(here) or (here.sizes[0].bytes if here.sizes else 0)
    if here.beyond is None or not 0 < here.beyond[0] < AGAIN_SHARE * whole:
        return None
    size, beyond = here.beyond
    how = f"of the last MIG_DATA_SIZE, {size} bytes, PRECOPY_INFO announced all but {beyond}"
    return min(most_mib, beyond / MIB if beyond > FRAMING_BYTES else 0.0), how


def _unread_bytes(here: DeviceFacts) -> float:
    """What was dirty at the stop: by the last report, and by the rate since then."""
    if not here.reports:
        return here.stop_bytes
    last, stopped = here.reports[-1], stops(here)
    after_us = max(0, stopped[0].end_us - last.at_us) if stopped else 0
    return last.initial_bytes + last.dirty_bytes + dirty_bytes_per_s(here) * after_us / US_PER_S


def rereads(here: DeviceFacts, there: DeviceFacts) -> bool:
    """Whether pre-copy gives the whole state, and STOP_COPY all of it again."""
    whole, _ = whole_bytes(here, there)
    read = here.first_pass_bytes if here.first_pass_bytes is not None else here.precopy_bytes
    return bool(here.precopy_blocks) and read >= AGAIN_SHARE * whole <= here.stop_bytes


def dirty_bytes_per_s(here: DeviceFacts) -> float:
    """What became dirty after the device was drained for the first time."""
    return here.dirtied_bytes * US_PER_S / here.dirtied_us if here.dirtied_us else 0.0


def _writes(key: str, pair: Pair, here: DeviceFacts, there: DeviceFacts) -> Iterator[LogQuantity]:
    name = f"{key}writes.mib_per_s"
    if MigrationFlags.PRE_COPY not in features_of(here):
        yield unknown(name, "without PRE_COPY nothing tells what the guest writes")
    elif rereads(here, there):
        yield unknown(name, "this driver does not tell what became dirty")
    elif not here.dirtied_us:
        yield unknown(
            name, "no two PRECOPY_INFOs came after all was read (vfio_query_precopy_size, vfio_state_pending_exact)"
        )
    else:
        span_s = here.dirtied_us / US_PER_S
        how = f"{here.dirtied_bytes} bytes from report to report within {span_s:.3g} s, as if written anywhere"
        rate = dirty_bytes_per_s(here) / MIB
        if span_s < LEAST_S:
            yield unknown(name, f"{how}: too short to tell")
        elif rate and span_s < LONG_ENOUGH_S:
            yield bounded(name, rate, f"{how}; not long enough to be sure", rate / UNSURE, rate * UNSURE)
        else:
            yield measured(name, rate, how)
    reinits = [each.at_us for each in here.reports if each.reinit]
    if reinits and pair.source.begun:
        begin_us = pair.source.statuses[0][0]
        at_s = [round((each - begin_us) / US_PER_S, 6) for each in reinits]
        yield measured(f"{key}reconfigurations.at_s", at_s, "PRECOPY_INFO with REINIT, which was asked for then")


def critical_quantities(key: str, here: DeviceFacts, there: DeviceFacts, base: Device) -> Iterator[LogQuantity]:
    """Of a device that announces critical data apart: its size, and how long its set-up takes at most."""
    first = here.reports[0] if here.reports else None
    if first is None or not first.initial_bytes or not first.dirty_bytes or not base.critical.objects:
        return
    size_kib = first.initial_bytes / base.critical.objects / KIB
    how = f"the first PRECOPY_INFO: {first.initial_bytes} initial bytes, as {base.critical.objects} objects"
    yield measured(f"{key}critical.object_kib", max(1 / KIB, size_kib), how)
    approved_us = there.approved_us[0] if there.approved_us else None
    before = [piece for piece in there.pieces if approved_us is not None and piece.end_us <= approved_us]
    if before:
        most_us = before[-1].us
        usual_us = usual(before[:-1])
        each_us = max(0, most_us - usual_us) / base.critical.objects
        how = "the last write() of initial data before loadvm_approve_switchover, less what one of its size takes"
        yield bounded(f"{key}critical.setup_us", each_us, how, 0.0, most_us / base.critical.objects)


def usual(pieces: Sequence[Piece]) -> float:
    """What a write() takes, us; 0 without one."""
    return median([piece.us for piece in pieces]) if pieces else 0.0
