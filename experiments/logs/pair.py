# SPDX-License-Identifier: GPL-2.0-or-later
"""The two logs of one migration: which one of several, which side each is of, whose device is whose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from experiments.logs.collect import migrations
from experiments.logs.events import LogFile
from experiments.logs.facts import SOURCE, TARGET, DeviceFacts, SideFacts
from proto_v3.errors import UserError

STATUSES = ("setup", "active", "device", "completed", "failed", "cancelled", "cancelling", "failing")
MOST_BACK_US = 1_000_000
"""Threads write in turn, but not in the order of their times; on a busy machine
tens of milliseconds apart. Ours."""
NO_WAY = ("failed", "cancelled", "cancelling", "failing")


@dataclass(frozen=True, slots=True)
class Pair:
    """One migration, seen from both sides."""

    source: SideFacts
    target: SideFacts
    devices: Sequence[tuple[DeviceFacts, DeviceFacts]]
    """Each device at the source and at the target, in the order in which QEMU has them."""
    notes: list[str] = field(default_factory=list)

    @property
    def traced(self) -> bool:
        """Both logs have trace events, and not QMP events only."""
        return self.source.traced and self.target.traced


def read_pair(source: str, target: str, number: int | None = None) -> Pair:
    """The migration with this number in each of the two logs, from 1; None: the last one that completed.

    UserError for logs that cannot be read, that are of no migration that completed, or of two different ones.
    """
    logs = [LogFile(source), LogFile(target)]
    sides, notes = [], []
    for log, side in zip(logs, (SOURCE, TARGET), strict=True):
        every = [each for each in migrations(log.read()) if each.statuses or each.side]
        if not every:
            raise UserError(f"{log.name}: has {log.events} events, but none of a migration")
        chosen, note = _chosen(log.name, every, number)
        if chosen.side not in (side, ""):
            raise UserError(_wrong_side(logs, chosen.side))
        if chosen.set_back_us > MOST_BACK_US:
            raise UserError(
                f"{log.name}: its times go back by {chosen.set_back_us / 1e3:.3f} ms: the clock was set meanwhile, or "
                "the log is of several processes; times in it cannot be compared"
            )
        sides.append(chosen)
        notes += note
        if not chosen.begun:
            notes.append(f"{log.name}: begins after the migration did; what was before is not known")
        if chosen.status != "completed":
            notes.append(f"{log.name}: does not show that the migration completed; it may be cut at its end")
        if log.cut:
            notes.append(f"{log.name}: its last line has no end: it may be cut")
    _check_ended(logs, sides)
    here, there = _ordered(sides[0]), _ordered(sides[1])
    if len(here) != len(there) or not here:
        raise UserError(
            f"{source} has {len(here)} VFIO devices that migrate, {target} has {len(there)}: "
            + ("these are two different migrations" if here and there else "there is nothing to fit")
        )
    pair = Pair(sides[0], sides[1], list(zip(here, there, strict=True)), notes)
    _check_bytes(logs, pair)
    return pair


def _chosen(name: str, every: Sequence[SideFacts], number: int | None) -> tuple[SideFacts, list[str]]:
    if number is not None:
        if number > len(every):
            raise UserError(f"--migration {number}: {name} has {len(every)}")
        return every[number - 1], []
    done = [each for each in every if each.status == "completed"]
    chosen = (done or every)[-1]
    if len(every) == 1:
        return chosen, []
    at = next(at for at, each in enumerate(every, 1) if each is chosen)
    return chosen, [f"{name}: has {len(every)} migrations; number {at} is taken (--migration takes another one)"]


def _wrong_side(logs: Sequence[LogFile], side: str) -> str:
    name = logs[0].name if side == TARGET else logs[1].name
    return f"{name}: is the log of a {side}; the source's log comes first, the target's second: they seem to be swapped"


def _check_ended(logs: Sequence[LogFile], sides: Sequence[SideFacts]) -> None:
    """UserError unless the guest was stopped at the source, and the migration did not fail."""
    for log, facts in zip(logs, sides, strict=True):
        if facts.status in NO_WAY:
            when = "after the guest was stopped" if _stopped(facts) else "before the guest was stopped"
            how = "was cancelled" if facts.status.startswith("cancel") else "failed"
            why = f" ({facts.error})" if facts.error else ""
            raise UserError(f"{log.name}: this migration {how} {when}{why}; a fit needs one that completed")
    if not _stopped(sides[0]):
        raise UserError(
            f"{logs[0].name}: the guest was not stopped in it (its last status is {sides[0].status or 'not told'}): "
            "the log is cut before the switchover, or vm_state_notify and vfio_migration_set_state were not traced"
        )
    if not any(device.to("RESUMING") or device.to("RUNNING") for device in sides[1].devices.values()):
        raise UserError(f"{logs[1].name}: no device was loaded in it: the log is cut before the switchover")


def _stopped(facts: SideFacts) -> bool:
    return (
        facts.stopped_us is not None
        or "src-downtime-start" in facts.marks
        or any(device.to("STOP_COPY", "STOP") for device in facts.devices.values())
    )


def _ordered(facts: SideFacts) -> list[DeviceFacts]:
    """The devices that take part, in QEMU's order: that of their set-up, whatever order they stop in."""
    devices = [device for device in facts.devices.values() if device.transitions]
    begins = [_begin_us(device) for device in devices]
    known = [begin for begin in begins if begin is not None]
    if len(known) == len(devices):
        return [device for _, device in sorted(zip(known, devices, strict=True), key=lambda each: each[0])]
    return devices


def _begin_us(device: DeviceFacts) -> int | None:
    for each in (device.to("RESUMING"), device.to("PRE_COPY")):
        if each is not None:
            return each.end_us
    stretches = (device.save, device.save_thread, device.config)
    return next((each.begin_us for each in stretches if each is not None), device.setup_us)


def _check_bytes(logs: Sequence[LogFile], pair: Pair) -> None:
    """UserError if what was saved is not what was loaded, in two logs that are whole."""
    for at, line in enumerate(_not_the_same(pair)):
        whole = all(side.begun and side.status == "completed" for side in (pair.source, pair.target))
        if whole and at == 0:
            raise UserError(
                f"{logs[0].name}, {logs[1].name}: {line}: these are two different migrations, or lines are missing"
            )
        if not whole:
            pair.notes.append(line)


def _not_the_same(pair: Pair) -> Iterator[str]:
    for at, (here, there) in enumerate(pair.devices):
        saved, loaded = here.precopy_bytes + here.stop_bytes, sum(piece.bytes for piece in there.pieces)
        if pair.traced and not pair.source.multifd and saved != loaded:
            yield f"device {at}: {saved} bytes were saved, {loaded} were loaded"
        elif pair.traced and not pair.source.multifd and here.pieces_crc != there.pieces_crc:
            yield f"device {at}: {saved} bytes were saved, and loaded in other pieces than they were saved in"
