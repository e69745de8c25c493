# SPDX-License-Identifier: GPL-2.0-or-later
"""What a stream saves next. Pure: no I/O and no clock; the caller advances the device before.

A plan is critical objects first, then blocks. `next_record()` takes the next of them into a record, with the versions
that they have then; so what is written later is dirty again. How large a record is depends on the driver: in chunks,
or a whole image at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from sim.device import record_format
from sim.device.record import HEADER_BYTES, NO_INDICES, V3_HEADER_BYTES, Record, ranges_bytes
from sim.device.record_format import BlockRange
from sim.device.state import DeviceState, Indices
from sim.scenario.device import Device
from sim.scenario.tables import Driver


def image_bytes(spec: Device, driver: Driver, objects: int, blocks: int, header_bytes: int = HEADER_BYTES) -> int:
    """Bytes of an image in chunks, with `objects` critical objects and `blocks` blocks; headers included."""
    object_bytes = spec.critical.object_bytes
    chunk_bytes = driver.chunk_bytes
    records = -(-objects // max(1, chunk_bytes // object_bytes)) + -(-blocks // (chunk_bytes // spec.block_bytes))
    return objects * object_bytes + blocks * spec.block_bytes + records * header_bytes


class SavePlan:
    """The plan of one stream. As it stands here, v2's."""

    header_bytes = HEADER_BYTES
    end_bytes = 0
    """Payload of the END record."""

    def __init__(
        self, stream: int, device: DeviceState, driver: Driver, *, stripe: slice | None, objects: bool
    ) -> None:
        """`stripe`: the blocks that the stream carries (None: it has none); `objects`: it carries the critical ones."""
        self.final = False
        """The device is stopped: an END record follows the plan."""
        self.refused = False
        """Firmware refused a SAVE in pre-copy: nothing is saved before the device is stopped, and then all of it."""
        self.objects: Indices = NO_INDICES
        self.blocks: Indices = NO_INDICES
        self.initial = False
        """Planned blocks count as v2's initial_bytes, where the driver counts a whole image."""
        self.initial_objects = False
        """Planned objects count as v2's initial_bytes."""
        self.epoch = 0
        """The device's epoch when the plan was made."""
        self._stream = stream
        self._device = device
        self._driver = driver
        self._stripe = stripe
        self._carries_objects = objects

    # --- planning -----------------------------------------------------------------------------------------------------

    def plan_all(self, *, initial: bool) -> None:
        """Plan what is dirty: everything at first, later what was written to or reconfigured since it was saved."""
        if self._driver.precopy == "reread":
            self._device.forget_saves(self._stripe or slice(0), objects=self._carries_objects)
        self.initial = self.initial_objects = initial
        self.plan(self.dirty_objects(), self.dirty_blocks(stopped=self.final))

    def plan(self, objects: Indices, blocks: Indices) -> None:
        """Save these next, and nothing else."""
        self.objects, self.blocks = objects, blocks
        self.epoch = self._device.epoch

    def plan_objects(self, *, initial: bool) -> None:
        """Plan the critical objects that are dirty; planned blocks stay planned. What counted as initial still does."""
        self.initial_objects = initial or (self.initial_objects and len(self.objects) > 0)
        self.plan(self.dirty_objects(), self.blocks)

    def refuse(self) -> None:
        """Firmware refused a SAVE: what was planned is not, and what was saved has to be saved again."""
        self.refused = True
        self.plan(NO_INDICES, NO_INDICES)
        self._device.forget_saves(self._stripe or slice(0), objects=self._carries_objects)

    def not_saved(self, record: Record) -> None:
        """The SAVE of a record that was taken off the plan gave nothing."""
        self._device.unsave(record.blocks, record.objects)

    def dirty_objects(self) -> Indices:
        """Critical objects of this stream that have to be saved (again)."""
        return self._device.dirty_objects() if self._carries_objects else NO_INDICES

    def dirty_blocks(self, *, stopped: bool) -> Indices:
        """Blocks of this stream that have to be saved (again); the stop-only ones only if `stopped`."""
        return NO_INDICES if self._stripe is None else self._device.dirty_blocks(self._stripe, stopped=stopped)

    # --- records ------------------------------------------------------------------------------------------------------

    @property
    def has_data(self) -> bool:
        """Objects or blocks are planned."""
        return bool(len(self.objects) or len(self.blocks))

    @property
    def has_record(self) -> bool:
        """There is a next record: with data, or to report an epoch or the end, which need none."""
        return self.final or self.has_new_epoch or self.has_data

    @property
    def has_new_epoch(self) -> bool:
        """An epoch is to be reported, whether or not there is anything to save: by v3's critical stream."""
        return False

    @property
    def in_chunks(self) -> bool:
        """Records are cut to the driver's chunks; else an image is one record."""
        return self.final or self._driver.precopy_image == "chunks"

    @property
    def _together(self) -> bool:
        """Objects and blocks are one image."""
        return not self.in_chunks and self._driver.initial == "image" and not self._driver.has_priority

    def next_record(self) -> Record:
        """Take the next record off the plan; the END if the device is stopped and nothing is left."""
        device = self._device
        has_new_epoch = self.has_new_epoch
        if has_new_epoch:  # it may just have begun: objects that it made dirty belong to the epoch reported now
            self.objects = self.dirty_objects()
        critical = has_new_epoch or len(self.objects) > 0
        objects = self._take_objects()
        object_versions = device.save_objects(objects)
        # A plan of several records may be older than the newest epoch, which then is not complete with it.
        complete = critical and not len(self.objects) and not len(device.dirty_objects())
        invalidates = self._complete_epoch() if complete else ()
        blocks = self._take_blocks() if self._together or not len(objects) else NO_INDICES
        data_bytes = len(objects) * device.object_bytes + len(blocks) * device.block_bytes + ranges_bytes(invalidates)
        end = not data_bytes and not complete
        return Record(
            self._stream,
            device.epoch,
            self.end_bytes if end else data_bytes,
            objects=objects,
            object_versions=object_versions,
            blocks=blocks,
            block_versions=device.save_blocks(blocks),
            initial=self.initial_objects if critical else self.initial and not end and self._driver.initial == "image",
            header_bytes=self.header_bytes,
            chunk=self.in_chunks and data_bytes > 0,
            epoch_complete=complete,
            invalidates=invalidates,
            end=end,
        )

    def _take_objects(self) -> Indices:
        chunk_objects = max(1, self._driver.chunk_bytes // self._device.object_bytes)
        count = chunk_objects if self.in_chunks else len(self.objects)
        taken, self.objects = self.objects[:count], self.objects[count:]
        return taken

    def _take_blocks(self) -> Indices:
        count = self._driver.chunk_bytes // self._device.block_bytes if self.in_chunks else len(self.blocks)
        taken, self.blocks = self.blocks[:count], self.blocks[count:]
        return taken

    def _complete_epoch(self) -> tuple[BlockRange, ...]:
        """The next record is the last of its epoch's critical data; returns what it makes invalid (v3)."""
        return ()

    def plain_record(self, payload_bytes: int) -> Record:
        """A record without state: a message between drivers at the start. It counts as initial."""
        return Record(self._stream, self._device.epoch, payload_bytes, initial=True, header_bytes=self.header_bytes)

    # --- bytes --------------------------------------------------------------------------------------------------------

    def planned_bytes(self) -> int:
        """Bytes of the records that are planned."""
        return self._record_bytes(len(self.objects), len(self.blocks))

    def planned_initial_bytes(self) -> int:
        """The same, of what counts as initial."""
        objects = len(self.objects) if self.initial_objects else 0
        return self._record_bytes(objects, len(self.blocks) if self.initial and self._driver.initial == "image" else 0)

    def unplanned_bytes(self) -> int:
        """Bytes of the records of what became dirty since this was planned, and can be saved while the device runs."""
        if self.refused:
            return 0
        # What is planned is dirty too, until its SAVE starts.
        objects, blocks = len(self.dirty_objects()), len(self.dirty_blocks(stopped=False))
        return self._record_bytes(objects - len(self.objects), blocks - len(self.blocks))

    def stopped_bytes(self) -> int:
        """Bytes that are still to be saved if the device is stopped now: what is dirty then, planned or not; all of it
        if the driver rereads."""
        device = self._device
        objects, blocks = len(self.dirty_objects()), len(self.dirty_blocks(stopped=True))
        if self._driver.precopy == "reread" and not self.final:
            stripe = slice(0) if self._stripe is None else self._stripe
            objects = len(device.object_version) if self._carries_objects else 0
            blocks = len(device.version[stripe])
        planned = 0
        if not self.in_chunks:  # what is planned by now is still one image, the rest will come in chunks
            planned = self.planned_bytes()
            objects, blocks = objects - len(self.objects), blocks - len(self.blocks)
        return planned + self._chunked_bytes(objects, blocks)

    def _record_bytes(self, objects: int, blocks: int) -> int:
        """Bytes of records with these, headers included."""
        if self.in_chunks:
            return self._chunked_bytes(objects, blocks)
        device = self._device
        records = bool(objects) + bool(blocks) - bool(objects and blocks and self._together)
        return objects * device.object_bytes + blocks * device.block_bytes + records * self.header_bytes

    def _chunked_bytes(self, objects: int, blocks: int) -> int:
        return image_bytes(self._device.spec, self._driver, objects, blocks, self.header_bytes)


class V3Plan(SavePlan):
    """Of a v3 stream: its format, and the epoch that is reported."""

    header_bytes = V3_HEADER_BYTES
    end_bytes = record_format.RecordEnd.SIZE

    _held_epoch = 1
    """What stream_info() reports while no epoch's data is saved."""

    @property
    def only_checks(self) -> bool:
        """Nothing of the state comes before the device is stopped."""
        return (self._driver.precopy == "check" or self.refused) and not self.final

    @property
    def newest_epoch(self) -> int:
        """What stream_info() reports: the epoch stays as it is as long as no epoch's data is saved."""
        return self._held_epoch if self.only_checks else self._device.epoch

    @override
    def refuse(self) -> None:
        self._held_epoch = self.newest_epoch
        super().refuse()


class CriticalPlan(V3Plan):
    """Of v3's critical stream, which reports all epochs."""

    def __init__(self, device: DeviceState, driver: Driver) -> None:
        super().__init__(0, device, driver, stripe=None, objects=True)
        self.completed_epoch = 0
        """The newest epoch whose critical data is saved, or being saved, to the last record."""
        self._completed_before = 0
        self._invalidates: list[BlockRange] = []
        """Of the epochs since the last completed one."""

    def epoch_began(self, invalidates: Sequence[BlockRange]) -> None:
        """Dirty data of these blocks from before the epoch is invalid: its last record says so."""
        self._invalidates += invalidates

    @property
    @override
    def has_new_epoch(self) -> bool:
        return not self.only_checks and self._device.epoch > self.completed_epoch

    @override
    def not_saved(self, record: Record) -> None:
        super().not_saved(record)
        if record.epoch_complete:
            self.completed_epoch = self._completed_before

    @override
    def _complete_epoch(self) -> tuple[BlockRange, ...]:
        self._completed_before, self.completed_epoch = self.completed_epoch, self._device.epoch
        invalidates, self._invalidates = tuple(self._invalidates), []
        return invalidates
