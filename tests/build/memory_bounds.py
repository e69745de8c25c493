# SPDX-License-Identifier: GPL-2.0-or-later
"""What memory v3 needs at the target at most, written from the protocol's rules, apart from the product's own bound."""

from __future__ import annotations

from dataclasses import dataclass

from proto_v3.wire.streams import Wire
from sim.device.record import V3_HEADER_BYTES
from sim.device.record_format import BlockRange, RecordBlocks, RecordEnd, RecordRanges
from sim.scenario.device import Device
from sim.scenario.scenario import Scenario
from sim.scenario.units import KIB


@dataclass(frozen=True)
class Bounds:
    """See bounds()."""

    reorder_bytes: int
    held_bytes: int


def bounds(scenario: Scenario, epochs: int) -> Bounds:
    """What memory v3 needs at the target, at most.

    `reorder_bytes`, the VMM, for D devices with L dirty wire streams each:

        a connection a stream    D x (read + L x frame)
        shared connections       D x (max(critical credit, read) + max(dirty credit, frame))

    read is the size of a read(); frame is that, or, with addressable blocks, one record of as many blocks as fit into a
    read, and at least one block. A wire stream with a connection of its own holds the one frame that it is writing: the
    others wait in the connection. Where wire streams share connections, the source sends no more than the credit, or
    one frame that is larger when nothing else is out.

    `held_bytes`, the driver of one device: of each stream the record that is coming in, waits for its epoch or is being
    loaded,

        critical record + sum over the dirty streams (dirty record)
        critical record + L x frame                                        with addressable blocks

    for a write() holds no more, and each stream has one write() at a time (of blocks there are as many as there are
    wire streams). A record's payload is at most a chunk, or one object or block where that is larger; before the stop,
    in drivers that save images as a whole, all critical objects, or all blocks of the stream; in drivers that only
    check before the stop, what they check. To that comes the header, and in a critical record the ranges of the epochs
    that it names.
    """
    options = scenario.v3_options()
    read = scenario.switchover_settings().read_bytes
    reorder = held = 0
    for device in scenario.devices:
        frame = blocks_record(device, max(1, read // device.block_bytes)) if options.blocks else read
        if options.wire is Wire.STREAMS:
            reorder += read + options.wire_streams * frame
        else:
            credits = options.credits
            reorder += max(credits.critical_bytes, read) + max(credits.dirty_bytes, frame)
        dirty = [dirty_record(scenario, device, stream) for stream in range(options.dirty_streams)]
        held = max(
            held,
            critical_record(scenario, device, epochs)
            + (options.wire_streams * frame if options.blocks else sum(dirty)),
        )
    return Bounds(reorder, held)


def blocks_record(device: Device, blocks: int) -> int:
    return V3_HEADER_BYTES + RecordBlocks.SIZE + blocks * (8 + device.block_bytes)


def critical_record(scenario: Scenario, device: Device, epochs: int) -> int:
    object_bytes = round(device.critical.object_kib * KIB)
    payload = device.critical.objects * object_bytes
    if scenario.driver.precopy_image == "chunks":
        payload = min(payload, max(object_bytes, scenario.driver.chunk_bytes))
    payload = max(payload, check_bytes(scenario))
    return V3_HEADER_BYTES + RecordRanges.SIZE + epochs * BlockRange.SIZE + payload


def dirty_record(scenario: Scenario, device: Device, stream: int) -> int:
    payload = len(range(stream, device.blocks, scenario.v3_options().dirty_streams)) * device.block_bytes
    if scenario.driver.precopy_image == "chunks":
        payload = min(payload, scenario.driver.chunk_bytes)
    return V3_HEADER_BYTES + max(payload, check_bytes(scenario), RecordEnd.SIZE)


def check_bytes(scenario: Scenario) -> int:
    return scenario.driver.check_bytes if scenario.driver.precopy == "check" else 0
